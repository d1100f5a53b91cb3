"""The benchmark itself: two layers are enough to see that it measures, compares and writes what it says."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks import run as bench
from benchmarks.measure import Measurement, export_clock, gc_clock, growth, measure

OURS = {"scan", "lift", "partition", "total", "total_without_gc"}
BESIDE = {"pipeline", "pipeline_outside_export"}


@pytest.fixture(scope="module")
def static() -> Measurement:
    return measure(2, 2, repeats=2, others=1)


@pytest.fixture(scope="module")
def dynamic() -> Measurement:
    return measure(2, 2, dynamic=True, repeats=2, others=1, beside=False)


@pytest.fixture(scope="module")
def results(static: Measurement, dynamic: Measurement) -> dict[str, Any]:
    return report.record([static], [dynamic], 2, "python benchmarks/run.py")


def _synthetic(layers: int, seconds: float, outside: float | None = 1.0) -> Measurement:
    measured = {name: [seconds / 3] * 3 for name in ("scan", "lift", "partition")}
    measured["export"] = [2.0]
    if outside is not None:
        measured |= {"pipeline": [2.0 + outside], "pipeline_outside_export": [outside]}
    failure = "RuntimeError: no | stages" if outside is None else None
    collecting = {name: [0.0] * 3 for name in ("scan", "lift", "partition")}
    return Measurement(layers, 10 * layers, measured, collecting, failure)


def test_measures_ours_and_pipeline_on_one_model(static: Measurement) -> None:
    assert static.pipeline_failure is None
    assert {name: len(values) for name, values in static.samples.items()} == {
        "export": 1,
        "scan": 2,
        "lift": 2,
        "partition": 2,
        "pipeline": 1,
        "pipeline_outside_export": 1,
    }
    assert all(value > 0 for values in static.samples.values() for value in values)
    assert static.samples["pipeline_outside_export"][0] < static.samples["pipeline"][0]
    assert static.nodes > 100


def test_garbage_collection_is_told_apart() -> None:
    with gc_clock() as runs:
        gc.collect()
    assert len(runs) == 1 and runs[0] > 0
    gc.collect()
    assert len(runs) == 1
    measured = _synthetic(4, 0.9)
    measured.collecting["lift"] = [0.1, 0.2, 0.3]
    assert measured.seconds()["total"] == pytest.approx(0.9)
    assert measured.seconds()["total_without_gc"] == pytest.approx(0.7)


def test_dynamic_shapes_are_measured_without_pipeline(dynamic: Measurement) -> None:
    assert dynamic.pipeline_failure is None
    assert not BESIDE & set(dynamic.samples)
    assert set(dynamic.ratios()) == {"export"}


def test_json_schema(results: dict[str, Any]) -> None:
    results = json.loads(json.dumps(results))
    assert set(results) == {
        *("schema", "command", "environment", "clock", "stages", "static", "dynamic", "growth", "bars")
    }
    assert results["schema"] == report.SCHEMA
    assert set(results["environment"]) == {"torch", "python", "buffer_lifting", "cores", "threads"}
    for kind, beside in (("static", BESIDE), ("dynamic", set())):
        (entry,) = results[kind]
        assert set(entry) == {
            "layers",
            "nodes",
            "seconds",
            "ratios",
            "samples",
            "collecting",
            "pipeline_failure",
        }
        assert set(entry["seconds"]) == {"export", *OURS, *beside}
        assert set(results["growth"][kind]) == OURS
    assert [set(bar) for bar in results["bars"]] == [{"name", "value", "limit", "passed"}] * 3
    assert [bar["passed"] is None for bar in results["bars"]] == [False, True, True]  # one size has no growth


def test_time_inside_export_is_found_and_the_patch_undone() -> None:
    original = torch.export.export
    with pytest.raises(ZeroDivisionError), export_clock() as calls:
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
        assert len(calls) == 1 and calls[0] > 0
        raise ZeroDivisionError
    assert torch.export.export is original


def test_a_failure_of_pipeline_is_told_and_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Backward of skip connections\nand a traceback")

    monkeypatch.setattr("benchmarks.measure.pipeline", fails)
    failed = measure(2, 2, repeats=1, others=1)
    assert failed.pipeline_failure == "RuntimeError: Backward of skip connections"
    assert set(failed.ratios()) == {"export"}
    results = report.record([failed], [], 2, "")
    (row,) = report.rows(results, "static")
    assert row["pipeline(), s"] == "fails: RuntimeError: Backward of skip connections"
    assert row["ours ÷ pipeline() outside export"] == ""
    assert results["bars"][0]["value"] is None and results["bars"][0]["passed"] is None


def test_bars_and_growth() -> None:
    linear = [_synthetic(layers, 0.01 * layers) for layers in (4, 16, 32)]
    assert growth(linear, 16) == pytest.approx(1)
    square = [_synthetic(layers, 0.001 * layers**2) for layers in (4, 16, 32)]
    assert growth(square, 16) == pytest.approx(2)
    assert growth(linear[:2], 16) is None
    assert report.missed(report.record(linear, linear, 4, "")) == []
    assert report.missed(report.record(square, linear, 4, "")) == [
        "ours ÷ pipeline() outside export, 32 layers",
        "growth exponent of ours over nodes, static shapes",
    ]


def test_readme_block_is_replaced_and_nothing_else(results: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n", encoding="utf-8")
    report.write_readme(readme, results)
    first = readme.read_text(encoding="utf-8")
    assert first.startswith(f"# Title\n\n{report.BEGIN}\n") and first.endswith(f"\n{report.END}\n\nafter\n")
    assert "old" not in first
    assert "`python benchmarks/run.py`" in first and results["environment"]["torch"] in first
    assert f"| 2 | {results['static'][0]['nodes']} | **" in first
    report.write_readme(readme, results)
    assert readme.read_text(encoding="utf-8") == first


def test_readme_table_survives_a_failure_text() -> None:
    failed = _synthetic(4, 0.1, outside=None)
    table = report.markdown(report.rows(report.record([failed], [failed], 4, ""), "static"))
    widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
    assert len(widths) == 1


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no markers",
        report.BEGIN,
        f"{report.END}\n{report.BEGIN}",
        f"{report.BEGIN}\n{report.BEGIN}\n{report.END}",
    ],
)
def test_readme_without_a_place_is_an_error_before_any_measurement(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content, encoding="utf-8")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "run", lambda *args, **kwargs: pytest.fail("measured"))
    assert bench.main(["--readme", "--json", str(tmp_path / "results.json")]) == 2
    assert "README.md" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "code"), [(0.1, 0), (0.9, 1)])
def test_command_prints_writes_json_and_exits_by_the_bars(
    seconds: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = _synthetic(4, seconds)

    def measured(layers: tuple[int, ...], command: str) -> dict[str, Any]:
        assert layers == bench.QUICK
        return report.record([one], [one], bench.STAGES, command)

    monkeypatch.setattr(bench, "run", measured)
    path = tmp_path / "results.json"
    assert bench.main(["--quick", "--json", str(path)]) == code
    out = capsys.readouterr().out
    assert ("FAIL: " in out) == (code == 1)
    assert "ours ÷ pipeline() outside export" in out
    assert json.loads(path.read_text(encoding="utf-8"))["static"][0]["layers"] == 4
