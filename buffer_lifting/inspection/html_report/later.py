"""What a large page holds compressed: the page inflates it when it is open, and lays it out when it is looked at.

A page of a few hundred findings is plain markup. What goes beyond that repeats itself (names, lines, tables of steps),
and is some twenty times smaller deflated.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable

from buffer_lifting.inspection.html_report.markup import ascii_only, embedded_json

#: Bytes of plain markup: of the findings, of the reads, and of the data as JSON.
FINDINGS_ROOM, READS_ROOM, DATA_ROOM = 300_000, 600_000, 200_000
#: Pieces that a browser lays out together.
BLOCK = 40


class Parts:
    """The compressed parts of one page; ``items`` counts the findings and reads that are in them."""

    def __init__(self) -> None:
        self.markup: list[str] = []
        self.items = 0

    def add(self, markup: str) -> int:
        """The number of a new part."""
        self.markup.append(markup)
        return len(self.markup) - 1

    def element(self) -> str:
        """The element with the parts as a JSON array of markup; empty when there are none."""
        if not self.markup:
            return ""
        return packed("parts", embedded_json([ascii_only(text) for text in self.markup]))


class Room:
    """The plain markup of one section: what comes when it is full goes to the parts.

    Args:
        size: characters.
        parts: of the page.
    """

    def __init__(self, size: int, parts: Parts) -> None:
        self._left, self._parts = size, parts

    def body(self, markup: str) -> str:
        """An element that is seen when something is opened; it takes its room with what it stands in."""
        if len(markup) <= self._left:
            return f"<div>{markup}</div>"
        return f'<div data-body="{self._parts.add(markup)}"></div>'

    def run(self, pieces: Iterable[str]) -> list[str]:
        """Pieces that follow each other, each a finding or a read: as they are, the rest as one part."""
        plain: list[str] = []
        rest: list[str] = []
        for piece in pieces:
            self._left = max(0, self._left - len(piece))
            (plain if self._left else rest).append(piece)
        self._parts.items += len(rest)
        return [*plain, *self._placed(rest)]

    def groups(self, groups: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
        """Groups of pieces, each with a heading; those that come when the room is full are one part."""
        plain: list[str] = []
        rest: list[str] = []
        for heading, pieces in groups:
            if self._left:
                plain.append("\n".join([f"<div data-group>{heading}", *self.run(pieces), "</div>"]))
                continue
            found = list(pieces)
            self._parts.items += len(found)
            for start in range(0, len(found), BLOCK):
                more = [heading] if not start else []
                rest.append("\n".join(["<div data-group>", *more, *found[start : start + BLOCK], "</div>"]))
        return [*plain, *self._placed(rest)]

    def _placed(self, pieces: list[str]) -> list[str]:
        """The place of a new part: the pieces in blocks, so that a browser passes over those that are not in view."""
        if not pieces:
            return []
        blocks = ("\n".join(pieces[start : start + BLOCK]) for start in range(0, len(pieces), BLOCK))
        part = "\n".join(f'<div class="block" data-group>{block}</div>' for block in blocks)
        return [f'<div data-later="{self._parts.add(part)}"></div>']


def data_element(text: str) -> str:
    """The element ``data`` with JSON, deflated if there is much of it."""
    if len(text) <= DATA_ROOM:
        return f'<script type="application/json" id="data">{text}</script>'
    return packed("data", text)


def packed(name: str, text: str) -> str:
    """An element that holds ASCII text deflated (RFC 1950) as base64."""
    content = base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode()
    return f'<script type="text/plain" id="{name}" data-encoding="deflate-base64">{content}</script>'
