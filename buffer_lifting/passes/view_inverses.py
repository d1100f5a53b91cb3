"""From a view that is written back to what it looks at: the value of the whole with the written part in its place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.torch_compat import schema_args

aten = torch.ops.aten
#: ``(graph, view, source, value)`` to what ``source`` holds once ``value`` is written through ``view`` of it.
Inverse = Callable[[Graph, Node, Node, Node], Node]


def _slice_scatter(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    named = schema_args(view)
    bounds = tuple(named[key] for key in ("dim", "start", "end", "step"))
    return graph.call_function(aten.slice_scatter.default, (source, value, *bounds))


def _narrow_scatter(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    named = schema_args(view)
    size = view.meta["val"].shape[named["dim"]]
    if isinstance(named["start"], int) and isinstance(size, int):
        return graph.call_function(
            aten.slice_scatter.default, (source, value, named["dim"], named["start"], named["start"] + size)
        )
    end = graph.call_function(operator.add, (named["start"], named["length"]))
    end.meta = {"val": _number(named["start"]) + _number(named["length"])}
    return graph.call_function(aten.slice_scatter.default, (source, value, named["dim"], named["start"], end))


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def _select_scatter(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    named = schema_args(view)
    return graph.call_function(aten.select_scatter.default, (source, value, named["dim"], named["index"]))


def _permuted(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    order = list(view.args[1])  # type: ignore[arg-type]
    order = [d % len(order) for d in order]
    return graph.call_function(aten.permute.default, (value, [order.index(d) for d in range(len(order))]))


def _transposed(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    return graph.call_function(aten.transpose.int, (value, *view.args[1:]))


def _same_shape(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    return graph.call_function(aten.view_as.default, (value, source))


def _itself(graph: Graph, view: Node, source: Node, value: Node) -> Node:
    return graph.call_function(aten.alias.default, (value,))


INVERSES: dict[Any, Inverse] = {
    aten.slice: _slice_scatter,
    aten.narrow: _narrow_scatter,
    aten.select: _select_scatter,
    aten.permute: _permuted,
    aten.transpose: _transposed,
    aten.t: lambda graph, view, source, value: graph.call_function(aten.t.default, (value,)),
    aten.unsqueeze: _same_shape,
    aten.squeeze: _same_shape,
    aten.view: _same_shape,
    aten.unflatten: _same_shape,
    aten.alias: _itself,
    aten.detach: _itself,
}
