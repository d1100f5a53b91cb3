"""The two orders that torch's ring attention is written for: which pairs it leaves out is fixed in its loop."""

from __future__ import annotations

import torch
from torch import Tensor

from buffer_lifting.errors import FeedError
from buffer_lifting.torch_compat import head_tail_indices


def is_head_tail(slots: Tensor, rank: int, ranks: int) -> bool:
    """Whether a rank's slots ``[1 or batch, S / ranks]`` are those of the head-tail order; else they are contiguous.

    Raises:
        FeedError: they are neither, or differ between samples.
    """
    rows = slots.shape[1]
    begin = rank * rows
    if _shared(slots):
        if torch.equal(slots[0], torch.arange(begin, begin + rows, dtype=slots.dtype, device=slots.device)):
            return False
        if rows % 2 == 0:
            part = head_tail_indices(rows * ranks, ranks)[0, begin : begin + rows]
            if torch.equal(slots[0], part.to(slots)):
                return True
    raise _refused(rank, ranks)


def check_order(order: Tensor, rank: int, ranks: int, axis: str = "") -> None:
    """Refuses an order ``[1 or batch, S]`` that is neither contiguous nor head-tail; ``axis`` is for the message.

    Raises:
        FeedError: such an order, or one that differs between samples.
    """
    length = order.shape[1]
    if _shared(order):
        allowed = [torch.arange(length)]
        if length % (2 * ranks) == 0:
            allowed.append(head_tail_indices(length, ranks)[0])
        if any(torch.equal(order[0], one.to(order)) for one in allowed):
            return
    raise _refused(rank, ranks, axis)


def _shared(rows: Tensor) -> bool:
    return rows.shape[0] == 1 or rows.stride(0) == 0 or bool((rows == rows[:1]).all())


def _refused(rank: int, ranks: int, axis: str = "") -> FeedError:
    of = f" of axis {axis!r}" if axis else ""
    return FeedError(
        f"order{of}: torch's ring attention is right for two orders of causal attention only, contiguous (order=None) "
        "and head-tail (torch's _HeadTailLoadBalancer), the same for all samples; context_parallel with "
        f"strategy='allgather' or 'alltoall' takes any (context-parallel rank {rank} of {ranks})"
    )
