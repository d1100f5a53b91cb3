"""Losses of training runs as files, and their comparison.

A file has one JSON object a line: ``{"run": "single", "step": 0, "loss": 5.545}``; ``run`` may be left out, and
further keys are ignored. ``nan`` and ``inf`` are written as ``NaN`` and ``Infinity``, as Python's json does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buffer_lifting.demo.compare import Row

Losses = dict[int, float]


class LossesError(Exception):
    """A file of losses that cannot be read or compared; the message is one line."""


@dataclass(frozen=True)
class Difference:
    """Two runs, and the step where they are farthest apart: ``|a - b| / |a|``, infinite if one is not finite."""

    name: str
    steps: int
    step: int
    first: float
    second: float
    relative: float


def write_losses(path: Path, rows: Iterable[Row]) -> None:
    """The losses of the demo's two runs, ``single`` and ``pp_cp``."""
    rows = list(rows)
    lines = [{"run": "single", "step": row.step, "loss": row.single} for row in rows]
    lines += [{"run": "pp_cp", "step": row.step, "loss": row.lifted, "order": row.order} for row in rows]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def read_losses(target: str) -> dict[str, Losses]:
    """The losses of a file by run and step; ``FILE:RUN`` is one run of it.

    Raises:
        LossesError: there is no such file or run, or a line is no loss, or a step comes twice.
    """
    name, _, run = target.rpartition(":")
    path, wanted = (Path(target), None) if not name or Path(target).is_file() else (Path(name), run)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LossesError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    runs: dict[str, Losses] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step, loss, of = entry["step"], entry["loss"], entry.get("run", "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LossesError(f'{path}:{number}: not a line like {{"step": 0, "loss": 5.5}}') from error
        numbers = isinstance(loss, int | float) and not isinstance(loss, bool)
        if not numbers or not isinstance(step, int) or isinstance(step, bool) or not isinstance(of, str):
            raise LossesError(f"{path}:{number}: step is an integer, loss a number, run a string")
        if step in runs.setdefault(of, {}):
            raise LossesError(f"{path}:{number}: step {step} of run {of!r} comes twice")
        runs[of][step] = float(loss)
    if wanted is not None:
        if wanted not in runs:
            raise LossesError(f"{path}: no run {wanted!r}; it has {', '.join(sorted(runs)) or 'none'}")
        return {wanted: runs[wanted]}
    if not runs:
        raise LossesError(f"{path}: no losses")
    return runs


def compare(first: Mapping[str, Losses], second: Mapping[str, Losses]) -> list[Difference]:
    """The runs of the same name against each other, or the only runs, whatever their names.

    Raises:
        LossesError: runs or steps that only one side has.
    """
    if len(first) == len(second) == 1:
        ((left, a),), ((right, b),) = first.items(), second.items()
        return [_difference(left if left == right else f"{left or 'A'} and {right or 'B'}", a, b)]
    if set(first) != set(second):
        raise LossesError(
            f"A has the runs {', '.join(sorted(first))}; B has {', '.join(sorted(second))}: name one, as in FILE:RUN"
        )
    return [_difference(name, losses, second[name]) for name, losses in first.items()]


def _difference(name: str, first: Losses, second: Losses) -> Difference:
    if first.keys() != second.keys():
        step = min(first.keys() ^ second.keys())
        raise LossesError(f"{name}: step {step} is only in {'A' if step in first else 'B'}")
    worst = max(sorted(first), key=lambda step: _relative(first[step], second[step]))
    a, b = first[worst], second[worst]
    return Difference(name, len(first), worst, a, b, _relative(a, b))


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    if a == b:
        return 0.0
    return abs(a - b) / abs(a) if a else math.inf
