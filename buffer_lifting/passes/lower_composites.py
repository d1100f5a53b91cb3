"""Writes the composite ops that lifting emits as those that torch decomposes them to.

A graph that AOTAutograd has captured has no composite ops any more, and compilers behind it expect none.

Cases handled: ``reshape``, ``flatten``, ``where`` with a number. Case left alone: every other op.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.passes.fakes import Fakes

_ATEN = torch.ops.aten


def lower_composites(graph: Graph, known: Container[str]) -> None:
    """Lowers the calls whose names are not ``known``."""
    fakes = Fakes(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.name in known:
            continue
        with graph.inserting_before(node):
            made = _lowered(graph, node, fakes)
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _lowered(graph: Graph, node: Node, fakes: Fakes) -> Node | None:
    if node.target is _ATEN.reshape.default:
        return _view(graph, node, node.args[0], node.args[1], fakes)
    if node.target is _ATEN.flatten.using_ints:
        source: Any = node.args[0]
        first, last = (int(arg) for arg in node.args[1:])  # type: ignore[arg-type]
        shape = source.meta["val"].shape
        sizes = [*(_size(graph, node, source, d) for d in range(first)), -1]
        sizes += [_size(graph, node, source, d) for d in range(last + 1, len(shape))]
        return _view(graph, node, source, sizes, fakes)
    if node.target is _ATEN.where.ScalarOther:
        condition, value, number = node.args
        assert isinstance(value, Node)
        if value.meta["val"].dtype != node.meta["val"].dtype:
            return None
        other = _call(graph, node, _ATEN.new_full.default, (value, [], number), {}, fakes)
        return _call(graph, node, _ATEN.where.self, (condition, value, other), {}, fakes)
    return None


def _view(graph: Graph, node: Node, source: Any, sizes: Any, fakes: Fakes) -> Node:
    """The same storage in another shape, or a copy of it where there is no such view."""
    try:
        return _call(graph, node, _ATEN.view.default, (source, sizes), {}, fakes)
    except (RuntimeError, ValueError):
        whole = {"memory_format": torch.contiguous_format}
        copied = _call(graph, node, _ATEN.clone.default, (source,), whole, fakes)
        return _call(graph, node, _ATEN.view.default, (copied, sizes), {}, fakes)


def _size(graph: Graph, node: Node, source: Node, dim: int) -> Any:
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    made = graph.call_function(_ATEN.sym_size.int, (source, dim))
    made.meta = {**node.meta, "val": size}
    return made


def _call(graph: Graph, node: Node, target: Any, args: Any, kwargs: dict[str, Any], fakes: Fakes) -> Node:
    value = fakes.of(target, args, kwargs)
    made = graph.call_function(target, args, kwargs)
    made.meta = {**node.meta, "val": value}
    return made
