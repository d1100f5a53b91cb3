"""Makes the records of a scan's report: reads that are rebuilt or refused, ops that mix the sequence, written state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.expressions import Expressions
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.graph.sizes import is_symbol
from buffer_lifting.labels import BATCH, COL, ROW, Labels, features, has_seq
from buffer_lifting.ops import is_mutating
from buffer_lifting.plan import Refuse
from buffer_lifting.planner import Planner
from buffer_lifting.program import Finding, Form, PositionRead, SequenceMixing, Stream

_CODES = {"buffer": "BL001", "constant": "BL001", "parameter": "BL002", "iota": "BL003", "input": "BL005"}


def code_of(kind: str) -> str:
    """The code of a read that can be lifted, by the kind of its source."""
    return _CODES.get(kind, "BL003")


@dataclass(frozen=True)
class Edge:
    """An operand without data at a node with data."""

    consumer: Node
    path: str
    value: Node
    alignment: Alignment


class Reports:
    """The reads and the mixing ops of one scan. ``labels`` are the scan's own, and grow with it."""

    def __init__(self, planner: Planner, labels: Mapping[str, tuple[Labels, ...] | None]) -> None:
        self.planner, self.labels = planner, labels
        self.reads: list[PositionRead] = []
        self.mixing: list[SequenceMixing] = []
        self._expressions: Expressions | None = None

    def mix(self, node: Node, reason: str, handled: bool, code: str, hint: str = "") -> None:
        """Reports an op on data that mixes the sequence, or is not known on its axis."""
        known = hint
        hint = "" if handled else "lift with strict=False if the sequence is never reordered or sharded"
        if not handled and "batch" in reason and "sequence" not in reason:
            hint = (
                "microbatches change what it computes; if that dim is the sequence, pass axes=; lift with strict=False "
                "if the batch is never cut"
            )
        if not handled:
            hint = (known or hint) + self._ambiguous()
        modules = (node.module,) if node.module else ()
        where = (node.location, modules)
        self.mixing.append(SequenceMixing(node.name, node.op, reason, *where, handled, code, hint, node.module_class))

    def _ambiguous(self) -> str:
        """What to add to a hint where features of a static program may be taken for the sequence, and it for them."""
        inputs = self.planner.inputs
        both = sorted(size for size in inputs.lengths.values() if isinstance(size, int) and size in inputs.features)
        if not both:
            return ""
        return (
            f"; the sequence is {both[0]} long, and so are features: if one was taken for the other, export with a "
            "dynamic sequence dim or another length, or pass axes= for the inputs"
        )

    def accepted(self, edge: Edge, stream: Stream, form: Form) -> PositionRead:
        """Reports a read that is rebuilt, and returns it."""
        kind, source, aliases = self.planner.source_of(edge.value.name)
        code = "BL006" if form == "natural" else code_of(kind)
        axes = sum(f.is_seq for dim in edge.alignment.labels for f in dim)
        whole = "sequence x sequence value stays" if axes > 1 else "sequence's rows stay"
        hint = f"the whole {whole} in the stage" if form == "natural" else ""
        return self._record(edge, kind, source, aliases, stream, form, None, code, hint)

    def expression(self, name: str, consumer: Node) -> str:
        """How a value is made, and the numbers that its reader gets, as a text."""
        known = self._known()
        numbers = known.numbers(consumer)
        return f"{known.of(name)}; {numbers}" if numbers else str(known.of(name))

    def short(self, name: str) -> str:
        """The same inside another text."""
        return self._known().of(name).short

    def _known(self) -> Expressions:
        if self._expressions is None:
            inputs = self.planner.inputs
            axes = {**inputs.lengths, **({} if inputs.batch is None else {BATCH: inputs.batch})}
            names = {str(size): axis for axis, size in axes.items() if is_symbol(size)}
            self._expressions = Expressions(self.planner.record, names)
        return self._expressions

    def refused(self, node: Node, path: str, value: Node, labels: Labels, refusal: Refuse) -> None:
        """Reports a read that cannot be rebuilt."""
        self.planner.trace.refused[node.name, path] = (labels, refusal)
        kind, source, aliases = self.planner.source_of(value.name)
        alignment = Alignment(labels or features(value.tensor.shape if value.tensor else ()), None)
        where = f" (at {refusal.node})" if refusal.node != value.name else ""
        hint = (
            refusal.hint
            or "compute the value in another way in the model, or lift with strict=False and feed it yourself"
        ) + self._ambiguous()
        self._record(
            Edge(node, path, value, alignment),
            kind,
            source,
            aliases,
            "positions",
            None,
            f"{refusal}{where}",
            refusal.code,
            hint,
        )

    def causal(self, node: Node) -> None:
        """Reports the flag ``is_causal`` of attention on data, which follows the slots."""
        query = self.labels.get(node.args["query"].name)  # type: ignore[union-attr]
        key = self.labels.get(node.args["key"].name)  # type: ignore[union-attr]
        if not query or not has_seq(query[0][-2]):
            return
        axes = [{f.axis for f in side[0][-2] if f.is_seq} if side else set() for side in (query, key)]
        if axes[0] != axes[1]:
            self.mix(node, "causal attention whose keys run along another axis than its queries", False, "BL201")
            return
        rank = len(query[0])
        factor = next(f for f in query[0][-2] if f.is_seq)
        read = PositionRead(
            source_kind="is_causal",
            source="is_causal",
            aliases=(),
            value=node.name,
            node=node.name,
            op=node.op,
            operand="is_causal",
            seq_dims=((rank - 2, factor.axis, ROW), (rank - 1, factor.axis, COL)),
            batch_dim=None,
            stream="slots",
            form="positions",
            refusal=None,
            location=node.location,
            modules=(node.module,),
            code="BL004",
            hint="buffer_lifting.context_parallel replaces the flag by a mask that follows the slots",
            sources=("is_causal",),
            module_class=node.module_class,
        )
        self.reads.append(read)

    def _record(
        self,
        edge: Edge,
        kind: str,
        source: str,
        aliases: tuple[str, ...],
        stream: Stream,
        form: Form | None,
        refusal: str | None,
        code: str,
        hint: str,
    ) -> PositionRead:
        node, labels = edge.consumer, edge.alignment.labels
        seq = tuple((d, f.axis, f.role) for d, dim in enumerate(labels) for f in dim if f.is_seq)
        batch = next((d for d, dim in enumerate(labels) if any(f.axis == BATCH for f in dim)), None)
        read = PositionRead(
            source_kind=kind,
            source=source,
            aliases=aliases,
            value=edge.value.name,
            node=node.name,
            op=node.op,
            operand=edge.path,
            seq_dims=seq,
            batch_dim=batch,
            stream=stream,
            form=form,
            refusal=refusal,
            location=edge.value.location or node.location,
            modules=(node.module,),
            code=code,
            hint=hint,
            sources=self.planner.sources_of(edge.value.name),
            expression=self.expression(edge.value.name, node),
            module_class=node.module_class,
        )
        self.reads.append(read)
        return read


def written_state(record: GraphRecord) -> Iterator[Finding]:
    """A finding for each buffer that the graph both writes and reads (a cache)."""
    read = {
        name for n in record.nodes.values() for path, name in n.named_refs() if not (is_mutating(n) and path == "self")
    }
    for node in record.nodes.values():
        if node.kind is NodeKind.STATE and node.mutated and node.name in read:
            yield Finding(
                "BL101",
                f"the graph writes to the buffer {node.fqn!r} (a cache), so its rows are not fixed",
                "export the model without its cache (use_cache=False)",
                next((n.location for n in record.nodes.values() if is_mutating(n) and node.name in n.refs()), None),
                node.fqn,
            )
