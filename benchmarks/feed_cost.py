"""``feed`` beside PR #1797's way to get the rows of this rank, and beside a copy of the bytes that must be written.

A cell is a batch of ``B`` sequences of ``S`` on a rank of ``cp``, one complex64 table with 64 numbers a row (rotary
embeddings of heads of 128). In each round the three are run one after another, so that they meet the same machine;
each is run a few times in a row, and the fastest counts. Ours is in its steady state: the table of a length is prepared
at the first feed of that length, which is not timed (PR #1797's is prepared when the model is made).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._attention import _context_parallel_shard
from torch.export import Dim

import buffer_lifting as bl
from benchmarks.memory import peak_bytes
from buffer_lifting.lifted import LiftedProgram

ROW = 64
WORLD = 8
CALLS = 3  # in a row, of each in each round
#: What the orders of a cell are: one for all samples, the same or another one each step, or one for each sample,
#: another one each step.
KINDS = ("shared", "shared, new", "per sample")


class Rotary(nn.Module):
    """The smallest program that reads a table as PR #1797's Llama does: ``[batch, seq]`` in, 2 * ROW features out."""

    freqs_cis: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(ROW) / ROW))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.embedding = nn.Embedding(4, 2 * ROW)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, seq = tokens.shape
        pairs = torch.view_as_complex(self.embedding(tokens).view(batch, seq, ROW, 2))
        return torch.view_as_real(pairs * self.freqs_cis[:seq].view(1, seq, ROW)).flatten(2)


def build(length: int) -> tuple[Tensor, LiftedProgram]:
    """A table of ``length`` rows, and a lifted program that reads it."""
    model = Rotary(length)
    shapes = {"tokens": {0: Dim("batch", min=1), 1: Dim("seq", min=2, max=length)}}
    program = torch.export.export(model, (torch.zeros(2, 16, dtype=torch.int64),), dynamic_shapes=shapes)
    return model.freqs_cis, bl.lift(program)


@contextmanager
def meshes() -> Iterator[dict[int, DeviceMesh]]:
    """1-D meshes of this process alone, by size: nothing is sent, so the other ranks need not be there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # a mesh without its ranks has no public form

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("cp",)) for size in (2, 4, 8)}
    finally:
        dist.destroy_process_group()


class Given:
    """A load balancer of an order that the trainer has already: what torch's functions take an order as."""

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def _generate_indices(self, restore: bool = False) -> Tensor:
        return self.order.argsort(1) if restore else self.order


def head_tail(seq: int, size: int, shift: int = 0) -> Tensor:
    """``[1, seq]``: rank ``r`` has chunks ``r`` and ``2 * size - 1 - r`` of ``2 * size``, from chunk ``shift`` on."""
    chunks = torch.arange(seq).view(2 * size, -1).roll(shift, 0)
    return torch.stack([chunks[:size], chunks[size:].flip(0)], 1).reshape(1, seq)


def per_document(batch: int, seq: int, size: int, generator: torch.Generator) -> Tensor:
    """``[batch, seq]``: head-tail inside each document, all ranks' parts of all documents in the shards of the ranks.

    The documents have 128 to 2048 tokens, in each sample others.
    """
    rows = []
    for _ in range(batch):
        parts: list[list[Tensor]] = [[] for _ in range(size)]
        start = 0
        while start < seq:
            length = min(16 * int(torch.randint(8, 129, (), generator=generator)), seq - start)
            chunks = torch.arange(start, start + length).view(2 * size, -1)
            for rank in range(size):
                parts[rank] += [chunks[rank], chunks[2 * size - 1 - rank]]
            start += length
        rows.append(torch.cat([chunk for rank in parts for chunk in rank]))
    return torch.stack(rows)


def orders(kind: str, batch: int, seq: int, size: int, steps: int) -> list[Tensor]:
    """The order of each step."""
    generator = torch.Generator().manual_seed(0)
    if kind == "shared":
        return [head_tail(seq, size)] * steps
    if kind == "shared, new":
        return [head_tail(seq, size, step) for step in range(steps)]
    return [per_document(batch, seq, size, generator) for _ in range(steps)]


@dataclass
class Cell:
    """One cell: CPU seconds by way (``pr``, ``ours``, ``floor``), an entry a round, and peak bytes by way."""

    kind: str
    seq: int
    batch: int
    size: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def times_faster(self) -> float:
        """PR #1797's way over ours: the ratio of the medians."""
        return self._ratio("pr", "ours")

    def times_floor(self) -> float:
        """Ours over the floor: the ratio of the medians."""
        return self._ratio("ours", "floor")

    def times_less_memory(self) -> float:
        """PR #1797's peak over ours, in a step with an order that was not seen before."""
        return self.peak["pr"] / self.peak["ours"]

    def _ratio(self, above: str, below: str) -> float:
        return median(self.seconds[above]) / median(self.seconds[below])


def _timed(function: Callable[[Tensor], Any], order: Tensor) -> float:
    start = time.process_time()
    result = function(order)
    seconds = time.process_time() - start
    del result
    return seconds


def measure(
    table: Tensor, lifted: LiftedProgram, mesh: DeviceMesh, kind: str, seq: int, batch: int, rounds: int
) -> Cell:
    """Measures a cell.

    Raises:
        AssertionError: ours has other rows than PR #1797's way.
    """
    size = mesh.size()
    local = seq // size
    steps = orders(kind, batch, seq, size, rounds * CALLS)
    cell = Cell(kind, seq, batch, size, {"pr": [], "ours": [], "floor": []})
    samples = batch if kind == "per sample" else 1
    source = table[:seq].view(size, local, ROW)
    source = source[:samples] if samples <= size else source.expand(samples // size, size, local, ROW)

    def pr(order: Tensor) -> Tensor:
        rows = table[:seq].repeat(batch, 1, 1)
        return _context_parallel_shard(mesh, [rows], [1], Given(order))[0]

    def ours(order: Tensor) -> Tensor:
        return lifted.feed(batch, seq, order=order, shard=(0, size))["lifted_freqs_cis"]

    def floor(order: Tensor) -> Tensor:
        return source.clone(memory_format=torch.contiguous_format)

    other = orders("per sample" if kind == "per sample" else "shared, new", batch, seq, size, 2)[1]
    assert torch.equal(pr(other), ours(other))
    ours(steps[0])
    cell.peak = {"pr": peak_bytes(lambda: pr(other)), "ours": peak_bytes(lambda: ours(other))}
    cell.peak["floor"] = samples * local * ROW * table.element_size()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, way in {"pr": pr, "ours": ours, "floor": floor}.items():
                mine = steps[number * CALLS : (number + 1) * CALLS]
                cell.seconds[name].append(min(_timed(way, step) for step in mine))
    finally:
        gc.enable()
    return cell


def run(
    seqs: Sequence[int], batches: Sequence[int], sizes: Sequence[int], rounds: int, say: Callable[[str], None]
) -> list[Cell]:
    """Every cell. For a batch of one, an order per sample is a shared one that is new each step; what a shared order
    that is new costs is measured for the smallest and the largest batch."""
    cells = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with meshes() as known:
            table, lifted = build(max(seqs))
            for kind in KINDS:
                for seq in seqs:
                    for batch in batches:
                        if (kind == "per sample" and batch == 1) or (
                            kind == "shared, new" and 1 < batch < max(batches)
                        ):
                            continue
                        say(f"feed: {kind}, S {seq}, B {batch}")
                        for size in sizes:
                            cells.append(measure(table, lifted, known[size], kind, seq, batch, rounds))
    finally:
        torch.set_num_threads(threads)
    return cells
