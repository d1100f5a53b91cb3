"""The targets of ``check``: programs, lifted programs and partitions in files, globs of them, and callables.

Files are read by readers of our own, which run nothing and import no torch (unless they are to be trusted). A callable
runs.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from buffer_lifting.inspection.diagnostics import Diagnostic, check, check_record
from buffer_lifting.inspection.stage_directory import is_stage_directory
from buffer_lifting.program import Axes
from buffer_lifting.targets import TargetError, load_checkable

_EXPECTED = (
    "a target is a .pt2 file, a .lifted file, a directory that `buffer-lifting split` wrote, or package.module:callable"
)
FILES = (".pt2", ".lifted")


def expand(patterns: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The targets that the arguments name, each once, in order; and the globs that match none, with the reason."""
    targets: dict[str, None] = {}
    failures = []
    for pattern in patterns:
        if is_callable(pattern) or not glob.has_magic(pattern) or Path(pattern).exists():
            targets[pattern] = None
            continue
        found = [path for path in sorted(glob.glob(pattern, recursive=True)) if _is_checkable(Path(path))]
        if not found:
            failures.append((pattern, "it matches no .pt2 file, no .lifted file and no stage directory"))
        targets.update(dict.fromkeys(found))
    return list(targets), failures


def check_target(target: str, axes: Axes | None, trust: bool = False, general: bool = False) -> tuple[Diagnostic, ...]:
    """The findings of one target.

    Args:
        target: as a user writes it.
        axes: as in :func:`buffer_lifting.scan`.
        trust: read a file by torch's loader, which runs code that is in it.
        general: ``axes`` is for all targets of a project: one that is lifted already, and has its own, ignores it.

    Raises:
        TargetError: it is none, or its callable fails.
        LiftingError: a file that cannot be read, or axes that do not fit.
    """
    path = Path(target)
    if is_callable(target) or (trust and path.suffix in FILES and not path.is_dir()):
        program = load_checkable(target, trust)
        if general and is_lifted(program):
            axes = None
        try:
            with redirect_stdout(sys.stderr):
                return check(program, axes=axes)
        except ValueError as error:
            raise TargetError(f"{target}: {error}") from error
    if path.is_dir():
        if not is_stage_directory(path):
            raise TargetError(f"{target}: a directory without a manifest; {_EXPECTED}")
        if axes and not general:
            raise TargetError(f"{target}: saved stages, whose axes are known; --axes is for a program to be lifted")
        from buffer_lifting.inspection.stage_files import check_stages

        return check_stages(path)
    if path.suffix == ".lifted":
        if axes and not general:
            raise TargetError(f"{target}: a lifted program, whose axes are known; --axes is for one that is not lifted")
        from buffer_lifting.inspection.lifted_file import check_lifted

        return check_lifted(path)
    if path.suffix != ".pt2":
        raise TargetError(f"{target}: {_EXPECTED}")
    from buffer_lifting.graph.archive import read_archive

    return check_record(read_archive(path), axes)


def is_lifted(program: object) -> bool:
    """Whether a program has lifted inputs, or stages."""
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    return isinstance(program, LiftedProgram | StagedProgram)


def is_callable(target: str) -> bool:
    """Whether a target is ``package.module:callable``."""
    return ":" in target and not target.endswith(FILES) and not Path(target).exists()


def _is_checkable(path: Path) -> bool:
    return is_stage_directory(path) if path.is_dir() else path.suffix in FILES
