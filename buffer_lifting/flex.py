"""Reads inside ``flex_attention``: which operands and indices of ``score_mod`` and ``mask_mod`` follow the order.

A mod gets the indices ``(b, h, q, kv)`` of this shard's own slots. What it computes from ``q`` and ``kv`` has to come
from the slots that they hold, so those are looked up in lifted slots; a table of the model is then read at the right
rows. An operand that itself runs along the sequence (a user's document ids, position ids, activations) is in the
order of the shards already: it is read at the indices as they are, as rows at ``q`` and as keys at ``kv``.

The block mask lists blocks of the natural order. Under any other order it is wrong, so the lifted program has one
block that is never skipped, in which ``mask_mod`` alone decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer_lifting.expressions import Expressions
from buffer_lifting.flex_body import BodyWalk
from buffer_lifting.flex_plan import BodyPlan, FlexPlan
from buffer_lifting.graph.record import Arg, GraphRecord, Location, Node, NodeKind, Ref
from buffer_lifting.labels import COL, ROW, Factor, Labels, has_batch, has_seq
from buffer_lifting.plan import CutKey, FrontierEdge, Refuse
from buffer_lifting.program import Form, PositionRead
from buffer_lifting.reporting import code_of

if TYPE_CHECKING:
    from buffer_lifting.frontier import Frontier

#: Body name -> (the operand that names it, the operand with its buffers, its index arguments).
_BODIES = {
    "score_mod": ("score_mod", "score_buffers", ("score", "b", "h", "q", "kv")),
    "mask_mod": ("block_mask", "mask_buffers", ("b", "h", "q", "kv")),
}


def plan_flex(scan: Frontier, node: Node) -> None:
    """Plans one ``flex_attention`` on data, and reports its reads to ``scan``."""
    query, key = (_labels(scan, node, name) for name in ("query", "key"))
    if query is None or key is None:
        return  # the op's rule has reported it
    reader = FlexReader(scan, node)
    try:
        rows, cols = reader.factor(query, ROW), reader.factor(key, COL)
        if any(has_seq(dim) for labels in (query, key) for dim in labels[:-2]):
            raise Refuse(
                "its batch or its heads run along the sequence, which the indices b and h then follow", node.name
            )
        if len(query) != 4 or len(query[0]) > 1 or (query[0] and not has_batch(query[0])):
            raise Refuse("how its first dim lines up with the batch is not known", node.name)
        if not query[0] and scan.inputs.batch not in (None, 1):
            raise Refuse("its first dim is not the batch", node.name)
        reader.axes = (rows, cols)
        plans = [reader.body(name) for name in _BODIES]
    except Refuse as refusal:
        reader.refused(refusal)
        return
    keys = tuple(dict.fromkeys(reader.used))
    if rows is None and cols is None and not keys:
        return  # attention along another axis than the sequence: its block mask stays right
    scan.reports.reads.extend(reader.reads)
    scan.frontier.extend(reader.frontier)
    scan.flex.append(FlexPlan(node.name, tuple(plans), (rows, cols), keys))


def _labels(scan: Frontier, node: Node, name: str) -> Labels | None:
    arg = node.args.get(name)
    known = scan.labels.get(arg.name) if isinstance(arg, Ref) else None
    return known[0] if known else None


class FlexReader:
    """Plans the bodies of one node; nothing reaches the scan before all of them are planned."""

    def __init__(self, scan: Frontier, node: Node) -> None:
        self.scan, self.node = scan, node
        self.record, self.planner = scan.record, scan.planner
        self.axes: tuple[Factor | None, Factor | None] = (None, None)
        self.reads: list[PositionRead] = []
        self.frontier: list[FrontierEdge] = []
        self.used: list[CutKey] = []
        self.where = "flex_attention"
        self.expression = ""
        self.location: Location | None = None

    def factor(self, labels: Labels, role: str) -> Factor | None:
        """The sequence axis that a query's or key's dim runs along, in a role."""
        dim = labels[-2]
        if not has_seq(dim):
            return None
        if len(dim) != 1:
            raise Refuse("its sequence dim is folded with other dims", self.node.name)
        return dim[0]._replace(role=role)

    def refused(self, refusal: Refuse) -> None:
        """Reports why the node cannot be lifted."""
        hint = refusal.hint or "write the mod with plain indices, or lift with strict=False if nothing is reordered"
        self.scan.reports.reads.append(self._read(str(refusal), refusal.code, hint, None))

    def body(self, name: str) -> BodyPlan:
        """The plan of ``score_mod`` or ``mask_mod``."""
        operand, buffers_key, arguments = _BODIES[name]
        self.where, self.location = name, self.node.location
        arg = self.node.args.get(operand)
        arg = arg[-1] if isinstance(arg, tuple) else arg
        body = self.record.bodies.get(arg.name) if isinstance(arg, Ref) else None
        buffers = self.node.args.get(buffers_key, ())
        if body is None or not isinstance(arg, Ref) or not isinstance(buffers, tuple):
            raise Refuse("its graph is not at hand", self.node.name)
        placeholders = [n.name for n in body.nodes.values() if n.kind is NodeKind.INPUT]
        count = len(arguments)
        if len(placeholders) != count + len(buffers):
            raise Refuse("its operands are not those of its graph", self.node.name)
        indices = {label: n for label, n in zip(arguments, placeholders, strict=False) if label != "score"}
        plan = BodyPlan(name, arg.name, indices, tuple(placeholders[count:]))
        self.expression = self._expression(body, plan, buffers)
        BodyWalk(self, plan, body, dict(zip(plan.buffers, buffers, strict=True)), buffers_key).run()
        return plan

    def _expression(self, body: GraphRecord, plan: BodyPlan, buffers: tuple[Arg, ...]) -> str:
        """What a body computes, with its indices and buffers by name."""
        inputs = {placeholder: label for label, placeholder in plan.indices.items()}
        for placeholder, arg in zip(plan.buffers, buffers, strict=True):
            inputs[placeholder] = self.scan.reports.short(arg.name) if isinstance(arg, Ref) else str(arg)
        output = next(node for node in body.nodes.values() if node.kind is NodeKind.OUTPUT)
        known = Expressions(body, {}, {"score": "score", **inputs})
        return ", ".join(str(known.of(ref)) for ref in output.refs())

    def report_indices(self, hint: str) -> None:
        """Adds an accepted read of ``q`` or ``kv`` themselves."""
        self.reads.append(self._read(None, "BL007", hint, "positions"))

    def report_value(self, name: str, form: Form, hint: str = "") -> None:
        """Adds an accepted read of a value of the graph around the node."""
        kind = self.planner.source_of(name)[0]
        code = "BL006" if form == "natural" else code_of(kind)
        self.reads.append(self._read(None, code, hint, form, name))

    def _read(self, refusal: str | None, code: str, hint: str, form: Form | None, of: str = "") -> PositionRead:
        kind, source, aliases = self.planner.source_of(of) if of else ("flex", self.where, ())
        seq = [(dim, f.axis, f.role) for dim, f in zip((2, 3), self.axes, strict=True) if f is not None]
        return PositionRead(
            source_kind=kind,
            source=source,
            aliases=aliases,
            value=self.node.name,
            node=self.node.name,
            op=self.node.op,
            operand=self.where,
            seq_dims=tuple(seq),
            batch_dim=None,
            stream="slots",
            form=form,
            refusal=refusal,
            location=self.location or self.node.location,
            modules=(self.node.module,),
            code=code,
            hint=hint,
            sources=self.planner.sources_of(of) if of else (source,),
            expression=self.expression,
            module_class=self.node.module_class,
        )
