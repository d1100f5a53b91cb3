"""The targets of ``check``: programs, lifted programs and partitions in files, globs of them, and callables.

Files are read by readers of our own, which run nothing and import no torch (unless they are to be trusted). A callable
runs.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer_lifting.errors import ArchiveError, AxesError
from buffer_lifting.graph.archive_schema import shown
from buffer_lifting.graph.inconsistent import untrusted
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.inspection.diagnostics import Diagnostic, check, numbered, report_diagnostics
from buffer_lifting.inspection.stage_directory import is_meant_as_stage_directory, is_stage_directory
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes
from buffer_lifting.targets import TargetError, load_checkable
from buffer_lifting.terminal import stdout_to_stderr

_EXPECTED = (
    "a target is a .pt2 file, a .lifted file, a directory that `buffer-lifting split` wrote, or package.module:callable"
)
FILES = (".pt2", ".lifted")


@dataclass(frozen=True, slots=True)
class Scanned:
    """A file that holds a program: its record, and the plan of its scan."""

    record: GraphRecord
    plan: LiftPlan


def expand(patterns: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The targets that the arguments name, each once, in order; and the globs that match none, with the reason."""
    targets: dict[str, str] = {}  # what it is -> as it is written first
    failures = []
    for pattern in patterns:
        if is_callable(pattern) or not glob.has_magic(pattern) or Path(pattern).exists():
            targets.setdefault(_identity(pattern), pattern)
            continue
        found = [path for path in sorted(_matches(pattern)) if _is_checkable(Path(path))]
        if not found:
            failures.append((pattern, "it matches no .pt2 file, no .lifted file and no stage directory"))
        for path in found:
            targets.setdefault(_identity(path), path)
    return list(targets.values()), failures


def _matches(pattern: str) -> set[str]:
    """What a glob matches; its ``**`` follows no links, which may lead in circles, and enters no hidden directory."""
    parts = pattern.split("/")
    if "**" not in parts:
        return set(glob.glob(pattern))
    at = parts.index("**")
    start, rest = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
    found: set[str] = set()
    for base in glob.glob(f"{start}/") if start else ["/" if at else ""]:
        for folder, names, _ in os.walk(base or "."):
            names[:] = [name for name in names if not name.startswith(".")]
            inside = folder if base else folder[2:]  # without "./"
            found |= _matches(f"{glob.escape(inside.rstrip('/'))}/{rest}" if inside else rest)
    return found


def _identity(target: str) -> str:
    """Equal for targets that are one: other ways to write a path, and links to it."""
    try:
        return target if is_callable(target) else os.path.realpath(target)
    except (OSError, ValueError):
        return target


def check_target(
    target: str,
    axes: Axes | None,
    observe: Callable[[Any], None] | None = None,
    trust: bool = False,
    general_axes: bool = False,
) -> tuple[Diagnostic, ...]:
    """The findings of one target.

    Args:
        target: as a user writes it.
        axes: as in :func:`buffer_lifting.scan`.
        observe: is given what the target holds, once it is checked: a program, a :class:`Scanned`, or what
            ``lifted_file`` or ``stage_files`` has read.
        trust: read a file by torch's loader, which runs code that is in it.
        general_axes: ``axes`` is for all targets of a project: one that is lifted already, and has its own, ignores it.

    Raises:
        TargetError: it is none, or its callable fails.
        LiftingError: a file that cannot be read, or axes that do not fit.
    """
    path = Path(target)
    if needs_torch(target, trust):
        found, subject = _check_program(target, axes, trust, general_axes)
        if observe is not None:
            observe(subject)
        return found
    with untrusted(target, TargetError):
        if axes and not general_axes and (path.is_dir() or path.suffix == ".lifted"):
            what = "saved stages" if path.is_dir() else "a lifted program"
            raise TargetError(f"{target}: {what}, whose axes are known; --axes is for a program to be lifted")
        found, subject = _check_file(target, path, axes)
        if observe is not None:
            observe(subject)
    return found


def needs_torch(target: str, trust: bool) -> bool:
    """Whether a target is loaded with torch: a callable, or a file that is trusted."""
    path = Path(target)
    return is_callable(target) or (trust and path.suffix in FILES and not path.is_dir())


def _check_program(
    target: str, axes: Axes | None, trust: bool, general_axes: bool
) -> tuple[tuple[Diagnostic, ...], object]:
    program = load_checkable(target, trust)
    if general_axes and is_lifted(program):
        axes = None
    try:
        with stdout_to_stderr():
            return check(program, axes=axes), program
    except ValueError as error:
        raise TargetError(f"{target}: {error}") from error


def _check_file(target: str, path: Path, axes: Axes | None) -> tuple[tuple[Diagnostic, ...], object]:
    """The findings of what is read without torch, and what was read."""
    if path.is_dir():
        if not is_stage_directory(path):
            raise TargetError(f"{target}: a directory without a manifest; {_EXPECTED}")
        from buffer_lifting.inspection.stage_files import read_stages, stage_findings

        partition = read_stages(path)
        return stage_findings(partition), partition
    if path.suffix == ".lifted":
        from buffer_lifting.inspection.lifted_file import lifted_findings, read_lifted_graph

        lifted = read_lifted_graph(path)
        try:
            return lifted_findings(lifted), lifted
        except AxesError as error:
            reason = shown(" ".join(str(error).split()))[:200]
            raise ArchiveError(f"{path}: the axes in it do not fit its program: {reason}") from None
    if path.suffix != ".pt2":
        raise TargetError(f"{target}: {_EXPECTED}")
    from buffer_lifting.graph.archive import read_archive
    from buffer_lifting.scanner import scan_record

    record = read_archive(path)
    plan = scan_record(record, axes)
    return numbered(report_diagnostics(plan.report)), Scanned(record, plan)


def is_lifted(program: object) -> bool:
    """Whether a program has lifted inputs, or stages."""
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    return isinstance(program, LiftedProgram | StagedProgram)


def is_callable(target: str) -> bool:
    """Whether a target is ``package.module:callable``."""
    return ":" in target and not target.endswith(FILES) and not Path(target).exists()


def _is_checkable(path: Path) -> bool:
    return path.suffix in FILES or (path.is_dir() and is_meant_as_stage_directory(path))
