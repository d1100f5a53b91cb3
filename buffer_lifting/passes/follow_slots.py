"""Makes attention follow the slots: ``is_causal=True`` becomes a mask over the lifted slots.

Every mask, the flag included, then compares the slot of a query with the slot of a key, so the program is
order-equivariant. Masks that the model computes follow the slots since the lift. For ring attention the flags stay, and
the slots of the rows are added alone: the ring reads off them which pairs it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.labels import BATCH, COL, ROW, Factor, Labels, batch_dim
from buffer_lifting.passes.base import GraphPass, PassResult, check_topology
from buffer_lifting.passes.broadcast_batch import Broadcast, broadcast_batch, broadcast_nodes
from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.passes.fused_masks import mask_for
from buffer_lifting.plan import Call, CutKey, Lifted, LiftPlan, Plan, Replacement
from buffer_lifting.program import FeedOutput, LiftedInput, PositionRead
from buffer_lifting.torch_compat import schema_args, set_arguments


@dataclass
class AttentionState:
    """A lifted graph that may be edited, its analysis, and the outputs that feed it.

    With ``ring``, ``slots`` has the slots of the rows of each attention that is causal by flag.
    """

    graph: Graph
    plan: LiftPlan
    outputs: tuple[FeedOutput, ...]
    broadcast: Broadcast | None = None
    added: tuple[FeedOutput, ...] = ()
    ring: bool = False
    slots: dict[str, Node] = field(default_factory=dict)


class FollowSlots(GraphPass[AttentionState]):
    """Replaces every ``is_causal=True`` on a sequence axis by a mask ``slot of key <= slot of query``."""

    name = "follow_slots"

    def requires(self, state: AttentionState) -> None:
        """The reads are those of the graph."""
        names = {node.name for node in state.graph.nodes}
        assert all(read.node in names for read in state.plan.report.reads)

    def call(self, state: AttentionState) -> PassResult[AttentionState]:
        """Adds the slot inputs where they are missing, and the masks."""
        causal = [read for read in state.plan.report.reads if read.source_kind == "is_causal"]
        if not causal:
            return PassResult(state, False)
        taken = {node.name for node in state.graph.nodes}
        outputs: dict[CutKey, FeedOutput] = {}
        added: list[FeedOutput] = []
        for axis in dict.fromkeys(read.seq_dims[0][1] for read in causal):
            for role in (ROW,) if state.ring else (ROW, COL):
                output = _slot_output(axis, role, state.outputs, taken, _batched(state))
                if output not in state.outputs:
                    added.append(output)
                outputs[_key(axis, role)] = output
        existing = broadcast_nodes(state.graph, {o.input.name for o in state.outputs})
        state.broadcast = broadcast_batch(state.graph, outputs, dict(state.plan.input_axes), existing)
        state.added = tuple(added)
        if state.ring:
            state.slots = {read.node: state.broadcast.nodes[_key(read.seq_dims[0][1], ROW)] for read in causal}
            return PassResult(state, True)
        assert state.broadcast.sizes is not None
        emitter = Emitter(state.graph, state.broadcast.nodes, state.broadcast.sizes, state.plan.input_axes)
        masks: dict[tuple[str, Labels], Plan] = {}
        landed: dict[int, Node] = {}
        made: dict[tuple[Node, torch.dtype], Node] = {}
        for read in causal:
            node = emitter.nodes[read.node]
            query = state.plan.data_labels[schema_args(node)["query"].name]
            assert query is not None
            labels = query[0]
            plan = masks.setdefault((read.seq_dims[0][1], labels), self._mask(read, labels, outputs))
            if id(plan) not in landed:
                landed[id(plan)] = emitter.land(
                    Replacement(node.name, "attn_mask", plan.anchor, plan, _alignment(labels))  # type: ignore[union-attr]
                )
            mask = landed[id(plan)]
            set_arguments(node, {"attn_mask": mask_for(emitter, node, mask, made), "is_causal": False})
        return PassResult(state, True)

    def ensures(self, result: PassResult[AttentionState]) -> None:
        """Nodes are in order, and no attention that was reported is causal by flag (a ring takes its place later)."""
        check_topology(result.state.graph)
        if result.state.ring:
            return
        reported = {r.node for r in result.state.plan.report.reads if r.source_kind == "is_causal"}
        for node in result.state.graph.nodes:
            if node.name in reported:
                assert schema_args(node)["is_causal"] is False

    def _mask(self, read: PositionRead, labels: Labels, outputs: dict[CutKey, FeedOutput]) -> Plan:
        axis = read.seq_dims[0][1]
        row, col = _key(axis, ROW), _key(axis, COL)
        anchor = outputs[row].input.name
        rows = Call("aten.unsqueeze.default", (Lifted(row), 2), anchor)
        cols = Call("aten.unsqueeze.default", (Lifted(col), 1), anchor)
        mask: Plan = Call("aten.le.Tensor", (cols, rows), anchor)
        batch = batch_dim(labels)
        if batch is not None and len(labels[batch]) > 1:
            heads = [f.size for f in labels[batch] if f.axis != BATCH]
            if labels[batch][0].axis != BATCH or not all(isinstance(size, int) for size in heads):
                raise UnsupportedReadError(f"attention {read.node!r}: its batch is folded with dims of unknown size")
            count = 1
            for size in heads:
                count *= int(size)  # type: ignore[arg-type]
            mask = Call("aten.unsqueeze.default", (mask, 1), anchor)
            mask = Call("aten.expand.default", (mask, (-1, count, -1, -1)), anchor)
        return mask


def _alignment(labels: Labels) -> Alignment:
    batch = batch_dim(labels)
    pair: Labels = ((Factor("", ROW, 0),), (Factor("", COL, 0),))
    if batch is not None and len(labels[batch]) > 1:
        return Alignment((labels[batch], *pair), None)
    return Alignment(pair, None if batch is None else len(labels) - batch)


def _batched(state: AttentionState) -> bool:
    return any(axes.batch_dim is not None for axes in state.plan.input_axes.values())


def _key(axis: str, role: str) -> CutKey:
    return CutKey("iota", axis, role, "slots", ())


def _slot_output(axis: str, role: str, outputs: tuple[FeedOutput, ...], taken: set[str], batched: bool) -> FeedOutput:
    for output in outputs:
        own = output.input
        if output.program == "iota" and (own.axis, own.role, own.stream) == (axis, role, "slots"):
            return output
    prefix = "" if axis == "seq" else f"{axis}_"
    name = base = f"lifted_{prefix}slots{'_keys' if role == COL else ''}"
    index = 0
    while name in taken:
        index += 1
        name = f"{base}_{index}"
    taken.add(name)
    lifted = LiftedInput(name, "positions", "slots", role, "is_causal", "int64", (), axis, batched)
    return FeedOutput(lifted, "iota", "", 0, None, ())
