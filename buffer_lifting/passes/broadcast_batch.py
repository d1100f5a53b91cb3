"""Adds the lifted placeholders and their batch-broadcast nodes.

Each lifted placeholder is ``[batch, seq, *row]`` (flat tokens: ``[seq, *row]``) and is followed by exactly one
``aten.expand`` to the data's batch size, below which all reads hang. The node states the shape contract in the
graph: it fails at once on a tensor whose batch dim is not the data's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import AxesError
from buffer_lifting.labels import BATCH, COL, ROW
from buffer_lifting.passes.emitter import AxisSizes
from buffer_lifting.plan import CutKey
from buffer_lifting.program import FeedOutput, InputAxes, LiftedInput
from buffer_lifting.torch_compat import fake_mode_of

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass
class Broadcast:
    """The nodes that this pass added."""

    placeholders: dict[str, Node] = field(default_factory=dict)  # by input name
    nodes: dict[CutKey, Node] = field(default_factory=dict)  # the broadcast node of each cut
    sizes: AxisSizes | None = None


def broadcast_batch(
    graph: Graph,
    outputs: dict[CutKey, FeedOutput],
    axes: dict[str, InputAxes],
    existing: dict[str, Node] | None = None,
) -> Broadcast:
    """Adds a placeholder and a broadcast node for each output, behind the last placeholder of ``graph``.

    ``existing`` maps names of inputs that an earlier pass added to their broadcast nodes; they are reused.

    Raises:
        AxesError: the graph has no user input with the axis.
    """
    result = Broadcast()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    carriers = _carriers(placeholders, axes)
    last = placeholders[-1]
    stack = root_stack(graph)
    added: list[tuple[CutKey, LiftedInput, Node]] = []
    for key, output in outputs.items():
        lifted = output.input
        if existing and lifted.name in existing:
            result.nodes[key] = existing[lifted.name]
            continue
        with graph.inserting_after(last):
            node = graph.placeholder(lifted.name)
        node.name = lifted.name
        node.meta["val"] = _fake(lifted, carriers)
        last = node
        result.placeholders[lifted.name] = node
        added.append((key, lifted, node))
    sizes = AxisSizes(graph, carriers, last, stack)
    if existing:
        sizes.last = max([last, *existing.values()])
    for key, lifted, node in added:
        batch: Any = -1
        if lifted.batched:
            size = carriers[(BATCH, "")][0].meta["val"].shape[carriers[(BATCH, "")][1]]
            batch = sizes.node(BATCH, "") if isinstance(size, torch.SymInt) else int(size)
        rank = len(node.meta["val"].shape)
        with graph.inserting_after(sizes.last):
            spread = graph.call_function(torch.ops.aten.expand.default, (node, [batch] + [-1] * (rank - 1)))
        spread.meta = {"nn_module_stack": stack, "val": node.meta["val"].expand(node.meta["val"].shape)}
        sizes.last = spread
        carriers.setdefault((key.axis, lifted.role), (spread, 1 if lifted.batched else 0))
        if not lifted.batched:
            with graph.inserting_after(spread):
                lane = graph.call_function(torch.ops.aten.unsqueeze.default, (spread, 0))
            lane.meta = {**spread.meta, "val": spread.meta["val"].unsqueeze(0)}
            sizes.last = spread = lane
        result.nodes[key] = spread
    result.sizes = sizes
    return result


def broadcast_nodes(graph: Graph, names: set[str]) -> dict[str, Node]:
    """The broadcast node of each lifted placeholder that the graph already has."""
    found = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names:
            (spread,) = node.users
            found[node.name] = spread
    return found


def _carriers(placeholders: list[Node], axes: dict[str, InputAxes]) -> dict[tuple[str, str], tuple[Node, int]]:
    """For the batch and each axis in each role, a user input and the dim of it that has that size."""
    carriers: dict[tuple[str, str], tuple[Node, int]] = {}
    for node in placeholders:
        own = axes.get(node.name)
        if own is None:
            continue
        if own.batch_dim is not None:
            carriers.setdefault((BATCH, ""), (node, own.batch_dim))
        for dim, axis, role in own.seq_dims:
            carriers.setdefault((axis, role), (node, dim))
    for (axis, role), place in list(carriers.items()):
        if role == COL:
            carriers.setdefault((axis, ROW), place)
    return carriers


def _fake(lifted: LiftedInput, carriers: dict[tuple[str, str], tuple[Node, int]]) -> torch.Tensor:
    place = carriers.get((lifted.axis, lifted.role)) or carriers.get((lifted.axis, ROW))
    if place is None:
        raise AxesError(f"no user input carries axis {lifted.axis!r}, which {lifted.name!r} runs along")
    node, dim = place
    value = node.meta["val"]
    sizes: list[Any] = [value.shape[dim], *lifted.row_shape]
    if lifted.batched:
        source, batch_dim = carriers[(BATCH, "")]
        sizes.insert(0, source.meta["val"].shape[batch_dim])
    with fake_mode_of(value):
        return torch.empty(sizes, dtype=DTYPES[lifted.dtype], device=value.device)


def root_stack(graph: Graph) -> dict[str, Any]:
    """The module stack of the root, as some node states it."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and node.op == "call_function":
            key, value = next(iter(stack.items()))
            if value[0] == "":
                return {key: value}
    return {}
