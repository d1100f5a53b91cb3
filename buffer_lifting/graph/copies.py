"""Copies nodes from one graph to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from buffer_lifting.torch_compat import set_operands


def copy_node(graph: Graph, node: Node, transform: Callable[[Node], Any]) -> Node:
    """What ``Graph.node_copy`` does, for arguments that are known to be good.

    ``Graph.create_node`` walks the arguments that it is given to find raw symbolic sizes, which costs as much as the
    rest of it; a node that was taken from a graph has none.
    """
    copied = graph.create_node(node.op, node.target, (), {}, node.name, node.type)
    kwargs = node.kwargs
    set_operands(copied, map_arg(node.args, transform), map_arg(kwargs, transform) if kwargs else kwargs)
    copied.meta.update(node.meta)  # to set an attribute of a node moves it in the graph's tables
    return copied


def erase_unused(graph: Graph, candidate: Callable[[Node], bool]) -> None:
    """Erases the nodes without users that are candidates, and those that have none then.

    ``Graph.eliminate_dead_code`` checks the whole graph each time before it begins.
    """
    for node in reversed(graph.nodes):
        if not node.users and candidate(node):
            graph.erase_node(node)
