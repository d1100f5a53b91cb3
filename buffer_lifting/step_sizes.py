"""The sizes of one step, from the tensors that a rank is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from buffer_lifting.agreement import ranks_text
from buffer_lifting.boundaries import whole_length
from buffer_lifting.errors import FeedError
from buffer_lifting.feed import Lengths, check_lengths
from buffer_lifting.labels import BATCH, COL
from buffer_lifting.lifted import LiftedProgram

_KIND = "kind"  # what the ranks call: step() or eval()


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The sizes of a step, equal on every rank.

    Attributes:
        batch: samples in the whole batch; ``microbatch`` of them go through a stage at once.
        lengths: ``(axis, tokens of the whole, global sequence)`` for each axis.
        sources: ``(axis, what told its size)``; another on each rank.
    """

    batch: int
    microbatch: int
    lengths: tuple[tuple[str, int], ...]
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def n_microbatches(self) -> int:
        """How many microbatches the batch is cut into."""
        return self.batch // self.microbatch

    @property
    def seq_len(self) -> dict[str, int]:
        """The lengths by axis."""
        return dict(self.lengths)

    def source(self, axis: str) -> str:
        """What told the size of an axis or of the batch: an input by name, or an argument; empty if nothing did."""
        return dict(self.sources).get(axis, "")


def step_sizes(
    lifted: LiftedProgram,
    inputs: Mapping[str, torch.Tensor],
    batch_size: int | None,
    seq_len: Lengths | None,
    n_microbatches: int | None,
    microbatch_size: int | None,
) -> StepSizes:
    """The sizes that the inputs have and the caller states, checked against each other and against the program.

    Args:
        lifted: the program.
        inputs: this rank's inputs by name: user inputs as ``shard_inputs`` cuts them, lifted inputs.
        batch_size: samples in the batch, or ``None``.
        seq_len: tokens of the whole (global) sequence, or ``None``.
        n_microbatches: how many microbatches there are; or ``microbatch_size``.

    Raises:
        FeedError: a size that nothing tells, or that two things tell differently; a batch that does not divide.
        AxesError: a size that a static program does not have.
    """
    known = _Known(lifted.cp_size)
    if batch_size is not None:
        known.say(BATCH, batch_size, "batch_size=")
    if isinstance(seq_len, Mapping):
        for axis, length in seq_len.items():
            known.say(axis, length, "seq_len=")
    elif seq_len is not None:
        for axis in lifted.axes.lengths:
            known.say(axis, seq_len, "seq_len=")
    for name, value in inputs.items():
        _read(known, lifted, name, value)
    found = {axis: size for axis, size in lifted.axes.lengths.items() if size is not None}
    found.update({axis: size for axis, (size, _) in known.sizes.items()})
    missing = [axis for axis in (BATCH, *lifted.axes.lengths) if axis not in found]
    if missing:
        raise FeedError(
            f"no input of this rank tells the size of {', '.join(missing)}: give step() the lifted inputs (feed), or "
            "batch_size= and seq_len="
        )
    batch = found.pop(BATCH)
    parts = n_microbatches if n_microbatches is not None else microbatch_size
    assert parts is not None
    if not isinstance(batch, int) or batch < 1 or batch % parts:
        what = f"{parts} microbatches" if n_microbatches is not None else f"microbatches of {parts}"
        raise FeedError(f"a batch of {batch} does not divide into {what}")
    micro = batch // parts if n_microbatches is not None else parts
    lengths = check_lengths(lifted.axes, micro, found, lifted.feed_program.max_lengths)
    sources = tuple((axis, source) for axis, (_, source) in known.sizes.items())
    return StepSizes(batch, micro, tuple(sorted(lengths.items())), sources)


def check_ranks(sizes: StepSizes | None, axes: int, train: bool, groups: Sequence[Any], device: torch.device) -> None:
    """One small all-gather a group: every rank has the same sizes, and none has refused the step.

    Args:
        sizes: this rank's; ``None`` if it has refused, and is going to raise why.
        axes: how many sequence axes the program has.
        train: whether it is a step, and no evaluation.
        groups: the process group of the pipeline and, if there are several ranks, the context-parallel one: a rank of
            another pipeline waits for this one's keys.
        device: that the group communicates on.

    Raises:
        FeedError: on every rank, if they differ: which rank has what, and which of this rank's inputs says so.
    """
    import torch.distributed as dist

    me = dist.get_rank()
    own = [me, 0] if sizes is None else [me, 1, int(train), sizes.batch, sizes.microbatch, *sizes.seq_len.values()]
    table = torch.tensor([[*own, *[0] * (5 + axes - len(own))]], device=device)
    for group in groups:
        parts = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, table, group=group)
        table = torch.cat(parts)
    rows = sorted(table.tolist())
    if sizes is None or all(row[1:] == rows[0][1:] for row in rows):
        return
    if refused := sorted({row[0] for row in rows if not row[1]}):
        raise FeedError(f"rank {me}: {ranks_text(refused)} refused the step, whose own error says why")
    text = []
    for place, name in enumerate([_KIND, BATCH, "microbatch", *sizes.seq_len], 2):
        holders: dict[int, list[int]] = {}
        for row in rows:
            holders.setdefault(row[place], []).append(row[0])
        if len(holders) > 1:
            text.append(_differing(name, holders, sizes.source(name)))
    raise FeedError(f"rank {me}: the ranks were given unlike steps: {'; '.join(text)}")


def _differing(name: str, holders: Mapping[int, list[int]], source: str) -> str:
    """``"'seq' is 32 on rank 0, 64 on ranks 1, 2 (here 'tokens' says so)"``."""
    if name == _KIND:
        return ", ".join(f"{('eval', 'step')[value]}() on {ranks_text(own)}" for value, own in holders.items())
    text = ", ".join(f"{value} on {ranks_text(own)}" for value, own in holders.items())
    return f"{name!r} is {text}" + (f" (here {source} says so)" if source else "")


class _Known:
    """Sizes and what told them; lengths are those of the whole sequence."""

    def __init__(self, cp_size: int | None) -> None:
        self.cp_size = cp_size
        self.sizes: dict[str, tuple[int, str]] = {}

    def say(self, axis: str, size: int, source: str, role: str = COL) -> None:
        if axis != BATCH:
            size = whole_length(size, self.cp_size, role)
        first, who = self.sizes.setdefault(axis, (size, source))
        if first != size:
            raise FeedError(f"{source} has {size} for {axis!r}, but {who} has {first}")


def _read(known: _Known, lifted: LiftedProgram, name: str, value: torch.Tensor) -> None:
    """What the shape of one input tells."""
    for item in lifted.inputs:
        if item.name == name:
            lead = int(item.batched)
            if value.ndim != 1 + lead + len(item.row_shape):
                raise FeedError(f"{name!r} has shape {tuple(value.shape)}; make it with feed()")
            if item.batched:
                known.say(BATCH, value.shape[0], repr(name))
            known.say(item.axis, value.shape[lead], repr(name), item.role)
            return
    axes = lifted.input_axes.get(name)
    if axes is None:
        return
    if value.ndim != axes.rank:
        raise FeedError(f"input {name!r} has {value.ndim} dims, the program's has {axes.rank}")
    if axes.batch_dim is not None:
        known.say(BATCH, value.shape[axes.batch_dim], repr(name))
    for dim, axis, role in axes.seq_dims:
        known.say(axis, value.shape[dim], repr(name), role)
