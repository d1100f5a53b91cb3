"""Attention by torch's ring: keys and values of all ranks come to a rank's rows one rank after the other."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from buffer_lifting.passes.collectives import Emit
from buffer_lifting.ring import RING
from buffer_lifting.torch_compat import schema_args


def ring_in_place_of(emit: Emit, node: Node, slots: Node | None, size: int, mesh_dim: str) -> Node:
    """The result of ``node``, which is full or causal by flag, ``[batch, heads, rows, head dim]``, laid out alike.

    Args:
        emit: inserts in front of ``node``.
        node: the attention, on the rows of a rank.
        slots: where these rows stand in the sequence, ``[batch, rows]``; wanted if ``node`` is causal.
        size: ranks along ``mesh_dim``.
        mesh_dim: stands for the group until there is one.
    """
    args = schema_args(node)
    assert args["attn_mask"] is None and (slots is not None) == bool(args["is_causal"])
    found = emit(RING, args["query"], args["key"], args["value"], slots, args["scale"], size, mesh_dim)
    result = emit(operator.getitem, found, 0)
    if node.meta["val"].transpose(1, 2).is_contiguous():
        return result
    return emit(torch.ops.aten.clone.default, result, memory_format=torch.contiguous_format)
