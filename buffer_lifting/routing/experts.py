"""What happens along the expert dim, and the weights that routed rows meet: counts, grouped products, one-hots."""

from __future__ import annotations

from buffer_lifting.axis_rules import Alignment, AxisResult, OpView
from buffer_lifting.graph.record import Node, Ref
from buffer_lifting.labels import ROW, Factor, Labels, broadcast, feature, features, is_labelled
from buffer_lifting.ops import FILLS
from buffer_lifting.routing.engine import Routing, exact, operand, plain, replaced, rule
from buffer_lifting.routing.facts import Count, Counts, Distinct, Hot, Rows, Single, has_routed, is_routed


def along_experts(view: OpView, routing: Routing) -> AxisResult | None:
    """A scatter along a dim that runs over neither batch nor sequence, by indices that run over all tokens."""
    node, shape = view.node, view.shape("self")
    sources = [path for path in ("self", "index", "src") if operand(node, path) is not None]
    if shape is None or operand(node, "value") is not None:
        return None
    dim = view.dim("dim", len(shape))
    parts: list[Labels] = []
    for path in sources:
        labels, own = view.labels(path), view.shape(path)
        if own is None or len(own) != len(shape):
            return None
        if any(a != b for d, (a, b) in enumerate(zip(own, shape, strict=True)) if d != dim):
            return None
        if labels is not None:
            if is_labelled(labels[dim]):
                return None
            parts.append(replaced(labels, dim, ()))
    out = broadcast(parts, shape)
    if out is None:
        return None
    out = replaced(out, dim, feature(shape[dim]))
    operands = {path: Alignment(out, None) for path in sources}
    name = str(operand(node, "self"))
    fill = view.record.nodes[name]
    consumed = frozenset(["self"] if fill.base_op in FILLS and not routing.stale(name) else [])
    _hot_by_scatter(routing, node, fill, dim, shape[dim])
    return AxisResult((out,), operands, consumed=consumed)


def _hot_by_scatter(routing: Routing, node: Node, fill: Node, dim: int, number: object) -> None:
    index = operand(node, "index")
    distinct = routing.fact(index, Distinct)
    if index is None or distinct is None or distinct.dim != dim or not isinstance(number, int):
        return
    if node.args.get("reduce") is not None:
        return
    zero = fill.base_op.startswith("aten.zeros") or fill.base_op == "aten.new_zeros"
    root = routing.root(index)
    if zero and not routing.stale(fill.name) and node.args.get("value") in (1, True) and root is not None:
        routing.learn(node.name, Hot(root, number, dim, True))


@rule("one_hot")
def _one_hot(routing: Routing, view: OpView) -> AxisResult | None:
    labels, name, shape = view.labels("self"), operand(view.node, "self"), view.shape("out")
    number = view.node.args.get("num_classes")
    if labels is None or name is None or shape is None or not isinstance(number, int) or number < 1:
        return None
    root, distinct = routing.root(name), routing.fact(name, Distinct)
    if root is not None:
        routing.learn(view.node.name, Hot(root, number, len(labels), True))
    along = {len(labels)} | ({distinct.dim} if distinct else set())
    routing.learn(view.node.name, Single(frozenset(along)))
    return AxisResult(((*labels, feature(number)),))


@rule("repeat_interleave", "repeat")
def _copies(routing: Routing, view: OpView) -> AxisResult | None:
    """Each token several times: next to each other, or all tokens after one another."""
    node, labels, shape = view.node, view.labels("self"), view.shape("out")
    if labels is None or shape is None or has_routed(labels):
        return None
    if node.base_op == "aten.repeat_interleave":
        times, dim = node.args.get("repeats"), node.args.get("dim")
        if node.op != "aten.repeat_interleave.self_int" or not isinstance(times, int) or not isinstance(dim, int):
            return None
        dim %= len(labels)
        new = (*labels[dim], *feature(times)) if is_labelled(labels[dim]) else feature(shape[dim])
        return AxisResult((replaced(labels, dim, new),))
    counts = node.args.get("repeats")
    if not isinstance(counts, tuple) or len(counts) != len(labels) or not all(isinstance(n, int) for n in counts):
        return None
    out = [
        (*feature(int(times)), *label) if is_labelled(label) else feature(size)  # type: ignore[arg-type]
        for times, label, size in zip(counts, labels, shape, strict=True)
    ]
    return AxisResult((tuple(out),))


# -- counts ----------------------------------------------------------------------------------------------------


@rule("histc", "bincount")
def _count(routing: Routing, view: OpView) -> AxisResult | None:
    node, labels, name, shape = view.node, view.labels("self"), operand(view.node, "self"), view.shape("out")
    if labels is None or plain(labels) or name is None or shape is None:
        return None
    why = f"{node.base_op} counts over all tokens"
    if node.base_op == "aten.histc":
        number, low, high = node.args.get("bins", 100), node.args.get("min", 0), node.args.get("max", 0)
        if low != 0 or not isinstance(number, int) or high not in (number - 1, number):
            return AxisResult((features(shape),), mixing=why)
    else:
        number = node.args.get("minlength", 0)
        if node.args.get("weights") is not None:
            return AxisResult((features(shape),), mixing=why)
    root, bound, meta = routing.root(name), routing.bound(name), view.record.nodes[name].tensor
    if root is None or bound is None or meta is None or not exact(meta):
        return AxisResult((features(shape),), mixing=f"{why}, and what it counts is not known to be expert ids")
    if not isinstance(number, int) or bound > number:
        return AxisResult((features(shape),), mixing=f"{why}, with fewer bins than experts")
    routing.learn(node.name, Counts(root, number))
    return AxisResult((features(shape),))


@rule("sum")
def _count_hot(routing: Routing, view: OpView) -> AxisResult | None:
    name, labels, out = operand(view.node, "self"), view.labels("self"), view.node.tensor
    hot = routing.fact(name, Hot)
    if hot is None or labels is None or out is None or name is None:
        return None
    dims = summed(view, len(labels))
    kept = [d for d in range(len(labels)) if d not in dims]
    if kept != [hot.dim] or plain(labels) or view.node.args.get("keepdim") or not exact(out):
        return None
    routing.learn(view.node.name, Counts(hot.key, hot.number))
    return AxisResult((features(out.shape),))


def summed(view: OpView, rank: int) -> set[int]:
    """The dims of a reduction."""
    dims = view.node.args.get("dim")
    if isinstance(dims, int):
        return {dims % rank}
    if isinstance(dims, tuple) and dims:
        return {d % rank for d in dims if isinstance(d, int)}
    return set(range(rank))


# -- products --------------------------------------------------------------------------------------------------


@rule("_grouped_mm", "transformers.grouped_mm_fallback.default")
def _grouped(routing: Routing, view: OpView) -> AxisResult | None:
    """Rows sorted by expert, each times the weight of its own expert."""
    node = view.node
    rows_path, weight_path = ("input", "weight") if "input" in node.args else ("self", "mat2")
    labels, weight, shape = view.labels(rows_path), view.shape(weight_path), view.shape("out")
    offsets = routing.fact(operand(node, "offs"), Counts)
    if labels is None or weight is None or shape is None or node.args.get("bias") is not None:
        return None
    why = "a grouped product whose groups are not known to be the rows of one expert each"
    rows = _rows(routing, labels)
    if rows is None or len(labels) != 2 or len(weight) != 3 or view.labels(weight_path) is not None:
        return AxisResult(None, mixing=why)
    if offsets is None or not offsets.offsets or not rows.key or offsets.key != rows.key:
        return AxisResult(None, mixing=why)
    if weight[0] != offsets.number or not plain((labels[1],)):
        return AxisResult(None, mixing=why)
    routing.consume(operand(node, "offs"))
    out = (rows.label, feature(shape[1]))
    return AxisResult((out,), {weight_path: Alignment(features(weight), None)})


def _rows(routing: Routing, labels: Labels) -> Rows | None:
    """The sorted rows that the first dim runs over, whole."""
    rows = routing.sorts.get(labels[0][0].axis) if labels and labels[0] else None
    return rows if rows is not None and labels[0] == rows.label else None


@rule("split_with_sizes", "split")
def _split(routing: Routing, view: OpView) -> AxisResult | None:
    """Sorted rows cut by their counts: each part is the rows of one expert."""
    node, labels, shapes = view.node, view.labels("self"), view.shapes_out()
    sizes = node.args.get("split_sizes", node.args.get("split_size"))
    if labels is None or not isinstance(sizes, tuple) or view.dim("dim", len(labels)) != 0:
        return None
    rows = _rows(routing, labels)
    names = [size.name if isinstance(size, Ref) else None for size in sizes]
    counts = [routing.fact(name, Count) for name in names]
    if rows is None or not rows.key:
        return None
    for place, count in enumerate(counts):
        if count is None or (count.key, count.number, count.place) != (rows.key, len(sizes), place):
            return None
    routing.consume(*names)
    routing.parts[rows.axis] = len(sizes)
    parts = [(Factor(f"{rows.axis}#{place}", ROW, shape[0]),) for place, shape in enumerate(shapes)]
    return AxisResult(tuple((part, *labels[1:]) for part in parts))


@rule("cat", "concat", "concatenate")
def _join(routing: Routing, view: OpView) -> AxisResult | None:
    """The parts of all experts, in order: the sorted rows again."""
    parts = [view.labels(path) for path, _ in view.tensors()]
    known = [part for part in parts if part]
    if not known or len(known) != len(parts) or not is_routed(known[0][0]) or len(known[0][0]) != 1:
        return None
    axis, _, first = known[0][0][0].axis.partition("#")
    rows = routing.sorts.get(axis)
    if not first or rows is None or view.dim("dim", len(known[0])) != 0:
        return None
    for place, part in enumerate(known):
        if len(part[0]) != 1 or part[0][0].axis != f"{axis}#{place}" or part[1:] != known[0][1:]:
            return None
    if len(known) != routing.parts.get(axis):
        return None
    return AxisResult(((rows.label, *known[0][1:]),))
