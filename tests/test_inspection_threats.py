"""Files from strangers in CI: what their stack traces and names make `check` print, and what they make it open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_fuzz import edited, members, pack
from torch import Tensor, nn
from torch.export import Dim

from buffer_lifting.cli import main
from buffer_lifting.graph.locations import innermost_location
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.html_report import graph_section
from buffer_lifting.inspection.places import Places

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]
SECRET = "hunter2-AUTHORIZATION"
FORMATS = ("text", "json", "github", "sarif", "html")


class Model(nn.Module):
    """Reads a table by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 4)
        self.register_buffer("table", torch.randn(32, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.table[: tokens.shape[1]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a file."""
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    example = (torch.zeros(3, 11, dtype=torch.long),)
    torch.export.save(torch.export.export(Model(), example, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with secrets, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    for name in (".git/config", ".env", "notes.txt", ".hidden.py", ".git/hook.py"):
        (tmp_path / name).write_text(f"{SECRET}\n")
    return tmp_path


def traced(saved: Path, path: Path, trace: str | None) -> str:
    """The file with this stack trace on every node (``None``: without one)."""

    def change(program: dict[str, Any]) -> None:
        for node in program["graph_module"]["graph"]["nodes"]:
            node["metadata"].pop("stack_trace", None)
            if trace is not None:
                node["metadata"]["stack_trace"] = trace

    pack(path, edited(members(saved), change))
    return path.name


def frame(file: str, line: int = 1, code: str = "") -> str:
    return f'File "{file}", line {line}, in forward\n' + (f"    {code}\n" if code else "")


# -- what is opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [".git/config", ".env", "notes.txt", ".hidden.py", ".git/hook.py", "link.py", "linked/hook.py", "plain.py"]
)
def test_no_line_of_the_checkout_is_printed(file: str, saved: Path, here: Path, capsys: Capture) -> None:
    (here / "link.py").symlink_to(".git/config")
    (here / "linked").symlink_to(".git")
    (here / "plain.py").write_text(f"key = '{SECRET}'\n")
    for name in (file, str(here / file), f"/elsewhere/{file}", f"x/../{file}"):
        target = traced(saved, here / "m.pt2", frame(name))
        for format in FORMATS:
            assert main(["check", target, "--format", format]) == 1
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err


def test_scan_prints_no_line_of_a_file_that_a_stranger_names(saved: Path, here: Path, capsys: Capture) -> None:
    target = traced(saved, here / "m.pt2", frame(str(here / ".git/config")))
    for arguments in (["scan"], ["scan", "--explain", "--all"], ["scan", "--json"]):
        main([arguments[0], target, *arguments[1:]])
    assert SECRET not in capsys.readouterr().out


def test_links_and_hidden_directories_are_no_places_of_the_repository(here: Path, tmp_path: Path) -> None:
    (here / "model.py").write_text("x = 1\n")
    (here / "same.py").symlink_to("model.py")
    (here / "out.py").symlink_to("/etc/hostname")
    (here / "loop.py").symlink_to("loop.py")
    (here / "hidden.py").symlink_to(".git/hook.py")
    places = Places(here.resolve())
    inside = {name: places.at(Location(name, 1, "x = 1")).inside for name in os.listdir(here) if name.endswith(".py")}
    assert inside == {
        **{"model.py": True, "same.py": True, "out.py": False, "loop.py": False},
        **{"hidden.py": False, ".hidden.py": False},
    }


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", [f"/{'a' * 300}.py", f"{'a' * 300}.py", "/" + "abcdefgh/" * 1000 + "m.py", "/x/\0.py", ".", " ", "/"]
)
def test_a_strange_file_name_costs_no_other_target_its_findings(
    file: str, saved: Path, here: Path, capsys: Capture
) -> None:
    target = traced(saved, here / "m.pt2", frame(file, 6, "x = 1"))
    for format in FORMATS:
        assert main(["check", str(saved), target, "--format", format]) == 1
    assert "2 findings in 2 targets" in capsys.readouterr().err


# -- frames of torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "own"),
    [
        *(("/home/me/torch/project/model.py", True), ("/ci/torch/model.py", True), ("C:\\torch\\model.py", True)),
        *(("/v/lib/python3.11/site-packages/torchtune/a.py", True), ("/v/site-packages/my/torch/a.py", True)),
        *(("/v/lib/python3.11/site-packages/torch/nn/modules/linear.py", False), (torch.__file__, False)),
        *(("/usr/lib/python3/dist-packages/torch/a.py", False), ("C:\\v\\site-packages\\torch\\a.py", False)),
        *(("/home/me/pytorch/torch/nn/functional.py", False), ("<eval_with_key>.3", False)),
    ],
)
def test_frames_of_torch_are_those_of_its_package(file: str, own: bool) -> None:
    found = innermost_location(frame("/home/me/caller.py", 3, "call()") + frame(file, 7, "x = y"))
    assert found == (
        Location(file, 7, "x = y", "forward") if own else Location("/home/me/caller.py", 3, "call()", "forward")
    )


def test_a_project_below_a_directory_torch_has_places(saved: Path, here: Path, capsys: Capture) -> None:
    folder = here / "torch" / "project"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("x = 1\n")
    assert main(["check", traced(saved, here / "m.pt2", frame(str(folder / "model.py"), 1, "x = 1"))]) == 1
    assert capsys.readouterr().out.startswith("torch/project/model.py:1: BL001 ")


def test_without_a_frame_of_the_project_the_message_is_true(saved: Path, here: Path, capsys: Capture) -> None:
    for trace in (None, frame("/v/site-packages/torch/nn/functional.py", 1, "x")):
        assert main(["check", traced(saved, here / "m.pt2", trace)]) == 1
        assert "no source line: the graph has no frame outside torch for node" in capsys.readouterr().out


# -- commands of a CI's log -------------------------------------------------------------------------------------------


def test_no_line_of_the_output_is_a_command_of_the_log(saved: Path, here: Path, capsys: Capture) -> None:
    """GitHub runs a line that begins with ``::`` after its spaces, and ``##[...]`` anywhere; Azure ``##vso[...]``."""
    evil = (
        "::add-mask::x",
        "##[add-mask]x",
        "  ::error::x",
        "a ##vso[task.setvariable variable=x]y",
        "::stop-commands::z",
    )
    for number, text in enumerate(evil):
        target = f"::error::{number} ##[group].pt2"
        traced(saved, here / target, frame("/x/::error::a ##[add-mask]b.py", 6, text))
        for arguments in (
            [target],
            [target, "--format", "json"],
            [target, "--format", "sarif"],
            [target, "--format", "html"],
        ):
            assert main(["check", *arguments]) == 1
        assert main(["check", f"::missing{target}"]) == 2
        main(["scan", target, "--explain"])
        main(["scan", target, "--json"])
        main(["diff", str(saved), target])
        captured = capsys.readouterr()
        lines = (captured.out + captured.err).splitlines()
        assert [line for line in lines if line.lstrip().startswith("::") or "##[" in line or "##vso[" in line] == []
        assert main(["check", target]) == 1
        assert (text.strip().replace("::", "\\::", 1) if text.strip()[0] == ":" else "##\\") in capsys.readouterr().out


def test_json_with_commands_in_it_has_the_same_value(saved: Path, here: Path, capsys: Capture) -> None:
    target = traced(saved, here / "m.pt2", frame("/x/a.py", 6, "##[add-mask]##vso[x]#[y]"))
    assert main(["check", target, "--format", "json"]) == 1
    assert "##[add-mask]##vso[x]#[y]" in json.dumps(json.loads(capsys.readouterr().out))


# -- files, streams ---------------------------------------------------------------------------------------------------


def test_a_pipe_is_no_file(here: Path, capsys: Capture) -> None:
    os.mkfifo("pipe.pt2")
    os.mkfifo("pipe.lifted")
    for arguments in (
        ["check", "pipe.pt2"],
        ["check", "pipe.lifted"],
        ["scan", "pipe.pt2"],
        ["diff", "pipe.pt2", "pipe.pt2"],
    ):
        assert main(arguments) == 2
        assert "no regular file" in capsys.readouterr().err
    assert main(["check", "pipe.pt2", "--trust"]) == 2


def test_one_file_is_one_target(saved: Path, here: Path, capsys: Capture) -> None:
    (here / "m.pt2").write_bytes(saved.read_bytes())
    (here / "link.pt2").symlink_to("m.pt2")
    (here / "sub").mkdir()
    assert main(["check", "m.pt2", "./m.pt2", "sub/../m.pt2", str(here / "m.pt2"), "link.pt2", "*.pt2"]) == 1
    assert "1 finding in 1 target\n" in capsys.readouterr().err
    assert main(["check", "missing.pt2", "./missing.pt2"]) == 2
    assert "1 target not checked\n" in capsys.readouterr().err


NOISY = """
import ctypes, os, subprocess, sys
import torch

def make():
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run(["echo", "child"], check=True)
    ctypes.CDLL(None).puts(b"library")
    sys.__stdout__.write("original")
    return torch.export.load(sys.argv[-1])
"""


def _run(here: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "buffer_lifting", *arguments]
    return subprocess.run(command, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, **more)


def test_what_a_callable_writes_to_the_descriptor_is_not_in_the_document(saved: Path, here: Path) -> None:
    text = NOISY.replace("sys.argv[-1]", repr(str(saved)))
    (here / "noisy.py").write_text(text)
    done = _run(here, "check", "noisy:make", "--format", "sarif", capture_output=True)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["runs"][0]["results"]) == 1
    for noise in (b"python", b"descriptor", b"child", b"library", b"original"):
        assert noise in done.stderr


@pytest.mark.parametrize("format", ["text", "sarif"])
def test_a_reader_that_stops_early_changes_no_exit_code(format: str, saved: Path, here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = _run(here, "check", str(saved), "--format", format, stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"1 finding in 1 target" in done.stderr and b"BrokenPipe" not in done.stderr


# -- size of a page --------------------------------------------------------------------------------------------------


def test_a_page_of_many_reads_draws_some_and_says_so(
    saved: Path, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_section, "MAX_DRAWN", 2)
    targets = [f"m{number}.pt2" for number in range(4)]
    for target in targets:
        (here / target).write_bytes(saved.read_bytes())
    assert main(["check", *targets[:2], "--format", "html"]) == 1
    few = capsys.readouterr().out
    assert main(["check", *targets, "--format", "html"]) == 1
    many = capsys.readouterr().out
    assert "at most" not in few and few.count('<details class="read"') == 2
    assert many.count("A page draws 2 kinds of reads at most") == 2 and many.count('<details class="read"') == 4
    assert many.count("<svg") == few.count("<svg")
