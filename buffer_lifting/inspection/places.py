"""Where a finding is shown: paths relative to the repository, and the line with a caret.

A stack trace has the paths of the machine that exported. A file is looked for as it is, and else by the longest end
of its path that names a file of the repository which has the recorded line.

A stack trace may come from a stranger's file and name any file and line (``.git/config``, where a CI keeps its token).
What is shown of a line is what the trace recorded, never what a file of this machine has. Only Python sources below the
root, with no hidden directory on the way and no link that leads out, are looked at, and only to compare a line.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import Diagnostic

_PACKAGES = ("site-packages", "dist-packages")
_SOURCES = (".py", ".pyi", ".pyx")
_MAX_PARTS = 64  # of a path that is looked for


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
        self.root, self._real_root = root, root.resolve()
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

    def of_target(self, target: str) -> Place:
        """What stands for a finding without a line: the target's file, a directory's manifest, a callable's source."""
        file, line = _target_file(target)
        try:
            path = Path(os.path.normpath(Path.cwd() / file))
            inside = path.is_relative_to(self.root) or path.resolve().is_relative_to(self._real_root)
            base = self.root if path.is_relative_to(self.root) else self._real_root
            text = (
                (path if path.is_relative_to(base) else path.resolve()).relative_to(base).as_posix() if inside else ""
            )
        except (OSError, ValueError, RuntimeError):
            inside, text = False, ""
        return Place(text or Path(file).name or "target", line, inside, "", 0, 0)

    def _line(self, where: Location) -> tuple[str, bool, str]:
        key = (where.file, where.line, where.code)
        if key not in self._known:
            file = self._file(where)
            path = file.relative_to(self.root).as_posix() if file else _outside(where.file)
            self._known[key] = Place(path, where.line, file is not None, where.code, 0, 0)
        place = self._known[key]
        return place.path, place.inside, place.source

    def _file(self, where: Location) -> Path | None:
        """The file in the repository, or ``None``. No file outside of it is opened: a program may name any."""
        own = Path(where.file)
        parts = own.parts
        if ".." in parts or any(name in parts for name in _PACKAGES):
            return None
        direct = self.root / own
        if self._is_source(direct):
            return direct
        for start in range(max(1, len(parts) - _MAX_PARTS), len(parts)):
            candidate = self.root.joinpath(*parts[start:])
            if self._is_source(candidate) and _has_line(candidate, where):
                return candidate
        return None

    def _is_source(self, path: Path) -> bool:
        """Whether it is a Python file of the repository: below its root, also behind links, and not hidden."""
        if path.suffix not in _SOURCES or not path.is_relative_to(self.root):
            return False
        try:
            real = path.resolve()
            if not real.is_file() or not real.is_relative_to(self._real_root) or real.suffix not in _SOURCES:
                return False
        except (OSError, ValueError, RuntimeError):  # a name that is too long, a NUL in it, a loop of links
            return False
        below = (*path.relative_to(self.root).parts, *real.relative_to(self._real_root).parts)
        return not any(part.startswith(".") for part in below)


def _has_line(path: Path, where: Location) -> bool:
    return where.code != "" and linecache.getline(str(path), where.line).strip() == where.code


def _target_file(target: str) -> tuple[str, int]:
    """The file that a target is, or is defined in, and the line there."""
    path = Path(target)
    if path.is_dir():
        return str(path / "manifest.json"), 1
    module, colon, attribute = target.partition(":")
    loaded = sys.modules.get(module) if colon and not path.exists() else None
    file = getattr(loaded, "__file__", None)
    if loaded is None or file is None:
        return target, 1
    value: object = loaded
    for part in attribute.split("."):
        value = getattr(value, part, None)
    code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if isinstance(code, CodeType) else (file, 1)


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
