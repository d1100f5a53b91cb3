"""Which parity cells there are, what each has to give, and how a result is judged; nothing is run here.

``test_parity.py`` asserts it, ``tools/parity.py`` makes the tables of the README from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cp_worker import DTYPES, LAYOUTS, ORDERS, SCHEDULES, WORLD, Cell
from parity_models import MODELS, reference

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
TABLE = Path(__file__).parent / "parity_expected.txt"

#: Pipeline parallelism alone, in natural order: what is not lifted is right.
ALONE = (Cell("llama_pr1797", pp=4, cp=1, order="contiguous"), Cell("hf_gpt2", pp=4, cp=1, order="contiguous"))
EVERY = (
    *ALONE,
    *(
        Cell(model, schedule, pp, cp, order, dtype)
        for model in MODELS
        for dtype in DTYPES
        for pp, cp in LAYOUTS
        for schedule in SCHEDULES
        for order in ORDERS
    ),
)
#: Heads exchanged for rows in place of gathered keys; not in the tables of the README.
EXCHANGED = (
    Cell("llama_pr1797", "Schedule1F1B", 1, 4, "random", "float32", "alltoall"),
    Cell("hf_gpt2", "ScheduleInterleaved1F1B", 1, 4, "per-document", "float32", "alltoall"),
    Cell("hf_llama", "ScheduleZBVZeroBubble", 2, 2, "head-tail", "float64", "alltoall"),
    Cell("hf_gemma3", "Schedule1F1B", 2, 2, "random", "float32", "alltoall"),
    Cell("hf_mixtral", "ScheduleInterleaved1F1B", 2, 2, "contiguous", "float32", "alltoall"),
    Cell("hf_llama_packed", "Schedule1F1B", 2, 2, "per-document", "float64", "alltoall"),
)
#: torch's ring; masks are flags there.
RING = (
    Cell("llama_pr1797", "ScheduleZBVZeroBubble", 2, 2, "head-tail", "float64", "ring"),
    Cell("hf_llama", "ScheduleInterleaved1F1B", 2, 2, "contiguous", "float32", "ring"),
    Cell("hf_gpt2", "Schedule1F1B", 1, 4, "head-tail", "float32", "ring"),
)


def covering() -> tuple[Cell, ...]:
    """A part of :data:`EVERY`: each pair of a model, an order, a layout, a schedule and a dtype occurs in some cell."""
    return (
        *ALONE,
        *(
            Cell(model, SCHEDULES[(i + j) % 3], *LAYOUTS[(i + j // 2) % 2], order, DTYPES[(i + j) % 2])
            for i, model in enumerate(MODELS)
            for j, order in enumerate(ORDERS)
        ),
    )


@dataclass(frozen=True)
class Judgement:
    """What a cell gave.

    Attributes:
        loss_error: of the lifted step, relative; ``error``: its worst gradient error, at ``parameter``.
        disabled: the worst gradient error with the lift disabled; ``loss_disabled``: its loss error.
        parts: the worst difference of a rank's own part of the loss between the two, by context-parallel rank.
    """

    loss_error: float
    error: float
    parameter: str
    loss_disabled: float
    disabled: float
    parts: tuple[float, ...]


@cache
def least(cell: Cell) -> float | None:
    """The least error that the table wants with the lift disabled; ``None`` where the cell must be right."""
    for line in TABLE.read_text().splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        cp, order, kind, value = words
        wanted = (str(cell.cp), cell.order, MODELS[cell.model].kind)
        if all(own in ("*", want) for own, want in zip((cp, order, kind), wanted, strict=True)):
            return None if value == "right" else float(value)
    raise AssertionError(f"{TABLE.name} has no line for {cell.name}")


def judge(cell: Cell, ranks: Sequence[dict[str, Any]]) -> Judgement:
    """The worst of all ranks; every parameter has to be on some rank."""
    assert len(ranks) == WORLD
    expected = reference(cell.model, cell.dtype)
    found = {}
    for way in ("lifted", "disabled"):
        errors: dict[str, float] = {}
        for rank in ranks:
            for name, error in rank[way]["errors"].items():
                errors[name] = _worse(error, errors.get(name, 0.0))
        assert set(errors) == set(expected.gradients), "a parameter has no gradient on any rank"
        name = max(errors, key=lambda key: _worse(errors[key], 0.0))
        losses = [rank[way]["loss"] for rank in ranks if rank[way]["loss"] is not None]
        assert len(losses) == cell.cp and len(set(losses)) == 1, losses
        found[way] = (abs(losses[0] - expected.loss) / abs(expected.loss), errors[name], name)
    parts = [0.0] * cell.cp
    for rank, result in enumerate(ranks):
        one, other = result["lifted"]["part"], result["disabled"]["part"]
        if one is not None:
            parts[rank % cell.cp] = abs(one - other) / max(abs(one), 1e-12)
    (loss, error, name), (loss_disabled, disabled, _) = found["lifted"], found["disabled"]
    return Judgement(loss, error, name, loss_disabled, disabled, tuple(parts))


def _worse(one: float, other: float) -> float:
    """The larger one; not a number is worse than anything."""
    return math.inf if math.isnan(one) or math.isnan(other) else max(one, other)


def wrong(cell: Cell, judgement: Judgement) -> list[str]:
    """How a cell departs from what it has to give; empty when it does not."""
    lines, tolerance = [], TOLERANCE[cell.dtype]
    if not judgement.loss_error <= tolerance:
        lines.append(f"lifted, the loss is off by {judgement.loss_error:.1e}, more than {tolerance:.0e}")
    if not judgement.error <= tolerance:
        lines.append(f"lifted, the gradient of {judgement.parameter} is off by {judgement.error:.1e}")
    bound = least(cell)
    if bound is None:
        if not judgement.disabled <= tolerance:
            lines.append(f"not lifted, a gradient is off by {judgement.disabled:.1e}; the table says that it is right")
    elif not bound <= judgement.disabled < math.inf:
        lines.append(
            f"not lifted, the worst gradient is off by {judgement.disabled:.1e}; the table says {bound} or more"
        )
    if cell.order == "contiguous" and not MODELS[cell.model].shifted:
        if not judgement.parts[0] <= tolerance:
            lines.append(f"not lifted, the loss of rank 0 is off by {judgement.parts[0]:.1e}; contiguous, it is right")
        if not all(part > tolerance for part in judgement.parts[1:]):
            lines.append(f"not lifted, the loss of a rank behind the first is right: {judgement.parts}")
    return lines
