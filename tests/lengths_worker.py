"""One rank of a pair that trains with another batch and sequence length in each step, on gloo.

``test_changing_lengths.py`` judges the results. As in ``pipeline_worker.py`` one pair of processes runs all cells, and
a rank that fails writes what happened and ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from pipeline_worker import (  # noqa: E402
    LAYERS,
    SGD,
    SINGLE,
    WORLD,
    Sends,
    add_up_tied,
    build_model,
    canonical_names,
    cross_entropy,
    free_port,
)
from zoo import CASES, VOCAB, export_case, make_inputs  # noqa: E402

MICROBATCHES = 4
#: Batch and sequence length of each step: they grow, shrink and come back.
STEPS = ((8, 32), (8, 64), (4, 32), (8, 48), (8, 32), (4, 32), (8, 64), (8, 48))


@dataclass(frozen=True)
class Cell:
    """A model under a schedule; ``loaded``: each rank reads its own stages from a package."""

    model: str
    schedule: str
    loaded: bool = False

    @property
    def name(self) -> str:
        """Names the test and the files."""
        return f"{self.model}-{self.schedule.removeprefix('Schedule')}" + ("-loaded" if self.loaded else "")

    @property
    def num_stages(self) -> int:
        """One stage a rank, or two."""
        return WORLD if self.schedule in SINGLE else 2 * WORLD


CELLS = (
    Cell("hf_llama", "Schedule1F1B"),
    Cell("llama_pr1797", "ScheduleInterleaved1F1B"),
    Cell("hf_llama", "ScheduleInterleavedZeroBubble"),
    Cell("nanogpt_tied", "ScheduleZBVZeroBubble"),
    Cell("llama_pr1797", "ScheduleLoopedBFS"),
    Cell("llama_pr1797", "Schedule1F1B", loaded=True),
)


def step_data(model: str, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """``(user inputs by name, target)`` of a step: the whole batch."""
    batch, seq = STEPS[step]
    args, kwargs = make_inputs(model, batch, seq, seed=100 + step)
    inputs = {**dict(zip(CASES[model].seq_inputs, args, strict=False)), **kwargs}
    generator = torch.Generator().manual_seed(200 + step)
    return inputs, torch.randint(0, VOCAB, (batch, seq), generator=generator)


def orders(step: int) -> Tensor:
    """Another order for each sample."""
    batch, seq = STEPS[step]
    generator = torch.Generator().manual_seed(300 + step)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(batch)])


def loss_fn(output: Any, target: Tensor) -> Tensor:
    """The mean over the tokens of a microbatch."""
    return cross_entropy(output if isinstance(output, Tensor) else output[0], target)


@cache
def lifted_program(model: str, dynamic: bool = True) -> Any:
    """The lifted program."""
    import buffer_lifting as bl

    sizes = {"batch": 3, "seq": 11} if dynamic else {"batch": 2, "seq": 16}
    _, program = export_case(model, dynamic=dynamic, layers=LAYERS, **sizes)
    return bl.context_parallel(bl.lift(program), size=1)


def staged_program(model: str, num_stages: int, dynamic: bool = True) -> Any:
    """Fresh stages, with the parameters as they were drawn."""
    import buffer_lifting as bl

    staged = bl.partition(lifted_program(model, dynamic), num_stages=num_stages)
    initial = dict(build_model(model).named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for stage in staged.stages:
            for fqn, parameter in stage.module.named_parameters():
                parameter.copy_(initial[fqn])
                parameter.grad = None
    return staged


def make_runner(staged: Any, schedule: str, directory: Path, rank: int, loaded: bool = False, **options: Any) -> Any:
    """A runner of this rank's stages."""
    from torch.distributed import pipelining

    import buffer_lifting as bl

    source = staged
    if loaded:
        package = directory / f"package{rank}"
        staged.save(package)
        source = bl.load_stage(package, rank)
    defaults = {"n_microbatches": MICROBATCHES, "loss_fn": loss_fn}
    return bl.StepRunner(source, getattr(pipelining, schedule), "cpu", **{**defaults, **options})


def step(runner: Any, staged: Any, model: str, number: int, permuted: bool = False, **options: Any) -> list[Tensor]:
    """One step of a runner; every rank gives it all it has."""
    inputs, target = step_data(model, number)
    order = orders(number) if permuted else None
    feed = staged.feed(*STEPS[number], order=order)
    if order is not None:
        inputs, target = staged.shard_inputs(order=order, **inputs), target.gather(1, order)
    losses: list[Tensor] = []
    runner.step(**inputs, **feed, target=target, losses=losses, **options)
    return losses


def gradients(runner: Any) -> dict[int, dict[str, Tensor]]:
    """This rank's gradients, by stage."""
    return {
        index: {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        for index, module in runner.modules.items()
    }


class _Owner:
    """What ``add_up_tied`` reads of a stage."""

    def __init__(self, index: int, module: torch.nn.Module) -> None:
        self.stage_index, self.submod = index, module


def train(cell: Cell, directory: Path, rank: int) -> dict[str, Any]:
    """All steps of a cell, with an optimizer; a runner keeps three of four sizes, so that some are made again."""
    staged = staged_program(cell.model, cell.num_stages)
    runner = make_runner(staged, cell.schedule, directory, rank, cell.loaded, keep=3)
    optimizer = torch.optim.SGD(list(runner.parameters()), **SGD)
    names = canonical_names(build_model(cell.model))
    sends = Sends()
    counts = {"natural": 0}
    graph = staged.lifted.feed_program.natural
    staged.lifted.feed_program.clear_tables()
    if graph is not None:
        run = type(graph).run

        def counted(values: Any) -> Any:
            counts["natural"] += 1
            return run(graph, values)

        graph.run = counted
    result: dict[str, Any] = {"steps": [], "tied": dict(staged.tied), "parameters": len(list(runner.parameters()))}
    for number in range(len(STEPS)):
        with sends.counted():
            losses = step(runner, staged, cell.model, number, permuted=number % 2 == 1)
        add_up_tied(staged, [_Owner(i, m) for i, m in runner.modules.items()], names)
        result["steps"].append(
            {
                "losses": [loss.detach().clone() for loss in losses],
                "gradients": gradients(runner),
                "posted": list(sends.posted),
                "evaluations": counts["natural"],
                "parameters": len(list(runner.parameters())),
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    if graph is not None:
        del graph.run
    result["natural"] = graph is not None
    result["sizes"] = [(s.batch, s.seq_len) for s in runner.sizes]
    result["stages"] = sorted(runner.modules)
    return result


# Other things that need two ranks -----------------------------------------------------------------------


def accumulate(directory: Path, rank: int) -> dict[str, Any]:
    """Two steps of different sizes, the gradients not zeroed in between; scaled by torch, and by the loss."""
    result: dict[str, Any] = {}
    for scaled in (True, False):
        staged = staged_program("llama_pr1797", WORLD)
        options = {} if scaled else {"scale_grads": False, "loss_fn": lambda o, t: loss_fn(o, t) / MICROBATCHES}
        runner = make_runner(staged, "Schedule1F1B", directory, rank, **options)
        for number in (0, 1):
            step(runner, staged, "llama_pr1797", number)
        result[str(scaled)] = gradients(runner)
    return result


def evaluate(directory: Path, rank: int) -> dict[str, Any]:
    """Steps and evaluations in turns, and a step that tells its sizes; messages of each."""
    staged = staged_program("llama_pr1797", WORLD)
    runner = make_runner(staged, "Schedule1F1B", directory, rank)
    sends = Sends()
    posted, outputs = [], []
    for number, kind in ((0, "step"), (1, "eval"), (0, "eval"), (1, "step"), (1, "eval")):
        inputs, target = step_data("llama_pr1797", number)
        feed = staged.feed(*STEPS[number])
        batch, seq = STEPS[number]
        with sends.counted():
            if kind == "step":
                runner.step(*inputs.values(), **feed, target=target, batch_size=batch, seq_len=seq)
            else:
                with torch.no_grad():
                    outputs.append(runner.eval(*inputs.values(), **feed, target=target))
        posted.append(list(sends.posted))
    return {"posted": posted, "outputs": outputs}


def by_microbatch(directory: Path, rank: int) -> dict[str, Any]:
    """A static program: its microbatch is fixed, the number of microbatches changes with the batch."""
    staged = staged_program("llama_pr1797", WORLD, dynamic=False)
    runner = make_runner(staged, "Schedule1F1B", directory, rank, n_microbatches=None, microbatch_size=2)
    result = {}
    for batch in (8, 4, 8):
        args, _ = make_inputs("llama_pr1797", batch, 16, seed=batch)
        feed = staged.feed(batch, 16)
        runner.step(*args, **feed, target=args[0])
        result[batch] = gradients(runner)
        for parameter in runner.parameters():
            parameter.grad = None
    return result


def refusals(directory: Path, rank: int) -> dict[str, str]:
    """Steps that must not begin: each is refused on its own rank before anything is sent."""
    staged = staged_program("llama_pr1797", WORLD)
    runner = make_runner(staged, "Schedule1F1B", directory, rank, compare_ranks=False)
    fixed = staged_program("llama_pr1797", WORLD, dynamic=False)
    static = make_runner(fixed, "Schedule1F1B", directory, rank, compare_ranks=False)
    (tokens,), _ = make_inputs("llama_pr1797", 8, 32, seed=1)
    feed, other = staged.feed(8, 32), staged.feed(8, 48)
    longest = CASES["llama_pr1797"].table_len
    (long,), _ = make_inputs("llama_pr1797", 8, 2 * longest, seed=1)
    attempts: dict[str, Callable[[], Any]] = {
        "static length": lambda: static.step(tokens, **feed, target=tokens),
        "static batch": lambda: static.step(tokens[:4, :16], **staged.feed(4, 16), target=tokens[:4]),
        "another feed": lambda: runner.step(tokens, **other, target=tokens),
        "another seq_len": lambda: runner.step(tokens, **feed, target=tokens, seq_len=48),
        "another batch_size": lambda: runner.step(tokens, **feed, target=tokens, batch_size=4),
        "uneven batch": lambda: runner.step(tokens[:6], **staged.feed(6, 32), target=tokens[:6]),
        "no sizes": lambda: runner.step(target=tokens),
        "too long": lambda: runner.step(long, target=long),
        "unknown": lambda: runner.step(tokens, **feed, target=tokens, mask=tokens),
        "missing": lambda: runner.step(tokens, target=tokens),
        "twice": lambda: runner.step(tokens, tokens=tokens, **feed, target=tokens),
    }
    if runner.has_last:
        attempts["no target"] = lambda: runner.step(tokens, **feed)
        attempts["other target"] = lambda: runner.step(tokens, **feed, target=tokens[:4])
    result = {}
    sends = Sends()
    with sends.counted():
        for name, attempt in attempts.items():
            try:
                attempt()
                result[name] = "nothing"
            except Exception as error:
                result[name] = f"{type(error).__name__}: {error}"
    result["posted"] = str(sends.posted)
    step(runner, staged, "llama_pr1797", 0)  # and the next step works
    return result


def compared(directory: Path, rank: int) -> dict[str, Any]:
    """Ranks that are given unlike steps: an error on each, and the next step works."""
    staged = staged_program("llama_pr1797", WORLD)
    runner = make_runner(staged, "Schedule1F1B", directory, rank)
    (tokens,), _ = make_inputs("llama_pr1797", 8, 32, seed=1)
    (other,), _ = make_inputs("llama_pr1797", 8, 48, seed=1)
    mine, fewer = other if rank else tokens, tokens[:4] if rank else tokens
    attempts: dict[str, Callable[[], Any]] = {
        "lengths": lambda: runner.step(mine, **staged.feed(*mine.shape), target=mine),
        "refused": lambda: runner.step(tokens, **staged.feed(8, 32), target=other[:3] if rank else tokens),
        "kind": lambda: (runner.eval if rank else runner.step)(tokens, **staged.feed(8, 32), target=tokens),
        "lengths, one of them known": lambda: runner.step(mine, **staged.feed(*mine.shape), target=mine),
        "batches": lambda: runner.step(fewer, **staged.feed(*fewer.shape), target=fewer),
    }
    result = {}
    for name, attempt in attempts.items():
        if "known" in name:
            step(runner, staged, "llama_pr1797", 0)
        try:
            attempt()
            result[name] = "nothing"
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"
    step(runner, staged, "llama_pr1797", 0)
    return result


def sharded(directory: Path, rank: int) -> dict[str, Any]:
    """:func:`accumulate` with FSDP on each stage (of one rank: it is the bookkeeping of gradients that matters)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("pp", "dp"))
    staged = staged_program("llama_pr1797", WORLD)
    runner = make_runner(staged, "Schedule1F1B", directory, rank, mesh=mesh)
    for module in runner.modules.values():
        fully_shard(module, mesh=mesh["dp"])
    for number in (0, 1):
        step(runner, staged, "llama_pr1797", number)
    return {
        "gradients": {
            index: {name: p.grad.full_tensor().clone() for name, p in module.named_parameters()}
            for index, module in runner.modules.items()
        }
    }


def converted(directory: Path, rank: int) -> dict[str, Any]:
    """Stages in another dtype, with the runner told; the dtypes that were sent."""
    staged = staged_program("nanogpt", WORLD)
    for stage in staged.stages:
        stage.module.to(torch.float64)
    runner = make_runner(staged, "Schedule1F1B", directory, rank, activation_dtype=torch.float64)
    sends = Sends()
    with sends.counted():
        inputs, target = step_data("nanogpt", 0)
        feed = {k: v.to(torch.float64) if v.is_floating_point() else v for k, v in staged.feed(*STEPS[0]).items()}
        losses: list[Tensor] = []
        runner.step(**inputs, **feed, target=target, losses=losses)
    return {"posted": list(sends.posted), "losses": [float(loss.detach()) for loss in losses]}


def untold(directory: Path, rank: int) -> dict[str, Any]:
    """Stages in another dtype that the runner knows nothing of: the rank that computes it raises and ends."""
    staged = staged_program("nanogpt", WORLD)
    for stage in staged.stages:
        stage.module.to(torch.float64)
    runner = make_runner(staged, "Schedule1F1B", directory, rank)
    inputs, target = step_data("nanogpt", 0)
    feed = {k: v.to(torch.float64) if v.is_floating_point() else v for k, v in staged.feed(*STEPS[0]).items()}
    runner.step(**inputs, **feed, target=target)
    return {}


def dry_run(directory: Path, rank: int) -> dict[str, Any]:
    """The first step of torch's own stages, which find their shapes by running once, and of stages that have them."""
    from torch.distributed.pipelining import Schedule1F1B

    result: dict[str, Any] = {}
    for given in (False, True):
        staged = staged_program("llama_pr1797", WORLD)
        batch, seq = STEPS[0]
        sizes = {"microbatch_size": batch // MICROBATCHES, "seq_len": seq} if given else {}
        stage = staged.build_stage(rank, "cpu", **sizes)
        calls: list[int] = []
        stage.submod.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inputs, target = step_data("llama_pr1797", 0)
        kwargs = {**({} if rank == 0 else inputs), **staged.feed(batch, seq)}
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn, kwargs_chunk_spec=staged.kwargs_chunk_spec(kwargs))
        sends = Sends()
        with sends.counted():
            schedule.step(*(inputs.values() if rank == 0 else ()), target=target, **kwargs)
        result[str(given)] = {"posted": list(sends.posted), "forwards": len(calls)}
    return result


OTHERS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "accumulate": accumulate,
    "evaluate": evaluate,
    "by_microbatch": by_microbatch,
    "refusals": refusals,
    "compared": compared,
    "sharded": sharded,
    "converted": converted,
    "dry_run": dry_run,
    "untold": untold,
}


def work(rank: int, port: int, directory: Path, names: Sequence[str]) -> None:
    """Runs the named cells and others."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    cells = {cell.name: cell for cell in CELLS}
    for name in names:
        scratch = directory / name
        scratch.mkdir(exist_ok=True)
        began = time.monotonic()
        try:
            result = train(cells[name], scratch, rank) if name in cells else OTHERS[name](scratch, rank)
        except Exception:
            torch.save({"error": traceback.format_exc()}, directory / f"{name}.rank{rank}.pt")
            sys.stdout.flush()
            os._exit(1)  # the peer's pending receive fails when this end of the connection goes away
        torch.save({"error": "", **result}, directory / f"{name}.rank{rank}.pt")
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def launch(names: Sequence[str], directory: Path, timeout: float) -> list[dict[str, dict[str, Any]]]:
    """Runs a pair of workers; for each rank the result of each name, ``{"error": ...}`` where there is none."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    port = free_port()
    logs = [directory / f"log{rank}.txt" for rank in range(WORLD)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, str(rank), str(port), str(directory), *names]
            with log.open("wb") as out:
                workers.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        end = time.monotonic() + timeout
        while time.monotonic() < end and any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                end = min(end, time.monotonic() + 10)
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    text = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    return [
        {
            name: torch.load(path, weights_only=False) if path.exists() else {"error": f"no result:\n{text}"}
            for name in names
            for path in [directory / f"{name}.rank{rank}.pt"]
        }
        for rank in range(WORLD)
    ]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
