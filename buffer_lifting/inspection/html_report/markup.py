"""Escaping: text of a program (names, source lines, messages) into HTML, and data into a script element."""

from __future__ import annotations

import html
import json
from typing import Any

from buffer_lifting.inspection.places import printable
from buffer_lifting.terminal import inert_html, inert_json


def escape(text: object) -> str:
    """Text for an element's content or a quoted attribute: markup is quoted, and control characters are written out.

    Lines stay lines.
    """
    return inert_html("\n".join(html.escape(printable(line), quote=True) for line in str(text).split("\n")))


def embedded_json(data: Any) -> str:
    """JSON for the content of a ``script`` element: ASCII, and no ``<``, ``>`` or ``&`` that could end it."""
    text = inert_json(json.dumps(data, ensure_ascii=True, separators=(",", ":")))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def ascii_only(text: str) -> str:
    """Markup with every character outside of ASCII as a reference, so that no encoding can spoil it."""
    return text.encode("ascii", "xmlcharrefreplace").decode()


def code(text: object) -> str:
    """Text as code."""
    return f"<code>{escape(text)}</code>"


def count(number: int, what: str) -> str:
    """``"1 finding"``, ``"1,234 findings"``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
