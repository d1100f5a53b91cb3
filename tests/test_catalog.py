"""The catalog of real models: every cell against the table that was written before it ran, and verified.

A cell is (entry, export, shape). Two worker processes run the cells of the selected tests, and each test judges one:
the quick ones always, all of them with ``-m slow``; then ``docs/MODELS.md`` is compared with what the cells gave.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from zoo.catalog import PATTERNS, Expected, cells, entries, expected
from zoo.running import LIMIT, Cell, Pool, Record, differences, run_cell, wrong_tags

ROOT = Path(__file__).parent.parent
#: At least so many architectures of real libraries, and so many models for each pattern class.
ARCHITECTURES, MODELS_PER_PATTERN = 45, 3

CELLS = cells()
QUICK = [cell for cell in CELLS if entries()[cell[0]].quick]
GOOD = Record(
    "a", "b", "static", reads={"BL001": 2}, checks=("values", "identity", "equivariance", "composition"), gradients=3
)


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The records of the cells that the selected tests ask for, made in the order of the tests."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
    with Pool(dict.fromkeys(call.params["cell"] for call in calls if call and "cell" in call.params)) as pool:
        yield pool


# The table ----------------------------------------------------------------------------------------------


def test_every_cell_stands_in_the_table_and_the_other_way_round() -> None:
    table = expected()
    assert sorted(set(CELLS) - set(table)) == [], "cells without an expectation"
    assert sorted(set(table) - set(CELLS)) == [], "expectations without a cell"
    assert len(CELLS) == len(set(CELLS))


def test_a_table_line_says_reads_or_a_refusal() -> None:
    for cell, line in expected().items():
        assert bool(line.reads) != bool(line.refusal), f"{cell} says neither or both"
        assert all(code[:3] == "BL0" and count > 0 for code, count in line.reads.items()), cell
        codes = {line.refusal, *line.consequences} - {""}
        assert all(len(code) == 5 and code[:3] in ("BL1", "BL2") for code in codes), cell
        assert line.refusal not in line.consequences, cell


def test_there_are_enough_real_architectures() -> None:
    real = [entry for entry in entries().values() if not entry.library.endswith(".py")]
    assert len(real) >= ARCHITECTURES


def test_every_pattern_class_occurs_in_enough_models() -> None:
    """The tags are compared with what occurs in the programs by ``test_tags`` and ``test_all_tags``."""
    found = Counter(pattern for entry in entries().values() for pattern in set(entry.patterns))
    few = {pattern: found[pattern] for pattern in PATTERNS if found[pattern] < MODELS_PER_PATTERN}
    assert not few


# What is judged, and how --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, reads={"BL001": 1}),
        replace(GOOD, reads={"BL001": 2, "BL003": 1}),
        replace(GOOD, refusals={"BL105": 1}, findings=("BL105 aten.mul: why",)),
        replace(GOOD, checks=GOOD.checks[:-1]),
        replace(GOOD, gradients=0),
        replace(GOOD, error="VerificationError: values"),
    ],
    ids=["fewer-reads", "more-reads", "refused", "unverified", "no-gradients", "error"],
)
def test_a_record_that_departs_from_the_table_is_noticed(wrong: Record) -> None:
    table = Expected({"BL001": 2})
    assert differences(GOOD, table) == []
    assert differences(wrong, table)


def test_only_the_permitted_refusal_is_accepted() -> None:
    refused = Record("a", "b", "static", refusals={"BL201": 1, "BL105": 2}, findings=("BL105 x", "BL201 y"))
    table = Expected({}, "BL201", frozenset({"BL105"}))
    assert differences(refused, table) == []
    assert differences(refused, Expected({}, "BL201")), "a code that is not written as following from the refusal"
    assert differences(refused, Expected({}, "BL202", frozenset({"BL201", "BL105"}))), "another finding decides"
    assert differences(refused, Expected({}, "BL201", frozenset({"BL105", "BL202"}))), "a consequence is gone"
    assert differences(GOOD, Expected({}, "BL201"))
    assert differences(replace(refused, error="ValueError: no"), table)


def test_what_breaks_is_recorded_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import running

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    cell = QUICK[0]
    monkeypatch.setattr(running.bl, "scan", broken, raising=False)
    record = run_cell(cell)
    assert "Traceback" in record.error
    assert differences(record, expected()[cell]) == ["it fails: ValueError: a defect"]


def test_a_cell_that_takes_too_long_is_a_failure() -> None:
    with Pool(QUICK[:1], workers=1, limit=0.01) as pool:
        assert differences(pool[QUICK[0]], expected()[QUICK[0]]) == ["it fails: it took more than 0 seconds"]


def test_a_wrong_tag_is_noticed() -> None:
    entry = replace(next(iter(entries().values())), patterns=("slice", "hop"))
    records = [replace(GOOD, patterns=("slice",)), replace(GOOD, patterns=("hop", "slice"))]
    assert wrong_tags(entry, records) == []
    assert wrong_tags(entry, records[:1]) == ["hop does not occur in any export"]
    assert wrong_tags(replace(entry, patterns=("slice",)), records) == ["hop occurs and is no tag"]


# The cells ----------------------------------------------------------------------------------------------


def _judge(record: Record, cell: Cell) -> None:
    found = differences(record, expected().get(cell))
    assert not found, "\n".join([*found, *record.findings, record.error]).strip()


def _judge_tags(name: str, records: Pool) -> None:
    """An entry's tags are what its exports have: no class more and none less."""
    entry = entries()[name]
    assert wrong_tags(entry, [records[cell] for cell in CELLS if cell[0] == name]) == []


@pytest.mark.timeout(2 * LIMIT + 60)
@pytest.mark.parametrize("cell", QUICK, ids="-".join)
def test_quick(cell: Cell, records: Pool) -> None:
    _judge(records[cell], cell)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT + 60)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_cell(cell: Cell, records: Pool) -> None:
    _judge(records[cell], cell)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.quick])
def test_tags(name: str, records: Pool) -> None:
    _judge_tags(name, records)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(entries()))
def test_all_tags(name: str, records: Pool) -> None:
    _judge_tags(name, records)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_models_md_is_what_the_cells_gave(records: Pool) -> None:
    tool = _model_docs()
    text = tool.render({cell: records[cell] for cell in CELLS})
    assert tool.comparable(text) == tool.comparable(tool.TARGET.read_text()), "run python tools/model_docs.py"


def _model_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_docs", ROOT / "tools" / "model_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_docs"] = module
    spec.loader.exec_module(module)
    return module
