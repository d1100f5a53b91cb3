"""One rank of the demo's pipeline: ``python -m buffer_lifting.demo.worker RANK DIRECTORY``.

The directory has ``job.json`` and the saved stages, of which a rank reads its own; it puts one file of
results a step there.
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

from buffer_lifting.demo import data
from buffer_lifting.demo.model import LEARNING_RATE, loss_fn

WORLD = 2


@dataclass(frozen=True)
class Job:
    """What a rank has to know. ``timeout``: seconds to wait for the other one."""

    steps: int
    seed: int
    timeout: float = 60.0

    def write(self, directory: Path) -> None:
        """Leaves it for the ranks."""
        (directory / "job.json").write_text(json.dumps(asdict(self)))


def result_path(directory: Path, step: int, rank: int) -> Path:
    """Where a rank puts a step's result."""
    return directory / f"step{step}.rank{rank}.pt"


def train(rank: int, directory: Path) -> None:
    """Trains this rank's stage."""
    import torch.distributed as dist
    from torch.distributed.pipelining import Schedule1F1B

    import buffer_lifting as bl

    job = Job(**json.loads((directory / "job.json").read_text()))
    loaded = bl.load_stage(directory / "stages", rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=job.timeout),
    )
    stage = loaded.build_stage("cpu")
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=LEARNING_RATE)
    schedule: Any = None
    for step in range(job.steps):
        tokens, labels = data.batch(step, job.seed)
        order = data.order(step, job.seed)
        user = loaded.shard_inputs(order=order, input_ids=tokens)
        target = labels.gather(1, order)
        result: dict[str, Any] = {}
        for name, fed in (
            ("control", None),
            ("pipeline", order),
        ):  # the last one's gradients are stepped with
            feed = loaded.feed(data.BATCH, data.SEQ, order=fed, n_microbatches=data.MICROBATCHES)
            kwargs = {**user, **feed}
            if schedule is None:
                schedule = Schedule1F1B(
                    stage,
                    n_microbatches=data.MICROBATCHES,
                    loss_fn=loss_fn,
                    kwargs_chunk_spec=loaded.kwargs_chunk_spec(kwargs),
                )
            optimizer.zero_grad()
            losses: list[Tensor] = []
            last = rank == WORLD - 1
            schedule.step(target=target if last else None, losses=losses if last else None, **kwargs)
            grads = {fqn: p.grad for fqn, p in stage.submod.named_parameters()}
            result[name] = {
                "loss": float(torch.stack(losses).mean()) if last else None,
                "gradients": {fqn: None if grad is None else grad.clone() for fqn, grad in grads.items()},
            }
        optimizer.step()
        path = result_path(directory, step, rank)
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Runs a rank. If it fails it ends at once: the other one may wait for a message, and notices."""
    torch.set_num_threads(1)
    try:
        train(int(sys.argv[1]), Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
