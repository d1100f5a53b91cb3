"""The two index streams of each axis, for one rank and step: which global slots this shard holds, and their ids."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.labels import COL
from buffer_lifting.orders import checked_order, checked_positions, resolve
from buffer_lifting.ring_order import check_order
from buffer_lifting.torch_compat import as_mesh

_ROW = 8  # elements; shorter rows of a batch are gathered one by one


class Streams:
    """Validated ``order``, ``positions`` and ``shard`` of one axis.

    ``order`` is ``[1 or batch, seq]`` of an integer dtype, ``positions`` ``[1 or batch, seq]`` int64; either may be
    ``None``. ``axis`` names the axis in messages, where there are several.

    Raises:
        FeedError: a tensor of the wrong dtype, shape or range, an order that is no permutation, a load balancer
            without indices, or a shard that does not divide the sequence.
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
        where = f" (context-parallel rank {self.rank} of {self.size})" if self.size > 1 else ""
        if length % self.size:
            raise FeedError(f"a sequence of {length}{of} does not divide into {self.size} shards{where}")
        order = resolve(f"order{of}", order, self.size)
        self.order = None if order is None else checked_order(f"order{of}", order, batch_size, length, where)
        self.positions = (
            None if positions is None else checked_positions(f"positions{of}", positions, batch_size, length, where)
        )

    def check_ring(self, axis: str = "") -> None:
        """Refuses an order that torch's ring attention does not follow.

        Raises:
            FeedError: another order than contiguous and head-tail, or one that differs between samples.
        """
        if self.order is not None:
            check_order(self.order, self.rank, self.size, axis)

    def samples(self, start: int, count: int) -> Streams:
        """The streams of ``count`` samples from ``start``."""
        part = copy.copy(self)
        part.batch_size = count
        if self.order is not None and self.order.shape[0] > 1:
            part.order = self.order[start : start + count]
        if self.positions is not None and self.positions.shape[0] > 1:
            part.positions = self.positions[start : start + count]
        return part

    def _slots(self, role: str) -> torch.Tensor | None:
        """The slots that a value of ``role`` holds, ``[1 or batch, seq]``; ``None`` for natural order."""
        if self.order is None or role == COL:
            return self.order
        return self._local(self.order)

    def _local(self, value: torch.Tensor) -> torch.Tensor:
        part = self.length // self.size
        return value.narrow(1, self.rank * part, part)

    def _index(self, stream: str, role: str) -> torch.Tensor | None:
        slots = self._slots(role)
        if stream != "positions" or self.positions is None:
            return slots
        if slots is None:
            return self.positions if role == COL else self._local(self.positions)
        positions = self.positions
        rows = max(positions.shape[0], slots.shape[0])
        slots = slots.to(torch.int64)
        return positions.to(slots.device).expand(rows, -1).gather(1, slots.expand(rows, -1))

    def index(self, length: int, stream: str, role: str, device: torch.device | None) -> torch.Tensor:
        """The index itself, ``[1 or batch, seq]`` int64; never memory that is kept from step to step."""
        value = self._index(stream, role)
        if value is None:
            value = torch.arange(length, device=device).unsqueeze(0)
            value = value if role == COL else self._local(value)
        return value.to(device=device or value.device, dtype=torch.int64, copy=self.order is not None)

    def take(self, table: torch.Tensor, length: int, stream: str, role: str) -> torch.Tensor:
        """Rows of ``table [seq, *row]``: ``[1 or batch, local seq, *row]``; a view when the order is natural."""
        index = self._index(stream, role)
        if index is None:
            part = table.unsqueeze(0)
            return part if role == COL else self._local(part)
        rows = table.index_select(0, _usable(index, table).reshape(-1))
        return rows.view(*index.shape, *table.shape[1:])

    def take_batched(self, values: torch.Tensor, length: int, role: str) -> torch.Tensor:
        """Rows of ``values [1 or batch, seq, *row]`` by slot: ``[1 or batch, local seq, *row]``."""
        slots = self._slots(role)
        if slots is None:
            return values if role == COL else self._local(values)
        if values.shape[0] == 1:
            return self.take(values[0], length, "slots", role)
        return self.along(values, 1, 0, role)

    def along(self, values: torch.Tensor, dim: int, batch_dim: int | None, role: str) -> torch.Tensor:
        """``values`` with its dim ``dim`` in the order, cut to the shard for role ``row``: only those rows are read.

        ``batch_dim`` has the size of the batch, or is ``None``, and then the order must be one for all samples.
        """
        slots = self._slots(role)
        if slots is None:
            part = self.length // self.size
            return values if role == COL else values.narrow(dim, self.rank * part, part)
        slots = _usable(slots, values)
        if slots.shape[0] == 1:
            return values.index_select(dim, slots[0])
        assert batch_dim is not None, "an order per sample wants a batch dim"
        count = slots.shape[1]
        if batch_dim == 0 and dim == 1 and values.is_contiguous() and values[0, 0].numel() >= _ROW:
            rows = values.view(-1, *values.shape[2:])
            firsts = torch.arange(len(slots), device=slots.device).unsqueeze(1) * values.shape[1]
            return rows.index_select(0, (slots + firsts).reshape(-1)).view(len(slots), count, *values.shape[2:])
        ones = [1] * values.ndim
        ones[batch_dim], ones[dim] = slots.shape
        index = (slots if batch_dim < dim else slots.t()).to(torch.int64).reshape(ones)
        shape = list(values.shape)
        shape[dim] = count
        return values.gather(dim, index.expand(shape))

    def position_rows(self, length: int) -> list[torch.Tensor]:
        """The position ids of the whole sequence in natural order, one ``[seq]`` tensor a distinct sample."""
        if self.positions is None:
            return [torch.arange(length)]
        return list(self.positions)


def _usable(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An index beside ``values``, of a dtype that index_select takes."""
    dtype = index.dtype if index.dtype in (torch.int64, torch.int32) else torch.int64
    return index.to(device=values.device, dtype=dtype)


def axis_streams(
    batch_size: int,
    lengths: Mapping[str, int],
    order: Any = None,
    positions: Any = None,
    shard: Any = (0, 1),
    ring_axes: Collection[str] = (),
) -> dict[str, Streams]:
    """The streams of every axis, by name; ``order`` and ``positions`` as :func:`by_axis` takes them.

    Raises:
        FeedError: what :class:`Streams` and :func:`by_axis` refuse; an order of one of ``ring_axes`` that ring
            attention does not follow.
    """
    orders, ids = by_axis("order", order, lengths), by_axis("positions", positions, lengths)
    several = len(lengths) > 1
    streams = {
        axis: Streams(batch_size, length, orders[axis], ids[axis], shard, axis if several else "")
        for axis, length in lengths.items()
    }
    for axis in ring_axes:
        if axis in streams:
            streams[axis].check_ring(axis if several else "")
    return streams


def by_axis(name: str, value: Any, axes: Collection[str]) -> dict[str, Any]:
    """An argument of each axis: a mapping from axis name (``None`` where it lacks one), or one value for one axis.

    Raises:
        FeedError: one value for several axes, or a name that is no axis.
    """
    if value is None:
        return dict.fromkeys(axes)
    if isinstance(value, Mapping):
        unknown = sorted(str(axis) for axis in value if axis not in axes)
        if unknown:
            raise FeedError(f"{name} names the axes {', '.join(map(repr, unknown))}; the program's are {_known(axes)}")
        return {axis: value.get(axis) for axis in axes}
    if len(axes) > 1:
        raise FeedError(
            f"the program has several sequence axes, {_known(axes)}: give {name} as a mapping from axis name; an axis "
            "that it lacks stays as it is"
        )
    return dict.fromkeys(axes, value)


def _known(axes: Collection[str]) -> str:
    return ", ".join(repr(axis) for axis in sorted(axes)) or "none"


def parse_shard(shard: Any, mesh_dim: str | None = None) -> tuple[int, int]:
    """``(rank, size)`` of a pair or a 1-D DeviceMesh, whose dim is called ``mesh_dim`` if both have a name.

    Raises:
        FeedError: anything else, or a rank outside the size.
    """
    mesh = as_mesh(shard)
    if mesh is None:
        if not isinstance(shard, tuple) or len(shard) != 2 or not all(isinstance(part, int) for part in shard):
            raise FeedError(f"shard is (rank, size) or a 1-D DeviceMesh, not {shard!r}")
        rank, size = shard
    else:
        names = mesh.mesh_dim_names or ()
        wanted = mesh_dim or "cp"
        if mesh.ndim != 1:
            hint = f"shard=mesh[{wanted!r}]" if wanted in names else "its context-parallel dim alone"
            raise FeedError(f"shard is a {mesh.ndim}-D DeviceMesh ({', '.join(names) or 'unnamed dims'}); give {hint}")
        if mesh_dim is not None and names and names != (mesh_dim,):
            raise FeedError(
                f"shard is the mesh dim {names[0]!r}, but the program was made for the context-parallel dim "
                f"{mesh_dim!r}"
            )
        place = mesh.get_coordinate()
        if place is None:
            raise FeedError(f"shard is the {mesh}, and rank {torch.distributed.get_rank()} is not in the mesh")
        rank, size = place[0], mesh.size()
    if size < 1 or not 0 <= rank < size:
        raise FeedError(f"shard {(rank, size)}: the rank is outside 0..{size - 1}")
    return rank, size
