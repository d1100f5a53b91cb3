"""Parity on a pp x cp mesh of four gloo processes: loss and every gradient of a single process on the unpermuted batch.

``cp_worker.py`` trains the cells, each lifted and with the lift disabled, ``parity_models.py`` has the models and the
single process, ``parity_expected.txt`` what must be wrong without lifting, and by how much at least.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cp_worker
import pytest
import torch
from cp_worker import DTYPES, LAYOUTS, ORDERS, SCHEDULES, WORLD, Cell, slots_of
from parity_cells import ALONE, EVERY, EXCHANGED, RING, TABLE, TOLERANCE, Judgement, covering, judge, least, wrong
from parity_models import BATCH, DOCUMENTS, MODELS, SEQ, reference
from pipeline_worker import run_cells

pytestmark = pytest.mark.multiprocess

#: Seconds for all ranks together; the cells that are left then have no result, and fail.
BUDGET = 420.0
BUDGET_OF_ALL = 3000.0

QUICK = (*covering(), *EXCHANGED, *RING)
SLOW = tuple(cell for cell in EVERY if cell not in QUICK)
Results = dict[Cell, list[dict[str, Any]] | str]


def cells(*these: Cell) -> Any:
    """One test for each cell, named after it."""
    return pytest.mark.parametrize("cell", these, ids=[cell.name for cell in these])


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the cells that the selected tests name, all from one set of four processes."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = {spec.params["cell"] for spec in params if spec is not None and "cell" in spec.params}
    budget = BUDGET if wanted <= set(QUICK) else BUDGET_OF_ALL
    ordered = [cell for cell in (*QUICK, *SLOW) if cell in wanted]
    return run_cells(ordered, tmp_path_factory.mktemp("parity"), budget, cp_worker.launch, WORLD)


def judged(cell: Cell, results: Results) -> Judgement:
    """What a cell gave. A cell without a result is a failure of its test."""
    result = results.get(cell, "no result within the time limit")
    if isinstance(result, str):
        pytest.fail(result, pytrace=False)
    return judge(cell, result)


@pytest.mark.timeout(BUDGET + 60)
@cells(*QUICK)
def test_parity(cell: Cell, results: Results) -> None:
    """Lifted, a cell has the single process's loss and gradients; with the lift disabled, what the table says."""
    assert not wrong(cell, judged(cell, results))


@pytest.mark.slow
@pytest.mark.timeout(BUDGET_OF_ALL + 60)
@cells(*SLOW)
def test_parity_of_all_cells(cell: Cell, results: Results) -> None:
    """The cells that the quick ones stand for."""
    assert not wrong(cell, judged(cell, results))


def test_the_quick_cells_cover_all_pairs() -> None:
    """Each model meets each order, layout, schedule and dtype; orders, layouts, schedules and dtypes each other."""
    assert set(covering()) <= set(EVERY) and len(set(EVERY)) == len(EVERY)
    assert len(EVERY) == len(ALONE) + len(MODELS) * len(DTYPES) * len(LAYOUTS) * len(SCHEDULES) * len(ORDERS)
    meshed = [cell for cell in covering() if cell.cp > 1]
    aspects: dict[str, Any] = {
        "model": tuple(MODELS),
        "order": ORDERS,
        "schedule": SCHEDULES,
        "layout": LAYOUTS,
        "dtype": DTYPES,
    }
    have = [{**vars(cell), "layout": (cell.pp, cell.cp)} for cell in meshed]
    for one, other in itertools.combinations(aspects, 2):
        found = {(cell[one], cell[other]) for cell in have}
        missing = set(itertools.product(aspects[one], aspects[other])) - found
        assert not missing, f"{one} x {other}: {sorted(missing)}"


def test_the_table_says_that_every_cell_with_context_parallelism_is_wrong() -> None:
    """Only one rank with whole sequences in natural order may do without lifting."""
    for cell in EVERY:
        bound = least(cell)
        assert (bound is None) == (cell.cp == 1), cell.name
        assert bound is None or bound >= 100 * TOLERANCE["float32"]
    lines = [line.partition("#")[0].split() for line in TABLE.read_text().splitlines()]
    assert all(len(line) == 4 for line in lines if line)


def test_the_readme_has_both_tables_and_no_failure() -> None:
    """``python tools/parity.py --check`` compares them with a run."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme.partition("<!-- parity:begin -->")[2].partition("<!-- parity:end -->")[0]
    assert all(block.count(f"\n| {model.what} | ") == 2 for model in MODELS.values())
    assert f"{len(EVERY)} of {len(EVERY)} cells gave what they have to" in block and "FAIL" not in block
    assert f"| model | {' | '.join(ORDERS)} |" in block


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_orders_are_what_their_names_say(order: str, cp: int) -> None:
    """All ranks together hold every token once; orders of samples differ where they should."""
    slots = torch.cat([slots_of(order, cp, rank) for rank in range(cp)], 1)
    assert torch.equal(slots.sort(1).values, torch.arange(SEQ).expand(BATCH, SEQ))
    distinct = len({tuple(row) for row in slots.tolist()})
    per_sample = {"contiguous": 1, "head-tail": 1, "random": BATCH}
    assert distinct == per_sample.get(order, len({tuple(sample) for sample in DOCUMENTS}) if cp > 1 else distinct)


def _result(error: float, disabled: float, parts: tuple[float, ...], cell: Cell) -> list[dict[str, Any]]:
    expected = reference(cell.model, cell.dtype)
    errors = dict.fromkeys(expected.gradients, 1e-9)
    name = next(iter(errors))
    return [
        {
            "lifted": {"loss": expected.loss, "part": 1.0, "errors": {**errors, name: error}},
            "disabled": {"loss": expected.loss, "part": 1.0 + parts[rank], "errors": {**errors, name: disabled}},
        }
        for rank in range(WORLD)
    ]


def test_the_judge_tells_wrong_from_right() -> None:
    """A control: what is off, not a number, missing, or right where the table says wrong, is named."""
    cell = Cell("llama_pr1797", pp=1, cp=4, order="contiguous")
    moved = (0.0, 0.1, 0.1, 0.1)
    assert not wrong(cell, judge(cell, _result(1e-6, 0.3, moved, cell)))
    for error, disabled, parts, words in (
        (2e-5, 0.3, moved, "lifted, the gradient"),
        (float("nan"), 0.3, moved, "lifted, the gradient"),
        (1e-6, 0.01, moved, "not lifted, the worst gradient"),
        (1e-6, float("nan"), moved, "not lifted, the worst gradient"),
        (1e-6, 0.3, (0.1,) * 4, "not lifted, the loss of rank 0"),
        (1e-6, 0.3, (0.0, 0.0, 0.1, 0.1), "not lifted, the loss of a rank behind"),
    ):
        lines = wrong(cell, judge(cell, _result(error, disabled, parts, cell)))
        assert len(lines) == 1 and lines[0].startswith(words), lines
    broken = _result(1e-6, 0.3, moved, cell)
    for rank in broken:
        rank["lifted"]["errors"].popitem()
    with pytest.raises(AssertionError, match="no gradient on any rank"):
        judge(cell, broken)
    double = Cell("llama_pr1797", pp=1, cp=4, order="contiguous", dtype="float64")
    assert wrong(double, judge(double, _result(1e-6, 0.3, moved, double)))


@pytest.mark.slow
@pytest.mark.timeout(BUDGET + 60)
def test_a_cell_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    """The harness itself: a rank that ends inside a cell takes its peers along, and a new set of ranks goes on."""
    broken, good = Cell("llama_pr1797", "ScheduleNothing"), Cell("llama_pr1797")
    results = run_cells([broken, good], tmp_path, BUDGET, cp_worker.launch, WORLD)
    assert "has no attribute 'ScheduleNothing'" in str(results[broken])
    assert not wrong(good, judged(good, results))
