"""The baseline: known findings do not count, new ones do, stale entries are reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from buffer_lifting.cli import main
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.baseline import read_baseline, target_name
from buffer_lifting.inspection.config import CheckError
from buffer_lifting.inspection.diagnostics import Diagnostic, diagnostic, numbered

Capture = pytest.CaptureFixture[str]
READ = diagnostic("BL001", "read", "", Location("m.py", 3, "t[:n]"), "layers.0", "L", "table", "add", "aten.add.Tensor")
MIX = diagnostic("BL201", "mix", module="layers.0", node="cumsum", op="aten.cumsum.default")
Programs = dict[str, list[Diagnostic]]


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A repository in which ``a.pt2`` has both findings and ``b.pt2`` the first; a name without findings fails."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    made: Programs = {"a.pt2": [READ, MIX], "b.pt2": [READ]}
    for name in (*made, "bad.pt2"):
        Path(name).touch()

    def check_target(target: str, *_: object) -> tuple[Diagnostic, ...]:
        return numbered(made[Path(target).name])

    monkeypatch.setattr("buffer_lifting.inspection.targets.check_target", check_target)
    return made


def check(*args: str) -> int:
    """Runs ``check`` with the baseline."""
    return main(["check", *args, "--baseline", "known.json"])


def known() -> dict[str, list[str]]:
    """Target -> rules in the file."""
    targets = json.loads(Path("known.json").read_text())["targets"]
    return {name: [entry["rule"] for entry in items] for name, items in targets.items()}


def test_update_then_clean(capsys: Capture) -> None:
    assert check("a.pt2", "b.pt2", "--update-baseline") == 0
    assert "wrote known.json: 3 known findings" in capsys.readouterr().err
    assert json.loads(Path("known.json").read_text()) == {
        "version": 1,
        "targets": {
            "a.pt2": [
                {"rule": "BL001", "source": "table", "module": "layers.0", "op": "aten.add.Tensor", "ordinal": 0},
                {"rule": "BL201", "source": "", "module": "layers.0", "op": "aten.cumsum.default", "ordinal": 0},
            ],
            "b.pt2": [
                {"rule": "BL001", "source": "table", "module": "layers.0", "op": "aten.add.Tensor", "ordinal": 0}
            ],
        },
    }
    assert check("a.pt2", "b.pt2") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "0 findings in 2 targets, 3 suppressed" in captured.err


def test_a_new_finding_fails(programs: Programs, capsys: Capture) -> None:
    assert check("a.pt2", "--update-baseline") == 0
    programs["a.pt2"].append(replace(MIX, module="layers.1", message="new one"))
    assert check("a.pt2") == 1
    out = capsys.readouterr().out
    assert out.count(": BL") == 1 and "new one" in out


def test_one_more_of_the_same_fails(programs: Programs) -> None:
    assert check("a.pt2", "--update-baseline") == 0
    programs["a.pt2"].append(MIX)
    assert check("a.pt2") == 1


def test_a_finding_that_is_known_in_another_target_is_new_here(programs: Programs) -> None:
    assert check("a.pt2", "--update-baseline") == 0
    assert check("b.pt2") == 1


def test_lines_and_node_names_do_not_matter(programs: Programs) -> None:
    assert check("a.pt2", "--update-baseline") == 0
    programs["a.pt2"] = [
        replace(item, node="other", message="other", location=Location("n.py", 99)) for item in programs["a.pt2"]
    ]
    assert check("a.pt2") == 0


def test_stale_entries_are_reported_and_do_not_fail(programs: Programs, capsys: Capture) -> None:
    assert check("a.pt2", "b.pt2", "--update-baseline") == 0
    del programs["a.pt2"][1]
    programs["b.pt2"].clear()
    capsys.readouterr()
    assert check("a.pt2") == 0
    err = capsys.readouterr().err
    assert "warning: baseline: stale entry of a.pt2: BL201, in layers.0, aten.cumsum.default\n" in err
    assert "b.pt2" not in err, "it was not checked"
    assert check("a.pt2", "--ignore", "BL2") == 0
    assert "stale" not in capsys.readouterr().err, "its rule was not checked"
    assert check("a.pt2", "b.pt2", "--update-baseline") == 0
    assert known() == {"a.pt2": ["BL001"]}


def test_an_update_keeps_what_it_did_not_check(programs: Programs) -> None:
    assert check("a.pt2", "b.pt2", "--update-baseline") == 0
    programs["a.pt2"].clear()
    assert check("a.pt2", "--select", "BL0", "--update-baseline") == 0
    assert known() == {"a.pt2": ["BL201"], "b.pt2": ["BL001"]}
    del programs["a.pt2"]  # fails from now on
    assert check("a.pt2", "bad.pt2", "--update-baseline") == 2
    assert known() == {"a.pt2": ["BL201"], "b.pt2": ["BL001"]}


def test_what_the_configuration_suppresses_needs_no_entry(capsys: Capture) -> None:
    Path("setup.cfg").write_text("[buffer_lifting]\nbaseline = known.json\nsuppress =\n  BL0 table: fed by hand\n")
    assert main(["check", "a.pt2", "--update-baseline"]) == 0
    assert known() == {"a.pt2": ["BL201"]}
    capsys.readouterr()
    Path("below").mkdir()
    assert main(["check", "a.pt2", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [item["suppressed"] for item in document["findings"]] == [
        {"by": "configuration", "reason": "fed by hand"},
        {"by": "baseline", "reason": "known, in the baseline"},
    ]
    assert document["clean"] is True


def test_the_format_of_the_configuration(capsys: Capture) -> None:
    Path("setup.cfg").write_text("[buffer_lifting]\nformat = sarif\nstatistics = yes\n")
    assert main(["check", "a.pt2"]) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["runs"][0]["results"]) == 2
    assert "1 BL201 " in captured.err
    assert main(["check", "a.pt2", "--format", "github"]) == 1
    assert capsys.readouterr().out.startswith("::error title=BL201::mix")
    Path("setup.cfg").write_text("[buffer_lifting]\nformat = xml\n")
    assert main(["check", "a.pt2"]) == 2


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no json",
        "[]",
        '{"version": 2, "targets": {}}',
        '{"version": 1, "targets": []}',
        '{"version": 1, "targets": {"a.pt2": [{"rule": "BL001"}]}}',
        '{"version": 1, "targets": {"a.pt2": [{"rule": "BL001", "source": "", "module": "", "op": 3, "ordinal": 0}]}}',
        '{"version": 1, "targets": {"a.pt2": [{"rule": "", "source": "", "module": "", "op": "", "ordinal": true}]}}',
    ],
)
def test_a_wrong_baseline_is_an_error(text: str | None, capsys: Capture) -> None:
    if text is not None:
        Path("known.json").write_text(text)
    assert check("a.pt2") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "known.json" in captured.err
    with pytest.raises(CheckError):
        read_baseline(Path("known.json"))


def test_update_needs_a_file_it_can_write(capsys: Capture) -> None:
    assert main(["check", "a.pt2", "--update-baseline"]) == 2
    assert main(["check", "a.pt2", "--baseline", "no/such/known.json", "--update-baseline"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_names_of_targets(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Capture) -> None:
    other = tmp_path_factory.mktemp("other") / "a.pt2"
    other.touch()
    assert target_name(str(tmp_path / "a.pt2"), tmp_path) == target_name("a.pt2", tmp_path) == "a.pt2"
    assert target_name(str(other), tmp_path) == "a.pt2"
    assert target_name("pkg.models:export", tmp_path) == "pkg.models:export"
    assert check(str(other), "a.pt2", "--update-baseline") == 2
    assert "are both a.pt2 in a baseline" in capsys.readouterr().err
    assert not Path("known.json").exists()
