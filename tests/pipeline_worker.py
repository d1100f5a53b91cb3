"""One rank of a two-rank pipeline on gloo, and the cells that it trains.

A *cell* is a model under a schedule; ``test_schedules.py`` judges the results. Starting two processes and
importing torch costs seconds, so one pair trains many cells, and writes one file a cell and rank. A rank that
fails inside a step cannot tell its peer, which may be waiting for a message: it writes what happened and
ends, and the parent starts a new pair for the cells that are left.

The parent imports this module too: cells, data and loss have to be the same on both sides.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from zoo import CASES, VOCAB, export_case, make_inputs  # noqa: E402

WORLD = 2
LAYERS = 4
STEPS = 2
MICROBATCHES = 4
MICROBATCH = 2
BATCH = MICROBATCHES * MICROBATCH
SEQ = 16
DIM = 32
#: The sizes of the example inputs. "dynamic": others than a step's; "same": a microbatch's; "static": fixed.
EXAMPLES = {"dynamic": (3, 11), "same": (MICROBATCH, SEQ), "static": (MICROBATCH, SEQ)}
#: With momentum, the optimizer has a state of its own that the second step depends on.
SGD = {"lr": 0.05, "momentum": 0.9}

#: How the stages lie on the ranks.
SINGLE = ("ScheduleGPipe", "Schedule1F1B")
LOOPED = ("ScheduleInterleaved1F1B", "ScheduleLoopedBFS", "ScheduleInterleavedZeroBubble")
V_SHAPED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
#: The constructors that don't take ``kwargs_chunk_spec`` (torch 2.13): they cut every keyword along dim 0.
WITHOUT_CHUNK_SPEC = ("ScheduleLoopedBFS",)

Export = Literal["dynamic", "same", "static"]
Order = Literal["natural", "permuted", "feed left natural"]


@dataclass(frozen=True)
class Cell:
    """A model under a schedule.

    Attributes:
        model: name of the zoo's case; ``schedule``: class in ``torch.distributed.pipelining``.
        export: see ``EXAMPLES``.
        order: ``permuted``: another order for each sample, of tokens, targets and feed;
            ``feed left natural``: of the tokens and targets only, which must give wrong gradients.
        plain_loss: ``loss_fn`` takes the model's own output, and not what a tuple of one holds.
        mesh: the stages get their group from a DeviceMesh.
        cp: lifted with ``context_parallel(size=1)``.
    """

    model: str
    schedule: str
    export: Export = "dynamic"
    order: Order = "natural"
    plain_loss: bool = False
    mesh: bool = False
    cp: bool = True

    @property
    def name(self) -> str:
        """Names the test, and the files of results."""
        parts = [self.model, self.schedule.removeprefix("Schedule"), self.export]
        parts += [self.order.replace(" ", "_")] if self.order != "natural" else []
        parts += [word for word in ("plain_loss", "mesh") if getattr(self, word)]
        return "-".join(parts + ([] if self.cp else ["lift_only"]))

    @property
    def num_stages(self) -> int:
        """Two for the schedules with one stage a rank, four for the others."""
        return WORLD if self.schedule in SINGLE else 2 * WORLD

    @property
    def placement(self) -> list[int]:
        """The rank of each stage."""
        from buffer_lifting import stage_ranks

        return list(stage_ranks(self.schedule, self.num_stages, WORLD).values())

    @property
    def hops(self) -> list[int]:
        """The stages whose next stage is on another rank."""
        places = self.placement
        return [stage for stage in range(self.num_stages - 1) if places[stage] != places[stage + 1]]

    @property
    def loss_in_graph(self) -> bool:
        """Whether the model takes labels and returns its loss."""
        return "labels" in CASES[self.model].seq_inputs


# What parent and workers share --------------------------------------------------------------------------


@cache
def build_model(model: str) -> nn.Module:
    """The eager model, with the weights that ``export_case`` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[model].build(layers=LAYERS).train()


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Every FQN of a parameter -> the first FQN of that parameter: tied weights have several."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {fqn: first.setdefault(id(parameter), fqn) for fqn, parameter in named}


def step_data(model: str, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """``(user inputs by name, target)`` of a step: the whole batch, in natural order.

    The mean over microbatches is the mean over the batch only if each has as many valid labels, so every row
    ignores three of its labels: not the first one, which a shifted loss drops anyway.
    """
    case = CASES[model]
    args, kwargs = make_inputs(model, BATCH, SEQ, seed=100 + step)
    inputs = {**dict(zip(case.seq_inputs, args, strict=False)), **kwargs}
    generator = torch.Generator().manual_seed(200 + step)
    target = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    if "labels" in inputs:
        places = torch.stack([torch.randperm(SEQ - 1, generator=generator)[:3] + 1 for _ in range(BATCH)])
        inputs["labels"] = target = target.scatter(1, places, -100)
    return inputs, target


def random_orders(step: int) -> Tensor:
    """A different permutation for each sample."""
    generator = torch.Generator().manual_seed(300 + step)
    return torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of the models that return logits."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def picked_loss(output: Any, target: Tensor) -> Tensor:
    """:func:`cross_entropy` of a stage's output, which may be a tuple of one."""
    return cross_entropy(output if isinstance(output, Tensor) else output[0], target)


def graph_loss(output: Any, target: Tensor) -> Tensor:
    """The loss that the last stage has computed; the target reached it as a keyword."""
    return output if isinstance(output, Tensor) else output[0]


# The worker ---------------------------------------------------------------------------------------------


@cache
def lifted_program(model: str, export: Export, cp: bool) -> Any:
    """The lifted program, and its parameters' first values."""
    import buffer_lifting as bl

    batch, seq = EXAMPLES[export]
    _, program = export_case(model, dynamic=export != "static", batch=batch, seq=seq, layers=LAYERS)
    lifted = bl.lift(program)
    if cp:
        lifted = bl.context_parallel(lifted, size=1)
    return lifted, {fqn: value.detach().clone() for fqn, value in lifted.program.state_dict.items()}


def staged_program(cell: Cell) -> Any:
    """The stages of a cell, with the parameters as they were drawn: earlier cells have trained them."""
    import buffer_lifting as bl

    lifted, initial = lifted_program(cell.model, cell.export, cell.cp)
    if cell.schedule in SINGLE:
        layers = CASES[cell.model].split_points[0].rpartition(".")[0]
        staged = bl.partition(lifted, split_points=[f"{layers}.{LAYERS // 2}"])
    else:
        staged = bl.partition(lifted, num_stages=cell.num_stages)
    with torch.no_grad():
        for stage in staged.stages:
            for fqn, parameter in stage.module.named_parameters():
                parameter.copy_(initial[fqn])
                parameter.grad = None
    return staged


class Sends:
    """What crosses ranks: labelled where torch asks a stage for messages, in bytes where gloo gets them."""

    def __init__(self) -> None:
        self.labelled: list[dict[str, Any]] = []
        self.posted: list[int] = []

    def watch(self, stage: Any) -> None:
        """Labels the messages of a stage."""
        for direction, method in (("forward", "get_fwd_send_ops"), ("backward", "get_bwd_send_ops")):
            self._wrap(stage, direction, method)

    def _wrap(self, stage: Any, direction: str, method: str) -> None:
        original = getattr(stage, method)

        def wrapped(microbatch: int) -> Any:
            ops = original(microbatch)
            for op in ops:
                self.labelled.append(
                    {
                        "direction": direction,
                        "stage": stage.stage_index,
                        "microbatch": microbatch,
                        "dtype": str(op.tensor.dtype),
                        "shape": tuple(op.tensor.shape),
                        "bytes": op.tensor.numel() * op.tensor.element_size(),
                    }
                )
            return ops

        setattr(stage, method, wrapped)

    @contextmanager
    def counted(self) -> Any:
        """Counts inside the block; every way of sending ends in the process group's ``send``."""
        from torch.distributed import ProcessGroup

        original = ProcessGroup.__dict__["send"]  # as a method: the class attribute, put back, would be none

        def send(group: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
            self.posted += [tensor.numel() * tensor.element_size() for tensor in tensors]
            return original(group, tensors, *args, **kwargs)

        self.labelled.clear()
        self.posted.clear()
        ProcessGroup.send = send
        try:
            yield
        finally:
            ProcessGroup.send = original


def add_up_tied(staged: Any, stages: Sequence[Any], names: dict[str, str], group: Any = None) -> None:
    """Gives every copy of a tied weight the sum of the copies' gradients, as a trainer has to.

    ``group``: the ranks of the pipeline; default: all.
    """
    import torch.distributed as dist

    for fqn, holders in sorted(staged.tied.items()):
        copies = {
            id(parameter): parameter
            for stage in stages
            if stage.stage_index in holders
            for name, parameter in stage.submod.named_parameters()
            if names[name] == names[fqn]
        }
        shape = staged.lifted.program.state_dict[fqn].shape
        dtype = next(parameter.dtype for stage in stages for parameter in stage.submod.parameters())
        total = sum((copy.grad for copy in copies.values()), torch.zeros(shape, dtype=dtype))
        dist.all_reduce(total, group=group)
        for copy in copies.values():
            copy.grad = total.clone()


def errors_of_meshes(staged: Any) -> dict[str, str]:
    """What ``build_stage`` raises for meshes that it can't use."""
    from torch.distributed.device_mesh import init_device_mesh

    import buffer_lifting as bl

    pp = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("pp",))
    attempts: dict[str, dict[str, Any]] = {
        "no pp dim": {"mesh": init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))},
        "no names": {"mesh": init_device_mesh("cpu", (WORLD,))},
        "group and mesh": {"mesh": pp, "group": pp.get_group()},
    }
    raised = {}
    for name, arguments in attempts.items():
        try:
            staged.build_stage(0, "cpu", **arguments)
            raised[name] = "nothing"
        except bl.PartitionError as error:
            raised[name] = f"PartitionError: {error}"
    return raised


def step_inputs(cell: Cell, step: int, staged: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """``(user inputs, feed, target)`` for ``schedule.step``, in the cell's order."""
    inputs, target = step_data(cell.model, step)
    order = None if cell.order == "natural" else random_orders(step)
    fed = order if cell.order == "permuted" else None
    feed = staged.feed(BATCH, SEQ, inputs=inputs, order=fed, n_microbatches=MICROBATCHES)
    if order is not None:
        inputs = staged.shard_inputs(order=order, **inputs)
        target = target.gather(1, order)
    return inputs, feed, target


def step_arguments(
    staged: Any, schedule: str, mine: Sequence[int], values: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """``values`` by position and by name, for the ``step`` of the rank that has the stages ``mine``.

    Stages of one rank get the same keywords, so the first stage may not get by position what a later one reads by
    name: only with one stage a rank can all positional inputs be given as they are.
    """
    count = len(staged.positional) if schedule in SINGLE else 1
    by_position = staged.positional[:count] if 0 in mine else ()
    args = tuple(values[name] for name in by_position)
    return args, {name: value for name, value in values.items() if name not in by_position}


def make_schedule(name: str, stages: Sequence[Any], n_microbatches: int, loss_fn: Any, chunk_spec: Any) -> Any:
    """One of torch's schedules over the stages of this rank."""
    from torch.distributed import pipelining

    chunks = {} if name in WITHOUT_CHUNK_SPEC else {"kwargs_chunk_spec": chunk_spec}
    own = stages[0] if name in SINGLE else list(stages)
    return getattr(pipelining, name)(own, n_microbatches=n_microbatches, loss_fn=loss_fn, **chunks)


def train(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """Trains a cell on this rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mine = [stage for stage, place in enumerate(cell.placement) if place == rank]
    result: dict[str, Any] = {"steps": [], "tied": dict(staged.tied), "boundary": {}, "parameters": {}}
    where: dict[str, Any] = {"group": dist.group.WORLD}
    if cell.mesh:
        result["mesh errors"] = errors_of_meshes(staged)
        where = {"mesh": init_device_mesh("cpu", (WORLD,), mesh_dim_names=("pp",))}
    stages = [staged.build_stage(index, "cpu", **where) for index in mine]
    names = canonical_names(build_model(cell.model))
    parameters = {id(p): p for stage in stages for p in stage.submod.parameters()}
    optimizer = torch.optim.SGD(parameters.values(), **SGD)
    loss_fn = graph_loss if cell.loss_in_graph else cross_entropy if cell.plain_loss else picked_loss
    sends = Sends()
    for stage in stages:
        sends.watch(stage)
        result["boundary"][stage.stage_index] = staged.stages[stage.stage_index].boundary_bytes
        result["parameters"][stage.stage_index] = staged.stages[stage.stage_index].parameters
    schedule = None
    for step in range(STEPS):
        inputs, feed, target = step_inputs(cell, step, staged)
        args, kwargs = step_arguments(staged, cell.schedule, mine, {**inputs, **feed})
        if schedule is None:
            schedule = make_schedule(cell.schedule, stages, MICROBATCHES, loss_fn, staged.kwargs_chunk_spec(kwargs))
        last = cell.num_stages - 1 in mine
        losses: list[Tensor] = []
        with sends.counted():
            output = schedule.step(
                *args,
                target=target if last else None,
                losses=losses if last else None,
                return_outputs=not cell.loss_in_graph,
                **kwargs,
            )
        add_up_tied(staged, stages, names)
        result["steps"].append(
            {
                "losses": [loss.detach().clone() for loss in losses],
                "output": None if output is None else output if isinstance(output, Tensor) else output[0].detach(),
                "gradients": {
                    stage.stage_index: {
                        name: None if p.grad is None else p.grad.clone() for name, p in stage.submod.named_parameters()
                    }
                    for stage in stages
                },
                "sends": list(sends.labelled),
                "posted": list(sends.posted),
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    return result


def result_path(directory: Path, cell: Any, rank: int) -> Path:
    """Where a rank puts a cell's result; ``cell`` has a ``name``."""
    return directory / f"{cell.name}.rank{rank}.pt"


def write_result(directory: Path, cell: Any, rank: int, result: dict[str, Any]) -> None:
    path = result_path(directory, cell, rank)
    torch.save(result, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


@contextmanager
def process_group(rank: int, world: int, port: int) -> Any:
    """One of ``world`` ranks on gloo; all leave together."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int, port: int, directory: Path) -> None:
    """Trains the cells of ``cells.json``."""
    torch.set_num_threads(1)
    cells = [Cell(**entry) for entry in json.loads((directory / "cells.json").read_text())]
    with process_group(rank, WORLD, port):
        work_through(cells, directory, rank, staged_program, train)


def work_through(cells: Sequence[Any], directory: Path, rank: int, prepare: Any, run: Any) -> None:
    """Runs cells one after another: ``run(cell, prepare(cell), rank)``, a file of results each.

    A cell that one rank cannot prepare is left out by all; a rank that fails inside ``run`` ends.
    """
    import torch.distributed as dist

    for cell in cells:
        began = time.monotonic()
        try:
            prepared, error = prepare(cell), ""
        except Exception:
            prepared, error = None, traceback.format_exc()
        ready = torch.tensor([0 if error else 1])
        dist.all_reduce(ready, op=dist.ReduceOp.MIN)
        if not ready.item():
            write_result(directory, cell, rank, {"error": error or "the other rank could not make the stages"})
            continue
        done = time.monotonic()
        try:
            result = run(cell, prepared, rank)
        except Exception:
            write_result(directory, cell, rank, {"error": traceback.format_exc()})
            sys.stdout.flush()
            os._exit(1)  # the peer's pending receive fails when this end of the connection goes away
        write_result(directory, cell, rank, {"error": "", **result})
        print(f"{cell.name}: {done - began:.1f} s + {time.monotonic() - done:.1f} s", flush=True)


# The parent ---------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worker_environment() -> dict[str, str]:
    """One thread, the loopback interface, and this repository's package."""
    paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}


def launch(cells: Sequence[Cell], directory: Path, timeout: float) -> str:
    """Runs one pair of workers, for at most ``timeout`` seconds; returns what they printed."""
    (directory / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    environment = worker_environment()
    port = free_port()
    logs = [directory / f"log{rank}.txt" for rank in range(WORLD)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                command = [sys.executable, __file__, str(rank), str(port), str(directory)]
                workers.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=TESTS.parent)
                )
        end = time.monotonic() + timeout
        while time.monotonic() < end and any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                end = min(end, time.monotonic() + 10)  # one failed: its peer has little time to notice
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return "\n".join(f"--- rank {rank}\n{log.read_text(errors='replace')}" for rank, log in enumerate(logs))


def run_cells(
    cells: Sequence[Any], directory: Path, budget: float, start: Any = None, world: int = WORLD
) -> dict[Any, list[dict[str, Any]] | str]:
    """Trains the cells; a cell's result is one record a rank, or what went wrong.

    ``start(cells, directory, timeout)`` runs the workers and returns what they printed; default: :func:`launch`.

    A set of workers that ends early has left at least one cell without a full result: that one has failed, and the next
    set starts behind it. A cell in which no rank reports an error of its own, but ranks lost a peer, gets one more set
    of processes, and what the first one printed becomes a warning.
    """
    start = start or launch
    results: dict[Any, list[dict[str, Any]] | str] = {}
    pending = list(cells)
    lost: set[Any] = set()
    end = time.monotonic() + budget
    while pending and time.monotonic() < end:
        log = start(pending, directory, end - time.monotonic())
        while pending:
            cell = pending[0]
            paths = [result_path(directory, cell, rank) for rank in range(world)]
            ranks = [torch.load(path, weights_only=False) for path in paths if path.exists()]
            errors = [str(result["error"]) for result in ranks if result["error"]]
            if len(ranks) == world and not errors:
                results[cell] = ranks
                pending.pop(0)
                continue
            if all("gloo" in error for error in errors):
                said = f"{cell.name}: {len(ranks)} of {world} ranks have a result; the workers said:\n{log[-6000:]}"
                if cell not in lost:
                    lost.add(cell)
                    warnings.warn(said, stacklevel=2)
                    for path in paths:
                        path.unlink(missing_ok=True)
                    break
                errors.insert(0, said)
            results[cell] = "\n".join(sorted(errors, key=lambda error: "gloo" in error))  # the cause first
            pending.pop(0)
            break
    return results


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
