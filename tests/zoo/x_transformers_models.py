"""Entries from x-transformers and rotary-embedding-torch: one small model for each kind of position."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .catalog import Entry, Export, Inputs
from .tiny import DIM, HEADS, LAYERS, TABLE, VOCAB, ids, packed, padding, tokens, widen

HEAD_DIM = 32  # x-transformers rotates at least 32 features


# x-transformers -----------------------------------------------------------------------------------------


def _positions(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (tokens(batch, seq, generator),), {"pos": packed(batch, seq)}


def _mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (tokens(batch, seq, generator),), {"mask": padding(batch, seq)}


class _Model(nn.Module):
    """A ``TransformerWrapper`` with the keywords of its ``forward`` that the catalog passes, by name."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, vocab]`` of ids ``[B, S]``."""
        given = {name: value for name, value in (("mask", mask), ("pos", pos)) if value is not None}
        logits: Tensor = self.wrapper(x, **given)
        return logits


def _x_model(
    kind: Literal["Decoder", "Encoder"],
    layer_options: dict[str, Any],
    absolute: bool = False,
    sinusoidal: bool = False,
    flash: bool = False,
    warm: bool = False,
) -> nn.Module:
    """``warm`` runs the model once at full length, so that what it makes lazily is there before the export."""
    import x_transformers

    layers = getattr(x_transformers, kind)(
        dim=DIM, depth=LAYERS, heads=HEADS, attn_dim_head=HEAD_DIM, attn_flash=flash, verbose=False, **layer_options
    )
    wrapper = x_transformers.TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=TABLE,
        attn_layers=layers,
        use_abs_pos_emb=absolute or sinusoidal,
        scaled_sinu_pos_emb=sinusoidal,
    )
    model = widen(_Model(wrapper))
    if warm:
        with torch.no_grad():
            model(torch.zeros(1, TABLE, dtype=torch.long))
    return model


def _entry(
    name: str,
    kind: Literal["Decoder", "Encoder"],
    exports: tuple[Export, ...],
    patterns: tuple[str, ...],
    quick: bool = False,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Entry:
    build = partial(_x_model, kind, options or {}, **kwargs)
    return Entry(f"x_{name}", "x-transformers", build, exports, patterns, ("wrapper.attn_layers.layers.2.0.0",), quick)


_EAGER = Export("eager", ids)
_EAGER_DYNAMIC = Export("eager", ids, shapes=("dynamic",))
_EAGER_STATIC = Export("eager", ids, shapes=("static",))
_FLASH_DYNAMIC = Export("flash", ids, {"flash": True}, ("dynamic",))
_POSITIONS_DYNAMIC = Export("positions", _positions, shapes=("dynamic",))
_FULL_STATIC = Export("full", ids, shapes=("static",), seq=TABLE)

_DECODERS = (
    _entry(
        "rotary",
        "Decoder",
        (_EAGER, _FLASH_DYNAMIC, _POSITIONS_DYNAMIC, _FULL_STATIC),
        ("computed", "hop", "mask_causal", "is_causal", "user_positions", "offset", "hop_consumer"),
        quick=True,
        options={"rotary_pos_emb": True},
    ),
    _entry(
        "rotary_xpos",
        "Decoder",
        (_EAGER_STATIC, _FLASH_DYNAMIC),
        ("computed", "hop", "mask_causal", "offset", "scale", "hop_consumer", "length", "is_causal"),
        options={"rotary_xpos": True},
    ),
    _entry(
        "absolute",
        "Decoder",
        (_EAGER_DYNAMIC, _FULL_STATIC),
        ("learned", "mask_causal"),
        absolute=True,
    ),
    _entry("sinusoidal", "Decoder", (_FLASH_DYNAMIC,), ("computed", "is_causal"), sinusoidal=True),
    _entry(
        "alibi",
        "Decoder",
        (
            _EAGER_STATIC,
            _FLASH_DYNAMIC,
            _POSITIONS_DYNAMIC,
            Export("warm", ids, {"warm": True}, ("dynamic",)),
        ),
        ("alibi", "mask_causal", "mask_table", "offset", "slice", "user_positions"),
        quick=True,
        options={"alibi_pos_bias": True},
    ),
    _entry(
        "t5_bias",
        "Decoder",
        (_EAGER,),
        ("relative", "mask_causal"),
        options={"rel_pos_bias": True},
    ),
    _entry(
        "dynamic_bias",
        "Decoder",
        (_EAGER,),
        ("relative", "mask_causal", "written"),
        options={"dynamic_pos_bias": True},
    ),
    _entry("no_position", "Decoder", (_EAGER_STATIC,), ("mask_causal",)),
)

_ENCODERS = (
    _entry(
        "encoder_rotary",
        "Encoder",
        (_EAGER_DYNAMIC, Export("mask", _mask, shapes=("dynamic",))),
        ("computed", "hop", "mask_padding", "offset", "hop_consumer"),
        options={"rotary_pos_emb": True},
    ),
    _entry("encoder_absolute", "Encoder", (_EAGER_DYNAMIC,), ("learned",), absolute=True),
    _entry("encoder_alibi", "Encoder", (_FLASH_DYNAMIC,), ("alibi", "offset"), options={"alibi_pos_bias": True}),
    _entry("encoder_t5_bias", "Encoder", (_EAGER_STATIC,), ("relative", "written"), options={"rel_pos_bias": True}),
)


# rotary-embedding-torch ---------------------------------------------------------------------------------


class _RotaryAttention(nn.Module):
    """Causal self-attention with a ``RotaryEmbedding`` that the layers share."""

    def __init__(self, rotary: Any, seq_first: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.rotary: Any = rotary
        self.seq_first = seq_first

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        batch, seq, _ = x.shape
        q, k, v = (part.view(batch, seq, HEADS, DIM // HEADS) for part in self.qkv(x).chunk(3, dim=-1))
        if not self.seq_first:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.rotary.use_xpos:
            q, k = self.rotary.rotate_queries_and_keys(q, k)
        else:
            q, k = self.rotary.rotate_queries_or_keys(q), self.rotary.rotate_queries_or_keys(k)
        if self.seq_first:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, seq, DIM))


class _RotaryBlock(nn.Module):
    def __init__(self, rotary: Any, seq_first: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), _RotaryAttention(rotary, seq_first)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class _RotaryModel(nn.Module):
    """A small decoder whose layers share one ``rotary_embedding_torch.RotaryEmbedding``."""

    def __init__(self, seq_first: bool, **options: Any) -> None:
        from rotary_embedding_torch import RotaryEmbedding

        super().__init__()
        rotary = RotaryEmbedding(dim=DIM // HEADS, cache_max_seq_len=TABLE, seq_before_head_dim=seq_first, **options)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(_RotaryBlock(rotary, seq_first) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, S, vocab]`` of ids ``[B, S]``."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _rotary_model(warm: bool = False, seq_first: bool = False, **options: Any) -> nn.Module:
    """``warm`` fills the cache at full length before the export."""
    model = widen(_RotaryModel(seq_first, **options))
    if warm:
        with torch.no_grad():
            model(torch.zeros(1, TABLE, dtype=torch.long))
    return model


def _rotary(
    name: str, exports: tuple[Export, ...], patterns: tuple[str, ...], quick: bool = False, **options: Any
) -> Entry:
    build = partial(_rotary_model, **options)
    return Entry(f"rotary_{name}", "rotary-embedding-torch", build, exports, patterns, ("layers.1",), quick)


_COLD = Export("cold", ids)
_WARM = Export("warm", ids, {"warm": True})
_COLD_DYNAMIC = Export("cold", ids, shapes=("dynamic",))

_ROTARY = (
    _rotary(
        "lang",
        (_COLD, _WARM, Export("full", ids, {"warm": True}, ("static",), seq=TABLE)),
        ("slice", "hop", "written", "is_causal", "offset", "computed", "hop_consumer", "equal_buffers"),
        quick=True,
    ),
    _rotary(
        "xpos",
        (_COLD_DYNAMIC, Export("warm", ids, {"warm": True}, ("dynamic",))),
        ("slice", "hop", "written", "is_causal", "offset", "computed", "hop_consumer", "scale", "equal_buffers"),
        use_xpos=True,
    ),
    _rotary(
        "uncached",
        (_COLD_DYNAMIC,),
        ("computed", "hop", "is_causal", "offset", "hop_consumer"),
        cache_if_possible=False,
    ),
    _rotary("learned", (_COLD_DYNAMIC,), ("computed", "hop", "is_causal", "offset", "hop_consumer"), learned_freq=True),
    _rotary(
        "seq_first",
        (Export("warm", ids, {"warm": True}, ("dynamic",)),),
        ("slice", "hop", "hop_consumer", "is_causal", "equal_buffers"),
        seq_first=True,
    ),
)

ENTRIES = (*_DECODERS, *_ENCODERS, *_ROTARY)
