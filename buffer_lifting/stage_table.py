"""The summary of a partition as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from buffer_lifting.flops import FlopCounter
from buffer_lifting.layers import spans
from buffer_lifting.memory import MemoryEstimate

if TYPE_CHECKING:
    from buffer_lifting.stages import StagedProgram

_HEAD = ("stage", "modules", "parameters", "FLOPs", "memory", "sends", "receives", "keyword inputs")
_RIGHT = frozenset({"stage", "rank", "parameters", "FLOPs", "memory", "sends"})


def stage_table(staged: StagedProgram, memory: MemoryEstimate) -> str:
    """A line for each stage, one for each rank that holds several, and one that says what the memory is for."""
    counter = FlopCounter(dict(staged.sizes))
    flops = [counter.nodes(stage.module.graph.nodes) for stage in staged.stages]
    whole = sum(flops) or 1
    several = len(memory.stages) > memory.pp
    head = (_HEAD[0], "rank", *_HEAD[1:]) if several else _HEAD
    rows = [head]
    for stage, own, work in zip(staged.stages, memory.stages, flops, strict=True):
        count = sum(p.numel() for p in stage.module.parameters())
        rows.append(
            (
                str(stage.index),
                *((str(own.rank),) if several else ()),
                shortened(spans(stage.parameters), 40),
                human(count, 1000, ("", "K", "M", "B", "T")),
                f"{100 * work / whole:.1f}%",
                size(own.total),
                size(stage.boundary_bytes) if stage.boundary_bytes else "-",
                shortened(stage.activations, 40),
                shortened(stage.kwargs),
            )
        )
    lines = aligned(rows)
    if several:
        lines += [
            f"rank {rank.rank}: stages {', '.join(map(str, rank.stages))}, "
            f"{100 * sum(flops[stage] for stage in rank.stages) / whole:.1f}% of the FLOPs, memory {size(rank.total)}"
            for rank in memory.ranks
        ]
    lines.append(
        f"memory: {memory.schedule.removeprefix('Schedule')} on {memory.pp} ranks, {memory.n_microbatches} "
        f"microbatches of the example's size, optimizer {memory.optimizer:g} bytes a parameter"
    )
    if counter.unknown:
        lines.append(f"FLOPs of {len(counter.unknown)} ops are not known and count 0: {shortened(counter.unknown)}")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of one width each; numbers on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [name in _RIGHT for name in rows[0]]
    return [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def human(count: float, base: int, units: Sequence[str]) -> str:
    """A number with three digits and a unit."""
    for unit in units:
        if count < base or unit == units[-1]:
            return f"{count:.0f}{unit}" if count >= 100 or not unit or count == int(count) else f"{count:.3g}{unit}"
        count /= base
    raise AssertionError(units)


def size(count: float) -> str:
    """Bytes: ``"1.5 MiB"``."""
    return human(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def shortened(names: Sequence[str], width: int = 60) -> str:
    """Names for a table: as many as fit, and how many more there are."""
    text = ", ".join(names)
    if len(text) <= width:
        return text or "-"
    kept = text[:width].rsplit(", ", 1)[0]
    more = len(names) - kept.count(", ") - 1
    return f"{kept}, +{more} more" if more else kept
