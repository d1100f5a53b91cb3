"""The command ``diff``: its arguments, and what it prints where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from buffer_lifting.inspection.config import CheckError
from buffer_lifting.inspection.places import printable
from buffer_lifting.program import Axes
from buffer_lifting.terminal import emit, inert, inert_json

ParseAxes = Callable[[list[str] | None], Axes | None]
DIFF_HELP = """\
OLD and NEW are targets as of `check`: a .pt2 file, a .lifted file, a directory that `buffer-lifting split` wrote, or
package.module:callable. A callable runs. Files are read without running anything from them, unless --trust is given:
torch's loader runs code that is in them. Use --trust only for files you trust.

Compared are the axes of the inputs, the reads by position, the ops that mix the sequence, the
lifted inputs (of a program that is not lifted: those that lifting would add) and, if both are split, the inputs of the
stages and the tensors between them. Entries are told apart by the FQN of the source, the module, the op and an ordinal,
so that edits elsewhere in a file, or other names of nodes, are no change.

+ is new, - is gone, ~ is changed. docs/CI.md describes json.

exit codes: 0 no change, 1 changes, 2 could not compare.
"""


def _diff(args: argparse.Namespace) -> int:
    from buffer_lifting.inspection.diff import compare, counts, diff_json, render_diff
    from buffer_lifting.inspection.outline_targets import target_outline

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
    json = args.format == "json"
    text = inert_json(diff_json(diff, args.old, args.new)) if json else inert(render_diff(diff))
    if text:
        emit(text)
    _log(counts(diff.changes))
    return 1 if diff.changes else 0


def _log(text: str) -> None:
    print(inert(f"buffer-lifting: {printable(text)}"), file=sys.stderr, flush=True)


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
