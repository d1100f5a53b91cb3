"""Attention by an exchange of heads for rows (DeepSpeed-Ulysses, arXiv 2309.14509): all rows of some heads a rank."""

from __future__ import annotations

import torch
from torch.fx import Node

from buffer_lifting.passes.collectives import Emit, gather_dim
from buffer_lifting.torch_compat import ALL_TO_ALL, WAIT, schema_args

_HEADS, _ROWS = 1, 2  # dims of [batch, heads, rows, head dim]


class HeadExchange:
    """Emits the attention nodes of one graph; ``size`` ranks along ``mesh_dim``. A mask is exchanged once."""

    def __init__(self, size: int, mesh_dim: str) -> None:
        self.size, self.mesh_dim = size, mesh_dim
        self._masks: dict[tuple[Node, bool], Node] = {}

    def attention(self, emit: Emit, mask_emit: Emit, node: Node) -> Node:
        """The result of attention ``node`` on a rank's rows, computed on all rows of its heads.

        ``emit`` inserts in front of ``node``, ``mask_emit`` behind the mask.
        """
        args = dict(schema_args(node))
        query, key, value = (self._to_heads(emit, args[name]) for name in ("query", "key", "value"))
        mask = args["attn_mask"]
        if isinstance(mask, Node):
            mask = self._mask(mask_emit, mask)
        result = emit(
            node.target,
            query,
            key,
            value,
            mask,
            0.0,
            False,
            scale=args["scale"],
            enable_gqa=args["enable_gqa"],
        )
        before = node.meta["val"]
        return self._to_rows(emit, result, before.transpose(_HEADS, _ROWS).is_contiguous())

    def _mask(self, emit: Emit, mask: Node) -> Node:
        """All rows of a mask ``[..., rows, keys]``: of this rank's heads, where it has heads."""
        shape = mask.meta["val"].shape
        by_head = len(shape) == 4 and shape[_HEADS] != 1
        if (mask, by_head) not in self._masks:
            if shape[-2] == 1:
                whole = mask  # the same for all rows
            elif not by_head:
                whole = gather_dim(emit, mask, len(shape) - 2, self.size, self.mesh_dim)
            else:
                numbers = emit(torch.ops.aten.to.dtype, mask, torch.uint8) if _boolean(mask) else mask
                whole = self._to_heads(emit, numbers)
                whole = emit(torch.ops.aten.to.dtype, whole, torch.bool) if _boolean(mask) else whole
            self._masks[(mask, by_head)] = whole
        return self._masks[(mask, by_head)]

    def _to_heads(self, emit: Emit, value: Node) -> Node:
        """``[B, H, S / size, D]`` of every rank -> ``[B, H / size, S, D]``."""
        aten = torch.ops.aten
        heads = int(value.meta["val"].shape[_HEADS])
        split = emit(aten.unflatten.int, value, _HEADS, [self.size, heads // self.size])
        moved = self._exchange(emit, emit(aten.permute.default, split, [1, 0, 2, 3, 4]))
        return emit(aten.flatten.using_ints, emit(aten.permute.default, moved, [1, 2, 0, 3, 4]), 2, 3)

    def _to_rows(self, emit: Emit, value: Node, rows_first: bool) -> Node:
        """``[B, H / size, S, D]`` of every rank -> ``[B, H, S / size, D]``; laid out as ``[B, S, H, D]`` if asked."""
        aten = torch.ops.aten
        split = emit(aten.unflatten.int, value, _ROWS, [self.size, -1])
        moved = self._exchange(emit, emit(aten.permute.default, split, [2, 0, 1, 3, 4]))
        if rows_first:
            laid = emit(aten.flatten.using_ints, self._packed(emit, moved, [1, 3, 0, 2, 4]), 2, 3)
            return emit(aten.permute.default, laid, [0, 2, 1, 3])
        return emit(aten.flatten.using_ints, self._packed(emit, moved, [1, 0, 2, 3, 4]), _HEADS, 2)

    def _packed(self, emit: Emit, value: Node, dims: list[int]) -> Node:
        """Permuted and contiguous: with one head a rank, flattening would give a view, which readers cannot view on."""
        moved = emit(torch.ops.aten.permute.default, value, dims)
        return emit(torch.ops.aten.clone.default, moved, memory_format=torch.contiguous_format)

    def _exchange(self, emit: Emit, value: Node) -> Node:
        """Part ``i`` along dim 0 goes to rank ``i``, whose part for this rank comes in its place."""
        packed = emit(torch.ops.aten.clone.default, value, memory_format=torch.contiguous_format)
        ones = [1] * self.size
        return emit(WAIT, emit(ALL_TO_ALL, packed, ones, ones, self.mesh_dim))


def _boolean(node: Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)
