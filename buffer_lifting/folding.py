"""Values per sample that meet data whose batch is folded with heads: ``[B * H, S, S]``."""

from __future__ import annotations

import math
from dataclasses import replace

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.graph.record import Node
from buffer_lifting.labels import BATCH, Labels, has_batch
from buffer_lifting.ops import MATRIX_PRODUCTS
from buffer_lifting.plan import Call, Plan, Refuse, Value
from buffer_lifting.reporting import Edge


def onto_folded_batch(edge: Edge, value: Value, results: tuple[Labels, ...] | None) -> tuple[Value, Alignment]:
    """The value with a dim for the heads, where it has a lane but no batch dim, and the consumer's is ``B * H``.

    ``results``: the labels of the consumer's results. A value ``[lane, S, S]`` becomes ``[lane, H, S, S]``, whose
    lane and heads are folded where it lands.

    Raises:
        Refuse: the batch is not the outermost part of the folded dim, or a part has no fixed size.
    """
    labels, batch = edge.alignment.labels, edge.alignment.batch_from_right
    if not value.lane or batch is None or not results or batch > len(results[0]) or any(map(has_batch, labels)):
        return value, edge.alignment
    folded = results[0][-batch]
    if len(folded) < 2 or not has_batch(folded):
        return value, edge.alignment
    anchor = edge.consumer.name
    sizes = [factor.size for factor in folded[1:] if isinstance(factor.size, int)]
    if folded[0].axis != BATCH or len(sizes) < len(folded) - 1:
        raise Refuse("the batch is folded behind another dim", anchor, hint="put the batch first in the model")
    heads = math.prod(sizes)
    rank = max(batch, len(labels))
    plan: Plan = value.plan
    for _ in range(rank - len(labels)):
        plan = Call("aten.unsqueeze.default", (plan, 1), edge.value.name)
    at = rank - batch
    plan = Call(
        "aten.expand.default", (plan, tuple(heads if d == at + 1 else -1 for d in range(rank + 1))), edge.value.name
    )
    wide: Labels = (*((),) * (rank - len(labels)), *labels)
    alignment = Alignment((*wide[:at], folded, *wide[at + 1 :]), batch)
    return replace(value, plan=plan, rank=rank), alignment


def batch_is_a_matrix_dim(node: Node, results: tuple[Labels, ...] | None) -> bool:
    """Whether a matrix product has the batch in its rows or columns, so that nothing can be given per sample."""
    return node.base_op in MATRIX_PRODUCTS and bool(results) and any(map(has_batch, results[0][-2:]))  # type: ignore[index]
