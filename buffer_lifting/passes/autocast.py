"""Writes out the casts of an autocast region, so that its body can be inlined.

Which operands are cast is decided by :mod:`buffer_lifting.graph.autocast_rule`, here and in the record of an archive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.graph.autocast_rule import Operand, cast_dtype
from buffer_lifting.torch_compat import OpOverload, argument_names, fake_mode_of, tree_flatten


def with_casts(graph: Graph, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The operands of a body node, cast where autocast would (once for each use: an exported region has no cache)."""
    if not isinstance(node.target, OpOverload):
        return args, kwargs
    operands = [item.meta.get("val") for item in tree_flatten((args, kwargs))[0] if isinstance(item, Node)]
    tensors = [Operand(_name(value), value.dim()) for value in operands if isinstance(value, torch.Tensor)]
    results = [_name(value) for value in tree_flatten(node.meta.get("val"))[0] if isinstance(value, torch.Tensor)]
    namespace = node.target.namespace
    found = cast_dtype(f"{namespace}.{node.target.__name__}", results, tensors, _dtype_given(node.target, args, kwargs))
    if found is None:
        return args, kwargs
    target = getattr(torch, found)
    return torch.fx.map_arg((args, kwargs), lambda n: _cast(graph, n, target, node))


def _cast(graph: Graph, node: Node, dtype: torch.dtype, reader: Node) -> Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return node
    made = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    with fake_mode_of(value), torch.no_grad():
        made.meta = {**reader.meta, "val": value.to(dtype)}  # a parameter has no module stack
    return made


def _dtype_given(target: OpOverload, args: Any, kwargs: Any) -> bool:
    names = argument_names(target)
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("dtype") is not None


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
