"""The two index streams of each axis, for one rank and step: which global slots this shard holds, and their ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.labels import COL
from buffer_lifting.torch_compat import balancer_indices, is_load_balancer, mesh_shard


class Streams:
    """Validated ``order``, ``positions`` and ``shard`` of one axis. Index tensors are ``[1 or batch, seq]`` int64.

    ``axis`` names the axis in messages, where there are several.

    Raises:
        FeedError: a tensor of the wrong dtype, shape or range, an order that is no permutation, or a shard that
            does not divide the sequence.
    """

    def __init__(
        self,
        batch_size: int,
        length: int,
        order: Any = None,
        positions: Any = None,
        shard: Any = (0, 1),
        axis: str = "",
    ) -> None:
        self.batch_size, self.length = batch_size, length
        self.rank, self.size = parse_shard(shard)
        of = f" of axis {axis!r}" if axis else ""
        if length % self.size:
            raise FeedError(f"a sequence of {length}{of} does not divide into {self.size} shards")
        if is_load_balancer(order):
            order = balancer_indices(order)
        self.order = None if order is None else self._checked(f"order{of}", order, permutation=True)
        self.positions = None if positions is None else self._checked(f"positions{of}", positions, permutation=False)

    def _checked(self, name: str, value: Any, permutation: bool) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise FeedError(f"{name} is a tensor, a torch load balancer or None, not {type(value).__name__}")
        if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise FeedError(f"{name} holds indices and must have an integer dtype, not {value.dtype}")
        if value.ndim not in (1, 2) or value.shape[-1] != self.length:
            raise FeedError(
                f"{name} has shape {tuple(value.shape)}; the whole sequence wants ({self.length},), (1, {self.length}) "
                f"or ({self.batch_size}, {self.length})"
            )
        value = value.to(torch.int64)
        value = value.unsqueeze(0) if value.ndim == 1 else value
        if value.shape[0] not in (1, self.batch_size):
            raise FeedError(f"{name} has {value.shape[0]} rows for a batch of {self.batch_size}; one or all are wanted")
        low, high = (int(v) for v in torch.aminmax(value))
        if low < 0 or high >= self.length:
            raise FeedError(f"{name} holds {low if low < 0 else high}, outside 0..{self.length - 1}")
        if permutation:
            seen = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
            seen.scatter_(1, value, True)
            if not bool(seen.all()):
                sample = int((~seen.all(1)).nonzero()[0, 0])
                raise FeedError(f"{name} of sample {sample} holds some slot twice (and so another one never)")
        return value

    def _slots(self, role: str) -> torch.Tensor | None:
        """The slots that a value of ``role`` holds, ``[1 or batch, seq]``; ``None`` for natural order."""
        if self.order is None or role == COL:
            return self.order
        return self._local(self.order)

    def _local(self, value: torch.Tensor) -> torch.Tensor:
        part = self.length // self.size
        return value[:, self.rank * part : (self.rank + 1) * part]

    def _index(self, stream: str, role: str) -> torch.Tensor | None:
        slots = self._slots(role)
        if stream != "positions" or self.positions is None:
            return slots
        if slots is None:
            return self.positions if role == COL else self._local(self.positions)
        positions = self.positions
        rows = max(positions.shape[0], slots.shape[0])
        return positions.to(slots.device).expand(rows, -1).gather(1, slots.expand(rows, -1))

    def index(self, length: int, stream: str, role: str, device: torch.device | None) -> torch.Tensor:
        """The index itself, ``[1 or batch, seq]`` int64."""
        value = self._index(stream, role)
        if value is None:
            value = torch.arange(length, device=device).unsqueeze(0)
            value = value if role == COL else self._local(value)
        return value if device is None else value.to(device)

    def take(self, table: torch.Tensor, length: int, stream: str, role: str) -> torch.Tensor:
        """Rows of ``table [seq, *row]``: ``[1 or batch, local seq, *row]``; a view when the order is natural."""
        index = self._index(stream, role)
        if index is None:
            part = table.unsqueeze(0)
            return part if role == COL else self._local(part)
        index = index.to(table.device)
        rows = table.index_select(0, index.reshape(-1))
        return rows.view(*index.shape, *table.shape[1:])

    def take_batched(self, values: torch.Tensor, length: int, role: str) -> torch.Tensor:
        """Rows of ``values [1 or batch, seq, *row]`` by slot."""
        slots = self._slots(role)
        if slots is None:
            return values if role == COL else self._local(values)
        slots = slots.to(values.device)
        if slots.shape[0] == 1:
            return values.index_select(1, slots[0])
        rows = values.expand(slots.shape[0], *values.shape[1:])
        index = slots.view(*slots.shape, *[1] * (values.ndim - 2)).expand(*slots.shape, *values.shape[2:])
        return rows.gather(1, index)

    def position_rows(self, length: int) -> list[torch.Tensor]:
        """The position ids of the whole sequence in natural order, one ``[seq]`` tensor a distinct sample."""
        if self.positions is None:
            return [torch.arange(length)]
        return list(self.positions)


def axis_streams(
    batch_size: int, lengths: Mapping[str, int], order: Any = None, positions: Any = None, shard: Any = (0, 1)
) -> dict[str, Streams]:
    """The streams of every axis, by name; ``order`` and ``positions`` as :func:`by_axis` takes them.

    Raises:
        FeedError: what :class:`Streams` and :func:`by_axis` refuse.
    """
    orders, ids = by_axis("order", order, lengths), by_axis("positions", positions, lengths)
    several = len(lengths) > 1
    return {
        axis: Streams(batch_size, length, orders[axis], ids[axis], shard, axis if several else "")
        for axis, length in lengths.items()
    }


def by_axis(name: str, value: Any, axes: Collection[str]) -> dict[str, Any]:
    """An argument of each axis: a mapping from axis name (``None`` where it lacks one), or one value for one axis.

    Raises:
        FeedError: one value for several axes, or a name that is no axis.
    """
    known = ", ".join(repr(axis) for axis in sorted(axes)) or "none"
    if value is None:
        return dict.fromkeys(axes)
    if isinstance(value, Mapping):
        unknown = sorted(str(axis) for axis in value if axis not in axes)
        if unknown:
            raise FeedError(f"{name} names the axes {', '.join(map(repr, unknown))}; the program's are {known}")
        return {axis: value.get(axis) for axis in axes}
    if len(axes) > 1:
        raise FeedError(
            f"the program has several sequence axes, {known}: give {name} as a mapping from axis name; an axis that "
            "it lacks stays as it is"
        )
    return dict.fromkeys(axes, value)


def parse_shard(shard: Any) -> tuple[int, int]:
    """``(rank, size)`` of a pair or a 1-D DeviceMesh.

    Raises:
        FeedError: anything else, or a rank outside the size.
    """
    pair = mesh_shard(shard)
    if pair is None:
        if not isinstance(shard, tuple) or len(shard) != 2 or not all(isinstance(part, int) for part in shard):
            raise FeedError(f"shard is (rank, size) or a 1-D DeviceMesh, not {shard!r}")
        pair = shard
    rank, size = pair
    if size < 1 or not 0 <= rank < size:
        raise FeedError(f"shard {pair}: the rank is outside 0..{size - 1}")
    return rank, size
