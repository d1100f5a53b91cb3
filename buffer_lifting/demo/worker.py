"""One rank of the demo: ``python -m buffer_lifting.demo.worker RANK DIRECTORY``.

The directory has ``job.json`` and the saved stages, of which a rank reads its own. The data of a step comes as a
file, and so do a rank's results. Ranks lie on a mesh of 2 stages x 2 context-parallel ranks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buffer_lifting.demo.batches import Step, load_step, put
from buffer_lifting.demo.model import RANKS, STAGES

WORLD = STAGES * RANKS


@dataclass(frozen=True)
class Job:
    """What a rank has to know. ``timeout``: seconds to wait for another one."""

    steps: int
    microbatches: int
    learning_rate: float
    timeout: float = 60.0

    def write(self, directory: Path) -> None:
        """Leaves it for the ranks."""
        (directory / "job.json").write_text(json.dumps(asdict(self)))


def result_path(directory: Path, step: int, rank: int) -> Path:
    """Where a rank puts a step's result."""
    return directory / f"step{step}.rank{rank}.pt"


def unlifted_feed(lifted: Any, step: Step, rank: int, size: int) -> dict[str, Tensor]:
    """What the model reads on a rank if nothing is lifted: positions of its shard, counted from 0.

    Keys are those of all ranks, each with what it reads itself.
    """
    batch, length = step.labels.shape
    feeds = []
    for other in range(size):
        inputs = lifted.shard_inputs(order=step.order, shard=(other, size), **step.inputs)
        local = {axis: length // size for axis in lifted.axes.lengths}
        feeds.append(lifted._feed(batch, local, inputs, None, None, (0, 1), None))
    columns = {item.name for item in lifted.inputs if item.role == "col"}
    return {
        name: torch.cat([feed[name] for feed in feeds], 1) if name in columns else value
        for name, value in feeds[rank].items()
    }


def train(rank: int, directory: Path) -> None:
    """Trains this rank's stage on its part of every sequence."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import Schedule1F1B

    import buffer_lifting as bl

    job = Job(**json.loads((directory / "job.json").read_text()))
    loaded = bl.load_stage(directory / "stages", rank // RANKS)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=job.timeout),
    )
    mesh = init_device_mesh("cpu", (STAGES, RANKS), mesh_dim_names=("pp", "cp"))
    loss_fn = bl.TokenLoss(mesh["cp"], job.microbatches)
    runner: Any = bl.StepRunner(
        loaded, Schedule1F1B, "cpu", n_microbatches=job.microbatches, loss_fn=loss_fn, mesh=mesh
    )
    module = runner.modules[loaded.index]
    optimizer = torch.optim.SGD(runner.parameters(), lr=job.learning_rate)
    for number in range(job.steps):
        step = load_step(directory, number)
        batch, length = step.labels.shape
        user = loaded.shard_inputs(order=step.order, shard=mesh["cp"], **step.inputs, target=step.labels)
        target = user.pop("target")
        feeds = {"lifted": loaded.feed(batch, length, step.inputs, order=step.order, shard=mesh["cp"])}
        if step.measure:  # first: the optimizer steps with the last one's gradients
            control = unlifted_feed(loaded.lifted, step, mesh["cp"].get_local_rank(), RANKS)
            feeds = {"control": control, **feeds}
        result: dict[str, Any] = {}
        for name, feed in feeds.items():
            optimizer.zero_grad()
            losses: list[Tensor] = []
            if runner.has_last:
                loss_fn.begin(target)
            runner.step(**user, **feed, target=target, losses=losses)
            loss_fn.reduce_gradients(runner.parameters())
            add_up_tied(loaded, module, mesh["pp"].get_group())
            grads = {fqn: p.grad for fqn, p in module.named_parameters() if step.measure and p.grad is not None}
            result[name] = {
                "loss": float(loss_fn.total(losses)) if runner.has_last else None,
                "gradients": {fqn: grad.clone() for fqn, grad in grads.items()},
            }
        optimizer.step()
        if mesh["cp"].get_local_rank() == 0:  # the others' are the same
            put(result, result_path(directory, number, rank))
    dist.barrier()
    dist.destroy_process_group()


def add_up_tied(loaded: Any, module: torch.nn.Module, group: Any) -> None:
    """Sums the gradients of weights that both stages have a copy of."""
    for fqn in loaded.tied:
        names = {fqn, *(name for names in loaded.stage.tied if fqn in names for name in names)}
        parameter = next(p for name, p in module.named_parameters(remove_duplicate=False) if name in names)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad, group=group)


def main() -> None:
    """Runs a rank. If it fails it ends at once: others may wait for a message, and the parent notices."""
    torch.set_num_threads(1)
    try:
        train(int(sys.argv[1]), Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
