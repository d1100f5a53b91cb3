"""Measures feed beside PR #1797's way and beside a copy of the bytes that must be written, in one run.

    python benchmarks/feed.py                # S 8k, 32k and 131k, B 1, 4 and 8, cp 2 and 8: a few minutes, 3 GiB
    python benchmarks/feed.py --quick        # S 8k alone
    python benchmarks/feed.py --readme       # and the table in README.md

Exit codes: 0 every bar reached, 1 a bar missed, 2 could not measure.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# As a script, benchmarks/ is on the path and the directory of the packages is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import buffer_lifting as bl
from benchmarks import feed_cost, feed_report
from benchmarks.report import ReadmeError, read_readme, write_block

ROOT = Path(__file__).resolve().parent.parent
SEQS = (8192, 32768, 131072)
QUICK = (8192,)
BATCHES = (1, 4, 8)
SIZES = (2, 8)
FORMS = ("values", "positions")


def forms(names: Sequence[str] | None) -> dict[str, dict[str, tuple[int, int]]]:
    """Bytes a token of the lifted inputs of each model of the tests' zoo: role ``row``, role ``col``."""
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo import CASES, export_case

    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name in CASES if names is None else names:
        program = export_case(name, dynamic=CASES[name].dynamic)[1]
        found[name] = {}
        for form in FORMS:
            sizes = {"row": 0, "col": 0}
            for item in bl.lift(program, form=form).inputs:
                sizes[item.role] += getattr(torch, item.dtype).itemsize * torch.Size(item.row_shape).numel()
            found[name][form] = (sizes["row"], sizes["col"])
    return found


def run(seqs: Sequence[int], rounds: int = 3, command: str = "", names: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures all cells; returns the record that becomes the JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _say("bytes a token, by form")
        by_form = forms(names)
        cells = feed_cost.run(seqs, BATCHES, SIZES, rounds, _say)
    return feed_report.record(cells, by_form, command)


def _say(message: str) -> None:
    print(f"... {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/feed.py", description=description)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "feed_results.json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help=f"a sequence of {QUICK[0]} only")
    parser.add_argument("--readme", action="store_true", help="rewrite the results in README.md")
    options = parser.parse_args(arguments)
    logging.getLogger("torch").setLevel(logging.ERROR)
    readme = ROOT / "README.md"
    try:
        if options.readme:
            read_readme(readme, feed_report.TOPIC)  # before the minutes of measuring
        command = " ".join(["python benchmarks/feed.py", *arguments])
        results = run(QUICK if options.quick else SEQS, command=command)
        print(feed_report.text(results))
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if options.readme:
            write_block(readme, feed_report.TOPIC, feed_report.readme_block(results))
    except (ReadmeError, OSError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if feed_report.missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
