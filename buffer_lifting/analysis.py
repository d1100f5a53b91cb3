"""The analysis of the last program that was scanned, kept while nothing of the program changes.

``lift`` behind ``scan`` asks for the same again. What the analysis reads is compared, object by object: a program that
was edited in between is analysed anew.
"""

from __future__ import annotations

import copy
import operator
import weakref
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from buffer_lifting.graph.from_fx import StateTable, build_record
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.passes.normalize import Normalized, normalize
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes
from buffer_lifting.scanner import FormOption, scan_record


class _Snapshot:
    """What an analysis depends on. It holds what it compares by identity, so that no other object gets its address."""

    def __init__(self, program: ExportedProgram, axes: Axes | None, form: FormOption) -> None:
        self.options = copy.deepcopy((axes, form))
        self.states: StateTable | None = StateTable(program)
        self.plain = (repr(program.range_constraints), repr(program.graph_signature), self.states.summary())
        self.objects = objects = list[Any]()
        for module in program.graph_module.modules():
            if isinstance(module, GraphModule):
                for node in module.graph.nodes:
                    of_meta = node.meta.get
                    objects += (
                        node,
                        node.name,
                        node.target,
                        node.args,
                        node.kwargs,
                        of_meta("val"),
                        of_meta("nn_module_stack"),
                        of_meta("stack_trace"),
                    )
        self.objects.append(program.example_inputs)
        self.objects += [*program.state_dict.values(), *program.constants.values()]

    def same(self, other: _Snapshot) -> bool:
        return (
            self.options == other.options
            and self.plain == other.plain
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


@dataclass
class _Kept:
    program: weakref.ref[ExportedProgram]
    snapshot: _Snapshot
    record: GraphRecord
    plan: LiftPlan
    copy: Normalized | None  # a graph of its own, for the first who edits it


_last: _Kept | None = None


def analyse_program(
    program: ExportedProgram, axes: Axes | None = None, form: FormOption = "auto", read_only: bool = True
) -> tuple[Normalized, GraphRecord, LiftPlan]:
    """The program in normal form (as :func:`normalize` makes it), its record, and the plan of its scan.

    Record and plan are shared with other callers: not to be edited.

    Raises:
        AxesError, ValueError: as :func:`buffer_lifting.scanner.scan_record`.
    """
    global _last
    snapshot, kept = _Snapshot(program, axes, form), _last
    if kept is not None and kept.program() is program and kept.snapshot.same(snapshot):
        normalized, kept.copy = None if read_only else kept.copy, kept.copy if read_only else None
        return normalized or normalize(program, read_only), kept.record, kept.plan
    normalized = normalize(program, read_only)
    record = build_record(program, normalized.graph, snapshot.states)
    snapshot.states = None
    plan = scan_record(record, axes, form)
    own = read_only and normalized.graph is not program.graph
    _last = _Kept(weakref.ref(program, _forget), snapshot, record, plan, normalized if own else None)
    return normalized, record, plan


def forget() -> None:
    """Drops what is kept: the next scan is that of a program that was never analysed."""
    global _last
    _last = None


def _forget(dead: Any) -> None:
    global _last
    if _last is not None and _last.program is dead:
        _last = None
