"""Trains the parity cells on a pp x cp mesh of four processes, lifted and with the lift disabled, and makes two tables.

    python tools/parity.py              # a covering set of cells: each pair of model, order, mesh, schedule and dtype
    python tools/parity.py --all        # all of them
    python tools/parity.py --readme     # and the tables in README.md
    python tools/parity.py --check      # fails if README.md has other rows, columns or bounds than a run gives

Exit codes: 0 every cell gave what it has to, 1 some cell did not (or, with ``--check``, README.md is out of date).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"
BUDGET, BUDGET_OF_ALL = 600.0, 7200.0
_NUMBER = re.compile(r"(?<!≥ )\b\d+\.\d+(e[-+]\d\d)?|\binf\b")
_ERROR = re.compile(r"^\w*(Error|Exception)\b.*", re.MULTILINE)

from cp_worker import DTYPES, ORDERS, WORLD, Cell, launch  # noqa: E402
from parity_cells import EVERY, TOLERANCE, Judgement, covering, judge, least, wrong  # noqa: E402
from parity_models import MODELS  # noqa: E402
from pipeline_worker import run_cells  # noqa: E402

Judged = Mapping[Cell, Judgement]


def run(cells: Sequence[Cell], budget: float) -> tuple[dict[Cell, Judgement], list[str]]:
    """What the cells gave, and a line for each that did not give what it has to."""
    judged, lines = {}, []
    with tempfile.TemporaryDirectory() as directory:
        results = run_cells(cells, Path(directory), budget, launch, WORLD)
    for cell in cells:
        result = results.get(cell, "no result within the time limit")
        if isinstance(result, str):
            cause = _ERROR.search(result)
            lines.append(f"{cell.name}: {cause.group() if cause else result.strip().splitlines()[0]}")
            continue
        judged[cell] = judge(cell, result)
        lines += [f"{cell.name}: {line}" for line in wrong(cell, judged[cell])]
    return judged, lines


def block(judged: Judged, lines: Sequence[str], count: int, command: str) -> str:
    """Both tables, and what they show."""
    meshed = {cell: own for cell, own in judged.items() if cell.cp > 1}
    alone = [cell for cell in judged if cell.cp == 1]
    limits = " and ".join(f"{TOLERANCE[dtype]:.0e} ({dtype})" for dtype in DTYPES)
    parts = [
        f"`{command}` wrote this block: {count} cells, each one step of {WORLD} gloo processes on a mesh of "
        f"{_listed({f'pp {cell.pp} x cp {cell.cp}' for cell in meshed})}, under {_listed(_schedules(meshed))}; labels "
        "with -100, a different number on each rank. Errors are those of the worst parameter, "
        "`max|diff| / max(max|g|, 1e-4 * largest gradient)`, against the eager model in one process on the "
        "batch in natural order.",
        f"Lifted, worst of the cells in {' / '.join(DTYPES)} (at most {limits}):\n\n{_table(meshed, _lifted)}",
        "The same cells with the lift disabled (each lifted input is what the unlifted model would read on its shard), "
        "the best of them and, in brackets, the least that `tests/parity_expected.txt` said beforehand:\n\n"
        f"{_table(meshed, _disabled)}",
    ]
    if alone:
        worst = max(judged[cell].disabled for cell in alone)
        parts.append(
            f"On pp {alone[0].pp} x cp 1 in natural order what is not lifted is right, as it said: {worst:.1e}."
        )
    bad = {line.partition(":")[0] for line in lines}
    parts.append(
        "\n".join([f"- {count - len(bad)} of {count} cells gave what they have to.", *(f"- FAIL {x}" for x in lines)])
    )
    return "\n\n".join(parts)


def _schedules(cells: Judged) -> set[str]:
    return {cell.schedule.removeprefix("Schedule") for cell in cells}


def _listed(words: set[str]) -> str:
    *first, last = sorted(words) or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def _table(judged: Judged, text: object) -> str:
    head = f"| model | {' | '.join(ORDERS)} |\n|---|{'---:|' * len(ORDERS)}"
    rows = []
    for name, model in MODELS.items():
        columns = [
            text({c: own for c, own in judged.items() if (c.model, c.order) == (name, order)})  # type: ignore[operator]
            for order in ORDERS
        ]
        rows.append(f"| {model.what} | {' | '.join(columns)} |")
    return "\n".join([head, *rows])


def _lifted(judged: Judged) -> str:
    worst = [max((own.error for cell, own in judged.items() if cell.dtype == d), default=None) for d in DTYPES]
    return " / ".join("–" if value is None else f"{value:.1e}" for value in worst)


def _disabled(judged: Judged) -> str:
    if not judged:
        return "–"
    smallest, bound = min((own.disabled, least(cell) or 0.0) for cell, own in judged.items())
    return f"{smallest:.2f} (≥ {bound:.2f})"


def masked(text: str) -> str:
    """A block without its measured numbers, which differ between machines."""
    return _NUMBER.sub("#", text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tools/parity.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help=f"all {len(EVERY)} cells, not {len(covering())} of them")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--check", action="store_true", help="fail if the tables in README.md are others")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    command = "python tools/parity.py --readme" + (" --all" if options.all else "")
    cells = EVERY if options.all else covering()
    judged, lines = run(cells, BUDGET_OF_ALL if options.all else BUDGET)
    new = block(judged, lines, len(cells), command)
    print(new)
    if options.readme:
        readme.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}")
    if options.check and masked(new) != masked(old.strip()):
        print("README.md: the tables of parity are out of date; run python tools/parity.py --readme", file=sys.stderr)
        return 1
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
