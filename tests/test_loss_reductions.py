"""Losses that a model computes itself, through ``TokenLoss.of`` as a training step uses it: ranks x microbatches.

Each rank is a thread with a copy of the stage; the collectives of ``TokenLoss`` add up over the threads. The models
have no attention, so that the stages need none. Loss and every gradient against one process, in float64.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

VOCAB, BATCH, SEQ, RANKS, MICROBATCHES = 13, 4, 12, 2, 2
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Tokens with learned positions; ``compute`` makes the loss of logits, labels and a number."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.embed = nn.Embedding(VOCAB, 6)
        self.head = nn.Linear(6, VOCAB)
        self.table = nn.Parameter(torch.randn(64, 6))

    def forward(self, ids: Tensor, labels: Tensor, number: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.table[: ids.shape[1]]
        return self.compute(self.head(hidden.tanh()), labels, number)


def entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def total(logits: Tensor, labels: Tensor) -> Tensor:
    return entropy(logits, labels, reduction="sum")


def made(compute: Compute) -> tuple[Model, dict[str, Tensor], Any]:
    """The model, its whole inputs, and its exported program."""
    torch.manual_seed(0)
    model = Model(compute).double()
    ids, labels = (torch.randint(1, VOCAB, (BATCH, SEQ)) for _ in range(2))
    labels[0, 1:] = -100
    labels[0, 6:8], labels[2, 3:9], labels[3, 8:] = 2, -100, -100
    inputs = {"ids": ids, "labels": labels, "number": torch.tensor(7.0, dtype=torch.float64)}
    dims = {0: Dim.AUTO, 1: Dim.AUTO}
    return model, inputs, export(model, (), inputs, dynamic_shapes={"ids": dims, "labels": dims, "number": None})


LOSSES: dict[str, tuple[str, str | None, int, Compute]] = {
    "mean": ("mean", "labels", -100, lambda z, y, n: entropy(z, y)),
    "mean, transposed": ("mean", "labels", -100, lambda z, y, n: F.cross_entropy(z.transpose(1, 2), y)),
    "smoothed": ("mean", "labels", -100, lambda z, y, n: entropy(z, y, label_smoothing=0.1)),
    "by a mask": ("mean", "labels", 2, lambda z, y, n: (z.logsumexp(-1) * (y != 2)).sum() / (y != 2).sum()),
    "half": ("mean", "labels", -100, lambda z, y, n: 0.5 * entropy(z, y)),
    "times the length": ("mean", "labels", -100, lambda z, y, n: entropy(z, y) * z.shape[1]),
    "over valid": ("mean", "labels", -100, lambda z, y, n: total(z, y) / (y != -100).sum()),
    "over valid, clamped": ("mean", "labels", -100, lambda z, y, n: total(z, y) / (y != -100).sum().clamp(min=1)),
    "shifted": ("mean", "lifted_labels", -100, lambda z, y, n: entropy(z[:, :-1], y[:, 1:].contiguous())),
    "shifted over unshifted": (
        "mean",
        "labels",
        -100,
        lambda z, y, n: entropy(z[:, :-1], y[:, 1:].contiguous(), reduction="sum") / (y != -100).sum(),
    ),
    "mean of all": ("mean_all", None, -100, lambda z, y, n: entropy(z, y, reduction="none").mean()),
    "squares": ("mean_all", None, -100, lambda z, y, n: F.mse_loss(z[..., 0], y.double())),
    "sum": ("total", None, -100, lambda z, y, n: total(z, y)),
    "over a number": ("total", None, -100, lambda z, y, n: total(z, y) / n),
    "over a constant": ("total", None, -100, lambda z, y, n: total(z, y) / 1000),
    "over the length": ("total", None, -100, lambda z, y, n: total(z, y) / y.shape[1]),
    "two sums": ("total", None, -100, lambda z, y, n: total(z, y) + 0.1 * z.logsumexp(-1).pow(2).sum()),
    "over the samples": ("mean_samples", None, -100, lambda z, y, n: total(z, y) / y.shape[0]),
}


class Ranks:
    """The collectives of torch.distributed over the threads of a pool."""

    def __init__(self, size: int) -> None:
        self.size, self.mine = size, threading.local()
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def all_reduce(self, value: Tensor, op: Any = None, group: Any = None) -> None:
        self.slots[self.mine.rank] = value.clone()
        self.barrier.wait()
        parts = torch.stack(self.slots)
        self.barrier.wait()
        value.copy_(parts.amax(0) if op == torch.distributed.ReduceOp.MAX else parts.sum(0))

    def run(self, step: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            self.mine.rank = rank
            return step(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def train(staged: Any, inputs: dict[str, Tensor], ranks: Ranks, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of one rank as a schedule makes it: loss of the whole batch, and the summed gradients."""
    order = torch.stack([torch.randperm(SEQ, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    where = {"order": order, "shard": (rank, RANKS)}
    tokens = {name: value for name, value in inputs.items() if name != "number"}
    values = {**staged.shard_inputs(**where, **tokens), **staged.feed(BATCH, SEQ, inputs=tokens, **where)}
    module = copy.deepcopy(staged.stages[0].module)
    loss_fn = bl.TokenLoss.of(staged, "group", MICROBATCHES)
    target = values[loss_fn.target or "ids"]
    loss_fn.begin(target)
    losses = []
    for index, part in enumerate(target.chunk(MICROBATCHES)):
        chunk = {name: value.chunk(MICROBATCHES)[index] for name, value in values.items()}
        losses.append(loss_fn(module(**chunk, number=inputs["number"]), part))
        (losses[-1] / MICROBATCHES).backward()
    loss_fn.reduce_gradients(module.parameters())
    return loss_fn.total(losses), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_the_whole_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reduction, target, ignored, compute = LOSSES[name]
    model, inputs, program = made(compute)
    cp = bl.context_parallel(bl.lift(program), size=RANKS)
    assert cp.losses == (bl.LossReduction(0, cp.losses[0].node, reduction, target, ignored),)  # type: ignore[arg-type]
    staged = bl.partition(cp, num_stages=1)
    expected = model(**inputs)
    expected.backward()
    ranks = Ranks(RANKS)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: RANKS)
    for loss, gradients in ranks.run(lambda rank: train(staged, inputs, ranks, rank)):
        assert torch.allclose(loss, expected.detach(), rtol=1e-12)
        assert gradients.keys() == {name for name, _ in model.named_parameters()}
        for fqn, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(gradients[fqn], parameter.grad, rtol=1e-9, atol=1e-12), fqn


@pytest.mark.parametrize("name", ["mean", "over valid", "mean of all", "over the length", "over the samples"])
def test_verify_adds_up_in_the_same_way(name: str) -> None:
    _, _, program = made(LOSSES[name][-1])
    cp = bl.context_parallel(bl.lift(program), size=RANKS)
    assert bl.verify(program, cp).passed


#: What no reduction says: refused on several ranks, with the node, its line and a hint.
REFUSED: dict[str, tuple[str, Compute]] = {
    "computed targets": ("targets that the model computes", lambda z, y, n: entropy(z, y.clamp(min=0), ignore_index=0)),
    "mean over valid and samples": ("differs between", lambda z, y, n: entropy(z, y) * z.shape[0]),
    "root of the samples": ("differs between", lambda z, y, n: total(z, y) / z.shape[0] ** 0.5),
    "another comparison": ("cannot count", lambda z, y, n: total(z, y) / (y >= 0).sum()),
    "weights": ("cannot count", lambda z, y, n: total(z, y) / (y.double() * 0.5).sum()),
    "more than one at least": ("cannot count", lambda z, y, n: total(z, y) / (y != -100).sum().clamp(min=9)),
    "a mean over valid": ("cannot count", lambda z, y, n: entropy(z, y) / (y != -100).sum()),
    "sums of other shares": ("count other things", lambda z, y, n: total(z, y) + z.pow(2).sum() / z.shape[0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_losses_are_refused(name: str) -> None:
    why, compute = REFUSED[name]
    lifted = bl.lift(made(compute)[2])
    with pytest.raises(bl.UnsupportedReadError, match=rf"BL203 node.*{why}.*test_loss_reductions.py:\d+\] ->"):
        bl.context_parallel(lifted, size=RANKS)


def test_a_program_without_a_loss_has_no_loss_function() -> None:
    cp = bl.context_parallel(bl.lift(made(lambda z, y, n: z)[2]), size=RANKS)
    assert cp.losses == ()
    with pytest.raises(bl.FeedError, match="known losses: none"):
        bl.TokenLoss.of(cp)


def test_a_count_without_targets_is_refused() -> None:
    with pytest.raises(bl.FeedError, match="give begin\\(\\) its targets"):
        bl.TokenLoss().begin()
