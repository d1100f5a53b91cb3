"""The pattern classes of biases and masks, and of the cumsums in them."""

from __future__ import annotations

from collections.abc import Iterator

from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, StateKind, TensorMeta
from buffer_lifting.labels import COL
from buffer_lifting.ops import INDICES, is_view

from .facts import (
    DIVISIONS,
    LOOKUPS,
    ORDERS,
    PRODUCTS,
    STATIC,
    SUMS,
    WAVES,
    WRITES,
    Facts,
    is_float,
    is_positions,
)


def relative(facts: Facts) -> bool:
    """A lookup by an index that varies along rows and columns."""
    return any(any(facts.spans(index) > 1 for index in indices) for _, _, indices in facts.lookups())


def alibi(facts: Facts) -> bool:
    """Scores plus positions times one slope a head: a product of an index and of something without rows."""
    for trail in facts.trails:
        if not trail.keys or trail.has(*WAVES) or not is_float(trail.value):
            continue
        for node in trail.nodes:
            names = [name for name in node.refs() if facts.record.nodes[name].tensor]
            if node.base_op not in PRODUCTS or len(names) != 2 or not is_float(node):
                continue
            rows = [facts.from_index(name) and facts.spans(facts.record.nodes[name]) > 0 for name in names]
            slopes = [name for name, row in zip(names, rows, strict=True) if not row]
            if len(slopes) == 1 and _numel(facts.record.nodes[slopes[0]]) != 1:
                return True
    return False


def _numel(node: Node) -> int:
    return sum(size != 1 for size in node.tensor.shape) + 1 if node.tensor else 1


def _comparisons(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is compared of rows and columns in a chain or in a body of flex attention: each side, as ``_side`` says."""
    distances = (index for _, _, indices in facts.lookups() for index in indices if facts.spans(index) > 1)
    buckets = {name for index in distances for name in facts.above(index.name)}
    for trail in facts.trails:
        for node in trail.nodes if trail.keys else ():
            if node.name in buckets:
                continue
            if node.base_op in (*ORDERS, "aten.eq"):
                left, right = facts.operand(node, "self"), facts.operand(node, "other")
                ends = [_side(facts, end) if end is not None else "number" for end in (left, right)]
                if all(ends) and (facts.spans(node) > 1 or "number" in ends):
                    yield ends[0] + node.base_op[4:], ends[1]
            elif node.base_op in ("aten.tril", "aten.triu"):
                diagonal = node.args.get("diagonal", 0)
                yield ("shifted" if isinstance(diagonal, int) and abs(diagonal) > 1 else "index") + "lt", "index"
    for plan in facts.plan.flex:
        for body in plan.bodies:
            yield from _body_comparisons(facts.record.bodies[body.body], {body.indices["q"], body.indices["kv"]})


def _body_comparisons(body: GraphRecord, ends: set[str]) -> Iterator[tuple[str, str]]:
    """The same of one body of flex attention, whose rows and columns are the placeholders ``ends``."""
    sides: dict[str, str] = {}
    for node in body.nodes.values():
        above = [sides[name] for name in node.refs() if name in sides]
        if node.base_op in ORDERS and len(above) == 2:
            yield above[0] + node.base_op[4:], above[1]
        elif node.base_op in ORDERS and above == ["distance"]:
            yield "distance" + node.base_op[4:], "number"
        elif node.name in ends:
            sides[node.name] = "index"
        elif node.base_op in SUMS and above:
            moved = "shifted" if node.args.get("other") != 0 else above[0]
            sides[node.name] = "distance" if len(above) > 1 else moved
        elif above and (is_view(node) or node.base_op in LOOKUPS):
            sides[node.name] = above[0]


def _side(facts: Facts, node: Node) -> str:
    """``"index"`` (rows or columns as they are), ``"shifted"``, ``"chunk"``, ``"distance"``; ``""`` if none of them."""
    found = "index"
    while True:
        if node.base_op in INDICES or (node.kind is NodeKind.INPUT and is_positions(node)):
            return found
        if node.base_op in SUMS:
            left, right = facts.operand(node, "self"), facts.operand(node, "other")
            if left is not None and right is not None and left.tensor and right.tensor:
                if facts.spans(node) > 1:
                    return "distance"
                ends = [end for end in (left, right) if facts.spans(end)]
                if len(ends) != 1:
                    return ""
                node = ends[0]
                continue
            number = node.args.get("other")
            if number != 0 and not isinstance(number, Ref):
                found = "shifted"
        elif node.base_op in DIVISIONS:
            found = "chunk"
        elif node.base_op in LOOKUPS:  # position ids at an index
            if facts.is_table(facts.operand(node, "self", "weight"), *StateKind):
                return ""
        elif not is_view(node) and node.base_op not in ("aten.repeat", "aten.abs", "aten.neg"):
            return ""
        above = facts.operand(node, "self", "input")
        if above is None:
            return ""
        node = above


def causal(facts: Facts) -> bool:
    """Rows and columns are compared as they are; or their distance with zero."""
    pairs = set(_comparisons(facts))
    orders = {(left, right) for left, right in pairs if not left.endswith("eq")}
    return any(left.startswith("index") and right == "index" for left, right in orders)


def window(facts: Facts) -> bool:
    """Rows and columns are compared a number apart, or by chunks; or a mask's rows are written one by one."""
    for left, right in _comparisons(facts):
        if left.startswith(("shifted", "chunk")) or right in ("shifted", "chunk"):
            return True
        if left.startswith("distance") and right == "number" and not left.endswith("eq"):
            return True
    rows = min((length for length in facts.lengths if isinstance(length, int)), default=0)
    writes = (sum(node.op.partition(".")[2].startswith(WRITES) for node in trail.nodes) for trail in facts.trails)
    return bool(rows) and any(count >= rows for count in writes)


def _is_documents(facts: Facts, cumsum: Node) -> bool:
    """Whether a cumsum counts the places where two neighbours differ by something else than one."""
    nodes = list(facts.chain(cumsum.name))
    neighbours = any(node.base_op in ("aten.diff", "aten.ne") for node in nodes)
    return neighbours and any(node.base_op in ("aten.diff", "aten.sub") for node in nodes)


def _sums(facts: Facts) -> Iterator[Node]:
    seen: set[str] = set()
    for trail in facts.trails:
        for node in trail.nodes:
            if node.base_op == "aten.cumsum" and node.name not in seen:
                seen.add(node.name)
                yield node


def documents(facts: Facts) -> bool:
    return any(_is_documents(facts, node) for node in _sums(facts))


def cumsum_ones(facts: Facts) -> bool:
    return any(not _is_documents(facts, n) and Dep.USER not in facts.deps[n.name] for n in _sums(facts))


def cumsum_data(facts: Facts) -> bool:
    """A hoisted cumsum that is no document detection (in the chain of a read, or of a lookup that is one)."""
    return any(not _is_documents(facts, n) and Dep.USER in facts.deps[n.name] for n in _sums(facts))


def padding(facts: Facts) -> bool:
    """Keys read a user's input, other than through the detection of documents; or the input itself is for keys."""
    ids = {node.name for node in facts.record.inputs() if is_positions(node)}
    if any(role == COL for axes in facts.plan.report.inputs if len(axes.seq_dims) == 1 for *_, role in axes.seq_dims):
        return True
    users = {node.name for node in facts.record.inputs()} - ids
    return any(trail.keys and any(node.name in users for node in trail.nodes) for trail in facts.trails)


def mask_table(facts: Facts) -> bool:
    """Rows and columns of one buffer: a square table, not of indices."""
    for trail in facts.trails:
        for node in trail.nodes if trail.keys else ():
            meta = node.tensor
            if facts.is_table(node, *STATIC) and isinstance(meta, TensorMeta) and meta.dtype != "int64":
                sizes = [size for size in meta.shape if size != 1]
                if len(sizes) != len(set(sizes)):
                    return True
    return False
