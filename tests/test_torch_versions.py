"""The versions of torch are the same wherever they are said, and one command runs the tests on another one."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "torch-versions.yml").read_text())
JOB = WORKFLOW["jobs"]["tests"]
OLDEST, NEWEST, LAST = JOB["strategy"]["matrix"]["torch"]


def settings() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.read_string((ROOT / "setup.cfg").read_text())
    return parser


def minor(version: str) -> tuple[int, int]:
    major, second, *_ = version.split(".")
    return int(major), int(second)


def test_the_range_is_what_the_tests_run_on() -> None:
    """From the oldest of the weekly job, which is the one of constraints.txt, to before the one after the newest."""
    (torch_range,) = settings()["options"]["install_requires"].split()
    major, last = minor(NEWEST)
    assert torch_range == f"torch>={OLDEST.rpartition('.')[0]},<{major}.{last + 1}"
    assert f"torch=={OLDEST}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert OLDEST.endswith(".0") and minor(OLDEST) < minor(NEWEST) and LAST == "nightly"
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        assert OLDEST in text and NEWEST in text, name


def test_the_tests_run_inside_the_range_or_on_a_nightly_build() -> None:
    assert minor(OLDEST) <= minor(torch.__version__)
    assert minor(torch.__version__) <= minor(NEWEST) or "dev" in torch.__version__


def test_the_job_is_weekly_and_a_nightly_build_may_fail() -> None:
    (schedule,) = WORKFLOW[True]["schedule"]  # YAML reads the key "on" as true
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    assert JOB["continue-on-error"] == "${{ matrix.torch == 'nightly' }}" and JOB["strategy"]["fail-fast"] is False


def dry_run(arguments: list[str]) -> str:
    """What ``make`` would run, without what a ``make`` around the tests hands down."""
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "TORCH", "TORCH_ARGS", "PIP_ARGS", "PYTEST_ARGS"}
    env = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the Makefile depends on, and no environment."""
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "tools/requirements.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", [OLDEST, NEWEST, LAST])
def test_the_commands_of_the_job(version: str, clone: Path) -> None:
    """Each in an environment of that torch, with the index as an argument; nothing replaces that torch later."""
    environment = f".venv-test-torch-{version}"
    commands = [step["run"] for step in JOB["steps"] if "run" in step]
    assert [command.split()[:2] for command in commands] == [["make", "pytest"], ["make", "test-slow"]]
    for command in commands:
        assert command.split()[2:] == ['TORCH="$TORCH"', 'PIP_ARGS="--extra-index-url', '$INDEX"']
        made = dry_run([command.split()[1], f"TORCH={version}", "PIP_ARGS=--extra-index-url URL"])
        installs = [line for line in made.splitlines() if "pip install" in line]
        assert len(installs) == 4 and all("--extra-index-url URL" in line for line in installs)
        assert all(f"{environment}/bin/python" in line and " -c constraints.txt" not in line for line in installs)
        wanted = "torch" if version == LAST else f"torch=={version}"
        assert installs[0].split()[-1] == wanted and ("--pre" in installs[0]) == (version == LAST)
        assert sum("--no-deps -e ." in line for line in installs) == 1
        assert made.splitlines()[-1].startswith(f"OMP_NUM_THREADS=1 {environment}/bin/python -m pytest")


def test_without_another_torch_the_constraints_hold(clone: Path) -> None:
    made = dry_run(["pytest"])
    assert ".venv-test/bin/python -m pytest" in made and made.count("-c constraints.txt") == 3
    assert "torch-" not in made and "requirements.txt" not in made


def test_what_the_extras_ask_for() -> None:
    """Every requirement of the extras, those of an extra in an extra as well, and neither torch nor the project."""
    spec = importlib.util.spec_from_file_location("requirements_tool", ROOT / "tools" / "requirements.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    extras = settings()["options.extras_require"]
    listed = {line for name in ("models", "catalog", "test", "dev") for line in extras[name].split("\n") if line}
    found = tool.requirements("test,dev")
    assert set(found) == {line for line in listed if not line.startswith("buffer_lifting")} and len(found) > 10
    assert not any(re.match(r"torch\b", line) for line in found)
    with pytest.raises(KeyError):
        tool.requirements("other")
