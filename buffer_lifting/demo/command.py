"""The commands ``demo`` and ``compare-losses``: their arguments, and what they print where."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

CLEAN, FINDINGS, COULD_NOT_CHECK = 0, 1, 2

DEMO_HELP = """\
Ends with PASS if every loss and gradient of the 4 processes is that of one process, and those of a control, in which
nothing is lifted, are not.

A CALLABLE takes no arguments and returns a torch.nn.Module that has layers (a ModuleList, in which it is cut) and whose
first output is logits [batch, seq, vocabulary]; its first input gets text, as bytes (0 to 255). Or it returns a pair of
the module and a callable batch(step), which returns the inputs of a step by keyword, and the labels [batch, seq] of the
logits (int64; -100 does not count). It is called once for each step, in order and before the training; every process
gets what it returned. Batch size and length may differ from step to step; the batch is even, the sequence divides by 4.
Dropout is off. The callable is code that runs: give one you trust.

FILE gets a JSON object a line: run ("single" or "pp_cp"), step, loss, and for "pp_cp" the order of the tokens.

exit codes: 0 clean, 1 findings, 2 could not check. The result is on stdout, progress and errors on stderr.
"""
COMPARE_HELP = """\
A and B are files with a JSON object a line, {"step": 0, "loss": 5.5}, which "run": NAME may add to; `demo --losses`
writes them. Runs of one name are compared, or the only runs of both; FILE:RUN is one run of a file.

exit codes: 0 the same, 1 a loss differs by more than rtol (|a - b| / |a|) or is not finite, 2 could not compare: no
such file or run, or steps that only one of them has.
"""


def _demo(args: argparse.Namespace) -> int:
    from buffer_lifting.demo import run

    return run(
        args.steps, args.layers, args.seed, target=args.model, losses=args.losses, learning_rate=args.learning_rate
    )


def _compare(args: argparse.Namespace) -> int:
    from buffer_lifting.demo.losses import LossesError, compare, read_losses

    try:
        found = compare(read_losses(args.a), read_losses(args.b))
    except LossesError as error:
        print(f"buffer-lifting: error: {error}", file=sys.stderr, flush=True)
        return COULD_NOT_CHECK
    for difference in found:
        same = difference.relative <= args.rtol
        print(
            f"{'same  ' if same else 'differ'}  {difference.name or 'the runs'}: {difference.steps} steps, worst at "
            f"step {difference.step}: {difference.first:.9g} and {difference.second:.9g}, {difference.relative:.1e} "
            f"apart (rtol {args.rtol:g})"
        )
    return CLEAN if all(difference.relative <= args.rtol for difference in found) else FINDINGS


def add_demo_commands(commands: Any, common: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the two commands; ``positive`` is the type of a count."""

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, more: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=more,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    about = "train a small Llama, or a model of yours, on 2 stages x 2 context-parallel ranks"
    demo = command("demo", _demo, about, DEMO_HELP)
    demo.add_argument("--steps", type=positive, default=4, help="default: 4")
    demo.add_argument("--layers", type=positive, default=4, help="of the demo's own model, a small Llama; default: 4")
    demo.add_argument("--seed", type=int, default=0, help="of weights, text and orders; default: 0")
    demo.add_argument("--model", metavar="CALLABLE", help="package.module:callable, which makes another model")
    demo.add_argument("--learning-rate", type=_rate, metavar="RATE", help="of SGD; default: 0.1")
    demo.add_argument("--losses", metavar="FILE", help="write the losses of all steps to it")
    sub = command("compare-losses", _compare, "compare the losses of two training runs", COMPARE_HELP)
    sub.add_argument("a", metavar="A", help="FILE or FILE:RUN")
    sub.add_argument("b", metavar="B", help="FILE or FILE:RUN")
    sub.add_argument("--rtol", type=_tolerance, default=1e-5, help="default: 1e-5")


def _rate(text: str) -> float:
    if not _number(text) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return float(text)


def _tolerance(text: str) -> float:
    if not _number(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return float(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
