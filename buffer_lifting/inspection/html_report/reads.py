"""The view of a scanned program: its reads, grouped over layers, with the chains that ``explain.py`` finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from buffer_lifting.explain import Explainer
from buffer_lifting.explanation import Explanation, shape_text
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.inspection.diagnostics import mixing_message, read_message
from buffer_lifting.inspection.html_report.pictures import after, before, short_op
from buffer_lifting.inspection.html_report.views import Member, ProgramView, ReadGroup, Row, Status
from buffer_lifting.layers import layers, pattern
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import PositionRead, SequenceMixing

Item = PositionRead | SequenceMixing
#: More reads than this are grouped by what the report says of them, without comparing their chains.
COMPARED = 2000


def program_view(target: str, record: GraphRecord, plan: LiftPlan) -> ProgramView:
    """The view of a program that is not lifted; imports no torch."""
    report = plan.report
    return ProgramView(
        target=target,
        kind="program",
        nodes=len(record.nodes),
        inputs=report.inputs,
        lifted=tuple(output.input for output in plan.outputs.values()),
        groups=read_groups(record, plan),
    )


def read_groups(record: GraphRecord, plan: LiftPlan) -> tuple[ReadGroup, ...]:
    """The reads and mixing ops of a plan, those that are equal but for the layer in one group; refused ones first."""
    explainer = Explainer(record, plan)
    items: list[Item] = [*plan.report.reads, *plan.report.mixing]
    found: dict[Any, list[tuple[Item, Explanation]]] = defaultdict(list)
    for item in items:
        key: tuple[Any, ...] = said(item)
        if len(items) <= COMPARED:
            explanation = explainer.explain(item)
            key = (*key, _form(explanation))
        else:
            explanation = found[key][0][1] if key in found else explainer.explain(item)
        found[key].append((item, explanation))
    order: list[Status] = ["refused", "natural", "lifted", "causal", "handled"]
    groups = sorted(found.values(), key=lambda group: order.index(status(group[0][0])))
    return tuple(_group(f"r{number}", group) for number, group in enumerate(groups))


def said(item: Item) -> tuple[Any, ...]:
    """What the report says of an item: equal for the same read in another layer."""
    where = item.location and (item.location.file, item.location.line)
    title, hint = layers_of(item)
    if isinstance(item, PositionRead):
        return status(item), item.code, where, title, hint, item.operand, item.op, layers(item.source)
    return status(item), item.code, where, title, hint, item.op


def status(item: Item) -> Status:
    """What lifting does with an item."""
    if isinstance(item, SequenceMixing):
        return "handled" if item.handled else "refused"
    if item.refusal:
        return "refused"
    if item.code == "BL004":
        return "causal"
    return "natural" if item.form == "natural" else "lifted"


def layers_of(item: Item) -> tuple[str, str]:
    """Message and hint of an item, with the numbers of layers as ``*``."""
    if isinstance(item, SequenceMixing):
        return mixing_message(item), item.hint
    message, hint = read_message(item)
    return pattern(message), hint  # the node is in the chain


def member(item: Item) -> Member:
    """An item as a line of its group."""
    module = item.modules[0] if item.modules else ""
    if isinstance(item, PositionRead):
        return Member(item.node, item.operand, module, ", ".join(item.sources) or item.source)
    return Member(item.node, "", module, "")


def _form(explanation: Explanation) -> tuple[Any, ...]:
    """What has to be equal for two chains to have the same picture, but for the shape of what reads them."""
    *steps, _ = explanation.steps
    return tuple(
        tuple((step.op, step.mark, layers(step.fqn), shape_text(step)) for step in chain)
        for chain in (steps, *explanation.branches)
    )


def _group(name: str, items: list[tuple[Item, Explanation]]) -> ReadGroup:
    item, explanation = items[0]
    title, hint = layers_of(item)
    is_read = isinstance(item, PositionRead)
    return ReadGroup(
        id=name,
        code=item.code,
        title=title,
        hint=hint,
        status=status(item),
        source=layers(item.source) if isinstance(item, PositionRead) else "",
        source_kind=item.source_kind if isinstance(item, PositionRead) else "",
        also=tuple(layers(name) for name in item.sources if name != item.source)
        if isinstance(item, PositionRead)
        else (),
        consumer=short_op(item.op),
        location=item.location,
        members=tuple(member(other) for other, _ in items),
        inputs=tuple(dict.fromkeys(fed.input.name for _, other in items for fed in other.fed_by)),
        before=before(explanation),
        after=after(explanation) if is_read else None,
        rows=tuple(_rows(explanation)),
        nearest=tuple((c.title, c.needs, c.failed) for c in explanation.nearest),
    )


def _rows(explanation: Explanation) -> Iterable[Row]:
    for number, chain in enumerate((explanation.steps, *explanation.branches)):
        for step in chain:
            op = short_op(step.op)
            yield Row(number, step.mark, step.node, op, shape_text(step), _detail(step.fqn, step.detail), step.location)


def _detail(fqn: str, detail: str) -> str:
    return ", ".join(part for part in (repr(fqn) if fqn else "", detail) if part)
