"""Times a step of a lifted stage beside the same layers by hand and unlifted; writes docs/COMPILED_STAGES.md.

    python benchmarks/step_time.py           # two sizes, both forms: some minutes
    python benchmarks/step_time.py --quick   # the small size, few rounds
    python benchmarks/step_time.py --docs    # and rewrite the block in docs/COMPILED_STAGES.md

Exit codes: 0 every bar reached, 1 a bar missed, 2 could not measure.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

# As a script, benchmarks/ is on the path and the directory of both packages is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import ReadmeError, Row, markdown, plain, read_readme, write_block
from benchmarks.step_cost import CLOCKS, FORMS, OTHERS, RESAMPLES, Cell, StepError, measure
from benchmarks.step_models import SIZES

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "step"
PAGE = ROOT / "docs" / "COMPILED_STAGES.md"
#: Size -> steps in a row that make a sample.
CALLS = {"calls": 5, "math": 1}
ROUNDS = 60
LIMIT = 1.0


def rows(cells: Sequence[Cell]) -> list[Row]:
    """A line for each size and form."""
    table = []
    for cell in cells:
        row = {"stage": cell.size, "form": cell.form}
        for other in OTHERS:
            for clock in CLOCKS:
                middle, low, high = cell.ratio(other, clock)
                row[f"÷ {other}, {clock}"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        row["lifted, ms"] = f"{cell.seconds('lifted') * 1e3:.2f}"
        row["rounds"] = str(len(cell.samples["lifted"]["CPU"]))
        table.append(row)
    return table


def memory_rows(cells: Sequence[Cell]) -> list[Row]:
    """A line for each size and form."""
    return [
        {
            "stage": cell.size,
            "form": cell.form,
            "one order, bytes": str(cell.inputs[0]),
            "order per sample, bytes": str(cell.inputs[1]),
            "peak of feed and step, KiB": f"{cell.peak / 1024:.1f}",
        }
        for cell in cells
    ]


def missed(cells: Sequence[Cell]) -> list[str]:
    """What is slower for certain: the whole interval of the CPU time is above :data:`LIMIT`."""
    return [
        f"{cell.size}, {cell.form}: lifted ÷ {other}"
        for cell in cells
        for other in OTHERS
        if cell.ratio(other)[1] > LIMIT
    ]


def block(cells: Sequence[Cell], command: str) -> str:
    """The Markdown between the markers."""
    shapes = "; ".join(
        f"*{name}*: {size.layers} layers of dim {size.dim} and the head, batch {size.batch}, sequence {size.seq}"
        for name, size in SIZES.items()
        if any(cell.size == name for cell in cells)
    )
    text = (
        f"`{command}` wrote this block (torch {torch.__version__}, one thread). Step of a lifted stage ÷ step of the "
        "same layers, medians of the ratios of rounds, in brackets the 95% percentile bootstrap interval of the median "
        f"({RESAMPLES} resamples of rounds). In a round each variant runs once, in random order; outputs and gradients "
        "of all are equal bit for bit. *By hand*: an `nn.Module` that takes the lifted input as an argument. "
        f"*Unlifted*: the layers exported with their own table. {shapes}."
    )
    verdicts = missed(cells)
    bars = [f"- slower: {item}" for item in verdicts] or [
        f"- No interval of CPU time lies above {LIMIT:.2f}, in {len(cells) * len(OTHERS)} comparisons."
    ]
    return "\n\n".join(
        [
            text,
            markdown(rows(cells), ()),
            "\n".join(bars),
            "Lifted inputs of the stage, and the most memory that making them and a step hold at once (another order "
            "for each sample):",
            markdown(memory_rows(cells), ()),
        ]
    )


def run(names: Sequence[str], rounds: int) -> list[Cell]:
    """Measures the sizes in both forms, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = []
            for name in names:
                for form in FORMS:
                    print(f"... {name}, {form}", file=sys.stderr, flush=True)
                    cells.append(measure(SIZES[name], form, rounds, CALLS[name]))
        return cells
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/step_time.py", description=description)
    parser.add_argument("--quick", action="store_true", help="the small size, 30 rounds")
    parser.add_argument("--rounds", type=int, default=None, help=f"rounds of each cell (default {ROUNDS})")
    parser.add_argument("--docs", action="store_true", help="rewrite the block in docs/COMPILED_STAGES.md")
    options = parser.parse_args(arguments)
    logging.getLogger("torch").setLevel(logging.ERROR)
    rounds = options.rounds or (30 if options.quick else ROUNDS)
    try:
        if options.docs:
            read_readme(PAGE, TOPIC)  # before the minutes of measuring
        cells = run(list(SIZES)[: 1 if options.quick else None], rounds)
        print(plain(rows(cells)), plain(memory_rows(cells)), *missed(cells), sep="\n\n")
        if options.docs:
            write_block(PAGE, TOPIC, block(cells, " ".join(["python benchmarks/step_time.py", *arguments])))
    except (ReadmeError, StepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if missed(cells) else 0


if __name__ == "__main__":
    sys.exit(main())
