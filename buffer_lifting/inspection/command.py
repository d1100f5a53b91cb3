"""The commands ``rule``, ``check`` and ``report``: their arguments, and what they print where."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer_lifting.errors import LiftingError
from buffer_lifting.inspection.baseline import Enabled, Known, apply_baseline, read_baseline, updated, write_baseline
from buffer_lifting.inspection.config import FORMATS, CheckError, Config, Exemption, exemptions, find_config, split
from buffer_lifting.inspection.diagnostics import Diagnostic
from buffer_lifting.inspection.github_format import render_github
from buffer_lifting.inspection.json_format import render_json
from buffer_lifting.inspection.places import Places, printable, repository_root
from buffer_lifting.inspection.results import FINDINGS, CheckResult, Failure, Reported, Suppression
from buffer_lifting.inspection.rules import RULES, check_prefixes, is_enabled, rule, rule_page
from buffer_lifting.inspection.sarif_format import render_sarif
from buffer_lifting.inspection.text import render_text
from buffer_lifting.program import Axes
from buffer_lifting.terminal import emit, inert, inert_json, stdout_to_stderr

if TYPE_CHECKING:
    from buffer_lifting.inspection.html_report.build import Cut
    from buffer_lifting.inspection.html_report.views import ProgramView

ParseAxes = Callable[[list[str] | None], Axes | None]
Observe = Callable[[str, Any], None]
CHECK_HELP = """\
A TARGET is a .pt2 file, a .lifted file that `buffer-lifting lift` wrote, a directory that `buffer-lifting split` wrote,
a glob of these, or package.module:callable, whose callable returns an ExportedProgram, a LiftedProgram or a
StagedProgram.
A callable runs. Files are read without running anything from them, unless --trust is given: torch's loader runs code
that is in them. Use --trust only for files you trust.

settings: select, ignore, axes, format, baseline, exit-zero, statistics and suppress in [buffer_lifting] of the nearest
setup.cfg, up to the repository's root; the command line wins. A line of `suppress` is "CODE FQN-PATTERN: reason".

exit codes: 0 clean, 1 findings, 2 a target could not be checked (also when others were fine). Findings are on
stdout, everything else on stderr.
"""
REPORT_HELP = """\
A TARGET is what `check` takes; settings and suppressions are those of `check`. The page needs no network and no other
file.

A callable runs. Files are read without running anything from them, unless --trust is given: torch's loader runs code
that is in them. Stages of a file that has none (--num-stages, --split-points) need its tensors, and so --trust. Use
--trust only for files you trust.

exit codes: 0 clean, 1 findings, 2 could not check. The page is written in every case, if it can be.
"""


def _rule(args: argparse.Namespace) -> int:
    if args.all == bool(args.codes):
        raise CheckError("give one or more rule codes, or --all")
    entries = RULES.values() if args.all else [rule(code) for code in args.codes]
    print("\n\n".join(rule_page(entry) for entry in entries))
    return 0


def _check(args: argparse.Namespace) -> int:
    settings = _settings(args)
    name = args.format or settings.config.format or "text"
    views: list[ProgramView] = []
    result = _checked(args, settings, _observer(views, settings.axes) if name == "html" else None)
    statistics = settings.config.statistics if args.statistics is None else args.statistics
    text = _render(name, result, Places(settings.root), statistics, views)
    if text:
        emit(text)
    return _finished(args, settings, result)


def _report(args: argparse.Namespace) -> int:
    from buffer_lifting.inspection.html_report.build import Cut
    from buffer_lifting.inspection.html_report.page import render_html

    path = Path(args.output)
    if path.suffix not in (".html", ".htm"):
        raise CheckError(f"-o {args.output}: the name has to end in .html")
    settings = _settings(args)
    cut = None
    if args.num_stages or args.split_points:
        points = split(args.split_points) if args.split_points else None
        cut = Cut(args.num_stages, tuple(points) if points else None)
        _check_cut(args)
    views: list[ProgramView] = []
    result = _checked(args, settings, _observer(views, settings.axes, cut))
    path.write_text(render_html(result, Places(settings.root), views) + "\n", encoding="ascii")
    _log(f"wrote {path}")
    return _finished(args, settings, result)


def _check_cut(args: argparse.Namespace) -> None:
    """A file is split with its tensors, as by ``split``: it has to be trusted."""
    from buffer_lifting.inspection.targets import expand
    from buffer_lifting.targets import check_trusted

    for target in expand(args.targets)[0]:
        if target.endswith((".pt2", ".lifted")) and Path(target).is_file():
            check_trusted(Path(target), args.trust)


@dataclass(frozen=True)
class _Settings:
    """The command line over the configuration."""

    root: Path
    config: Config
    select: tuple[str, ...]
    ignore: tuple[str, ...]
    axes: Axes | None


def _settings(args: argparse.Namespace) -> _Settings:
    here = Path.cwd()
    root = repository_root(here)
    config = find_config(here, root)
    select = config.select if args.select is None else _codes(args.select, "--select")
    # --select asks for codes that the configuration may ignore: the command line wins
    given = () if args.select is not None else config.ignore
    ignore = given if args.ignore is None else _codes(args.ignore, "--ignore")
    axes = args.parse_axes(list(config.axes) if args.axes is None else args.axes)
    return _Settings(root, config, select, ignore, axes)


def _checked(args: argparse.Namespace, settings: _Settings, observe: Observe | None) -> CheckResult:
    """Checks the targets, with the baseline; failures and warnings go to stderr."""
    config, select, ignore = settings.config, settings.select, settings.ignore
    baseline = _baseline(args, config)
    known = read_baseline(baseline) if baseline and (baseline.exists() or not args.update_baseline) else {}
    result = run(
        args.targets, settings.axes, select, ignore, config, args.debug, observe, args.trust, args.axes is None
    )
    if baseline is not None:
        enabled = partial(is_enabled, select=select, ignore=ignore)
        result = _with_baseline(result, baseline, known, settings.root, enabled, args)
    for failure in result.failures:
        _log(f"error: {failure.code} {failure.message}")
    for warning in result.warnings:
        _log(f"warning: {warning}")
    return result


def _finished(args: argparse.Namespace, settings: _Settings, result: CheckResult) -> int:
    """The last line, and the exit code."""
    _log(_summary(result))
    exit_zero = settings.config.exit_zero if args.exit_zero is None else args.exit_zero
    return 0 if exit_zero and result.exit_code == FINDINGS else result.exit_code


def _observer(views: list[ProgramView], axes: Axes | None, cut: Cut | None = None) -> Observe:
    """Adds the view of every target that could be read; what is missing of one is a warning."""
    from buffer_lifting.inspection.html_report.build import view_of

    def observe(target: str, subject: Any) -> None:
        with stdout_to_stderr():
            view = view_of(target, subject, axes, cut)
        views.append(view)
        if view.problem or view.unsplit:
            _log(f"warning: {target}: {view.problem or view.unsplit}")

    return observe


def _baseline(args: argparse.Namespace, config: Config) -> Path | None:
    """The file; that of the configuration is relative to the configuration."""
    if args.baseline is not None:
        return Path(args.baseline)
    if config.baseline is not None:
        return config.directory / config.baseline
    if args.update_baseline:
        raise CheckError("--update-baseline needs --baseline FILE, or a baseline in setup.cfg")
    return None


def _with_baseline(
    result: CheckResult, path: Path, known: Known, root: Path, enabled: Enabled, args: argparse.Namespace
) -> CheckResult:
    if args.update_baseline:
        known = updated(result, known, root, enabled)
        write_baseline(path, known)
        _log(f"wrote {path}: {_count(sum(map(len, known.values())), 'known finding')}")
    return apply_baseline(result, known, root, enabled)


def _render(name: str, result: CheckResult, places: Places, statistics: bool, views: Sequence[ProgramView] = ()) -> str:
    """The findings in a format; the statistics that a format has no room for go to stderr."""
    if name == "text":
        return inert(render_text(result, places, statistics))
    if name == "html":
        from buffer_lifting.inspection.html_report.page import render_html

        return render_html(result, places, views)
    if statistics and name != "json":
        for code, count in result.statistics.items():
            _log(f"{count} {code} {RULES[code].message}")
    if name == "github":
        return render_github(result, places)
    return inert_json({"json": render_json, "sarif": render_sarif}[name](result, places))


def run(
    patterns: list[str],
    axes: Axes | None,
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    config: Config,
    debug: bool = False,
    observe: Observe | None = None,
    trust: bool = False,
    general_axes: bool = False,
) -> CheckResult:
    """Checks all targets. One that cannot be checked is a failure, and the others are checked still.

    ``observe`` is given each target that could be read, and what it holds; ``trust`` and ``general_axes`` are those of
    :func:`buffer_lifting.inspection.targets.check_target`.
    """
    from buffer_lifting.inspection.targets import check_target, expand
    from buffer_lifting.targets import TargetError, first_line

    targets, unmatched = expand(patterns)
    failures = [Failure(pattern, f"{pattern}: {reason}") for pattern, reason in unmatched]
    reported: list[Reported] = []
    used: set[Exemption] = set()
    for target in targets:
        try:
            found = check_target(target, axes, observe and partial(observe, target), trust, general_axes)
        except Exception as error:
            if debug:
                traceback.print_exc()
            expected = isinstance(error, TargetError | LiftingError)
            text = " ".join(str(error).split()) if expected else f"it crashed the check ({first_line(error)})"
            failures.append(Failure(target, text if text.startswith(target) else f"{target}: {text}"))
            continue
        for item in found:
            if is_enabled(item.code, select, ignore):
                reported.append(_suppressed(target, item, config, used))
    failed = {failure.target for failure in failures}
    warnings = []
    if not failed and not select and not ignore:
        warnings = [
            f"setup.cfg: suppress: '{entry}' matches no finding" for entry in config.suppress if entry not in used
        ]
    return CheckResult(tuple(targets), tuple(reported), tuple(failures), tuple(warnings))


def _suppressed(target: str, item: Diagnostic, config: Config, used: set[Exemption]) -> Reported:
    covering = exemptions(config.suppress, item)
    used.update(covering)
    reason = "; ".join(dict.fromkeys(entry.reason for entry in covering))
    return Reported(target, item, Suppression("configuration", reason) if covering else None)


def _codes(texts: list[str], what: str) -> tuple[str, ...]:
    return check_prefixes([code for text in texts for code in split(text) or [text]], what)


def _summary(result: CheckResult) -> str:
    failed = {failure.target for failure in result.failures}
    checked = sum(target not in failed for target in result.targets)
    parts = [f"{_count(len(result.findings), 'finding')} in {_count(checked, 'target')}"]
    suppressed = len(result.reported) - len(result.findings)
    if suppressed:
        parts.append(f"{suppressed} suppressed")
    if failed:
        parts.append(f"{_count(len(failed), 'target')} not checked")
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _log(text: str) -> None:
    print(inert(f"buffer-lifting: {printable(text)}"), file=sys.stderr, flush=True)


def _add_choice(sub: argparse.ArgumentParser) -> None:
    """The arguments that say which findings count."""
    codes: dict[str, Any] = {"action": "append", "metavar": "CODES"}
    sub.add_argument("--select", **codes, help="only the codes that begin so, as in BL0,BL101 (repeatable)")
    sub.add_argument("--ignore", **codes, help="not the codes that begin so; the longer prefix wins (repeatable)")
    sub.add_argument("--baseline", metavar="FILE", help="findings that are known: they do not count, new ones do")
    sub.add_argument("--exit-zero", action=argparse.BooleanOptionalAction, help="exit with 0 on findings")


def add_commands(
    commands: Any,
    common: argparse.ArgumentParser,
    axes: argparse.ArgumentParser,
    trusted: argparse.ArgumentParser,
    parse_axes: ParseAxes,
    positive: Callable[[str], int],
) -> None:
    """Adds ``check``, ``report`` and ``rule`` to the subparsers; the other parsers have arguments that are shared."""
    sub = commands.add_parser(
        "check",
        help="check programs in CI: findings by rule codes",
        description="Check programs: what is read by position and not lifted, what cannot be, and what breaks stages.",
        epilog=CHECK_HELP,
        parents=[common, axes, trusted],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("targets", nargs="+", metavar="TARGET", help="what to check; see below")
    _add_choice(sub)
    sub.add_argument("--update-baseline", action="store_true", help="write the findings to the baseline")
    sub.add_argument("--format", choices=FORMATS, help="default: text; docs/CHECK.md describes json and html")
    sub.add_argument("--statistics", action=argparse.BooleanOptionalAction, help="count the findings of each code")
    sub.set_defaults(run=_check, parse_axes=parse_axes)

    sub = commands.add_parser(
        "report",
        help="write a page to open in a browser: findings, graph, stages",
        description="Check programs and write one self-contained HTML page: findings, reads as pictures, stages.",
        epilog=REPORT_HELP,
        parents=[common, axes, trusted],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("targets", nargs="+", metavar="TARGET", help="what to show; see below")
    sub.add_argument("-o", "--output", metavar="REPORT.html", required=True, help="the file to write")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--num-stages", type=positive, metavar="N", help="show the program split into N stages")
    how.add_argument("--split-points", metavar="A,B", help="or into stages that begin at these modules (FQNs)")
    _add_choice(sub)
    sub.set_defaults(run=_report, parse_axes=parse_axes, update_baseline=False)

    sub = commands.add_parser(
        "rule",
        help="explain a rule code",
        description="Print the page of a rule: severity, message, help, a bad and a good example.",
        parents=[common],
    )
    sub.add_argument("codes", nargs="*", metavar="CODE", help="as in BL001")
    sub.add_argument("--all", action="store_true", help="every rule")
    sub.set_defaults(run=_rule)
