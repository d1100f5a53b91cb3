"""Walks one body of ``flex_attention``: how each index and each buffer is read, and what takes its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.dataflow import Dep
from buffer_lifting.flex_plan import AddedOperand, BodyIndex, BodyPlan
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.sizes import symbols
from buffer_lifting.labels import BATCH, COL, ROW, DimLabel, Factor, Labels, has_batch, has_seq, is_labelled
from buffer_lifting.ops import content_operands
from buffer_lifting.plan import Context, CutKey, FrontierEdge, Refuse
from buffer_lifting.program import Form

if TYPE_CHECKING:
    from buffer_lifting.flex import FlexReader

_UNCHANGED = frozenset(
    f"aten.{name}" for name in ("to", "_to_copy", "alias", "detach", "clone", "lift_fresh_copy", "view", "reshape")
)


@dataclass
class _Access:
    """``buffer[indices]``, several successive reads joined: names of the body's nodes, one a leading dim."""

    buffer: str
    indices: tuple[str, ...]


class BodyWalk:
    """Walks one body once: which values come from ``q`` and ``kv``, and how each buffer is read."""

    def __init__(
        self, reader: FlexReader, plan: BodyPlan, body: GraphRecord, buffers: dict[str, object], operand: str
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
            self.reader.report_indices(hint)

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
        form: Form = "positions" if all(key.content == "iota" for key in used) else "values"
        self.reader.report_value(node.name, form)
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
        lengths = scan.completion.seq_atoms
        along = Dep.IOTA in dep or any(
            symbols(size) & lengths for size in (node.meta.shape if isinstance(node.meta, TensorMeta) else ())
        )
        if along:
            self.reader.report_value(name, "natural", "the value of the whole sequence stays in the stage")
            return
        self.reader.report_value(name, "positions")

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
