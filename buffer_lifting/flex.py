"""Reads inside ``flex_attention``: which operands and indices of ``score_mod`` and ``mask_mod`` follow the order.

A mod gets the indices ``(b, h, q, kv)`` of this shard's own slots. What it computes from ``q`` and ``kv`` has to come
from the slots that they hold, so those are looked up in lifted slots; a table of the model is then read at the right
rows. An operand that itself runs along the sequence (a user's document ids, position ids, activations) is in the
order of the shards already: it is read at the indices as they are, as rows at ``q`` and as keys at ``kv``.

The block mask lists blocks of the natural order. Under any other order it is wrong, so the lifted program has one
block that is never skipped, in which ``mask_mod`` alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import GraphRecord, Location, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.sizes import atoms
from buffer_lifting.labels import BATCH, COL, ROW, DimLabel, Factor, Labels, has_batch, has_seq, is_labelled
from buffer_lifting.ops import content_operands
from buffer_lifting.plan import Context, CutKey, FrontierEdge, Plan, Refuse
from buffer_lifting.program import Form, PositionRead

if TYPE_CHECKING:
    from buffer_lifting.scanner import _Scan

#: Body name -> (the operand that names it, the operand with its buffers, its index arguments).
_BODIES = {
    "score_mod": ("score_mod", "score_buffers", ("score", "b", "h", "q", "kv")),
    "mask_mod": ("block_mask", "mask_buffers", ("b", "h", "q", "kv")),
}
_CODES = {"buffer": "BL001", "constant": "BL001", "parameter": "BL002", "iota": "BL003", "input": "BL005"}
_UNCHANGED = frozenset(
    f"aten.{name}" for name in ("to", "_to_copy", "alias", "detach", "clone", "lift_fresh_copy", "view", "reshape")
)


@dataclass(frozen=True)
class AddedOperand:
    """A further operand of a body, to be emitted: the plan, and where its lane lands (in front if it has no batch)."""

    plan: Plan
    value: str  # the node of the original that it stands for, or the flex node
    alignment: Alignment


@dataclass(frozen=True)
class BodyIndex:
    """A read ``buffer[...]`` in a body that is at the shard's own indices.

    ``operand`` is an added operand's number, or ``None`` for the body's own buffer; ``indices`` are names of the
    body's nodes, and whether the value is the index as the body gets it; ``lead`` says that the operand has a batch
    dim in front that the original lacks.
    """

    operand: int | None
    indices: tuple[tuple[str, bool], ...]
    lead: bool


@dataclass
class BodyPlan:
    """What becomes of one body."""

    name: str  # "score_mod" or "mask_mod"
    body: str  # the node that names it
    indices: dict[str, str]  # "b", "h", "q", "kv" -> placeholder
    buffers: tuple[str, ...]  # placeholders of the body's own operands
    kept: tuple[str, ...] = ()  # those of them that are still read; the added operands follow them
    added: list[AddedOperand] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)  # "q" or "kv" -> the added operand with its slots
    reads: dict[str, BodyIndex] = field(default_factory=dict)


@dataclass(frozen=True)
class FlexPlan:
    """What becomes of one ``flex_attention``; ``axes`` are those of the queries and the keys, where they follow one."""

    node: str
    bodies: tuple[BodyPlan, ...]
    axes: tuple[Factor | None, Factor | None]
    keys: tuple[CutKey, ...]


def plan_flex(scan: _Scan, node: Node) -> None:
    """Plans one ``flex_attention`` on data, and reports its reads to ``scan``."""
    query, key = (_labels(scan, node, name) for name in ("query", "key"))
    if query is None or key is None:
        return  # the op's rule has reported it
    reader = _Reader(scan, node)
    try:
        rows, cols = reader.factor(query, ROW), reader.factor(key, COL)
        if rows is None and cols is None:
            return
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
    scan.reads.extend(reader.reads)
    scan.frontier.extend(reader.frontier)
    scan.flex.append(FlexPlan(node.name, tuple(plans), (rows, cols), keys))


def _labels(scan: _Scan, node: Node, name: str) -> Labels | None:
    arg = node.args.get(name)
    known = scan.labels.get(arg.name) if isinstance(arg, Ref) else None
    return known[0] if known else None


class _Reader:
    """Plans the bodies of one node; nothing reaches the scan before all of them are planned."""

    def __init__(self, scan: _Scan, node: Node) -> None:
        self.scan, self.node = scan, node
        self.record, self.planner = scan.record, scan.planner
        self.axes: tuple[Factor | None, Factor | None] = (None, None)
        self.reads: list[PositionRead] = []
        self.frontier: list[FrontierEdge] = []
        self.used: list[CutKey] = []
        self.where = "flex_attention"
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
        self.scan.reads.append(self._read(str(refusal), refusal.code, hint, None, None))

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
        _Body(self, plan, body, dict(zip(plan.buffers, buffers, strict=True)), buffers_key).run()
        return plan

    def report(self, source: str, kind: str, aliases: tuple[str, ...], form: Form, code: str, hint: str) -> None:
        """Adds an accepted read."""
        self.reads.append(self._read(None, code, hint, form, (source, kind, aliases)))

    def _read(
        self, refusal: str | None, code: str, hint: str, form: Form | None, of: tuple[str, str, tuple[str, ...]] | None
    ) -> PositionRead:
        source, kind, aliases = of or (self.where, "flex", ())
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
        )


@dataclass
class _Access:
    """``buffer[indices]``, several successive reads joined: names of the body's nodes, one a leading dim."""

    buffer: str
    indices: tuple[str, ...]


class _Body:
    """Walks one body once: which values come from ``q`` and ``kv``, and how each buffer is read."""

    def __init__(
        self, reader: _Reader, plan: BodyPlan, body: GraphRecord, buffers: dict[str, object], operand: str
    ) -> None:
        self.reader, self.plan, self.body, self.operand = reader, plan, body, operand
        self.buffers = {name: arg.name for name, arg in buffers.items() if isinstance(arg, Ref)}
        self.raw = {placeholder: label for label, placeholder in plan.indices.items()}
        inputs = [n.name for n in body.nodes.values() if n.kind is NodeKind.INPUT and n.name not in plan.buffers]
        self.taint: dict[str, frozenset[str]] = {name: frozenset(self.raw.get(name, "")) for name in inputs}
        self.taint |= {plan.indices[label]: frozenset({label} - {"h"}) for label in plan.indices}
        self.accesses: dict[str, _Access] = {}
        self.versions: dict[tuple[str, Labels], int | None] = {}
        self.kept: set[str] = set()
        self.edges: list[tuple[int, FrontierEdge]] = []

    def run(self) -> None:
        """Fills the plan.

        Raises:
            Refuse: a read that follows no order, or would follow the wrong one.
        """
        for name in self.plan.buffers:
            if name in self.buffers:
                self._check_scalar(self.buffers[name])
                self.accesses[name] = _Access(name, ())
            else:
                self.taint[name] = frozenset()
                self.kept.add(name)
        for node in self.body.nodes.values():
            if node.kind is NodeKind.OP:
                self._visit(node)
            elif node.kind is NodeKind.OUTPUT:
                self._output(node)
        self.plan.kept = tuple(name for name in self.plan.buffers if name in self.kept)
        for number, edge in self.edges:
            path = f"{self.operand}.{len(self.plan.kept) + number}"
            self.reader.frontier.append(replace(edge, path=path))

    def _output(self, node: Node) -> None:
        taint: frozenset[str] = frozenset().union(*(self._value(name) for name in node.refs()))
        if "b" in taint:
            raise Refuse("the sample's index enters it, which microbatches change", self.reader.node.name)
        for label, factor in zip(("q", "kv"), self.reader.axes, strict=True):
            if label in taint and factor is not None:
                self.plan.slots[label] = self._slots(factor)
        if self.plan.slots:
            hint = "its indices are looked up in lifted slots; the block mask becomes one block that is never skipped"
            self.reader.report(self.plan.name, "flex", (), "positions", "BL007", hint)

    def _visit(self, node: Node) -> None:
        self.reader.location = node.location or self.reader.location
        if node.op == "get_attr":
            self.taint[node.name] = frozenset()
        elif node.op == "aten.index.Tensor":
            self._index(node)
        else:
            if self._is_plain(node):
                source = node.refs()[0]
                if source in self.raw:
                    self.raw[node.name] = self.raw[source]
            self.taint[node.name] = frozenset().union(*(self._value(name) for name in content_operands(node)))

    @staticmethod
    def _is_plain(node: Node) -> bool:
        """Whether a node gives an index on as it is."""
        if node.base_op in _UNCHANGED:
            return len(node.refs()) == 1 and isinstance(node.meta, TensorMeta) and node.meta.shape == ()
        same = node.base_op in ("aten.add", "aten.sub") and node.args.get("other") == 0
        return same and len(node.refs()) == 1

    def _value(self, name: str) -> frozenset[str]:
        """What a value is computed from; a buffer that runs along the sequence must be read by an index."""
        access = self.accesses.get(name)
        if access is not None:
            value = self.reader.record.nodes[self.buffers[access.buffer]]
            if isinstance(value.meta, TensorMeta) and len(value.meta.shape) > len(access.indices):
                self._natural(access, whole=True)
            return self._finish(name, access)
        return self.taint[name]

    def _finish(self, name: str, access: _Access) -> frozenset[str]:
        if name not in self.taint:
            self.taint[name] = self._read(name, access)
        return self.taint[name]

    def _index(self, node: Node) -> None:
        source, indices = node.args.get("self"), node.args.get("indices")
        names = tuple(arg.name for arg in indices if isinstance(arg, Ref)) if isinstance(indices, tuple) else ()
        access = self.accesses.get(source.name) if isinstance(source, Ref) else None
        scalar = all(self._is_scalar(name) for name in names)
        if access is None or not isinstance(indices, tuple) or len(names) != len(indices) or not scalar:
            self.taint[node.name] = frozenset().union(*(self._value(name) for name in node.refs()))
            return
        for name in names:
            self._value(name)  # an index that is itself read from a buffer
        joined = _Access(access.buffer, (*access.indices, *names))
        self.accesses[node.name] = joined
        if len(joined.indices) == len(self._shape(joined)):
            self._finish(node.name, joined)

    def _is_scalar(self, name: str) -> bool:
        meta = self.body.nodes[name].meta
        return isinstance(meta, TensorMeta) and meta.shape == ()

    def _shape(self, access: _Access) -> tuple[object, ...]:
        value = self.reader.record.nodes[self.buffers[access.buffer]]
        return value.meta.shape if isinstance(value.meta, TensorMeta) else ()

    def _check_scalar(self, buffer: str) -> None:
        value = self.reader.record.nodes[buffer]
        if not isinstance(value.meta, TensorMeta) and self.reader.planner.is_length_of_sequence(buffer):
            raise Refuse("the sequence length itself enters it", buffer, "BL104")

    # -- one read -------------------------------------------------------------------------------------------

    def _read(self, name: str, access: _Access) -> frozenset[str]:
        """Plans a read; returns what its value comes from besides what the operand itself follows."""
        labels = self._along(access)
        if labels is None:
            self._natural(access)
            self.kept.add(access.buffer)
            return self._tainted(access)
        kinds = [self.raw.get(index) for index in access.indices]
        kinds += [None] * (len(labels) - len(kinds))
        rest: list[str] = []
        for dim, label in enumerate(labels):
            index = access.indices[dim] if dim < len(access.indices) else ""
            expected: tuple[str, ...]
            if has_batch(label):
                expected = ("b",)
            elif has_seq(label):
                expected = tuple(
                    kind
                    for kind, f in zip(("q", "kv"), self.reader.axes, strict=True)
                    if f is not None and f.axis == label[0].axis
                )
            else:
                rest.extend([index] if index else [])
                continue
            if not index or len(label) != 1 or kinds[dim] not in expected:
                raise Refuse(
                    f"it reads {self._source(access)!r}, which runs along the sequence, at another index than the "
                    "query's or key's own",
                    self.buffers[access.buffer],
                )
        wanted = tuple(self._roled(label, kinds, dim) for dim, label in enumerate(labels))
        number, lead = self._version(access, wanted)
        if number is None:
            self.kept.add(access.buffer)
        self.plan.reads[name] = BodyIndex(
            number,
            tuple(
                (self.plan.indices[kind], True) if kind is not None and is_labelled(labels[dim]) else (index, False)
                for dim, (kind, index) in enumerate(zip(kinds, access.indices, strict=False))
            ),
            lead,
        )
        tainted: frozenset[str] = frozenset().union(*(self._value(index) for index in rest))
        return tainted

    @staticmethod
    def _roled(label: DimLabel, kinds: list[str | None], dim: int) -> DimLabel:
        if not has_seq(label):
            return label
        return (label[0]._replace(role=COL if kinds[dim] == "kv" else ROW),)

    def _tainted(self, access: _Access) -> frozenset[str]:
        """What a natural read's value comes from. The batch index of a dim of size 1 reads the same for all."""
        shape = self._shape(access)
        result: frozenset[str] = frozenset()
        for size, index in zip(shape, access.indices, strict=False):
            if self.raw.get(index) == "b" and (size == 1 or not self._of_state(access)):
                continue
            result |= self._value(index)
        return result

    def _of_state(self, access: _Access) -> bool:
        value = self.reader.record.nodes[self.buffers[access.buffer]]
        return value.kind is NodeKind.STATE or self.reader.planner.is_table(value.name)

    def _along(self, access: _Access) -> Labels | None:
        """The labels of a buffer that is in the order of the shards (or has to be); ``None`` for a natural one."""
        scan, name = self.reader.scan, self.buffers[access.buffer]
        node, dep = self.reader.record.nodes[name], scan.deps[name]
        if not isinstance(node.meta, TensorMeta):
            return None
        if dep & (Dep.USER | Dep.DATA):
            known = scan.labels.get(name)
            if known is None:
                raise Refuse("how its operand lines up with the sequence is not known", name)
            return known[0] if any(is_labelled(dim) for dim in known[0]) else None
        if self.reader.planner.is_table(name) or Dep.PARAM in dep:
            return None
        labels = tuple(
            self._by_use(size, access.indices[dim] if dim < len(access.indices) else "")
            for dim, size in enumerate(node.meta.shape)
        )
        return labels if any(has_seq(dim) for dim in labels) else None

    def _by_use(self, size: object, index: str) -> DimLabel:
        """The label of a position value's dim, by the index that reads it and its size."""
        kind, axes = self.raw.get(index), self.reader.axes
        factor = {"q": axes[0], "kv": axes[1]}.get(kind or "")
        if factor is not None and size == factor.size:
            return (factor,)
        batch = self.reader.scan.inputs.batch
        if kind == "b" and batch is not None and size == batch and size != 1:
            return (Factor(BATCH, "", batch),)
        if size == 1:
            return ()
        return (Factor("", "", size),)  # type: ignore[arg-type]

    def _version(self, access: _Access, labels: Labels) -> tuple[int | None, bool]:
        """The operand that holds a buffer with these roles: an added one's number, or ``None`` for its own."""
        key = (access.buffer, labels)
        if key not in self.versions:
            self.versions[key] = self._rebuild(access, labels)
        number = self.versions[key]
        lead = number is not None and self.plan.added[number].alignment.batch_from_right is not None
        return number, lead

    def _rebuild(self, access: _Access, labels: Labels) -> int | None:
        scan, name = self.reader.scan, self.buffers[access.buffer]
        if Dep.DATA in scan.deps[name]:
            return None
        planner, node = self.reader.planner, self.reader.record.nodes[name]
        planner.trail.clear()
        own = any(has_batch(dim) for dim in labels)
        value = planner.rebuild(name, labels, Context("slots", scan._form_of(node, False)))
        used = list(dict.fromkeys(planner.trail))
        if name in scan.mixed and not any(key.stream == "inputs" for key in used):
            raise scan._mixed_refusal(name)
        if not used or not value.changed:
            return None
        alignment = Alignment(labels, None if own else len(labels) + 1)
        self.plan.added.append(AddedOperand(value.plan, name, alignment))
        number = len(self.plan.added) - 1
        self._report_operand(node, labels, alignment, used)
        return number

    def _report_operand(self, node: Node, labels: Labels, alignment: Alignment, used: list[CutKey]) -> None:
        kind, source, aliases = self.reader.planner.source_of(node.name)
        form: Form = "positions" if all(key.content == "iota" for key in used) else "values"
        self.reader.report(source, kind, aliases, form, _CODES.get(kind, "BL003"), "")
        edge = FrontierEdge(
            self.reader.node.name,
            self.operand,
            node.name,
            labels,
            alignment.batch_from_right,
            self.reader.reads[-1],
            tuple(used),
        )
        self.edges.append((len(self.plan.added) - 1, edge))
        self.reader.used.extend(used)

    def _slots(self, factor: Factor) -> int:
        planner = self.reader.planner
        planner.trail.clear()
        plan = planner.iota(factor, Context("slots", "positions"))
        self.reader.used.extend(planner.trail)
        labels: Labels = ((factor,),)
        self.plan.added.append(AddedOperand(plan, self.reader.node.name, Alignment(labels, 2)))
        return len(self.plan.added) - 1

    def _natural(self, access: _Access, whole: bool = False) -> None:
        """Checks and reports a read of a value that stays in natural order, at slots."""
        scan, name = self.reader.scan, self.buffers[access.buffer]
        node, dep = self.reader.record.nodes[name], scan.deps[name]
        known = scan.labels.get(name) if dep & (Dep.USER | Dep.DATA) else None
        if whole and known and any(is_labelled(dim) for dim in known[0]):
            raise Refuse(f"it reads {self._source(access)!r}, which runs along the sequence, whole", name)
        if whole:
            return
        if not dep & (Dep.USER | Dep.DATA) and self._varies_along_batch(node, access):
            raise Refuse(f"its operand {self._source(access)!r} varies along the batch, which microbatches cut", name)
        tainted = frozenset().union(*(self._value(index) for index in access.indices))
        if not tainted & {"q", "kv"} or dep & Dep.DATA:
            return
        kind, source, aliases = self.reader.planner.source_of(name)
        lengths = scan.completion.seq_atoms
        along = Dep.IOTA in dep or any(
            atoms(size) & lengths for size in (node.meta.shape if isinstance(node.meta, TensorMeta) else ())
        )
        if along:
            hint = "the value of the whole sequence stays in the stage"
            self.reader.report(source, kind, aliases, "natural", "BL006", hint)
            return
        self.reader.report(source, kind, aliases, "positions", _CODES.get(kind, "BL003"), "")

    def _varies_along_batch(self, node: Node, access: _Access) -> bool:
        shape = node.meta.shape if isinstance(node.meta, TensorMeta) else ()
        for size, index in zip(shape, access.indices, strict=False):
            if self.raw.get(index) == "b" and size != 1 and self._of_state(access):
                return True
        ancestors = (self.reader.record.nodes[name] for name in self.reader.planner.ancestors(node.name))
        batch = self.reader.scan.inputs.batch
        return any(n.base_op == "aten.arange" and n.tensor and n.tensor.shape == (batch,) for n in ancestors)

    def _source(self, access: _Access) -> str:
        return self.reader.planner.source_of(self.buffers[access.buffer])[1]
