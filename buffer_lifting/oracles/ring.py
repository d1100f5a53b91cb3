"""What torch's ring attention computes on all ranks, in one process: attention in full, as its loop takes the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from buffer_lifting.ring_order import is_head_tail
from buffer_lifting.torch_compat import head_tail_indices


def ring_of_ranks(calls: Sequence[Sequence[Any]]) -> list[tuple[Tensor, ...]]:
    """The results of the op on each rank, of its arguments there.

    A causal ring does not read the slots but for which of its two orders they are: neither does this.

    Raises:
        FeedError: the slots of a rank are in neither.
        RuntimeError: those of two ranks are in other ones.
    """
    ranks = len(calls)
    key, value = (torch.cat([call[place] for call in calls], 2) for place in (1, 2))
    kinds = {None if call[3] is None else is_head_tail(call[3], rank, ranks) for rank, call in enumerate(calls)}
    if len(kinds) > 1:
        raise RuntimeError("the ranks of a ring have their rows in different orders")
    (head_tail,) = kinds
    length = key.shape[2]
    places = head_tail_indices(length, ranks)[0] if head_tail else torch.arange(length)
    results = []
    for rank, (query, _, _, _, scale, *_) in enumerate(calls):
        rows = places[rank * query.shape[2] : (rank + 1) * query.shape[2]]
        mask = None if head_tail is None else places <= rows[:, None]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
        rest = (query.new_empty(0) for _ in range(3))  # what the real backward needs
        results.append((out.transpose(1, 2).contiguous().transpose(1, 2), *rest))
    return results
