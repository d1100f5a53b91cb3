"""How a scan is shown: like a compiler for a person, and as a dict for a program."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from buffer_lifting.layers import common, pattern, spread

if TYPE_CHECKING:
    from buffer_lifting.explain import Explainer
    from buffer_lifting.graph.record import Location
    from buffer_lifting.program import (
        Finding,
        InputAxes,
        LiftedInput,
        PositionRead,
        ScanReport,
        SequenceMixing,
    )

    Item = PositionRead | SequenceMixing | Finding

_SOURCES = {
    "iota": "the index from {}",
    "length": "the sequence length",
    "is_causal": "the causal mask (is_causal=True)",
    "flex": "the {} of flex_attention",
}


@dataclass
class _Group:
    """Items that say the same thing of the same source line."""

    where: Location | None
    code: str
    hint: str
    refused: bool
    modules: list[str]
    items: list[Item]
    texts: list[str]


def render_scan(
    report: ScanReport,
    lifted: Sequence[LiftedInput] = (),
    target: str = "program",
    everything: bool = False,
    explainer: Explainer | None = None,
) -> str:
    """The findings with their source lines, and a summary.

    Args:
        report: of :func:`buffer_lifting.scan`.
        lifted: the inputs that lifting would add, or has added.
        target: stands where a finding has no source line.
        everything: list handled ops too, and name all modules.
        explainer: explains the first read of each line (with ``everything`` all of them, in full).
    """
    items: list[Item] = [*report.findings, *report.reads]
    items += [mix for mix in report.mixing if everything or not mix.handled]
    lines: list[str] = []
    for group in _grouped(items):
        text = common(group.texts)
        lines.append(f"{_place(group.where, target)}: {group.code} {text}{_spread(group)}")
        source = _source_line(group.where)
        if source:
            lines.append(f"    {source}")
        if group.hint:
            lines.append(f"    help: {group.hint}")
        if everything:
            lines += [f"    in {module}" for module in group.modules]
        if explainer is not None:
            lines += _explained(group, explainer, everything)
    return "\n".join([*lines, *([""] if lines and lines[-1] else []), *_summary(report, lifted)])


def _explained(group: _Group, explainer: Explainer, everything: bool) -> list[str]:
    from buffer_lifting.program import Finding
    from buffer_lifting.render_explain import explanation_lines

    lines: list[str] = []
    for item in group.items if everything else group.items[:1]:
        if not isinstance(item, Finding):
            lines += explanation_lines(explainer.explain(item), everything)
    return [*lines, ""] if lines else []


def _grouped(items: Iterable[Item]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for item in items:
        text, refused = _message(item)
        key = (item.location and (item.location.file, item.location.line), item.code, pattern(text), item.hint)
        group = groups.setdefault(key, _Group(item.location, item.code, item.hint, refused, [], [], []))
        group.items.append(item)
        group.texts.append(text)
        for module in getattr(item, "modules", ()):
            if module and module not in group.modules:
                group.modules.append(module)
    places = {id(group): place for place, group in enumerate(groups.values())}

    def by_line(group: _Group) -> tuple[str, int, int]:
        where = group.where
        return (where.file, where.line, places[id(group)]) if where else ("", 0, places[id(group)])

    return sorted(groups.values(), key=by_line)


def _message(item: Item) -> tuple[str, bool]:
    """What to say, and whether lifting refuses it."""
    from buffer_lifting.program import PositionRead, SequenceMixing

    if isinstance(item, PositionRead):
        read = what_is_read(item)
        if item.refusal:
            return f"cannot lift {read}: {item.refusal}", True
        if item.source_kind == "is_causal":
            return f"{read} goes by the natural order", False
        forms = {
            "values": "lifted as its values",
            "positions": "lifted as the positions it is read at",
            "natural": "kept in natural order, and gathered by lifted positions",
        }
        return f"{read} is read by position; {forms[item.form or 'values']}", False
    if isinstance(item, SequenceMixing):
        return f"{item.op} mixes the sequence ({item.reason}){', handled' * item.handled}", not item.handled
    return item.message, True


def what_is_read(read: PositionRead) -> str:
    """The sources of a read in words."""
    kind, name = read.source_kind, read.source
    what = _SOURCES.get(kind, f"{kind} {{!r}}").format(name)
    others = ", ".join(repr(other) for other in read.sources if other != name)
    return f"{what} with {others}" if others else what


def _spread(group: _Group) -> str:
    """How often, and in how many layers."""
    if len(group.modules) > 1:
        return f"  [x{len(group.modules)} {spread(group.modules)}]"
    return f"  [x{len(group.items)}]" if len(group.items) > 1 else ""


def _place(where: Location | None, target: str) -> str:
    if where is None:
        return target
    path = os.path.relpath(where.file)
    return f"{where.file if path.startswith(os.pardir) else path}:{where.line}"


def _source_line(where: Location | None) -> str:
    return where.code.strip() if where else ""  # a file may name any: only what it recorded is shown


def _summary(report: ScanReport, lifted: Sequence[LiftedInput]) -> list[str]:
    forms = _forms(report)
    counts = ", ".join(f"{count} {form}" for form, count in forms.items())
    handled = sum(mix.handled for mix in report.mixing)
    rows = [
        ("reads", f"{len(report.reads)}" + (f" ({counts})" if counts else "")),
        (
            "mixing",
            f"{len(report.mixing)} op{'s' * (len(report.mixing) != 1)}{f' ({handled} handled)' * bool(handled)}",
        ),
    ]
    rows += [("input" if place == 0 else "", _axes_text(axes)) for place, axes in enumerate(report.inputs)]
    lines = [f"{name:8}{text}".rstrip() for name, text in rows]
    if lifted:
        verb, plural = "would add" if report.refused else "adds", "s" * (len(lifted) > 1)
        lines.append(f"{'lifting':8}{verb} {len(lifted)} input{plural}:")
        lines += [f"  {line}" for line in lifted_table(lifted).splitlines()]
    if report.refused:
        lines.append(f"refused {len(report.refused)}: lifting stops at these, unless strict is off")
    return lines


def _forms(report: ScanReport) -> dict[str, int]:
    forms: dict[str, int] = {}
    for read in report.reads:
        form = read.form if read.form and not read.refusal else "refused"
        forms[form] = forms.get(form, 0) + 1
    return forms


def _axes_text(axes: InputAxes) -> str:
    dims = [f"batch dim {axes.batch_dim}"] if axes.batch_dim is not None else []
    dims += [f"{axis} dim {dim} ({role})" for dim, axis, role in axes.seq_dims]
    return f"{axes.name}: {', '.join(dims) or 'neither batch nor sequence'}"


def lifted_table(inputs: Sequence[LiftedInput]) -> str:
    """A table of lifted inputs. ``S_all``: all slots, which keys need, and not only this shard's."""
    rows = [("name", "form", "stream", "role", "dtype", "shape", "source")]
    for item in inputs:
        length = "S" if item.axis == "seq" else item.axis
        dims = ["B"] * item.batched + [f"{length}_all" if item.role == "col" else length]
        dims += [str(size) for size in item.row_shape]
        shape = f"[{', '.join(dims)}]"
        rows.append((item.name, item.form, item.stream, item.role, item.dtype, shape, item.source))
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def scan_json(
    report: ScanReport, lifted: Sequence[LiftedInput], target: str, explainer: Explainer | None = None
) -> dict[str, Any]:
    """The report as plain data: see ``JSON_HELP``."""
    plain: dict[str, Any] = {
        "version": 1,
        "target": target,
        "clean": not report.refused,
        "reads": [_plain(read) for read in report.reads],
        "mixing": [_plain(mix) for mix in report.mixing],
        "findings": [_plain(finding) for finding in report.findings],
        "inputs": [_plain(axes) for axes in report.inputs],
        "lifted": [asdict(item) for item in lifted],
        "summary": {
            "reads": _forms(report),
            "mixing_handled": sum(mix.handled for mix in report.mixing),
            "refused": len(report.refused),
        },
    }
    if explainer is not None:
        from buffer_lifting.render_explain import explanation_json

        plain["explanations"] = {
            "reads": [explanation_json(explainer.explain(read)) for read in report.reads],
            "mixing": [explanation_json(explainer.explain(mix)) for mix in report.mixing],
        }
    return plain


def _plain(record: Any) -> dict[str, Any]:
    plain = asdict(record)
    if "seq_dims" in plain:
        plain["seq_dims"] = [{"dim": dim, "axis": axis, "role": role} for dim, axis, role in plain["seq_dims"]]
    return plain
