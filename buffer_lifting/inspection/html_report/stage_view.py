"""The stages of a partition: what each receives and hands on, in bytes. Of saved stages without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from buffer_lifting.graph.record import GraphRecord, TensorMeta
from buffer_lifting.inspection.html_report.views import StageInput, StageView
from buffer_lifting.inspection.stage_files import SavedPartition
from buffer_lifting.layers import spans
from buffer_lifting.program import LiftedInput

if TYPE_CHECKING:
    from buffer_lifting.stages import StagedProgram

_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "half": 2, "bfloat16": 2}


def saved_stages(saved: SavedPartition) -> tuple[StageView, ...]:
    """Of a directory."""
    lifted = {item.name: item for item in saved.inputs}
    views = []
    before: int | None = None
    for stage in saved.stages:
        names = (*stage.plain.activations, *stage.kwargs)
        sizes = {stage.plain.activations[0]: before} if stage.plain.index and len(stage.plain.activations) == 1 else {}
        views.append(
            StageView(
                index=stage.plain.index,
                inputs=_inputs(names, stage.plain.activations if stage.plain.index else (), lifted, sizes),
                outputs=stage.plain.outputs,
                elements=stage.elements,
                modules=spans(stage.parameters),
                sends=stage.boundary_bytes,
            )
        )
        before = stage.boundary_bytes
    return tuple(views)


def staged_stages(staged: StagedProgram, record: GraphRecord) -> tuple[StageView, ...]:
    """Of a partition in memory; ``record`` is that of its lifted program."""
    from buffer_lifting.cost import tensor_bytes

    lifted = {item.name: item for item in staged.lifted.inputs}
    sizes: dict[str, int | None] = {}
    for name, node in record.nodes.items():
        if isinstance(node.meta, TensorMeta):
            sizes[name] = tensor_bytes(node.meta, record.hints)
    views = []
    for stage in staged.stages:
        names = (*stage.activations, *stage.kwargs)
        views.append(
            StageView(
                index=stage.index,
                inputs=_inputs(names, stage.activations if stage.index else (), lifted, sizes),
                outputs=stage.outputs,
                elements=sum(value.numel() for value in stage.module.parameters()),
                modules=spans(stage.parameters),
                sends=stage.boundary_bytes,
            )
        )
    return tuple(views)


def _inputs(
    names: Sequence[str], activations: Iterable[str], lifted: dict[str, LiftedInput], sizes: dict[str, int | None]
) -> tuple[StageInput, ...]:
    sent = set(activations)
    found = []
    for name in names:
        if name in sent:
            found.append(StageInput(name, "activation", sizes.get(name)))
        elif name in lifted:
            found.append(StageInput(name, "lifted", sizes.get(name), per_token(lifted[name])))
        else:
            found.append(StageInput(name, "user", sizes.get(name)))
    return tuple(found)


def per_token(item: LiftedInput) -> int | None:
    """Bytes of one row of a lifted input; ``None`` for a dtype that is not known here."""
    width = _BYTES.get(item.dtype)
    if width is None:
        digits = re.fullmatch(r"(?:float|int|uint|complex)(\d+)", item.dtype)
        width = int(digits[1]) // 8 if digits else None
    return None if width is None else width * prod(item.row_shape)
