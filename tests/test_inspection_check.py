"""``buffer-lifting check``: targets, configuration, output and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.inspection.targets import check_target

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]

TARGETS = """
    import sys
    import torch
    from torch.export import Dim
    import buffer_lifting as bl


    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(61, 8)
            self.register_buffer("table", torch.randn(64, 8))

        def forward(self, tokens):
            x = self.embedding(tokens) + self.table[: tokens.shape[1]]
            return torch.cumsum(x, 1)


    def program():
        print("noise of the model")
        return torch.export.export(
            Model(), (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)
        )


    def lifted():
        return bl.lift(program(), strict=False)


    def number():
        return 3


    def broken():
        raise RuntimeError("no model")


    def leaves():
        sys.exit(0)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that take time to make: a clean and an unclean program, clean stages."""
    directory = tmp_path_factory.mktemp("made")
    program = export_case("llama_pr1797")[1]
    torch.export.save(program, directory / "llama.pt2")
    lifted = bl.context_parallel(bl.lift(program), size=1)
    lifted.save(directory / "llama.lifted")
    bl.partition(lifted, num_stages=2).save(directory / "stages")

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    torch.export.save(
        torch.export.export(Plain(), (torch.randn(3, 11, 8),), dynamic_shapes=shapes), directory / "plain.pt2"
    )
    return directory


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with these files, a broken one and a module of targets, in which the commands run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "broken.pt2").write_bytes(b"no zip")
    (tmp_path / "broken.lifted").write_bytes(b"no zip")
    (tmp_path / "check_targets.py").write_text(textwrap.dedent(TARGETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "check_targets", raising=False)
    return tmp_path


def configure(text: str, directory: Path | None = None) -> None:
    """Writes ``setup.cfg``."""
    ((directory or Path.cwd()) / "setup.cfg").write_text("[buffer_lifting]\n" + textwrap.dedent(text))


# Targets and exit codes


def test_clean_is_silent_on_stdout(capsys: Capture) -> None:
    assert main(["check", "plain.pt2", "stages"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "buffer-lifting: 0 findings in 2 targets\n"


def test_findings_look_like_a_compilers(capsys: Capture) -> None:
    assert main(["check", "check_targets:program"]) == 1
    captured = capsys.readouterr()
    assert captured.out == textwrap.dedent("""\
        check_targets.py:15: BL001 buffer 'table' is read by position and is not lifted
            x = self.embedding(tokens) + self.table[: tokens.shape[1]]
                                              ^~~~~
            help: buffer_lifting.lift handles it
        check_targets.py:16: BL201 aten.cumsum.default mixes the sequence (aten.cumsum runs along the sequence or batch)
            return torch.cumsum(x, 1)
                         ^~~~~~
            help: lift with strict=False if the sequence is never reordered or sharded
    """)
    assert "noise of the model" in captured.err and captured.err.endswith("2 findings in 1 target\n")


def test_a_lifted_program_is_a_target(capsys: Capture) -> None:
    assert main(["check", "check_targets:lifted"]) == 1
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if ": BL" in line] == ["BL201"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("broken.pt2", "broken.pt2"),
        ("nothing.pt2", "nothing.pt2"),
        ("check_targets:number", "returned int"),
        ("check_targets:broken", "RuntimeError: no model"),
        ("check_targets:leaves", "SystemExit: 0"),
        ("check_targets:absent", "has no 'absent'"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("check_targets.py", "a target is a .pt2 file"),
        ("no*.pt2", "matches no .pt2 file"),
        ("broken.lifted", "truncated, or not a zip file"),
        (".", "a directory without a manifest"),
    ],
)
def test_a_target_that_cannot_be_checked(target: str, why: str, capsys: Capture) -> None:
    assert main(["check", target, "plain.pt2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "error" in line]
    assert line.startswith(f"buffer-lifting: error: BL901 {target}: ") and why in line
    assert captured.err.endswith("0 findings in 1 target, 1 target not checked\n")


def test_findings_of_others_are_still_shown(capsys: Capture) -> None:
    assert main(["check", "broken.pt2", "llama.pt2", "--exit-zero"]) == 2
    assert "BL001 buffer" in capsys.readouterr().out


def test_a_crash_of_the_check_is_no_clean_result(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("in the analysis")

    monkeypatch.setattr("buffer_lifting.scanner.scan_record", crash)
    assert main(["check", "plain.pt2"]) == 2
    printed = capsys.readouterr().err
    assert (
        "plain.pt2: its graph is inconsistent: shapes or arguments that do not go together (ZeroDivisionError: in the"
        in printed
    )
    assert "this is a bug of buffer_lifting" in printed


def test_globs_find_files_and_stage_directories(capsys: Capture) -> None:
    Path("more/deep").mkdir(parents=True)
    shutil.copy("plain.pt2", "more/deep/one.pt2")
    assert main(["check", "more/**/*.pt2", "st*", "plain.pt2", "p*.pt2"]) == 0
    assert "0 findings in 3 targets" in capsys.readouterr().err


def test_a_glob_does_not_pass_over_what_is_broken(capsys: Capture) -> None:
    """A split that was killed, a directory or a link by the name of a file: matched, and not checked."""
    shutil.copytree("stages", "half")
    Path("half/manifest.json").unlink()
    Path("folder.pt2").mkdir()
    Path("devices").mkdir()
    Path("devices/manifest.json").symlink_to("/dev/zero")
    for pattern, name in (("hal*", "half"), ("fol*", "folder.pt2"), ("devi*", "devices")):
        assert main(["check", pattern, "plain.pt2"]) == 2
        assert f"BL901 {name}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "scan", "verify", "lift", "split"])
@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "import pytest; pytest.skip('no')"])
@pytest.mark.parametrize("called", [True, False])
def test_what_ends_the_process_is_no_clean_result(command: str, end: str, called: bool, capsys: Capture) -> None:
    """``sys.exit(0)`` in a module or callable was the exit code of the command, and ``pytest.skip`` its end."""
    name = f"ends_{command}_{called}_{'skip' in end}"
    Path(f"{name}.py").write_text(f"def program():\n    {end}\n" + ("" if called else "program()\n"))
    more = {"lift": ["-o", "x.lifted"], "split": ["--num-stages", "2", "-o", "x"]}.get(command, [])
    assert main([command, f"{name}:program", *more]) == 2
    assert f"{name}:program: " in capsys.readouterr().err


def test_a_layer_that_repeats_is_shown_once(capsys: Capture) -> None:
    assert main(["check", "llama.pt2", "--select", "BL004"]) == 1
    out = capsys.readouterr().out
    assert out.count("BL004") == 1 and "  [x2 layers: layers.*" in out


def test_usage_errors() -> None:
    assert main(["check"]) == 2
    assert main(["check", "plain.pt2", "--axes", "nonsense"]) == 2
    assert main(["check", "plain.pt2", "--axes", "y:0=batch"]) == 2
    assert main(["check", "stages", "--axes", "tokens:0=batch"]) == 2


# Options and configuration


def test_select_ignore_statistics_and_exit_zero(capsys: Capture) -> None:
    assert main(["check", "check_targets:program", "--select", "BL0", "--statistics"]) == 1
    out = capsys.readouterr().out
    assert "BL201" not in out
    assert out.splitlines()[-1] == "1 BL001 a buffer or constant is read by sequence position and is not lifted"
    assert main(["check", "check_targets:program", "--ignore", "BL0,BL2"]) == 0
    assert main(["check", "check_targets:program", "--exit-zero"]) == 0
    capsys.readouterr()
    assert main(["check", "plain.pt2", "--select", "BL8"]) == 2
    assert "--select: no rule begins with 'BL8'" in capsys.readouterr().err


def test_the_command_line_wins_over_setup_cfg(capsys: Capture) -> None:
    configure("select = BL0\nexit-zero = yes\nstatistics = on\n")
    assert main(["check", "check_targets:program"]) == 0
    out = capsys.readouterr().out
    assert "1 BL001 a buffer" in out and "BL201" not in out
    assert main(["check", "check_targets:program", "--select", "BL2", "--no-exit-zero", "--no-statistics"]) == 1
    out = capsys.readouterr().out
    assert out.count("BL201") == 1 and "BL001" not in out
    configure("ignore = BL001\n")
    assert main(["check", "llama.pt2"]) == 1
    assert "BL001" not in capsys.readouterr().out
    assert main(["check", "llama.pt2", "--select", "BL001"]) == 1
    assert "BL001" in capsys.readouterr().out


def test_the_nearest_section_up_to_the_repository_counts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure("ignore = BL\n")
    below = here / "below"
    below.mkdir()
    (below / "setup.cfg").write_text("[metadata]\nname = other\n")
    monkeypatch.chdir(below)
    assert main(["check", "../llama.pt2"]) == 0
    (below / ".git").mkdir()
    assert main(["check", "../llama.pt2"]) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("selekt = BL0", "unknown key 'selekt'"),
        ("select = BL7", "no rule begins with 'BL7'"),
        ("exit_zero = maybe", "neither yes nor no"),
        ("suppress = BL001 table", "is not 'CODE FQN-PATTERN: reason'"),
        ("suppress = BL001 table:  ", "is not 'CODE FQN-PATTERN: reason'"),
        ("suppress = BL7 table: because", "no rule begins with 'BL7'"),
        ("axes = nonsense", "--axes 'nonsense'"),
        ("no key at all", "setup.cfg"),
    ],
)
def test_wrong_configuration(text: str, why: str, capsys: Capture) -> None:
    configure(text)
    assert main(["check", "plain.pt2"]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["buffer-lifting", "Buffer_Lifting", "tool:buffer_lifting"])
def test_a_section_of_a_similar_name_is_an_error(name: str, capsys: Capture) -> None:
    Path("setup.cfg").write_text(f"[{name}]\nignore = BL\n")
    assert main(["check", "plain.pt2"]) == 2
    assert f"the section [{name}] is not read; it is called [buffer_lifting]" in capsys.readouterr().err


def test_a_setup_cfg_as_other_tools_write_it() -> None:
    text = "\ufeff[DEFAULT]\nlevel = 3\n\n[metadata]\nname = other\n\n[buffer_lifting]\nignore = BL\n"
    Path("setup.cfg").write_text(text, encoding="utf-8")
    assert main(["check", "llama.pt2"]) == 0
    assert main(["check", "llama.pt2", "--select", "BL0"]) == 1


def test_axes_of_the_project_are_for_what_is_not_lifted(capsys: Capture) -> None:
    configure("axes = tokens:0=batch,1=words")
    targets = ["llama.pt2", "llama.lifted", "stages", "check_targets:program", "check_targets:lifted"]
    assert main(["check", *targets, "--select", "BL0"]) == 1
    assert "error" not in capsys.readouterr().err
    configure("axes = nothing:0=batch")
    assert main(["check", "llama.lifted"]) == 0
    assert main(["check", "llama.pt2"]) == 2


def test_suppression_by_pattern(capsys: Capture) -> None:
    configure("""\
        suppress =
            BL001 tab*: the trainer feeds it
            BL2 decoder.*: not reordered there
    """)
    assert main(["check", "check_targets:program"]) == 1
    captured = capsys.readouterr()
    assert "BL001" not in captured.out and "BL201" in captured.out
    assert "suppress: 'BL2 decoder.*' matches no finding" in captured.err
    assert captured.err.endswith("1 finding in 1 target, 1 suppressed\n")


# Places


def test_files_of_another_machine_are_found_by_their_line(here: Path, capsys: Capture) -> None:
    (here / "package").mkdir()
    (here / "check_targets.py").rename(here / "package" / "model.py")
    code = "import torch, package.model as m; torch.export.save(m.program(), 'other.pt2')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    here.joinpath("clone").mkdir()
    for name in ("package", "other.pt2"):
        shutil.move(here / name, here / "clone" / name)
    (here / "clone" / ".git").mkdir()
    os.chdir(here / "clone")
    assert main(["check", "other.pt2"]) == 1
    assert capsys.readouterr().out.startswith("package/model.py:15: BL001 ")
    text = Path("package/model.py").read_text()
    Path("package/model.py").write_text("# edited\n" + text)
    assert main(["check", "other.pt2", "--select", "BL001"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{here.as_posix()}/package/model.py:15: "), "the line differs: no guess"
    assert "self.table[: tokens.shape[1]]" in out, "the recorded line"


# Saved stages


def test_saved_stages_have_the_findings_of_the_partition(tmp_path: Path) -> None:
    staged = bl.partition(bl.lift(export_case("llama_pr1797")[1]), num_stages=2)
    staged.save(tmp_path / "causal")
    found, expected = check_target(str(tmp_path / "causal"), None), bl.check(staged)
    assert [item.code for item in found] == ["BL004", "BL004"]
    assert [(item.key, item.location) for item in found] == [(item.key, item.location) for item in expected]


@pytest.mark.parametrize("name", ["feed.json", "stage_1.json", "manifest.json"])
def test_damaged_stages(name: str, capsys: Capture) -> None:
    path = Path("stages") / name
    path.write_bytes(path.read_bytes().replace(b"lifted_", b"shifted", 1)[: -9 if name == "manifest.json" else None])
    assert main(["check", "stages"]) == 2
    assert name in capsys.readouterr().err or name == "manifest.json"
    path.unlink()
    assert main(["check", "stages"]) == 2


def test_a_stage_without_its_broadcast_is_found(capsys: Capture) -> None:
    import hashlib

    path = Path("stages/stage_1.json")
    text = path.read_text().replace("aten.expand.default", "aten.clone.default")
    path.write_text(text)
    manifest = json.loads(Path("stages/manifest.json").read_text())
    manifest["sha256"]["stage_1.json"] = hashlib.sha256(text.encode()).hexdigest()
    Path("stages/manifest.json").write_text(json.dumps(manifest))
    assert main(["check", "stages"]) == 1
    out = capsys.readouterr().out
    assert out.count("BL301") == 3 and "of stage 1 is not followed by one batch-broadcast node" in out


# Saved lifted programs


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("name", ["llama_pr1797", "nanogpt", "hf_llama_mask"])
def test_a_saved_lifted_program_has_the_findings_of_the_program(name: str, follow: bool, tmp_path: Path) -> None:
    lifted = bl.lift(export_case(name, layers=1)[1])
    lifted = bl.context_parallel(lifted, size=1) if follow else lifted
    lifted.save(tmp_path / "model.lifted")
    found, expected = check_target(str(tmp_path / "model.lifted"), None), bl.check(lifted)
    assert [(item.key, item.message) for item in found] == [(item.key, item.message) for item in expected]
    assert [item.code for item in found] == (["BL004"] if name == "llama_pr1797" and not follow else [])


def test_a_program_of_several_ranks_is_clean_live_and_saved(tmp_path: Path) -> None:
    """Its collectives are what context_parallel made."""
    lifted = bl.context_parallel(bl.lift(export_case("llama_pr1797", layers=1)[1]), size=2)
    lifted.save(tmp_path / "model.lifted")
    assert bl.check(lifted) == check_target(str(tmp_path / "model.lifted"), None) == ()
    left = bl.lift(export_case("llama_pr1797", layers=1)[1])
    assert [item.code for item in bl.check(left)] == ["BL004"], "the control"


def test_a_saved_lifted_program_without_its_broadcast_is_found(tmp_path: Path) -> None:
    lifted = bl.load("llama.lifted")
    node = next(node for node in lifted.program.graph.nodes if node.name == lifted.inputs[0].name)
    (broadcast,) = node.users
    for user in list(broadcast.users):
        user.replace_input_with(broadcast, node)
    lifted.program.graph.erase_node(broadcast)
    lifted.save(tmp_path / "edited.lifted")
    found, expected = check_target(str(tmp_path / "edited.lifted"), None), bl.check(lifted)
    assert [item.code for item in found] == ["BL301"]
    assert [(item.key, item.message) for item in found] == [(item.key, item.message) for item in expected]


def test_a_lifted_program_in_a_file_takes_no_axes(capsys: Capture) -> None:
    assert main(["check", "llama.lifted", "--axes", "tokens:0=batch"]) == 2
    assert "whose axes are known" in capsys.readouterr().err


def test_damaged_lifted_files_are_errors(tmp_path: Path) -> None:
    """Cut off, and with single bytes changed: an error of one line, or the same findings (a byte that is not read)."""
    import random

    from buffer_lifting.errors import ArchiveError

    data = Path("llama.lifted").read_bytes()
    expected = check_target("llama.lifted", None)
    bad = tmp_path / "bad.lifted"
    dice = random.Random(0)
    refused = 0
    for step in range(120):
        cut = dice.randrange(len(data))
        changed = data[:cut] if step % 2 else data[:cut] + bytes([data[cut] ^ 0x41]) + data[cut + 1 :]
        bad.write_bytes(changed)
        try:
            assert check_target(str(bad), None) == expected
        except ArchiveError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 60


# torch


def test_files_are_checked_without_torch() -> None:
    code = textwrap.dedent("""\
        import sys
        from buffer_lifting.cli import main
        assert main(["check", "llama.pt2", "llama.lifted", "stages", "--statistics"]) == 1
        assert "torch" not in sys.modules, "torch was imported"
        assert "numpy" not in sys.modules, "numpy was imported"
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "BL001" in done.stdout


def test_a_pickle_in_a_file_is_not_opened(here: Path, capsys: Capture) -> None:
    import zipfile

    with zipfile.ZipFile("plain.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if "sample_inputs" in item.filename:
                data = b"cos\nsystem\n(S'touch run'\ntR."
            new.writestr(item.filename, data)
    main(["check", "bad.pt2"])
    assert not (here / "run").exists()
    main(["check", "bad.pt2", "--trust"])
    assert (here / "run").exists(), "the control: torch's loader runs it"


@pytest.mark.parametrize("target", ["llama.pt2", "llama.lifted", "stages", "check_targets:program"])
def test_trust_gives_the_same_findings(target: str, capsys: Capture) -> None:
    code = main(["check", target])
    safe = capsys.readouterr().out
    assert main(["check", target, "--trust"]) == code
    assert capsys.readouterr().out == safe


def test_edited_stages_are_an_error_or_findings_and_nothing_else() -> None:
    """Values of the JSON replaced by others, with checksums that fit: no crash."""
    import hashlib
    import random

    from buffer_lifting.errors import ArchiveError

    dice = random.Random(0)
    manifest = json.loads(Path("stages/manifest.json").read_text())
    texts = {name: Path("stages", name).read_text() for name in ("feed.json", "stage_0.json", "stage_1.json")}
    outcomes = {"findings": 0, "refused": 0}
    for _ in range(600):
        name = dice.choice(sorted(texts))
        document = json.loads(texts[name])
        holder, key = document, dice.choice(sorted(document))
        while isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.85:
            holder = holder[key]
            key = dice.choice(sorted(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
        if dice.random() < 0.3 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = dice.choice(
                [None, True, -1, 2**70, 1.5, "x", "aten.expand.default", [], {}, {"node": 3}, [[]]]
            )
        data = json.dumps(document).encode()
        Path("stages", name).write_bytes(data)
        edited = {**manifest, "sha256": {**manifest["sha256"], name: hashlib.sha256(data).hexdigest()}}
        Path("stages/manifest.json").write_text(json.dumps(edited))
        try:
            check_target("stages", None)
            outcomes["findings"] += 1
        except ArchiveError:
            outcomes["refused"] += 1
        Path("stages", name).write_text(texts[name])
    assert min(outcomes.values()) > 20, outcomes
