"""The command line: what each command prints where, and its exit code."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.cli import main, make_parser, parse_axes

HEADER = ["name", "form", "stream", "role", "dtype", "shape", "source"]
ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = '''
    """Targets."""
    import torch
    from torch.export import Dim

    AUTO = {0: Dim.AUTO, 1: Dim.AUTO}
    not_callable = 3


    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(61, 8)

        def forward(self, tokens):
            return torch.cumsum(self.embedding(tokens), 1)


    def mixing():
        print("noise of the model")
        tokens = torch.zeros(3, 11, dtype=torch.long)
        return torch.export.export(Mixing(), (tokens,), dynamic_shapes=(AUTO,))


    def graph_module():
        return mixing().module()


    def number():
        return 3


    def broken():
        raise RuntimeError("first line\\nsecond line")
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``llama.pt2`` (4 layers), ``gpt.pt2``, a broken file, and the module of targets."""
    directory = tmp_path_factory.mktemp("cli")
    torch.export.save(export_case("hf_llama", layers=4)[1], directory / "llama.pt2")
    torch.export.save(export_case("nanogpt")[1], directory / "gpt.pt2")
    (directory / "broken.pt2").write_bytes(b"no zip")
    (directory / "broken.lifted").write_bytes(b"no zip")
    (directory / "cli_targets.py").write_text(textwrap.dedent(PROGRAMS))
    return directory


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in that directory."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))


def python(*args: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=120)


# scan


def test_scan_shows_a_line_read_by_many_layers_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "llama.pt2"]) == 0
    out = capsys.readouterr().out
    assert out.count("BL001") == 1
    line = next(line for line in out.splitlines() if "BL001" in line)
    assert "modeling_llama.py:" in line
    assert line.endswith("[x4 layers: model.layers.*.self_attn]")
    assert "    query_states, key_states = apply_rotary_pos_emb(" in out
    assert "input_ids: batch dim 0, seq dim 1 (row)" in out
    assert "lifted_model_rotary_emb_inv_freq" in out
    assert "mixing  4 ops (4 handled)" in out


def test_the_summary_announces_what_lift_adds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "llama.pt2", "--json"]) == 0
    lifted = json.loads(capsys.readouterr().out)["lifted"]
    expected = bl.lift(torch.export.load("llama.pt2")).inputs
    assert [item["name"] for item in lifted] == [item.name for item in expected]


def test_scan_reports_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "cli_targets:mixing"]) == 1
    captured = capsys.readouterr()
    assert "cli_targets.py:16: BL201 aten.cumsum.default mixes the sequence" in captured.out
    assert "    return torch.cumsum(self.embedding(tokens), 1)" in captured.out
    assert "refused 1" in captured.out
    assert "noise of the model" not in captured.out, "what a target prints is no finding"
    assert "noise of the model" in captured.err


def test_scan_takes_a_graph_module() -> None:
    assert main(["scan", "cli_targets:graph_module"]) == 1


def test_scan_all_lists_handled_ops_and_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "llama.pt2", "--all"]) == 0
    out = capsys.readouterr().out
    assert "BL200 aten.scaled_dot_product_attention.default" in out
    assert "    in model.layers.3.self_attn" in out


@pytest.mark.parametrize(("target", "code"), [("gpt.pt2", 0), ("cli_targets:mixing", 1)])
def test_scan_json(target: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", target, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        *("version", "target", "clean", "reads", "mixing", "findings", "inputs", "lifted", "summary")
    }
    assert report["version"] == 1
    assert report["clean"] is (code == 0)
    assert sum(report["summary"]["reads"].values()) == len(report["reads"])
    assert report["inputs"][0]["seq_dims"] == [{"dim": 1, "axis": "seq", "role": "row"}]
    if code:
        assert report["mixing"][0]["location"]["line"] == 16


# files from strangers


def test_scan_of_a_file_reads_it_without_torch() -> None:
    code = (
        "import sys; from buffer_lifting.cli import main; "
        "assert main(['scan', 'llama.pt2', '--explain']) == 0; assert 'torch' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "BL001 buffer" in done.stdout


@pytest.mark.parametrize("name", ["llama.pt2", "gpt.pt2"])
def test_scan_says_the_same_with_and_without_trust(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", name, "--json"]) == 0
    safe = capsys.readouterr().out
    assert main(["scan", name, "--json", "--trust"]) == 0
    assert capsys.readouterr().out == safe


@pytest.mark.parametrize(
    "arguments",
    [
        ["lift", "gpt.pt2", "-o", "never.lifted"],
        ["split", "gpt.pt2", "--num-stages", "2", "-o", "never"],
        ["split", "broken.lifted", "--num-stages", "2", "-o", "never"],
        ["verify", "gpt.pt2"],
        ["report", "gpt.pt2", "--num-stages", "2", "-o", "never.html"],
        ["report", "cli_targets:program", "broken.lifted", "--split-points", "transformer.h.1", "-o", "never.html"],
    ],
)
def test_what_needs_the_tensors_asks_for_trust(arguments: list[str]) -> None:
    """In a process of its own: torch is not even imported."""
    code = (
        "import sys; from buffer_lifting.cli import main; "
        f"code = main({arguments!r}); sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    done = python("-c", code)
    assert done.returncode == 2 and done.stdout == ""
    assert "needs the tensors in the file" in done.stderr and "--trust" in done.stderr
    assert not list(Path().glob("never*"))


def _malicious(path: Path) -> None:
    """A copy of ``gpt.pt2`` whose example inputs are a pickle with a side effect."""
    import zipfile

    with zipfile.ZipFile("gpt.pt2") as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if "sample_inputs" in item.filename:
                data = b"cos\nsystem\n(S'touch run'\ntR."
            new.writestr(item.filename, data)


def test_a_strangers_file_runs_by_trust_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: torch's loader does run it."""
    _malicious(tmp_path / "bad.pt2")
    monkeypatch.chdir(tmp_path)
    for command in (
        ["scan"],
        ["check"],
        ["diff", "bad.pt2"],
        ["report", "-o", "x.html"],
        ["report", "-o", "x.html", "--num-stages", "2"],
        ["lift", "-o", "x.lifted"],
        ["split", "--num-stages", "2", "-o", "x"],
        ["verify"],
    ):
        main([command[0], "bad.pt2", *command[1:]])
    assert not Path("run").exists()
    main(["scan", "bad.pt2", "--trust"])
    assert Path("run").exists()


# lift, split, verify


def test_lift_then_split_the_saved_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt.lifted"
    assert main(["lift", "gpt.pt2", "--trust", "-o", str(path)]) == 0
    captured = capsys.readouterr()
    lifted = bl.load(path)
    assert captured.out.splitlines()[0].split() == HEADER
    assert [line.split()[0] for line in captured.out.splitlines()[1:]] == [i.name for i in lifted.inputs]
    assert f"wrote {path}" in captured.err

    to = ["--trust", "-o", str(tmp_path / "stages")]
    assert main(["split", str(path), *to, "--split-points", "transformer.h.1"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["stage", "0", "1", "memory:"]
    assert bl.load_stage(tmp_path / "stages", 1).num_stages == 2


def test_split_a_program(tmp_path: Path) -> None:
    assert main(["split", "llama.pt2", "--trust", "-o", str(tmp_path / "stages"), "--num-stages", "4"]) == 0
    assert bl.load_stage(tmp_path / "stages", 3).num_stages == 4
    to = ["-o", str(tmp_path / "empty"), "--num-stages", "2", "--no-weights"]
    assert main(["split", "llama.pt2", "--trust", *to]) == 0
    assert all(value.device.type == "meta" for value in bl.load_stage(tmp_path / "empty", 1).stage.module.parameters())


def test_the_form_of_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "llama.lifted")
    assert main(["lift", "llama.pt2", "--trust", "-o", out, "--form-of", "*inv_freq=positions"]) == 0
    assert "lifted_positions" in capsys.readouterr().out
    assert main(["lift", "llama.pt2", "-o", out, "--form-of", "*inv_freq=wrong"]) == 2


def test_lift_refuses_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mixing.lifted"
    assert main(["lift", "cli_targets:mixing", "-o", str(path)]) == 1
    assert "BL201" in capsys.readouterr().out
    assert not path.exists()
    assert main(["lift", "cli_targets:mixing", "-o", str(path), "--no-strict"]) == 0
    assert "left as they are: 1" in capsys.readouterr().err
    assert path.exists()


def test_split_shows_what_is_refused_like_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "cli_targets:mixing"]) == 1
    expected = capsys.readouterr().out
    assert main(["split", "cli_targets:mixing", "-o", str(tmp_path / "stages"), "--num-stages", "2"]) == 1
    assert capsys.readouterr().out == expected


def test_reads_of_tables_of_layers_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "gpt.pt2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "attn.bias" in line and ": BL" in line]
    assert "buffer 'transformer.h.*.attn.bias'" in line and line.endswith("[x2 layers: transformer.h.*.attn]")
    assert main(["check", "gpt.pt2"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "attn.bias" in line and ": BL" in line]
    assert "buffer 'transformer.h.*.attn.bias'" in line and line.endswith("[x2 layers: transformer.h.*.attn]")


def test_split_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "stages")]
    assert main(["split", "gpt.pt2", "--trust", *out, "--split-points", "no.such.module"]) == 1
    assert "no.such.module" in capsys.readouterr().out
    assert main(["split", "cli_targets:mixing", *out, "--num-stages", "2"]) == 1
    assert not (tmp_path / "stages").exists()


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "gpt.pt2", "--trust", "--num-stages", "2"]) == 0
    out = capsys.readouterr().out
    assert "ok   identity" in out
    assert "ok   composition" in out


def test_verify_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise bl.VerificationError("values does not hold at node 'add'")

    monkeypatch.setattr("buffer_lifting.verification.verify", broken)
    assert main(["verify", "gpt.pt2", "--trust"]) == 1
    assert "does not hold at node 'add'" in capsys.readouterr().out
    assert main(["verify", "cli_targets:mixing"]) == 1


# what cannot be checked


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing.pt2", "missing.pt2: No such file or directory"),
        ("broken.pt2", "broken.pt2: truncated, or not a zip file"),
        (".", "a target is a .pt2 file or package.module:callable"),
        ("cli_targets", "a target is a .pt2 file or package.module:callable"),
        ("cli_targets:", "a target is a .pt2 file or package.module:callable"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("cli_targets:missing", "cli_targets has no 'missing'"),
        ("cli_targets:not_callable", "not_callable is not callable"),
        ("cli_targets:number", "returned int, not an ExportedProgram"),
        ("cli_targets:broken", "broken() failed (RuntimeError: first line)"),
        ("some.lifted", "takes the program before lifting"),
    ],
)
def test_bad_targets(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", target]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err


def test_a_program_of_hugging_face_loads_in_a_fresh_process() -> None:
    """torch can load it only once the class of its outputs is imported."""
    done = python("-m", "buffer_lifting", "scan", "llama.pt2", "--trust")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lifted_model_rotary_emb_inv_freq" in done.stdout


def test_outputs_of_a_class_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(path: str) -> None:
        try:
            raise NotImplementedError("Deserializing no_such_package.outputs.Output in pytree is not registered.")
        except NotImplementedError:
            logging.getLogger("torch.export").warning("Ran into the following error", exc_info=True)
        raise RuntimeError("check the warnings above")

    monkeypatch.setattr("torch.export.load", load)
    assert main(["scan", "gpt.pt2", "--trust"]) == 2
    captured = capfd.readouterr()
    assert len(captured.err.splitlines()) == 1 and "check the warnings above" not in captured.err
    assert "it returns a no_such_package.outputs.Output, and no_such_package cannot be imported here" in captured.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "cli_targets:broken", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_broken_lifted_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "broken.lifted", "--trust", "-o", str(tmp_path / "s"), "--num-stages", "2"]) == 2
    assert "broken.lifted: not a program that" in capsys.readouterr().err


def test_nothing_else_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.lifted"
    path.write_text("mine")
    assert main(["lift", "gpt.pt2", "--trust", "-o", str(path)]) == 2
    assert path.read_text() == "mine"
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["scan"],
        ["lift", "gpt.pt2"],
        ["lift", "gpt.pt2", "-o", "gpt.zip"],
        ["split", "gpt.pt2", "-o", "d"],
        ["split", "gpt.pt2", "-o", "d", "--num-stages", "0"],
        ["split", "gpt.pt2", "-o", "d", "--num-stages", "2", "--split-points", "x"],
        ["scan", "gpt.pt2", "--axes", "idx"],
        ["scan", "gpt.pt2", "--axes", "idx:x=batch"],
        ["scan", "gpt.pt2", "--axes", "idx:7=seq"],
        ["scan", "gpt.pt2", "--axes", "other:0=batch"],
    ],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err


def test_axes() -> None:
    assert parse_axes(None) is None
    axes = parse_axes(["tokens:0=batch,1=seq", "mask:2=seq:row", "mask:3=seq:col"])
    assert axes == {"tokens": {0: "batch", 1: "seq"}, "mask": {2: "seq:row", 3: "seq:col"}}
    assert main(["scan", "gpt.pt2", "--axes", "idx:0=batch,1=seq"]) == 0


# starting


@pytest.mark.parametrize("command", ["", "scan", "lift", "split", "verify", "check", "diff", "report", "rule", "demo"])
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import sys; from buffer_lifting.cli import main; "
        f"code = main({[*command.split(), '--help']!r}); sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit codes: 0 " in done.stdout or command == "rule"
    warns = "Use --trust only for files you trust" in " ".join(done.stdout.split())
    assert warns == (command not in ("rule", "demo"))


def test_version() -> None:
    done = python("-m", "buffer_lifting", "--version")
    assert (done.returncode, done.stdout) == (0, f"buffer-lifting {bl.__version__}\n")


def test_as_a_module() -> None:
    done = python("-m", "buffer_lifting", "scan", "missing.pt2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "buffer-lifting: error: missing.pt2: No such file or directory\n"


def test_the_parser_has_a_run_for_every_command() -> None:
    args = make_parser().parse_args(["demo", "--steps", "2"])
    assert callable(args.run)
    assert (args.steps, args.layers, args.seed) == (2, 4, 0)
