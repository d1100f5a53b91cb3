"""The layers that are timed: a Llama in the style of pytorch/torchtitan PR #1797, in two sizes.

Each exists three times: as the whole model, which is exported, lifted and split; by hand, as layers that take the
lifted input as an argument; and as layers that read the table themselves, as the model does, which are exported
unlifted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["values", "positions"]


@dataclass(frozen=True)
class Size:
    """How large the layers are; ``layers`` is that of the stage, and the model has twice as many."""

    name: str
    dim: int
    heads: int
    batch: int
    seq: int
    layers: int = 2
    vocab: int = 256

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def table(self) -> int:
        """Rows of the table."""
        return 4 * self.seq


#: ``calls``: what a step costs is the calls of its ops; ``math``: it is their arithmetic.
SIZES = {"calls": Size("calls", 32, 4, 2, 32), "math": Size("math", 256, 8, 2, 128)}


def rotary_table(size: Size) -> Tensor:
    """The rotation of every position: complex64, ``[table, head_dim // 2]``."""
    inv_freq = 10000.0 ** (-torch.arange(0, size.head_dim, 2, dtype=torch.float32) / size.head_dim)
    angles = torch.outer(torch.arange(size.table, dtype=torch.float32), inv_freq)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotates ``[batch, seq, heads, head_dim]`` by ``freqs``, which broadcasts to its pairs."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


class Attention(nn.Module):
    """Causal attention; ``freqs`` is ``[1 or batch, seq, 1, head_dim // 2]``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.head_dim = size.heads, size.head_dim
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(size.dim, size.dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = rotate(self.wq(x).view(batch, seq, self.heads, self.head_dim), freqs).transpose(1, 2)
        k = rotate(self.wk(x).view(batch, seq, self.heads, self.head_dim), freqs).transpose(1, 2)
        v = self.wv(x).view(batch, seq, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.w1 = nn.Linear(size.dim, 3 * size.dim, bias=False)
        self.w2 = nn.Linear(3 * size.dim, size.dim, bias=False)
        self.w3 = nn.Linear(size.dim, 3 * size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(size), FeedForward(size)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(size.dim, eps=1e-5), nn.RMSNorm(size.dim, eps=1e-5)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs)
        return h + self.feed_forward(self.ffn_norm(h))


class Layers(nn.Module):
    """The layers of the second stage, and the head."""

    def __init__(self, size: Size, names: Iterable[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block(size) for i in names})
        self.norm = nn.RMSNorm(size.dim, eps=1e-5)
        self.output = nn.Linear(size.dim, size.vocab, bias=False)

    def run(self, h: Tensor, freqs: Tensor) -> Tensor:
        """``hidden [batch, seq, dim]`` to ``logits [batch, seq, vocab]``."""
        for layer in self.layers.values():
            h = layer(h, freqs)
        return self.output(self.norm(h))


class Llama(Layers):
    """The whole model: ``tokens [batch, seq]`` to logits. Each layer reads the table, as in PR #1797."""

    freqs_cis: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__(size, range(2 * size.layers))
        self.tok_embeddings = nn.Embedding(size.vocab, size.dim)
        self.register_buffer("freqs_cis", rotary_table(size), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis[: h.shape[1]].view(1, h.shape[1], 1, -1))
        return self.output(self.norm(h))


class Unlifted(Layers):
    """The layers of the second stage that read the table themselves."""

    freqs_cis: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__(size, range(size.layers, 2 * size.layers))
        self.register_buffer("freqs_cis", rotary_table(size), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis[: h.shape[1]].view(1, h.shape[1], 1, -1))
        return self.output(self.norm(h))


class ByHand(Layers):
    """The layers of the second stage with the lifted input as an argument, as PR #1797 writes them.

    ``lifted`` is ``[batch, seq, head_dim // 2]`` rows of the table, or positions ``[batch, seq]``, which look them up:
    once, for all layers.
    """

    freqs_cis: Tensor

    def __init__(self, size: Size, form: Form) -> None:
        super().__init__(size, range(size.layers, 2 * size.layers))
        self.register_buffer("freqs_cis", rotary_table(size), persistent=False)
        self.form = form

    def forward(self, h: Tensor, lifted: Tensor) -> Tensor:
        rows = lifted if self.form == "values" else self.freqs_cis[lifted]
        return self.run(h, rows.unsqueeze(2))
