"""``buffer-lifting diff``: what changed between two programs, by keys that last."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.inspection.diff import compare
from buffer_lifting.inspection.outline import outline
from buffer_lifting.inspection.outline_targets import target_outline
from buffer_lifting.inspection.outline_text import folded, folded_lines, outline_text
from buffer_lifting.package.files import sealed

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]


class Layer(nn.Module):
    """Reads rows of its own table, or (``learned``) of a parameter."""

    def __init__(self, learned: bool, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        table = torch.randn(64, width)
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x * self.table[: x.shape[1]])


class Model(nn.Module):
    """A few layers; the options are the edits that a pull request makes."""

    def __init__(self, layers: int = 3, learned: bool = False, mixing: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, width)
        self.layers = nn.ModuleList(Layer(learned, width) for _ in range(layers))
        self.mixing = mixing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return torch.cumsum(x, 1) if self.mixing else x


class Edited(Model):
    """The same as :class:`Model`, on other lines and with other names of nodes."""

    def forward(self, tokens: Tensor) -> Tensor:
        unused = tokens.shape[0] * 2
        hidden = self.embedding(tokens) * 1.0 * 1.0
        for layer in self.layers:
            hidden = layer(hidden)
        assert unused
        return hidden


def export(model: nn.Module, dynamic: bool = True) -> ExportedProgram:
    """A fresh export."""
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    return torch.export.export(model, (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=shapes)


def staged(program: ExportedProgram, *points: str) -> bl.StagedProgram:
    """Its stages."""
    return bl.partition(bl.lift(program), split_points=points)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs in every kind of file."""
    directory = tmp_path_factory.mktemp("files")
    programs = {
        "base": export(Model()),
        "edited": export(Edited()),
        "deeper": export(Model(layers=4)),
        "learned": export(Model(learned=True)),
        "mixing": export(Model(mixing=True)),
        "static": export(Model(), dynamic=False),
    }
    for name, program in programs.items():
        torch.export.save(program, directory / f"{name}.pt2")
    bl.lift(programs["base"]).save(directory / "base.lifted")
    staged(programs["base"], "layers.1").save(directory / "stages")
    staged(export(Model(width=16)), "layers.1").save(directory / "wide")
    staged(programs["base"], "layers.1", "layers.2").save(directory / "three")
    return directory


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run there."""
    monkeypatch.chdir(files)


def diff(old: str, new: str, capsys: Capture, code: int) -> list[str]:
    """The lines of a comparison."""
    assert main(["diff", old, new]) == code
    return capsys.readouterr().out.splitlines()


def document(old: str, new: str, capsys: Capture) -> dict[str, Any]:
    """The same as JSON."""
    code = main(["diff", old, new, "--format", "json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if result["same"] else 1) and result["same"] is (not result["changes"])
    return result


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base.pt2", "base.pt2"),
        ("base.pt2", "edited.pt2"),
        ("base.pt2", "base.lifted"),
        ("base.lifted", "stages"),
        ("stages", "base.pt2"),
    ],
)
def test_no_change(old: str, new: str, capsys: Capture) -> None:
    assert main(["diff", old, new]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("buffer-lifting: no change\n")
    assert ("stages are not compared" in captured.err) is ("stages" in (old, new))


def test_the_edited_program_has_other_lines_and_nodes() -> None:
    """What the comparison above would be worth nothing without."""
    base, edited = (bl.scan(torch.export.load(f"{name}.pt2")).reads for name in ("base", "edited"))
    first = [node.name for node in torch.export.load("base.pt2").graph.nodes]
    assert first != [node.name for node in torch.export.load("edited.pt2").graph.nodes]
    assert [read.source for read in base] == [read.source for read in edited]


def test_a_layer_more(capsys: Capture) -> None:
    assert diff("base.pt2", "deeper.pt2", capsys, 1) == [
        "reads",
        "  + 'layers.3.table' read by aten.mul.Tensor in layers.3: code BL001, kind buffer, operand either, "
        "lifted as values, stream positions, dims [0=seq:row], value slice('layers.3.table', dim=0, end=seq)",
        "lifted inputs",
        "  + 'layers.3.table' by positions, axis seq, row: name lifted_layers_3_table, form values, "
        "tensor float32[batch, seq, 8]",
    ]
    assert [line[2] for line in diff("deeper.pt2", "base.pt2", capsys, 1) if line[0] == " "] == ["-", "-"]


def test_a_buffer_that_becomes_a_parameter(capsys: Capture) -> None:
    lines = diff("base.pt2", "learned.pt2", capsys, 1)
    assert lines[:2] == [
        "reads",
        "  ~ 'layers.{0-2}.table' read by aten.mul.Tensor in layers.{0-2}: code BL001 -> BL002, "
        "kind buffer -> parameter, lifted as values -> positions",
    ]
    assert lines[2] == "lifted inputs" and {line[2] for line in lines[3:]} == {"+", "-"}


def test_an_op_that_mixes_the_sequence(capsys: Capture) -> None:
    assert diff("base.pt2", "mixing.pt2", capsys, 1) == [
        "mixing",
        "  + aten.cumsum.default: code BL201, handled no (aten.cumsum runs along the sequence or batch)",
    ]


def test_a_program_that_became_static(capsys: Capture) -> None:
    assert diff("base.pt2", "static.pt2", capsys, 1) == [
        "axes",
        "  ~ axis batch: size dynamic -> 3",
        "  ~ axis seq: size dynamic -> 11",
        "reads",
        "  ~ 'layers.{0-2}.table' read by aten.mul.Tensor in layers.{0-2}: value "
        "slice('layers.{0-2}.table', dim=0, end=seq) -> slice('layers.{0-2}.table', dim=0, end=11)",
    ]


def test_stage_boundaries(capsys: Capture) -> None:
    lines = diff("stages", "wide", capsys, 1)
    place = lines.index("boundaries")
    assert lines[place + 1 :] == [
        "  ~ stage 0 -> 1 by aten.add.Tensor in layers.0: tensor float32[batch, seq, 8] -> float32[batch, seq, 16]"
    ]
    assert diff("stages", "three", capsys, 1) == [
        "stages",
        "  + stage 2: keyword inputs lifted_layers_2_table, parameters 2 of layers.2",
        "  ~ stage 1: keyword inputs lifted_layers_1_table, lifted_layers_2_table -> lifted_layers_1_table, "
        "parameters 4 of layers.1-2 -> 2 of layers.1",
        "boundaries",
        "  + stage 1 -> 2 by aten.add.Tensor in layers.1: tensor float32[batch, seq, 8]",
    ]


def test_stages_of_an_older_version_have_no_boundaries(tmp_path: Path, capsys: Capture) -> None:
    staged(export(Model()), "layers.1").save(tmp_path / "old")
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    for name in ("stage_0.json", "stage_1.json"):
        stage = json.loads((tmp_path / "old" / name).read_text())
        del stage["output_shapes"]
        data = json.dumps(stage).encode()
        (tmp_path / "old" / name).write_bytes(data)
        manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    del manifest["checksum"]
    (tmp_path / "old/manifest.json").write_bytes(sealed(manifest))
    assert main(["diff", str(tmp_path / "old"), "stages"]) == 0
    assert "stage boundaries are not compared" in capsys.readouterr().err
    assert bl.load_stage(tmp_path / "old", 0).stage.output_shapes == ()
    assert [str(sent) for sent in bl.load_stage("stages", 0).stage.output_shapes] == ["float32[batch, seq, 8]"]


def test_json(capsys: Capture) -> None:
    result = document("stages", "wide", capsys)
    assert set(result) == {"version", "old", "new", "same", "changes", "notes"}
    assert (result["version"], result["old"], result["new"], result["notes"]) == (1, "stages", "wide", [])
    assert result["changes"][-1] == {
        "section": "boundaries",
        "kind": "changed",
        "key": {"boundary": "0 -> 1", "module": "layers.0", "op": "aten.add.Tensor", "ordinal": 0},
        "old": {"tensor": "float32[batch, seq, 8]", "note": ""},
        "new": {"tensor": "float32[batch, seq, 16]", "note": ""},
    }
    removed = document("mixing.pt2", "base.pt2", capsys)["changes"]
    assert [(item["kind"], item["new"]) for item in removed] == [("removed", None)]
    assert removed[0]["old"]["note"] == "aten.cumsum runs along the sequence or batch"
    assert document("base.pt2", "edited.pt2", capsys)["changes"] == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("nothing.pt2", "nothing.pt2: cannot be opened"),
        ("nothing.lifted", "nothing.lifted: cannot be opened"),
        (".", "a directory without a manifest"),
        ("setup.cfg", "a target is a .pt2 or .lifted file"),
        ("no_such_module:f", "cannot import no_such_module"),
    ],
)
def test_what_cannot_be_compared(target: str, why: str, first: bool, capsys: Capture) -> None:
    assert main(["diff", *([target, "base.pt2"] if first else ["base.pt2", target])]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and why in captured.err
    assert main(["diff", "base.pt2"]) == main(["diff", "base.pt2", "base.pt2", "--axes", "x:0=batch"]) == 2


def test_a_callable_and_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (tmp_path / "diff_targets.py").write_text(
        "import torch\n\ndef program():\n    print('noise')\n    return torch.export.load('base.pt2')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    axes = ["--axes", "tokens:0=batch,1=words"]
    assert main(["diff", "base.pt2", "diff_targets:program", *axes]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", "base.lifted", "diff_targets:program", *axes]) == 1, "the lifted program has its own"
    assert "+ axis words" in capsys.readouterr().out
    assert main(["diff", "base.pt2", "base.lifted", "--trust"]) == 0


def test_files_are_compared_without_torch() -> None:
    code = (
        "import sys; from buffer_lifting.cli import main; "
        "assert [main(['diff', 'base.pt2', new]) for new in ('base.lifted', 'stages', 'deeper.pt2')] == [0, 0, 1]; "
        "assert not {'torch', 'numpy', 'sympy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_have_the_outline_of_the_programs() -> None:
    program = export(Model(mixing=True))
    assert target_outline("mixing.pt2") == outline(program)
    lifted = bl.lift(export(Model()))
    assert target_outline("base.lifted") == outline(lifted)
    parts = bl.partition(lifted, split_points=["layers.1"])
    assert target_outline("stages") == outline(parts)
    assert compare(outline(lifted), outline(parts)).changes == ()


# Text


def test_layers_are_folded() -> None:
    assert folded(["a.0.b", "a.1.b", "a.2.b", "a.10.b", "c", "a.x.b"]) == ["a.x.b", "a.{0-2,10}.b", "c"]
    grid = [f"layers.{i}.experts.{j}" for i in range(4) for j in range(2)]
    assert folded(grid) == ["layers.{0-3}.experts.{0-1}"]
    assert folded([*grid, "layers.1.experts.2"]) == [
        "layers.1.experts.{0-2}",
        "layers.{0,2-3}.experts.{0-1}",
    ]
    assert folded([""]) == [""] and folded(["4"]) == ["4"]


def test_an_outline_has_every_entry_and_no_place_of_a_machine() -> None:
    """Lines unfold to the entries: nothing is lost where layers share a line."""
    text = outline_text(target_outline("stages"))
    assert str(ROOT) not in text and ".py" not in text
    reads = target_outline("stages").of("reads")
    assert len(reads) == 3
    assert folded_lines([(entry, "same") for entry in reads]) == [
        "'layers.{0-2}.table' read by aten.mul.Tensor in layers.{0-2}: same"
    ]
    assert folded_lines([(entry, str(place // 2)) for place, entry in enumerate(reads)]) == [
        "'layers.2.table' read by aten.mul.Tensor in layers.2: 1",
        "'layers.{0-1}.table' read by aten.mul.Tensor in layers.{0-1}: 0",
    ]
    assert folded_lines([(reads[0], ""), (reads[0], "")]) == [
        "'layers.0.table' read by aten.mul.Tensor in layers.0 (x2)"
    ]
