"""The outline of a program: its axes, reads, mixing ops, lifted inputs and stage boundaries, by keys that last.

A key has FQNs, module paths, ops and ordinals, never a node's name, a line or a path of a machine: outlines of two
versions of a model can be compared (``diff.py``), and an outline can be kept as a file (``outline_text.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from buffer_lifting.boundaries import BoundaryTensor
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.layers import spans
from buffer_lifting.program import (
    Axes,
    AxesInfo,
    InputAxes,
    LiftedInput,
    PositionRead,
    ScanReport,
    SequenceMixing,
)

if TYPE_CHECKING:
    from buffer_lifting.inspection.stage_files import SavedPartition

Section = Literal["axes", "reads", "mixing", "findings", "lifted_inputs", "stages", "boundaries"]
SECTIONS: tuple[Section, ...] = ("axes", "reads", "mixing", "findings", "lifted_inputs", "stages", "boundaries")
_COMMUTATIVE = ("aten.add.Tensor", "aten.mul.Tensor")
NOT_RECORDED = "not recorded"  # a boundary of a partition that an older version saved


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that an outline says.

    Attributes:
        section: what it is about.
        key: names and values that tell it from the others of its section; the last is its ordinal.
        facts: what is compared.
        note: a text for a person (why a read is refused), which is not compared.
    """

    section: Section
    key: tuple[tuple[str, str | int], ...]
    facts: tuple[tuple[str, str], ...]
    note: str = ""

    def named(self, name: str) -> str:
        """A part of the key as text; empty if it is not there."""
        return str(dict(self.key).get(name, ""))


@dataclass(frozen=True, slots=True)
class Outline:
    """What :func:`outline` returns; ``staged`` tells whether there are stages."""

    entries: tuple[Entry, ...]
    staged: bool = False

    def of(self, section: Section) -> tuple[Entry, ...]:
        """The entries of a section, in order."""
        return tuple(entry for entry in self.entries if entry.section == section)


def outline(program: Any, axes: Axes | None = None) -> Outline:
    """The outline of a program.

    Args:
        program: an ExportedProgram (or ``fx.GraphModule``), a :class:`~buffer_lifting.LiftedProgram` or a
            :class:`~buffer_lifting.StagedProgram`. It is not modified.
        axes: as in :func:`buffer_lifting.scan`; only for a program that is not lifted.

    Raises:
        ValueError: ``axes`` for a lifted program.
        AxesError: ``axes`` does not fit the inputs.
        TypeError: none of these programs.
    """
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    if isinstance(program, LiftedProgram | StagedProgram):
        if axes:
            raise ValueError("axes= is for a program that is not lifted; the axes of this one are known")
        lifted = program.lifted if isinstance(program, StagedProgram) else program
        entries = _program(lifted.report, lifted.inputs, lifted.input_axes.values(), lifted.axes)
        if isinstance(program, LiftedProgram):
            return Outline(entries)
        stages = [(stage.kwargs, stage.output_shapes, stage.parameters) for stage in program.stages]
        return Outline((*entries, *_stages(stages)), staged=True)
    from buffer_lifting.adapter import as_program
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize

    exported = as_program(program)
    return outline_record(build_record(exported, normalize(exported, read_only=True).graph), axes)


def outline_record(record: GraphRecord, axes: Axes | None = None) -> Outline:
    """The outline of a record: the lifted inputs are those that lifting would add. Imports no torch.

    Raises:
        AxesError: ``axes`` does not fit the inputs.
    """
    from buffer_lifting.axes import label_inputs
    from buffer_lifting.scanner import scan_record

    plan = scan_record(record, axes)
    info = label_inputs(record, axes).info()
    inputs = [output.input for output in plan.outputs.values()]
    return Outline(_program(plan.report, inputs, plan.report.inputs, info))


def outline_saved(
    report: ScanReport, inputs: Sequence[LiftedInput], input_axes: Mapping[str, InputAxes], axes: AxesInfo
) -> Outline:
    """The outline of a saved lifted program."""
    return Outline(_program(report, inputs, input_axes.values(), axes))


def outline_partition(saved: SavedPartition) -> Outline:
    """The outline of a saved partition."""
    entries = outline_saved(saved.report, saved.inputs, saved.input_axes, saved.axes).entries
    stages = [(stage.kwargs, stage.outputs, stage.parameters) for stage in saved.stages]
    return Outline((*entries, *_stages(stages)), staged=True)


def _program(
    report: ScanReport, inputs: Iterable[LiftedInput], input_axes: Iterable[InputAxes], axes: AxesInfo
) -> tuple[Entry, ...]:
    entries = [*_axes(input_axes, axes), *map(_read, report.reads), *map(_mixing, report.mixing)]
    entries += [
        Entry("findings", (("code", item.code), ("source", item.source)), (("message", item.message),))
        for item in report.findings
    ]
    return _numbered([*entries, *map(_lifted_input, inputs)])


def _axes(input_axes: Iterable[InputAxes], axes: AxesInfo) -> list[Entry]:
    sizes = {"batch": axes.batch} if axes.has_batch else {}
    entries = [
        Entry("axes", (("axis", name),), (("size", "dynamic" if size is None else str(size)),))
        for name, size in {**sizes, **axes.lengths}.items()
    ]
    for own in input_axes:
        dims = {} if own.batch_dim is None else {own.batch_dim: "batch"}
        dims |= {dim: axis if role == "row" else f"{axis}:{role}" for dim, axis, role in own.seq_dims}
        text = ", ".join(dims.get(dim, "-") for dim in range(own.rank))
        entries.append(Entry("axes", (("input", own.name),), (("dims", f"[{text}]"),)))
    return entries


def _read(read: PositionRead) -> Entry:
    module = read.modules[0] if read.modules else ""
    dims = ", ".join(f"{dim}={axis}:{role}" for dim, axis, role in read.seq_dims)
    facts = (
        ("code", read.code),
        ("kind", read.source_kind),
        ("operand", "either" if read.op in _COMMUTATIVE else read.operand),
        ("lifted as", "refused" if read.refusal or read.form is None else read.form),
        ("stream", read.stream),
        ("dims", f"[{dims}]"),
        ("value", read.expression or NOT_RECORDED),
    )
    return Entry("reads", (("source", read.source), ("module", module), ("op", read.op)), facts, read.refusal or "")


def _mixing(mix: SequenceMixing) -> Entry:
    module = mix.modules[0] if mix.modules else ""
    facts = (("code", mix.code), ("handled", "yes" if mix.handled else "no"))
    return Entry("mixing", (("module", module), ("op", mix.op)), facts, mix.reason)


def _lifted_input(item: LiftedInput) -> Entry:
    key = (("source", item.source), ("stream", item.stream), ("axis", item.axis), ("role", item.role))
    return Entry("lifted_inputs", key, (("name", item.name), ("form", item.form), ("tensor", tensor_text(item))))


def tensor_text(item: LiftedInput) -> str:
    """Dtype and shape of a lifted input: ``float32[batch, seq, 64]``; ``seq_all``: all slots, which keys need."""
    dims = ["batch"] * item.batched + [item.axis if item.role == "row" else f"{item.axis}_all"]
    return f"{item.dtype}[{', '.join([*dims, *map(str, item.row_shape)])}]"


def _stages(
    stages: Sequence[tuple[Sequence[str], Sequence[BoundaryTensor] | None, Sequence[str]]],
) -> tuple[Entry, ...]:
    entries = []
    for index, (kwargs, sends, parameters) in enumerate(stages):
        held = f"{len(parameters)} of {', '.join(spans(parameters))}" if parameters else "none"
        facts = (("keyword inputs", ", ".join(kwargs) or "none"), ("parameters", held))
        entries.append(Entry("stages", (("stage", index),), facts))
        if index == len(stages) - 1:
            continue
        boundary = f"{index} -> {index + 1}"
        if sends is None:
            key = (("boundary", boundary), ("module", ""), ("op", ""))
            entries.append(Entry("boundaries", key, (("tensor", NOT_RECORDED),)))
        for sent in sends or ():
            key = (("boundary", boundary), ("module", sent.module), ("op", sent.op))
            entries.append(Entry("boundaries", key, (("tensor", str(sent)),)))
    return _numbered(entries)


def _numbered(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The same, with ordinals, which count the entries of equal keys."""
    counts: dict[object, int] = {}
    numbered = []
    for entry in entries:
        same = (entry.section, entry.key)
        ordinal = counts.get(same, 0)
        counts[same] = ordinal + 1
        numbered.append(replace(entry, key=(*entry.key, ("ordinal", ordinal))))
    return tuple(numbered)
