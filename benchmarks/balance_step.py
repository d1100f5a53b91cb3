"""Training steps on two gloo ranks, in the orders that torch's ring takes, by ring and by all-gather.

Each rank is a process with one thread; a step is forward and backward of a model that is nearly all attention, on
torch's stage and schedule, from a barrier to the next: it takes as long as its slowest rank.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from torch.export import Dim

import buffer_lifting as bl
from benchmarks.balance_cost import HEADS, WIDTH, imbalance, make_order, pairs

RANKS = 2
ORDERS = ("contiguous", "head-tail")
STRATEGIES = ("ring", "allgather")


@dataclass
class Step:
    """Seconds of a step of each round, by order, of one strategy; ``pairs`` as in :class:`balance_cost.Cell`."""

    strategy: str
    seconds: dict[str, list[float]]
    pairs: dict[str, float]

    def ratio(self) -> tuple[float, float, float]:
        """Contiguous over head-tail: the median of the rounds' ratios, and their quartiles."""
        found = [one / other for one, other in zip(*(self.seconds[order] for order in ORDERS), strict=True)]
        low, middle, high = quantiles(found, n=4) if len(found) > 1 else found * 3
        return middle, low, high


class Attends(nn.Module):
    """Causal attention of ``HEADS`` heads of ``WIDTH``, on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 3 * HEADS * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.embedding(tokens).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def staged_programs() -> dict[str, bl.StagedProgram]:
    """One stage for each strategy."""
    shapes = {"tokens": {0: Dim("batch", min=1), 1: Dim("seq", min=2)}}
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    program = torch.export.export(Attends(), (tokens,), dynamic_shapes=shapes)
    result = {}
    for strategy in STRATEGIES:
        parallel = bl.context_parallel(bl.lift(program), size=RANKS, strategy=strategy)
        result[strategy] = bl.partition(parallel, num_stages=1)
    return result


def order_of(name: str, seq: int) -> Tensor:
    """``[1, seq]``."""
    return make_order(name, RANKS, [[seq]], [torch.zeros(seq, dtype=torch.int64)])


def _rank(rank: int, port: int, seq: int, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    try:
        seconds = _steps(rank, seq, rounds)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(path).write_text(json.dumps(seconds), encoding="utf-8")


def _steps(rank: int, seq: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("pp", "cp"))
    tokens = torch.randint(0, 16, (1, seq), generator=torch.Generator().manual_seed(0))
    calls = {}
    for strategy, staged in staged_programs().items():
        runner = bl.StepRunner(
            staged,
            Schedule1F1B,
            "cpu",
            n_microbatches=1,
            loss_fn=lambda output, _: output.square().sum(),
            mesh=mesh,
            compare_ranks=False,
        )
        for name in ORDERS:
            order = order_of(name, seq)
            own = staged.shard_inputs(tokens=tokens, order=order, shard=(rank, RANKS))
            feed = staged.feed(1, seq, order=order, shard=(rank, RANKS))
            calls[strategy, name] = (runner, {**own, **feed}, own["tokens"])
    seconds: dict[str, dict[str, list[float]]] = {strategy: {name: [] for name in ORDERS} for strategy in STRATEGIES}
    for turn in range(rounds + 1):  # the first makes the stages and schedules
        for (strategy, name), (runner, given, target) in calls.items():
            dist.barrier()
            start = time.perf_counter()
            runner.step(**given, target=target, return_outputs=False)
            dist.barrier()
            if turn:
                seconds[strategy][name].append(time.perf_counter() - start)
    return seconds


def time_steps(seq: int, rounds: int) -> list[Step]:
    """Steps of both orders and strategies in turn.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    firsts = [torch.zeros(seq, dtype=torch.int64)]
    counted = {name: imbalance(pairs(order_of(name, seq), firsts, RANKS)) for name in ORDERS}
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "seconds.json")
        torch.multiprocessing.spawn(_rank, (port, seq, rounds, path), nprocs=RANKS)
        seconds = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Step(strategy, seconds[strategy], counted) for strategy in STRATEGIES]


def median_ms(step: Step, order: str) -> float:
    """Milliseconds of a step."""
    return 1e3 * median(step.seconds[order])
