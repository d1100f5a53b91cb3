"""Stages with the rest of a training stack, on four processes: loss and gradients of one process, or the run fails.

``compose_worker.py`` has the cells and runs them, all that the selected tests ask for in one set of processes.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import compose_worker
import pytest
import torch
from compose_worker import (
    ADAM,
    BATCH,
    IGNORED,
    MAX_NORM,
    MICROBATCHES,
    SAVED,
    STEPS,
    WORLD,
    Cell,
    build,
    cross_entropy_sum,
    data,
)
from pipeline_worker import canonical_names, run_cells
from test_schedules import worst
from torch import Tensor

pytestmark = pytest.mark.multiprocess

#: Seconds for all processes together; the cells that are left then have no result, and fail.
BUDGET = 240.0
TOLERANCE = 1e-5

LLAMA = "hf_llama_tied"
GRADIENTS = (
    Cell(LLAMA, checkpointed=True),
    Cell("llama_pr1797", kind="cp"),
)
MORE_GRADIENTS = (
    Cell(LLAMA),
    Cell(LLAMA, checkpointed=True, runner=True),
    Cell("llama_pr1797", kind="cp", checkpointed=True),
    Cell(LLAMA, packaged=True),
    Cell(LLAMA, schedule="ScheduleZBVZeroBubble", stages=4, fsdp="stage"),
    Cell(LLAMA, fsdp="none"),
    Cell(LLAMA, fsdp="stage", runner=True),
    Cell(LLAMA, kind="cp"),
    Cell(LLAMA, schedule="ScheduleInterleaved1F1B", stages=4, checkpointed=True),
    Cell(LLAMA, schedule="ScheduleZBVZeroBubble", stages=4, fsdp="none"),
    Cell("llama_pr1797"),
    Cell("llama_pr1797", kind="cp", checkpointed=True, runner=True),
    Cell("nanogpt_tied"),
)
TITAN = (
    Cell("titan_llama3", checkpointed=True),
    Cell("titan_llama3", kind="cp"),
    Cell("titan_llama3", schedule="ScheduleInterleaved1F1B"),
)
UNLIFTED = (Cell(LLAMA, feed="unlifted"),)
APART = Cell(LLAMA, tied="apart")
BFLOAT16 = Cell("llama_pr1797", precision="bfloat16")
SAVE = Cell(LLAMA, steps=STEPS, save="two_stages")
RESUME = (Cell(LLAMA, steps=STEPS, resume="two_stages", pp=4, other=1, fsdp="none"),)
MORE_RESUME = (
    Cell(LLAMA, steps=STEPS, resume="two_stages", pp=1, other=4),
    Cell(LLAMA, steps=STEPS, resume="two_stages", schedule="ScheduleZBVZeroBubble", stages=4, fsdp="stage"),
    Cell(LLAMA, steps=STEPS, resume="two_stages", schedule="ScheduleInterleaved1F1B", stages=4, checkpointed=True),
    Cell(LLAMA, steps=STEPS, resume="two_stages", kind="cp", fsdp="stage"),
)
FORGETFUL = Cell(LLAMA, steps=STEPS, resume="two_stages", pp=4, other=1, fsdp="none", optimizer_state=False)

Run = list[dict[str, Any]]
Results = dict[Cell, Run | str]


def cells(*quick: Cell, slow: tuple[Cell, ...] = ()) -> Any:
    """One test for each cell, named after it."""
    marked = [pytest.param(cell, marks=pytest.mark.slow) for cell in slow]
    return pytest.mark.parametrize("cell", [*quick, *marked], ids=[cell.name for cell in (*quick, *slow)])


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the cells that the selected tests name, those that write a checkpoint first."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = [spec.params["cell"] for spec in params if spec is not None and "cell" in spec.params]
    if any(cell.resume for cell in wanted):
        wanted.append(SAVE)
    ordered = sorted(dict.fromkeys(wanted), key=lambda cell: (bool(cell.resume), cell.name))
    return run_cells(ordered, tmp_path_factory.mktemp("compose"), BUDGET, compose_worker.launch, WORLD)


def run_of(cell: Cell, results: Results) -> Run:
    """What the ranks recorded of the cell. No fixture: a cell without a result is a failure of its tests."""
    result = results.get(cell, f"no result within {BUDGET} seconds")
    if isinstance(result, str):
        pytest.fail(result, pytrace=False)
    return result


# The single process -------------------------------------------------------------------------------------


def loss_of(module: torch.nn.Module, step: int) -> Tensor:
    """The mean over the valid tokens of the whole batch, in natural order."""
    tokens, labels, _ = data(step)
    return cross_entropy_sum(module(tokens), labels) / (labels != IGNORED).sum()


@cache
def reference(model: str) -> tuple[float, dict[str, Tensor], float]:
    """Loss, gradients and their norm in the first step of the eager model."""
    module = copy.deepcopy(build(model))
    loss = loss_of(module, 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
    return float(loss.detach()), gradients, float(norm)


@cache
def trained(model: str) -> tuple[list[float], list[float]]:
    """Losses and norms of the eager model, trained without a break."""
    module = copy.deepcopy(build(model))
    optimizer = torch.optim.AdamW(module.parameters(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        loss = loss_of(module, step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def check_gradients(model: str, run: Run, what: str = "gradients", scale: float = 1.0) -> float:
    """The worst error of a gradient on any rank, of those that ``what`` names, which cover the model."""
    names, (_, expected, _) = canonical_names(build(model)), reference(model)
    found: set[str] = set()
    errors = []
    for rank in run:
        for gradients in rank[what].values():
            actual = {names[fqn]: gradient for fqn, gradient in gradients.items()}
            found |= set(actual)
            errors.append(worst(actual, {name: expected[name] * scale for name in actual})[0])
    assert found == set(expected)
    return max(errors)


def losses_of(run: Run) -> list[Any]:
    """What the ranks of the last stage said: the same."""
    return [rank["loss"] for rank in run if rank["loss"] is not None]


# The tests ----------------------------------------------------------------------------------------------


@cells(*GRADIENTS, slow=MORE_GRADIENTS)
def test_loss_gradients_and_clipping_are_those_of_one_process(cell: Cell, results: Results) -> None:
    """Every gradient of every copy; the norm of the whole model, a tied weight counted once; gradients cut to it."""
    run = run_of(cell, results)
    loss, _, norm = reference(cell.model)
    assert losses_of(run) == pytest.approx([loss] * cell.other, rel=TOLERANCE)
    assert check_gradients(cell.model, run) < TOLERANCE
    assert [rank["norm"] for rank in run] == pytest.approx([norm] * WORLD, rel=TOLERANCE)
    assert norm > 2 * MAX_NORM
    assert check_gradients(cell.model, run, "clipped", MAX_NORM / (norm + 1e-6)) < TOLERANCE
    if cell.fsdp == "layers":
        assert len({fqn for rank in run for fqn in rank["layers"]}) == compose_worker.LAYERS
    assert bool(run[0]["tied"]) == ("tied" in cell.model)


@pytest.mark.slow
@cells(*TITAN)
def test_torchtitan_trains_the_stages_of_its_model(cell: Cell, results: Results) -> None:
    """The example's schedule and model parts under torchtitan's meshes and its clipping."""
    run = run_of(cell, results)
    loss, _, norm = reference(cell.model)
    assert [rank["loss"] for rank in run] == pytest.approx([loss] * WORLD, rel=TOLERANCE)
    assert check_gradients(cell.model, run) < TOLERANCE
    assert [rank["norm"] for rank in run] == pytest.approx([norm] * WORLD, rel=TOLERANCE)


@cells(*UNLIFTED, slow=(Cell("llama_pr1797", feed="unlifted"),))
def test_without_the_lift_the_gradients_are_others(cell: Cell, results: Results) -> None:
    """The control: the feed in natural order, tokens in another."""
    assert check_gradients(cell.model, run_of(cell, results)) > 0.1


@cells(APART)
def test_copies_that_are_not_added_up_are_wrong(cell: Cell, results: Results) -> None:
    """The control of ``reduce_tied``: the two copies alone are off, all else is right."""
    run = run_of(cell, results)
    names, (_, expected, _) = canonical_names(build(cell.model)), reference(cell.model)
    for rank in run:
        for gradients in rank["gradients"].values():
            for fqn, gradient in gradients.items():
                error = worst({"it": gradient}, {"it": expected[names[fqn]]})[0]
                assert error > 0.1 if fqn in rank["tied"] else error < 1e-3, (fqn, error)


@pytest.mark.slow
@cells(BFLOAT16)
def test_mixed_precision_is_that_of_the_model_in_bfloat16(cell: Cell, results: Results) -> None:
    """Parameters, gradients and their sums in float32, computation in bfloat16: as one process does it by parts."""
    run = run_of(cell, results)
    low = copy.deepcopy(build(cell.model)).bfloat16()
    low.freqs_cis = build(cell.model).freqs_cis
    tokens, labels, _ = data(0)
    sums: dict[str, Tensor] = {}
    loss = 0.0
    for start in range(0, BATCH, BATCH // (cell.other * MICROBATCHES)):
        rows = slice(start, start + BATCH // (cell.other * MICROBATCHES))
        value = cross_entropy_sum(low(tokens[rows]), labels[rows]) / (labels != IGNORED).sum()
        low.zero_grad()
        value.backward()
        loss += float(value.detach())
        for name, parameter in low.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.float()
    assert losses_of(run) == pytest.approx([loss] * cell.other, rel=1e-3)
    for rank in run:
        for gradients in rank["gradients"].values():
            assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
            assert worst(gradients, {name: sums[name] for name in gradients})[0] < 0.05
    assert 1e-4 < check_gradients(cell.model, run) < 0.1  # it is not what float32 gives


@cells(SAVE, *RESUME, slow=MORE_RESUME)
def test_a_checkpoint_goes_on_with_another_number_of_stages(cell: Cell, results: Results) -> None:
    """Losses and norms of a run that never stopped: of one process, and of the one that wrote the checkpoint."""
    losses, norms = trained(cell.model)
    run, saved = run_of(cell, results), run_of(SAVE, results)
    first = SAVED if cell.resume else 0
    before = next(rank["losses"] for rank in saved if rank["losses"][0] is not None)
    found = [rank["losses"] for rank in run if rank["losses"][first] is not None]
    assert len(found) == cell.other
    for rank in found:
        assert [rank[step] for step in range(first, STEPS)] == pytest.approx(losses[first:], rel=TOLERANCE)
        assert [rank[step] for step in range(first, STEPS)] == pytest.approx(
            [before[step] for step in range(first, STEPS)], rel=1e-6
        )
    for rank in run:
        assert [rank["norms"][step] for step in range(first, STEPS)] == pytest.approx(norms[first:], rel=1e-4)


@pytest.mark.slow
@cells(FORGETFUL)
def test_without_the_optimizers_state_the_losses_are_others(cell: Cell, results: Results) -> None:
    """The control: what a resumed run must not be like. The first loss comes before any update."""
    losses, _ = trained(cell.model)
    found = next(rank["losses"] for rank in run_of(cell, results) if rank["losses"][SAVED] is not None)
    assert found[SAVED] == pytest.approx(losses[SAVED], rel=TOLERANCE)
    assert abs(found[SAVED + 1] - losses[SAVED + 1]) > 1e-4 * losses[SAVED + 1]
