"""The demo's judgement: how far a pipeline is from the single process, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 1e-5
#: The control has to be off by this much at every step, or the demo would show nothing.
CONTROL = 1e-2


@dataclass(frozen=True)
class Measured:
    """What only some steps give.

    Attributes:
        error, parameter: the worst gradient error, and where.
        control, control_error: loss and worst gradient error with the same tokens, but nothing lifted.
    """

    error: float
    parameter: str
    control: float
    control_error: float


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        step, order: its number, and how its tokens were laid out.
        single, lifted: the losses of one process, and of the pipeline on context-parallel ranks.
    """

    step: int
    order: str
    single: float
    lifted: float
    measured: Measured | None = None


def worst_error(expected: Mapping[str, Tensor], got: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """The worst ``max|diff| / max(max|g|, 1e-4 * largest gradient)`` over all parameters, and the parameter.

    Some true gradients are zero but for rounding and have no relative error, hence the second term. A
    parameter that is missing, of another shape or not finite is infinitely wrong, and so is one too many.
    """
    largest = max((float(value.abs().max()) for value in expected.values()), default=0.0)
    worst, where = 0.0, ""
    for name in sorted({*expected, *got}):
        a, b = expected.get(name), got.get(name)
        if a is None or b is None or a.shape != b.shape:
            return math.inf, name
        scale = max(float(a.abs().max()), 1e-4 * largest)
        difference = float((a - b).abs().max())
        error = difference / scale if scale else difference
        if not math.isfinite(error):
            return math.inf, name
        if error > worst or not where:
            worst, where = error, name
    return worst, where


def judge(rows: Sequence[Row], steps: int, tolerance: float = TOLERANCE) -> list[str]:
    """What is wrong, one line each; nothing is a pass."""
    wrong = [] if len(rows) == steps else [f"{len(rows)} of {steps} steps ran"]
    if not any(row.measured for row in rows):
        wrong.append("no gradient was compared")
    for row in rows:
        loss_error = abs(row.single - row.lifted) / max(abs(row.single), 1e-12)
        if not loss_error <= tolerance:  # NaN is wrong too
            wrong.append(f"step {row.step}: the losses differ by {loss_error:.1e}, more than {tolerance:.0e}")
        measured = row.measured
        if measured is None:
            continue
        if not measured.error <= tolerance:
            wrong.append(
                f"step {row.step}: the gradient of {measured.parameter}\n    is off by {measured.error:.1e}, more "
                f"than {tolerance:.0e}"
            )
        if not measured.control_error >= CONTROL:
            wrong.append(
                f"step {row.step}: with nothing lifted, gradients are off by {measured.control_error:.1e} only:\n"
                "    this proves nothing"
            )
    return wrong
