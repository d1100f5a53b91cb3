"""Findings like a compiler's: ``path:line: CODE message``, the source line, and a caret below it."""

from __future__ import annotations

from dataclasses import dataclass, field

from buffer_lifting.inspection.diagnostics import Diagnostic
from buffer_lifting.inspection.places import Place, Places, printable
from buffer_lifting.inspection.results import CheckResult, Reported
from buffer_lifting.inspection.rules import RULES
from buffer_lifting.layers import common, pattern, spread


@dataclass
class _Group:
    """Findings of one target that say the same of one line."""

    first: Reported
    place: Place | None
    modules: dict[str, None] = field(default_factory=dict)  # in order
    items: list[Diagnostic] = field(default_factory=list)


def render_text(result: CheckResult, places: Places, statistics: bool = False) -> str:
    """The findings that count; those that say the same of one line are shown once, with the number of modules."""
    groups: dict[object, _Group] = {}
    for item in result.findings:
        found, place = item.diagnostic, places.of(item.diagnostic)
        message = pattern(found.message)
        key = (item.target, place and (place.path, place.line), found.code, message, found.hint)
        group = groups.setdefault(key, _Group(item, place))
        group.items.append(found)
        group.modules[found.module] = None
    lines: list[str] = []
    for group in groups.values():
        lines += _lines(group, len(result.targets) > 1)
    if statistics:
        counts = result.statistics
        width = max((len(str(count)) for count in counts.values()), default=0)
        lines += [f"{count:{width}} {code} {RULES[code].message}" for code, count in counts.items()]
    return "\n".join(lines)


def _lines(group: _Group, several: bool) -> list[str]:
    found, place = group.first.diagnostic, group.place
    where = f"{place.path}:{place.line}" if place else group.first.target
    message = common([item.message for item in group.items])
    of = f" ({group.first.target})" if several and place else ""
    lines = [printable(f"{where}: {found.code} {message}{_spread(group)}{of}")]
    if place is not None and place.source:
        lines.append(f"    {printable(place.source)}")
        if place.source.isprintable() and place.source.isascii():
            lines.append(f"    {' ' * place.column}^{'~' * (place.width - 1)}")
    elif place is None:
        lines.append(f"    no source line: {printable(_graph_place(group))}")
    if found.hint:
        lines.append(f"    help: {printable(found.hint)}")
    return lines


def _graph_place(group: _Group) -> str:
    """Where a finding without a location is in the graph."""
    found = group.first.diagnostic
    if not found.node:
        return "it is about the whole program"
    inside = f" in {found.module} ({found.module_class})" if found.module and found.module_class else ""
    inside = inside or (found.module and f" in {found.module}")
    return f"the graph has no frame outside torch for node {found.node!r}{inside}"


def _spread(group: _Group) -> str:
    if len(group.modules) > 1:
        return f"  [x{len(group.modules)} {spread(list(group.modules))}]"
    return f"  [x{len(group.items)}]" if len(group.items) > 1 else ""
