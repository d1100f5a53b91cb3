"""The bars of speed: CPU seconds of whole commands in fresh processes, the best of a few runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from archive_models import export_model

from benchmarks import models

ROOT = Path(__file__).resolve().parents[1]
START = 0.3  # CPU seconds
SHARE = 0.2  # of torch.export.load
COMMAND = """
import sys, time
from buffer_lifting.cli import main
code = main(sys.argv[1:])
print("seconds", time.process_time(), file=sys.stderr)
assert not {"torch", "numpy", "sympy"} & set(sys.modules), "a slow import"
sys.exit(code)
"""
LOAD = """
import sys, time
import torch
start = time.process_time()
torch.export.load(sys.argv[1])
print("seconds", time.process_time() - start, file=sys.stderr)
"""


def cpu_seconds(script: str, *args: str, code: int = 0) -> float:
    """What the process itself reports: the start of Python is in it, torch's import is not in ``LOAD``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("seconds ")]
    return float(line.split()[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a small program."""
    path = tmp_path_factory.mktemp("speed") / "model.pt2"
    torch.export.save(export_model("modes"), path)
    return str(path)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["check", "--help"], 0),
        (["rule", "BL001"], 0),
        (["rule", "--all"], 0),
        (["check", "FILE", "--exit-zero"], 0),
        (["check", "FILE", "--exit-zero", "--format", "sarif"], 0),
        (["diff", "FILE", "FILE"], 0),
        (["lift", "FILE", "-o", "x.lifted"], 2),
    ],
)
def test_commands_start_within_the_bar(args: list[str], code: int, small: str) -> None:
    args = [small if arg == "FILE" else arg for arg in args]
    seconds: list[float] = []
    while len(seconds) < 8 and min(seconds, default=START) >= START:  # a busy machine inflates CPU seconds too
        seconds.append(cpu_seconds(COMMAND, *args, code=code))
    assert min(seconds) < START, seconds


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dynamic", [True, False])
def test_126_layers_are_checked_in_a_fifth_of_the_time_of_loading(dynamic: bool, tmp_path: Path) -> None:
    """The whole command, Python's start included, against ``torch.export.load`` without the import of torch."""
    path = tmp_path / "model.pt2"
    shapes = models.dynamic_shapes() if dynamic else None
    program = torch.export.export(models.build(126), (models.tokens(),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    ours = min(cpu_seconds(COMMAND, "check", str(path), code=1) for _ in range(2))
    theirs = cpu_seconds(LOAD, str(path))
    print(json.dumps({"check": ours, "torch.export.load": theirs, "share": ours / theirs}))
    assert ours < SHARE * theirs
