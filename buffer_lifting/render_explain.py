"""How an explanation is shown: aligned lines for a terminal of 100 columns, and plain data."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from buffer_lifting.explanation import Explanation, Step, shape_text
from buffer_lifting.graph.record import Location
from buffer_lifting.patterns import Candidate
from buffer_lifting.program import PositionRead

WIDTH = 100
#: Chains of more steps than this are elided in the middle.
SHOWN = 8
_INDENT = " " * 4
_MARK = 8  # the widest mark
#: Branches of a chain that are shown.
BRANCHES = 2


def explanation_lines(explanation: Explanation, everything: bool = False) -> list[str]:
    """The lines under a finding: the chain, its branches, what feeds it or where it stops.

    Args:
        explanation: of a read, or of an op that mixes the sequence.
        everything: whole chains, not only their ends and the steps that say something.
    """
    hidden = () if everything else explanation.branches[BRANCHES:]
    branches = explanation.branches[: len(explanation.branches) - len(hidden)]
    widths = _widths([step for chain in [explanation.steps, *branches] for step in chain])
    lines = _chain(explanation.steps, widths, everything, explanation.item.location)
    for branch in branches:
        lines.append(f"{_INDENT}beside it")
        lines += _chain(branch[:-1], widths, everything, None)
        lines += _wrapped("joins", branch[-1].node)
    if hidden:
        names = [next((step.node for step in branch if step.mark == "cut"), branch[0].node) for branch in hidden]
        lines += _wrapped("...", f"{len(hidden)} more beside it: {', '.join(names)}")
    for fed in explanation.fed_by:
        item = fed.input
        batch = ["B"] if item.batched else []
        length = "S" if item.axis == "seq" else item.axis
        shape = ", ".join([*batch, f"{length}_all" if item.role == "col" else length, *map(str, item.row_shape)])
        text = f"{item.name} {item.dtype}[{shape}], {item.form}, {item.stream} stream, at {fed.node}"
        lines += _wrapped("fed by", text)
    for place, candidate in enumerate(explanation.nearest):
        lines += _candidate("nearest" if place == 0 else "tried", candidate)
    return lines


def _chain(steps: Sequence[Step], widths: tuple[int, int], everything: bool, where: Location | None) -> list[str]:
    """The steps; a source line stands below the first step that it holds for, ``where`` is the one shown above."""
    lines: list[str] = []
    whole = everything or len(steps) <= SHOWN
    for says, run in groupby(range(len(steps)), lambda index: whole or _says_something(steps, index)):
        part = [steps[index] for index in run]
        if not says and len(part) > 1:
            names = ", ".join(_short(step.op) for step in part)
            lines.append(_cut(f"{_INDENT}{'...':{_MARK}}  {len(part)} more steps: {names}"))
            continue
        for step in part:
            lines += _step(step, widths)
            if step.location is not None and (where is None or _place(step.location) != _place(where)):
                lines.append(_source(step.location))
                where = step.location
    return lines


def _says_something(steps: Sequence[Step], index: int) -> bool:
    """The two ends, and every step at which lifting does something else than before."""
    if index < 2 or index >= len(steps) - 2 or steps[index].mark in ("cut", "gathered", "refused", "operand"):
        return True
    return steps[index].mark != steps[index - 1].mark


def _widths(steps: Sequence[Step]) -> tuple[int, int]:
    """Of the columns for node and op. What is longer than most moves its own line."""
    names = [len(step.node) for step in steps if len(step.node) <= 26]
    ops = [len(_short(step.op)) for step in steps if len(_short(step.op)) <= 14]
    return max(names, default=0), max(ops, default=0)


def _step(step: Step, widths: tuple[int, int]) -> list[str]:
    name, op = _middle(step.node, 50), _middle(_short(step.op), 30)
    line = f"{_INDENT}{step.mark:{_MARK}}  {name:{widths[0]}}  {op:{widths[1]}}"
    detail = f"-> {step.detail}" if step.mark == "cut" else "" if step.mark == "mixes" else step.detail
    if step.fqn and step.op != "input":
        detail = f"{step.fqn!r}" + (f", {detail}" if detail else "")
    lines = [line]
    for text in (shape_text(step), detail):
        if len(lines[-1]) + 2 + len(text) <= WIDTH:
            lines[-1] += f"  {text}"
        else:
            lines += _wrapped("", text)
    return [text.rstrip() for text in lines]


def _candidate(head: str, candidate: Candidate) -> list[str]:
    lines = _wrapped(head, candidate.title)
    lines += _wrapped("", f"needs: {candidate.needs}")
    if candidate.here:
        lines += _wrapped("", f"here: {candidate.here}")
    return lines + _wrapped("", f"fails: {candidate.failed}")


def _wrapped(head: str, text: str) -> list[str]:
    start = f"{_INDENT}{head:{_MARK}}  "
    follow = " " * (len(start) + 2)
    wrapped: list[str] = textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=follow, break_on_hyphens=False
    )
    return wrapped


def _source(where: Location) -> str:
    return _cut(f"{_INDENT}{'':{_MARK}}  {_place(where)}: {_code(where)}")


def _code(where: Location) -> str:
    return where.code.strip()  # a file may name any: only what it recorded is shown


def _place(where: Location) -> str:
    """The file below the current directory or, outside, its last two parts."""
    path = os.path.relpath(where.file)
    if path.startswith(os.pardir) or len(path) > 50:
        path = os.path.join(*where.file.split(os.sep)[-2:])
    return f"{path}:{where.line}"


def _short(op: str) -> str:
    return op.removeprefix("aten.").split(".")[0] if op.startswith("aten.") else op


def _middle(text: str, width: int) -> str:
    """Text with its middle left out, in a width."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """Plain data: see ``JSON_HELP``."""
    item = explanation.item
    return {
        "node": item.node,
        "operand": item.operand if isinstance(item, PositionRead) else None,
        "steps": [_step_json(step) for step in explanation.steps],
        "branches": [[_step_json(step) for step in branch] for branch in explanation.branches],
        "fed_by": [{"name": fed.input.name, "node": fed.node} for fed in explanation.fed_by],
        "stopped": explanation.stopped or None,
        "reason": explanation.reason or None,
        "nearest": [
            {"title": c.title, "needs": c.needs, "failed": c.failed, "here": c.here} for c in explanation.nearest
        ],
    }


def _step_json(step: Step) -> dict[str, Any]:
    where = step.location
    return {
        "node": step.node,
        "op": step.op,
        "fqn": step.fqn,
        "shape": None if step.shape is None else [d if isinstance(d, int) else str(d) for d in step.shape],
        "dtype": step.dtype,
        "roles": list(step.roles),
        "location": where and {"file": where.file, "line": where.line, "code": where.code, "function": where.function},
        "mark": step.mark,
        "detail": step.detail,
    }
