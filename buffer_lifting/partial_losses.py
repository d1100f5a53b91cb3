"""What may be computed from a loss under context parallelism: a rank has its tokens' part of it, and parts are summed.

The parts of ranks are weighed by their tokens and added up (:class:`buffer_lifting.TokenLoss`), so the result has to
be a multiple of one reduction over all tokens. The root of a loss, its exponential, or the sum of two reductions that
count other tokens is something else on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.loss_chain import LOSSES
from buffer_lifting.ops import ASSERTIONS, content_operands
from buffer_lifting.plan import LiftPlan

_SAME = frozenset(
    f"aten.{name}"
    for line in [
        "neg to _to_copy type_as clone alias detach detach_ view reshape squeeze unsqueeze expand contiguous",
        "lift_fresh lift_fresh_copy",
    ]
    for name in line.split()
)
_MEAN, _SUM = 1, 2


def not_additive(record: GraphRecord, plan: LiftPlan) -> Iterator[tuple[Node, str, str]]:
    """``(node, why, hint)`` of everything made of a loss that the parts of the ranks do not add up to."""
    hint = "return the logits, or each loss by itself, and do this outside the model"
    losses = {mix.node for mix in plan.report.mixing if mix.handled and mix.reason.startswith("a loss")}
    roots: dict[str, frozenset[str]] = {}
    for node in record.nodes.values():
        if node.kind is not NodeKind.OP or node.base_op in ASSERTIONS:
            continue
        parts = [name for name in content_operands(node) if name in roots]
        if not parts:
            if node.name in losses:
                roots[node.name] = frozenset([node.name])
                if node.base_op in LOSSES and node.args.get("weight") is not None and node.args["reduction"] == _MEAN:
                    yield node, "its mean divides by the class weights of a rank's tokens", "use reduction='sum'"
            continue
        divided = node.name in losses and _is_multiple(node, roots)  # by a number of tokens of its own
        roots[node.name] = frozenset([node.name]) if divided else frozenset().union(*(roots[name] for name in parts))
        if len(roots[node.name]) > 1 and not all(_is_sum(record.nodes[name]) for name in roots[node.name]):
            yield node, "it adds up losses that count tokens of their own", hint
        elif not _is_multiple(node, roots):
            yield node, "it is computed from a loss, of which a rank has a part", hint


def _is_sum(node: Node) -> bool:
    """Whether a loss is a plain sum over tokens: the sums of the ranks add up, and so do several of them."""
    return node.base_op in ("aten.sum", "aten.nansum") or node.args.get("reduction") == _SUM


def _is_multiple(node: Node, roots: dict[str, frozenset[str]]) -> bool:
    """Whether the result is a multiple of the one loss among the operands."""
    refs = dict(node.named_refs())
    of_loss = [path for path, name in refs.items() if name in roots]
    if node.base_op in _SAME or node.op == "getitem":
        return True
    if node.base_op in ("aten.mul", "aten.multiply"):
        return len(of_loss) == 1
    if node.base_op in ("aten.div", "aten.divide", "aten.true_divide"):
        return of_loss == ["self"] and node.args.get("rounding_mode") is None
    if node.base_op in ("aten.add", "aten.sub", "aten.subtract"):
        return len(of_loss) == 2 or node.args.get("other") in (0, 0.0)
    return False
