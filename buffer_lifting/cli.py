"""The command line: ``buffer-lifting`` and ``python -m buffer_lifting``.

Exit codes: 0 clean, 1 findings, 2 could not check. Findings go to stdout, everything else to stderr. torch is
imported by the commands, not here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TextIO

from buffer_lifting import __version__
from buffer_lifting.demo.command import add_demo_commands
from buffer_lifting.inspection.command import add_commands
from buffer_lifting.inspection.config import CheckError
from buffer_lifting.inspection.diff_command import add_diff
from buffer_lifting.inspection.rules import UnknownRuleError
from buffer_lifting.render import lifted_table, render_scan, scan_json
from buffer_lifting.terminal import emit, inert, inert_json, stdout_to_stderr

if TYPE_CHECKING:
    from buffer_lifting.graph.record import GraphRecord
    from buffer_lifting.plan import LiftPlan
    from buffer_lifting.program import (
        Axes,
        Finding,
        LiftedInput,
        PositionRead,
        ScanReport,
        SequenceMixing,
    )

    Item = PositionRead | SequenceMixing | Finding

CLEAN, FINDINGS, COULD_NOT_CHECK, INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = """\
Find what an exported PyTorch program reads by sequence position, lift it to graph inputs, and split the
program into pipeline stages.
"""
TARGET_HELP = """\
A TARGET is a .pt2 file, or package.module:callable. The callable takes no arguments and returns a
torch.export.ExportedProgram (or an fx.GraphModule); the current directory is importable, and the callable runs.
"""
SPLIT_HELP = "A TARGET may also be a .lifted file, that `buffer-lifting lift` wrote.\n"
GRAPH_HELP = """
Of a file only the graph is read, and nothing in it runs, unless --trust is given: torch's loader runs code that is in
the file. Use --trust only for files you trust.
"""
TENSORS_HELP = """
A file needs --trust: its tensors are read by torch's loader, which runs code that is in the file. Use --trust only for
files you trust.
"""
COMMANDS_HELP = """
scan, check, diff and report read the graph of a file, and nothing in it runs. lift, split and verify, and report with
stages, need its tensors: torch's loader runs code that is in the file, so that they ask for --trust. Use --trust only
for files you trust. check, diff and report take saved lifted programs and stages as well: see their --help.
"""
EXIT_CODES = """\
exit codes: 0 clean, 1 findings, 2 could not check. Findings are on stdout, progress and errors on stderr.
"""
JSON_HELP = """\
--json prints one object:
  version   1; keys may be added, none is renamed or removed within a version
  target    as given
  clean     true if nothing is refused (exit code 0)
  reads     reads by position: source_kind, source, aliases, value, node, op, operand, seq_dims, batch_dim,
            stream, form (null: refused), refusal, location, modules, code, hint
  mixing    ops that mix the sequence: node, op, reason, location, modules, handled, code, hint
  findings  about the whole program: code, message, hint, location
  inputs    the user's inputs: name, batch_dim, seq_dims, rank
  lifted    the inputs that lifting adds: name, form, stream, role, source, dtype, row_shape, axis, batched
  summary   counts: reads (by form, "refused" included), mixing_handled, refused
  explanations  with --explain: for each of reads and of mixing, in their order, the steps of its chain (node, op,
            shape, dtype, roles, location, mark, detail), branches, fed_by, stopped, reason, nearest
A location is null or {file, line, code, function}; seq_dims are [{dim, axis, role}].
"""


class UsageError(Exception):
    """Arguments that do not fit; the message is one line."""


# The commands -------------------------------------------------------------------------------------------


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _analysed(record: GraphRecord, axes: Axes | None) -> LiftPlan:
    """The plan of a record."""
    from buffer_lifting.errors import AxesError
    from buffer_lifting.scanner import scan_record

    try:
        return scan_record(record, axes)
    except AxesError as error:
        raise UsageError(f"--axes: {error}") from error


def _plan(program: Any, axes: Axes | None) -> tuple[ScanReport, list[LiftedInput]]:
    """The scan of a program, and what lifting would add."""
    from buffer_lifting.adapter import as_program
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize

    program = as_program(program)
    plan = _analysed(build_record(program, normalize(program, read_only=True).graph), axes)
    return plan.report, [output.input for output in plan.outputs.values()]


def _lift(args: argparse.Namespace) -> Any:
    """The program and its lift; what is refused is printed, and ``None`` returned then."""
    from buffer_lifting.errors import AxesError, UnsupportedReadError
    from buffer_lifting.targets import load_program

    axes = parse_axes(args.axes)
    forms: Any = dict(_pair(text) for text in args.form_of) if getattr(args, "form_of", None) else None
    if forms and args.form != "auto":
        forms.setdefault("*", args.form)
    program = load_program(args.target, args.trust)
    from buffer_lifting.lifting import lift

    try:
        lifted = lift(program, axes, forms or getattr(args, "form", "auto"), getattr(args, "strict", True))
    except (AxesError, UnsupportedReadError):
        print(render_scan(*_plan(program, axes), args.target))
        return program, None
    except ValueError as error:
        raise UsageError(str(error)) from error
    return program, lifted


def _scan(args: argparse.Namespace) -> int:
    from buffer_lifting.graph.inconsistent import untrusted
    from buffer_lifting.targets import TargetError, load_graph

    axes = parse_axes(args.axes)
    stranger = args.target.endswith(".pt2") and not args.trust
    with untrusted(args.target, UsageError, TargetError) if stranger else nullcontext():
        report, text = _scan_text(args, load_graph(args.target, args.trust), axes)
    emit(text)
    return FINDINGS if report.refused else CLEAN


def _scan_text(args: argparse.Namespace, record: GraphRecord, axes: Axes | None) -> tuple[ScanReport, str]:
    """The report of a record, and what is printed of it."""
    plan = _analysed(record, axes)
    report, lifted = plan.report, [output.input for output in plan.outputs.values()]
    explainer = None
    if args.explain:
        from buffer_lifting.explain import Explainer

        explainer = Explainer(record, plan)
    if args.json:
        return report, inert_json(json.dumps(scan_json(report, lifted, args.target, explainer), indent=2))
    return report, inert(render_scan(report, lifted, args.target, args.all, explainer))


def _lift_command(args: argparse.Namespace) -> int:
    if not args.output.endswith(".lifted"):
        raise UsageError(f"-o {args.output}: the name has to end in .lifted")
    _, lifted = _lift(args)
    if lifted is None:
        return FINDINGS
    lifted.save(args.output)
    print(lifted_table(lifted.inputs) if lifted.inputs else "nothing to lift")
    left = len(lifted.report.refused)
    if left:
        _progress(f"left as they are: {left} reads or ops, which are wrong under a reordered sequence")
    _progress(f"wrote {args.output}")
    return CLEAN


def _split(args: argparse.Namespace) -> int:
    from buffer_lifting.errors import PartitionError
    from buffer_lifting.targets import load_lifted

    points = [point.strip() for point in args.split_points.split(",")] if args.split_points else None
    if args.target.endswith(".lifted"):
        lifted = load_lifted(args.target, args.trust, parse_axes(args.axes))
    else:
        _, lifted = _lift(args)
    if lifted is None:
        return FINDINGS
    from buffer_lifting.partitioner import partition

    try:
        staged = partition(lifted, args.num_stages, points)
    except PartitionError as error:
        print(f"{args.target}: {error}")
        return FINDINGS
    staged.save(args.output, weights=not args.no_weights)
    print(staged.summary())
    for fqn, stages in staged.tied.items():
        print(f"tied: {fqn} is in the stages {', '.join(map(str, stages))}; add up its gradients")
    _progress(f"wrote {args.output}")
    return CLEAN


def _verify(args: argparse.Namespace) -> int:
    from buffer_lifting.errors import PartitionError, VerificationError

    program, lifted = _lift(args)
    if lifted is None:
        return FINDINGS
    from buffer_lifting.partitioner import partition
    from buffer_lifting.verification import verify

    try:
        subject: Any = lifted if args.num_stages is None else partition(lifted, args.num_stages)
        with stdout_to_stderr():
            report = verify(program, subject, seed=args.seed)
    except (PartitionError, VerificationError) as error:
        print(f"{args.target}: {error}")
        return FINDINGS
    print(report)
    return CLEAN if report.passed else FINDINGS


# Arguments ----------------------------------------------------------------------------------------------


def parse_axes(texts: Sequence[str] | None) -> Axes | None:
    """``["tokens:0=batch,1=seq"]`` as ``{"tokens": {0: "batch", 1: "seq"}}``."""
    axes: Axes = {}
    for text in texts or ():
        name, _, dims = text.partition(":")
        for entry in dims.split(","):
            dim, equals, axis = entry.partition("=")
            if not (name and equals and axis and dim.strip().lstrip("-").isdigit()):
                raise UsageError(f"--axes {text!r}: expected NAME:DIM=AXIS,..., as in tokens:0=batch,1=seq")
            axes.setdefault(name.strip(), {})[int(dim)] = axis.strip()
    return axes or None


def _pair(text: str) -> tuple[str, str]:
    glob, equals, form = text.rpartition("=")
    if not (glob and equals and form in ("values", "positions", "auto")):
        raise UsageError(f"--form-of {text!r}: expected GLOB=values or GLOB=positions")
    return glob, form


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The parser; its ``run`` is the command."""
    raw: Any = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    target = argparse.ArgumentParser(add_help=False, parents=[common])
    target.add_argument("target", metavar="TARGET", help="a .pt2 file or package.module:callable; see below")
    trusted = argparse.ArgumentParser(add_help=False)
    trusted.add_argument("--trust", action="store_true", help="read files by torch's loader, which runs code in them")
    axes = argparse.ArgumentParser(add_help=False)
    axes.add_argument(
        "--axes",
        action="append",
        metavar="NAME:DIM=AXIS,...",
        help="the axes of an input, as in tokens:0=batch,1=seq; default: inferred (repeatable)",
    )
    parser = argparse.ArgumentParser(
        prog="buffer-lifting",
        description=DESCRIPTION,
        epilog=TARGET_HELP + COMMANDS_HELP + "\n" + EXIT_CODES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: Literal["scan", "lift", "split", "verify"],
        run: Any,
        text: str,
        parents: list[argparse.ArgumentParser],
        more: str = "",
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"{more}\n{EXIT_CODES}" if more else "exit codes: 0 equal, 1 not equal, 2 could not run.\n",
            parents=parents,
            formatter_class=raw,
        )
        sub.set_defaults(run=run)
        return sub

    scan = command(
        "scan",
        _scan,
        "show what the program reads by position",
        [target, axes, trusted],
        f"{TARGET_HELP}{GRAPH_HELP}\n{JSON_HELP}",
    )
    scan.add_argument("--json", action="store_true", help="print the report as JSON")
    scan.add_argument("--all", action="store_true", help="list handled ops too, and name every module")
    scan.add_argument(
        "--explain",
        action="store_true",
        help="show the chain from source to consumer under each line, and the pattern nearest to what is refused; "
        "with --all for every read, in full",
    )

    lift = command(
        "lift",
        _lift_command,
        "lift the reads to inputs, and save the program",
        [target, axes, trusted],
        TARGET_HELP + TENSORS_HELP,
    )
    lift.add_argument("-o", "--output", metavar="OUT.lifted", required=True, help="the file to write")
    lift.add_argument("--form", choices=("auto", "values", "positions"), default="auto", help="default: auto")
    lift.add_argument(
        "--form-of",
        action="append",
        metavar="GLOB=FORM",
        help="the form for the sources that match, as in '*.rope.cache=positions' (repeatable)",
    )
    lift.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="leave what cannot be lifted as it is: wrong under a reordered sequence",
    )

    split = command(
        "split",
        _split,
        "split a program, or a saved lifted one, into pipeline stages",
        [target, axes, trusted],
        TARGET_HELP + SPLIT_HELP + TENSORS_HELP,
    )
    split.add_argument("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    split.add_argument("--no-weights", action="store_true", help="leave out the weights, which a checkpoint has")
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--num-stages", type=_positive, metavar="N", help="cut between layers, balanced by cost")
    how.add_argument("--split-points", metavar="A,B", help="FQN of the first module of each next stage")

    verify = command(
        "verify",
        _verify,
        "lift the program and check the result against it",
        [target, axes, trusted],
        TARGET_HELP + TENSORS_HELP,
    )
    verify.add_argument("--num-stages", type=_positive, metavar="N", help="check N pipeline stages as well")
    verify.add_argument("--seed", type=int, default=0, help="of the inputs and orders; default: 0")

    add_diff(commands, [common, axes, trusted], parse_axes)
    add_commands(commands, common, axes, trusted, parse_axes, _positive)

    add_demo_commands(commands, common, _positive)
    return parser


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; options may stand between targets (``check a.pt2 --exit-zero b.pt2``)."""
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "targets") and not any(text.startswith("-") for text in rest):
        args.targets += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code."""
    from buffer_lifting.errors import LiftingError
    from buffer_lifting.targets import TargetError, first_line

    try:
        args = _parsed(make_parser(), argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else COULD_NOT_CHECK
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _error(sys.stderr, "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COULD_NOT_CHECK
    except Exception as error:
        if args.debug:
            import traceback

            traceback.print_exc()
        expected = isinstance(error, UsageError | CheckError | UnknownRuleError | TargetError | LiftingError)
        if expected:
            text = " ".join(str(error).split())
        elif isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        else:
            text = f"{first_line(error)}{'' if args.debug else ' (--debug shows the traceback)'}"
        _error(sys.stderr, text)
        return COULD_NOT_CHECK


def _error(stream: TextIO, text: str) -> None:
    print(inert(f"buffer-lifting: error: {text}"), file=stream, flush=True)
