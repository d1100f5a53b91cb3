"""Turns plans into nodes of an fx graph, with fake values, where the replaced nodes stood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.graph.locations import innermost_location
from buffer_lifting.labels import BATCH, COL, DimLabel, has_batch
from buffer_lifting.passes.fakes import Fakes, operands
from buffer_lifting.plan import AxisSize, Call, CutKey, Existing, Lifted, Plan, Reapply, Replacement
from buffer_lifting.program import InputAxes
from buffer_lifting.torch_compat import call_operator, replace_operands

_COPIED = ("stack_trace", "nn_module_stack", "torch_fn", "custom", "source_fn_stack")


class Emitter:
    """Emits into one graph. ``lifted`` maps cut keys to broadcast nodes; ``sizes`` gives a node for a run-time size."""

    def __init__(
        self,
        graph: Graph,
        lifted: dict[CutKey, Node],
        sizes: AxisSizes,
        input_axes: Mapping[str, InputAxes] | None = None,
    ) -> None:
        self.graph, self.lifted, self.sizes = graph, lifted, sizes
        self.nodes = {node.name: node for node in graph.nodes}
        self._last: dict[str, Node] = {}  # anchor -> the last node emitted behind it
        self._memo: dict[int, Node] = {}
        self._keep: list[Plan] = []  # memo keys are ids: keep the plans alive
        self._fakes = Fakes(graph, input_axes)

    def land(self, replacement: Replacement) -> Node:
        """Emits a plan and gives its lane to the consumer's batch dim; returns the node to read instead."""
        labels, batch = replacement.alignment.labels, replacement.alignment.batch_from_right
        node = self.emit(replacement.plan)
        rank = len(labels)
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or len(value.shape) == rank:  # a number, or no lane
            return node
        anchor = replacement.value
        own = next((d for d, dim in enumerate(labels) if has_batch(dim)), None)
        if own is None and batch is not None and rank - batch >= 0:
            own = rank - batch
        if own is not None:
            return self._into_dim(node, own, labels[own], rank, anchor)
        if batch is None:
            return self._op("aten.squeeze.dim", (node, 0), anchor)  # no batch anywhere: the lane has size 1
        for _ in range(batch - rank - 1):
            node = self._op("aten.unsqueeze.default", (node, 1), anchor)
        return node

    def _into_dim(self, node: Node, own: int, dim: DimLabel, rank: int, anchor: str) -> Node:
        """Moves the lane into dim ``own``, which has size 1 or the sizes of the factors behind the batch."""
        if len(dim) <= 1:
            node = self._op("aten.squeeze.dim", (node, own + 1), anchor)
            if own:
                node = self._op("aten.permute.default", (node, (*range(1, own + 1), 0, *range(own + 1, rank))), anchor)
            return node
        if dim[0].axis != BATCH:
            location = innermost_location(self.nodes[anchor].meta.get("stack_trace") or "")
            raise UnsupportedReadError(
                f"BL105 node {anchor!r} ({self.nodes[anchor].target}): the batch is folded behind another dim"
                f"{f' [{location}]' if location else ''} -> put the batch first in the model"
            )
        if own:
            node = self._op("aten.permute.default", (node, (*range(1, own + 1), 0, *range(own + 1, rank + 1))), anchor)
        return self._op("aten.flatten.using_ints", (node, own, own + 1), anchor)

    def emit(self, plan: Plan) -> Node:
        """The node of a plan, emitted once."""
        known = self._memo.get(id(plan))
        if known is not None:
            return known
        if isinstance(plan, Existing):
            node = self.nodes[plan.node]
        elif isinstance(plan, AxisSize):
            node = self._length(plan.of) if plan.of else self.sizes.node(plan.axis, plan.role)
        elif isinstance(plan, Lifted):
            node = self.lifted[plan.key]
        elif isinstance(plan, Call):
            node = self._op(plan.op, tuple(self._argument(arg) for arg in plan.args), plan.anchor)
        else:
            node = self._reapply(plan)
        self._memo[id(plan)] = node
        self._keep.append(plan)
        return node

    def _length(self, key: CutKey) -> Node:
        """How many rows a lifted input has, read at the top of the graph."""
        source = self.lifted[key]
        with self.graph.inserting_after(max(source, self.sizes.last)):
            node = self.graph.call_function(torch.ops.aten.sym_size.int, (source, 1))
        node.meta = {"nn_module_stack": self.sizes.stack, "val": source.meta["val"].shape[1]}
        self.sizes.last = node
        return node

    def _argument(self, arg: object) -> Any:
        if isinstance(arg, AxisSize) and arg.fixed is not None:
            return arg.fixed
        if isinstance(arg, Existing | Lifted | AxisSize | Call | Reapply):
            return self.emit(arg)
        if isinstance(arg, tuple):
            return [self._argument(item) for item in arg]
        return arg

    def _reapply(self, plan: Reapply) -> Node:
        original = self.nodes[plan.anchor]
        args, kwargs = replace_operands(original, {path: self._argument(value) for path, value in plan.replace})
        return self._insert(original.target, args, kwargs, plan.anchor)

    def before(self, node: Node, name: str, args: tuple[Any, ...]) -> Node:
        """A new call right before ``node``, with its metadata."""
        target = call_operator(name)
        args = tuple(list(arg) if isinstance(arg, tuple) else arg for arg in args)
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args)
        made.meta = {key: node.meta[key] for key in _COPIED if key in node.meta}
        made.meta["val"] = self._fakes.of(target, args, {})
        return made

    def _op(self, name: str, args: tuple[Any, ...], anchor: str) -> Node:
        args = tuple(list(arg) if isinstance(arg, tuple) else arg for arg in args)
        return self._insert(call_operator(name), args, {}, anchor)

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], anchor: str) -> Node:
        at = self.nodes[anchor]
        after = self._last.get(anchor) or at
        if at.op == "placeholder":
            after = self._last.get(anchor) or self.sizes.last
        for operand in operands(args, kwargs):
            if operand > after:
                after = operand
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args, kwargs)
        self._last[anchor] = node
        node.meta = {key: at.meta[key] for key in _COPIED if key in at.meta}
        if at.op == "placeholder":
            node.meta = dict(self.sizes.last.meta)
        node.meta["val"] = self._fakes.of(target, args, kwargs)
        return node


class AxisSizes:
    """Nodes for the run-time sizes of the axes, made on demand at the top of the graph."""

    def __init__(
        self, graph: Graph, carriers: dict[tuple[str, str], tuple[Node, int]], last: Node, stack: dict[str, Any]
    ) -> None:
        """``last``: the node to insert behind; ``stack``: the root's module stack, for the new nodes."""
        self.graph, self.carriers, self.last, self.stack = graph, carriers, last, stack
        self._made: dict[tuple[str, str], Node] = {}

    def node(self, axis: str, role: str) -> Node:
        """``sym_size`` of a placeholder that carries the axis in that role (keys fall back to the queries' size)."""
        key = (axis, role)
        if key not in self.carriers and role == COL:
            key = (axis, "row")
        if key not in self._made:
            source, dim = self.carriers[key]
            with self.graph.inserting_after(self.last):
                node = self.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
            node.meta = {"nn_module_stack": self.stack}
            node.meta["val"] = source.meta["val"].shape[dim]
            self.last = node
            self._made[key] = node
        return self._made[key]
