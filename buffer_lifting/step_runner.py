"""Steps whose batch size and sequence length change, on torch's stages and schedules.

torch's ``PipelineStage`` fixes its shapes at the first step. A staged program knows the shapes at its boundaries as
expressions of batch and sequence, so a :class:`StepRunner` makes a stage and a schedule for each pair of sizes, over
the same modules, and each rank knows on its own what it is going to get.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import get_rank

from buffer_lifting.errors import AxesError, FeedError, PartitionError
from buffer_lifting.feed import Lengths
from buffer_lifting.package import LoadedStage
from buffer_lifting.placement import placement_of
from buffer_lifting.runtime import Shapes, build_stage, make_stage, pp_group, untie
from buffer_lifting.stages import Stage, StagedProgram, check_index
from buffer_lifting.step_sizes import StepSizes, check_ranks, step_sizes
from buffer_lifting.torch_compat import without_first_step

#: What :meth:`StepRunner.step` keeps for itself beside what a schedule's ``step`` does.
OPTIONS = frozenset({"batch_size", "seq_len"})


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A schedule over stages that were given their shapes."""

    schedule: Any
    outputs: dict[int, tuple[torch.Tensor, ...]]


class StepRunner:
    """Trains the stages of one rank, with another batch size and sequence length in each step.

    Every rank makes one with the same arguments and calls :meth:`step` with the same sizes. ``modules`` are the
    stages' modules, for an optimizer, FSDP or a checkpoint; wrap them in place and before the first step.

    Args:
        stages: a staged program; or one loaded stage, or all that this rank has.
        schedule_class: a schedule of ``torch.distributed.pipelining``.
        device: where the modules and the tensors of the stages are.
        n_microbatches: how many microbatches a step has (their size changes with the batch); or
        microbatch_size: samples in a microbatch (their number changes with the batch).
        loss_fn: as a schedule takes it; ``None`` for a runner that only evaluates.
        stage_indices: the stages of this rank (default: those that the schedule gives it).
        group, mesh: as in :meth:`StagedProgram.build_stage`.
        activation_dtype: of the floating tensors that stages send, where it is not the program's.
        keep: for how many pairs of sizes stages and schedules are kept, the least recently used going first. Each holds
            its receive buffers: twice (activations and gradients) what crosses a boundary in a step.
        compare_ranks: before each step, compare the sizes of all ranks: one all-gather of a few numbers, less than 1 ms
            on gloo (another device first finishes what is queued there). ``False`` where one place gives all ranks
            their batches: nothing but activations and gradients is sent then, and ranks that are given unlike sizes,
            or of which one refuses the step, end without a message (gloo aborts them) or wait for each other.
        options: further arguments of the schedule's constructor, ``scale_grads`` for one.

    Raises:
        PartitionError: neither or both of ``n_microbatches`` and ``microbatch_size``; no stage, or an index out of
            range; flat tokens without a batch dim; an input of the program that has the name of an option of
            :meth:`step`; what ``build_stage`` refuses.
    """

    def __init__(
        self,
        stages: StagedProgram | LoadedStage | Sequence[LoadedStage],
        schedule_class: Callable[..., Any],
        device: torch.device | str,
        *,
        n_microbatches: int | None = None,
        microbatch_size: int | None = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        stage_indices: Iterable[int] | None = None,
        group: Any = None,
        mesh: Any = None,
        activation_dtype: torch.dtype | None = None,
        keep: int = 8,
        compare_ranks: bool = True,
        **options: Any,
    ) -> None:
        counts = [n for n in (n_microbatches, microbatch_size) if n is not None]
        if len(counts) != 1 or not isinstance(counts[0], int) or counts[0] < 1 or keep < 1:
            raise PartitionError("give either n_microbatches or microbatch_size, a positive integer, and keep >= 1")
        self._n_microbatches, self._microbatch_size = n_microbatches, microbatch_size
        self._schedule_class, self._device, self._loss_fn = schedule_class, torch.device(device), loss_fn
        self._where = {"group": group, "mesh": mesh}
        self._dtype, self._keep, self._options = activation_dtype, keep, options
        self._compare = compare_ranks
        self._loaded: dict[int, LoadedStage] = {}
        if isinstance(stages, StagedProgram):
            self._program, self._count = stages, len(stages.stages)
            indices = _indices(schedule_class, self._count, group, mesh) if stage_indices is None else stage_indices
            self._indices = sorted(set(indices))
        else:
            given = [stages] if isinstance(stages, LoadedStage) else list(stages)
            self._loaded = {stage.index: stage for stage in given}
            self._indices = sorted(self._loaded)
            if not given or (stage_indices is not None and sorted(stage_indices) != self._indices):
                raise PartitionError(f"the loaded stages are {self._indices}, not stage_indices={stage_indices}")
            self._program, self._count = given[0]._feeder, given[0].num_stages
        for index in self._indices:
            check_index(index, self._count)
        if not self._indices:
            raise PartitionError("this rank has no stages")
        program = self._program
        lifted = tuple(item.name for item in program.lifted.inputs)
        self._names = (*dict.fromkeys((*program.positional, *program.keywords, *lifted)),)
        if taken := sorted(OPTIONS & set(self._names)):
            raise PartitionError(f"step() keeps {taken} for itself; rename these inputs in the model's forward")
        program.kwargs_chunk_spec(self._names)
        reads = {name for stage in self._stages() for name in _reads(stage)}
        self._read = tuple(name for name in self._names if name in reads)
        for stage in self._stages():
            if not self._loaded:
                untie(program, stage.index)
            stage.module.to(self._device)
        self._prepared: OrderedDict[Any, _Prepared] = OrderedDict()
        self._expected: dict[int, tuple[torch.Tensor, ...]] = {}
        self._watched = self._voted = False

    @property
    def modules(self) -> dict[int, torch.nn.Module]:
        """The modules of this rank's stages, by stage index."""
        return {stage.index: stage.module for stage in self._stages()}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of this rank's stages."""
        for module in self.modules.values():
            yield from module.parameters()

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage, which computes the loss."""
        return self._count - 1 in self._indices

    @property
    def sizes(self) -> tuple[StepSizes, ...]:
        """The sizes that stages are kept for, the least recently used first."""
        return tuple(dict.fromkeys(key[1] for key in self._prepared))

    def step(
        self,
        *args: torch.Tensor,
        target: torch.Tensor | None = None,
        losses: list[torch.Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        seq_len: Lengths | None = None,
        **kwargs: torch.Tensor,
    ) -> Any:
        """One step of the schedule on the whole batch: as its own ``step``, on any rank and for any sizes.

        Args:
            args: the program's positional inputs, on any rank, by position or by name; what no stage of the rank
                reads is not used.
            target: whole target ``[batch, ...]``; only the last stage's rank uses it.
            losses: gets the losses of the microbatches on that rank.
            return_outputs, loss_kwargs: as in a schedule's ``step``.
            batch_size: samples in the batch, where no input of this rank tells.
            seq_len: tokens of the whole (global) sequence, where no input of this rank tells.
            kwargs: the program's keyword inputs and the lifted inputs (``feed``), of this rank's shard.

        Returns:
            The whole batch's output on the last stage's rank, else ``None``.

        Raises:
            FeedError: before anything is sent: sizes that nothing tells or that disagree, on this rank or (with
                ``compare_ranks``) between ranks, a batch that does not divide into microbatches, an input that is
                missing or unknown, a step without a ``loss_fn`` or target. The message names the rank.
            AxesError: a size that a static program does not have.
        """
        if self._loss_fn is None:
            raise FeedError("the runner has no loss_fn; call eval()")
        extra = {"return_outputs": return_outputs, "loss_kwargs": loss_kwargs}
        return self._run(True, args, kwargs, target, losses, batch_size, seq_len, extra)

    def eval(
        self,
        *args: torch.Tensor,
        target: torch.Tensor | None = None,
        losses: list[torch.Tensor] | None = None,
        batch_size: int | None = None,
        seq_len: Lengths | None = None,
        **kwargs: torch.Tensor,
    ) -> Any:
        """The forward alone, as the schedule's own ``eval``; arguments and errors as of :meth:`step`."""
        return self._run(False, args, kwargs, target, losses, batch_size, seq_len, {})

    def _run(
        self,
        train: bool,
        args: tuple[torch.Tensor, ...],
        kwargs: Mapping[str, torch.Tensor],
        target: torch.Tensor | None,
        losses: list[torch.Tensor] | None,
        batch_size: int | None,
        seq_len: Lengths | None,
        extra: dict[str, Any],
    ) -> Any:
        sizes = None
        try:
            given, sizes = self._check(args, kwargs, target, batch_size, seq_len)
        except (AxesError, FeedError) as error:
            raise type(error)(f"rank {get_rank()}: {error}") from error
        finally:
            if self._compare:
                axes = len(self._program.lifted.axes.lengths)
                check_ranks(sizes, axes, train, self._groups(), self._device)
        prepared = self._prepare(train, sizes)
        call = prepared.schedule.step if train else prepared.schedule.eval
        last = {"target": target, "losses": losses} if self.has_last else {}
        self._expected = prepared.outputs
        try:
            result = call(**last, **extra, **given)
        finally:
            self._expected = {}
        self._voted = True
        return result

    def _check(
        self,
        args: tuple[torch.Tensor, ...],
        kwargs: Mapping[str, torch.Tensor],
        target: torch.Tensor | None,
        batch_size: int | None,
        seq_len: Lengths | None,
    ) -> tuple[dict[str, torch.Tensor], StepSizes]:
        """The inputs that this rank's stages read, and the sizes of the step."""
        inputs = self._inputs(args, kwargs)
        sizes = step_sizes(
            self._program.lifted, inputs, batch_size, seq_len, self._n_microbatches, self._microbatch_size
        )
        if self.has_last and self._loss_fn is not None:
            if target is None:
                raise FeedError("the last stage's rank needs target= for its loss_fn")
            if target.shape[0] != sizes.batch:
                raise FeedError(f"target has {target.shape[0]} samples, the batch has {sizes.batch}")
        missing = [name for name in self._read if name not in inputs]
        if missing:
            raise FeedError(f"the stages {self._indices} read {missing}, which step() was not given")
        return {name: inputs[name] for name in self._read}, sizes

    def _inputs(self, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All inputs by name."""
        positional = self._program.positional
        if len(args) > len(positional):
            raise FeedError(f"{len(args)} inputs by position, the program takes {len(positional)}")
        inputs = dict(zip(positional, args, strict=False))
        if twice := sorted(set(inputs) & set(kwargs)):
            raise FeedError(f"{twice} are given by position and by name")
        inputs.update({name: value for name, value in kwargs.items() if value is not None})
        if unknown := sorted(set(inputs) - set(self._names)):
            raise FeedError(f"the program has no inputs {unknown}; it has {sorted(self._names)}")
        if other := sorted(name for name, value in inputs.items() if not isinstance(value, torch.Tensor)):
            raise FeedError(f"{other} are no tensors")
        return inputs

    def _prepare(self, train: bool, sizes: StepSizes) -> _Prepared:
        """The schedule for these sizes; the key is the same on every rank."""
        key = (train, sizes)
        prepared = self._prepared.pop(key, None)
        if prepared is None:
            while len(self._prepared) >= self._keep:
                self._prepared.popitem(last=False)
            prepared = self._make(sizes)
        self._prepared[key] = prepared
        return prepared

    def _make(self, sizes: StepSizes) -> _Prepared:
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle

        stages = []
        outputs = {}
        for index in self._indices:
            # the first stage too gets its inputs by name: a later one of the same rank may read them as well
            inputs, outputs[index] = self._boundary(index, sizes)
            stages.append(self._build(index, (inputs if index else (), outputs[index])))
        self._watch()
        self._check_wrapping()
        options = {**self._options, **self._chunks()}
        single = inspect.isclass(self._schedule_class) and issubclass(self._schedule_class, PipelineScheduleSingle)
        if single and len(stages) > 1:
            raise PartitionError(f"the schedule takes one stage a rank, this one has the stages {self._indices}")
        schedule = self._schedule_class(
            stages[0] if single else stages, n_microbatches=sizes.n_microbatches, loss_fn=self._loss_fn, **options
        )
        without_first_step(schedule, stages, self._voted)
        return _Prepared(schedule, outputs)

    def _check_wrapping(self) -> None:
        """Refuses layers that FSDP shards on their own where a schedule splits the backward: torch loses gradients."""
        name = getattr(self._schedule_class, "__name__", "")
        if name not in ("ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV"):
            return
        from torch.distributed.fsdp import FSDPModule

        for index, module in self.modules.items():
            inside = [fqn for fqn, part in module.named_modules() if fqn and isinstance(part, FSDPModule)]
            if inside:
                raise PartitionError(
                    f"{inside[0]!r} of stage {index} is sharded on its own, and {name} splits the backward: torch loses"
                    " gradients of such layers; shard the stage as one (fully_shard of its module alone)"
                )

    def _chunks(self) -> dict[str, Any]:
        """Along which dims the schedule cuts the inputs that this rank's stages read, in their order."""
        from torch.distributed.pipelining.microbatch import TensorChunkSpec

        spec = self._program.kwargs_chunk_spec(self._read)
        if "kwargs_chunk_spec" in inspect.signature(self._schedule_class).parameters:
            return {"kwargs_chunk_spec": spec} if spec else {}
        other = [n for n, part in spec.items() if not isinstance(part, TensorChunkSpec) or part.split_dim != 0]
        if other:
            name = getattr(self._schedule_class, "__name__", self._schedule_class)
            raise PartitionError(f"{name} cuts every input along dim 0, which is not the batch of {other}")
        return {}

    def _groups(self) -> list[Any]:
        """The ranks that a step of this one waits for: along the pipeline, and the context-parallel ones."""
        lifted, mesh = self._program.lifted, self._where["mesh"]
        groups = [pp_group(**self._where)]
        return (
            [*groups, mesh[lifted.mesh_dim].get_group()] if (lifted.cp_size or 1) > 1 and mesh is not None else groups
        )

    def _stages(self) -> list[Stage]:
        if self._loaded:
            return [self._loaded[index].stage for index in self._indices]
        return [self._program.stages[index] for index in self._indices]

    def _build(self, index: int, shapes: Shapes) -> Any:
        place = (self._device, self._where["group"], self._where["mesh"], shapes)
        if self._loaded:
            loaded = self._loaded[index]
            return make_stage(loaded._feeder.lifted, loaded.stage, self._count, *place)
        return build_stage(self._program, index, *place)

    def _boundary(self, index: int, sizes: StepSizes) -> Shapes:
        if self._loaded:
            return self._loaded[index].boundary(sizes.microbatch, sizes.seq_len, self._dtype)
        return self._program.boundary(index, sizes.microbatch, sizes.seq_len, self._dtype)

    def _watch(self) -> None:
        """Checks what a stage is about to send: torch would send it, and the receiver fail or take it for another."""
        if self._watched:
            return
        self._watched = True
        for stage in self._stages():
            if stage.index != self._count - 1:
                stage.module.register_forward_hook(self._checker(stage))

    def _checker(self, stage: Stage) -> Callable[[Any, Any, Any], None]:
        def check(_module: Any, _args: Any, output: Any) -> None:
            if stage.index not in self._expected:  # not in a step of this runner
                return
            tensors = output if isinstance(output, tuple | list) else (output,)
            for name, actual, wanted in zip(stage.outputs, tensors, self._expected[stage.index], strict=True):
                if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
                    raise PartitionError(
                        f"stage {stage.index} computed {name!r} as {actual.dtype} {tuple(actual.shape)}, but the next "
                        f"one expects {wanted.dtype} {tuple(wanted.shape)}; for converted stages, give the runner "
                        "activation_dtype="
                    )

        return check


def _reads(stage: Stage) -> tuple[str, ...]:
    """The program's inputs that a stage reads."""
    return (*(stage.activations if stage.index == 0 else ()), *stage.kwargs)


def _indices(schedule_class: Any, count: int, group: Any, mesh: Any) -> list[int]:
    """The stages that a schedule gives this rank; one that is not torch's has them in rounds."""
    from torch.distributed import get_world_size
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    ranks = pp_group(group, mesh)
    rank, size = get_rank(ranks), get_world_size(ranks)
    if inspect.isclass(schedule_class) and issubclass(schedule_class, PipelineScheduleMulti | PipelineScheduleSingle):
        return list(placement_of(schedule_class, count, size).stages_of(rank))
    return list(range(rank, count, size))
