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
class Row:
    """One step.

    Attributes:
        step: its number.
        single, pipeline, control: the losses of one process, of the pipeline, and of the pipeline with the
            permuted tokens but the feed of the natural order.
        error, parameter: the pipeline's worst gradient error, and where.
        control_error: the control's.
    """

    step: int
    single: float
    pipeline: float
    control: float
    error: float
    parameter: str
    control_error: float


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


def judge(rows: Sequence[Row], steps: int) -> list[str]:
    """What is wrong, one line each; nothing is a pass."""
    wrong = [] if len(rows) == steps else [f"{len(rows)} of {steps} steps ran"]
    for row in rows:
        loss_error = abs(row.single - row.pipeline) / max(abs(row.single), 1e-12)
        if not loss_error <= TOLERANCE:  # NaN is wrong too
            wrong.append(f"step {row.step}: the losses differ by {loss_error:.1e}, more than {TOLERANCE:.0e}")
        if not row.error <= TOLERANCE:
            wrong.append(
                f"step {row.step}: the gradient of {row.parameter} is off by {row.error:.1e}, more than {TOLERANCE:.0e}"
            )
        if not row.control_error >= CONTROL:
            wrong.append(
                f"step {row.step}: without the permuted feed, gradients are off by "
                f"{row.control_error:.1e} only, so this proves nothing"
            )
    return wrong
