"""The findings as cards, by target and module; those of several layers that say the same of one line are one card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from buffer_lifting.inspection.html_report.later import Room
from buffer_lifting.inspection.html_report.markup import code, count, escape
from buffer_lifting.inspection.places import Place, Places
from buffer_lifting.inspection.results import CheckResult, Reported
from buffer_lifting.layers import common, layers, pattern

#: (target, code, node) -> the id of the read's picture.
Links = Mapping[tuple[str, str, str], str]


@dataclass
class Card:
    """Findings of one target that say the same of one line, and of which all or none are suppressed."""

    first: Reported
    place: Place | None
    items: list[Reported] = field(default_factory=list)


def cards(result: CheckResult, places: Places) -> dict[tuple[str, str], list[Card]]:
    """The cards by target and module; the numbers of layers in a module are ``*``."""
    found: dict[object, Card] = {}
    for item in result.reported:
        what, place = item.diagnostic, places.of(item.diagnostic)
        reason = item.suppression and (item.suppression.by, item.suppression.reason)
        line = place and (place.path, place.line)
        key = (item.target, layers(what.module), line, what.code, pattern(what.message), what.hint, reason)
        found.setdefault(key, Card(item, place)).items.append(item)
    grouped: dict[tuple[str, str], list[Card]] = {}
    for card in found.values():
        grouped.setdefault((card.first.target, layers(card.first.diagnostic.module)), []).append(card)
    return grouped


def findings_section(result: CheckResult, places: Places, targets: Sequence[str], links: Links, room: Room) -> str:
    """The section of the page; ``targets`` gives each target its number."""
    parts = ['<section id="findings" aria-labelledby="findings-title"><h2 id="findings-title">Findings</h2>']
    grouped = cards(result, places)
    if not grouped:
        parts.append("<p>There are none.</p>")
    numbers = {target: number for number, target in enumerate(targets)}
    ordered = sorted(grouped.items(), key=lambda entry: numbers[entry[0][0]])
    parts += room.groups(
        (_heading(target, module, found, len(targets) > 1), _cards(found, numbers[target], links, room))
        for (target, module), found in ordered
    )
    return "\n".join([*parts, "</section>"])


def _heading(target: str, module: str, found: Sequence[Card], named_target: bool) -> str:
    classes = sorted({item.diagnostic.module_class for card in found for item in card.items} - {""})
    named = code(module) if module else "the model itself, or the whole program"
    of = f' <span class="soft">of {code(target)}</span>' if named_target else ""
    kind = f' <span class="soft">({escape(", ".join(classes))})</span>' if classes and module else ""
    return f"<h3>{named}{kind}{of}</h3>"


def _cards(found: Sequence[Card], target: int, links: Links, room: Room) -> Iterator[str]:
    return (_card(card, target, links, room) for card in found)


def _card(card: Card, target: int, links: Links, room: Room) -> str:
    found, suppression = card.first.diagnostic, card.first.suppression
    times = len(card.items)
    items = [item.diagnostic for item in card.items]
    message = common([item.message for item in items])
    marks = [f'<span class="badge {found.severity}">{found.severity}</span>']
    if times > 1:
        marks.append(f'<span class="badge plain">&#215; {times}</span>')
    if suppression:
        marks.append('<span class="badge plain">suppressed</span>')
    attributes = f'data-code="{escape(found.code)}" data-target="{target}" data-count="{times}"'
    attributes += " data-suppressed" if suppression else ""
    parts = [
        f'<article class="card {found.severity}{" suppressed" if suppression else ""}" {attributes}>',
        f'<h4>{" ".join(marks)} <a href="#rule-{escape(found.code)}">{escape(found.code)}</a> {escape(message)}</h4>',
        _where(card),
    ]
    if found.hint:
        parts.append(f"<p><strong>Help:</strong> {escape(found.hint)}</p>")
    if suppression:
        parts.append(f"<p>Suppressed by the {escape(suppression.by)}: {escape(suppression.reason)}</p>")
    if times > 1:
        rows = "".join(f"<li>{_member(item)}</li>" for item in card.items)
        members = room.body(f'<ul class="members">{rows}</ul>')
        parts.append(f"<details><summary>All {times} of them</summary>{members}</details>")
    elif found.node:
        parts.append(f'<p class="soft">{_member(card.first)}</p>')
    link = links.get((card.first.target, found.code, found.node))
    if link:
        parts.append(f'<p><a href="#{escape(link)}">Show it in the graph</a></p>')
    parts.append("</article>")
    return "\n".join(parts)


def _member(item: Reported) -> str:
    found = item.diagnostic
    parts = [f"node {code(found.node)}"] if found.node else []
    parts += [code(found.op)] if found.op else []
    parts += [f"in {code(found.module)}"] if found.module else []
    parts += [f"source {code(', '.join(found.sources) or found.source)}"] if found.source else []
    return ", ".join(parts)


def _where(card: Card) -> str:
    place, found = card.place, card.first.diagnostic
    if place is None:
        why = "the graph has no frame outside torch for it" if found.node else "it is about the whole program"
        return f'<p class="soft">No source line: {why}.</p>'
    function = found.location.function if found.location else ""
    inside = f' <span class="soft">in {code(function)}</span>' if function else ""
    text = f"<p>{code(f'{place.path}:{place.line}')}{inside}</p>"
    return text + (source_line(place.source, place.column, place.width) if place.source else "")


def source_line(text: str, start: int, width: int) -> str:
    """A line of source with a part of it marked."""
    if not 0 < width < len(text):
        return f"<pre><code>{escape(text)}</code></pre>"
    marked = f"<mark>{escape(text[start : start + width])}</mark>"
    return f"<pre><code>{escape(text[:start])}{marked}{escape(text[start + width :])}</code></pre>"


def failures_part(result: CheckResult) -> str:
    """The targets that could not be checked, and warnings about the run."""
    parts = []
    if result.failures:
        rows = "".join(f"<li><strong>{escape(f.code)}</strong> {escape(f.message)}</li>" for f in result.failures)
        parts.append(f"<h3>{count(len(result.failures), 'target')} could not be checked</h3><ul>{rows}</ul>")
    if result.warnings:
        rows = "".join(f"<li>{escape(text)}</li>" for text in result.warnings)
        parts.append(f"<h3>Warnings</h3><ul>{rows}</ul>")
    return "\n".join(parts)
