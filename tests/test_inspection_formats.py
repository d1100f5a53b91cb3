"""The output formats: their structure against what is documented, escaping, and what each must carry."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft4Validator

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import Diagnostic, diagnostic, numbered
from buffer_lifting.inspection.github_format import render_github
from buffer_lifting.inspection.json_format import render_json
from buffer_lifting.inspection.places import Places, printable
from buffer_lifting.inspection.results import CheckResult, Failure, Reported, Suppression
from buffer_lifting.inspection.rules import RULES
from buffer_lifting.inspection.sarif_format import render_sarif
from buffer_lifting.inspection.text import render_text

DOCS = Path(__file__).resolve().parents[1] / "docs" / "CHECK.md"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A repository with one file."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my llama.py").write_text("x = table[:n]\n")
    return Places(tmp_path.resolve())


def found(places: Places) -> list[Diagnostic]:
    """A read in the repository, one in a package, one elsewhere, an op, and one about the program."""
    inside = Location(str(places.root / "models" / "my llama.py"), 1, "x = table[:n]", "forward")
    package = Location("/home/me/lib/site-packages/transformers/llama.py", 7, "y = q", "forward")
    elsewhere = Location("/home/me/secret/other.py", 9, "", "forward")
    return list(
        numbered(
            [
                diagnostic("BL001", "a", "h", inside, "layers.0", "m.Layer", "table", "add", "aten.add.Tensor"),
                diagnostic("BL002", "b", "", package, "layers.1", "m.Layer", "wpe", "add_1", "aten.add.Tensor"),
                diagnostic("BL105", "100% of 'x',\nall", "", elsewhere, "", "m.Model", "t", "mul", "aten.mul.Tensor"),
                diagnostic("BL201", "c", module="layers.0", node="cumsum", op="aten.cumsum.default"),
                diagnostic("BL103", "d"),
            ]
        )
    )


def result(places: Places, **more: Any) -> CheckResult:
    """The findings in one target; the second one is suppressed."""
    why = Suppression("configuration", "known")
    reported = [Reported("model.pt2", item, why if item.code == "BL002" else None) for item in found(places)]
    return CheckResult(("model.pt2",), tuple(reported), **more)


FAILED = {"failures": (Failure("bad.pt2", "bad.pt2: no zip"),), "warnings": ("unused",)}


def shape(value: Any) -> Any:
    """Keys and types of a JSON value; lists by their first element."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


# json


def test_json_is_as_documented(places: Places) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    documented = shape(json.loads(example))
    document = json.loads(render_json(result(places, **FAILED), places))
    assert document["version"] == 1
    assert document["statistics"] == {"BL001": 1, "BL103": 1, "BL105": 1, "BL201": 1}
    assert {key: shape(value) for key, value in document.items() if key not in ("findings", "statistics")} == {
        key: value for key, value in documented.items() if key not in ("findings", "statistics")
    }
    (wanted,) = documented["findings"]
    for item in document["findings"]:
        for key in ("location", "suppressed", "sources"):
            assert not item[key] or shape(item[key]) == wanted[key]
        assert item["sources"] == ([item["source"]] if item["source"] else [])
        assert {key: shape(value) for key, value in item.items() if shape(value) not in (None, [], "NoneType")} == {
            key: value for key, value in wanted.items() if shape(item[key]) not in (None, [], "NoneType")
        }
        assert set(item) == set(wanted)
    assert [item["suppressed"] is not None for item in document["findings"]] == [False, True, False, False, False]
    assert [item["location"] and item["location"]["path"] for item in document["findings"]] == [
        "models/my llama.py",
        "site-packages/transformers/llama.py",
        "/home/me/secret/other.py",
        None,
        None,
    ]


def test_json_of_nothing(places: Places) -> None:
    document = json.loads(render_json(CheckResult(("a.pt2",), ()), places))
    assert document["clean"] is True and document["findings"] == []


# github


def test_github_annotations(places: Places) -> None:
    lines = render_github(result(places, **FAILED), places).splitlines()
    assert lines == [
        "::error title=BL901::bad.pt2: no zip",
        "::error title=BL105::100%25 of 'x',%0Aall [/home/me/secret/other.py:9]",
        "::error title=BL201::c (in layers.0)",
        "::error title=BL103::d",
        "::warning file=models/my llama.py,line=1,title=BL001::a (in layers.0)%0Ahelp: h",
    ]


def test_github_properties_are_escaped(places: Places) -> None:
    name = "a,b:c%\n.py"
    (places.root / name).write_text("1\n")
    item = diagnostic("BL001", "::error::x\r\n::warning::y", "", Location(str(places.root / name), 1, "1"))
    (line,) = render_github(CheckResult(("t",), (Reported("t", item),)), places).splitlines()
    assert line == "::warning file=a%2Cb%3Ac%25\\n.py,line=1,title=BL001::::error::x\\r%0A::warning::y"


@pytest.mark.parametrize(("count", "total"), [(10, False), (11, True)])
def test_github_states_a_total_when_it_cuts(count: int, total: bool, places: Places) -> None:
    items = [Reported("t", item) for item in numbered([diagnostic("BL001", "a")] * count)]
    lines = render_github(CheckResult(("t",), tuple(items)), places).splitlines()
    assert len(lines) == count + total
    if total:
        assert lines[-1] == "buffer-lifting: 11 in all (11 warnings); GitHub shows 10 of each kind"


# sarif

SCHEMA = Draft4Validator(json.loads((Path(__file__).parent / "data" / "sarif-schema-2.1.0.json").read_text()))
_URI = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/%-]+")


def conforms(text: str) -> dict[str, Any]:
    """The log, valid by the schema of OASIS, and with what GitHub's code scanning asks for beyond it."""
    log: dict[str, Any] = json.loads(text)
    assert [error.message for error in SCHEMA.iter_errors(log)] == []
    for item in log["runs"][0]["results"]:
        for location in item["locations"]:
            physical = location["physicalLocation"]
            uri = physical["artifactLocation"]["uri"]
            assert _URI.fullmatch(uri) and not uri.startswith("/") and physical["region"]["startLine"] >= 1
        assert item["locations"] and item["partialFingerprints"]
    return log


def test_the_schema_finds_what_is_wrong(places: Places) -> None:
    log = json.loads(render_sarif(result(places, **FAILED), places))
    assert Draft4Validator.check_schema(SCHEMA.schema) is None and SCHEMA.is_valid(log)
    run = log["runs"][0]
    for container, key, value in (
        (log, "version", "2.2.0"),
        (run["results"][0], "level", "fatal"),
        (run["results"][0], "lines", 3),
        (run["results"][0]["locations"][0]["physicalLocation"]["region"], "startLine", 0),
        (run["invocations"][0], "executionSuccessful", "yes"),
        (run["results"][1]["suppressions"][0], "kind", "baseline"),
    ):
        before = container.get(key)
        container[key] = value
        assert not SCHEMA.is_valid(log), key
        container.pop(key) if before is None else container.update({key: before})
    assert SCHEMA.is_valid(log)


def test_sarif_is_well_formed(places: Places) -> None:
    log = conforms(render_sarif(result(places, **FAILED), places))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("/sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [entry["id"] for entry in rules] == list(RULES)
    assert all(rules[item["ruleIndex"]]["id"] == item["ruleId"] for item in run["results"])
    assert run["invocations"][0]["executionSuccessful"] is False
    assert [item["level"] for item in run["invocations"][0]["toolExecutionNotifications"]] == ["error", "warning"]


def test_sarif_has_places_fingerprints_and_suppressions(places: Places) -> None:
    run = conforms(render_sarif(result(places), places))["runs"][0]
    assert run["invocations"][0]["executionSuccessful"] is True
    first, second, third, fourth, fifth = run["results"]
    physical = first["locations"][0]["physicalLocation"]
    assert physical["artifactLocation"] == {"uri": "models/my%20llama.py", "uriBaseId": "ROOT"}
    assert physical["region"] == {"startLine": 1, "snippet": {"text": "x = table[:n]"}}
    assert [item["fullyQualifiedName"] for item in first["locations"][0]["logicalLocations"]] == [
        "layers.0",
        "layers.0/add",
    ]
    assert second["suppressions"] == [{"kind": "external", "status": "accepted", "justification": "known"}]
    assert [item["suppressions"] for item in (first, third, fourth, fifth)] == [[], [], [], []]
    uris = [item["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for item in (first, second, third)]
    assert not any(uri.startswith("/") or "secret" in uri for uri in uris)
    assert fourth["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": "model.pt2"}, (
        "not in the repository"
    )
    assert fifth["locations"][0]["logicalLocations"] == [{"name": "model.pt2", "kind": "module"}]
    prints = [item["partialFingerprints"]["bufferLiftingKey/v1"] for item in run["results"]]
    assert len(set(prints)) == 5


def test_sarif_of_findings_without_a_line_names_the_target(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code scanning rejects a whole log for one result without a file."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "exported_here.py").write_text("import os\n\n\ndef make():\n    return 1\n")
    (tmp_path / "stages").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.delitem(sys.modules, "exported_here", raising=False)
    importlib.import_module("exported_here")
    expected = {
        "../a b%.pt2": ("a%20b%25.pt2", 1),
        str(tmp_path / "m.pt2"): ("m.pt2", 1),
        "../stages": ("stages/manifest.json", 1),
        "exported_here:make": ("src/exported_here.py", 4),
        "exported_here:make.missing": ("src/exported_here.py", 1),
    }
    item = diagnostic("BL103", "d")
    log = conforms(render_sarif(CheckResult((), tuple(Reported(target, item) for target in expected)), places))
    found = [entry["locations"][0]["physicalLocation"] for entry in log["runs"][0]["results"]]
    assert [(where["artifactLocation"]["uri"], where["region"]["startLine"]) for where in found] == [*expected.values()]
    assert all(where["artifactLocation"]["uriBaseId"] == "ROOT" for where in found)
    elsewhere = ("json:loads", "no_such_module:make", "/x/\0/" + "a" * 300 + ".pt2", "/", "\ud800.pt2")
    conforms(render_sarif(CheckResult((), tuple(Reported(target, item) for target in elsewhere)), places))


# text


def test_text_of_findings_without_a_line(places: Places) -> None:
    text = render_text(result(places), places, statistics=True)
    assert (
        "model.pt2: BL201 c\n    no source line: the graph has no frame outside torch for node 'cumsum' in layers.0"
        in text
    )
    assert "model.pt2: BL103 d\n    no source line: it is about the whole program" in text
    assert "BL002 b" not in text, "suppressed"
    assert text.splitlines()[-4].startswith("1 BL001 ")


def test_control_characters_are_not_printed(places: Places) -> None:
    item = diagnostic("BL001", "\x1b[31mred\x07", "", Location("/x/\x1b[2J.py", 1, "a = '\x1b[0m'"), source="\x9b")
    text = render_text(CheckResult(("t",), (Reported("t", item),)), places)
    assert all(line.isprintable() for line in text.splitlines())
    assert printable("é\x1b") == "é\\x1b"
