"""Diagnostics: what is wrong with a program, one record a finding, with a key that outlives edits of the source.

A record (of a ``.pt2`` file or an ExportedProgram) is scanned: every read that could be lifted and is not, every
read that cannot be, and every op that mixes the sequence is a finding. A lifted or staged program is scanned again
in its lifted form, and its shape is checked as well (``lifted_checks.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from buffer_lifting.errors import AxesError
from buffer_lifting.graph.record import GraphRecord, Location
from buffer_lifting.inspection.rules import Severity, check_prefixes, is_enabled, rule
from buffer_lifting.program import Axes, Finding, LiftedInput, PositionRead, ScanReport, SequenceMixing
from buffer_lifting.render import what_is_read

if TYPE_CHECKING:
    from buffer_lifting.lifted import LiftedProgram

Key = tuple[str, str, str, str, int]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding.

    Attributes:
        code, severity: of its rule.
        message: one line; ``hint`` is a way out, or empty.
        location: the innermost frame of the read (or op) outside torch; ``None`` when the graph has none.
        module, module_class: FQN and class of the module that the node was traced in; ``""`` is the root's FQN, and
            the class of a finding about a whole program.
        source: FQN of what is read, the op that makes it, or the lifted input; empty when the finding has no source.
        sources: all that the value is made from, sorted; empty when ``source`` is all.
        node, op: the node that reads, and its op; empty for a finding about a whole program.
        ordinal: counts, in the order of the graph, the findings that are equal in code, sources, module and op.
    """

    code: str
    severity: Severity
    message: str
    hint: str
    location: Location | None
    module: str
    module_class: str
    source: str
    node: str
    op: str
    ordinal: int = 0
    sources: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """``(code, sources, module, op, ordinal)``: no line and no node name is part of it."""
        return self.code, ", ".join(self.sources) or self.source, self.module, self.op, self.ordinal

    @property
    def fingerprint(self) -> str:
        """The key as 32 hexadecimal digits."""
        return hashlib.sha256("\0".join(map(str, self.key)).encode(errors="surrogatepass")).hexdigest()[:32]


def diagnostic(
    code: str,
    message: str,
    hint: str = "",
    location: Location | None = None,
    module: str = "",
    module_class: str = "",
    source: str = "",
    node: str = "",
    op: str = "",
) -> Diagnostic:
    """A diagnostic with its rule's severity, and ordinal 0."""
    return Diagnostic(code, rule(code).severity, message, hint, location, module, module_class, source, node, op)


def check(
    program: Any, select: Iterable[str] = (), ignore: Iterable[str] = (), *, axes: Axes | None = None
) -> tuple[Diagnostic, ...]:
    """The findings of a program, in the order of its graph.

    Args:
        program: an ExportedProgram (or ``fx.GraphModule``), a :class:`~buffer_lifting.LiftedProgram` or a
            :class:`~buffer_lifting.StagedProgram`. It is not modified.
        select: prefixes of the codes to report; none means all.
        ignore: prefixes of codes to leave out. Of two that match, the longer one decides.
        axes: as in :func:`buffer_lifting.scan`; only for a program that is not lifted.

    Raises:
        ValueError: a prefix that no code has, or ``axes`` for a lifted program.
        AxesError: ``axes`` does not fit the inputs.
        TypeError: none of these programs.
    """
    chosen, left_out = check_prefixes(select, "select"), check_prefixes(ignore, "ignore")
    return tuple(d for d in _all(program, axes) if is_enabled(d.code, chosen, left_out))


def check_record(record: GraphRecord, axes: Axes | None = None) -> tuple[Diagnostic, ...]:
    """The findings of a record. Imports no torch.

    Raises:
        AxesError: ``axes`` does not fit the inputs.
    """
    from buffer_lifting.scanner import scan_record

    return numbered(report_diagnostics(scan_record(record, axes).report))


def report_diagnostics(report: ScanReport) -> list[Diagnostic]:
    """The findings of a scan."""
    found = [_of_finding(item) for item in report.findings]
    found += [_of_read(read) for read in report.reads]
    return [*found, *(_of_mixing(mix) for mix in report.mixing if not mix.handled)]


def left_by_lifting(report: ScanReport, follows_slots: bool) -> list[Diagnostic]:
    """What lifting has left of a report: what it refused, and the causal flags until ``context_parallel``."""
    reads = [read for read in report.reads if read.refusal or (read.code == "BL004" and not follows_slots)]
    return report_diagnostics(ScanReport(tuple(reads), report.mixing, report.inputs, report.findings))


def numbered(found: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The same, with ordinals."""
    counts: dict[Any, int] = {}
    result = []
    for item in found:
        same = item.key[:-1]
        result.append(replace(item, ordinal=counts.setdefault(same, 0)))
        counts[same] += 1
    return tuple(result)


def _all(program: Any, axes: Axes | None) -> tuple[Diagnostic, ...]:
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    if isinstance(program, LiftedProgram | StagedProgram):
        if axes:
            raise ValueError("axes= is for a program that is not lifted; the axes of this one are known")
        from buffer_lifting.inspection.lifted_checks import shape_of_lifted, shape_of_staged

        if isinstance(program, StagedProgram):
            return _lifted(program.lifted, shape_of_staged(program))
        return _lifted(program, shape_of_lifted(program))
    from buffer_lifting.adapter import as_program
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize

    exported = as_program(program)
    return check_record(build_record(exported, normalize(exported, read_only=True).graph), axes)


def _lifted(lifted: LiftedProgram, shape: list[Diagnostic]) -> tuple[Diagnostic, ...]:
    return or_misplaced(lambda: _rescanned(lifted), shape)


def or_misplaced(
    rescanned: Callable[[], tuple[Diagnostic, ...]], shape: Sequence[Diagnostic]
) -> tuple[Diagnostic, ...]:
    """What a lifted graph still reads by position, and its shape.

    A lifted input whose batch is not first (BL302) contradicts the axes that the scan goes by: it is reported alone.
    """
    try:
        return numbered([*rescanned(), *shape])
    except AxesError:
        if not any(item.code == "BL302" for item in shape):
            raise
        return numbered(shape)


def _rescanned(lifted: LiftedProgram) -> tuple[Diagnostic, ...]:
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.context_parallel import lifted_axes
    from buffer_lifting.passes.normalize import normalize

    graph = normalize(lifted.program, read_only=True).graph
    found = check_record(build_record(lifted.program, graph), lifted_axes(lifted))
    return tuple(item for item in found if not gathers_natural(item, lifted.report, lifted.inputs))


def gathers_natural(item: Diagnostic, report: ScanReport, inputs: Sequence[LiftedInput]) -> bool:
    """Whether a finding of a lifted graph is of what lifting itself gathers from a value in natural order."""
    natural = {read.source for read in report.reads if read.form == "natural"}
    own = natural | {lifted.name for lifted in inputs} if natural else natural
    return item.code in ("BL005", "BL105") and item.source in own and item.node not in _refused(report)


def _refused(report: ScanReport) -> set[str]:
    return {read.node for read in report.reads if read.refusal}


def read_message(read: PositionRead) -> tuple[str, str]:
    """What a finding says of a read, and a way out."""
    what = what_is_read(read)
    if read.refusal:
        return f"cannot lift {what}: {read.refusal}", read.hint
    if read.code == "BL004":
        return f"{what} goes by the order of the slots", read.hint
    return f"{what} is read by position and is not lifted", read.hint or "buffer_lifting.lift handles it"


def mixing_message(mix: SequenceMixing) -> str:
    """What a finding says of an op that mixes the sequence."""
    return f"{mix.op} mixes the sequence ({mix.reason})"


def _of_read(read: PositionRead) -> Diagnostic:
    message, hint = read_message(read)
    module = read.modules[0] if read.modules else ""
    found = diagnostic(
        read.code, message, hint, read.location, module, read.module_class, read.source, read.node, read.op
    )
    return replace(found, sources=read.sources)


def _of_mixing(mix: SequenceMixing) -> Diagnostic:
    module = mix.modules[0] if mix.modules else ""
    message = mixing_message(mix)
    return diagnostic(mix.code, message, mix.hint, mix.location, module, mix.module_class, "", mix.node, mix.op)


def _of_finding(item: Finding) -> Diagnostic:
    return diagnostic(item.code, item.message, item.hint, item.location, source=item.source)
