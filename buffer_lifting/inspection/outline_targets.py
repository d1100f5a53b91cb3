"""The outlines of the targets that ``check`` takes."""

from __future__ import annotations

from pathlib import Path

from buffer_lifting.graph.inconsistent import untrusted
from buffer_lifting.inspection.outline import Outline, outline, outline_partition, outline_record, outline_saved
from buffer_lifting.inspection.stage_directory import is_stage_directory
from buffer_lifting.inspection.targets import is_lifted, needs_torch
from buffer_lifting.program import Axes
from buffer_lifting.targets import TargetError, load_checkable
from buffer_lifting.terminal import stdout_to_stderr


def target_outline(target: str, axes: Axes | None = None, trust: bool = False) -> Outline:
    """The outline of a target of ``check``; ``axes`` is for a program that is not lifted, and ignored else.

    Raises:
        TargetError: it is none, or its callable fails.
        LiftingError: a file that cannot be read, or axes that do not fit.
    """
    path = Path(target)
    if needs_torch(target, trust):
        program = load_checkable(target, trust)
        with stdout_to_stderr():
            return outline(program, None if is_lifted(program) else axes)
    with untrusted(target, TargetError):
        return _file_outline(target, path, axes)


def _file_outline(target: str, path: Path, axes: Axes | None) -> Outline:
    if path.is_dir():
        if not is_stage_directory(path):
            raise TargetError(f"{target}: a directory without a manifest, which `buffer-lifting split` writes")
        from buffer_lifting.inspection.stage_files import read_stages

        return outline_partition(read_stages(path))
    if path.suffix == ".lifted":
        from buffer_lifting.inspection.lifted_file import read_lifted

        saved = read_lifted(path)
        return outline_saved(saved.report, saved.inputs, saved.input_axes, saved.axes)
    if path.suffix != ".pt2":
        raise TargetError(f"{target}: a target is a .pt2 or .lifted file, a directory of stages or module:callable")
    from buffer_lifting.graph.archive import read_archive

    return outline_record(read_archive(path), axes)
