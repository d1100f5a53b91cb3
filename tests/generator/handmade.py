"""Classes that random specs cannot express, each as a small program with a dynamic sequence."""

from __future__ import annotations

from collections.abc import Callable

import routing_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from zoo.seq2seq import export_seq2seq

from .spec import HEADS, TABLE_LENGTH, VOCAB

WIDTH = 8
TOKENS = 6


class Packed(nn.Module):
    """Documents found in the position ids that the user gives: one begins where they do not go on by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.learned = nn.Parameter(torch.randn(TABLE_LENGTH, WIDTH))

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """``[B, S]`` and ``[B, S]`` to ``[B, S, W]``."""
        x = self.embed(ids) + F.embedding(position_ids, self.learned)
        before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
        documents = (position_ids - before != 1).cumsum(1)
        place = torch.arange(ids.shape[1])
        mask = (place[:, None] >= place[None, :]) & (documents[:, :, None] == documents[:, None, :])
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return x + mixed.transpose(1, 2).reshape(batch, length, WIDTH)


class Flat(nn.Module):
    """One row of tokens without a batch dim, a table and a causal mask."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("table", torch.randn(TABLE_LENGTH, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, W]``."""
        x = self.embed(ids) + self.table[: ids.shape[0]]
        q, k, v = self.qkv(x).chunk(3, -1)
        place = torch.arange(ids.shape[0])
        scores = (q @ k.transpose(0, 1)).masked_fill(place[:, None] < place[None, :], float("-inf"))
        return x + scores.softmax(-1) @ v


def packed() -> ExportedProgram:
    """Two documents a sample, of other lengths."""
    ids = torch.randint(1, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("ids", "position_ids")}
    return export(_seeded(Packed), (ids, positions), dynamic_shapes=shapes, strict=False)


def flat() -> ExportedProgram:
    """Twelve tokens."""
    ids = torch.randint(1, VOCAB, (2 * TOKENS,), generator=torch.Generator().manual_seed(0))
    return export(_seeded(Flat), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO}}, strict=False)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def experts() -> ExportedProgram:
    """Tokens routed to experts by sorting."""
    return routing_models.export(routing_models.Loop, dynamic=True, layers=1)


def two_axes() -> ExportedProgram:
    """An encoder and a decoder with sequences of their own."""
    return export_seq2seq("distance", dynamic=True)[1]


#: ``axes=`` of what has no batch dim.
AXES: dict[str, dict[str, dict[int, str]]] = {"flat tokens": {"ids": {0: "seq"}}}
PROGRAMS: dict[str, Callable[[], ExportedProgram]] = {
    "packed documents": packed,
    "flat tokens": flat,
    "routed experts": experts,
    "encoder-decoder": two_axes,
}
