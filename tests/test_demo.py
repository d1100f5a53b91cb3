"""The demo: it passes, and it can fail."""

from __future__ import annotations

import builtins
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from buffer_lifting import demo
from buffer_lifting.demo import data
from buffer_lifting.demo.compare import Row, judge, worst_error
from buffer_lifting.program import VerifyReport

ROOT = Path(__file__).resolve().parents[1]
GOOD = Row(0, 5.0, 5.0, 5.1, 1e-6, "weight", 0.5)


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_the_demo_passes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "buffer_lifting", "demo", "--steps", "2", "--layers", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 2 steps" in done.stdout
    assert "modeling_llama.py:" in done.stdout
    assert "x2 layers" in done.stdout
    assert "ok   composition" in done.stdout
    assert "Warning" not in done.stderr
    assert all(line.startswith("[") for line in done.stderr.splitlines()), "progress alone"


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_a_sabotaged_lift_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages that compute with other rotary values than the model, which nothing has verified."""
    from buffer_lifting.demo import model

    make_stages = model.make_stages

    def sabotaged(program: Any) -> Any:
        staged = make_stages(program)
        graph = staged.stages[1].module.graph
        node = next(n for n in graph.nodes if n.name.startswith("lifted_model_rotary_emb_inv_freq"))
        users = list(node.users)
        with graph.inserting_before(users[0]):
            wrong = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.99))
        for user in users:
            user.replace_input_with(node, wrong)
        staged.stages[1].module.recompile()
        return staged

    monkeypatch.setattr(model, "make_stages", sabotaged)
    monkeypatch.setattr("buffer_lifting.verification.verify", lambda *_, **__: VerifyReport(()))
    assert demo.run(steps=1, layers=2, seed=0) == 1
    out = capsys.readouterr().out
    assert out.rstrip().endswith("FAIL")
    assert "is off by" in out


@pytest.mark.multiprocess
@pytest.mark.timeout(100)
def test_a_failing_rank_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    from buffer_lifting.demo.model import build_model

    class Nothing:
        def save(self, directory: Path) -> None:
            """Leaves nothing for the ranks."""

    began = time.monotonic()
    with pytest.raises(demo.DemoError, match=r"rank . failed: .*Error"):
        demo.train(lambda text: None, build_model(1, 0), Nothing(), 1, 0, 60.0)
    assert time.monotonic() - began < 50
    assert "--- rank" in capsys.readouterr().err


def test_the_text_is_real_and_each_step_has_its_own() -> None:
    tokens, labels = data.batch(0, seed=0)
    assert tokens.shape == labels.shape == (data.BATCH, data.SEQ)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    again, other = data.batch(0, seed=0)[0], data.batch(1, seed=0)[0]
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    order = data.order(0, seed=0)
    assert torch.equal(order.sort(1).values, torch.arange(data.SEQ).expand(data.BATCH, -1))
    assert not torch.equal(order[0], order[1])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert demo.run(steps=1) == 2
    captured = capsys.readouterr()
    assert "pip install buffer_lifting[cli]" in captured.err
    assert captured.out == ""


# the comparison


def test_gradients_are_measured_by_parameter() -> None:
    expected = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
    assert worst_error(expected, {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])})[0] == 0.0
    error, where = worst_error(expected, {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.6])})
    assert where == "b"
    assert error == pytest.approx(0.2)


def test_a_gradient_of_nearly_zero_is_measured_by_the_largest() -> None:
    expected = {"a": torch.tensor([1.0]), "zero": torch.tensor([0.0])}
    error, where = worst_error(expected, {"a": torch.tensor([1.0]), "zero": torch.tensor([1e-10])})
    assert where == "zero"
    assert error == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "got",
    [
        {},
        {"a": None},
        {"a": torch.ones(3)},
        {"a": torch.tensor([1.0, math.nan])},
        {"a": torch.ones(2), "more": torch.ones(1)},
    ],
)
def test_gradients_that_cannot_be_compared_are_wrong(got: dict[str, torch.Tensor | None]) -> None:
    assert worst_error({"a": torch.ones(2)}, got)[0] == math.inf


def test_a_good_run_passes() -> None:
    assert judge([GOOD], 1) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(GOOD, pipeline=5.001), "losses differ"),
        (replace(GOOD, pipeline=math.nan), "losses differ"),
        (replace(GOOD, error=2e-5), "gradient of weight is off by 2.0e-05"),
        (replace(GOOD, error=math.nan), "gradient of weight"),
        (replace(GOOD, control_error=1e-6), "proves nothing"),
    ],
)
def test_a_bad_row_fails(row: Row, message: str) -> None:
    (wrong,) = judge([row], 1)
    assert message in wrong


def test_missing_steps_fail() -> None:
    assert judge([GOOD], 2) == ["1 of 2 steps ran"]
    assert judge([], 1)
