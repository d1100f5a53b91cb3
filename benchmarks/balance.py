"""Measures how evenly orders spread attention over context-parallel ranks; writes docs/BALANCE.md and its plot.

python benchmarks/balance.py             # prints the tables
python benchmarks/balance.py --docs      # and rewrites the block in docs/BALANCE.md, and docs/balance.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

# As a script, benchmarks/ is on the path and the directory of both packages is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.balance_cost import MASKS, ORDERS, Cell, run_pairs, time_ranks
from benchmarks.balance_plot import svg
from benchmarks.balance_step import RANKS, Step, median_ms, time_steps
from benchmarks.report import ReadmeError, Row, markdown, plain, read_readme, write_block

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "balance"
SEQ, SAMPLES, SIZES = 32768, 8, (2, 4, 8)
TIMED_SEQ, TIMED_SIZE = 8192, 4
STEP_SEQ = 4096


def pair_rows(cells: Sequence[Cell]) -> list[Row]:
    """A line for each mask and size."""
    table = []
    for mask in MASKS:
        for size in sorted({cell.size for cell in cells}):
            row = {"mask": mask, "cp": str(size)}
            row |= {c.order: f"{c.pairs:.2f}" for c in cells if (c.mask, c.size) == (mask, size)}
            table.append(row)
    return table


def time_rows(cells: Sequence[Cell]) -> list[Row]:
    """A line for each mask: pairs, then time."""
    table = []
    for mask in MASKS:
        own = {cell.order: cell for cell in cells if cell.mask == mask}
        table.append({"mask": mask, "of": "pairs"} | {name: f"{own[name].pairs:.2f}" for name in ORDERS})
        table.append({"mask": mask, "of": "time"} | {name: f"{own[name].seconds:.2f}" for name in ORDERS})
    return table


def step_rows(steps: Sequence[Step]) -> list[Row]:
    """A line for each strategy."""
    table = []
    for step in steps:
        middle, low, high = step.ratio()
        row = {"strategy": step.strategy}
        row |= {f"pairs, {order}": f"{of:.2f}" for order, of in step.pairs.items()}
        row |= {f"{order}, ms": f"{median_ms(step, order):.0f}" for order in step.seconds}
        table.append(row | {"contiguous ÷ head-tail": f"{middle:.2f} [{low:.2f}, {high:.2f}]"})
    return table


def block(
    counted: Sequence[Cell], timed: Sequence[Cell], steps: Sequence[Step], lengths: Sequence[int], command: str
) -> str:
    """The Markdown between the markers; ``lengths`` are those of the three tables."""
    seq, timed_seq, step_seq = lengths
    rounds = len(next(iter(steps[0].seconds.values())))
    size = timed[0].size
    parts = [
        f"`{command}` wrote this block. Attended pairs of query and key, slowest rank over the mean of the ranks "
        f"(1.00: even), S {seq}, {SAMPLES} samples, each waiting for its slowest rank; documents of up to a quarter of "
        "the sequence, other ones in each sample:",
        markdown(pair_rows(counted), ()),
        f"Time of attention, likewise, at cp {size} and S {timed_seq}, one sample. It is the time of each rank's "
        "attention, run one after another in one process, in turn; no collective is in it. It skips the keys that no "
        "query of a block of 128 sees:",
        markdown(time_rows(timed), ()),
        f"Training steps (forward and backward) of a model that is nearly all causal attention, S {step_seq}, one "
        f"sample, on {RANKS} processes on gloo, a core each: medians of {rounds} steps, all four in turn; in brackets "
        "the quartiles of the ratio. torch's ring skips what no query sees, and takes these two orders; all-gather has "
        "a dense mask:",
        markdown(step_rows(steps), ()),
    ]
    return "\n\n".join(parts)


def _say(message: str) -> None:
    print(f"... {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/balance.py", description=description)
    parser.add_argument("--quick", action="store_true", help="shorter sequences, one round of timing")
    parser.add_argument("--docs", action="store_true", help="rewrite docs/BALANCE.md and its plot")
    options = parser.parse_args(arguments)
    seq, timed_seq, rounds = (4096, 1024, 1) if options.quick else (SEQ, TIMED_SEQ, 5)
    step_seq, step_rounds = (256, 2) if options.quick else (STEP_SEQ, 15)
    page = ROOT / "docs" / "BALANCE.md"
    try:
        if options.docs:
            read_readme(page, TOPIC)
        counted = run_pairs(seq, SAMPLES, SIZES)
        timed = time_ranks(timed_seq, TIMED_SIZE, rounds, _say)
        _say(f"balance: training steps on {RANKS} ranks")
        steps = time_steps(step_seq, step_rounds)
        print(plain(pair_rows(counted)), plain(time_rows(timed)), plain(step_rows(steps)), sep="\n\n")
        if options.docs:
            command = " ".join(["python benchmarks/balance.py", *arguments])
            write_block(page, TOPIC, block(counted, timed, steps, (seq, timed_seq, step_seq), command))
            (ROOT / "docs" / "balance.svg").write_text(svg(counted), encoding="utf-8")
    except (ReadmeError, OSError, ProcessRaisedException, ProcessExitedException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
