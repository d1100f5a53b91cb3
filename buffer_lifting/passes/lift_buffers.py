"""Lifts every read of a plan: placeholders, broadcast nodes, and the chain below each cut.

Cases handled: one- and two-axis values at any operand of an op on data, chains of local ops, tables gathered on
one or two dims, values hoisted from user inputs.
Cases refused (before anything is edited): what the scan refused, unless ``strict`` is off; then it is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.labels import has_batch
from buffer_lifting.passes.base import GraphPass, PassResult, check_topology
from buffer_lifting.passes.broadcast_batch import Broadcast, broadcast_batch
from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.passes.flex import rewrite_flex
from buffer_lifting.passes.gradients import scatter_gradients
from buffer_lifting.passes.vmap import drop_vmap, holds_level
from buffer_lifting.plan import LiftPlan
from buffer_lifting.torch_compat import replace_operands


@dataclass
class LiftState:
    """A graph that may be edited, the plan for it, and the placeholders that were added."""

    graph: Graph
    plan: LiftPlan
    submodules: dict[str, Any] = field(default_factory=dict)
    broadcast: Broadcast | None = None


class LiftBuffers(GraphPass[LiftState]):
    """Emits a :class:`LiftPlan`."""

    name = "lift_buffers"

    def requires(self, state: LiftState) -> None:
        """The plan names nodes of the graph."""
        names = {node.name for node in state.graph.nodes}
        assert all(r.consumer in names and r.value in names for r in state.plan.replacements)

    def call(self, state: LiftState) -> PassResult[LiftState]:
        """Adds the placeholders, emits each replacement, and drops the chains that nothing reads any more."""
        graph, plan = state.graph, state.plan
        if not plan.replacements and not plan.flex:
            return PassResult(state, False)
        state.broadcast = broadcast_batch(graph, plan.outputs, plan.input_axes)
        assert state.broadcast.sizes is not None
        emitter = Emitter(graph, state.broadcast.nodes, state.broadcast.sizes, state.plan.input_axes)
        landed: dict[tuple[int, str, object], Node] = {}
        for replacement in plan.replacements:
            key = (id(replacement.plan), replacement.value, replacement.alignment)
            if key not in landed:
                landed[key] = emitter.land(replacement)
            consumer = emitter.nodes[replacement.consumer]
            changes: dict[str, object] = {replacement.path: landed[key]}
            if consumer.target is torch.ops.aten.einsum.default:
                changes |= _with_batch(consumer, replacement.path, landed[key], plan)
            consumer.args, consumer.kwargs = replace_operands(consumer, changes)
        rewrite_flex(emitter, plan.flex, state.submodules)
        scatter_gradients(emitter, plan.gradients)
        drop_vmap(graph)
        drop_dead(graph)
        return PassResult(state, True)

    def ensures(self, result: PassResult[LiftState]) -> None:
        """Nodes are in order; each placeholder has one broadcast node and nothing else reads it."""
        check_topology(result.state.graph)
        if result.state.broadcast is None:
            return
        for placeholder in result.state.broadcast.placeholders.values():
            users = [user for user in placeholder.users if "sym_size" not in str(user.target)]
            assert len(users) == 1 and "expand" in str(users[0].target), f"{placeholder.name} has no broadcast node"


def _with_batch(consumer: Node, path: str, value: Node, plan: LiftPlan) -> dict[str, object]:
    """The equation of an einsum one of whose operands has now got the batch in front.

    Raises:
        UnsupportedReadError: the equation has no letter for the batch.
    """
    equation, tensors = consumer.args[0], consumer.args[1]
    assert isinstance(equation, str) and isinstance(tensors, list | tuple)
    left, target = equation.replace(" ", "").split("->")
    parts, place = left.split(","), int(path.partition(".")[2])
    if len(value.meta["val"].shape) == len(parts[place]):
        return {}
    for part, operand in zip(parts, tensors, strict=True):
        known = plan.data_labels.get(operand.name) if isinstance(operand, Node) else None
        for letter, dim in zip(part, known[0] if known else (), strict=False):
            if has_batch(dim) and len(dim) == 1 and letter in target:
                parts[place] = letter + parts[place]
                return {"equation": f"{','.join(parts)}->{target}"}
    raise UnsupportedReadError(
        f"BL105 node {consumer.name!r}: {equation!r} has no letter for the batch, which the lifted operand {path!r} "
        "needs; write the batch dim out in the model"
    )


_ASSERTION = torch.ops.aten._assert_tensor_metadata


def drop_dead(graph: Graph) -> None:
    """Removes nodes that nothing reads, placeholders and writes to storage excepted. Assertions on them go too."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        users = list(node.users)
        if all(getattr(user.target, "overloadpacket", None) is _ASSERTION for user in users):
            if not users and node.op == "call_function" and _must_stay(node):
                continue
            for check in users:
                graph.erase_node(check)
            graph.erase_node(node)


def _must_stay(node: Node) -> bool:
    return node.is_impure() or "_assert" in str(node.target) or holds_level(node)
