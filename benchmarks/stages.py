"""Measures how evenly partition splits models into stages, next to equal layers; writes docs/PARTITIONING.md.

python benchmarks/stages.py             # prints the table
python benchmarks/stages.py --docs      # and rewrites the block in docs/PARTITIONING.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# As a script, benchmarks/ is on the path and the directory of both packages is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import ReadmeError, Row, markdown, plain, read_readme, write_block
from benchmarks.stages_cost import BATCH, MODELS, SEQ, Cell, measure

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "stages"
COUNTS = (4, 8)


def rows(cells: Sequence[Cell]) -> list[Row]:
    """A line for each model, number of stages and schedule."""
    table = []
    for cell in cells:
        if cell.split != "cost":
            continue
        same = (cell.model, cell.stages, cell.schedule)
        equal = next(c for c in cells if (c.model, c.stages, c.schedule) == same and c.split != "cost")
        ranks = "stages" if cell.schedule == "1F1B" else f"{cell.stages // 2} ranks, V"
        row = {"model": cell.model, "stages": str(cell.stages), "largest of": ranks}
        row |= {"cost, equal layers": f"{equal.cost:.2f}", "cost, ours": f"{cell.cost:.2f}"}
        row |= {"FLOPs, equal layers": f"{equal.flops:.2f}", "FLOPs, ours": f"{cell.flops:.2f}"}
        row |= {"bytes, equal layers": f"{equal.parameters:.2f}", "bytes, ours": f"{cell.parameters:.2f}"}
        table.append(row)
    return table


def worse(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in which the cuts by cost are worse than equal layers."""
    equal = {(c.model, c.stages, c.schedule): c.cost for c in cells if c.split != "cost"}
    return [c for c in cells if c.split == "cost" and c.cost > equal[c.model, c.stages, c.schedule] + 1e-9]


def block(cells: Sequence[Cell], command: str) -> str:
    """The Markdown between the markers."""
    text = (
        f"`{command}` wrote this block. The largest stage ÷ the mean (1.00: even), in cost (FLOPs and parameter bytes "
        "count alike), and in FLOPs and in parameter bytes alone. Models with the proportions of those that they are "
        f"named after, batch {BATCH}, sequence {SEQ}; *V*: the sums of ranks under ZBVZeroBubble. By equal layers the "
        "embedding goes with the first layer and the head with the last:"
    )
    return (
        f"{text}\n\n{markdown(rows(cells), ())}\n\nCuts by cost that are worse than equal layers: {len(worse(cells))}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/stages.py", description=description)
    parser.add_argument("--quick", action="store_true", help="the first model only")
    parser.add_argument("--docs", action="store_true", help="rewrite the block in docs/PARTITIONING.md")
    options = parser.parse_args(arguments)
    page = ROOT / "docs" / "PARTITIONING.md"
    try:
        if options.docs:
            read_readme(page, TOPIC)
        cells: list[Cell] = []
        for name in list(MODELS)[: 1 if options.quick else None]:
            print(f"... {name}", file=sys.stderr, flush=True)
            cells += measure(name, COUNTS)
        print(plain(rows(cells)))
        if options.docs:
            write_block(page, TOPIC, block(cells, " ".join(["python benchmarks/stages.py", *arguments])))
    except (ReadmeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if worse(cells) else 0


if __name__ == "__main__":
    sys.exit(main())
