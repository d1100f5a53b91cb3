"""Writes docs/MODELS.md from a run of the catalog of models in tests/zoo: every export of every model.

``python tools/model_docs.py`` runs all cells in two processes, each with one thread, and writes the file; ``--check``
fails if it is not what a run gives; ``--only NAME...`` prints the rows of some models. Exit code 1 if a cell departs
from its table (``tests/zoo/expected_*.txt``), which the file then says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from zoo.catalog import Entry
    from zoo.running import Cell, Record

TARGET = ROOT / "docs" / "MODELS.md"
#: Starts the one line that is not compared: times differ from run to run.
RUN = "Run time: "
KINDS = {
    "BL001": "buffer",
    "BL002": "parameter",
    "BL003": "computed",
    "BL004": "is_causal",
    "BL005": "inputs",
    "BL006": "natural",
}
HEAD = "| model | exports | reads | lifted inputs | verified | findings |\n|---|---|---|---|---|---|"
INTRODUCTION = """\
# Models

`python tools/model_docs.py` wrote this file from a run. The models are tiny and random, of the libraries' own classes
with nothing edited; how each is built and exported stands in `tests/zoo/`, and what each export must give in
`tests/zoo/expected_*.txt`, derived from the models' sources before the code ran; what was corrected later
says so there.

**Verified** means: values read by position bitwise the original's, gathered by the order; outputs and all gradients
the original's in natural order; order equivariance in float64, each lifted input with a control; and the same outputs
and gradients from two pipeline stages. The number is that of the parameters whose gradients were compared.

**Reads** are operands of ops on data, by the source of the positions: a `buffer` (or constant), a `parameter`,
`computed` in the graph (an arange, a length), `is_causal` attention, user `inputs` whose order matters, or kept in
`natural` order and gathered. An export without any follows the positions that the user passes, or has none.
**Findings** are refusals (in bold: nothing is lifted then) and what mixes the sequence and is handled.
"""


def render(records: Mapping[Cell, Record]) -> str:
    """The text of the file."""
    from zoo.catalog import PATTERNS, entries

    shown = [entry for entry in entries().values() if any(cell[0] == entry.name for cell in records)]
    parts = [INTRODUCTION, summary(records)]
    for library in dict.fromkeys(entry.library for entry in shown):
        rows = [row for entry in shown if entry.library == library for row in rows_of(entry, records)]
        parts.append("\n".join([f"## {_versioned(library)}", "", HEAD, *rows]))
    classes = ["## Pattern classes", "", "| class | what it is | models |", "|---|---|---|"]
    for name, pattern in PATTERNS.items():
        names = [entry.name for entry in shown if name in entry.patterns]
        classes.append(f"| {name} | {pattern.meaning} | {len(names)}: {', '.join(names)} |")
    return "\n\n".join(part.strip("\n") for part in [*parts, "\n".join(classes)]) + "\n"


def summary(records: Mapping[Cell, Record]) -> str:
    """Totals; the run time has a line of its own."""
    from zoo.catalog import entries

    libraries = {entries()[cell[0]].library for cell in records}
    lifted = [record for record in records.values() if not record.refusals and not record.error]
    refused = [record for record in records.values() if record.refusals and not record.error]
    wrong = departures(records)
    reads = sum(sum(record.reads.values()) for record in lifted)
    lines = [
        f"{len({cell[0] for cell in records})} models of {len(libraries)} libraries, {len(records)} exports with "
        f"torch {version('torch').split('+')[0]}: {reads} reads lifted and verified in {len(lifted)} exports, "
        f"{len(refused)} exports refused with a finding, "
        f"{len(wrong)} {'departs' if len(wrong) == 1 else 'depart'} from the table.",
        "",
        f"{RUN}{sum(record.seconds for record in records.values()) / 60:.0f} CPU minutes.",
    ]
    return "\n".join(lines)


def comparable(text: str) -> str:
    """The text without its run time."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(RUN))


def rows_of(entry: Entry, records: Mapping[Cell, Record]) -> list[str]:
    """The rows of a model: one for all exports that gave the same."""
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for export in entry.exports:
        for shape in export.shapes:
            record = records.get((entry.name, export.name, shape))
            if record is not None:
                groups.setdefault(_columns(record), {}).setdefault(export.name, []).append(shape)
    rows: list[str] = []
    for columns, exports in groups.items():
        name = "" if rows else entry.name
        rows.append(f"| {name} | {_exports(exports)} | {' | '.join(columns)} |")
    return rows


def _columns(record: Record) -> tuple[str, ...]:
    """Reads, lifted inputs, verified, findings."""
    if record.error:
        return "", "", "**no**", f"**{_cell(record.error.splitlines()[0])}**"
    notes = [f"**{_cell(line)}**" for line in record.findings]
    notes += [f"{_cell(reason)}: {count}" for reason, count in record.handled.items()]
    notes += [f"the control of {name} moves nothing" for name in record.silent]
    notes += ["frozen for the export: flex_attention on CPU has no backward"] if record.frozen else []
    reads = _joined(f"{KINDS.get(code, code)} {count}" for code, count in record.reads.items())
    if record.refusals:
        return "", "", "refused", "; ".join(notes)
    inputs = _joined(f"{form} {count}" for form, count in record.inputs.items())
    return reads or "none", inputs or "none", f"yes, {record.gradients} gradients", "; ".join(notes)


def _exports(exports: Mapping[str, list[str]]) -> str:
    by_shapes: dict[str, list[str]] = {}
    for name, shapes in exports.items():
        by_shapes.setdefault(", ".join(shapes), []).append(name)
    return "; ".join(f"{', '.join(names)} ({shapes})" for shapes, names in by_shapes.items())


def _versioned(library: str) -> str:
    return library if library.endswith(".py") else f"{library} {version(library)}"


def _joined(items: Iterable[str]) -> str:
    return ", ".join(items)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def departures(records: Mapping[Cell, Record]) -> list[str]:
    """A line for each cell that departs from its table."""
    from zoo.catalog import expected
    from zoo.running import differences

    table = expected()
    found = {cell: differences(record, table.get(cell)) for cell, record in records.items()}
    return [f"{'/'.join(cell)}: {'; '.join(lines)}" for cell, lines in found.items() if lines]


def run(cells: Iterable[Cell], report: Callable[[str], object]) -> dict[Cell, Record]:
    """The records of the cells, two at a time."""
    from zoo.running import Pool

    records: dict[Cell, Record] = {}
    chosen = list(cells)
    with Pool(chosen) as pool:
        for cell in chosen:
            records[cell] = pool[cell]
            report(f"{'/'.join(cell)}: {records[cell].seconds:.1f} s")
    return records


def main() -> int:
    """Writes the file, checks it, or prints some rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="print the rows of these models")
    options = parser.parse_args()
    from zoo.catalog import cells, entries

    unknown = set(options.only or ()) - set(entries())
    if unknown:
        parser.error(f"there is no model {', '.join(sorted(unknown))}")
    records = run(
        [cell for cell in cells() if not options.only or cell[0] in options.only],
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    wrong = departures(records)
    for line in wrong:
        print(line, file=sys.stderr)
    if options.only:
        print(HEAD, *(row for name in options.only for row in rows_of(entries()[name], records)), sep="\n")
        return int(bool(wrong))
    text = render(records)
    if options.check:
        same = TARGET.exists() and comparable(TARGET.read_text()) == comparable(text)
        if not same:
            print("docs/MODELS.md is out of date; run python tools/model_docs.py", file=sys.stderr)
        return int(bool(wrong) or not same)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
