"""Draws pictures as SVG: layers from top to bottom for a chain, three columns from left to right for a whole program.

The colours are classes of the page's style sheet. All text is escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from buffer_lifting.inspection.html_report.markup import escape
from buffer_lifting.inspection.html_report.views import Arrow, Box, Picture

WIDTH, HEIGHT = 300, 46
GAP_X, GAP_Y = 28, 26
MARGIN = 8
#: Characters that fit into a box.
TITLE_FITS, TEXT_FITS = 36, 42
Point = tuple[float, float]


def draw_chain(picture: Picture, name: str) -> str:
    """A picture with the consumer at the bottom: a box stands as low as its readers allow."""
    depth = _depths(picture)
    deepest = max(depth.values(), default=0)
    taken: set[tuple[int, int]] = set()
    places: dict[str, Point] = {}
    for box in picture.boxes:
        row, column = deepest - depth[box.id], box.column
        while (row, column) in taken:
            column += 1
        taken.add((row, column))
        places[box.id] = (MARGIN + column * (WIDTH + GAP_X), MARGIN + row * (HEIGHT + GAP_Y))
    _ordered(places)
    lines = [_down(arrow, places) for arrow in picture.arrows]
    return _svg(name, picture, [*lines, *(_box(box, places[box.id]) for box in picture.boxes)], places)


def draw_columns(picture: Picture, name: str) -> str:
    """A picture whose boxes stand in columns from left to right, each as near to what it reads as the order allows."""
    columns: dict[int, list[Box]] = defaultdict(list)
    for box in picture.boxes:
        columns[box.column].append(box)
    into: dict[str, list[str]] = defaultdict(list)
    for arrow in picture.arrows:
        into[arrow.end].append(arrow.start)
    places: dict[str, Point] = {}
    wide = WIDTH + 2.5 * GAP_X
    step = HEIGHT + GAP_Y / 2
    for place, column in enumerate(sorted(columns)):
        x = MARGIN + place * wide
        row = float(MARGIN)
        for box, wanted in _by_height(columns[column], into, places):
            row = max(row, wanted)
            places[box.id] = (x, row)
            row += step
    lines = [_across(arrow, places) for arrow in picture.arrows]
    return _svg(name, picture, [*lines, *(_box(box, places[box.id]) for box in picture.boxes)], places)


def _by_height(
    boxes: Sequence[Box], into: dict[str, list[str]], places: dict[str, Point]
) -> Iterable[tuple[Box, float]]:
    """The boxes of a column by the mean height of what they read, with that height."""
    heights = []
    for number, box in enumerate(boxes):
        above = [places[start][1] for start in into[box.id] if start in places]
        heights.append((sum(above) / len(above) if above else 0.0, number, box))
    return [(box, height) for height, _, box in sorted(heights, key=lambda entry: entry[:2])]


def _depths(picture: Picture) -> dict[str, int]:
    """For each box the longest way down to a box that nothing reads."""
    readers: dict[str, list[str]] = {box.id: [] for box in picture.boxes}
    waits: dict[str, int] = {box.id: 0 for box in picture.boxes}
    above: dict[str, list[str]] = {box.id: [] for box in picture.boxes}
    for arrow in picture.arrows:
        readers[arrow.start].append(arrow.end)
        above[arrow.end].append(arrow.start)
        waits[arrow.start] += 1
    ready = [name for name, count in waits.items() if not count]
    depth: dict[str, int] = {}
    for name in ready:
        depth[name] = 1 + max((depth[reader] for reader in readers[name]), default=-1)
        for start in above[name]:
            waits[start] -= 1
            if not waits[start]:
                ready.append(start)
    return depth


def _ordered(places: dict[str, Point]) -> None:
    """The column that begins highest comes first, and columns that hold nothing take no room."""
    tops: dict[float, float] = {}
    for x, y in places.values():
        tops[x] = min(y, tops.get(x, y))
    order = sorted(tops, key=lambda x: (tops[x], x))
    for name, (x, y) in places.items():
        places[name] = (MARGIN + order.index(x) * (WIDTH + GAP_X), y)


def _down(arrow: Arrow, places: dict[str, Point]) -> str:
    (x0, y0), (x1, y1) = places[arrow.start], places[arrow.end]
    start, end = (x0 + WIDTH / 2, y0 + HEIGHT), (x1 + WIDTH / 2, y1)
    rows = (y1 - y0) / (HEIGHT + GAP_Y)
    if x0 == x1 and rows > 1:  # past the boxes between
        side = x0 + WIDTH + GAP_X / 2
        middle = f"C {side} {start[1] + 10:g}, {side} {end[1] - 10:g},"
        return _path(arrow, f"M {start[0] + WIDTH / 4:g} {start[1]:g} {middle} {end[0] + WIDTH / 4:g} {end[1] - 5:g}")
    bend = (end[1] - start[1]) / 2 if rows <= 1 else GAP_Y * 1.5
    path = f"M {start[0]:g} {start[1]:g} "
    if rows > 1:  # straight down in its own column first
        down = end[1] - GAP_Y
        path += f"L {start[0]:g} {down:g} "
        start, bend = (start[0], down), GAP_Y / 2
    return _path(
        arrow,
        f"{path}C {start[0]:g} {start[1] + bend:g}, {end[0]:g} {end[1] - bend:g}, {end[0]:g} {end[1] - 5:g}",
    )


def _across(arrow: Arrow, places: dict[str, Point]) -> str:
    (x0, y0), (x1, y1) = places[arrow.start], places[arrow.end]
    x0, y0, y1 = x0 + WIDTH, y0 + HEIGHT / 2, y1 + HEIGHT / 2
    bend = (x1 - x0) / 2
    return _path(arrow, f"M {x0:g} {y0:g} C {x0 + bend:g} {y0:g}, {x1 - bend:g} {y1:g}, {x1 - 5:g} {y1:g}")


def _path(arrow: Arrow, path: str) -> str:
    return f'<path class="arrow{" dashed" * arrow.dashed}" d="{path}" marker-end="url(#head)"/>'


def _box(box: Box, place: Point) -> str:
    x, y = place
    title, text = middle_cut(box.title, TITLE_FITS), middle_cut(box.text, TEXT_FITS)
    full = f"{box.title}\n{box.text}" if box.text else box.title
    base = y + (HEIGHT / 2 + 5 if not text else 19)
    parts = [
        f'<g class="box {box.kind}"><title>{escape(full)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + 10:g}" y="{base:g}">{escape(title)}</text>'
    ]
    if text:
        parts.append(f'<text class="more" x="{x + 10:g}" y="{y + 36:g}">{escape(text)}</text>')
    parts.append("</g>")
    body = "".join(parts)
    return f'<a href="#{escape(box.link)}">{body}</a>' if box.link else body


def _svg(name: str, picture: Picture, parts: Iterable[str], places: dict[str, Point]) -> str:
    right = max((x for x, _ in places.values()), default=0) + WIDTH + MARGIN + GAP_X / 2
    bottom = max((y for _, y in places.values()), default=0) + HEIGHT + MARGIN
    role = "group" if any(box.link for box in picture.boxes) else "img"
    return (
        f'<svg role="{role}" aria-label="{escape(middle_cut(picture.about, 600))}" '
        f'id="{escape(name)}" width="{right:g}" height="{bottom:g}" viewBox="0 0 {right:g} {bottom:g}">'
        + "".join(parts)
        + "</svg>"
    )


def middle_cut(text: str, width: int) -> str:
    """Text with its middle left out, in a width."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
