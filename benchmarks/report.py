"""The results as a record, as JSON, as text and as the block in README.md. Nothing is measured here."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import buffer_lifting
from benchmarks.measure import OURS, Measurement, growth

SCHEMA = 1
MAX_RATIO = 0.5
MAX_GROWTH = 1.1
GROWTH_FROM = 16  # layers; below, constant costs show
BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"

Row = dict[str, str]


class ReadmeError(Exception):
    """The README has no place for the results."""


def record(static: Sequence[Measurement], dynamic: Sequence[Measurement], stages: int, command: str) -> dict[str, Any]:
    """Everything that was measured, as the JSON has it."""
    exponents = {
        kind: {name: growth(results, GROWTH_FROM, name) for name in (*OURS, "total", "total_without_gc")}
        for kind, results in (("static", static), ("dynamic", dynamic))
    }
    return {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(),
        "clock": "CPU seconds of the process, median",
        "stages": stages,
        "static": [_entry(result) for result in static],
        "dynamic": [_entry(result) for result in dynamic],
        "growth": exponents,
        "bars": bars(static, exponents),
    }


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "buffer_lifting": buffer_lifting.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _entry(result: Measurement) -> dict[str, Any]:
    return {
        "layers": result.layers,
        "nodes": result.nodes,
        "seconds": result.seconds(),
        "ratios": result.ratios(),
        "samples": result.samples,
        "collecting": result.collecting,
        "pipeline_failure": result.pipeline_failure,
    }


def bars(static: Sequence[Measurement], exponents: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    """What the results have to reach. ``passed`` is ``None`` where there is nothing to compare."""
    found = []
    for result in static:
        name = f"ours ÷ pipeline() outside export, {result.layers} layers"
        found.append(_bar(name, result.ratios().get("pipeline_outside_export"), MAX_RATIO))
    for kind, values in exponents.items():
        found.append(_bar(f"growth exponent of ours over nodes, {kind} shapes", values["total"], MAX_GROWTH))
    return found


def _bar(name: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": None if value is None else value <= limit}


def missed(results: dict[str, Any]) -> list[str]:
    """The names of the bars that were not reached."""
    return [bar["name"] for bar in results["bars"] if bar["passed"] is False]


# -- tables ----------------------------------------------------------------------------------------------

# Title -> where the number is in an entry of the record. The ratios come first.
_COLUMNS = {
    "ours ÷ pipeline() outside export": ("ratios", "pipeline_outside_export"),
    "ours ÷ export": ("ratios", "export"),
    "scan, s": ("seconds", "scan"),
    "lift, s": ("seconds", "lift"),
    "partition, s": ("seconds", "partition"),
    "ours, s": ("seconds", "total"),
    "export, s": ("seconds", "export"),
    "pipeline(), s": ("seconds", "pipeline"),
    "outside export, s": ("seconds", "pipeline_outside_export"),
}


def rows(results: dict[str, Any], kind: str) -> list[Row]:
    """The table of ``"static"`` or ``"dynamic"`` results, as text by title."""
    table = []
    for entry in results[kind]:
        row = {"layers": str(entry["layers"]), "nodes": str(entry["nodes"])}
        for title, (group, key) in _COLUMNS.items():
            if kind == "dynamic" and key.startswith("pipeline"):
                continue
            value = entry[group].get(key)
            row[title] = "" if value is None else f"{value:.2f}" if group == "ratios" else f"{value:.3g}"
            if (group, key) == ("seconds", "pipeline") and entry["pipeline_failure"] is not None:
                row[title] = f"fails: {entry['pipeline_failure']}"
        table.append(row)
    return table


def plain(table: list[Row]) -> str:
    """The table for a terminal."""
    titles = list(table[0])
    widths = {title: max(len(title), *(len(row[title]) for row in table)) for title in titles}
    lines = ["  ".join(title.rjust(widths[title]) for title in titles)]
    lines += ["  ".join(row[title].rjust(widths[title]) for title in titles) for row in table]
    return "\n".join(lines)


def markdown(table: list[Row], strong: Sequence[str] = (next(iter(_COLUMNS)),)) -> str:
    """The table for README.md. The ratios that have a bar are bold."""
    titles = list(table[0])
    lines = [f"| {' | '.join(titles)} |", f"|{'|'.join(' ---: ' for _ in titles)}|"]
    for row in table:
        cells = [f"**{row[t]}**" if t in strong and row[t] else row[t].replace("|", "\\|") for t in titles]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _conditions(results: dict[str, Any]) -> str:
    found = results["environment"]
    return (
        f"torch {found['torch']}, Python {found['python']}, {found['cores']} cores (one used); "
        f"{results['stages']} stages; CPU seconds, medians"
    )


def _verdict(bar: dict[str, Any]) -> str:
    if bar["passed"] is None:
        return f"not checked: {bar['name']}"
    return f"{'pass' if bar['passed'] else 'FAIL'}: {bar['name']}: {bar['value']:.2f}, at most {bar['limit']}"


def _exponents(results: dict[str, Any], kind: str) -> str:
    values = results["growth"][kind]
    known = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items() if value is not None]
    return f"growth exponents over nodes, {kind} shapes: " + (", ".join(known) or "needs more sizes")


def text(results: dict[str, Any]) -> str:
    """The whole report for a terminal."""
    parts = [
        f"{_conditions(results)}\nours = scan + lift + partition",
        f"static shapes\n{plain(rows(results, 'static'))}",
        f"dynamic shapes (pipeline() takes none)\n{plain(rows(results, 'dynamic'))}",
        "\n".join(_exponents(results, kind) for kind in results["growth"]),
        "\n".join(_verdict(bar) for bar in results["bars"]),
    ]
    return "\n\n".join(parts)


# -- README ----------------------------------------------------------------------------------------------


def readme_block(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    parts = [
        f"`{results['command']}` wrote this block ({_conditions(results)}). "
        "*Ours* is scan + lift + partition. The ratios are what to compare; the times are of one machine.",
        f"Static shapes:\n\n{markdown(rows(results, 'static'))}",
        "Dynamic batch and sequence, which `pipeline()` does not take:\n\n" + markdown(rows(results, "dynamic")),
        "\n".join(f"- {_verdict(bar)}" for bar in results["bars"]),
    ]
    return "\n\n".join(parts)


def markers(topic: str = "") -> tuple[str, str]:
    """The lines around the results of a benchmark; the topic of this one is the empty string."""
    suffix = f"-{topic}" if topic else ""
    return BEGIN.replace(":", f"{suffix}:"), END.replace(":", f"{suffix}:")


def find_block(readme: str, name: str, topic: str = "") -> tuple[int, int]:
    """Where the text between the markers starts and ends.

    Raises:
        ReadmeError: not exactly one pair of markers, in order.
    """
    first, last = markers(topic)
    begin, end = readme.find(first), readme.find(last)
    if readme.count(first) != 1 or readme.count(last) != 1 or end < begin:
        raise ReadmeError(f"{name} needs one line {first} and, below it, one line {last}: the results go between")
    return begin + len(first), end


def read_readme(path: Path, topic: str = "") -> str:
    """The README, checked for markers.

    Raises:
        ReadmeError: there is no such file, or no place in it.
    """
    if not path.is_file():
        raise ReadmeError(f"there is no {path.name} to write the results to")
    readme = path.read_text(encoding="utf-8")
    find_block(readme, path.name, topic)
    return readme


def write_block(path: Path, topic: str, block: str) -> None:
    """Replaces what is between the markers.

    Raises:
        ReadmeError: as :func:`read_readme`.
    """
    readme = read_readme(path, topic)
    begin, end = find_block(readme, path.name, topic)
    path.write_text(f"{readme[:begin]}\n{block}\n{readme[end:]}", encoding="utf-8")


def write_readme(path: Path, results: dict[str, Any]) -> None:
    """The block of these results; raises as :func:`write_block`."""
    write_block(path, "", readme_block(results))
