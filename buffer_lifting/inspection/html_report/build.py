"""Makes the view of whatever a target holds. What cannot be shown is said on the page, and stops no check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.inspection.html_report.lifted_view import lifted_groups
from buffer_lifting.inspection.html_report.reads import program_view
from buffer_lifting.inspection.html_report.stage_view import saved_stages, staged_stages
from buffer_lifting.inspection.html_report.views import ProgramView
from buffer_lifting.inspection.lifted_checks import PlainNode, plain_graph
from buffer_lifting.inspection.lifted_file import LiftedFile, SavedLifted
from buffer_lifting.inspection.stage_files import SavedPartition
from buffer_lifting.inspection.targets import Scanned
from buffer_lifting.program import Axes
from buffer_lifting.targets import first_line

if TYPE_CHECKING:
    from buffer_lifting.lifted import LiftedProgram

_NO_CHAINS = (
    "A lifted program does not hold the chains that its inputs replaced: what is shown of them is what its lift "
    "reported."
)
_NO_SIZES = (
    "Saved stages do not hold the sizes of the example inputs: of a lifted input the bytes of one token are known, "
    "of an edge the total."
)


@dataclass(frozen=True)
class Cut:
    """How a program is to be split for its report: exactly one of the two is given."""

    num_stages: int | None = None
    split_points: tuple[str, ...] | None = None


def view_of(target: str, subject: Any, axes: Axes | None = None, cut: Cut | None = None) -> ProgramView:
    """The view of a target.

    Args:
        target: its name.
        subject: a :class:`Scanned`, a :class:`LiftedFile`, a :class:`SavedPartition`, or a program: exported, lifted or
            staged.
        axes: of a program that is not lifted.
        cut: lift and split a program that has no stages; not for what was read from a file without its tensors.
    """
    try:
        view = _view(target, subject, axes)
    except Exception as error:
        return ProgramView(target, "not shown", problem=f"it cannot be drawn ({first_line(error)})")
    return view if cut is None or view.stages else _split(view, subject, axes, cut)


def _view(target: str, subject: Any, axes: Axes | None) -> ProgramView:
    if isinstance(subject, Scanned):
        return program_view(target, subject.record, subject.plan)
    if isinstance(subject, SavedPartition):
        return _saved(target, subject)
    if isinstance(subject, LiftedFile):
        return _lifted(target, subject.saved, subject.nodes())
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    if isinstance(subject, StagedProgram):
        view = _lifted(target, subject.lifted, _nodes(subject.lifted))
        stages = staged_stages(subject, _record(subject.lifted.program))
        return replace(view, kind="stages", stages=stages, tied=dict(subject.tied))
    if isinstance(subject, LiftedProgram):
        return _lifted(target, subject, _nodes(subject))
    from buffer_lifting.adapter import as_program
    from buffer_lifting.scanner import scan_record

    record = _record(as_program(subject))
    return program_view(target, record, scan_record(record, axes))


def _record(program: Any) -> GraphRecord:
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize

    return build_record(program, normalize(program, read_only=True).graph)


def _nodes(lifted: LiftedProgram) -> tuple[PlainNode, ...]:
    return plain_graph(lifted.program.graph.nodes)


def _lifted(target: str, lifted: LiftedProgram | SavedLifted, nodes: tuple[PlainNode, ...]) -> ProgramView:
    return ProgramView(
        target=target,
        kind="lifted program",
        nodes=len(nodes),
        inputs=tuple(lifted.input_axes.values()),
        lifted=lifted.inputs,
        groups=lifted_groups(lifted.report, lifted.inputs, [nodes], lifted.cp_size is not None),
        notes=(_NO_CHAINS,),
    )


def _saved(target: str, saved: SavedPartition) -> ProgramView:
    graphs = [stage.plain.nodes for stage in saved.stages]
    return ProgramView(
        target=target,
        kind="stages",
        nodes=sum(map(len, graphs)),
        inputs=saved.report.inputs,
        lifted=saved.inputs,
        groups=lifted_groups(saved.report, saved.inputs, graphs, saved.follows_slots),
        stages=saved_stages(saved),
        tied=saved.tied,
        notes=(_NO_CHAINS, _NO_SIZES),
    )


def _split(view: ProgramView, subject: Any, axes: Axes | None, cut: Cut) -> ProgramView:
    """The view with the stages that `buffer-lifting split` would make, or with the reason why it would make none."""
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.lifting import lift
    from buffer_lifting.partitioner import partition

    try:
        lifted = subject if isinstance(subject, LiftedProgram) else lift(subject, axes)
        staged = partition(lifted, cut.num_stages, cut.split_points)
        stages = staged_stages(staged, _record(lifted.program))
    except LiftingError as error:
        return replace(view, unsplit=f"it cannot be split: {str(error).splitlines()[0].rstrip(':')}")
    except Exception as error:
        return replace(view, unsplit=f"its split crashed ({first_line(error)})")
    return replace(view, stages=stages, tied=dict(staged.tied))
