"""The ranks of a pp x cp mesh on gloo, and the parity cells that they train.

A *cell* is a model under a schedule on a mesh, with its tokens in an order; ``test_parity.py`` judges the results and
``tools/parity.py`` makes tables of them. Importing and exporting take longer than training, so that one process makes
the stages of all cells and then forks the ranks, which share them.

A cell trains one step twice: lifted, and with the lift disabled (:func:`unlifted_feed`). The cells of ``OTHERS`` do
something else on the same mesh, for ``test_cp_ranks.py``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from parity_models import (  # noqa: E402
    BATCH,
    DOCUMENTS,
    IGNORED,
    MICROBATCHES,
    MODELS,
    PROBED,
    SEQ,
    WIDER,
    canonical_names,
    cross_entropy_sum,
    export,
    reference,
    step_data,
)
from pipeline_worker import (  # noqa: E402
    SINGLE,
    add_up_tied,
    free_port,
    make_schedule,
    process_group,
    step_arguments,
    work_through,
    worker_environment,
)

WORLD = 4
#: Cells that train nothing, by what stands in place of the schedule: see ``cp_probes``.
OTHERS = ("probe", "failures", "one wrong feed", "lengths")
ORDERS = ("contiguous", "head-tail", "per-document", "random")
SCHEDULES = ("Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble")
LAYOUTS = ((2, 2), (1, 4))
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Cell:
    """A model under a schedule on a mesh.

    Attributes:
        model: name in ``parity_models.MODELS``; ``schedule``: class in ``torch.distributed.pipelining``.
        pp, cp: the mesh; ``order``: one of ``ORDERS``; ``dtype``: one of ``DTYPES``; ``strategy``: of
            ``context_parallel``.
    """

    model: str
    schedule: str = "Schedule1F1B"
    pp: int = 2
    cp: int = 2
    order: str = "head-tail"
    dtype: str = "float32"
    strategy: str = "auto"

    @property
    def name(self) -> str:
        """Names the test, and the files of results."""
        schedule = self.schedule.removeprefix("Schedule").replace(" ", "_")
        name = f"{self.model}-{schedule}-{self.pp}x{self.cp}-{self.order}-{self.dtype}"
        return name if self.strategy == "auto" else f"{name}-{self.strategy}"

    @property
    def num_stages(self) -> int:
        """One a rank, or two under the schedules with several."""
        return self.pp if self.schedule in (*SINGLE, *OTHERS) else 2 * self.pp


def order_of(order: str, cp: int) -> Any:
    """What ``feed`` takes as the order: ``None``, one of torch's load balancers, or ``(B, S)`` indices."""
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
        _HeadTailLoadBalancer,
        _PerDocumentHeadTailLoadBalancer,
    )

    if order == "contiguous":
        return None
    if order == "head-tail":
        return _HeadTailLoadBalancer(SEQ, cp, "cpu")
    if order == "per-document":
        return _PerDocumentHeadTailLoadBalancer([list(sample) for sample in DOCUMENTS], cp, "cpu")
    generator = torch.Generator().manual_seed(300)
    return torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])


def slots_of(order: str, cp: int, rank: int) -> Tensor:
    """int64 ``[B, S / cp]``: the tokens that a rank holds, independent of the library."""
    whole = order_of(order, cp)
    if whole is None:
        whole = torch.arange(SEQ)
    elif not isinstance(whole, Tensor):
        whole = whole._generate_indices()
    part = SEQ // cp
    return whole.long().expand(BATCH, SEQ)[:, rank * part : (rank + 1) * part]


# Made once, before the ranks are forked ---------------------------------------------------------------------


@cache
def lifted_program(model: str, flags: bool = False) -> Any:
    """The lifted float32 program; with ``flags``, masks that are plain causal for one document are flags."""
    import buffer_lifting as bl

    program = export({**MODELS, **PROBED}[model])
    return bl.lift(bl.causal_flags(program, documents=False) if flags else program)


@cache
def cp_program(model: str, cp: int, strategy: str = "auto") -> Any:
    """The same for a number of context-parallel ranks."""
    import buffer_lifting as bl

    return bl.context_parallel(lifted_program(model, strategy == "ring"), size=cp, strategy=strategy)


@cache
def staged_program(model: str, cp: int, num_stages: int, dtype: str, strategy: str) -> Any:
    """The stages; for float64, with everything that names a float32 dtype widened: graphs, weights and feed."""
    import buffer_lifting as bl
    from buffer_lifting.oracles.running import double_feed, to_double

    staged = bl.partition(cp_program(model, cp, strategy), num_stages=num_stages)
    if dtype == "float32":
        return staged
    for stage in staged.stages:
        to_double(stage.module.graph)
        stage.module.recompile()
        for fqn, parameter in stage.module.named_parameters():
            path, _, leaf = fqn.rpartition(".")
            setattr(stage.module.get_submodule(path), leaf, torch.nn.Parameter(parameter.detach().double()))
        for fqn, buffer in stage.module.named_buffers():
            if buffer.dtype in WIDER:
                path, _, leaf = fqn.rpartition(".")
                setattr(stage.module.get_submodule(path), leaf, buffer.to(WIDER[buffer.dtype]))
    return replace(staged, lifted=double_feed(staged.lifted))


def prepare(cell: Cell) -> Any:
    """The stages of a cell, without gradients of earlier cells."""
    staged = staged_program(cell.model, cell.cp, cell.num_stages, cell.dtype, cell.strategy)
    if cell.schedule not in OTHERS:
        reference(cell.model, cell.dtype)
        _names(cell.model)
    for stage in staged.stages:
        stage.module.zero_grad()
    return staged


_names = cache(canonical_names)


# The ranks ----------------------------------------------------------------------------------------------


@cache
def mesh_of(pp: int, cp: int) -> Any:
    """The mesh of a layout."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (pp, cp), mesh_dim_names=("pp", "cp"))


def unlifted_feed(lifted: Any, whole: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model that was not lifted would read on its shard, as lifted inputs.

    Rows: of a sequence of the shard's length that starts at 0, computed from the shard's inputs. Keys: natural order.
    """
    rows = frozenset(item.name for item in lifted.inputs if item.role == "row")
    keys = frozenset(item.name for item in lifted.inputs) - rows
    local = lifted._feed(BATCH, SEQ // (lifted.cp_size or 1), own, None, None, (0, 1), None, rows)
    natural = lifted._feed(BATCH, SEQ, whole, None, None, (0, 1), None, keys)
    return {item.name: {**local, **natural}[item.name] for item in lifted.inputs if not is_slots_of_ring(lifted, item)}


def is_slots_of_ring(lifted: Any, item: Any) -> bool:
    """Whether a ring reads its order off a lifted input: it refuses any other."""
    return bool(lifted.ring_axes) and (item.stream, item.role, item.source) == ("slots", "row", "is_causal")


def train(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """One step lifted, and one with the lift disabled, on this rank."""
    import buffer_lifting as bl

    if cell.schedule in OTHERS:
        import cp_probes

        run = (cp_probes.probe, cp_probes.failures, cp_probes.one_wrong_feed, cp_probes.lengths)
        return run[OTHERS.index(cell.schedule)](cell, staged, rank)

    mesh = mesh_of(cell.pp, cell.cp)
    pp_rank, cp_rank = rank // cell.cp, rank % cell.cp
    model = MODELS[cell.model]
    mine = staged.stages_of_rank(pp_rank, cell.schedule, cell.pp)
    stages = [staged.build_stage(index, "cpu", mesh=mesh) for index in mine]
    last = cell.num_stages - 1 in mine
    parameters = list({id(p): p for stage in stages for p in stage.submod.parameters()}.values())
    loss_fn = (
        bl.TokenLoss(mesh["cp"], MICROBATCHES, loss=lambda output, _: _first(output), reduction="mean")
        if model.loss_in_graph
        else bl.TokenLoss(mesh["cp"], MICROBATCHES, loss=cross_entropy_sum)
    )
    whole, whole_target = step_data(model)
    order, shard = order_of(cell.order, cell.cp), (cp_rank, cell.cp)
    own = staged.shard_inputs(order=order, shard=shard, **whole)
    target = whole_target.gather(1, slots_of(cell.order, cell.cp, cp_rank))
    feeds = {
        "lifted": staged.feed(BATCH, SEQ, inputs=whole, order=order, shard=shard, n_microbatches=MICROBATCHES),
    }
    feeds["disabled"] = {**feeds["lifted"], **unlifted_feed(staged.lifted, whole, own)}
    if cell.order == "contiguous" and cp_rank == 0 and not model.shifted:
        assert all(torch.equal(feeds["lifted"][name], value) for name, value in feeds["disabled"].items())
    result: dict[str, Any] = {"valid": int((target != IGNORED).sum()), "tied": sorted(staged.tied)}
    schedule = None
    for way, feed in feeds.items():
        args, kwargs = step_arguments(staged, cell.schedule, mine, {**own, **feed})
        if schedule is None:
            schedule = make_schedule(cell.schedule, stages, MICROBATCHES, loss_fn, staged.kwargs_chunk_spec(kwargs))
        for parameter in parameters:
            parameter.grad = None
        losses: list[Tensor] = []
        if last:
            loss_fn.begin(target)
        schedule.step(
            *args,
            target=target if last else None,
            losses=losses if last else None,
            return_outputs=False,
            **kwargs,
        )
        loss_fn.reduce_gradients(parameters)
        add_up_tied(staged, stages, _names(cell.model), mesh["pp"].get_group())
        result[way] = {
            "loss": float(loss_fn.total(losses)) if last else None,
            "part": float(torch.stack(losses).detach().sum()) / MICROBATCHES if last else None,
            "errors": gradient_errors(cell, stages),
        }
    return result


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def gradient_errors(cell: Cell, stages: Sequence[Any]) -> dict[str, float]:
    """The error of every parameter of this rank's stages, by the eager model's name."""
    expected, names = reference(cell.model, cell.dtype), _names(cell.model)
    found = {}
    for stage in stages:
        for fqn, parameter in stage.submod.named_parameters():
            assert parameter.grad is not None, f"{fqn} has no gradient"
            assert parameter.grad.dtype == getattr(torch, cell.dtype)
            error = expected.error(names[fqn], parameter.grad)
            found[names[fqn]] = max(error, found.get(names[fqn], error))
    return found


def serve(rank: int, port: int, directory: Path, cells: Sequence[Cell]) -> None:
    """Runs the cells on one rank, in a forked process."""
    faulthandler.enable()
    with process_group(rank, WORLD, port):
        work_through(cells, directory, rank, prepare, train)


def main(port: int, directory: Path) -> int:
    """Makes the stages of all cells of ``cells.json``, forks the ranks, and waits for them."""
    torch.set_num_threads(1)
    cells = [Cell(**entry) for entry in json.loads((directory / "cells.json").read_text())]
    for cell in cells:
        began = time.monotonic()
        try:
            prepare(cell)
        except Exception:  # every rank finds it again, and reports the cell as failed
            traceback.print_exc()
        if time.monotonic() - began > 0.1:
            print(f"{cell.name}: prepared in {time.monotonic() - began:.1f} s", flush=True)
    return fork_ranks(directory, lambda rank: serve(rank, port, directory, cells))


def fork_ranks(directory: Path, run: Callable[[int], None]) -> int:
    """Forks the ranks, each of which calls ``run`` with its number, and waits for them; 0 if none failed."""
    children = {}
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            code = 1
            try:
                log = os.open(directory / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                run(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[child] = rank
    failed = False
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status:
            print(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}", flush=True)
        if status and not failed:  # its peers have little time to notice
            failed = True
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(peer, signal.SIGKILL) for peer in children])
            signal.alarm(10)
    return int(failed)


# The parent ---------------------------------------------------------------------------------------------


def launch(cells: Sequence[Any], directory: Path, timeout: float, worker_file: str = __file__) -> str:
    """Runs one set of four ranks, for at most ``timeout`` seconds; returns what they printed."""
    (directory / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    log = directory / "log.txt"
    with log.open("wb") as out:
        worker = subprocess.Popen(
            [sys.executable, worker_file, str(free_port()), str(directory)],
            env=worker_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=TESTS.parent,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    logs = [log, *(directory / f"log{rank}.txt" for rank in range(WORLD))]
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in logs if path.exists())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
