"""Measures scan, lift and partition beside torch.export and torch's pipeline(), in one run.

    python benchmarks/run.py                # 4, 16, 32 and 126 layers: a few minutes
    python benchmarks/run.py --quick        # 4 and 16 layers
    python benchmarks/run.py --readme       # and the table in README.md

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

# As a script, benchmarks/ is on the path and the directory of both packages is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import BenchmarkError, Measurement, measure
from benchmarks.report import ReadmeError, missed, read_readme, record, text, write_readme

ROOT = Path(__file__).resolve().parent.parent
SIZES = (4, 16, 32, 126)
QUICK = (4, 16)
STAGES = 4
LARGE = 100  # layers; from here on export and pipeline() take long and run less often


def run(layers: Sequence[int], stages: int = STAGES, command: str = "", repeats: int = 5) -> dict[str, Any]:
    """Measures all sizes, static and dynamic; returns the record that becomes the JSON."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _say("warming up")
            measure(stages, stages, repeats=1, others=1)  # what is imported or cached on first use
            measure(stages, stages, dynamic=True, repeats=1, others=1, beside=False)
            static: list[Measurement] = []
            dynamic: list[Measurement] = []
            for size in layers:
                others = 2 if size >= LARGE else min(repeats, 3)
                _say(f"{size} layers, static shapes")
                static.append(measure(size, stages, repeats=repeats, others=others))
                _say(f"{size} layers, dynamic shapes")
                dynamic.append(measure(size, stages, dynamic=True, repeats=repeats, others=1, beside=False))
        return record(static, dynamic, stages, command)
    finally:
        torch.set_num_threads(threads)


def _say(message: str) -> None:
    print(f"... {message}", file=sys.stderr, flush=True)


def _command(arguments: Sequence[str]) -> str:
    return " ".join(["python benchmarks/run.py", *arguments])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python benchmarks/run.py", description=description)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results.json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]} and {QUICK[1]} layers only")
    parser.add_argument("--readme", action="store_true", help="rewrite the results in README.md")
    options = parser.parse_args(arguments)
    logging.getLogger("torch").setLevel(logging.ERROR)
    readme = ROOT / "README.md"
    try:
        if options.readme:
            read_readme(readme)  # before the minutes of measuring
        results = run(QUICK if options.quick else SIZES, command=_command(arguments))
        print(text(results))
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if options.readme:
            write_readme(readme, results)
    except (BenchmarkError, ReadmeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
