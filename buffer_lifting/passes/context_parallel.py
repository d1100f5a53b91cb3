"""The public :func:`context_parallel`: attention over the keys of all context-parallel ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from buffer_lifting.axes import axes_argument
from buffer_lifting.collecting import uncollected
from buffer_lifting.errors import LiftingError, UnsupportedReadError
from buffer_lifting.examples import example_sizes, examples_without_values, widen_examples
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.keys import plan_keys
from buffer_lifting.labels import COL
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.lifting import describe
from buffer_lifting.partial_losses import partial_losses
from buffer_lifting.passes.assemble import assemble
from buffer_lifting.passes.exchange_heads import HeadExchange
from buffer_lifting.passes.follow_slots import AttentionState, FollowSlots
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.passes.ring_attention import Ring
from buffer_lifting.passes.shard_attention import ShardAttention, ShardState
from buffer_lifting.program import Axes, FeedOutput, LiftedInput, ScanReport
from buffer_lifting.scanner import scan_record

STRATEGIES = ("auto", "allgather", "alltoall", "ring")


def user_axes(lifted: LiftedProgram) -> Axes:
    """The axes of the user's inputs, as ``axes=`` takes them."""
    return axes_argument(lifted.input_axes, ())


def lifted_axes(lifted: LiftedProgram, added: tuple[LiftedInput, ...] = ()) -> Axes:
    """The axes of all inputs of a lifted program, its lifted inputs included, as ``axes=`` takes them."""
    return axes_argument(lifted.input_axes, (*lifted.inputs, *added))


@uncollected
def context_parallel(
    lifted: LiftedProgram, size: int = 1, mesh_dim: str = "cp", strategy: str = "auto"
) -> LiftedProgram:
    """Attention over the keys of all context-parallel ranks, with masks that follow the slots.

    No process group is needed here: the collectives name their group by the mesh dim, and
    :meth:`StagedProgram.build_stage` binds it.

    Args:
        lifted: the result of :func:`buffer_lifting.lift`; it is not modified.
        size: context-parallel size. With size 1 there is no communication: masks, ``is_causal`` included, are
            rebuilt from the lifted slots, and the program is order-equivariant. With a larger size every rank has
            ``S / size`` tokens of each sequence, and keys and values are gathered from all ranks.
        mesh_dim: name of the DeviceMesh dim that the group comes from.
        strategy: ``"allgather"``: keys and values are gathered; any attention and any mask. ``"alltoall"``: heads
            are exchanged for rows at each ``scaled_dot_product_attention`` (DeepSpeed-Ulysses), which sends less
            where there are more ranks than query heads a key head has; any mask; the heads of queries and of keys
            have to divide by ``size``. ``"ring"``: torch's own ring attention; each attention has to be full or
            ``is_causal=True`` (:func:`causal_flags`), and a program with causal ones takes two orders, contiguous and
            torch's head-tail, the same for all samples. On the CPU and, untested, on CUDA in half precision.
            ``"auto"`` is ``"allgather"``, for every program: no device is known here, and no order.

    Raises:
        LiftingError: a size that is no positive integer; an unknown strategy; a program that was transformed
            already, or lifted with ``strict=False`` and with reads left as they were (for a size above 1).
        UnsupportedReadError: an attention whose batch and heads cannot be told apart; for a size above 1 a static
            sequence, attention dropout, ``flex_attention``, or another op that does not become whole when keys are
            gathered; or which the strategy cannot do. The message names the nodes.
    """
    if lifted.cp_size is not None:
        raise LiftingError(f"the program was already made context-parallel (size {lifted.cp_size})")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise LiftingError(f"size is a positive integer, not {size!r}")
    if strategy not in STRATEGIES:
        raise LiftingError(f"strategy is one of {', '.join(map(repr, STRATEGIES))}, not {strategy!r}")
    if size > 1 and lifted.report.refused:
        lines = "\n".join(describe(item) for item in lifted.report.refused[:20])
        raise LiftingError(f"the program was lifted with strict=False and is wrong on a shard:\n{lines}")
    normalized = normalize(lifted.program)
    record = build_record(lifted.program, normalized.graph)
    plan = scan_record(record, lifted_axes(lifted))
    _check_attention(lifted, plan.report)
    state = AttentionState(normalized.graph, plan, lifted.feed_program.outputs, ring=strategy == "ring" and size > 1)
    modified = FollowSlots()(state).modified
    causal = {read.node: read.seq_dims[0][1] for read in plan.report.reads if read.source_kind == "is_causal"}
    losses = tuple(partial_losses(record, plan).found)
    if size > 1:
        if modified:
            record = build_record(lifted.program, normalized.graph)
            plan = scan_record(record, lifted_axes(lifted, tuple(output.input for output in state.added)))
        keys = plan_keys(record, plan, size, strategy)
        left = sorted(state.slots.keys() - keys.exchanges)
        if left:
            raise UnsupportedReadError(
                f"BL203 node {left[0]!r}: it is causal, and its keys are not known to run along the sequence -> "
                "strategy='allgather' gives it a mask"
            )
        exchange = Ring(size, mesh_dim, state.slots) if state.ring else HeadExchange(size, mesh_dim)
        ShardAttention()(ShardState(normalized.graph, record, plan, keys, size, mesh_dim, exchange))
    outputs = (*lifted.feed_program.outputs, *state.added)
    feed = replace(lifted.feed_program, outputs=outputs)
    names = tuple(output.input.name for output in state.added)
    program = lifted.program
    if modified or size > 1:
        examples = _examples(lifted, state.added)
        by_key = [n for n, own in lifted.input_axes.items() if size > 1 and any(r == COL for _, _, r in own.seq_dims)]
        program = assemble(lifted.program, normalized.graph, normalized.submodules, names, examples, by_key)
        columns = {item.name: int(item.batched) for item in (o.input for o in outputs) if item.role == COL}
        for name in by_key:
            columns[name] = next(dim for dim, _, role in lifted.input_axes[name].seq_dims if role == COL)
        widen_examples(program, columns, size)
    added = tuple(o.input for o in outputs)
    ring = tuple(dict.fromkeys(causal[name] for name in state.slots))
    return LiftedProgram(program, added, lifted.report, feed, size, mesh_dim, losses, ring, _routed=lifted._routed)


def _check_attention(lifted: LiftedProgram, found: ScanReport) -> None:
    """Attention that was known to follow the sequence still does once the reads are lifted.

    Raises:
        UnsupportedReadError: one does not, so that its mask would stay as it is.
    """
    known = {item.node for item in lifted.report.mixing if item.handled}
    known |= {read.node for read in lifted.report.reads if read.source_kind == "is_causal"}
    lost = [item for item in found.mixing if not item.handled and item.node in known]
    if lost:
        raise UnsupportedReadError(
            "the lifted program computes it in a way that is not understood:\n" + "\n".join(map(describe, lost))
        )


def _examples(lifted: LiftedProgram, added: tuple[FeedOutput, ...]) -> dict[str, torch.Tensor] | None:
    from buffer_lifting.streams import axis_streams

    sizes = example_sizes(lifted.program, lifted.input_axes)
    if sizes is None:
        return examples_without_values(lifted.program, lifted.input_axes, [output.input for output in added])
    batch, lengths, _ = sizes
    feed = replace(lifted.feed_program, outputs=added).feed(batch, lengths, None, axis_streams(batch, lengths), None)
    return {name: value.contiguous() for name, value in feed.items()}
