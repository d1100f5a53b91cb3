"""The reads of each target as pictures: the whole program from sources to consumers, and every read by itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from buffer_lifting.explanation import STAYS
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.html_report.later import Room
from buffer_lifting.inspection.html_report.markup import code, count, escape
from buffer_lifting.inspection.html_report.pictures import input_shape
from buffer_lifting.inspection.html_report.svg import draw_chain, draw_columns
from buffer_lifting.inspection.html_report.views import Arrow, Box, Picture, ProgramView, ReadGroup, Row
from buffer_lifting.inspection.places import Places
from buffer_lifting.layers import layers
from buffer_lifting.program import LiftedInput

_LIFTED = {
    "lifted": "is lifted",
    "natural": "is kept in natural order, and gathered",
}
_STATUS = {
    "lifted": "can be lifted",
    "natural": "can be kept in natural order, and gathered",
    "causal": "a flag that context_parallel replaces",
    "refused": "cannot be lifted",
    "handled": "needs no lift",
}
_KEY = (
    ("source", "source"),
    ("op", "op"),
    ("consumer", "where it meets data"),
    ("refused", "where lifting stops"),
    ("feed", "computed outside the stages, by the feed"),
    ("input", "lifted input"),
)


#: Kinds of reads of a page that are drawn; the others have their steps as text.
MAX_DRAWN = 200


def graph_section(views: Sequence[ProgramView], places: Places, targets: Sequence[str], room: Room) -> str:
    """The section of the page; ``targets`` gives each target its number."""
    parts = [
        '<section id="graph" aria-labelledby="graph-title"><h2 id="graph-title">Graph: from sources to consumers</h2>'
    ]
    if not views:
        parts.append("<p>There is none.</p>")
    else:
        choices = "".join(
            f'<label><input type="radio" name="show" value="{value}"{" checked" * (value == "both")}> {value}</label> '
            for value in ("both", "before", "after")
        )
        parts.append(
            f'<p class="controls needs-script" hidden>Show lifting: {choices}'
            '<button id="toggle" type="button">Open or close all reads</button></p>'
        )
        parts.append(_key())
    parts.append('<div id="pictures">')
    left = MAX_DRAWN
    for view in views:
        parts.append(_program(view, targets.index(view.target), places, len(targets) > 1, left, room))
        left = max(0, left - len(view.groups))
    return "\n".join([*parts, "</div></section>"])


def group_id(target: int, group: ReadGroup) -> str:
    """The id of a read's element."""
    return f"read-{target}-{group.id}"


def _key() -> str:
    entries = []
    for kind, text in _KEY:
        sample = f'<svg width="26" height="16" aria-hidden="true"><g class="box {kind}">'
        sample += '<rect x="2" y="2" width="22" height="12" rx="3"/></g></svg>'
        entries.append(f"<li>{sample}{text}</li>")
    return f'<ul class="key" aria-label="Key">{"".join(entries)}</ul>'


def _program(view: ProgramView, number: int, places: Places, named: bool, drawn: int, room: Room) -> str:
    parts = [f"<div data-group><h3>{code(view.target)}</h3>" if named else "<div>"]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in view.notes]
    if view.problem:
        parts.append(f'<p class="verdict failed">{escape(view.problem)}</p>')
    if view.groups:
        wholes = (("before", whole_before(view, number)), ("after", whole_after(view, number)))
        for kind, picture in wholes if len(view.groups) <= drawn else ():
            if picture.boxes:
                title = "Before lifting" if kind == "before" else "After lifting"
                parts.append(f'<figure class="{kind}"><figcaption>{title}</figcaption><div class="picture whole" ')
                drawing = draw_columns(picture, f"whole-{number}-{kind}")
                parts.append(f'tabindex="0" role="region" aria-label="{title}, all reads">{drawing}</div></figure>')
        level = "h4" if named else "h3"
        text = f"{count(len(view.groups), 'kind')} of reads and ops that mix the sequence"
        parts.append(f"<{level}>{text}</{level}>")
        if len(view.groups) > drawn:
            most = f"A page draws {count(MAX_DRAWN, 'kind')} of reads at most: of the others and the whole there are no"
            parts.append(f'<p class="soft">{most} pictures, but their steps. A page of fewer targets draws more.</p>')
        words = _STATUS if view.kind == "program" else {**_STATUS, **_LIFTED}
        parts += room.run(
            _read(group, number, places, words[group.status], index < drawn, room)
            for index, group in enumerate(view.groups)
        )
    elif not view.problem:
        parts.append("<p>Nothing is read by position, and no op mixes the sequence.</p>")
    return "\n".join([*parts, "</div>"])


def _read(group: ReadGroup, number: int, places: Places, status: str, drawn: bool, room: Room) -> str:
    name = group_id(number, group)
    times = len(group.members)
    badge = f'<span class="badge {group.status}">{status}</span>'
    spread = f' <span class="badge plain">&#215; {times}</span>' if times > 1 else ""
    rule = f"<strong>{escape(group.code)}</strong> " if group.code else ""
    data = f'data-code="{escape(group.code)}" data-target="{number}" data-count="{times}"'
    head = (
        f'<details class="read" id="{name}" {data}>'
        f"<summary>{badge}{spread} {rule}{escape(group.title)}<br>{_reader(group)} "
        f'<span class="soft">{_place(group.location, places)}</span></summary>'
    )
    parts = []
    if group.location is not None and (text := places.at(group.location).source):
        parts.append(f"<pre><code>{escape(text)}</code></pre>")
    if group.hint:
        parts.append(f"<p><strong>Help:</strong> {escape(group.hint)}</p>")
    parts.append('<div class="pictures">')
    for kind, picture in (("before", group.before), ("after", group.after)):
        if picture is not None and drawn:
            drawing = draw_chain(picture, f"{name}-{kind}")
            only = group.after is None
            caption = "In the graph" if only else f"{kind.capitalize()} lifting"
            parts.append(
                f"<figure{'' if only else f' class={chr(34)}{kind}{chr(34)}'}><figcaption>{caption}</figcaption>"
                f'<div class="picture" tabindex="0" role="region" aria-label="{caption}">{drawing}</div></figure>'
            )
    parts.append("</div>")
    parts += [_nearest(group), _steps(group.rows, places), _members(group)]
    return f"{head}{room.body(chr(10).join(filter(None, parts)))}</details>"


def _reader(group: ReadGroup) -> str:
    """The op that reads, and the lifted inputs that it reads then."""
    inputs = ", ".join(code(name) for name in group.inputs[:4])
    more = f" and {len(group.inputs) - 4} more" if len(group.inputs) > 4 else ""
    return f"{code(group.consumer)}{f' reads {inputs}{more}' if inputs else ''}"


def _place(where: Location | None, places: Places) -> str:
    if where is None:
        return ""
    place = places.at(where)
    return escape(f"{place.path}:{place.line}")


def _nearest(group: ReadGroup) -> str:
    if not group.nearest:
        return ""
    rows = "".join(
        f"<tr><td>{escape(title)}</td><td>{escape(needs)}</td><td>{escape(failed)}</td></tr>"
        for title, needs, failed in group.nearest
    )
    head = "<thead><tr><th>Pattern</th><th>needs</th><th>fails here</th></tr></thead>"
    return f'<div class="wide"><table><caption>The nearest patterns</caption>{head}<tbody>{rows}</tbody></table></div>'


def _steps(rows: Sequence[Row], places: Places) -> str:
    """The chain as a table: what the picture shows, for who reads it as text."""
    if not rows:
        return ""
    body = []
    for row in rows:
        beside = "&#8627; " if row.chain else ""
        cells = "".join(f"<td>{code(cell) if cell else ''}</td>" for cell in (row.op, row.node, row.shape, row.detail))
        body.append(f"<tr><td>{beside}{escape(row.mark)}</td>{cells}<td>{_place(row.location, places)}</td></tr>")
    names = ("Lifting", "Op", "Node", "Value", "Detail", "Source")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    title = f"Its {count(len(rows), 'step')} as a table"
    return f'<details><summary>{title}</summary><div class="wide">{table}</div></details>'


def _members(group: ReadGroup) -> str:
    entries = []
    for item in group.members:
        parts = [f"node {code(item.node)}"]
        parts += [f"operand {code(item.operand)}"] if item.operand else []
        parts += [f"in {code(item.module)}"] if item.module else []
        parts += [f"source {code(item.source)}"] if item.source else []
        entries.append(f"<li>{', '.join(parts)}</li>")
    if len(entries) <= 1:
        return "".join(f'<p class="soft">{entry[4:-5]}</p>' for entry in entries)
    text = f"All {len(entries)} of them; the picture is that of the first"
    return f'<details><summary>{text}</summary><ul class="members">{"".join(entries)}</ul></details>'


def whole_before(view: ProgramView, number: int) -> Picture:
    """Sources on the left, the ops that read them on the right."""
    boxes: dict[str, Box] = {}
    arrows: dict[tuple[str, str], Arrow] = {}
    for group in view.groups:
        if group.status == "handled":
            continue
        end = _consumer(group, number, 1)
        boxes[end.id] = end
        if group.source:
            boxes.setdefault(f"source {group.source}", _source(group))
            arrows[f"source {group.source}", end.id] = Arrow(f"source {group.source}", end.id)
        for name in (f"source {other}" for other in group.also):
            boxes.setdefault(name, Box(name, "source", name.removeprefix("source "), "", 0))
            arrows[name, end.id] = Arrow(name, end.id)
    about = f"{view.target} before lifting: " + _words(boxes, arrows)
    return Picture(tuple(boxes.values()), tuple(arrows.values()), about)


def whole_after(view: ProgramView, number: int) -> Picture:
    """Sources, the lifted inputs that stand for them, and the ops that read these; what is refused stays as it is."""
    boxes: dict[str, Box] = {}
    arrows: dict[tuple[str, str], Arrow] = {}

    def join(start: str, end: str, dashed: bool = False) -> None:
        arrows.setdefault((start, end), Arrow(start, end, dashed))

    box_of: dict[str, str] = {}  # a lifted input -> its box: those of several layers are one
    kinds: dict[tuple[str, str, str], list[LiftedInput]] = defaultdict(list)
    for item in view.lifted:
        kinds[layers(item.source), re.sub(r"_\d+(?=_)", "_*", item.name), input_shape(item)].append(item)
    for (source, title, shape), items in kinds.items():
        name, of = f"source {source}", len({item.source for item in items})
        text = f"{of} sources" if of > 1 else ""
        boxes.setdefault(name, Box(name, "feed", f"feed: {source if of > 1 else items[0].source}", text, 0))
        first = f"input {items[0].name}"
        many = len(items) > 1
        text = f"{shape}, {len(items)} inputs" if many else shape
        boxes[first] = Box(first, "input", title if many else items[0].name, text, 1)
        join(name, first, dashed=True)
        box_of.update({item.name: first for item in items})
    for group in view.groups:
        if group.status == "handled":
            continue
        end = _consumer(group, number, 2)
        boxes[end.id] = end
        for start in dict.fromkeys(box_of[name] for name in group.inputs if name in box_of):
            join(start, end.id)
        kept = [row.detail for row in group.rows if row.mark == "source" and row.detail.endswith(STAYS)]
        names = [name for name in (group.source, *group.also) if any(repr(name) in layers(text) for text in kept)]
        if group.source and not group.inputs:
            names = [group.source, *group.also]
        for name in names:
            start = f"kept {name}"
            box = _source(group) if name == group.source else Box(start, "source", name, "", 0)
            boxes.setdefault(start, Box(start, box.kind, box.title, box.text, 0))
            join(start, end.id)
    about = f"{view.target} after lifting: " + _words(boxes, arrows)
    return Picture(tuple(boxes.values()), tuple(arrows.values()), about)


def _source(group: ReadGroup) -> Box:
    kind = "index made by" if group.source_kind == "iota" else group.source_kind.replace("_", " ")
    if group.source_kind == "is_causal":
        return Box(f"source {group.source}", "source", "is_causal=True", "the attention's own mask", 0)
    return Box(f"source {group.source}", "source", group.source, kind, 0)


def _consumer(group: ReadGroup, number: int, column: int) -> Box:
    name = group_id(number, group)
    times = len(group.members)
    where = f"{group.location.file.rpartition('/')[2]}:{group.location.line}" if group.location else ""
    spread = f"{times} reads" if times > 1 else "1 read" if times else ""
    text = ", ".join(part for part in (where, spread) if part)
    return Box(
        name, "refused" if group.status == "refused" else "consumer", group.consumer or "reads", text, column, name
    )


def _words(boxes: dict[str, Box], arrows: dict[tuple[str, str], Arrow]) -> str:
    return "; ".join(f"{boxes[start].title} to {boxes[end].title}" for start, end in arrows)
