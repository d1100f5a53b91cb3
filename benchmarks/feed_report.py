"""The cost of ``feed`` as a record, as text and as the block in README.md. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.feed_cost import CALLS, Cell
from benchmarks.report import Row, environment, markdown, plain

SCHEMA = 1
TOPIC = "feed"
AT = 8  # the context-parallel size of the bars
FLOOR_MOST = 2.0
FIXED_COSTS = (
    "Where the copy is short, `time ÷ copy` shows what a call costs whatever its size: some 20 us of Python and of "
    "torch's dispatch, and for an order per sample the check that each of its rows is a permutation, some 2 ns an "
    "entry. Those cells miss the bar."
)
PER_SAMPLE_LEAST, PER_SAMPLE_MEMORY = 15.0, 15.0
SHARED_LEAST = {8: 150.0, 1: 20.0}  # by batch

#: name -> bytes a token of the lifted inputs of role ``row`` and ``col``, by form
Forms = Mapping[str, Mapping[str, tuple[int, int]]]


def record(cells: Sequence[Cell], forms: Forms, command: str) -> dict[str, Any]:
    """Everything that was measured, as the JSON has it."""
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(),
        "clock": f"CPU seconds of the process, the fastest of {CALLS} calls in a row",
        "cells": [
            {
                "order": cell.kind,
                "seq": cell.seq,
                "batch": cell.batch,
                "cp": cell.size,
                "times_faster": cell.times_faster(),
                "times_less_memory": cell.times_less_memory(),
                "times_copy": cell.times_floor(),
                "seconds": cell.seconds,
                "peak_bytes": cell.peak,
            }
            for cell in cells
        ],
        "forms": {name: {form: list(own) for form, own in by_form.items()} for name, by_form in forms.items()},
        "bars": bars(cells),
    }


def bars(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What the results have to reach at the size of the bars: the worst cell of each."""
    at = [cell for cell in cells if cell.size == AT]
    each = [cell for cell in at if cell.kind == "per sample"]
    shared = [cell for cell in at if cell.kind == "shared"]
    found = [
        _least("order per sample: times faster", [c.times_faster() for c in each], PER_SAMPLE_LEAST),
        _least("order per sample: times less memory", [c.times_less_memory() for c in each], PER_SAMPLE_MEMORY),
    ]
    for batch, least in SHARED_LEAST.items():
        values = [c.times_faster() for c in shared if c.batch == batch]
        found.append(_least(f"shared order, B {batch}: times faster", values, least))
    for kind, own in (("shared", shared), ("per sample", each)):
        value = max([c.times_floor() for c in own], default=None)
        name = f"{kind} order, all cells: time ÷ copy"
        found.append(
            {"name": name, "value": value, "most": FLOOR_MOST, "passed": None if value is None else value <= FLOOR_MOST}
        )
    return found


def _least(name: str, values: list[float], least: float) -> dict[str, Any]:
    value = min(values, default=None)
    return {"name": name, "value": value, "least": least, "passed": None if value is None else value >= least}


def missed(results: dict[str, Any]) -> list[str]:
    """The names of the bars that were not reached."""
    return [bar["name"] for bar in results["bars"] if bar["passed"] is False]


def _verdict(bar: dict[str, Any]) -> str:
    if bar["passed"] is None:
        return f"not checked: {bar['name']}"
    limit = f"at least {bar['least']:g}" if "least" in bar else f"at most {bar['most']:g}"
    return f"{'pass' if bar['passed'] else 'FAIL'}: {bar['name']}, worst cell: {bar['value']:.2f}, {limit}"


def rows(results: dict[str, Any], size: int | None = None, kinds: Sequence[str] = ()) -> list[Row]:
    """The table of the cells, as text by title; those of one context-parallel size and of some kinds only."""
    table = []
    for cell in results["cells"]:
        if (size is not None and cell["cp"] != size) or (kinds and cell["order"] not in kinds):
            continue
        row = {"order": cell["order"], "S": str(cell["seq"]), "B": str(cell["batch"])}
        if size is None:
            row["cp"] = str(cell["cp"])
        row |= {
            "times faster": f"{cell['times_faster']:.0f}",
            "times less memory": f"{cell['times_less_memory']:.1f}",
            "time ÷ copy": f"{cell['times_copy']:.2f}",
            "feed, ms": f"{1000 * sorted(cell['seconds']['ours'])[len(cell['seconds']['ours']) // 2]:.3g}",
            "MiB to write": f"{cell['peak_bytes']['floor'] / 2**20:.3g}",
        }
        table.append(row)
    return table


def form_rows(results: dict[str, Any]) -> list[Row]:
    """Bytes a token by model and form: of this rank's tokens, and of the whole sequence's (keys)."""
    table = []
    for name, by_form in results["forms"].items():
        row = {"model": name}
        for form, (own, keys) in by_form.items():
            row[f"`{form}`"] = f"{own} + {keys} a key" if keys else str(own)
        table.append(row)
    return table


def _conditions(results: dict[str, Any]) -> str:
    found = results["environment"]
    return (
        f"torch {found['torch']}, Python {found['python']}, one core; complex64 table of 64 numbers a row; medians "
        f"over rounds of {results['clock']}; the table of a length is prepared at its first feed, which is not timed"
    )


def text(results: dict[str, Any]) -> str:
    """The whole report for a terminal."""
    parts = [_conditions(results), plain(rows(results)), plain(form_rows(results))]
    return "\n\n".join([*parts, "\n".join(_verdict(bar) for bar in results["bars"])])


def readme_block(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    strong = ("times faster", "times less memory", "time ÷ copy")
    parts = [
        f"`{results['command']}` wrote this block ({_conditions(results)}).",
        "`feed` on one rank of 8 next to PR #1797's `repeat(B, 1, 1)` and torch's `_context_parallel_shard`, and "
        "next to a copy of as many bytes as have to be written. *Shared*: one head-tail order in each step, whose rows "
        "are kept; memory is that of a step with another order. *Per sample*: other documents in each sample and step, "
        "head-tail inside each:",
        markdown(rows(results, AT, ("shared", "per sample")), strong),
        "\n".join(f"- {_verdict(bar)}" for bar in results["bars"]),
        FIXED_COSTS,
        "Bytes of lifted inputs a token, by form (and those of role `col`, for all keys). A parameter or a mask is "
        "read by its index in both:",
        markdown(form_rows(results), ()),
    ]
    return "\n\n".join(parts)
