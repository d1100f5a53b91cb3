"""Masks in the form that a fused attention kernel takes."""

from __future__ import annotations

import torch
from torch.fx import Node

from buffer_lifting.ops import ATTENTION
from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.torch_compat import schema_args


def mask_for(emitter: Emitter, node: Node, mask: Node, made: dict[tuple[Node, torch.dtype], Node]) -> Node:
    """A boolean mask as ``node`` takes it: the public op as it is, a kernel as what is added to the scores.

    The result has the queries' dtype, 0 where the mask allows and ``-inf`` elsewhere. ``made`` keeps those that were
    made for earlier nodes.
    """
    if str(node.target).rsplit(".", 1)[0] == ATTENTION:
        return mask
    query = schema_args(node)["query"]
    key = (mask, query.meta["val"].dtype)
    if key not in made:
        allowed = emitter.before(node, "aten.new_zeros.default", (query, ()))
        blocked = emitter.before(node, "aten.new_full.default", (query, (), float("-inf")))
        made[key] = emitter.before(node, "aten.where.self", (mask, allowed, blocked))
    return made[key]
