"""Values made from the sequence length or from all rows of a table: the same at every position, another on a shard.

The models have no attention, so that a rank needs nothing of another: both are run, and compared with the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

BATCH, SEQ, WIDTH = 3, 12, 8


class Model(nn.Module):
    """``use(x, c, p)`` between embedding and projection; ``c``, ``p`` are S rows of a buffer and of a parameter."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, WIDTH)
        self.register_buffer("c", torch.randn(32, WIDTH))
        self.p = nn.Parameter(torch.randn(32, WIDTH))
        self.head = nn.Linear(WIDTH, 5)
        self.use = use

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return self.head(self.use(self.embed(ids), self.c[:length], self.p[:length]))


def program(use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    ids = torch.randint(3, 23, (BATCH, SEQ))
    return export(Model(use).double(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def distance(x: Tensor) -> Tensor:
    return (index(x)[:, None] - index(x)).double()


#: What is one read.
LIFTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full_like": lambda x, c, p: x + torch.full_like(x, x.shape[1]),
    "full_like of a part": lambda x, c, p: x * torch.full_like(x[..., :1], 1 / x.shape[1]),
    "filled": lambda x, c, p: x + torch.empty_like(x).fill_(x.shape[1]),
    "added to zeros": lambda x, c, p: x + torch.zeros_like(x).add(x.shape[1]),
    "ones / S": lambda x, c, p: x + torch.ones_like(x) / x.shape[1],
    "clamp": lambda x, c, p: x.clamp(max=x.shape[1] / 30),
    "last row": lambda x, c, p: x + c[-1],
    "last row, kept": lambda x, c, p: x + c[-1:],
    "last row of a parameter": lambda x, c, p: x + p[-1],
    "last row but one": lambda x, c, p: x + c[:-1][-1],
    "last index": lambda x, c, p: x + index(x)[-1],
    "last element": lambda x, c, p: x + c.reshape(-1)[-WIDTH:],
    "first row of a flip": lambda x, c, p: x + c.flip(0)[0],
    "first row of a roll": lambda x, c, p: x + c.roll(1, 0)[0],
    "first of a countdown": lambda x, c, p: x + torch.arange(x.shape[1] - 1, -1, -1)[0],
    "S - 1 - first": lambda x, c, p: x + (x.shape[1] - 1 - index(x))[0],
    "last of a sum": lambda x, c, p: x + torch.ones(x.shape[1]).cumsum(0)[-1],
    "last row of a matrix": lambda x, c, p: x * distance(x)[-1][:, None],
    "last column of a matrix": lambda x, c, p: x * distance(x)[:, -1][:, None],
    "sum": lambda x, c, p: x + c.sum(0),
    "sum by einsum": lambda x, c, p: x + torch.einsum("sd->d", c),
    "sum by a product": lambda x, c, p: x + (torch.ones(8, x.shape[1]).double() @ c)[0],
    "trace": lambda x, c, p: x + torch.trace(torch.eye(x.shape[1])),
    "number of elements": lambda x, c, p: x + c.numel(),
    "smoothed table": lambda x, c, p: x + (-distance(x).abs()).softmax(-1) @ c,
    "smoothed parameter": lambda x, c, p: x + (-distance(x).abs()).softmax(-1) @ p,
    "parameter summed by einsum": lambda x, c, p: x + torch.einsum("st,td->sd", distance(x), p),
}
#: What is no read: parts that every shard has.
PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "first row": lambda x, c, p: x + c[0],
    "first row, kept": lambda x, c, p: x + c[:1],
    "second row of a part": lambda x, c, p: x + c[1:][0],
    "first index": lambda x, c, p: x + (2 * index(x) + 3)[0],
    "element of a fill": lambda x, c, p: x + torch.ones(x.shape[1], x.shape[1])[:1, :1],
    "element of a fill, spread": lambda x, c, p: x + torch.ones_like(c)[:1, :1].expand(x.shape[1], x.shape[2]),
}
#: What is refused, and why.
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "largest row": (lambda x, c, p: x + c.max(0).values, "a result of aten.max.dim is not known to be local"),
    "middle row": (lambda x, c, p: x + c.median(0).values, "a result of aten.median.dim is not known to be local"),
    "largest index": (lambda x, c, p: x + index(x).topk(1).values, "a result of aten.topk.default"),
    "spread": (lambda x, c, p: x + c.std(0), "aten.std.dim is not known to be local"),
}


@pytest.mark.parametrize("name", [*LIFTED, *PLAIN])
def test_each_shard_has_the_rows_of_the_original(name: str) -> None:
    exported = program({**LIFTED, **PLAIN}[name])
    assert len(bl.scan(exported).reads) == (name in LIFTED)
    lifted = bl.context_parallel(bl.lift(exported), size=2)
    assert not bl.check(lifted)
    (ids,), _ = exported.example_inputs
    whole, parts = exported.module()(ids), []
    for rank in range(2):
        own = lifted.shard_inputs(shard=(rank, 2), ids=ids)
        parts.append(lifted.program.module()(own["ids"], **lifted.feed(BATCH, SEQ, shard=(rank, 2))))
    assert torch.equal(torch.cat(parts, 1), whole) or F.mse_loss(torch.cat(parts, 1), whole) < 1e-20
    assert bl.verify(exported, lifted).passed


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_of_whole_sequences_is_refused(name: str) -> None:
    use, why = REFUSED[name]
    with pytest.raises(bl.UnsupportedReadError, match=rf"BL105 node 'add\w*'.*{why}.*test_length_reads.py:\d+\] ->"):
        bl.lift(program(use))


class Returns(nn.Module):
    """Returns a length beside its logits."""

    def __init__(self, length: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.length = nn.Embedding(23, WIDTH), length

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self.embed(ids), self.length(ids)


@pytest.mark.parametrize(
    "length", [lambda ids: ids.shape[1] * 2, lambda ids: torch.scalar_tensor(ids.shape[1])], ids=["number", "tensor"]
)
def test_a_returned_length_is_refused(length: Callable[[Tensor], Any]) -> None:
    ids = torch.randint(3, 23, (BATCH, SEQ))
    exported = export(Returns(length), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    with pytest.raises(bl.UnsupportedReadError, match=r"BL104 node 'output'.*made from the sequence length"):
        bl.lift(exported)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "of_all", [lambda ids: ids[0], lambda ids: ids.amax(0), lambda ids: (ids[0] != 0).cumsum(0) - 1], ids=range(3)
)
def test_a_lookup_for_all_samples_at_once_is_refused(of_all: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    """Lifting makes a value of each sample of it, for which the looked up rows have no place."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(23, WIDTH), nn.Embedding(32, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids) + self.positions(of_all(ids))

    ids = torch.randint(3, 23, (BATCH, SEQ))
    exported = export(Shared(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None)
    with pytest.raises(bl.UnsupportedReadError, match=r"no batch dim.*-> compute it for each sample: \[batch, seq\]"):
        bl.lift(exported)
