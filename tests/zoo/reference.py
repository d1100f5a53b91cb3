"""Hand-written tiny reference models of the test zoo.

Plain torch only.  Each model reads something by sequence position, in the way its real counterpart does:

* ``RopeLlama``: one complex ``freqs_cis`` table at the root, handed whole to every layer and sliced to the
  sequence length *inside* every layer.  ``table="attribute"`` keeps the table as a plain tensor attribute
  instead of a buffer (torch.export then sees a tensor constant); ``read`` picks how the layers read it.
* ``MaskedLlama``: the same decoder with a ``[B, S]`` padding mask as a second input, used in every layer.
* ``LossLlama``: the same decoder with labels as a second input, returning the mean cross entropy.
* ``NanoGPT``: learned position table read by ``torch.arange`` and a ``tril`` buffer cropped in every block.
* ``SinusoidEncoder``: sequence-first bidirectional encoder with a ``[S, 1, C]`` sinusoidal table.

Sizes are tiny and every dropout is zero, so ``train()`` and ``eval()`` compute the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Table = Literal["buffer", "attribute"]
Read = Literal["slice", "newaxis", "whole"]
MaskAt = Literal["layer", "root"]


# --------------------------------------------------------------------------------------------------------
# Rotary decoder
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeConfig:
    """Sizes of the rotary decoder and the way it keeps and reads its table."""

    vocab_size: int = 61
    dim: int = 32
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 64
    max_seq_len: int = 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    table: Table = "buffer"
    read: Read = "slice"

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def precompute_freqs_cis(head_dim: int, max_seq_len: int, theta: float = 10000.0) -> Tensor:
    """Rotations for every position: complex64, ``[max_seq_len, head_dim // 2]``."""
    inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), inv_freq)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor, read: Read = "slice") -> Tensor:
    """Crop the table to the length of ``x`` (``[B, S, H, D/2]``) and shape it as ``[1, S, 1, D/2]``.

    ``read="whole"`` takes the table as it is, and so only works when S is the table length.
    """
    seqlen = x.shape[1]
    if read == "slice":
        freqs_cis = freqs_cis[0:seqlen]
        return freqs_cis.view(1, seqlen, 1, x.shape[-1])
    if read == "newaxis":
        return freqs_cis[None, :seqlen, None]
    return freqs_cis.view(1, freqs_cis.shape[0], 1, freqs_cis.shape[1])


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor, read: Read = "slice") -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (``[B, S, H, D]``) by the positions of their tokens."""
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = reshape_for_broadcast(freqs_cis, xq_, read)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat every key or value head ``n_rep`` times: ``[B, S, KV, D]`` to ``[B, S, KV * n_rep, D]``."""
    if n_rep == 1:
        return x
    bsz, seqlen, n_kv_heads, head_dim = x.shape
    x = x[:, :, :, None, :].expand(bsz, seqlen, n_kv_heads, n_rep, head_dim)
    return x.reshape(bsz, seqlen, n_kv_heads * n_rep, head_dim)


def padded_causal_mask(attention_mask: Tensor) -> Tensor:
    """``[B, S]`` bool (True: real token) to ``[B, 1, S, S]`` bool (True: may attend)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    causal = positions[None, :] <= positions[:, None]
    return causal[None, None] & attention_mask[:, None, None, :]


class RopeAttention(nn.Module):
    """Grouped-query attention with rotary embeddings; causal unless a mask is given."""

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.n_rep = config.n_heads // config.n_kv_heads
        self.read: Read = config.read
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None = None) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, -1, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, -1, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, -1, self.head_dim)

        xq, xk = apply_rotary_emb(xq, xk, freqs_cis, self.read)
        xk = repeat_kv(xk, self.n_rep)
        xv = repeat_kv(xv, self.n_rep)

        xq, xk, xv = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
        if mask is None:
            out = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(xq, xk, xv, attn_mask=mask)
        out = out.transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(out)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RopeBlock(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.attention = RopeAttention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None = None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class PaddedRopeBlock(RopeBlock):
    """Decoder layer that takes the padding mask and builds the attention mask itself."""

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(x, freqs_cis, padded_causal_mask(mask))


class RopeLlama(nn.Module):
    """Rotary decoder: ``tokens [B, S]`` to ``logits [B, S, V]``."""

    freqs_cis: Tensor
    block: type[RopeBlock] = RopeBlock

    def __init__(self, config: RopeConfig | None = None) -> None:
        super().__init__()
        config = config or RopeConfig()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        freqs_cis = precompute_freqs_cis(config.head_dim, config.max_seq_len, config.rope_theta)
        if config.table == "buffer":
            self.register_buffer("freqs_cis", freqs_cis, persistent=False)
        else:
            self.freqs_cis = freqs_cis
        self.layers = nn.ModuleDict({str(i): self.block(config) for i in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis, mask)
        return self.output(self.norm(h))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(tokens)


class MaskedLlama(RopeLlama):
    """Rotary decoder over padded rows: ``(tokens, attention_mask)``, both ``[B, S]``; the mask is bool.

    With ``mask_at="layer"`` every layer combines the padding mask with a causal mask by itself, so the user
    input is read all along the depth; with ``"root"`` the combination is made once and shared by the layers.
    """

    def __init__(self, config: RopeConfig | None = None, mask_at: MaskAt = "layer") -> None:
        self.block = PaddedRopeBlock if mask_at == "layer" else RopeBlock
        super().__init__(config)
        self.mask_at: MaskAt = mask_at

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        mask = attention_mask if self.mask_at == "layer" else padded_causal_mask(attention_mask)
        return self.decode(tokens, mask)


class LossLlama(RopeLlama):
    """Rotary decoder with its loss: ``(tokens, labels)`` to the mean cross entropy, labels not shifted."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        logits = self.decode(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1), ignore_index=-100)


# --------------------------------------------------------------------------------------------------------
# GPT with learned positions
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the GPT; ``tie_weights`` makes ``lm_head`` and ``wte`` one parameter."""

    vocab_size: int = 61
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.0
    tie_weights: bool = False
    init_std: float = 0.2


class CausalSelfAttention(nn.Module):
    """Attention written out, with the causal mask cropped from a ``[1, 1, T, T]`` buffer."""

    bias: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        tril = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("bias", tril[None, None])

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)

        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """GELU MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class GPTBlock(nn.Module):
    """Pre-norm GPT block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """GPT with learned positions: ``idx [B, T]`` to ``logits [B, T, V]``."""

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        config = config or GPTConfig()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)

    def forward(self, idx: Tensor) -> Tensor:
        _, t = idx.size()
        assert t <= self.config.block_size, "sequence longer than the position table"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](pos)
        x = self.transformer["drop"](x)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# --------------------------------------------------------------------------------------------------------
# Sequence-first encoder with sinusoidal positions
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the sequence-first encoder."""

    vocab_size: int = 61
    d_model: int = 32
    nhead: int = 4
    d_hid: int = 64
    nlayers: int = 2
    max_len: int = 64
    dropout: float = 0.0


class PositionalEncoding(nn.Module):
    """Sinusoidal table ``pe [S, 1, C]``, added to a ``[S, B, C]`` input."""

    pe: Tensor

    def __init__(self, d_model: int, max_len: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        position = torch.arange(max_len, dtype=torch.float32)[:, None]
        rate = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, 1, d_model)
        pe[:, 0, 0::2] = torch.sin(position * rate)
        pe[:, 0, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pe[: x.size(0)]
        return self.dropout(x)


class EncoderLayer(nn.Module):
    """Post-norm bidirectional encoder layer on ``[S, B, C]``."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.nhead = config.nhead
        self.in_proj = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.linear1 = nn.Linear(config.d_model, config.d_hid)
        self.linear2 = nn.Linear(config.d_hid, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, x: Tensor) -> Tensor:
        s, b, c = x.shape
        head_dim = c // self.nhead
        q, k, v = (p.reshape(s, b * self.nhead, head_dim).transpose(0, 1) for p in self.in_proj(x).chunk(3, dim=-1))
        weights = F.softmax(torch.bmm(q * head_dim**-0.5, k.transpose(1, 2)), dim=-1)
        out = torch.bmm(weights, v).transpose(0, 1).reshape(s, b, c)
        return self.out_proj(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attend(x)))
        return self.norm2(x + self.dropout(self.linear2(F.relu(self.linear1(x)))))


class SinusoidEncoder(nn.Module):
    """Sequence-first encoder: ``tokens [B, S]`` to ``logits [B, S, V]``, transposed inside."""

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        config = config or EncoderConfig()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_encoder = PositionalEncoding(config.d_model, config.max_len, config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.nlayers))
        self.decoder = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.transpose(0, 1)) * math.sqrt(self.config.d_model)
        x = self.pos_encoder(x)
        for layer in self.layers:
            x = layer(x)
        return self.decoder(x).transpose(0, 1)
