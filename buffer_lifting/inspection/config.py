"""The section ``[buffer_lifting]`` of ``setup.cfg``; the command line wins over it."""

from __future__ import annotations

import configparser
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from buffer_lifting.inspection.diagnostics import Diagnostic
from buffer_lifting.inspection.rules import check_prefixes

SECTION = "buffer_lifting"
_WORDS = re.compile(r"[^a-z]")
FORMATS = ("text", "json", "github", "sarif", "html")
_BOOLEANS = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


class CheckError(Exception):
    """Arguments or configuration that do not fit; the message is one line."""


@dataclass(frozen=True, slots=True)
class Exemption:
    """An entry of ``suppress``: codes by prefix, a glob over source or module FQNs, and the reason."""

    prefix: str
    pattern: str
    reason: str

    def __str__(self) -> str:
        return f"{self.prefix} {self.pattern}"


def exemptions(entries: Sequence[Exemption], found: Diagnostic) -> tuple[Exemption, ...]:
    """The entries that cover a finding: one that fits its module, or those that fit each of its sources; else none."""
    own = [entry for entry in entries if found.code.startswith(entry.prefix)]
    for entry in own:
        if fnmatchcase(found.module, entry.pattern):
            return (entry,)
    fitting = [
        next((entry for entry in own if fnmatchcase(source, entry.pattern)), None)
        for source in found.sources or (found.source,)
    ]
    used = tuple(dict.fromkeys(entry for entry in fitting if entry is not None))
    return used if None not in fitting else ()


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a file; ``None`` (or nothing) is what the file does not say.

    ``directory`` is that of the file: its paths are relative to it.
    """

    directory: Path
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    format: str | None = None
    baseline: str | None = None
    exit_zero: bool = False
    statistics: bool = False
    suppress: tuple[Exemption, ...] = ()


def find_config(start: Path, root: Path) -> Config:
    """The section of the nearest ``setup.cfg`` that has one, from ``start`` up to ``root``; else no settings.

    Raises:
        CheckError: a file that cannot be parsed, an unknown key or code, or a suppression without a reason.
    """
    start = start.resolve()
    inside = start.is_relative_to(root)
    for directory in (start, *start.parents) if inside else (start,):
        file = directory / "setup.cfg"
        if file.is_file():
            parser = configparser.RawConfigParser(default_section="")  # [DEFAULT] is of other tools
            try:
                parser.read_string(file.read_text(encoding="utf-8-sig"), str(file))
            except (configparser.Error, UnicodeDecodeError, OSError) as error:
                raise CheckError(f"{file}: {' '.join(str(error).split())}") from error
            for name in parser.sections():
                if name != SECTION and _WORDS.sub("", name.lower()) in ("bufferlifting", "toolbufferlifting"):
                    raise CheckError(f"{file}: the section [{name}] is not read; it is called [{SECTION}]")
            if parser.has_section(SECTION):
                return _read(dict(parser.items(SECTION)), file)
        if directory == root:
            break
    return Config(start)


def _read(values: dict[str, str], file: Path) -> Config:
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = set(Config.__slots__) - {"directory"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckError(f"{file}: [{SECTION}] has the unknown key {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    where = f"{file}: [{SECTION}] "
    return Config(
        directory=file.parent,
        select=check_prefixes(split(values.get("select", "")), where + "select"),
        ignore=check_prefixes(split(values.get("ignore", "")), where + "ignore"),
        axes=tuple(line.strip() for line in values.get("axes", "").splitlines() if line.strip()),
        format=_format(values, where),
        baseline=values.get("baseline") or None,
        exit_zero=_boolean(values, "exit_zero", where),
        statistics=_boolean(values, "statistics", where),
        suppress=tuple(_exemption(line, where) for line in values.get("suppress", "").splitlines() if line.strip()),
    )


def split(text: str) -> list[str]:
    """Codes that commas or white space separate."""
    return text.replace(",", " ").split()


def _boolean(values: dict[str, str], key: str, where: str) -> bool:
    text = values.get(key, "no").strip().lower()
    if text not in _BOOLEANS:
        raise CheckError(f"{where}{key}: {text!r} is neither yes nor no")
    return _BOOLEANS[text]


def _format(values: dict[str, str], where: str) -> str | None:
    name = values.get("format")
    if name is not None and name not in FORMATS:
        raise CheckError(f"{where}format: {name!r} is none of {', '.join(FORMATS)}")
    return name


def _exemption(line: str, where: str) -> Exemption:
    head, _, reason = line.partition(":")
    parts = head.split()
    if len(parts) != 2 or not reason.strip():
        raise CheckError(f"{where}suppress: {line.strip()!r} is not 'CODE FQN-PATTERN: reason'")
    (prefix,) = check_prefixes(parts[:1], where + "suppress")
    return Exemption(prefix, parts[1], reason.strip())
