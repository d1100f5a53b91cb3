"""``check_orders`` on two processes: what differs between ranks is told on each of them, and none waits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import buffer_lifting as bl

SEQ, BATCH = 16, 2
RANDOM = torch.randperm(SEQ, generator=torch.Generator().manual_seed(0))
EACH = torch.stack([RANDOM, RANDOM.flip(0)])
TWICE = torch.cat([torch.tensor([1]), torch.arange(1, SEQ)])


def _same(rank: int) -> dict[str, Any]:
    """One order, written in as many ways as there are ranks."""
    return {"order": [RANDOM, RANDOM.int().expand(BATCH, SEQ)][rank], "positions": None}


def _natural(rank: int) -> dict[str, Any]:
    return {"order": [None, torch.arange(SEQ)][rank], "positions": [torch.arange(SEQ), None][rank]}


#: what a rank gives, and words of the error on each rank (``None``: no error)
CASES: dict[str, tuple[Callable[[int], dict[str, Any]], list[list[str]] | None]] = {
    "same": (_same, None),
    "natural": (_natural, None),
    "each_same": (lambda rank: {"order": EACH.clone()}, None),
    "order": (
        lambda rank: {"order": [RANDOM, RANDOM.flip(0)][rank]},
        [["order differs", "rank 0 has one", "rank 1 another"]] * 2,
    ),
    "one_sample": (lambda rank: {"order": [EACH, EACH.flip(0)][rank]}, [["order differs"]] * 2),
    "missing": (lambda rank: {"order": [RANDOM, None][rank]}, [["order differs"]] * 2),
    "positions": (
        lambda rank: {"order": RANDOM, "positions": [None, torch.arange(SEQ) % 8][rank]},
        [["positions differs"]] * 2,
    ),
    "seq_len": (lambda rank: {"seq_len": [SEQ, 2 * SEQ][rank]}, [["seq_len differs"]] * 2),
    "batch_size": (lambda rank: {"batch_size": 2 + rank}, [["batch_size differs"]] * 2),
    "invalid": (
        lambda rank: {"order": [RANDOM, TWICE][rank]},
        [["rank 1 cannot feed this step"], ["rank 1: order of sample 0", "twice"]],
    ),
    "not_a_tensor": (lambda rank: {"order": [RANDOM, [1, 2]][rank]}, [["rank 1"], ["rank 1: order", "list"]]),
    "not_a_size": (lambda rank: {"batch_size": [2, "2"][rank]}, [["rank 1"], ["batch_size", "'2'"]]),
}


def _worker(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    wrong = []
    for name, (given, words) in CASES.items():
        try:
            bl.check_orders(dist.group.WORLD, **{"batch_size": BATCH, "seq_len": SEQ, **given(rank)})
            message = None
        except bl.FeedError as error:
            message = str(error)
        expected = None if words is None else words[rank]
        if (message is None) != (expected is None) or any(word not in str(message) for word in expected or ()):
            wrong.append(f"{name}: {message!r}, expected {expected}")
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        raise AssertionError("\n".join(wrong))


@pytest.mark.multiprocess
@pytest.mark.timeout(180)
def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_worker, args=(os.fspath(Path(directory) / "store"),), nprocs=2)


def test_a_group_of_one() -> None:
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            bl.check_orders(None, BATCH, {"seq": SEQ, "other": 4}, order={"seq": EACH})
            with pytest.raises(bl.FeedError, match="several sequence axes"):
                bl.check_orders(None, BATCH, {"seq": SEQ, "other": 4}, order=EACH)
        finally:
            dist.destroy_process_group()
