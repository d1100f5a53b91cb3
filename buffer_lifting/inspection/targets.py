"""The targets of ``check``: ``.pt2`` files, saved stage directories, globs of them, and ``package.module:callable``.

Files are read by readers of our own, which run nothing and import no torch. A callable runs.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.inspection.diagnostics import Diagnostic, check, check_scan
from buffer_lifting.inspection.stage_files import is_stage_directory, read_stages, saved_findings
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes
from buffer_lifting.targets import TargetError, load_checkable, load_lifted

_EXPECTED = "a target is a .pt2 file, a directory that `buffer-lifting split` wrote, or package.module:callable"


@dataclass(frozen=True, slots=True)
class Scanned:
    """A file that holds a program: its record, and the plan of its scan."""

    record: GraphRecord
    plan: LiftPlan


def expand(patterns: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The targets that the arguments name, each once, in order; and the globs that match none, with the reason."""
    targets: dict[str, None] = {}
    failures = []
    for pattern in patterns:
        if _is_callable(pattern) or not glob.has_magic(pattern) or Path(pattern).exists():
            targets[pattern] = None
            continue
        found = [path for path in sorted(glob.glob(pattern, recursive=True)) if _is_checkable(Path(path))]
        if not found:
            failures.append((pattern, "it matches no .pt2 file and no stage directory"))
        targets.update(dict.fromkeys(found))
    return list(targets), failures


def check_target(
    target: str, axes: Axes | None, observe: Callable[[Any], None] | None = None, trusted: bool = False
) -> tuple[Diagnostic, ...]:
    """The findings of one target.

    Args:
        target: a file, a directory or a callable.
        axes: of a program that is not lifted.
        observe: is given what the target holds, once it is checked: a program, a :class:`Scanned` or a
            :class:`SavedStages`.
        trusted: take ``.lifted`` files too, which torch loads, and which can run code.

    Raises:
        TargetError: it is none, or its callable fails.
        LiftingError: a file that cannot be read, or axes that do not fit.
    """
    path = Path(target)
    lifted = trusted and path.suffix == ".lifted"
    if lifted or _is_callable(target):
        program = load_lifted(target, axes) if lifted else load_checkable(target)
        try:
            with redirect_stdout(sys.stderr):
                found = check(program, axes=axes)
        except ValueError as error:
            raise TargetError(f"{target}: {error}") from error
        return _observed(found, program, observe)
    if path.is_dir():
        if not is_stage_directory(path):
            raise TargetError(f"{target}: a directory without a manifest; {_EXPECTED}")
        if axes:
            raise TargetError(f"{target}: saved stages, whose axes are known; --axes is for a program to be lifted")
        saved = read_stages(path)
        return _observed(saved_findings(saved), saved, observe)
    if path.suffix != ".pt2":
        raise TargetError(f"{target}: {_EXPECTED}")
    from buffer_lifting.graph.archive import read_archive
    from buffer_lifting.scanner import scan_record

    record = read_archive(path)
    plan = scan_record(record, axes)
    return _observed(check_scan(record, plan.report), Scanned(record, plan), observe)


def _observed(
    found: tuple[Diagnostic, ...], subject: Any, observe: Callable[[Any], None] | None
) -> tuple[Diagnostic, ...]:
    if observe is not None:
        observe(subject)
    return found


def _is_callable(target: str) -> bool:
    return ":" in target and not target.endswith(".pt2") and not Path(target).exists()


def _is_checkable(path: Path) -> bool:
    return path.suffix == ".pt2" or (path.is_dir() and is_stage_directory(path))
