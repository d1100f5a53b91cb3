"""Gradients of stages as parts of one model's: copies of a tied weight add up, and the norm is that of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from buffer_lifting.errors import PartitionError
from buffer_lifting.layer_graphs import plain_name
from buffer_lifting.package import LoadedStage
from buffer_lifting.runtime import pp_group
from buffer_lifting.stages import Stage, StagedProgram


@dataclass
class _Tie:
    """The copies of one weight: those of this rank by stage, the stage whose copy counts, and who shares them."""

    fqn: str
    copies: dict[int, Parameter]
    first: int
    group: Any  # None: all copies are on this rank


class StageGradients:
    """The gradients of one rank's stages, as those of the whole model.

    A training step on every rank::

        schedule.step(...)
        loss_fn.reduce_gradients(parameters)   # under context parallelism, without FSDP
        gradients.reduce_tied()                # once, behind all microbatches
        gradients.clip_norm(1.0)
        optimizer.step()

    Make it on all ranks of the pipeline, once the modules are wrapped (FSDP): the ranks compare notes.

    Args:
        stages: the staged program; or one loaded stage, or all that this rank has.
        modules: this rank's modules by stage index (``StepRunner.modules``), or its ``PipelineStage`` objects.
        group, mesh: the pipeline ranks, as in :meth:`StagedProgram.build_stage`.

    Raises:
        PartitionError: a stage that no rank or several ranks have; copies of a weight that are of different shape,
            dtype or sharding, or of which only some are trained.
    """

    def __init__(
        self,
        stages: StagedProgram | LoadedStage | Sequence[LoadedStage],
        modules: Mapping[int, Module] | Iterable[Any],
        *,
        group: Any = None,
        mesh: Any = None,
    ) -> None:
        self._group = pp_group(group, mesh) if dist.is_initialized() else None
        given: Any = modules
        by_index = given if isinstance(given, Mapping) else {stage.stage_index: stage.submod for stage in given}
        self.modules: dict[int, Module] = dict(by_index)
        tied, records, count = _records(stages)
        local = {fqn: _copies(fqn, holders, self.modules, records) for fqn, holders in sorted(tied.items())}
        notes = {
            "stages": sorted(self.modules),
            "copies": {fqn: {index: _describe(p) for index, p in found.items()} for fqn, found in local.items()},
        }
        everyone = self._gather(notes)
        rank_of = _ranks(everyone, count)
        self._ties = []
        for fqn, copies in local.items():
            _check_alike(fqn, [note["copies"][fqn] for note in everyone])
            ranks = sorted({rank_of[index] for index in tied[fqn]})
            shared = self._subgroup(ranks) if copies and len(ranks) > 1 else None
            if any(parameter.requires_grad for parameter in copies.values()):
                self._ties.append(_Tie(fqn, copies, min(tied[fqn]), shared))
        self._compared = False

    def reduce_tied(self) -> None:
        """Gives every copy of a tied weight the sum of the gradients of all copies.

        One all-reduce a weight, among the ranks that have a copy. Call it once a step, on all of them, behind the last
        microbatch and what reduces over other dims of the mesh. Copies without any gradient keep none.

        Raises:
            PartitionError: at the first call, copies that have different values.
        """
        if not self._compared:
            self._compare()
            self._compared = True
        with torch.no_grad():
            for tie in self._ties:
                self._reduce(tie)

    def total_norm(self, norm_type: float = 2.0) -> Tensor:
        """The norm of all gradients of the whole model, a tied weight counted once: float32, the same on every rank."""
        norms = [
            _plain(torch.nn.utils.get_total_norm([_grad(p) for p in some], norm_type)).to(torch.float32)
            for some in _alike(self._counted())
        ]
        infinite = math.isinf(norm_type)
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        parts = torch.stack([norm.to(device) for norm in norms]) if norms else torch.zeros(1, device=device)
        total = parts.max() if infinite else (parts**norm_type).sum()
        if dist.is_initialized():
            dist.all_reduce(total, dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=self._group)
        return total if infinite else total ** (1.0 / norm_type)

    def clip_norm(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales all gradients so that :meth:`total_norm` is at most ``max_norm``, as ``clip_grad_norm_`` does.

        Call it on all ranks of the pipeline, behind :meth:`reduce_tied`.

        Returns:
            The norm before.

        Raises:
            RuntimeError: with ``error_if_nonfinite``, a norm that is no finite number; nothing is scaled then.
        """
        total = self.total_norm(norm_type)
        if error_if_nonfinite and not bool(total.isfinite()):
            raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}")
        for some in _alike([p for p in self._parameters() if p.grad is not None]):
            torch.nn.utils.clip_grads_with_norm_(some, max_norm, total)
        return total

    def _parameters(self) -> list[Parameter]:
        return list({id(p): p for module in self.modules.values() for p in module.parameters()}.values())

    def _counted(self) -> list[Parameter]:
        """The parameters with a gradient, without later copies of others."""
        copies = {id(p) for tie in self._ties for index, p in tie.copies.items() if index != tie.first}
        return [p for p in self._parameters() if p.grad is not None and id(p) not in copies]

    def _reduce(self, tie: _Tie) -> None:
        copies = list(tie.copies.values())
        used = torch.tensor(int(any(p.grad is not None for p in copies)), device=copies[0].device)
        if tie.group is not None:
            dist.all_reduce(used, dist.ReduceOp.MAX, group=tie.group)
        if not int(used):
            return
        for parameter in copies:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [_local(_grad(p)) for p in copies]
        total = parts[0].clone(memory_format=torch.contiguous_format)
        for part in parts[1:]:
            total += part
        if tie.group is not None:
            dist.all_reduce(total, group=tie.group)
        for part in parts:
            part.copy_(total)

    def _compare(self) -> None:
        """Refuses copies that are not equal: with equal gradients they would stay apart without anyone noticing."""
        for tie in self._ties:
            sums = [_checksum(p) for p in tie.copies.values()]
            bounds = torch.stack([torch.stack(sums).max(), -torch.stack(sums).min()])
            if tie.group is not None:
                dist.all_reduce(bounds, dist.ReduceOp.MAX, group=tie.group)
            if int(bounds[0]) != -int(bounds[1]):
                raise PartitionError(
                    f"the copies of {tie.fqn!r}, one weight that several stages have, have different values: load all "
                    "stages from one checkpoint"
                )

    def _gather(self, notes: dict[str, Any]) -> list[dict[str, Any]]:
        if not dist.is_initialized():
            return [notes]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, notes, group=self._group)
        return found

    def _subgroup(self, ranks: list[int]) -> Any:
        """The process group of some ranks of the pipeline; the others need not call this."""
        whole: Any = self._group if self._group is not None else dist.group.WORLD
        if len(ranks) == dist.get_world_size(whole):
            return whole
        chosen = [dist.get_global_rank(whole, rank) for rank in ranks]
        return dist.new_group(chosen, use_local_synchronization=True)


def _records(
    stages: StagedProgram | LoadedStage | Sequence[LoadedStage],
) -> tuple[Mapping[str, tuple[int, ...]], dict[int, Stage], int]:
    """What is tied, the stages that are known here, and how many there are."""
    if isinstance(stages, StagedProgram):
        return stages.tied, {stage.index: stage for stage in stages.stages}, len(stages.stages)
    loaded = [stages] if isinstance(stages, LoadedStage) else list(stages)
    if not loaded:
        raise PartitionError("give the stages that this rank has loaded")
    return loaded[0].tied, {stage.index: stage.stage for stage in loaded}, loaded[0].num_stages


def _copies(
    fqn: str, holders: Sequence[int], modules: Mapping[int, Module], records: Mapping[int, Stage]
) -> dict[int, Parameter]:
    """This rank's copies of a weight, by stage, under whichever of its names the stage has it."""
    found = {}
    for index in holders:
        if index not in modules:
            continue
        if index not in records:
            raise PartitionError(f"there is a module for stage {index}, but the stages given are {sorted(records)}")
        groups = [group for group in records[index].tied if fqn in group]
        names = {fqn, *(name for group in groups for name in group)}
        own = {plain_name(name): p for name, p in modules[index].named_parameters(remove_duplicate=False)}
        matches = [own[name] for name in sorted(names) if name in own]
        if not matches:
            raise PartitionError(f"the module of stage {index} has no {fqn!r}, which it shares with other stages")
        found[index] = matches[0]
    return found


def _describe(parameter: Parameter) -> tuple[Any, ...]:
    placements = str(parameter.placements) if isinstance(parameter, DTensor) else "not sharded"
    local = tuple(_local(parameter).shape)
    return tuple(parameter.shape), local, str(parameter.dtype), placements, parameter.requires_grad


def _ranks(everyone: list[dict[str, Any]], count: int) -> dict[int, int]:
    """Stage -> the rank that has it."""
    holders: dict[int, list[int]] = {index: [] for index in range(count)}
    for rank, note in enumerate(everyone):
        for index in note["stages"]:
            holders.setdefault(index, []).append(rank)
    wrong = {index: ranks for index, ranks in holders.items() if len(ranks) != 1}
    if wrong:
        index, ranks = next(iter(wrong.items()))
        where = f"on the pipeline ranks {ranks}" if ranks else "on no rank of the pipeline"
        raise PartitionError(f"stage {index} is {where}: give every rank the modules of its own stages, and no others")
    return {index: ranks[0] for index, ranks in holders.items()}


def _check_alike(fqn: str, notes: list[dict[int, Any]]) -> None:
    """Local parts of gradients are added up, so that the copies have to be laid out alike."""
    described = {index: what for note in notes for index, what in note.items()}
    first, *others = sorted(described)
    for other in others:
        if described[other] != described[first]:
            raise PartitionError(
                f"{fqn!r} is one weight in the stages {sorted(described)}, but (shape, local shape, dtype, sharding, "
                f"trained) is {described[first]} in stage {first} and {described[other]} in stage {other}: wrap and "
                "convert the stages alike"
            )


def _alike(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters by the mesh that they are sharded over: torch's functions take one kind at a time."""
    found: dict[Any, list[Parameter]] = {}
    for parameter in parameters:
        grad = parameter.grad
        found.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    return list(found.values())


def _grad(parameter: Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _checksum(parameter: Parameter) -> Tensor:
    """int64: of the bytes of this rank's part, whatever they mean."""
    return _local(parameter.detach()).contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)
