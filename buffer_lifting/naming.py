"""Names of lifted inputs, and which feed program makes each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from buffer_lifting.axes import SEQ
from buffer_lifting.graph.record import GraphRecord, NodeKind, StateKind
from buffer_lifting.labels import COL
from buffer_lifting.ops import content_operands
from buffer_lifting.plan import Cut, CutKey
from buffer_lifting.program import FeedOutput, Form, LiftedInput, Stream

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner

#: Names that a schedule's ``step`` keeps for itself, and Python's own.
RESERVED = frozenset({"self", "args", "kwargs", "target", "losses", "return_outputs", "loss_kwargs"})


def name_outputs(planner: Planner, record: GraphRecord) -> tuple[dict[CutKey, FeedOutput], dict[str, str]]:
    """One :class:`FeedOutput` a cut, in order of first use, and the iota nodes that stand for position ids, by axis.

    An iota stands for position ids if it reaches a one-axis read. A value in a two-axis read that is computed from
    such an iota by an op that mixes the sequence (document ids) is evaluated from the position ids. An iota that is
    read along several axes has the axis ``""``: which axis's ids it stands for is not known.
    """
    taken = set(record.nodes) | RESERVED
    pairs = planner.position_iotas | {
        (name, cut.key.axis)
        for cut in planner.cuts.values()
        if cut.one_axis_read
        for name in cut.ancestors
        if record.nodes[name].base_op == "aten.arange"
    }
    position_iotas: dict[str, str] = {}
    for name, axis in sorted(pairs):
        position_iotas[name] = "" if name in position_iotas else axis
    outputs = {}
    for key, cut in planner.cuts.items():
        name = _wanted(planner, record, cut)
        if name in taken and key.axis != SEQ:
            name = f"{name}_{key.axis}"
        name = _unique(name, taken)
        taken.add(name)
        program: Literal["iota", "natural", "substituted", "hoisted"] = "natural"
        if cut.node is None:
            program = "iota"
        elif cut.hoisted:
            program = "hoisted"
        elif cut.mixes and not cut.ancestors.isdisjoint(position_iotas):
            program = "substituted"
        form: Form = "positions" if cut.node is None else "values"
        stream: Stream = "inputs" if cut.hoisted else ("slots" if key.stream == "slots" else "positions")
        lifted = LiftedInput(
            name=name,
            form=form,
            stream=stream,
            role=key.role,
            source=_source(planner, cut),
            dtype=cut.dtype,
            row_shape=cut.row_shape,
            axis=key.axis,
            batched=planner.inputs.batch is not None,
        )
        node = cut.node.name if cut.node else ""
        outputs[key] = FeedOutput(lifted, program, node, cut.seq_dim, cut.batch_dim, cut.drop_dims)
    return outputs, position_iotas


def _source(planner: Planner, cut: Cut) -> str:
    if cut.node is None:
        return "aten.arange"
    return planner.source_of(cut.node.name)[1]


def _wanted(planner: Planner, record: GraphRecord, cut: Cut) -> str:
    suffix = "_keys" if cut.key.role == COL else ""
    if cut.node is None:
        axis = "" if cut.key.axis == SEQ else f"{cut.key.axis}_"
        return f"lifted_{axis}{cut.key.stream}{suffix}"
    states = [record.nodes[name] for name in sorted(cut.ancestors) if record.nodes[name].kind is NodeKind.STATE]
    states.sort(key=lambda node: node.state_kind is StateKind.PARAMETER)
    if states:
        base = states[0].fqn
    elif cut.hoisted:
        base = "_".join(sorted(record.nodes[n].fqn for n in contents_read(record, cut)))
    else:
        base = cut.node.name
    return f"lifted_{re.sub(r'[^0-9a-zA-Z_]', '_', base)}{suffix}"


def contents_read(record: GraphRecord, cut: Cut) -> list[str]:
    """The user inputs whose contents, not only sizes, a hoisted value is computed from."""
    read = {
        name
        for ancestor in cut.ancestors
        for name in content_operands(record.nodes[ancestor])
        if record.nodes[name].kind is NodeKind.INPUT
    }
    assert cut.node is not None
    return sorted(read or {cut.node.name})


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    index = 1
    while f"{name}_{index}" in taken:
        index += 1
    return f"{name}_{index}"
