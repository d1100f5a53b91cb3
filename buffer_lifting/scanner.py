"""Finds every read by sequence position: pure dataflow over a graph record.

Forward, labels say which dims of each data value run over the batch and the sequence. Where a value without data
meets data (the frontier), its dims are lined up with the data's; if one runs along the sequence, the planner is
asked how to rebuild it from lifted inputs. Everything that cannot be rebuilt becomes a finding.
"""

from __future__ import annotations

from buffer_lifting.axes import InputLabels, as_input_axes, label_inputs
from buffer_lifting.axis_rules import AxisResult, OpView, apply_rule
from buffer_lifting.dataflow import Dep
from buffer_lifting.frontier import FormOption, Frontier
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.joint_rules import OF_TOKENS
from buffer_lifting.labels import COL, ROW, DimLabel, Factor, Labels, feature, seq_axes
from buffer_lifting.loss_shift import ShiftSearch, undo_shifts
from buffer_lifting.naming import name_outputs
from buffer_lifting.ops import is_random
from buffer_lifting.plan import DRAW_ELSEWHERE, DRAWN, LiftPlan
from buffer_lifting.program import Axes, ScanReport
from buffer_lifting.reporting import written_state
from buffer_lifting.scan_users import label_user_value, no_axis, report_returned

_FORMS = ("values", "positions", "auto")


def scan_record(record: GraphRecord, axes: Axes | None = None, form: FormOption = "auto") -> LiftPlan:
    """The report and the plan of a record. Linear in its nodes.

    Raises:
        AxesError: ``axes`` does not fit the inputs. Everything that a graph can contain is reported instead.
        ValueError: an unknown form.
    """
    for name in [form] if isinstance(form, str) else form.values():
        if name not in _FORMS:
            raise ValueError(f"form is one of {', '.join(_FORMS)} or a mapping from source FQN to one, not {name!r}")
    inputs = label_inputs(record, axes)
    shifted = undo_shifts(record, inputs) if record.joint is None else ShiftSearch()  # a backward pass is of the loss
    scan = _Scan(record, inputs, form, frozenset())
    col_only = frozenset(n for n, roles in scan.planner.input_roles.items() if roles == {COL} and _one_axis(inputs, n))
    if col_only:
        scan = _Scan(record, inputs, form, col_only)
    return shifted.told(scan.result())


def _one_axis(inputs: InputLabels, name: str) -> bool:
    return len(seq_axes(inputs.labels.get(name, ()))) == 1


class _Scan(Frontier):
    def __init__(self, record: GraphRecord, inputs: InputLabels, form: FormOption, col_inputs: frozenset[str]) -> None:
        super().__init__(record, inputs, form, col_inputs)
        if not inputs.lengths:
            self.findings.append(no_axis(record))
        self.findings.extend(written_state(record))
        live = record.live()
        for node in record.nodes.values():
            if node.kind is NodeKind.OP and node.name in live:
                self._visit(node)
            elif node.kind is NodeKind.OUTPUT:
                report_returned(self, node)
                if self.gradients is not None:
                    self.gradients.returned(node)
            if self.gradients is not None:
                self.gradients.label_tangents(node)
        for node, path in self.routing.counted_sizes():
            self.reports.mix(node, f"a number of routed tokens enters at {path!r}", False, "BL201")
        self.reports.mixing.extend(self.routing.regions())

    def result(self) -> LiftPlan:
        """The plan; cuts that no accepted replacement reads are dropped.

        Raises:
            ValueError: a pattern of a form mapping names no source.
        """
        unmatched = [] if isinstance(self.form, str) else sorted(set(self.form) - self.matched - {"*"})
        if unmatched:
            sources = sorted({read.source for read in self.reports.reads})
            raise ValueError(f"form= names {unmatched}, which match none of the sources {sources}")
        used = {key for edge in self.frontier for key in edge.keys} | {key for plan in self.flex for key in plan.keys}
        used |= {key for plan in self.gradients.plans for key in plan.keys} if self.gradients else set()
        self.planner.cuts = {key: cut for key, cut in self.planner.cuts.items() if key in used}
        outputs, substituted = name_outputs(self.planner, self.record)
        axes = {
            node.name: as_input_axes(node, self.inputs.labels[node.name], node.name in self.col_inputs)
            for node in self.record.inputs()
            if node.name in self.inputs.labels
        }
        report = ScanReport(
            tuple(self.reports.reads), tuple(self.reports.mixing), tuple(axes.values()), tuple(self.findings)
        )
        return LiftPlan(
            report,
            self.replacements,
            self.planner.cuts,
            outputs,
            self.frontier,
            self.labels,
            axes,
            substituted,
            self.routing.inside(self.labels),
            self.flex,
            trace=self.planner.trace,
            alignments=self.alignments,
            varies=self.planner.variation.of,
            lengths=self.inputs.lengths,
            gradients=self.gradients.plans if self.gradients else [],
            biases=self.planner.joined,
        )

    # -- forward --------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        is_data = node.name in self.data
        if not is_data and node.name not in self.of_users:
            return
        varies = self.planner.variation.of
        known = (self._positional, self.inputs.lengths, self._is_data, varies, self.softmaxes)
        view = OpView(self.record, node, self.labels, *known)
        if not is_data:
            label_user_value(self, node, apply_rule(view))
            return
        if self.gradients is not None and self.gradients.takes(view):
            return
        result = self.gradients.apply(view) if self.gradients is not None else self.routing.apply(view)
        if result is None:
            self.labels[node.name] = self.completion.complete(node, None)
            if self._carries(node):
                if is_random(node):
                    self.reports.mix(node, DRAWN, False, "BL202", DRAW_ELSEWHERE)
                else:
                    self.reports.mix(node, f"{node.op} is not known on the sequence axis", False, "BL202")
        else:
            self.labels[node.name] = self._outputs(node, result)
            if result.mixing and (result.outputs is None or self._carries(node)):
                code = "BL200" if result.handled else "BL201"
                self.reports.mix(node, result.mixing, result.handled, code, result.hint)
        self._total(node, result)
        if result is not None:
            self.alignments[node.name] = result.operands
        self._operands(node, result)

    def _total(self, node: Node, result: AxisResult | None) -> None:
        """A reduction over all tokens is a loss, unless it goes back into the tokens."""
        if result is not None and result.handled and result.mixing.startswith(("a loss", OF_TOKENS)):
            self.totals.add(node.name)
            return
        reduced = [name for name in node.refs() if name in self.totals] if self.totals else []
        if not reduced or (self.gradients is not None and self.gradients.scales_loss(node)):
            return
        if self._carries(node):
            why = "a reduction over all tokens goes back into the tokens"
            self.reports.mix(node, why, False, "BL201")
        else:
            self.totals.add(node.name)

    def _is_data(self, name: str) -> bool:
        return name in self.data

    def _positional(self, name: str, of_users: bool = False, new: bool = False) -> Labels | None:
        """The labels of a value without user contents: dims that have the length of an axis, and vary along it.

        With ``new`` they must be more than a size: made from an index, of a size of no features, or of a symbol.
        """
        if new and Dep.IOTA not in self.deps[name] and not self.planner.has_rows(name):
            return None
        meta = self.record.nodes[name].tensor
        if meta is None or name in self.data:
            return None
        known = name not in self.of_users and bool(self.deps[name] & (Dep.IOTA | Dep.STATE | Dep.PARAM))
        if not (known or of_users):
            return None
        result: list[DimLabel] = []
        seen = False
        for size, varies in zip(meta.shape, self.planner.variation.of(name), strict=True):
            axis = self.planner.axis_of(size) if varies else None
            if axis is None:
                result.append(feature(size))
                continue
            result.append((Factor(axis, COL if seen else ROW, size),))
            seen = True
        return tuple(result) if seen else None

    def _outputs(self, node: Node, result: AxisResult) -> tuple[Labels, ...] | None:
        completed = self.completion.complete(node, result.outputs)
        if result.outputs is None and not result.mixing and self.inputs.lengths and self._carries(node):
            self.reports.mix(node, f"the batch and sequence dims of {node.op} are not known", False, "BL202")
        return completed
