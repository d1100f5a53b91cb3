"""Where a finding is shown: paths relative to the repository, and the line with a caret.

A stack trace has the paths of the machine that exported. A file is looked for as it is, and else by the longest end
of its path that names a file of the repository which has the recorded line.
"""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import Diagnostic

_PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True, slots=True)
class Place:
    """A line of source.

    Attributes:
        path: with ``/``; relative to the repository's root when ``inside``, from ``site-packages/`` on for an
            installed package, and else as recorded.
        line: 1-based.
        inside: whether the file is one of the repository.
        source: the line's text without indentation, or empty.
        column, width: where in ``source`` the caret stands (0-based), and how many characters it marks.
    """

    path: str
    line: int
    inside: bool
    source: str
    column: int
    width: int


def repository_root(start: Path) -> Path:
    """The nearest directory from ``start`` upwards that has ``.git``; ``start`` itself if none has."""
    start = start.resolve()
    return next((path for path in (start, *start.parents) if (path / ".git").exists()), start)


class Places:
    """The places of one repository; files are looked up once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        linecache.checkcache()
        self._known: dict[tuple[str, int, str], Place] = {}

    def of(self, found: Diagnostic) -> Place | None:
        """The place of a finding; ``None`` when the graph has no location for it."""
        where = found.location
        if where is None:
            return None
        path, inside, text = self._line(where)
        column, width = _mark(text, found)
        return Place(path, where.line, inside, text, column, width)

    def at(self, where: Location) -> Place:
        """A location as a place, the whole line marked."""
        path, inside, text = self._line(where)
        return Place(path, where.line, inside, text, 0, len(text))

    def _line(self, where: Location) -> tuple[str, bool, str]:
        key = (where.file, where.line, where.code)
        if key not in self._known:
            file = self._file(where)
            text = where.code or (linecache.getline(str(file), where.line).strip() if file else "")
            path = file.relative_to(self.root).as_posix() if file else _outside(where.file)
            self._known[key] = Place(path, where.line, file is not None, text, 0, 0)
        place = self._known[key]
        return place.path, place.inside, place.source

    def _file(self, where: Location) -> Path | None:
        """The file in the repository, or ``None``. No file outside of it is opened: a program may name any."""
        own = Path(where.file)
        parts = own.parts
        if ".." in parts or any(name in parts for name in _PACKAGES):
            return None
        if (self.root / own).is_relative_to(self.root) and (self.root / own).is_file():
            return self.root / own
        for start in range(1, len(parts)):
            candidate = self.root.joinpath(*parts[start:])
            if candidate.is_file() and linecache.getline(str(candidate), where.line).strip() == where.code != "":
                return candidate
        return None


def printable(text: str) -> str:
    """One line that a terminal shows as it is: control characters are escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _outside(file: str) -> str:
    parts = Path(file.replace("\\", "/")).parts
    for name in _PACKAGES:
        if name in parts:
            return "/".join(parts[parts.index(name) :])
    return file.replace("\\", "/")


def _mark(text: str, found: Diagnostic) -> tuple[int, int]:
    """The name of what is read, or of the op, if the line has it; else the whole line."""
    names = [*reversed(found.source.split(".")), *found.op.split(".")[1:2]]
    for name in names:
        match = re.search(rf"\b{re.escape(name)}\b", text) if name else None
        if match:
            return match.start(), len(name)
    return 0, len(text)
