"""Where values without data meet data: what the operands of each node on data are read as, and how each is lifted."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from buffer_lifting.axes import InputLabels
from buffer_lifting.axis_rules import Alignment, AxisResult
from buffer_lifting.axis_rules.key_major import softmax_dims
from buffer_lifting.completion import Completion
from buffer_lifting.dataflow import Dep, analyse, nodes_with
from buffer_lifting.flex import plan_flex
from buffer_lifting.flex_plan import FlexPlan
from buffer_lifting.folding import batch_is_a_matrix_dim, onto_folded_batch
from buffer_lifting.gathering import gather_rows
from buffer_lifting.gradient_sums import GradientSums
from buffer_lifting.graph.record import GraphRecord, Node, ScalarMeta, TensorMeta
from buffer_lifting.graph.sizes import symbols
from buffer_lifting.labels import BATCH, Labels, has_seq, is_labelled, seq_axes
from buffer_lifting.ops import ATTENTION, ATTENTIONS, FLEX_ATTENTION, content_operands, is_pointwise, length_operands
from buffer_lifting.plan import Context, CutKey, FrontierEdge, Refuse, Replacement, Value, drawn
from buffer_lifting.planner import Planner
from buffer_lifting.program import Finding, Form, Stream
from buffer_lifting.reporting import Edge, Reports
from buffer_lifting.routing import Routing
from buffer_lifting.routing.facts import has_routed
from buffer_lifting.scan_users import NO_BATCH, is_number, lacks_batch, number_of_whole, under_vmap
from buffer_lifting.stream_rule import stream_of

FormOption = str | Mapping[str, str]


class Frontier:
    """The state of a scan, and its operands; the forward pass is :class:`buffer_lifting.scanner._Scan`."""

    def __init__(self, record: GraphRecord, inputs: InputLabels, form: FormOption, col_inputs: frozenset[str]) -> None:
        self.record, self.inputs, self.form, self.col_inputs = record, inputs, form, col_inputs
        self.deps = analyse(record, inputs.labels)
        self.data, self.of_users = nodes_with(self.deps, Dep.DATA), nodes_with(self.deps, Dep.USER)
        self.planner = Planner(record, self.deps, inputs, col_inputs)
        self.labels: dict[str, tuple[Labels, ...] | None] = {n: (x,) for n, x in inputs.labels.items()}
        self.findings: list[Finding] = list(inputs.findings)
        self.reports = Reports(self.planner, self.labels)
        self.replacements: list[Replacement] = []
        self.frontier: list[FrontierEdge] = []
        self.flex: list[FlexPlan] = []
        self.mixed: set[str] = set()  # values of user inputs alone that an op computed across the sequence
        # of user inputs, cut or padded along a static sequence: the labels of the whole
        self.parts: dict[str, Labels] = {}
        self.counts: set[str] = set()  # made from reductions over all tokens of user inputs: the same in any order
        self.distributed: set[str] = set()  # made from what context_parallel gathers of user inputs
        self.matched: set[str] = set()  # patterns of a form mapping that named a source
        self.totals: set[str] = set()  # what is computed from a reduction over all tokens
        self.alignments: dict[str, dict[str, Alignment]] = {}
        self.vmapped = {node.name for node in record.nodes.values() if node.op.endswith("_add_batch_dim")}
        self.completion, self.softmaxes = Completion(inputs), softmax_dims(record)
        self.routing = Routing(record)
        self.gradients = GradientSums(self) if record.joint else None

    def _carries(self, node: Node) -> bool:
        """Whether an operand has a batch or sequence label."""
        return any(
            [is_labelled(dim) for name in node.refs() for labels in (self.labels.get(name) or ()) for dim in labels]
        )

    def _count(self, node: Node, path: str, value: Node) -> None:
        """A reduction over all of a user's tokens may divide a loss, and nothing else: a rank has a part of them."""
        scales = self.gradients is not None and self.gradients.scales_loss(node, path)
        if scales or (any(name in self.totals for name in node.refs()) and not self._carries(node)):
            why = "a loss: divided by a number of tokens, which the context-parallel contract sums over ranks"
            self.reports.mix(node, why, True, "BL200")
            return
        why = "it is a reduction over all tokens or samples of a user input, of which a rank or a microbatch has a part"
        hint = "compute it outside the model and give it as an input"
        self.reports.refused(node, path, value, (), Refuse(why, value.name, "BL105", hint))

    def _operands(self, node: Node, result: AxisResult | None) -> None:
        if node.base_op == FLEX_ATTENTION:
            plan_flex(self, node)
            return
        if node.base_op in ATTENTIONS and node.args.get("is_causal") is True:
            self.reports.causal(node)
        contents = content_operands(node)
        every = contents is node.refs()
        for path, name in node.named_refs():
            value = self.record.nodes[name]
            if (
                not (every or name in contents)
                or name in self.distributed
                or (result is not None and path in result.consumed)
            ):
                continue
            if name in self.counts:
                self._count(node, path, value)
                continue
            if name in self.data:
                if result and not self._lines_up(name, result.operands.get(path)):
                    why = (
                        f"operand {path!r} is data, but not known to follow the sequence where it meets data that does"
                    )
                    self.reports.mix(node, why, False, "BL202")
                continue
            if not isinstance(value.meta, TensorMeta):
                if name in self.mixed:
                    self.reports.refused(node, path, value, (), self._mixed_refusal(name))
                elif Dep.LENGTH in self.deps[name] and (path, name) in length_operands(node):
                    self._length(node, path, value)
                continue
            alignment = result.operands.get(path) if result else None
            if name in self.mixed and alignment is None:
                self.reports.refused(node, path, value, (), self._mixed_refusal(name))
                continue
            if alignment is None:
                if Dep.IOTA in self.deps[name] or self._runs_along(value.meta):
                    why = f"how operand {path!r} of {node.op} lines up with the sequence is not known"
                    self.reports.refused(node, path, value, (), Refuse(why, node.name))
                continue
            if has_routed(alignment.labels):
                why = self.routing.aligned(value, alignment.labels)
                if why:
                    self.reports.refused(node, path, value, (), Refuse(why, name))
            elif (
                name in self.mixed
                or seq_axes(alignment.labels)
                or (Dep.LENGTH in self.deps[name] and Dep.USER not in self.deps[name])
            ):
                self._read(Edge(node, path, value, alignment))
            elif self._varies_along_batch(value, alignment):
                why = "it varies along the batch, which microbatches cut: every microbatch would read the first rows"
                random = Dep.RANDOM in self.deps[name]
                refusal = drawn(name, alignment.labels) if random else Refuse(why, name)
                self.reports.refused(node, path, value, (), refusal)
            elif self._runs_along(value.meta) and Dep.USER not in self.deps[name]:
                why = "it has the size of the sequence, but does not line up with the data's sequence dim"
                self.reports.refused(node, path, value, (), Refuse(why, name))

    def _lines_up(self, name: str, alignment: Alignment | None) -> bool:
        """Whether each dim of a data operand runs along the sequence and in the role that its reader aligns it to."""
        meta, known = self.record.nodes[name].tensor, self.labels.get(name)
        if alignment is None or meta is None or len(alignment.labels) != len(meta.shape):
            return True
        own = known[0] if known else ((),) * len(meta.shape)
        if own == alignment.labels:
            return True
        return all(
            size == 1 or not has_seq(wanted) or seq_axes((wanted,)) == seq_axes((has,))
            for size, wanted, has in zip(meta.shape, alignment.labels, own, strict=True)
        )

    def _length(self, node: Node, path: str, value: Node) -> None:
        """A number made from a sequence length: taken from the keys, which are as many as the whole sequence."""
        edge = Edge(node, path, value, Alignment((), None))
        self.planner.trail.clear()
        try:
            if isinstance(node.meta, ScalarMeta):
                why = "a number computed from data meets the sequence length"
                raise Refuse(why, node.name, "BL108", "positions must not depend on data: give them as an input")
            if not is_pointwise(node) and node.base_op != ATTENTION:
                raise Refuse("the sequence length itself enters the data", node.name, "BL104")
            plan = self.planner.scalar(value.name)
        except Refuse as refusal:
            self.reports.refused(node, path, value, (), refusal)
            return
        self._accept(edge, Value(plan, False, 0), list(dict.fromkeys(self.planner.trail)), None)

    def _mixed_refusal(self, name: str) -> Refuse:
        why = (
            "it is computed from user inputs by an op that mixes the sequence or the batch, and has no sequence dim to "
            "gather"
        )
        return Refuse(why, name, "BL105", "compute it outside the model and give it as an input")

    def _varies_along_batch(self, value: Node, alignment: Alignment) -> bool:
        """Whether a value without user contents is made from an index over the batch."""
        if Dep.USER in self.deps[value.name] or not any(f.axis == BATCH for dim in alignment.labels for f in dim):
            return False
        varies = self.planner.variation.of(value.name)
        if any(
            flag and len(dim) == 1 and dim[0].axis == BATCH for flag, dim in zip(varies, alignment.labels, strict=True)
        ):
            return True
        ancestors = (self.record.nodes[name] for name in self.planner.ancestors(value.name))
        return any(
            n.base_op == "aten.arange" and n.tensor and n.tensor.shape == (self.inputs.batch,) for n in ancestors
        )

    def _runs_along(self, meta: TensorMeta) -> bool:
        return any(symbols(size) & self.completion.seq_atoms for size in meta.shape)

    def _read(self, edge: Edge) -> None:
        value, labels = edge.value, edge.alignment.labels
        dep = self.deps[value.name]
        vmapped = under_vmap(self, value)
        if vmapped is not None:
            self.reports.refused(edge.consumer, edge.path, value, labels, vmapped)
            return
        of_length = Dep.LENGTH in dep and Dep.USER not in dep  # the same at every position, and another on a shard
        same = Dep.WRITTEN not in dep and not of_length and not self.planner.varies_along(value.name, labels)
        same = same and value.name not in self.mixed  # of whole samples, whatever a rank has
        if seq_axes(labels) and same:
            return
        two_axis = len(seq_axes(labels)) > 1
        context = Context(stream_of(self.planner, value.name, labels), self._form_of(value, two_axis))
        try:
            rebuilt = self.planner.rebuild_read(value.name, labels, context)
            whole = not self.planner.natural.isdisjoint(self.planner.ancestors(value.name))
            form: Form | None = "natural" if whole else None
        except Refuse as refused:
            natural = self._natural(edge, context)
            if natural is None:
                lost = value.name in self.mixed and not seq_axes(labels)
                refusal = self._mixed_refusal(value.name) if lost else refused
                self.reports.refused(edge.consumer, edge.path, value, labels, refusal)
                return
            rebuilt, form = natural, "natural"
        result = self.labels.get(edge.consumer.name)
        if rebuilt.lane and not seq_axes(labels) and self.inputs.batch is not None and is_number(result):
            try:
                rebuilt = number_of_whole(self.planner, value)
            except Refuse as of_users:
                self.reports.refused(edge.consumer, edge.path, value, labels, of_users)
                return
        used = list(dict.fromkeys(self.planner.trail))
        if not used or not rebuilt.changed:
            return
        if rebuilt.lane and batch_is_a_matrix_dim(edge.consumer, result):
            why = "a product whose matrix rows or columns are the batch has no place for values per sample"
            self.reports.refused(edge.consumer, edge.path, value, labels, Refuse(why, edge.consumer.name))
            return
        if rebuilt.lane and self.inputs.batch is not None and lacks_batch(result):
            refusal = Refuse(NO_BATCH, edge.consumer.name, hint="compute it for each sample: [batch, seq], not [seq]")
            self.reports.refused(edge.consumer, edge.path, value, labels, refusal)
            return
        try:
            rebuilt, landing = onto_folded_batch(edge, rebuilt, result)
        except Refuse as refusal:
            self.reports.refused(edge.consumer, edge.path, value, labels, refusal)
            return
        self._accept(edge, rebuilt, used, form, landing)

    def _natural(self, edge: Edge, context: Context) -> Value | None:
        """The fallback: the value stays in natural order in the stage and is gathered along each axis."""
        dep = self.deps[edge.value.name]
        if dep & (Dep.USER | Dep.WRITTEN | Dep.RANDOM) or len(seq_axes(edge.alignment.labels)) < 2:
            return None
        self.planner.trail.clear()
        try:
            return gather_rows(self.planner, edge.value, edge.alignment.labels, context, natural=True)
        except Refuse:
            return None

    def _form_of(self, value: Node, two_axis: bool) -> str:
        if isinstance(self.form, str):
            form = self.form
        else:
            _, source, aliases = self.planner.source_of(value.name)
            form = "auto"
            for pattern, chosen in self.form.items():
                if any(fnmatch.fnmatchcase(name, pattern) for name in (source, *aliases)):
                    form = chosen
                    self.matched.add(pattern)
                    break
        if form == "auto":
            return "positions" if two_axis else "values"
        return form

    def _accept(
        self, edge: Edge, rebuilt: Value, used: list[CutKey], form: Form | None, landing: Alignment | None = None
    ) -> None:
        streams = {key.stream for key in used}
        stream: Stream = "inputs" if streams == {"inputs"} else ("slots" if "slots" in streams else "positions")
        if form is None:
            form = "positions" if all(key.content == "iota" for key in used) else "values"
        read = self.reports.accepted(edge, stream, form)
        self.replacements.append(
            Replacement(edge.consumer.name, edge.path, edge.value.name, rebuilt.plan, landing or edge.alignment)
        )
        self.frontier.append(
            FrontierEdge(
                edge.consumer.name,
                edge.path,
                edge.value.name,
                edge.alignment.labels,
                edge.alignment.batch_from_right,
                read,
                tuple(used),
                stream_of(self.planner, edge.value.name, edge.alignment.labels),
            )
        )
