"""Attention by torch's ring: keys and values of all ranks come to a rank's rows one rank after the other."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch.fx import Node

from buffer_lifting.passes.collectives import Emit
from buffer_lifting.ring import RING
from buffer_lifting.torch_compat import schema_args


class Ring:
    """Emits the attention nodes of one graph; ``size`` ranks along ``mesh_dim``.

    ``slots``: for each node that is causal, by its name, where the rows of a rank stand, ``[batch, rows]``.
    """

    def __init__(self, size: int, mesh_dim: str, slots: Mapping[str, Node]) -> None:
        self.size, self.mesh_dim, self.slots = size, mesh_dim, slots

    def attention(self, emit: Emit, mask_emit: Emit, node: Node) -> Node:
        """The result of attention ``node``, which is full or causal by flag, ``[batch, heads, rows, head dim]``.

        ``emit`` inserts in front of ``node``.
        """
        args = schema_args(node)
        slots = self.slots.get(node.name)
        assert args["attn_mask"] is None and (slots is not None) == bool(args["is_causal"])
        found = emit(RING, args["query"], args["key"], args["value"], slots, args["scale"], self.size, self.mesh_dim)
        result = emit(operator.getitem, found, 0)
        if node.meta["val"].transpose(1, 2).is_contiguous():
            return result
        return emit(torch.ops.aten.clone.default, result, memory_format=torch.contiguous_format)
