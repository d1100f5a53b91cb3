"""The benchmark of step time: that it measures what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import step_cost, step_time
from benchmarks.report import markers
from benchmarks.step_models import Size

TINY = Size("calls", 16, 2, 2, 8, layers=1, vocab=16)


def cell(ratio: float, form: step_cost.Form = "values", rounds: int = 30) -> step_cost.Cell:
    """Lifted ÷ the others is ``ratio``, give or take 2%."""
    noise = [1 + 0.02 * ((i * 7) % 11 - 5) / 5 for i in range(rounds)]
    times = {"lifted": ratio, "by hand": 1.0, "unlifted": 1.0}
    samples = {
        name: {clock: [value * (n if name == "lifted" else 1.0) for n in noise] for clock in step_cost.CLOCKS}
        for name, value in times.items()
    }
    return step_cost.Cell("calls", form, samples, (64, 128), 4096)


def test_interval() -> None:
    middle, low, high = step_cost.interval([1.0] * 40)
    assert (middle, low, high) == (1.0, 1.0, 1.0)
    middle, low, high = cell(1.1).ratio("by hand")
    assert 1.08 < low <= middle <= high < 1.12


def test_bar() -> None:
    assert step_time.missed([cell(0.99), cell(1.0, "positions")]) == []
    assert step_time.missed([cell(1.1)]) == ["calls, values: lifted ÷ by hand", "calls, values: lifted ÷ unlifted"]
    assert "- slower: calls, values" in step_time.block([cell(1.1)], "it")


@pytest.mark.parametrize("form", step_cost.FORMS)
def test_measurement(form: step_cost.Form) -> None:
    """All variants compute the same bits; inputs are counted by their storage."""
    found = step_cost.measure(TINY, form, 2, 1)
    assert {name: len(own["CPU"]) for name, own in found.samples.items()} == dict.fromkeys(found.samples, 2)
    assert set(found.samples) == {"lifted", *step_cost.OTHERS}
    row = 8 if form == "positions" else TINY.head_dim // 2 * 8
    assert found.inputs == (TINY.seq * row, TINY.batch * TINY.seq * row)
    assert found.peak > found.inputs[1]


def test_other_computations_are_refused() -> None:
    steps = {"by hand": lambda: [torch.zeros(2)], "lifted": lambda: [torch.full((2,), 1e-9)]}
    with pytest.raises(step_cost.StepError, match="lifted computes something else"):
        step_cost.check(steps)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = markers(step_time.TOPIC)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\n{end}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(step_time, "PAGE", page)
    for ratio, code in ((0.98, 0), (1.1, 1)):
        monkeypatch.setattr(step_time, "run", lambda names, rounds, ratio=ratio: [cell(ratio)])
        assert step_time.main(["--quick", "--docs"]) == code
        text = page.read_text(encoding="utf-8")
        assert "`python benchmarks/step_time.py --quick --docs` wrote" in text and text.endswith(f"\n{end}\nafter\n")
    page.write_text("no place", encoding="utf-8")
    assert step_time.main(["--docs"]) == 2
