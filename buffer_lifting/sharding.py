"""Cuts user inputs to a context-parallel shard, each along its own sequence dims."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.labels import COL, ROW
from buffer_lifting.program import InputAxes
from buffer_lifting.streams import Streams, by_axis

#: The name under which :func:`shard_inputs` takes what is no input of the program: see ``schedule.step``.
TARGET = "target"


def shard_inputs(
    axes: Mapping[str, InputAxes],
    inputs: Mapping[str, torch.Tensor],
    order: Any,
    shard: tuple[int, int],
    ring_axes: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Each input reordered along its sequence dims, and cut to the shard where its role is ``row``.

    ``order`` may be a mapping from axis name to order, and has to be one if ``axes`` has several sequence axes. An
    order is checked once, not once an input, and of each input only the rows of the result are read. ``target`` is
    no input, but what ``schedule.step`` takes besides: ``[B, S, ...]`` (flat tokens: ``[S, ...]``).

    Raises:
        FeedError: an unknown input, one whose sizes are not those of the others, or an order or shard that does
            not fit (along ``ring_axes``: an order that ring attention does not follow); a ``target`` of a program
            with several sequence axes.
    """
    names = list(dict.fromkeys(axis for own in axes.values() for _, axis, _ in own.seq_dims))
    if TARGET in inputs and TARGET not in axes:
        _check_tensor(TARGET, inputs[TARGET])
        axes = {**axes, TARGET: _target_axes(axes, names, inputs[TARGET])}
    orders = by_axis("order", order, names)
    batch, lengths = _sizes(axes, inputs)
    if batch is None:
        _check_shared(orders, axes, inputs)
    several = len(names) > 1
    streams = {
        axis: Streams(batch or 1, length, orders[axis], None, shard, axis if several else "")
        for axis, length in lengths.items()
    }
    for axis, along in streams.items():
        if axis in ring_axes:
            along.check_ring(axis if several else "")
    return {name: _sharded(name, value, axes[name], streams) for name, value in inputs.items()}


def _target_axes(axes: Mapping[str, InputAxes], names: list[str], target: torch.Tensor) -> InputAxes:
    """A target goes with the tokens: batch first, if there is one, then the sequence."""
    if len(names) != 1:
        raise FeedError(
            f"the program has {len(names)} sequence axes ({', '.join(names)}), so that target has no axis of its own; "
            "give it under the name of the input whose tokens it goes with, in a call of its own"
        )
    batch_dim = 0 if any(own.batch_dim is not None for own in axes.values()) else None
    seq_dim = 0 if batch_dim is None else 1
    if target.ndim <= seq_dim:
        raise FeedError(f"target {tuple(target.shape)} has no sequence dim {seq_dim}")
    return InputAxes(TARGET, batch_dim, ((seq_dim, names[0], ROW),), target.ndim)


def _check_shared(orders: Mapping[str, Any], axes: Mapping[str, InputAxes], inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuses an order per sample for inputs none of which has a batch dim."""
    for name, value in inputs.items():
        for _, axis, _ in axes[name].seq_dims:
            order = orders[axis]
            if isinstance(order, torch.Tensor) and order.ndim == 2 and order.shape[0] > 1:
                raise _no_batch(name, value)


def _no_batch(name: str, value: torch.Tensor) -> FeedError:
    return FeedError(
        f"input {name!r} {tuple(value.shape)} has no batch dim: an order per sample cannot be applied; "
        "export with it expanded to the batch, or give one order for all samples"
    )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise FeedError(f"input {name!r} is a {type(value).__name__}; shard_inputs takes tensors")


def _sizes(axes: Mapping[str, InputAxes], inputs: Mapping[str, torch.Tensor]) -> tuple[int | None, dict[str, int]]:
    """The batch and the length of each axis, on which all inputs agree."""
    batch: tuple[int, str] | None = None
    lengths: dict[str, tuple[int, str]] = {}
    for name, value in inputs.items():
        own = axes.get(name)
        if own is None:
            raise FeedError(f"the program has no user input {name!r} (it has {', '.join(sorted(axes)) or 'none'})")
        _check_tensor(name, value)
        if value.ndim != own.rank:
            raise FeedError(f"input {name!r} has {value.ndim} dims, the program's has {own.rank}")
        if own.batch_dim is not None:
            batch = _agreed("a batch", batch, value, own.batch_dim, name)
        for dim, axis, _ in own.seq_dims:
            lengths[axis] = _agreed(f"a length of axis {axis!r}", lengths.get(axis), value, dim, name)
    return None if batch is None else batch[0], {axis: length for axis, (length, _) in lengths.items()}


def _agreed(what: str, known: tuple[int, str] | None, value: torch.Tensor, dim: int, name: str) -> tuple[int, str]:
    size = value.shape[dim]
    if known is not None and known[0] != size:
        raise FeedError(
            f"input {name!r} {tuple(value.shape)} has {what} of {size} (its dim {dim}), but {known[1]!r} of "
            f"{known[0]}; shard_inputs takes the whole, unsharded inputs of one step"
        )
    return known or (size, name)


def _sharded(name: str, value: torch.Tensor, own: InputAxes, streams: Mapping[str, Streams]) -> torch.Tensor:
    # rows first: what is left for the columns is the shard's
    for dim, axis, role in sorted(own.seq_dims, key=lambda entry: entry[2] == COL):
        along = streams[axis]
        if own.batch_dim is None and along.order is not None and along.order.shape[0] > 1:
            raise _no_batch(name, value)
        value = along.along(value, dim, own.batch_dim, role)
    return value.contiguous()
