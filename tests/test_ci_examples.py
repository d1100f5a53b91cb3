"""What the documents give to copy into a CI: each file is parsed, and its commands run on an example repository."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import buffer_lifting as bl
from buffer_lifting.cli import make_parser

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "ci"
EXPORT = """\
import pathlib, shutil

pathlib.Path("exports").mkdir(exist_ok=True)
shutil.copy("{source}", "exports/model.pt2")
shutil.copy("{source}", "exports/other.pt2")
"""


class Model(torch.nn.Module):
    """Reads a table by position; ``mixing`` is the change of a pull request."""

    def __init__(self, mixing: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(61, 8)
        self.register_buffer("table", torch.randn(64, 8))
        self.mixing = mixing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.table[: tokens.shape[1]]
        return torch.cumsum(x, 1) if self.mixing else x


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base.pt2`` and ``head.pt2``, and ``clean.lifted``."""
    directory = tmp_path_factory.mktemp("made")
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    for name, mixing in (("base", False), ("head", True)):
        example = (torch.zeros(3, 11, dtype=torch.long),)
        program = torch.export.export(Model(mixing), example, dynamic_shapes=(dims,))
        torch.export.save(program, directory / f"{name}.pt2")
        if not mixing:
            bl.lift(program).save(directory / "clean.lifted")
    return directory


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    """A clone whose branch has another export than ``origin/main``, and the command on the PATH."""
    repository = tmp_path / "clone"
    (repository / "tools").mkdir(parents=True)
    script = tmp_path / "bin" / "buffer-lifting"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m buffer_lifting "$@"\n')
    script.chmod(0o755)
    (script.parent / "python").symlink_to(sys.executable)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q", "-b", "main", "."], cwd=repository, check=True)
    for branch, name in (("origin/main", "base"), ("change", "head")):
        (repository / "tools" / "export.py").write_text(EXPORT.format(source=made / f"{name}.pt2"))
        subprocess.run([*git, "add", "-A"], cwd=repository, check=True)
        subprocess.run([*git, "commit", "-qm", name], cwd=repository, check=True)
        if branch == "origin/main":
            subprocess.run([*git, "update-ref", "refs/remotes/origin/main", "HEAD"], cwd=repository, check=True)
    return repository


def shell(command: str, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a step as GitHub does (``bash -e``), with the command on the PATH and no torch asked for."""
    path = os.pathsep.join([str(directory.parent / "bin"), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=directory,
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def is_subcommand(command: str) -> None:
    """Every ``buffer-lifting ...`` of a script is a command with arguments that exist."""
    found = re.findall(r"buffer-lifting (check|diff|scan|rule) ([^\n|>]*)", command)
    assert found or "buffer-lifting" not in command.replace("buffer-lifting.sarif", "")
    for name, rest in found:
        arguments = [word for word in shlex.split(rest) if word not in ("2", "&&", "||")]
        make_parser().parse_args([name, *arguments])


# GitHub Actions


def workflow() -> dict[str, Any]:
    """The example; YAML 1.1 reads its ``on`` as true."""
    document: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    document["on"] = document.pop(True)
    return document


def test_the_workflow_is_one() -> None:
    document = workflow()
    assert set(document) == {"name", "on", "permissions", "env", "jobs"}
    assert document["permissions"]["security-events"] == "write"
    (job,) = document["jobs"].values()
    assert set(job) == {"runs-on", "steps"}
    for step in job["steps"]:
        assert set(step) <= {"name", "if", "run", "uses", "with"} and ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", step["uses"])
        elif "buffer-lifting" in step["run"]:
            is_subcommand(step["run"])
    uploads = [step for step in job["steps"] if "upload-sarif" in step.get("uses", "")]
    assert uploads[0]["with"]["sarif_file"] == "buffer-lifting.sarif"


def test_the_steps_of_the_workflow_run(repository: Path) -> None:
    """All but the installation: what each prints, and its exit code."""
    document = workflow()
    (job,) = document["jobs"].values()
    scripts = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    summary = repository / "summary"
    variables = {**document["env"], "GITHUB_BASE_REF": "main", "GITHUB_STEP_SUMMARY": str(summary)}
    done = {
        name: shell(script, repository, **variables)
        for name, script in scripts.items()
        if not script.startswith("pip install")
    }
    codes = [result.returncode for result in done.values()]
    assert codes == [0, 1, 0, 0], [result.stderr for result in done.values()]
    annotations = done["Check, with annotations on the changed lines"].stdout.splitlines()
    assert sum("title=BL201" in line for line in annotations) == 2, "a finding of each file"
    log = json.loads((repository / "buffer-lifting.sarif").read_text())
    assert {item["ruleId"] for item in log["runs"][0]["results"]} == {"BL001", "BL201"}
    assert summary.read_text().count("+ aten.cumsum.default: code BL201") == 2


# pre-commit


def test_the_hooks_of_pre_commit(repository: Path, made: Path) -> None:
    """The manifest, and each hook as pre-commit runs it: the entry, then the staged files that its pattern matches."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert [hook["id"] for hook in hooks] == ["buffer-lifting-check", "buffer-lifting-check-installed"]
    for name in ("base.pt2", "head.pt2", "clean.lifted"):
        shutil.copy(made / name, repository / name)
    for hook in hooks:
        assert {"id", "name", "entry", "language", "files"} <= set(hook)
        assert hook["language"] in ("python", "system")
        staged = ["README.md", "base.pt2", "clean.lifted", "pt2.txt"]
        files = [name for name in staged if re.search(hook["files"], name)]
        assert files == ["base.pt2", "clean.lifted"]
        found = shell(shlex.join([*shlex.split(hook["entry"]), *files]), repository)
        assert found.returncode == 1 and "BL001 buffer 'table'" in found.stdout, found.stderr
        clean = shell(shlex.join([*shlex.split(hook["entry"]), "clean.lifted"]), repository)
        assert (clean.returncode, clean.stdout) == (0, ""), clean.stderr


# Other CI


def test_the_recipe_for_other_ci(repository: Path, made: Path) -> None:
    """New findings fail, known ones do not, a broken file is told apart; the report is there each time."""
    for name in ("base.pt2", "head.pt2"):
        shutil.copy(made / name, repository / name)
    (repository / "broken.pt2").write_bytes(b"no zip")
    shutil.copy(EXAMPLES / "check.sh", repository)
    report = repository / "buffer-lifting.sarif"

    def check(target: str) -> tuple[int, str, dict[str, Any]]:
        report.unlink(missing_ok=True)
        done = shell(f"sh check.sh {target}", repository)
        run: dict[str, Any] = json.loads(report.read_text())["runs"][0]
        return done.returncode, done.stdout, run

    code, text, run = check("'ba*.pt2'")
    assert code == 1 and "BL001 buffer 'table'" in text and len(run["results"]) == 1
    baseline = "buffer-lifting check base.pt2 --baseline buffer-lifting-baseline.json --update-baseline"
    assert shell(baseline, repository).returncode == 0
    code, text, run = check("base.pt2")
    assert code == 0 and text == "" and run["results"][0]["suppressions"]
    code, text, run = check("base.pt2 head.pt2")
    assert code == 1 and "BL201" in text and "BL001" in text, "the entry is of another target"
    code, text, run = check("broken.pt2")
    assert code == 2 and run["invocations"][0]["executionSuccessful"] is False


def test_the_gitlab_example(repository: Path, made: Path) -> None:
    job = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())["positions"]
    assert job["artifacts"]["paths"] == ["buffer-lifting.sarif"]
    shutil.copy(EXAMPLES / "check.sh", repository)
    script = [line for line in job["script"] if not line.startswith("pip install")]
    assert len(script) == len(job["script"]) - 1
    done = shell("\n".join(script), repository, **job["variables"])
    assert done.returncode == 1 and "BL201" in done.stdout, done.stderr
    assert (repository / "buffer-lifting.sarif").is_file()


def test_the_golden_test_passes_as_it_is(tmp_path: Path) -> None:
    """The example of the pytest plugin, with its snapshot written and then compared."""
    shutil.copy(EXAMPLES / "test_positions.py", tmp_path)
    plugin = "buffer_lifting.pytest_plugin"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import importlib.metadata, sys, pytest\n"
        "entries = importlib.metadata.entry_points(group='pytest11')\n"
        f"load = [] if any(e.name == 'buffer_lifting' for e in entries) else ['-p', '{plugin}']\n"
        "one = pytest.main([*load, '-q', 'test_positions.py', '--buffer-lifting-update'])\n"
        "sys.exit(one or pytest.main([*load, '-q', 'test_positions.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "snapshots" / "test_positions" / "test_positions.txt").is_file()


# The document


def test_commands_of_the_documents_exist() -> None:
    """Every command in the shell blocks parses; every file that is linked is there."""
    for name in ("CI.md", "CHECK.md"):
        text = (ROOT / "docs" / name).read_text()
        blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
        lines = [line.split(" #")[0] for line in blocks.splitlines() if line.startswith("buffer-lifting ")]
        assert lines
        for line in lines:
            make_parser().parse_args(shlex.split(line.split(" > ")[0])[1:])
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (ROOT / "docs" / link).exists(), link
