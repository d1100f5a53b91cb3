"""The command line: ``buffer-lifting`` and ``python -m buffer_lifting``.

Exit codes: 0 clean, 1 findings, 2 could not check. Findings go to stdout, everything else to stderr. torch is
imported by the commands, not here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from buffer_lifting.graph.record import Location
    from buffer_lifting.program import (
        Axes,
        Finding,
        InputAxes,
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
torch.export.ExportedProgram (or an fx.GraphModule); the current directory is importable.

Both execute code, that of the module and that in the file: use only files you trust.
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
A location is null or {file, line, code, function}; seq_dims are [{dim, axis, role}].
"""


class UsageError(Exception):
    """Arguments that do not fit; the message is one line."""


# Rendering a report ------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Items that say the same thing of the same source line."""

    where: Location | None
    code: str
    text: str
    hint: str
    refused: bool
    modules: list[str]
    count: int = 0


def render_scan(
    report: ScanReport, lifted: Sequence[LiftedInput] = (), target: str = "program", everything: bool = False
) -> str:
    """The findings with their source lines, and a summary.

    Args:
        report: of :func:`buffer_lifting.scan`.
        lifted: the inputs that lifting would add, or has added.
        target: stands where a finding has no source line.
        everything: list handled ops too, and name all modules.
    """
    items: list[Item] = [*report.findings, *report.reads]
    items += [mix for mix in report.mixing if everything or not mix.handled]
    lines: list[str] = []
    for group in _grouped(items):
        lines.append(f"{_place(group.where, target)}: {group.code} {group.text}{_spread(group)}")
        source = _source_line(group.where)
        if source:
            lines.append(f"    {source}")
        if group.hint:
            lines.append(f"    help: {group.hint}")
        if everything:
            lines += [f"    in {module}" for module in group.modules]
    return "\n".join([*lines, *([""] if lines else []), *_summary(report, lifted)])


def _grouped(items: Iterable[Item]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for item in items:
        text, refused = _message(item)
        key = (item.location and (item.location.file, item.location.line), item.code, text, item.hint)
        group = groups.setdefault(key, _Group(item.location, item.code, text, item.hint, refused, []))
        group.count += 1
        for module in getattr(item, "modules", ()):
            if module and module not in group.modules:
                group.modules.append(module)
    places = {id(group): place for place, group in enumerate(groups.values())}

    def by_line(group: _Group) -> tuple[str, int, int]:
        where = group.where
        return (where.file, where.line, places[id(group)]) if where else ("", 0, places[id(group)])

    return sorted(groups.values(), key=by_line)


def _message(item: Item) -> tuple[str, bool]:
    """What to say, and whether lifting refuses it."""
    from buffer_lifting.program import PositionRead, SequenceMixing

    if isinstance(item, PositionRead):
        read = _source(item.source_kind, item.source)
        if item.refusal:
            return f"cannot lift {read}: {item.refusal}", True
        if item.source_kind == "is_causal":
            return f"{read} goes by the natural order", False
        forms = {
            "values": "lifted as its values",
            "positions": "lifted as the positions it is read at",
            "natural": "kept in natural order, and gathered by lifted positions",
        }
        return f"{read} is read by position; {forms[item.form or 'values']}", False
    if isinstance(item, SequenceMixing):
        return f"{item.op} mixes the sequence ({item.reason}){', handled' * item.handled}", not item.handled
    return item.message, True


def _source(kind: str, name: str) -> str:
    return {
        "iota": f"the index from {name}",
        "length": "the sequence length",
        "is_causal": "the causal mask (is_causal=True)",
    }.get(kind, f"{kind} {name!r}")


def _spread(group: _Group) -> str:
    """How often, and in how many layers."""
    modules = group.modules
    if len(modules) > 1:
        patterns = {re.sub(r"(?<![^.])\d+(?![^.])", "*", module) for module in modules}
        kind = f"layers: {patterns.pop()}" if len(patterns) == 1 else "modules"
        return f"  [x{len(modules)} {kind}]"
    return f"  [x{group.count}]" if group.count > 1 else ""


def _place(where: Location | None, target: str) -> str:
    if where is None:
        return target
    path = os.path.relpath(where.file)
    return f"{where.file if path.startswith(os.pardir) else path}:{where.line}"


def _source_line(where: Location | None) -> str:
    if where is None:
        return ""
    import linecache

    return (where.code or linecache.getline(where.file, where.line)).strip()


def _summary(report: ScanReport, lifted: Sequence[LiftedInput]) -> list[str]:
    forms = _forms(report)
    counts = ", ".join(f"{count} {form}" for form, count in forms.items())
    handled = sum(mix.handled for mix in report.mixing)
    rows = [
        ("reads", f"{len(report.reads)}" + (f" ({counts})" if counts else "")),
        ("mixing", f"{len(report.mixing)} ops ({handled} handled)" if report.mixing else "0 ops"),
    ]
    rows += [("input" if place == 0 else "", _axes_text(axes)) for place, axes in enumerate(report.inputs)]
    lines = [f"{name:8}{text}".rstrip() for name, text in rows]
    if lifted:
        verb, plural = "would add" if report.refused else "adds", "s" * (len(lifted) > 1)
        lines.append(f"{'lifting':8}{verb} {len(lifted)} input{plural}:")
        lines += [f"  {line}" for line in lifted_table(lifted).splitlines()]
    if report.refused:
        lines.append(f"refused {len(report.refused)}: lifting stops at these, unless strict is off")
    return lines


def _forms(report: ScanReport) -> dict[str, int]:
    forms: dict[str, int] = {}
    for read in report.reads:
        form = read.form if read.form and not read.refusal else "refused"
        forms[form] = forms.get(form, 0) + 1
    return forms


def _axes_text(axes: InputAxes) -> str:
    dims = [f"batch dim {axes.batch_dim}"] if axes.batch_dim is not None else []
    dims += [f"{axis} dim {dim} ({role})" for dim, axis, role in axes.seq_dims]
    return f"{axes.name}: {', '.join(dims) or 'neither batch nor sequence'}"


def lifted_table(inputs: Sequence[LiftedInput]) -> str:
    """A table of lifted inputs. ``S_all``: all slots, which keys need, and not only this shard's."""
    rows = [("name", "form", "stream", "role", "dtype", "shape", "source")]
    for item in inputs:
        length = "S" if item.axis == "seq" else item.axis
        dims = ["B"] * item.batched + [f"{length}_all" if item.role == "col" else length]
        dims += [str(size) for size in item.row_shape]
        shape = f"[{', '.join(dims)}]"
        rows.append((item.name, item.form, item.stream, item.role, item.dtype, shape, item.source))
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def scan_json(report: ScanReport, lifted: Sequence[LiftedInput], target: str) -> dict[str, Any]:
    """The report as plain data: see ``JSON_HELP``."""
    return {
        "version": 1,
        "target": target,
        "clean": not report.refused,
        "reads": [_plain(read) for read in report.reads],
        "mixing": [_plain(mix) for mix in report.mixing],
        "findings": [_plain(finding) for finding in report.findings],
        "inputs": [_plain(axes) for axes in report.inputs],
        "lifted": [asdict(item) for item in lifted],
        "summary": {
            "reads": _forms(report),
            "mixing_handled": sum(mix.handled for mix in report.mixing),
            "refused": len(report.refused),
        },
    }


def _plain(record: Any) -> dict[str, Any]:
    plain = asdict(record)
    if "seq_dims" in plain:
        plain["seq_dims"] = [{"dim": dim, "axis": axis, "role": role} for dim, axis, role in plain["seq_dims"]]
    return plain


# The commands -------------------------------------------------------------------------------------------


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _plan(program: Any, axes: Axes | None) -> tuple[ScanReport, list[LiftedInput]]:
    """The scan, and what lifting would add."""
    from buffer_lifting.adapter import as_program
    from buffer_lifting.errors import AxesError
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize
    from buffer_lifting.scanner import scan_record

    program = as_program(program)
    try:
        plan = scan_record(build_record(program, normalize(program, read_only=True).graph), axes)
    except AxesError as error:
        raise UsageError(f"--axes: {error}") from error
    return plan.report, [output.input for output in plan.outputs.values()]


def _lift(args: argparse.Namespace) -> Any:
    """The program and its lift; what is refused is printed, and ``None`` returned then."""
    from buffer_lifting.errors import AxesError, UnsupportedReadError
    from buffer_lifting.lifting import lift
    from buffer_lifting.targets import load_program

    axes = parse_axes(args.axes)
    forms: Any = dict(_pair(text) for text in args.form_of) if getattr(args, "form_of", None) else None
    if forms and args.form != "auto":
        forms.setdefault("*", args.form)
    program = load_program(args.target)
    try:
        lifted = lift(program, axes, forms or getattr(args, "form", "auto"), getattr(args, "strict", True))
    except (AxesError, UnsupportedReadError):
        print(render_scan(*_plan(program, axes), args.target))
        return program, None
    except ValueError as error:
        raise UsageError(str(error)) from error
    return program, lifted


def _scan(args: argparse.Namespace) -> int:
    from buffer_lifting.targets import load_program

    axes = parse_axes(args.axes)
    report, lifted = _plan(load_program(args.target), axes)
    if args.json:
        print(json.dumps(scan_json(report, lifted, args.target), indent=2))
    else:
        print(render_scan(report, lifted, args.target, args.all))
    return FINDINGS if report.refused else CLEAN


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
    from buffer_lifting.errors import AxesError, PartitionError, UnsupportedReadError
    from buffer_lifting.partitioner import partition
    from buffer_lifting.targets import load_lifted

    points = [point.strip() for point in args.split_points.split(",")] if args.split_points else None
    try:
        lifted = load_lifted(args.target)
        staged = partition(lifted, args.num_stages, points)
    except (AxesError, UnsupportedReadError, PartitionError) as error:
        print(f"{args.target}: {error}")
        return FINDINGS
    staged.save(args.output)
    print(staged.summary())
    for fqn, stages in staged.tied.items():
        print(f"tied: {fqn} is in the stages {', '.join(map(str, stages))}; add up its gradients")
    _progress(f"wrote {args.output}")
    return CLEAN


def _verify(args: argparse.Namespace) -> int:
    from buffer_lifting.errors import PartitionError, VerificationError
    from buffer_lifting.partitioner import partition
    from buffer_lifting.verification import verify

    program, lifted = _lift(args)
    if lifted is None:
        return FINDINGS
    try:
        subject: Any = lifted if args.num_stages is None else partition(lifted, args.num_stages)
        with redirect_stdout(sys.stderr):
            report = verify(program, subject, seed=args.seed)
    except (PartitionError, VerificationError) as error:
        print(f"{args.target}: {error}")
        return FINDINGS
    print(report)
    return CLEAN if report.passed else FINDINGS


def _demo(args: argparse.Namespace) -> int:
    from buffer_lifting.demo import run

    return run(args.steps, args.layers, args.seed)


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
    target.add_argument("target", metavar="TARGET", help="a .pt2 file (one you trust) or package.module:callable")
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
        epilog=TARGET_HELP + "\n" + EXIT_CODES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: Literal["scan", "lift", "split", "verify", "demo"],
        run: Any,
        text: str,
        parents: list[argparse.ArgumentParser],
        more: str = "",
    ) -> argparse.ArgumentParser:
        about = "" if name == "demo" else TARGET_HELP + "\n"
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=about + more + EXIT_CODES,
            parents=parents,
            formatter_class=raw,
        )
        sub.set_defaults(run=run)
        return sub

    scan = command("scan", _scan, "show what the program reads by position", [target, axes], JSON_HELP + "\n")
    scan.add_argument("--json", action="store_true", help="print the report as JSON")
    scan.add_argument("--all", action="store_true", help="list handled ops too, and name every module")

    lift = command("lift", _lift_command, "lift the reads to inputs, and save the program", [target, axes])
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

    split = command("split", _split, "split a program, or a saved lifted one, into pipeline stages", [target])
    split.add_argument("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--num-stages", type=_positive, metavar="N", help="cut between layers, balanced by cost")
    how.add_argument("--split-points", metavar="A,B", help="FQN of the first module of each next stage")

    verify = command("verify", _verify, "lift the program and check the result against it", [target, axes])
    verify.add_argument("--num-stages", type=_positive, metavar="N", help="check N pipeline stages as well")
    verify.add_argument("--seed", type=int, default=0, help="of the inputs and orders; default: 0")

    demo = command("demo", _demo, "train a small Llama on two processes, and compare with one", [common])
    demo.add_argument("--steps", type=_positive, default=5, help="default: 5")
    demo.add_argument("--layers", type=_positive, default=4, help="default: 4")
    demo.add_argument("--seed", type=int, default=0, help="of weights, text and orders; default: 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit code."""
    from buffer_lifting.errors import LiftingError
    from buffer_lifting.targets import TargetError, first_line

    try:
        args = make_parser().parse_args(argv)
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
        expected = isinstance(error, UsageError | TargetError | LiftingError)
        if expected:
            text = " ".join(str(error).split())
        elif isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        else:
            text = f"{first_line(error)}{'' if args.debug else ' (--debug shows the traceback)'}"
        _error(sys.stderr, text)
        return COULD_NOT_CHECK


def _error(stream: TextIO, text: str) -> None:
    print(f"buffer-lifting: error: {text}", file=stream, flush=True)
