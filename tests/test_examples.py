"""The example under torchrun: packed documents, a checkpoint, and a run that goes on from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import train_pp_cp as example  # noqa: E402

STEPS, SAVED = 4, 2

pytestmark = pytest.mark.multiprocess


def torchrun(processes: int, *arguments: str) -> dict[int, float]:
    """The losses that a run of the example prints, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "examples/train_pp_cp.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([0-9.]+)", done.stdout)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Path]:
    """The losses of a run that is not interrupted, and the checkpoint that it wrote on the way."""
    directory = tmp_path_factory.mktemp("checkpoint")
    losses = torchrun(4, "--steps", str(STEPS), "--checkpoint", str(directory), "--save-at", str(SAVED))
    return losses, directory


def single(step: int, state: dict[str, Any] | None) -> float:
    """The loss of transformers' own model in one process on a step's documents."""
    model = example.build_model()
    if state is not None:
        model.load_state_dict(state)
    tokens, labels, positions, _ = example.packed_documents(step)
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.timeout(300)
def test_it_trains(run: tuple[dict[int, float], Path]) -> None:
    losses, _ = run
    assert list(losses) == list(range(STEPS))
    assert losses[STEPS - 1] < losses[0]
    assert losses[0] == pytest.approx(single(0, None), rel=1e-5)


@pytest.mark.timeout(300)
def test_the_checkpoint_is_that_of_the_original_model(run: tuple[dict[int, float], Path]) -> None:
    """It has every name of the model that was exported, and the model computes the loss of the next step."""
    losses, directory = run
    state = {name: torch.full_like(value, torch.nan) for name, value in example.build_model().state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=directory)
    assert single(SAVED, state) == pytest.approx(losses[SAVED], rel=1e-5)
    assert single(SAVED, None) != pytest.approx(losses[SAVED], rel=1e-3), "the untrained model gives another loss"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(run: tuple[dict[int, float], Path]) -> None:
    losses, directory = run
    resumed = torchrun(4, "--steps", str(STEPS), "--checkpoint", str(directory), "--resume", str(SAVED))
    assert resumed == {step: losses[step] for step in range(SAVED, STEPS)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_two_processes_it_is_a_pipeline_alone(run: tuple[dict[int, float], Path]) -> None:
    losses, _ = run
    assert torchrun(2, "--steps", "2") == pytest.approx({step: losses[step] for step in range(2)}, rel=1e-5)


def test_documents_are_of_unequal_length_and_cross_the_shards() -> None:
    _, labels, positions, lengths = example.packed_documents(0)
    half = example.LENGTH // 2
    assert len({tuple(own) for own in lengths}) == example.BATCH
    assert bool((positions[:, half] != 0).any()), "a document goes on from one half of its sample to the other"
    assert bool((labels == -100).any()) and len(set((labels != -100).sum(1).tolist())) > 1
