"""The loss and gradients of context-parallel ranks are those of one process, however the labels are spread."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import token_loss_worker as worker
import torch

import buffer_lifting as bl

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-12  # float64


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks gave, for all cases."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(worker.__file__)), str(rank), str(directory)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(worker.WORLD)
    ]
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(worker.WORLD)]


def single(case: str) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one process on the whole batch: the mean over all valid labels."""
    model, (tokens, labels) = worker.build(), worker.data(case)
    halves = [model(half, bool(index)) for index, half in enumerate(tokens.chunk(worker.WORLD, 1))]
    loss = worker.mean(torch.cat(halves, 1), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def off(result: dict[str, Any], case: str) -> tuple[float, float]:
    """How far loss and the worst gradient are from one process's, relative to the largest gradient."""
    loss, expected = single(case)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    worst = 0.0
    for name, grad in expected.items():
        got = result["gradients"][name]
        grad = torch.zeros_like(got) if grad is None and got is not None else grad
        if grad is not None:
            assert got is not None, name
            worst = max(worst, float((got - grad).abs().max()) / largest)
    return abs(float(result["loss"] - loss)) / float(loss), worst


def test_the_labels_are_spread_unevenly() -> None:
    valid = worker.data("sum")[1] != worker.IGNORED
    counts = {int(part.sum()) for half in valid.chunk(2, 1) for part in half.chunk(2)}
    assert len(counts) > 2, "or the control would be right as well"


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", ["sum", "mean", "empty", "group", "fsdp"])
def test_loss_and_gradients_are_those_of_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    """With a DeviceMesh, a loss that is a mean already, a rank without labels, a process group, and under FSDP."""
    for result in ranks:
        loss_error, gradient_error = off(result[case], "empty" if case == "empty" else "sum")
        assert loss_error < TOLERANCE
        assert gradient_error < TOLERANCE
        assert result[case]["gradients"]["unused"] is None, "no rank has used it"
    for name, grad in ranks[0][case]["gradients"].items():
        other = ranks[1][case]["gradients"][name]
        assert (grad is None and other is None) or torch.equal(grad, other), "the ranks' optimizers would part ways"


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_means_of_the_ranks_averaged_are_another_loss(ranks: list[dict[str, Any]]) -> None:
    """The control: what a trainer does without it."""
    loss_error, gradient_error = off(ranks[0]["control"], "sum")
    assert loss_error > 1e-3
    assert gradient_error > 1e-2


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_fsdp_divides_by_its_ranks_unless_told(ranks: list[dict[str, Any]]) -> None:
    """The control: FSDP's default is a mean over its ranks, which is wrong by their number."""
    result = ranks[0]["fsdp that averages"]
    doubled = {name: None if grad is None else grad * worker.WORLD for name, grad in result["gradients"].items()}
    assert off(result, "sum")[1] > 0.1
    assert off({**result, "gradients": doubled}, "sum")[1] < TOLERANCE


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_no_label_at_all_is_an_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert all("all of them are -100" in result["nothing"] for result in ranks)


@pytest.mark.multiprocess
@pytest.mark.timeout(280)
def test_a_loss_in_the_graph() -> None:
    """transformers' own loss, which shifts its labels, on 2 stages x 2 context-parallel ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "loss_in_graph_worker.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=260,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gradients = re.findall(r"(\d+) gradients off by (\d\.\d+e[-+]\d+)", done.stdout)
    losses = re.findall(r"loss off by (\d\.\d+e[-+]\d+)", done.stdout)
    assert len(gradients) == 4 and len(losses) == 2
    assert all(int(count) > 5 and float(error) < 1e-5 for count, error in gradients)
    assert all(float(error) < 1e-6 for error in losses)


# one rank


def test_one_rank_needs_no_group() -> None:
    tokens, labels = worker.data("sum")
    model = worker.build()
    loss_fn = bl.TokenLoss(n_microbatches=2)
    loss_fn.begin(labels)
    losses = [loss_fn((model(x, False),), y) for x, y in zip(tokens.chunk(2), labels.chunk(2), strict=True)]
    loss_fn.reduce_gradients(model.parameters())
    assert torch.allclose(loss_fn.total(losses), worker.mean(model(tokens, False), labels).detach())


def test_another_ignore_index_counts() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    loss_fn = bl.TokenLoss(ignore_index=3)
    loss_fn.begin(labels)
    assert torch.allclose(loss_fn(logits, labels), worker.mean(logits[:, :3], labels[:, :3]))


def test_a_step_is_counted_anew() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[0, 1, 2, 3]])
    loss_fn = bl.TokenLoss()
    for target in (labels, labels.masked_fill(labels < 2, -100)):
        loss_fn.begin(target)
        assert torch.allclose(loss_fn(logits, target), worker.mean(logits, target))


def test_a_step_without_begin_is_refused() -> None:
    with pytest.raises(bl.FeedError, match="call it before the step"):
        bl.TokenLoss()(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(bl.FeedError, match="no target of the batch counts"):
        bl.TokenLoss().begin(torch.full((1, 2), -100))


def test_a_mean_over_nothing_is_refused() -> None:
    loss_fn = bl.TokenLoss(loss=worker.mean, reduction="mean")
    target = torch.tensor([[1, 1], [-100, -100]])
    loss_fn.begin(target)
    with pytest.raises(bl.FeedError, match="reduction='sum'"):
        loss_fn(torch.zeros(1, 2, 3), target[1:])


def test_another_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sum', 'mean', .*, not 'none'"):
        bl.TokenLoss(reduction="none")  # type: ignore[arg-type]
