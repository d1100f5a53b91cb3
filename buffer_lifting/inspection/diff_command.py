"""The command ``diff``: its arguments, and the outlines of its two targets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from buffer_lifting.inspection.config import CheckError
from buffer_lifting.inspection.diff import compare, counts, diff_json, render_diff
from buffer_lifting.inspection.outline import Outline, outline, outline_partition, outline_record, outline_saved
from buffer_lifting.inspection.places import printable
from buffer_lifting.inspection.stage_files import is_stage_directory, read_stages
from buffer_lifting.inspection.targets import FILES, is_callable
from buffer_lifting.program import Axes
from buffer_lifting.targets import TargetError, load_checkable

ParseAxes = Callable[[list[str] | None], Axes | None]
DIFF_HELP = """\
OLD and NEW are targets as of `check`: a .pt2 file, a .lifted file, a directory that `buffer-lifting split` wrote, or
package.module:callable. Compared are the axes of the inputs, the reads by position, the ops that mix the sequence, the
lifted inputs (of a program that is not lifted: those that lifting would add) and, if both are split, the inputs of the
stages and the tensors between them. Entries are told apart by the FQN of the source, the module, the op and an ordinal,
so that edits elsewhere in a file, or other names of nodes, are no change.

+ is new, - is gone, ~ is changed. docs/CHECK.md describes json.

exit codes: 0 no change, 1 changes, 2 could not compare.
"""


def target_outline(target: str, axes: Axes | None = None, trust: bool = False) -> Outline:
    """The outline of a target of ``check``; ``axes`` is for a program that is not lifted, and ignored else.

    Raises:
        TargetError: it is none, or its callable fails.
        LiftingError: a file that cannot be read, or axes that do not fit.
    """
    path = Path(target)
    if is_callable(target) or (trust and path.suffix in FILES and not path.is_dir()):
        program = load_checkable(target, trust)
        from buffer_lifting.lifted import LiftedProgram
        from buffer_lifting.stages import StagedProgram

        with redirect_stdout(sys.stderr):
            return outline(program, None if isinstance(program, LiftedProgram | StagedProgram) else axes)
    if path.is_dir():
        if not is_stage_directory(path):
            raise TargetError(f"{target}: a directory without a manifest, which `buffer-lifting split` writes")
        return outline_partition(read_stages(path))
    if path.suffix == ".lifted":
        from buffer_lifting.inspection.lifted_file import read_lifted

        saved = read_lifted(path)
        return outline_saved(saved.report, saved.inputs, saved.input_axes, saved.axes)
    if path.suffix != ".pt2":
        raise TargetError(f"{target}: a target is a .pt2 or .lifted file, a directory of stages or module:callable")
    from buffer_lifting.graph.archive import read_archive

    return outline_record(read_archive(path), axes)


def _diff(args: argparse.Namespace) -> int:
    axes = args.parse_axes(args.axes)
    sides = []
    for target in (args.old, args.new):
        try:
            sides.append(target_outline(target, axes, args.trust))
        except (ValueError, RecursionError) as error:
            raise CheckError(f"{target}: {' '.join(str(error).split())}") from error
    diff = compare(*sides)
    for note in diff.notes:
        _log(note)
    text = diff_json(diff, args.old, args.new) if args.format == "json" else render_diff(diff)
    if text:
        print(text)
    _log(counts(diff.changes))
    return 1 if diff.changes else 0


def _log(text: str) -> None:
    print(f"buffer-lifting: {printable(text)}", file=sys.stderr, flush=True)


def add_diff(commands: Any, parents: list[argparse.ArgumentParser], parse_axes: ParseAxes) -> None:
    """Adds ``diff`` to the subparsers."""
    sub = commands.add_parser(
        "diff",
        help="compare two programs: reads, lifted inputs, stage boundaries",
        description="Compare what two programs read by position, their lifted inputs and their stage boundaries.",
        epilog=DIFF_HELP,
        parents=parents,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("old", metavar="OLD", help="the program to compare with")
    sub.add_argument("new", metavar="NEW", help="the program")
    sub.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    sub.set_defaults(run=_diff, parse_axes=parse_axes)
