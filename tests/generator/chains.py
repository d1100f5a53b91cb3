"""Ops between the rows and the data. All keep the number of features; most keep the dims."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reads import Value

Step = Callable[[Value, Tensor], Value]  # the second operand is the data, [B, S, W]


def _tensorwise(function: Callable[[Tensor], Tensor]) -> Step:
    return lambda value, x: value.but(function(value.tensor))


def _no_grad(value: Value, x: Tensor) -> Value:
    with torch.no_grad():
        return value.but(value.tensor * 2)


def _autocast(value: Value, x: Tensor) -> Value:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return value.but(value.tensor * 0.5 + 1)


def _autocast_off(value: Value, x: Tensor) -> Value:
    with torch.autocast("cpu", enabled=False):
        return value.but((value.tensor.float() * 2).sin())


def _in_place(value: Value, x: Tensor) -> Value:
    rows = value.tensor.clone()
    rows.mul_(2)
    return value.but(rows)


def _filled(value: Value, x: Tensor) -> Value:
    """Sines and cosines written into a fresh tensor, every other feature."""
    rows = torch.zeros_like(value.tensor)
    rows[..., 0::2] = value.tensor[..., 0::2].sin()
    rows[..., 1::2] = value.tensor[..., 1::2].cos()
    return value.but(rows)


def _expand(value: Value, x: Tensor) -> Value:
    if value.batched:
        return value.but(value.tensor.expand(x.shape[0], *value.tensor.shape[1:]))
    return Value(value.rows()[None].expand(x.shape[0], -1, -1), 1, True)


def _repeat(value: Value, x: Tensor) -> Value:
    if value.batched:
        return value
    return Value(value.rows()[None].repeat(x.shape[0], 1, 1), 1, True)


def _permute(value: Value, x: Tensor) -> Value:
    turned = value.tensor.transpose(value.seq, -1).contiguous()
    return value.but((turned * 2).transpose(value.seq, -1))


def _sequence_first(value: Value, x: Tensor) -> Value:
    if value.batched:
        return value.but(value.tensor.transpose(0, 1).contiguous().transpose(0, 1))
    return Value(value.rows().unsqueeze(1), 0)


def _split_merge(rows: Tensor) -> Tensor:
    """As the heads of a table: ``[..., F]`` to ``[..., 2, F / 2]`` and back, the other way round."""
    split = rows.view(*rows.shape[:-1], 2, rows.shape[-1] // 2)
    return split.transpose(-1, -2).reshape(rows.shape)


def _stacked(rows: Tensor) -> Tensor:
    pairs = torch.stack([rows.cos(), rows.sin()], -1)
    return pairs[..., 0] - 0.5 * pairs[..., 1]


def _rotated(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def _doubled(rows: Tensor) -> Tensor:
    half = rows[..., : rows.shape[-1] // 2]
    return torch.cat([half, half], -1)


REAL: dict[str, Step] = {
    "cos": _tensorwise(torch.cos),
    "sin": _tensorwise(torch.sin),
    "scale": _tensorwise(lambda v: v * 0.5 + 0.1),
    "cat": _tensorwise(_doubled),
    "rotate": _tensorwise(_rotated),
    "stack": _tensorwise(_stacked),
    "split_merge": _tensorwise(_split_merge),
    "unsqueeze": _tensorwise(lambda v: v.unsqueeze(0).squeeze(0) * 2),
    "unsqueeze_last": _tensorwise(lambda v: v[..., None].sin().squeeze(-1)),
    "to_data": lambda value, x: value.but(value.tensor.to(x.dtype) + 1),
    "type_as": lambda value, x: value.but(value.tensor.type_as(x) - 1),
    "bf16": _tensorwise(lambda v: v.bfloat16().float()),
    "double": _tensorwise(lambda v: v.double().exp().float() * 0.1),
    "clone": _tensorwise(lambda v: v.clone() + 1),
    "detach": _tensorwise(lambda v: v.detach().neg()),
    "clamp": _tensorwise(lambda v: v.clamp(-1, 1)),
    "interleave": _tensorwise(lambda v: v[..., : v.shape[-1] // 2].repeat_interleave(2, dim=-1)),
    "softmax": _tensorwise(lambda v: v.softmax(-1)),
    "normalise": _tensorwise(lambda v: v / (v.norm(dim=-1, keepdim=True) + 1)),
    "flip": _tensorwise(lambda v: v.flip(-1)),
    "choose": _tensorwise(lambda v: torch.where(v > 0, v, 0.1 * v)),
    "permute": _permute,
    "sequence_first": _sequence_first,
    "expand": _expand,
    "repeat": _repeat,
    "no_grad": _no_grad,
    "autocast": _autocast,
    "autocast_off": _autocast_off,
    "in_place": _in_place,
    "filled": _filled,
}
COMPLEX: dict[str, Step] = {
    "scale": _tensorwise(lambda v: v * 0.5),
    "conj": _tensorwise(torch.conj),
    "clone": _tensorwise(lambda v: v.clone()),
    "as_real": _tensorwise(lambda v: torch.view_as_complex(torch.view_as_real(v.resolve_conj()) * 2)),
    "permute": _permute,
    "split_merge": _tensorwise(_split_merge),
    "unsqueeze": REAL["unsqueeze"],
    "expand": _expand,
    "no_grad": _no_grad,
    "sequence_first": _sequence_first,
}


def apply_chain(value: Value, names: tuple[str, ...], x: Tensor) -> Value:
    """The steps of a row, in order; tables that are neither float32 nor complex are converted first."""
    steps = COMPLEX if value.tensor.is_complex() else REAL
    if steps is REAL and value.tensor.dtype != torch.float32:
        value = value.but(value.tensor.to(x.dtype))
    for name in names:
        value = steps[name](value, x)
    return value
