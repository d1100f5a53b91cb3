"""The records of a partition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from buffer_lifting.errors import FeedError, PartitionError
from buffer_lifting.feed import Lengths
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.naming import RESERVED
from buffer_lifting.program import InputAxes, SentTensor
from buffer_lifting.torch_compat import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Stage:
    """One pipeline stage.

    Attributes:
        index: 0 for the first.
        module: the stage as a module; its parameters have the FQNs of the original model. Positional inputs are
            ``activations``; every other input is a keyword, and keywords that it does not read are ignored.
        activations: the values that the previous stage sends (for stage 0: the user's positional inputs).
        kwargs: lifted and user inputs that this stage reads by keyword.
        outputs: the values that it hands on (the last stage: the program's outputs).
        parameters: FQNs of its parameters, as in the original model.
        boundary_bytes: bytes that it sends forward per microbatch, at the sizes of the example inputs.
        tied: groups of FQNs that are one parameter here.
        sends: dtype and shape of each of ``outputs``, and what makes it.
    """

    index: int
    module: GraphModule
    activations: tuple[str, ...]
    kwargs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    boundary_bytes: int
    tied: tuple[tuple[str, ...], ...] = ()
    sends: tuple[SentTensor, ...] = ()


@dataclass(frozen=True)
class StagedProgram:
    """A lifted program, split into stages.

    Attributes:
        stages: the stages in order.
        lifted: the program that was split.
        tied: FQN -> the stages that hold a copy of that parameter (it is read in more than one).
    """

    stages: tuple[Stage, ...]
    lifted: LiftedProgram
    in_spec: TreeSpec
    out_spec: TreeSpec
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all stages in this process, one after another: the reference for a pipelined run.

        Args:
            args: the program's own positional inputs.
            kwargs: its own keyword inputs and the lifted inputs (:meth:`feed`).

        Raises:
            PartitionError: the program was made for several context-parallel ranks.
        """
        if (self.lifted.cp_size or 1) > 1:
            raise PartitionError(
                f"the stages run on {self.lifted.cp_size} context-parallel ranks, not in one process; build_stage "
                "binds them to a mesh (buffer_lifting.verify runs all ranks in lockstep)"
            )
        values = list(args)
        named = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        for stage in self.stages:
            result = stage.module(*values, **(named if stage.index else kwargs))
            values = list(result) if isinstance(result, tuple) else [result]
        return tree_unflatten(values, self.out_spec)

    def feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None = None,
        order: Any = None,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        shard: Any = (0, 1),
        device: torch.device | str | None = None,
        n_microbatches: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The lifted inputs of one step, for the whole batch: see :meth:`LiftedProgram.feed`.

        A program that was exported with a static batch has that batch as its microbatch: ``batch_size`` is then a
        multiple of it. ``n_microbatches``, if given, is checked against the batch.

        Raises:
            FeedError: besides the errors of :meth:`LiftedProgram.feed`, a batch that does not divide into
                microbatches.
        """
        micro = self.lifted.axes.batch
        if n_microbatches is not None and (n_microbatches < 1 or batch_size % n_microbatches):
            raise FeedError(f"a batch of {batch_size} does not divide into {n_microbatches} microbatches")
        if micro is None or batch_size == micro:
            return self.lifted.feed(batch_size, seq_len, inputs, order, positions, shard, device)
        if batch_size % micro:
            raise FeedError(
                f"a batch of {batch_size} does not divide into microbatches of {micro}, the static batch the program "
                "was exported with"
            )
        if n_microbatches is not None and batch_size // n_microbatches != micro:
            raise FeedError(
                f"{n_microbatches} microbatches of a batch of {batch_size} have {batch_size // n_microbatches} samples "
                f"each, but the program was exported with a static batch of {micro}"
            )
        parts = [
            self.lifted.feed(
                micro,
                seq_len,
                None if inputs is None else {k: self._rows(k, v, start, micro) for k, v in inputs.items()},
                _rows_of(order, start, micro, batch_size),
                _rows_of(positions, start, micro, batch_size),
                shard,
                device,
            )
            for start in range(0, batch_size, micro)
        ]
        return {name: _join([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _rows(self, name: str, value: torch.Tensor, start: int, count: int) -> torch.Tensor:
        axes = self.lifted.input_axes.get(name)
        if axes is None or axes.batch_dim is None:
            return value
        return value.narrow(axes.batch_dim, start, count)

    def shard_inputs(
        self, *, order: Any = None, shard: Any = (0, 1), **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """User inputs in the order of the shards: see :meth:`LiftedProgram.shard_inputs`."""
        return self.lifted.shard_inputs(order=order, shard=shard, **inputs)

    def kwargs_chunk_spec(self, kwargs: Iterable[str] | None = None) -> dict[str, Any]:
        """What a schedule's constructor takes as ``kwargs_chunk_spec``: along which dim it cuts each keyword.

        torch pairs the entries with the keywords of ``step`` *by order*, so give the same names in the same order:
        by default the program's keyword inputs and then the lifted inputs, in the order of :meth:`feed`.

        Args:
            kwargs: the keywords of ``step``, in their order (a mapping will do).

        Returns:
            Name -> ``torch.distributed.pipelining.microbatch.TensorChunkSpec``; inputs without a batch dim are
            replicated.

        Raises:
            PartitionError: flat tokens without a batch dim, which a schedule would cut through the middle; or a
                name that is no input.
        """
        return chunk_spec(self.lifted, self.keywords, kwargs)

    def build_stage(
        self,
        index: int,
        device: torch.device | str,
        group: Any = None,
        mesh: Any = None,
    ) -> Any:
        """The ``torch.distributed.pipelining.PipelineStage`` of a stage.

        Args:
            index: which stage.
            device: the device it runs on; the stage's module is moved there.
            group: the pipeline process group (default: the world).
            mesh: or a DeviceMesh with a ``"pp"`` dim, from which the group is taken. A program made for several
                context-parallel ranks needs it: the collectives run over its ``mesh_dim``.

        Raises:
            PartitionError: an index out of range, both ``group`` and ``mesh``, a mesh without a ``"pp"`` dim or
                without the dim of the context-parallel ranks, or with another number of them.
        """
        from buffer_lifting.runtime import build_stage

        return build_stage(self, index, device, group, mesh)

    def save(self, directory: Any) -> None:
        """Writes one file and manifest a stage, and the feed program; :func:`buffer_lifting.load_stage` reads one."""
        from buffer_lifting.package import save_staged

        save_staged(self, directory)

    def summary(self) -> str:
        """A table of the stages: parameters, keyword inputs, what they send."""
        rows = [("stage", "parameters", "sends (bytes)", "receives", "keyword inputs")]
        for stage in self.stages:
            count = sum(p.numel() for p in stage.module.parameters())
            rows.append(
                (
                    str(stage.index),
                    f"{count:,}",
                    f"{stage.boundary_bytes:,}",
                    _shortened(stage.activations),
                    _shortened(stage.kwargs),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _shortened(names: tuple[str, ...], width: int = 60) -> str:
    """Names for a table: as many as fit, and how many more there are."""
    text = ", ".join(names)
    if len(text) <= width:
        return text or "-"
    kept = text[:width].rsplit(", ", 1)[0]
    return f"{kept}, +{len(names) - kept.count(', ') - 1} more"


def chunk_spec(lifted: LiftedProgram, keywords: tuple[str, ...], names: Iterable[str] | None) -> dict[str, Any]:
    """See :meth:`StagedProgram.kwargs_chunk_spec`."""
    from torch.distributed.pipelining.microbatch import TensorChunkSpec

    from buffer_lifting.torch_compat import REPLICATE

    if not lifted.axes.has_batch:
        raise PartitionError(
            "the program takes flat tokens without a batch dim; a schedule would cut them through the middle of "
            "documents. Give one step's microbatches as a list instead: schedule._step_microbatches("
            "arg_mbs=[(tokens_0,), (tokens_1,)], kwarg_mbs=[staged.feed(1, len(tokens_0)), "
            "staged.feed(1, len(tokens_1))], target_mbs=[...])"
        )
    dims: dict[str, int | None] = {name: axes.batch_dim for name, axes in lifted.input_axes.items()}
    dims.update({item.name: 0 for item in lifted.inputs})
    wanted = list(names) if names is not None else [*keywords, *(item.name for item in lifted.inputs)]
    unknown = [name for name in wanted if name not in dims]
    if unknown:
        raise PartitionError(f"the program has no inputs {unknown}; it has {sorted(dims)}")
    spec: dict[str, Any] = {}
    for name in wanted:
        dim = dims[name]
        spec[name] = REPLICATE() if dim is None else TensorChunkSpec(dim)
    return spec


def check_names(axes: Mapping[str, InputAxes], names: Iterable[str]) -> None:
    """Refuses user inputs whose names a schedule's ``step`` keeps for itself."""
    taken = sorted(set(names) & RESERVED)
    if taken:
        raise PartitionError(
            f"the user inputs {taken} have names that a schedule's step() keeps for itself; rename them in the "
            "model's forward and export again"
        )


def _rows_of(value: Any, start: int, count: int, batch: int) -> Any:
    if isinstance(value, Mapping):
        return {axis: _rows_of(part, start, count, batch) for axis, part in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == batch and batch > 1:
        return value[start : start + count]
    return value


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates along the batch; stays a stride-0 expand when every part is the same one."""
    first = parts[0]
    if all(p.stride()[0] == 0 and p.data_ptr() == first.data_ptr() and p.shape == first.shape for p in parts):
        return first[:1].expand(sum(p.shape[0] for p in parts), *first.shape[1:])
    return torch.cat(parts)


__all__ = ["Stage", "StagedProgram", "check_names", "chunk_spec", "tree_flatten"]
