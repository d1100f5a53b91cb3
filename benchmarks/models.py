"""The model that is measured: a Llama in the style of pytorch/torchtitan PR #1797.

One complex ``freqs_cis`` buffer at the root is handed whole to every layer, and each layer slices it to the
length of the sequence. Written like this, torch's own ``pipeline()`` can split the model, and its stages run
(tried with 2 and 4 stages, torch 2.13), which it can't do with every way to write rotary embeddings: it
refuses cos and sin that are computed once and cross two stages. The sizes are tiny, so that the graph is
measured and not the math: 57 nodes a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

VOCAB = 32
DIM = 16
HEADS = 4
KV_HEADS = 2
HEAD_DIM = DIM // HEADS
TABLE = 64
BATCH = 2
SEQ = 16


def rotary_table() -> Tensor:
    """The rotation of every position: complex64, ``[TABLE, HEAD_DIM // 2]``."""
    inv_freq = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = torch.outer(torch.arange(TABLE, dtype=torch.float32), inv_freq)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates ``[batch, seq, heads, HEAD_DIM]`` by the position of each token."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs = freqs_cis[: x.shape[1]].view(1, x.shape[1], 1, pairs.shape[-1])
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


def repeat_kv(x: Tensor) -> Tensor:
    """Repeats key or value heads until there are as many as query heads."""
    batch, seq, heads, dim = x.shape
    repeated = x[:, :, :, None, :].expand(batch, seq, heads, HEADS // heads, dim)
    return repeated.reshape(batch, seq, HEADS, dim)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = rotate(self.wq(x).view(batch, seq, HEADS, HEAD_DIM), freqs_cis)
        k = repeat_kv(rotate(self.wk(x).view(batch, seq, KV_HEADS, HEAD_DIM), freqs_cis))
        v = repeat_kv(self.wv(x).view(batch, seq, KV_HEADS, HEAD_DIM))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, 2 * DIM, bias=False)
        self.w2 = nn.Linear(2 * DIM, DIM, bias=False)
        self.w3 = nn.Linear(DIM, 2 * DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.feed_forward = FeedForward()
        self.attention_norm = nn.RMSNorm(DIM, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(DIM, eps=1e-5)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    """A rotary decoder: ``tokens [batch, seq]`` to ``logits [batch, seq, VOCAB]``."""

    freqs_cis: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.register_buffer("freqs_cis", rotary_table(), persistent=False)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(layers)})
        self.norm = nn.RMSNorm(DIM, eps=1e-5)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis)
        return self.output(self.norm(h))


def build(layers: int) -> Llama:
    """The model, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Llama(layers)


def tokens() -> Tensor:
    """The example input."""
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))


def dynamic_shapes() -> dict[str, dict[int, Dim]]:
    """Any batch, and any sequence that the table has rows for."""
    return {"tokens": {0: Dim("batch", min=1), 1: Dim("seq", min=2, max=TABLE)}}


def split_points(layers: int, stages: int) -> list[str]:
    """The FQN of the first layer of every stage but the first."""
    return [f"layers.{layers * stage // stages}" for stage in range(1, stages)]
