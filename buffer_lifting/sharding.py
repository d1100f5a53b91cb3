"""Cuts user inputs to a context-parallel shard, each along its own sequence dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.labels import COL
from buffer_lifting.program import InputAxes
from buffer_lifting.streams import Streams, by_axis


def shard_inputs(
    axes: Mapping[str, InputAxes], inputs: Mapping[str, torch.Tensor], order: Any, shard: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Each input reordered along its sequence dims, and cut to the shard where its role is ``row``.

    ``order`` may be a mapping from axis name to order, and has to be one if ``axes`` has several sequence axes.

    Raises:
        FeedError: an unknown input, or an order or shard that does not fit it.
    """
    result = {}
    names = list(dict.fromkeys(axis for own in axes.values() for _, axis, _ in own.seq_dims))
    orders = by_axis("order", order, names)
    for name, value in inputs.items():
        own = axes.get(name)
        if own is None:
            raise FeedError(f"the program has no user input {name!r} (it has {', '.join(sorted(axes)) or 'none'})")
        if value.ndim != own.rank:
            raise FeedError(f"input {name!r} has {value.ndim} dims, the program's has {own.rank}")
        batch = value.shape[own.batch_dim] if own.batch_dim is not None else 1
        for dim, axis, role in own.seq_dims:
            order = orders[axis]
            per_sample = isinstance(order, torch.Tensor) and order.ndim == 2 and order.shape[0] > 1
            if own.batch_dim is None and per_sample:
                raise FeedError(
                    f"input {name!r} {tuple(value.shape)} has no batch dim: an order per sample cannot be applied; "
                    "export with it expanded to the batch, or give one order for all samples"
                )
            streams = Streams(batch, value.shape[dim], order, None, shard, axis if len(names) > 1 else "")
            value = _along(value, dim, own.batch_dim, streams, role)
        result[name] = value
    return result


def _along(value: torch.Tensor, dim: int, batch_dim: int | None, streams: Streams, role: str) -> torch.Tensor:
    if streams.order is not None and streams.order.shape[0] > 1 and batch_dim is None:
        raise FeedError("an order per sample cannot be applied to an input without a batch dim")
    lead = [] if batch_dim is None else [batch_dim]
    rest = [d for d in range(value.ndim) if d not in (*lead, dim)]
    moved = value.permute(*lead, dim, *rest)
    moved = moved.unsqueeze(0) if batch_dim is None else moved
    taken = streams.take_batched(moved, streams.length, COL if role == COL else role)
    taken = taken.squeeze(0) if batch_dim is None else taken
    back = [[*lead, dim, *rest].index(d) for d in range(value.ndim)]
    return taken.permute(back).contiguous()
