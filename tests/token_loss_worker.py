"""One of two context-parallel ranks that share a batch: ``python token_loss_worker.py RANK DIRECTORY``.

There is no attention here, so half of the sequence is all that a rank needs. The parent imports this too: model and
data are the same on both sides.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORLD, MICROBATCHES, BATCH, SEQ, VOCAB = 2, 2, 4, 8, 11
IGNORED = -100


class Model(nn.Module):
    """Logits of each token alone; ``unused`` gets no gradient, ``head`` adds to the tokens of the second half only."""

    def __init__(self) -> None:
        super().__init__()
        self.uses_all = False  # FSDP wants the same gradients on every rank
        self.embedding = nn.Embedding(VOCAB, 6)
        self.out = nn.Linear(6, VOCAB)
        self.head = nn.Parameter(torch.linspace(-1, 1, VOCAB))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, tokens: Tensor, second_half: bool) -> Tensor:
        """Logits ``[batch, seq, VOCAB]``."""
        logits = self.out(self.embedding(tokens).tanh())
        if second_half:
            return logits + self.head
        return logits + 0 * self.head if self.uses_all else logits


def build() -> Model:
    """The same weights everywhere."""
    torch.manual_seed(0)
    return Model().double()


def data(case: str) -> tuple[Tensor, Tensor]:
    """``(tokens, labels)`` of the whole batch: ranks, samples and microbatches have different numbers of valid labels.

    In the case ``"empty"`` the first rank has none at all.
    """
    generator = torch.Generator().manual_seed(7)
    tokens, labels = (torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator) for _ in range(2))
    half = SEQ // WORLD
    labels[:, : half if case == "empty" else half - 1] = IGNORED
    labels[1, half - 1 :] = IGNORED if case != "empty" else labels[1, half - 1 :]
    labels[3, -2:] = IGNORED
    return tokens, labels


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model that computes its own loss returns."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def loss_of(case: str, group: Any) -> Any:
    """The loss function of a case."""
    import buffer_lifting as bl

    if case == "mean":
        return bl.TokenLoss(group, MICROBATCHES, mean, reduction="mean")
    return bl.TokenLoss(group, MICROBATCHES)


def train(case: str, rank: int, group: Any) -> dict[str, Any]:
    """A step as a schedule makes it: the gradients of all microbatches, divided by their number."""
    model, (tokens, labels) = build(), data(case)
    tokens, labels = (value.chunk(WORLD, 1)[rank] for value in (tokens, labels))
    parts = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES), strict=True))
    if case == "control":  # the mean of each rank and microbatch, averaged
        losses = [mean(model(x, rank == 1), y) for x, y in parts]
        torch.stack(losses).mean().backward()
        total = torch.stack(losses).mean().detach()
        torch.distributed.all_reduce(total)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / WORLD
            torch.distributed.all_reduce(parameter.grad)
        return {"loss": total / WORLD, "gradients": {name: p.grad for name, p in model.named_parameters()}}
    loss_fn = loss_of(case, group)
    loss_fn.begin(labels)
    losses = [loss_fn(model(x, rank == 1), y) for x, y in parts]
    for loss in losses:
        (loss / MICROBATCHES).backward()
    loss_fn.reduce_gradients(model.parameters())
    return {"loss": loss_fn.total(losses), "gradients": {name: p.grad for name, p in model.named_parameters()}}


def train_sharded(mesh: Any, factor: float | None) -> dict[str, Any]:
    """As :func:`train`, under FSDP: its reduction sums the gradients if it is told to divide them by 1."""
    from torch.distributed.fsdp import fully_shard

    rank = mesh.get_local_rank()
    model, (tokens, labels) = build(), data("sum")
    model.unused.requires_grad_(False)
    model.uses_all = True
    fully_shard(model, mesh=mesh)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
    tokens, labels = (value.chunk(WORLD, 1)[rank] for value in (tokens, labels))
    loss_fn = loss_of("sum", mesh)
    loss_fn.begin(labels)
    losses = []
    for x, y in zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES), strict=True):
        losses.append(loss_fn(model(x, rank == 1), y))
        (losses[-1] / MICROBATCHES).backward()
    grads = {name: p.grad.full_tensor() if p.grad is not None else None for name, p in model.named_parameters()}
    return {"loss": loss_fn.total(losses), "gradients": grads}


def nothing_counts(group: Any) -> str:
    """The error where no rank has a valid token: on both ranks, with no collective left open."""
    import buffer_lifting as bl

    try:
        bl.TokenLoss(group).begin(torch.full((2, 4), IGNORED))
    except bl.FeedError as error:
        return str(error)
    return ""


def main() -> None:
    """All cases, and what each gave."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{directory / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("cp",))
    result: dict[str, Any] = {"group": train("sum", rank, torch.distributed.group.WORLD)}
    for case in ("sum", "mean", "empty", "control"):
        result[case] = train(case, rank, mesh["cp"])
    result["fsdp"] = train_sharded(mesh["cp"], 1.0)
    result["fsdp that averages"] = train_sharded(mesh["cp"], None)
    result["nothing"] = nothing_counts(mesh["cp"])
    torch.save(result, directory / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
