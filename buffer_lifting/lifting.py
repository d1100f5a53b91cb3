"""The public :func:`scan` and :func:`lift`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from buffer_lifting.adapter import as_program
from buffer_lifting.analysis import analyse_program
from buffer_lifting.axes import label_inputs
from buffer_lifting.collecting import uncollected
from buffer_lifting.errors import AxesError, FeedError, UnsupportedReadError
from buffer_lifting.feed import FeedProgram
from buffer_lifting.feed_graph import extract
from buffer_lifting.graph.from_fx import Recorded
from buffer_lifting.graph.record import GraphRecord, NodeKind
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.passes.assemble import assemble
from buffer_lifting.passes.lift_buffers import LiftBuffers, LiftState
from buffer_lifting.passes.normalize import Normalized
from buffer_lifting.passes.undo_shift import undo_shifts_in
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes, Finding, PositionRead, ScanReport, SequenceMixing
from buffer_lifting.scanner import FormOption
from buffer_lifting.table_limits import table_limits
from buffer_lifting.tables import lack_values, on_meta


@uncollected
def scan(program: ExportedProgram | GraphModule, axes: Axes | None = None) -> ScanReport:
    """Finds every read by sequence position, every op that mixes the sequence, and the axes of the user inputs.

    Args:
        program: a fresh ExportedProgram, or an ``fx.GraphModule`` with ``get_attr`` state whose nodes have
            ``meta["val"]``. It is not modified.
        axes: input name -> dim -> ``"batch"``, ``"seq"`` (any name), ``"seq:row"`` or ``"seq:col"``; inputs that
            are not named are inferred. Axes of different names are different sequences, with lengths and orders of
            their own (an encoder-decoder: ``{"input_ids": {0: "batch", 1: "enc"}, "decoder_input_ids": {0: "batch",
            1: "dec"}}``). Inference calls the main input's ``"seq"``, and one that a further input of tokens or
            hidden states opens after that input (``"decoder"`` for ``decoder_input_ids``); an input that is named
            with its batch dim only has no sequence.

    Returns:
        The report. Ambiguity and everything unknown is a finding in it.

    Raises:
        AxesError: ``axes`` does not fit the program's inputs.
        TypeError: not a program.
    """
    program = as_program(program)
    return analyse_program(program, axes)[2].report


@uncollected
def lift(
    program: ExportedProgram | GraphModule,
    axes: Axes | None = None,
    form: FormOption = "auto",
    strict: bool = True,
) -> LiftedProgram:
    """Lifts every read by sequence position to a placeholder with a batch-broadcast node.

    Args:
        program: as in :func:`scan`. It is not modified, and shares its parameters and buffers with the result.
        axes: as in :func:`scan`.
        form: ``"values"`` (rows of the table), ``"positions"`` (an int64 index; the table stays in the graph),
            ``"auto"``, or a mapping from source FQN globs to one of them.
        strict: refuse when the report has a read, an op or a finding that cannot be handled. Otherwise those
            reads are left as they are: they are wrong under a reordered or sharded sequence.

    Raises:
        AxesError: no user input has a sequence axis, or the axes are ambiguous.
        UnsupportedReadError: ``strict`` and something cannot be lifted; the message names node, source and line.
        ValueError: an unknown form.
        TypeError: not a program.
    """
    program = as_program(program)
    normalized, record, plan = analyse_program(program, axes, form, read_only=False)
    check_report(plan.report, strict)
    recorded = None if record.renamed or plan.shifts else Recorded(normalized.graph, record)
    undo_shifts_in(normalized.graph, plan.shifts)
    feed = feed_program(program, normalized, record, plan, axes)
    state = LiftState(normalized.graph, plan, normalized.submodules)
    LiftBuffers()(state)
    lifted_inputs = tuple(output.input for output in plan.outputs.values())
    try:
        examples = _example_feed(program, feed, plan)
    except FeedError as error:
        node = record.nodes.get(error.node)
        where = f" [{node.location}]" if node is not None and node.location else ""
        way = "make it alike for all samples in the model, or give it as an input"
        raise UnsupportedReadError(f"BL105 {error}{where} -> {way}") from error
    lifted = assemble(program, normalized.graph, normalized.submodules, tuple(i.name for i in lifted_inputs), examples)
    return LiftedProgram(lifted, lifted_inputs, plan.report, feed, _routed=plan.routed, _recorded=recorded)


def check_report(report: ScanReport, strict: bool) -> None:
    axes_findings = [f for f in report.findings if f.code in ("BL103", "BL106", "BL107")]
    if axes_findings and (strict or not report.inputs):
        raise AxesError("\n".join(describe(finding) for finding in axes_findings))
    if strict and report.refused:
        lines = [describe(item) for item in report.refused]
        head = f"{len(lines)} read(s) or op(s) cannot be lifted:"
        raise UnsupportedReadError("\n".join([head, *lines[:20], *(["..."] if len(lines) > 20 else [])]))


def describe(item: PositionRead | SequenceMixing | Finding) -> str:
    """One line for a person: code, node, source, reason, line, way out."""
    where = f" [{item.location}]" if item.location else ""
    hint = f" -> {item.hint}" if item.hint else ""
    if isinstance(item, PositionRead):
        reason = item.refusal or f"{item.form} on the {item.stream} stream"
        return f"  {item.code} node {item.node!r} reads {item.source!r} ({item.source_kind}): {reason}{where}{hint}"
    if isinstance(item, SequenceMixing):
        return f"  {item.code} node {item.node!r} ({item.op}): {item.reason}{where}{hint}"
    return f"  {item.code} {item.message}{where}{hint}"


def feed_program(
    program: ExportedProgram, normalized: Normalized, record: GraphRecord, plan: LiftPlan, axes: Axes | None
) -> FeedProgram:
    """The feed program of a plan, captured before the graph is edited."""
    outputs = tuple(plan.outputs.values())
    states = {node.name: node.fqn for node in record.nodes.values() if node.kind is NodeKind.STATE}
    by_kind: dict[str, list[str]] = {"natural": [], "substituted": [], "hoisted": []}
    for output in outputs:
        if output.program != "iota" and output.node not in by_kind[output.program]:
            by_kind[output.program].append(output.node)
    tensors: dict[str, Any] = {**program.constants, **program.state_dict}
    device = torch.device("cpu") if lack_values(tensors) else None
    graphs = {
        "natural": extract(normalized.graph, by_kind["natural"], states, {}, device),
        "substituted": extract(normalized.graph, by_kind["substituted"], states, plan.substituted, device),
        "hoisted": extract(normalized.graph, by_kind["hoisted"], states, plan.substituted, device),
    }
    used = {fqn for graph in graphs.values() if graph for fqn in graph.states.values()}
    labels = label_inputs(record, axes)
    info = labels.info()
    shapes: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {}
    for node in normalized.graph.nodes:
        if node.op == "placeholder" and node.name not in states:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                shapes[node.name] = (
                    tuple(s if isinstance(s, int) else None for s in value.shape),
                    value.dtype,
                )
    return FeedProgram(
        outputs=outputs,
        axes=info,
        input_axes=plan.input_axes,
        input_shapes=shapes,
        state={fqn: on_meta(tensors[fqn], {}).detach() for fqn in sorted(used)},
        natural=graphs["natural"],
        substituted=graphs["substituted"],
        hoisted=graphs["hoisted"],
        max_lengths=_max_lengths(record, labels.lengths),
        table_limits=table_limits(record, labels.lengths),
    )


def _max_lengths(record: GraphRecord, lengths: Mapping[str, Any]) -> dict[str, int]:
    maxima = {}
    for axis, size in lengths.items():
        upper = record.ranges.get(str(size), (0, None))[1]
        if upper is not None:
            maxima[axis] = upper
    return maxima


def _example_feed(program: ExportedProgram, feed: FeedProgram, plan: LiftPlan) -> dict[str, torch.Tensor] | None:
    """Tensors for the lifted inputs that go with the program's example inputs: without values if those have none."""
    from buffer_lifting.examples import example_sizes, examples_without_values

    sizes = example_sizes(program, plan.input_axes)
    if sizes is None or lack_values(feed.state):
        return examples_without_values(program, plan.input_axes, [output.input for output in plan.outputs.values()])
    from buffer_lifting.streams import axis_streams

    batch, lengths, inputs = sizes
    result = feed.feed(batch, lengths, inputs, axis_streams(batch, lengths), None)
    return {name: value.contiguous() for name, value in result.items()}
