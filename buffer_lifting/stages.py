"""The records of a partition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from buffer_lifting.boundaries import BoundaryTensor, local_length
from buffer_lifting.errors import FeedError, PartitionError
from buffer_lifting.feed import Lengths, check_lengths
from buffer_lifting.labels import BATCH
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.naming import RESERVED
from buffer_lifting.placement import Placement, placement_of
from buffer_lifting.program import InputAxes
from buffer_lifting.tables import TableSource, find_values, lack_values, set_tables, stage_tables
from buffer_lifting.torch_compat import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from buffer_lifting.memory import MemoryEstimate


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
        activation_shapes: dtype and shape of ``activations``, as expressions of batch and sequence, and what computes
            them.
        output_shapes: those of ``outputs``.
    """

    index: int
    module: GraphModule
    activations: tuple[str, ...]
    kwargs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    boundary_bytes: int
    tied: tuple[tuple[str, ...], ...] = ()
    activation_shapes: tuple[BoundaryTensor, ...] = ()
    output_shapes: tuple[BoundaryTensor, ...] = ()


@dataclass(frozen=True)
class StagedProgram:
    """A lifted program, split into stages.

    Attributes:
        stages: the stages in order.
        lifted: the program that was split.
        tied: FQN -> the stages that hold a copy of that parameter (it is read in more than one).
        placement: the schedule that the stages were made for, and the rank of each.
        sizes: the example's size of each symbol.
    """

    stages: tuple[Stage, ...]
    lifted: LiftedProgram
    in_spec: TreeSpec
    out_spec: TreeSpec
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    tied: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    placement: Placement | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

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
        if micro is None:
            return self.lifted.feed(batch_size, seq_len, inputs, order, positions, shard, device)
        if not isinstance(batch_size, int) or batch_size < 1 or batch_size % micro:
            raise FeedError(
                f"a batch of {batch_size} does not divide into microbatches of {micro}, the static batch the program "
                "was exported with"
            )
        if n_microbatches is not None and batch_size // n_microbatches != micro:
            raise FeedError(
                f"{n_microbatches} microbatches of a batch of {batch_size} have {batch_size // n_microbatches} samples "
                f"each, but the program was exported with a static batch of {micro}"
            )
        pair = self.lifted._shard(shard)
        return self.lifted._feed(batch_size, seq_len, inputs, order, positions, pair, device, micro=micro)

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
        *,
        microbatch_size: int | None = None,
        seq_len: Lengths | None = None,
        activation_dtype: torch.dtype | None = None,
        schedule: Any = None,
    ) -> Any:
        """The ``torch.distributed.pipelining.PipelineStage`` of a stage.

        Args:
            index: which stage.
            device: the device it runs on; the stage's module is moved there.
            group: the pipeline process group (default: the world).
            mesh: or a DeviceMesh with a ``"pp"`` dim, from which the group is taken. A program made for several
                context-parallel ranks needs it: the collectives run over its ``mesh_dim``.
            microbatch_size: with ``seq_len``, what the stage is fed: torch then gets the shapes of its inputs and
                outputs (:meth:`boundary`) and does not run the stages once to find them. Every rank has to give them.
            seq_len: tokens of the whole (global) sequence, as in :meth:`feed`.
            activation_dtype: of the floating tensors that stages send, where that is not the program's (a stage that
                was converted, mixed precision).
            schedule: the schedule that will run it, to be compared with that of :func:`buffer_lifting.partition`: it
                has to put the stages on the same ranks.

        Raises:
            PartitionError: an index out of range, both ``group`` and ``mesh``, a mesh without a ``"pp"`` dim or
                without the dim of the context-parallel ranks, or with another number of them; a schedule, or a rank or
                size of the pipeline group, that does not go with the schedule of the partition; a device that has no
                kernel for a program with ring attention; one of ``microbatch_size`` and ``seq_len`` without the other;
                a shape that they do not decide.
            AxesError, FeedError: sizes that the program does not take.
        """
        from buffer_lifting.runtime import build_stage, check_placement

        shapes = None
        check_index(index, len(self.stages))
        check_placement(self.placement, index, schedule, group, mesh)
        if microbatch_size is not None or seq_len is not None:
            shapes = self.boundary(index, microbatch_size, seq_len, activation_dtype)
        return build_stage(self, index, device, group, mesh, shapes)

    def boundary(
        self,
        index: int,
        microbatch_size: int | None,
        seq_len: Lengths | None,
        activation_dtype: torch.dtype | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What a stage gets by position and what it hands on, as contiguous tensors on the meta device.

        Shapes are those of one microbatch on one rank: under context parallelism, of the rank's shard.

        Args:
            index: which stage.
            microbatch_size: samples in a microbatch.
            seq_len: tokens of the whole (global) sequence, as in :meth:`feed`.
            activation_dtype: as in :meth:`build_stage`.

        Raises:
            PartitionError: an index out of range, or a shape that the two sizes do not decide.
            AxesError, FeedError: sizes that the program does not take.
        """
        check_index(index, len(self.stages))
        return boundary_tensors(self.lifted, self.stages[index], microbatch_size, seq_len, activation_dtype)

    def bind_tables(self, source: TableSource) -> None:
        """Gives values to the tables that the stages are fed from, and to those that the stages keep.

        For a program that was exported on the meta device or with fake tensors. Its parameters come from a
        checkpoint: ``stage.module.load_state_dict(weights, assign=True)``, or ``stage.module.to_empty(device=...)``
        and then loading; call this behind ``to_empty``, which forgets the tables' values.

        Args:
            source: as in :meth:`LiftedProgram.bind_tables`.

        Raises:
            FeedError: tables that ``source`` has no values for, or one of another shape or dtype; nothing is bound
                then.
        """
        bind_tables(self.lifted, self.stages, source)

    def exported(self, index: int) -> ExportedProgram:
        """A stage as a program of its own: ``exported(1).module()(activation, **kwargs)`` gives its outputs.

        It takes the stage's activations by position and its lifted and user inputs by keyword, all of them, and has
        the sizes and constraints of the whole program. It shares the stage's parameters, and has no example inputs.

        Raises:
            PartitionError: an index out of range.
        """
        from buffer_lifting.stage_program import exported_stage

        check_index(index, len(self.stages))
        return exported_stage(self.stages[index], self.lifted.program)

    def save(self, directory: Any, *, weights: bool = True) -> None:
        """Writes a ``.pt2`` and a manifest a stage, and the feed program; :func:`buffer_lifting.load_stage` reads one.

        The directory appears whole or not at all: an earlier package there is kept until the new one is complete.

        Args:
            directory: it must not exist, or be empty, or be such a package, which is replaced.
            weights: without them the package has no values of parameters and persistent buffers; they come from a
                checkpoint (``load_stage(...).load_weights``). Tables that are in no checkpoint are saved all the same.

        Raises:
            LiftingError: another directory or file, or a stage with something that a package cannot hold.
        """
        from buffer_lifting.package import save_staged

        save_staged(self, directory, weights)

    def stage_ranks(self, schedule: Any = None, pp: int | None = None) -> dict[int, int]:
        """The rank of each stage, under the schedule of the partition or another one.

        See :func:`buffer_lifting.stage_ranks`; without any schedule, stage ``r`` is on rank ``r``.
        """
        return dict(enumerate(self._placement(schedule, pp).ranks))

    def stages_of_rank(self, rank: int, schedule: Any = None, pp: int | None = None) -> tuple[int, ...]:
        """The stages that a rank builds, in order, under the schedule of the partition or another one.

        Raises:
            PartitionError: there is no such rank; or as :func:`buffer_lifting.stage_ranks`.
        """
        placement = self._placement(schedule, pp)
        if not isinstance(rank, int) or not 0 <= rank < placement.pp:
            raise PartitionError(f"there is no rank {rank!r}; {placement.schedule} has {placement.pp} ranks")
        return placement.stages_of(rank)

    def _placement(self, schedule: Any, pp: int | None) -> Placement:
        if schedule is None:
            if pp is not None and self.placement is not None and pp != self.placement.pp:
                raise PartitionError(f"the stages were made for {self.placement.pp} ranks, not {pp}: give schedule too")
            return self.placement or placement_of("1F1B", len(self.stages), pp)
        return placement_of(schedule, len(self.stages), pp)

    def memory(
        self,
        schedule: Any = None,
        pp: int | None = None,
        n_microbatches: int | None = None,
        optimizer: str | float = "adam",
    ) -> MemoryEstimate:
        """An estimate of what each stage and rank needs in training, at the sizes of the example inputs.

        Parameters, their gradients, the optimizer's state, buffers, and what microbatches leave behind between their
        forward and their backward, times the microbatches in flight. Not counted: the batch itself (inputs and feed),
        temporary memory of kernels, buffers of communication, a loss outside of the program. Nothing is run, and no
        process is needed.

        Args:
            schedule, pp: whose microbatches in flight; default: those of the partition, or 1F1B.
            n_microbatches: of a step; default: twice the number of ranks, and no fewer than stages.
            optimizer: ``"none"``, ``"sgd"``, ``"momentum"``, ``"adam"``, ``"adam+master"``, or the bytes of its state
                for each element of a parameter (``adam``: 8).

        Raises:
            PartitionError: a schedule, number of ranks or of microbatches that do not go together; an optimizer that is
                not known.
        """
        from buffer_lifting.memory import estimate

        stages = [(stage.module, stage.activations if stage.index else ()) for stage in self.stages]
        return estimate(stages, self.sizes, self._placement(schedule, pp), n_microbatches, optimizer)

    def summary(
        self,
        schedule: Any = None,
        pp: int | None = None,
        n_microbatches: int | None = None,
        optimizer: str | float = "adam",
    ) -> str:
        """A table of the stages: their modules, parameters, FLOPs, memory, what they send, receive and read by keyword.

        The arguments say what the memory is estimated for: see :meth:`memory`.
        """
        from buffer_lifting.stage_table import stage_table

        return stage_table(self, self.memory(schedule, pp, n_microbatches, optimizer))


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


def check_index(index: Any, count: int) -> None:
    """Refuses the index of no stage."""
    if not isinstance(index, int) or not 0 <= index < count:
        raise PartitionError(f"there is no stage {index!r}; the program has {count} stages")


def bind_tables(lifted: LiftedProgram, stages: Sequence[Stage], source: TableSource) -> None:
    """See :meth:`StagedProgram.bind_tables`."""
    own = lifted._tables()
    fed = find_values(source, own, lack_values(lifted.feed_program.state))
    kept = []
    for stage in stages:
        tables = stage_tables(stage.module)
        kept.append(find_values(source, tables, lack_values(tables)))
    lifted._bind(fed)
    for stage, values in zip(stages, kept, strict=True):
        set_tables(stage.module, values)


def boundary_tensors(
    lifted: LiftedProgram,
    stage: Stage,
    microbatch_size: int | None,
    seq_len: Lengths | None,
    activation_dtype: torch.dtype | None,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """See :meth:`StagedProgram.boundary`."""
    if microbatch_size is None or seq_len is None:
        raise PartitionError("give both microbatch_size and seq_len")
    if len(stage.activation_shapes) != len(stage.activations) or len(stage.output_shapes) != len(stage.outputs):
        raise PartitionError("the package has no boundary shapes: it was saved by an earlier version; save it again")
    lengths = check_lengths(lifted.axes, microbatch_size, seq_len, lifted.feed_program.max_lengths)
    sizes = {axis: local_length(length, lifted.cp_size) for axis, length in lengths.items()}
    sizes[BATCH] = microbatch_size
    return (
        tuple(shape.empty(sizes, activation_dtype) for shape in stage.activation_shapes),
        tuple(shape.empty(sizes, activation_dtype) for shape in stage.output_shapes),
    )


def check_names(axes: Mapping[str, InputAxes], names: Iterable[str]) -> None:
    """Refuses user inputs whose names a schedule's ``step`` keeps for itself."""
    taken = sorted(set(names) & RESERVED)
    if taken:
        raise PartitionError(
            f"the user inputs {taken} have names that a schedule's step() keeps for itself; rename them in the "
            "model's forward and export again"
        )


__all__ = ["Stage", "StagedProgram", "boundary_tensors", "check_index", "check_names", "chunk_spec", "tree_flatten"]
