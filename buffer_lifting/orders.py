"""Validation of orders and position ids: every step passes here, so it costs a few passes over the indices."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.torch_compat import balancer_indices, is_load_balancer

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_GROUP = 1 << 15  # indices counted at once: their counts stay in the cache of a core

#: Copies of the last orders for all samples that were found to be permutations. An order that equals one of them, by
#: content, is valid. Never by identity: a data loader's buffer changes without a trace in the tensor that shares it.
_known: deque[torch.Tensor] = deque(maxlen=4)


def resolve(name: str, order: Any, size: int = 1) -> Any:
    """An order as it was given; of a load balancer, its indices.

    Raises:
        FeedError: a load balancer that has no indices, that refuses to make them, or that was made for another number
            of ranks than ``size`` (1: any).
    """
    if not is_load_balancer(order):
        return order
    kind = type(order).__name__
    made_for = getattr(order, "world_size", size)  # not every balancer knows
    if size > 1 and isinstance(made_for, int) and made_for != size:
        raise FeedError(
            f"{name}: the load balancer {kind} was made for {made_for} ranks, but the shard is one of {size}; make it "
            f"with world_size={size}"
        )
    try:
        indices = balancer_indices(order)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        facts = ", ".join(f"{key}={value!r}" for key, value in vars(order).items() if isinstance(value, int))
        raise FeedError(
            f"{name}: the load balancer {kind}({facts}) makes no indices: "
            f"{str(error) or 'it asserts that every length divides into 2 x world_size chunks'}"
        ) from error
    if indices is None:
        raise FeedError(f"{name}: the load balancer {kind} has no indices (None); the natural order is {name}=None")
    if not isinstance(indices, torch.Tensor):
        raise FeedError(f"{name}: the load balancer {kind} has indices of type {type(indices).__name__}, not a tensor")
    return indices


def checked_order(name: str, value: Any, batch_size: int, length: int, where: str = "") -> torch.Tensor:
    """An order as ``[1 or batch, length]`` of its own integer dtype; equal orders give the same tensor.

    Raises:
        FeedError: no integer tensor, a wrong shape, or a row that is no permutation of ``0..length - 1``.
    """
    value = _rows(name, value, batch_size, length, where)
    for known in _known if len(value) == 1 else ():
        alike = known.shape == value.shape and known.dtype == value.dtype and known.device == value.device
        if alike and torch.equal(known, value):
            return known
    _check_range(name, value, length, where)
    sample = _repeating_row(value)
    if sample is not None:
        raise FeedError(f"{name} of sample {sample} holds some slot twice (and so another one never){where}")
    if len(value) == 1:
        value = value.clone(memory_format=torch.contiguous_format)
        _known.appendleft(value)
    return value


def checked_positions(name: str, value: Any, batch_size: int, length: int, where: str = "") -> torch.Tensor:
    """Position ids as ``[1 or batch, length]`` int64.

    Raises:
        FeedError: no integer tensor, a wrong shape, or an id outside ``0..length - 1``.
    """
    value = _rows(name, value, batch_size, length, where)
    _check_range(name, value, length, where)
    return value.to(torch.int64)


def _rows(name: str, value: Any, batch_size: int, length: int, where: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise FeedError(f"{name} is a tensor, a torch load balancer or None, not {type(value).__name__}{where}")
    if value.dtype not in _INTEGERS:
        raise FeedError(f"{name} holds indices and must have an integer dtype, not {value.dtype}{where}")
    if value.ndim not in (1, 2) or value.shape[-1] != length:
        raise FeedError(
            f"{name} has shape {tuple(value.shape)}; the whole sequence wants ({length},), (1, {length}) "
            f"or ({batch_size}, {length}){where}"
        )
    if value.ndim == 1:
        return value.unsqueeze(0)
    if value.shape[0] not in (1, batch_size):
        raise FeedError(f"{name} has {value.shape[0]} rows for a batch of {batch_size}; one or all are wanted{where}")
    return value[:1] if value.stride(0) == 0 else value  # one row, expanded to the batch


def _check_range(name: str, value: torch.Tensor, length: int, where: str) -> None:
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= length:
        raise FeedError(f"{name} holds {low if low < 0 else high}, outside 0..{length - 1}{where}")


def _repeating_row(rows: torch.Tensor) -> int | None:
    """The first row that holds an index twice; the indices are in ``0..length - 1``."""
    length = rows.shape[1]
    count = max(1, _GROUP // length)
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        if len(part) > 1:
            part = part + torch.arange(len(part), device=part.device).unsqueeze(1) * length
        times = torch.bincount(part.reshape(-1), minlength=len(part) * length)
        if int(times.max()) > 1:
            return start + int((times > 1).nonzero()[0, 0]) // length
    return None
