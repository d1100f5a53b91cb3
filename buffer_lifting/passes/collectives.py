"""The collectives of a context-parallel graph: torch's functional ones, with autograd.

In the graph, a collective names its group by the mesh dim (``"cp"``). :func:`bind_group` puts the name of a process
group in its place, once there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch.fx import Graph, Node

from buffer_lifting.ring import RING
from buffer_lifting.torch_compat import ALL_GATHER, ALL_TO_ALL, WAIT

#: The group is the last argument of each.
COLLECTIVES = (ALL_GATHER, ALL_TO_ALL, RING)
Emit = Callable[..., Node]


class Exchange(Protocol):
    """A strategy that does not gather keys: it replaces attention nodes."""

    def attention(self, emit: Emit, mask_emit: Emit, node: Node) -> Node:
        """The result of ``node``; ``emit`` inserts in front of it, ``mask_emit`` behind its mask."""
        ...


def gather_dim(emit: Emit, value: Node, dim: int, size: int, mesh_dim: str) -> Node:
    """Nodes that concatenate ``value`` of all ranks along ``dim``, in the order of the ranks.

    A gather concatenates along dim 0; its backward sums the gradients of all ranks and scatters them.
    """
    rank = len(value.meta["val"].shape)
    front = [dim, *(d for d in range(rank) if d != dim)]
    back = [front.index(d) for d in range(rank)]
    aten = torch.ops.aten
    boolean = value.meta["val"].dtype == torch.bool
    if boolean:  # not every backend sends booleans
        value = emit(aten.to.dtype, value, torch.uint8)
    moved = emit(aten.permute.default, value, front) if dim else value
    packed = emit(aten.clone.default, moved, memory_format=torch.contiguous_format)
    whole = emit(WAIT, emit(ALL_GATHER, packed, size, mesh_dim))
    whole = emit(aten.permute.default, whole, back) if dim else whole
    return emit(aten.to.dtype, whole, torch.bool) if boolean else whole


def collectives(graph: Graph) -> Iterator[Node]:
    """The nodes that exchange data between ranks."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COLLECTIVES:
            yield node


def bind_group(graph: Graph, name: str) -> int:
    """Gives every collective the name of a process group, as torch registers it; returns how many had another."""
    count = 0
    for node in collectives(graph):
        if node.args[-1] != name:
            node.args = (*node.args[:-1], name)
            count += 1
    return count
