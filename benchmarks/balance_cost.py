"""How evenly an order spreads attention over context-parallel ranks: pairs attended, and time of attention.

A query at slot ``q`` attends to the keys from the first slot of its document (of the sequence: slot 0) to ``q``. So
the pairs of a rank are a sum over its slots, and no mask of the whole sequence is ever made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _load_balancer
from torch.nn.attention.flex_attention import BlockMask

#: torch's per-document balancer writes the chunks of all ranks of one document, then those of the next; cut into
#: shards, the first rank gets whole documents. *By rank* are the same chunks, all of one rank together, as its
#: documentation draws them.
ORDERS = ("contiguous", "head-tail", "per-document", "per-document by rank", "PTRR")
MASKS = ("causal", "packed documents")
BLOCK = 128
HEADS, WIDTH = 2, 64


def documents(samples: int, seq: int, unit: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the documents of each sample, multiples of ``unit`` up to a quarter of the sequence."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(samples):
        lengths: list[int] = []
        while sum(lengths) < seq:
            draw = unit * int(torch.randint(1, seq // 4 // unit, (), generator=generator))
            lengths.append(min(draw, seq - sum(lengths)))
        result.append(lengths)
    return result


def first_keys(mask: str, lengths: Sequence[int]) -> Tensor:
    """``[seq]``: the first slot that each slot attends to."""
    if mask == "causal":
        return torch.zeros(sum(lengths), dtype=torch.int64)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return starts.repeat_interleave(torch.tensor(lengths))


def block_mask(firsts: Sequence[Tensor]) -> BlockMask:
    """Which blocks of keys a block of queries attends to, ``[samples, 1, seq, seq]`` in blocks: what PTRR balances."""
    seq = len(firsts[0])
    blocks = seq // BLOCK
    ends = torch.arange(1, blocks + 1)
    counts = torch.stack([ends - own[::BLOCK] // BLOCK for own in firsts]).unsqueeze(1)
    indices = (ends.view(1, 1, -1, 1) - 1 - torch.arange(blocks)).clamp(min=0).expand(len(firsts), -1, -1, -1)
    return BlockMask.from_kv_blocks(
        counts.int(), indices.int().contiguous(), BLOCK_SIZE=BLOCK, seq_lengths=(seq, seq), compute_q_blocks=False
    )


def make_order(name: str, size: int, lengths: Sequence[list[int]], firsts: Sequence[Tensor]) -> Tensor:
    """``[1 or samples, seq]``: an order of torch's load balancer of that name, all ranks' shards in a row."""
    seq = len(firsts[0])
    if name == "contiguous":
        return torch.arange(seq).unsqueeze(0)
    if name == "head-tail":
        return _load_balancer._HeadTailLoadBalancer(seq, size, "cpu")._generate_indices().long()
    if name.startswith("per-document"):
        order = _load_balancer._PerDocumentHeadTailLoadBalancer(list(lengths), size, "cpu")._generate_indices()
        return order if name == "per-document" else by_rank(order, lengths, size)
    return _load_balancer._PTRRLoadBalancer(block_mask(firsts), size)._generate_indices()


def by_rank(order: Tensor, lengths: Sequence[list[int]], size: int) -> Tensor:
    """A per-document order with the chunks of each rank together: ``[samples, seq]``."""
    rows = []
    for row, own in zip(order, lengths, strict=True):
        parts = [part.view(size, -1) for part in row.split(own)]
        rows.append(torch.cat(parts, 1).reshape(-1))
    return torch.stack(rows)


def pairs(order: Tensor, firsts: Sequence[Tensor], size: int) -> Tensor:
    """``[samples, size]``: pairs of query and key that each rank attends to in each sample."""
    found = []
    for sample, own in enumerate(firsts):
        slots = order[min(sample, len(order) - 1)]
        found.append((slots - own[slots] + 1).view(size, -1).sum(1))
    return torch.stack(found)


def imbalance(work: Tensor) -> float:
    """Of ``[samples, size]``: the slowest rank's work over the mean, each sample waiting for its slowest rank."""
    return float(work.max(1).values.double().sum() / work.double().mean(1).sum())


@dataclass
class Cell:
    """One cell: ``pairs`` is the slowest rank's share of attended pairs over the mean; ``seconds`` that of time."""

    mask: str
    order: str
    size: int
    pairs: float
    seconds: float | None = None


def run_pairs(seq: int, samples: int, sizes: Sequence[int]) -> list[Cell]:
    """Every mask, order and size, computed from the slots."""
    lengths = documents(samples, seq, 2 * max(sizes))
    cells = []
    for mask in MASKS:
        firsts = [first_keys(mask, own) for own in lengths]
        for size in sizes:
            for name in ORDERS:
                order = make_order(name, size, lengths, firsts)
                cells.append(Cell(mask, name, size, imbalance(pairs(order, firsts, size))))
    return cells


def attend(slots: Tensor, firsts: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the queries at ``slots`` over all keys, in blocks of queries that skip the keys none of them sees.

    Skipping is what kernels for causal and block masks do; attention with a dense mask does the same work for every
    slot, whatever the order.
    """
    outputs = []
    for start in range(0, len(slots), BLOCK):
        own = slots[start : start + BLOCK]
        low, high = int(firsts[own].min()), int(own.max()) + 1
        keys = torch.arange(low, high)
        seen = (keys >= firsts[own, None]) & (keys <= own[:, None])
        outputs.append(F.scaled_dot_product_attention(q[:, own], k[:, low:high], v[:, low:high], attn_mask=seen))
    return torch.cat(outputs, 1)


def time_ranks(seq: int, size: int, rounds: int, say: Callable[[str], None]) -> list[Cell]:
    """Each rank's attention of one sample, one rank after another in this process, rounds interleaved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lengths = documents(1, seq, 2 * size)
    q, k, v = (torch.randn(HEADS, seq, WIDTH) for _ in range(3))
    cells = []
    try:
        for mask in MASKS:
            firsts = [first_keys(mask, own) for own in lengths]
            work = {}
            for name in ORDERS:
                work[name] = make_order(name, size, lengths, firsts)[0].view(size, -1)
            say(f"balance: attention of each rank, {mask}")
            times: dict[tuple[str, int], list[float]] = {(name, rank): [] for name in ORDERS for rank in range(size)}
            for _ in range(rounds):
                for name, rank in times:
                    start = time.process_time()
                    attend(work[name][rank], firsts[0], q, k, v)
                    times[name, rank].append(time.process_time() - start)
            for name in ORDERS:
                seconds = torch.tensor([[median(times[name, rank]) for rank in range(size)]])
                counted = imbalance(pairs(work[name].reshape(1, -1), firsts, size))
                cells.append(Cell(mask, name, size, counted, imbalance(seconds)))
    finally:
        torch.set_num_threads(threads)
    return cells
