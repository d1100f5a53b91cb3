"""Encoder-decoders: two sequence axes, of different lengths."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

VOCAB, DIM, HEADS, TABLE = 61, 16, 2, 40


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """RoPE on ``[B, H, S, D]`` with ``[S, D/2]`` complex rows."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2)


class Attention(nn.Module):
    """Queries from one sequence, keys from another (or the same)."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.written = written

    def forward(
        self, x: Tensor, y: Tensor, rows: Tensor, cols: Tensor, bias: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        q, k, v = (
            linear(side).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, side in ((self.q, x), (self.k, y), (self.v, y))
        )
        q, k = rotate(q, rows), rotate(k, cols)
        if self.written:
            scores = q @ k.transpose(-1, -2) / (DIM // HEADS) ** 0.5
            if bias is not None:
                scores = scores + bias
            if causal:
                ones = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool)
                scores = scores.masked_fill(ones.tril().logical_not(), -1e9)
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        joined: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return joined


class EncoderLayer(nn.Module):
    def __init__(self, written: bool) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(written), nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, rope: Tensor, padding: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), self.norm(x), rope, rope, padding)
        mixed: Tensor = x + self.mlp(x).tanh()
        return mixed


class DecoderLayer(nn.Module):
    def __init__(self, written: bool) -> None:
        super().__init__()
        self.attention, self.cross = Attention(written), Attention(written)
        self.norm, self.mlp = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, y: Tensor, x: Tensor, rope: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        y = y + self.attention(self.norm(y), self.norm(y), rope, rope, causal=True)
        y = y + self.cross(self.norm(y), x, rope, keys, bias)
        mixed: Tensor = y + self.mlp(y).tanh()
        return mixed


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Seq2Seq(nn.Module):
    """RoPE on both sides; cross attention with a bias along both sequences.

    ``bias``: ``"none"``, ``"distance"`` (of the positions on either side), or ``"table"`` (slices of a buffer).
    """

    def __init__(self, bias: str = "none", written: bool = False) -> None:
        super().__init__()
        self.bias = bias
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.encoder = Stack([EncoderLayer(written) for _ in range(2)])
        self.decoder = Stack([DecoderLayer(written) for _ in range(2)])
        self.head = nn.Linear(DIM, VOCAB)
        half = DIM // HEADS // 2
        angles = torch.outer(torch.arange(TABLE).float(), 30.0 ** -(torch.arange(half) / half))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.register_buffer("table", torch.randn(1, 1, TABLE, TABLE), persistent=False)

    def cross_bias(self, rows: int, cols: int) -> Tensor | None:
        """``[1, 1, rows, cols]``."""
        if self.bias == "table":
            sliced: Tensor = self.table[:, :, :rows, :cols]
            return sliced
        if self.bias == "distance":
            return -0.3 * (torch.arange(rows)[:, None] - torch.arange(cols)[None]).abs().float()[None, None]
        return None

    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """``src_mask`` ``[B, S]``: true where there is a token."""
        src_rope, tgt_rope = self.freqs_cis[: src.shape[1]], self.freqs_cis[: tgt.shape[1]]
        padding = None if src_mask is None else torch.where(src_mask[:, None, None], 0.0, -1e9)
        bias = self.cross_bias(tgt.shape[1], src.shape[1])
        if padding is not None:
            bias = padding if bias is None else bias + padding
        x, y = self.embedding(src), self.embedding(tgt)
        for layer in self.encoder.layers:
            x = layer(x, src_rope, padding)
        for layer in self.decoder.layers:
            y = layer(y, x, tgt_rope, src_rope, bias)
        logits: Tensor = self.head(y)
        return logits


def tokens(batch: int, length: int, seed: int) -> Tensor:
    """Random ids, none of them a special one."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(batch: int, length: int) -> Tensor:
    """Every sample is two tokens shorter than the one before."""
    return torch.arange(length)[None] < (length - 2 * torch.arange(batch))[:, None]


def export_seq2seq(
    name: str, dynamic: bool = True, src: int = 11, tgt: int = 7, mask: bool = False, batch: int = 3
) -> tuple[nn.Module, ExportedProgram]:
    """A model of this module (``"rope"``, ``"distance"``, ``"table"``, ``"written"``) or of HF (``"bart"``)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _MODELS[name]() if name in _MODELS else _hugging_face(name)
        model.eval()
        if name in _MODELS:
            args = (tokens(batch, src, 1), tokens(batch, tgt, 2), *((padding_mask(batch, src),) if mask else ()))
            kwargs = {}
        else:
            args = ()
            kwargs = {"input_ids": tokens(batch, src, 1), "decoder_input_ids": tokens(batch, tgt, 2)}
            if mask:
                kwargs["attention_mask"] = padding_mask(batch, src).long()
                kwargs["decoder_attention_mask"] = padding_mask(batch, tgt).long()
        auto = {0: Dim.AUTO, 1: Dim.AUTO}
        shapes = ((auto,) * len(args) if args else dict.fromkeys(kwargs, auto)) if dynamic else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model, torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _hugging_face(name: str) -> nn.Module:
    import transformers

    family = {"bart": ("Bart", "ForConditionalGeneration"), "marian": ("Marian", "MTModel")}[name]
    config = getattr(transformers, f"{family[0]}Config")(
        vocab_size=VOCAB,
        d_model=DIM,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=TABLE,
        pad_token_id=0,
        decoder_start_token_id=2,
        init_std=0.2,
        use_cache=False,
    )
    model: nn.Module = getattr(transformers, "".join(family))(config)
    return model


_MODELS = {
    "rope": lambda: Seq2Seq(),
    "distance": lambda: Seq2Seq("distance"),
    "table": lambda: Seq2Seq("table"),
    "written": lambda: Seq2Seq("distance", written=True),
}
