"""Sizes, labels, the balance of stages, and index streams, by themselves."""

from __future__ import annotations

import random
from itertools import combinations, pairwise, product

import pytest
import torch

from buffer_lifting.balance import balance
from buffer_lifting.errors import FeedError
from buffer_lifting.graph.sizes import Size, add, atoms, divide, is_symbol, multiply, rename, symbol
from buffer_lifting.labels import BATCH, COL, ROW, Factor, broadcast, feature, regroup
from buffer_lifting.streams import Streams, parse_shard

B, S = symbol("b"), symbol("s")


def value(size: Size, b: int, s: int) -> int:
    """A size at numbers."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, coefficient in size.terms:
        for atom, power in monomial:
            coefficient *= {"b": b, "s": s}[atom] ** power
        total += coefficient
    return total


SIZES: list[Size] = [
    0,
    1,
    2,
    6,
    B,
    S,
    multiply(B, S),
    add(S, 1),
    add(multiply(2, S), -3),
    multiply(4, multiply(B, B)),
]


@pytest.mark.parametrize("left, right", list(product(SIZES, SIZES)), ids=str)
def test_sizes_are_numbers(left: Size, right: Size) -> None:
    for b, s in ((2, 5), (3, 7), (1, 1)):
        assert value(add(left, right), b, s) == value(left, b, s) + value(right, b, s)
        assert value(multiply(left, right), b, s) == value(left, b, s) * value(right, b, s)
        quotient = divide(left, right)
        if quotient is not None:
            assert value(quotient, b, s) * value(right, b, s) == value(left, b, s)


def test_divide() -> None:
    assert divide(multiply(multiply(B, S), 6), multiply(2, S)) == multiply(3, B)
    assert divide(multiply(3, S), 2) is None and divide(S, B) is None and divide(6, 0) is None
    assert divide(add(S, 1), add(S, 1)) == 1 and divide(S, add(S, 1)) is None


def test_normal_form() -> None:
    assert add(S, multiply(-1, S)) == 0 and add(add(S, 3), multiply(-1, S)) == 3
    assert multiply(S, 0) == 0 and multiply(S, 1) == S
    assert multiply(B, S) == multiply(S, B) and add(B, S) == add(S, B)
    assert atoms(add(multiply(B, S), 1)) == {"b", "s"} and atoms(4) == frozenset()
    assert is_symbol(S) and not is_symbol(multiply(2, S)) and not is_symbol(4) and not is_symbol(multiply(S, S))


def test_rename() -> None:
    assert rename(add(multiply(B, S), S), {"s": "t"}) == add(multiply(B, symbol("t")), symbol("t"))
    assert rename(multiply(B, S), {"s": "b"}) == multiply(B, B)
    assert rename(add(B, multiply(-1, S)), {"s": "b"}) == 0 and rename(5, {"s": "b"}) == 5


BATCH_DIM, ROW_DIM, COL_DIM = (Factor(BATCH, "", B),), (Factor("seq", ROW, S),), (Factor("seq", COL, S),)


def test_regroup() -> None:
    labels = (BATCH_DIM, ROW_DIM, feature(12))
    assert regroup(labels, (multiply(B, S), 12)) == (BATCH_DIM + ROW_DIM, feature(12))
    assert regroup(labels, (B, S, 3, 4)) == (BATCH_DIM, ROW_DIM, feature(3), feature(4))
    assert regroup((BATCH_DIM + ROW_DIM, feature(12)), (B, S, 12)) == labels
    assert regroup(labels, (B, multiply(12, S))) == (BATCH_DIM, (*ROW_DIM, Factor("", "", 12)))
    assert regroup(labels, (B, 12, S)) is None  # would split the sequence
    assert regroup(((Factor("seq", ROW, 8),), feature(3)), (2, 4, 3)) is None
    assert regroup((BATCH_DIM, ROW_DIM, feature(1)), (B, 1, S, 1, 1)) == (BATCH_DIM, (), ROW_DIM, (), ())


def test_broadcast() -> None:
    assert broadcast([(ROW_DIM, ()), ((), COL_DIM)], (S, S)) == (ROW_DIM, COL_DIM)
    assert broadcast([(ROW_DIM,), (BATCH_DIM, ())], (B, S)) == (BATCH_DIM, ROW_DIM)
    assert broadcast([(ROW_DIM,), (COL_DIM,)], (S,)) is None
    assert broadcast([(feature(4),)], (2, 4)) == (feature(2), feature(4))


def test_balance_is_optimal() -> None:
    generator = random.Random(0)
    for _ in range(60):
        costs = [round(1e9 * generator.random() ** 3) for _ in range(generator.randint(1, 8))]
        count = generator.randint(1, len(costs))

        def worst(starts: list[int], costs: list[int] = costs) -> int:
            bounds = [0, *starts, len(costs)]
            return max(sum(costs[a:b]) for a, b in pairwise(bounds))

        found = balance(costs, count)
        assert len(found) == count - 1 and found == sorted(set(found)) and 0 not in found
        best = min(worst(list(starts)) for starts in combinations(range(1, len(costs)), count - 1))
        assert worst(found) == best


@pytest.mark.parametrize("shard", [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("role", [ROW, COL])
@pytest.mark.parametrize("stream", ["positions", "slots"])
@pytest.mark.parametrize("rows", [None, 0, 1, 3])
def test_streams(shard: tuple[int, int], role: str, stream: str, rows: int | None) -> None:
    batch, length = 3, 8
    order = None
    whole = torch.arange(length).expand(batch, -1)
    if rows is not None:
        generator = torch.Generator().manual_seed(rows)
        count = max(rows, 1)
        order = torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])
        whole = order.expand(batch, -1)
        order = order[0] if rows == 0 else order
    positions = torch.arange(length) % 3
    streams = Streams(batch, length, order, positions, shard)
    part = length // shard[1]
    local = range(length) if role == COL else range(shard[0] * part, (shard[0] + 1) * part)
    got = streams.index(length, stream, role, None).expand(batch, -1)
    for b in range(batch):
        for i, slot in enumerate(local):
            expected = int(whole[b, slot])
            assert int(got[b, i]) == (int(positions[expected]) if stream == "positions" else expected)


def test_parse_shard() -> None:
    assert parse_shard((1, 2)) == (1, 2)
    for bad in ((2, 2), (-1, 2), (0, 0), (0,), 3, None, (0.0, 1)):
        with pytest.raises(FeedError, match="shard"):
            parse_shard(bad)
