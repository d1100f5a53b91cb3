"""Splits a row of costs into stages: the smallest largest stage, and the fewest bytes sent among equals.

Costs are integers, so that equal sums are equal: which optimum is taken does not depend on rounding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise


def smallest_bound(costs: Sequence[int], count: int) -> int:
    """The smallest largest sum of ``count`` runs: a binary search over the sums, each tried greedily."""
    prefix = [0, *accumulate(costs)]
    low, high = max(max(costs), -(-prefix[-1] // count)), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _runs(prefix, middle, count) <= count:
            high = middle
        else:
            low = middle + 1
    return low


def _runs(prefix: Sequence[int], bound: int, limit: int) -> int:
    """How many runs of at most ``bound`` there have to be; ``limit + 1`` for more than ``limit``."""
    start = runs = 0
    while start < len(prefix) - 1 and runs <= limit:
        start = bisect_left(prefix, prefix[start] + bound + 1, start + 1) - 1
        runs += 1
    return runs


def balance(costs: Sequence[int], count: int, crossing: Sequence[int] | None = None) -> list[int]:
    """Splits costs into ``count`` runs, none of them empty: smallest largest sum, then fewest crossing bytes.

    Exact in both, in this order. What is left equal is decided from the end, each stage as near to an even share
    of what is left as can be. ``O(items * count)`` and a binary search.

    Args:
        costs: at least ``count`` integers, none negative.
        count: how many runs, at least 1.
        crossing: bytes that are sent if a run begins at an item (that of the first item is not used); default: 0.

    Returns:
        The first index of every run but the first.
    """
    size = len(costs)
    if count == 1:
        return []
    sent = crossing if crossing is not None else [0] * size
    bound = smallest_bound(costs, count)
    prefix = [0, *accumulate(costs)]
    lowest = [bisect_left(prefix, prefix[end] - bound, 0, end + 1) for end in range(size + 1)]
    first: list[int | None] = [None] * (size + 1)
    for end in range(1, size + 1):
        first[end] = 0 if lowest[end] == 0 else None
    rows = [first]
    for parts in range(2, count + 1):
        rows.append(_cheapest(rows[-1], lowest, sent, parts))
    starts: list[int] = []
    end = size
    for parts in range(count, 1, -1):
        before, total = rows[parts - 2], rows[parts - 1][end]
        fair = prefix[end] * (parts - 1) // parts
        options = [i for i in range(max(lowest[end], 1), end) if _plus(before[i], sent[i]) == total]
        end = min(options, key=lambda i: (abs(prefix[i] - fair), i))
        starts.append(end)
    return starts[::-1]


def _plus(value: int | None, added: int) -> int | None:
    return None if value is None else value + added


def _cheapest(before: Sequence[int | None], lowest: Sequence[int], sent: Sequence[int], parts: int) -> list[int | None]:
    """For each end the fewest bytes of ``parts`` runs: the least of a window that only moves on."""
    row: list[int | None] = [None] * len(before)
    window: deque[tuple[int, int]] = deque()  # (start, bytes), bytes rising
    for end in range(parts, len(before)):
        start = end - 1
        value = _plus(before[start], sent[start])
        if value is not None:
            while window and window[-1][1] >= value:
                window.pop()
            window.append((start, value))
        while window and window[0][0] < lowest[end]:
            window.popleft()
        if window:
            row[end] = window[0][1]
    return row


def equal_split(items: int, count: int) -> list[int]:
    """The first index of every run but the first, of runs of as equal a number of items as can be."""
    return [items * run // count for run in range(1, count)]


def balance_ranks(costs: Sequence[int], ranks: Sequence[int], crossing: Sequence[int] | None = None) -> list[int]:
    """Splits costs into stages of which several lie on one rank: the smallest largest sum of a rank.

    A descent, not exact: from the exact balance of stages and from an equal split, one item at a time is handed on from
    a stage of the fullest rank, or the largest stage, to another one, while that makes the ranks' sums (compared from
    the largest down), then the largest stage, then the bytes sent smaller. So no rank has more than the fullest rank of
    either start.

    Args:
        costs: as in :func:`balance`.
        ranks: the rank of each stage; as many stages as there are entries.
        crossing: as in :func:`balance`.
    """
    count, sent = len(ranks), crossing if crossing is not None else [0] * len(costs)
    prefix = [0, *accumulate(costs)]
    begin = [balance(costs, count, sent), equal_split(len(costs), count)]
    found = [_descend(start, prefix, ranks, sent) for start in begin]
    return min(found)[1]


_Key = tuple[list[int], int, int]


def _descend(
    starts: list[int], prefix: Sequence[int], ranks: Sequence[int], sent: Sequence[int]
) -> tuple[_Key, list[int]]:
    best = _key(starts, prefix, ranks, sent)
    while True:
        for cuts in _moves(starts, prefix, ranks):
            key = _key(cuts, prefix, ranks, sent)
            if key < best:
                best, starts = key, cuts
                break
        else:
            return best, starts


def _sums(starts: Sequence[int], prefix: Sequence[int]) -> list[int]:
    return [prefix[b] - prefix[a] for a, b in pairwise([0, *starts, len(prefix) - 1])]


def _key(starts: Sequence[int], prefix: Sequence[int], ranks: Sequence[int], sent: Sequence[int]) -> _Key:
    stages = _sums(starts, prefix)
    loads = _loads(stages, ranks)
    return sorted(loads, reverse=True), max(stages), sum(sent[start] for start in starts)


def _loads(stages: Sequence[int], ranks: Sequence[int]) -> list[int]:
    loads = [0] * (max(ranks) + 1)
    for cost, rank in zip(stages, ranks, strict=True):
        loads[rank] += cost
    return loads


def _moves(starts: list[int], prefix: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
    """Cuts with an item taken off a stage of a fullest rank, or off a largest stage, and given to another stage."""
    stages = _sums(starts, prefix)
    loads = _loads(stages, ranks)
    full, largest = max(loads), max(stages)
    moves = []
    for stage, rank in enumerate(ranks):
        if loads[rank] != full and stages[stage] != largest:
            continue
        # cut k is where stage k + 1 begins; what lies between giver and taker moves on by one item
        moves += [(range(taker, stage), 1) for taker in range(stage)]
        moves += [(range(stage, taker), -1) for taker in range(stage + 1, len(ranks))]
    found = []
    for cuts, step in moves:
        moved = [start + step if index in cuts else start for index, start in enumerate(starts)]
        bounds = [0, *moved, len(prefix) - 1]
        if all(a < b for a, b in pairwise(bounds)):
            found.append(moved)
    return found
