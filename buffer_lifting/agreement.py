"""Do all ranks of a job feed the same step? Checks for the first step, beside the hot path.

Every pipeline stage gathers its own lifted inputs, from an order that its own rank was given. Ranks with different
orders compute with the positions of other tokens, and no shape shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.streams import axis_streams

_SEEDS = (0x1797, 0x5EED)


def check_orders(
    group: Any,
    batch_size: int,
    seq_len: int | Mapping[str, int],
    order: Any = None,
    positions: Any = None,
    device: torch.device | str | None = None,
) -> None:
    """Raises on every rank of ``group`` unless all of them give the same order and positions.

    All ranks of the group call it with what they give :meth:`LiftedProgram.feed`: in the first step, or in each while
    looking for a bug. It costs one ``all_gather`` of some 100 bytes, and no ``feed`` communicates. The group is one in
    which the batch is the same: the pipeline group (orders that differ between stages), or all of pp x cp (each rank
    gives the whole order, not its shard).

    Args:
        group: the process group; ``None`` for the world.
        batch_size, seq_len, order, positions: as :meth:`LiftedProgram.feed` takes them. The natural order and an order
            that spells it out are the same one, as are ``(S,)``, ``(1, S)`` and ``(B, S)`` of equal rows.
        device: what the group's backend sends from (default: the current CUDA device for NCCL, else the CPU).

    Raises:
        FeedError: ranks differ, or a rank's own order or positions are not valid: it names the ranks and what differs.
    """
    import torch.distributed as dist

    lengths = dict(seq_len) if isinstance(seq_len, Mapping) else {"": seq_len}
    error: Exception | None = None
    try:
        facts = [1, batch_size, *_fingerprints(batch_size, lengths, order, positions)]
    except Exception as refused:  # the others wait in all_gather: raise behind it
        error, facts = refused, [0] * (2 + _COUNT)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor(facts, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    if isinstance(error, FeedError):
        raise FeedError(f"rank {dist.get_rank()}: {error}") from error
    if error is not None:
        raise error
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    rows = [tuple(row.tolist()) for row in gathered]
    invalid = [rank for rank, row in zip(ranks, rows, strict=True) if not row[0]]
    if invalid:
        raise FeedError(f"{ranks_text(invalid)} cannot feed this step: see the error there")
    for place, what in enumerate(("batch_size", "seq_len", "order", "positions")):
        parts = [row[1] if place == 0 else row[2 * place : 2 * place + 2] for row in rows]
        if len(set(parts)) > 1:
            raise FeedError(f"{what} differs between the ranks of the group: {_groups(ranks, parts)}")


_COUNT = 6  # two integers for the lengths, the order and the positions


def _fingerprints(batch_size: int, lengths: Mapping[str, int], order: Any, positions: Any) -> list[int]:
    for name, size in [
        ("batch_size", batch_size),
        *((f"seq_len {axis}".strip(), size) for axis, size in lengths.items()),
    ]:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise FeedError(f"{name} must be a positive integer, not {size!r}")
    streams = axis_streams(batch_size, lengths, order, positions)
    result = []
    for seed in _SEEDS:
        weights = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([len(lengths), *lengths.values()])
        total = [_weighted(sizes.unsqueeze(0), weights), 0, 0]
        for along in streams.values():
            natural = torch.arange(along.length).unsqueeze(0)
            for place, rows in ((1, along.order), (2, along.positions)):
                rows = natural if rows is None else rows.cpu().to(torch.int64)
                if bool((rows == rows[:1]).all()):
                    rows = rows[:1]
                total[place] = (31 * total[place] + _weighted(rows, weights)) % 2**63
        result.append(total)
    return [value for pair in zip(*result, strict=True) for value in pair]


def _weighted(rows: torch.Tensor, generator: torch.Generator) -> int:
    """A sum of the entries with random weights by place, modulo 2 ** 64; a batch of equal rows counts as one."""
    weights = torch.randint(-(2**62), 2**62, tuple(rows.shape), generator=generator)
    return int(((rows + 1) * (2 * weights + 1)).sum())


def ranks_text(ranks: Collection[int]) -> str:
    """``"rank 3"``, ``"ranks 0, 1"``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _groups(ranks: Collection[int], parts: list[Any]) -> str:
    """``"ranks 0, 1 agree, rank 2 has another"``."""
    by_part: dict[Any, list[int]] = {}
    for rank, part in zip(ranks, parts, strict=True):
        by_part.setdefault(part, []).append(rank)
    first, *others = sorted(by_part.values(), key=lambda own: (-len(own), own))
    more = "; ".join(f"{ranks_text(own)} another" for own in others)
    return f"{ranks_text(first)} {'have' if len(first) > 1 else 'has'} one, {more}"
