"""Rules for the collectives of a context-parallel program: what the ranks hold together."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import AxisResult, OpView, align, rule
from buffer_lifting.graph.sizes import multiply
from buffer_lifting.labels import COL, DimLabel, features


@rule("_c10d_functional_autograd.all_gather_into_tensor.default")
def _gather(view: OpView) -> AxisResult:
    """The rows of every rank, along dim 0, are the keys of all ranks."""
    labels, ranks = view.labels("input"), view.node.args.get("group_size")
    if labels is None or not isinstance(ranks, int):
        return AxisResult(None)
    keys: DimLabel = tuple(
        f._replace(role=COL, size=multiply(f.size, ranks)) if f.is_seq else f for f in (labels[0] if labels else ())
    )
    if len(keys) != 1 or not keys[0].is_seq:
        return AxisResult(None, mixing="what is gathered does not run along the sequence")
    return AxisResult(((keys, *labels[1:]),), mixing="attention: keys are gathered from all ranks", handled=True)


@rule("_c10d_functional_autograd.all_to_all_single.default")
def _exchange(view: OpView) -> AxisResult:
    """Heads for rows: the sizes tell what is along the sequence."""
    if view.labels("input") is None:
        return AxisResult(None)
    return AxisResult(None, mixing="attention: heads are exchanged for rows", handled=True)


@rule("_c10d_functional.wait_tensor.default")
def _wait(view: OpView) -> AxisResult:
    labels = view.labels("tensor")
    return AxisResult(None if labels is None else (labels,))


@rule("buffer_lifting.ring_attention.default")
def _ring(view: OpView) -> AxisResult:
    """Queries of this rank, keys of all ranks; the slots say where the rows stand."""
    query = view.labels("query")
    if query is None or len(query) != 4:
        return AxisResult(None, mixing="attention whose queries are not known to follow the sequence")
    operands = {}
    slots = view.shape("slots")
    if slots is not None:
        operands["slots"] = align((query[0], query[2]), slots)
    rng = features((0,))
    return AxisResult((query, query[:3], rng, rng), operands, "attention: keys go round a ring", True)
