"""The data of a page as plain JSON: the check's document, and what the pictures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from buffer_lifting.inspection.html_report.views import ProgramView, ReadGroup
from buffer_lifting.inspection.json_format import document
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult

VERSION = 1


def page_data(result: CheckResult, places: Places, views: Sequence[ProgramView]) -> dict[str, Any]:
    """``check`` is the document of ``--format json``; ``programs`` has the reads, lifted inputs and stages."""
    return {
        "version": VERSION,
        "check": document(result, places),
        "programs": [_program(view, places) for view in views],
    }


def _program(view: ProgramView, places: Places) -> dict[str, Any]:
    return {
        "target": view.target,
        "kind": view.kind,
        "nodes": view.nodes,
        "inputs": [
            {**asdict(axes), "seq_dims": [{"dim": d, "axis": a, "role": r} for d, a, r in axes.seq_dims]}
            for axes in view.inputs
        ],
        "lifted": [asdict(item) for item in view.lifted],
        "reads": [_group(group, places) for group in view.groups],
        "stages": [asdict(stage) for stage in view.stages],
        "tied": {fqn: list(stages) for fqn, stages in view.tied.items()},
        "notes": list(view.notes),
        "problem": view.problem or view.unsplit or None,
    }


def _group(group: ReadGroup, places: Places) -> dict[str, Any]:
    place = None if group.location is None else places.at(group.location)
    return {
        "id": group.id,
        "code": group.code or None,
        "title": group.title,
        "hint": group.hint,
        "status": group.status,
        "source": group.source,
        "source_kind": group.source_kind,
        "also": list(group.also),
        "consumer": group.consumer,
        "location": place and {"path": place.path, "line": place.line, "inside": place.inside, "code": place.source},
        "members": [asdict(item) for item in group.members],
        "inputs": list(group.inputs),
    }
