"""Masks and biases of attention: computed from indices, cropped from square tables, given by the user."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reads import Inputs, attach, index_of
from .spec import HEADS, TABLE_LENGTH, Mask, Spec

BUCKETS = 5
WINDOW = 3


def attach_mask(module: nn.Module, mask: Mask, spec: Spec) -> None:
    """The tables that a mask is made from, as attributes of ``module``."""
    generator = torch.Generator().manual_seed(11)
    if mask.pattern == "bucket":
        attach(module, "buckets", "parameter", torch.randn(2 * BUCKETS + 1, HEADS, generator=generator))
    if mask.pattern == "square":
        total = spec.seq if mask.read == "full" else TABLE_LENGTH
        if mask.table == "parameter":
            table = torch.randn(total, total, generator=generator)
        else:
            table = torch.ones(total, total).tril()
        attach(module, "square", mask.table, table[None, None] if mask.wide else table)


def make_mask(mask: Mask, module: Any, inputs: Inputs) -> Tensor | None:
    """A bool mask (true: may attend) or a float bias that broadcasts to ``[B, H, S, S]``; ``None``: no mask."""
    ids = inputs["ids"]
    length = ids.shape[1]
    if mask.pattern in ("none", "is_causal"):
        return None
    made = _square(mask, module, length) if mask.pattern == "square" else _made(mask, module, inputs)
    if mask.expand:
        made = made.expand(ids.shape[0], HEADS, length, length)
    return made


def _made(mask: Mask, module: Any, inputs: Inputs) -> Tensor:
    ids = inputs["ids"]
    length = ids.shape[1]
    pattern = mask.pattern
    if pattern == "ones":
        return torch.ones(length, length, dtype=torch.bool)
    if pattern == "tril":
        return torch.tril(torch.ones(length, length, dtype=torch.bool))
    if pattern == "triu_inf":
        return torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
    if pattern == "user_square":
        return inputs["square_mask"][:, None]
    if pattern == "documents":
        documents = inputs["document_ids"]
        return (documents[:, :, None] == documents[:, None, :])[:, None]
    index = index_of(mask.index, module, inputs)
    rows, columns = index[..., :, None], index[..., None, :]
    causal = rows >= columns
    slopes = torch.tensor([0.5, 0.25]).view(HEADS, 1, 1)
    if index.ndim == 2:
        slopes = slopes[None]
        rows, columns, causal = rows[:, None], columns[:, None], causal[:, None]
    if pattern == "causal":
        return causal
    if pattern == "window":
        return causal & (rows - columns < WINDOW)
    if pattern == "chunked":
        return causal & (torch.div(rows, WINDOW, rounding_mode="floor") == columns // WINDOW)
    if pattern == "alibi":
        return -(rows - columns).abs() * slopes
    if pattern == "alibi_keys":
        return (columns * slopes).masked_fill(~causal, float("-inf"))
    if pattern == "bucket":
        buckets = (rows - columns).clamp(-BUCKETS, BUCKETS) + BUCKETS
        bias = F.embedding(buckets, module.buckets)
        return bias.squeeze(1).permute(0, 3, 1, 2) if index.ndim == 2 else bias.permute(2, 0, 1)
    return causal & inputs["attention_mask"][:, None, None, :]  # padding


def _square(mask: Mask, module: Any, length: Any) -> Tensor:
    table: Tensor = module.square
    prefix = (slice(None),) * (table.ndim - 2)
    if mask.read == "slice":
        cropped = table[(*prefix, slice(length), slice(length))]
    elif mask.read == "narrow":
        cropped = table.narrow(-2, 0, length).narrow(-1, 0, length)
    elif mask.read == "right":
        cropped = table[(*prefix, slice(-length, None), slice(-length, None))]
    elif mask.read == "full":
        cropped = table
    else:
        index = torch.arange(length)
        if mask.read == "grid":
            cropped = table[(*prefix, index[:, None], index[None, :])]
        else:
            cropped = table.index_select(-2, index).index_select(-1, index)
    return cropped if mask.table == "parameter" else cropped != 0


def attend(mask: Mask, made: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over ``[B, H, S, D]``."""
    if mask.attention == "sdpa" or mask.pattern == "is_causal":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=made, is_causal=mask.pattern == "is_causal")
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if made is not None and made.dtype != torch.bool:
        scores = scores + made
    elif made is not None and mask.attention == "masked_fill":
        scores = scores.masked_fill(made.logical_not(), float("-inf"))
    elif made is not None and mask.attention == "where":
        scores = torch.where(made, scores, torch.finfo(scores.dtype).min)
    elif made is not None:
        scores = scores + (1.0 - made.to(scores.dtype)) * -1e9
    return torch.softmax(scores, dim=-1) @ v
