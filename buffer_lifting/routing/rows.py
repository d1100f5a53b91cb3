"""Where routed rows begin and end: sorts, selections, gathers by their indices, and the ways back."""

from __future__ import annotations

from buffer_lifting.axis_rules import Alignment, AxisResult, OpView
from buffer_lifting.axis_rules.core import as_it_is
from buffer_lifting.graph.record import Node, Ref
from buffer_lifting.graph.sizes import Size, product
from buffer_lifting.labels import DimLabel, Labels, features, is_labelled
from buffer_lifting.ops import FILLS
from buffer_lifting.routing.engine import Routing, exact, operand, plain, replaced, rule
from buffer_lifting.routing.experts import along_experts
from buffer_lifting.routing.facts import PREFIX, Columns, Index, Inverse, Place, Rows, Single, has_routed, is_routed

_EMPTY = frozenset(["aten.empty", "aten.empty_like", "aten.new_empty"])
_NOT_BACK = "rows do not go back by the index that fetched them"


@rule("sort", "argsort")
def _sort(routing: Routing, view: OpView) -> AxisResult | None:
    """A sort of all tokens (or token copies) at once, by any key."""
    node, labels, shapes = view.node, view.labels("self"), view.shapes_out()
    if labels is None or len(labels) != 1 or not is_labelled(labels[0]) or not shapes:
        return None
    source, argsort = operand(node, "self"), node.base_op == "aten.argsort"
    assert source is not None
    ascending = node.args.get("descending") in (False, None)
    if is_routed(labels[0]):
        index = routing.fact(source, Index)
        if index is None or index.column != 0 or not index.rows.complete or not ascending:
            return AxisResult(None, mixing="rows that data ordered are ordered again")
        routing.consume(source)
        back = (index.rows.sources[0],)
        if argsort:
            routing.learn(node.name, Inverse(index.rows))
        else:
            routing.several[node.name] = [{Place: Place()}, {Inverse: Inverse(index.rows)}]
        return AxisResult((back,) * len(shapes))
    root = routing.root(source)
    meta = routing.record.nodes[source].tensor
    key = root if root is not None and ascending and meta is not None and exact(meta) else ""
    rows = Rows(PREFIX + node.name, node.name, (labels[0],), shapes[0][0], True, key=key)
    routing.sorts[rows.axis] = rows
    index = Index(rows, labels[0], 0)
    if argsort:
        routing.learn(node.name, index)
    else:
        routing.several[node.name] = [{}, {Index: index}]
        if root is not None:
            routing.roots[node.name] = root
    return AxisResult(((rows.label,),) * len(shapes))


@rule("nonzero", "nonzero_numpy", "where")
def _select(routing: Routing, view: OpView) -> AxisResult | None:
    """The places where a mask over tokens is on."""
    node, path = view.node, "condition" if view.node.base_op == "aten.where" else "self"
    if node.op.startswith("aten.where.") and node.op != "aten.where.default":
        return None
    labels, mask = view.labels(path), operand(node, path)
    if labels is None or mask is None or plain(labels):
        return None
    if has_routed(labels) or routing.stale(mask):
        return AxisResult(None, mixing="a selection among rows that data ordered")
    rows = _rows_of_mask(routing, view, mask, labels)
    if node.base_op == "aten.nonzero":
        routing.learn(node.name, Columns(rows))
        return AxisResult(((rows.label, ()),))
    routing.several[node.name] = [
        {Index: Index(rows, label, place)} if is_labelled(label) else {} for place, label in enumerate(labels)
    ]
    return AxisResult(((rows.label,),) * len(labels))


def _rows_of_mask(routing: Routing, view: OpView, mask: str, labels: Labels) -> Rows:
    single = routing.fact(mask, Single)
    return routing.selection(mask, labels, single.dims if single else frozenset(), view)


# -- gathers --------------------------------------------------------------------------------------------------


def _positions(node: Node) -> list[tuple[int, str]] | None:
    """The indexed dims and the indices' nodes; ``None`` where one is no node."""
    indices = node.args.get("indices")
    if not isinstance(indices, tuple) or not all(i is None or isinstance(i, Ref) for i in indices):
        return None
    return [(dim, i.name) for dim, i in enumerate(indices) if isinstance(i, Ref)]


def _is_mask(routing: Routing, name: str) -> bool:
    meta = routing.record.nodes[name].tensor
    return meta is not None and meta.dtype in ("bool", "uint8")


def _mask_place(routing: Routing, view: OpView, labels: Labels) -> tuple[Rows, int, int] | None:
    """Rows of ``x[mask]``, the mask's first dim in ``x`` and its rank; ``None`` if the mask is not over its tokens."""
    places = _positions(view.node)
    if not places or len(places) != 1:
        return None
    dim, mask = places[0]
    own = view.labels(f"indices.{dim}")
    if own is None or not _is_mask(routing, mask) or routing.stale(mask):
        return None
    if labels[dim : dim + len(own)] != own or plain(own) or has_routed(own):
        return None
    if not plain((*labels[:dim], *labels[dim + len(own) :])):
        return None
    return _rows_of_mask(routing, view, mask, own), dim, len(own)


def _whole_place(routing: Routing, places: list[tuple[int, str]], labels: Labels, view: OpView) -> Rows | None:
    """The rows that the indices of all batch and sequence dims belong to; ``None`` if they are no such indices."""
    rows: Rows | None = None
    columns: set[int] = set()
    found: list[str] = []
    for dim, name in places:
        own = view.labels(f"indices.{dim}")
        if not is_labelled(labels[dim]):
            continue
        index = routing.fact(name, Index)
        if index is None or index.label != labels[dim] or own != (index.rows.label,):
            return None
        if rows is not None and index.rows is not rows:
            return None
        rows = index.rows
        found.append(name)
        if index.column is not None:
            columns.add(index.column)
        elif len(rows.sources) > 1:
            return None
    if rows is None:
        return None
    indexed = {dim for dim, _ in places}
    if any(is_labelled(label) for dim, label in enumerate(labels) if dim not in indexed):
        return None
    if len(rows.sources) > 1 and any(is_labelled(s) and c not in columns for c, s in enumerate(rows.sources)):
        return None
    if any(view.labels(f"indices.{dim}") != (rows.label,) for dim, _ in places):
        return None
    routing.consume(*found)
    return rows


@rule("index")
def _index(routing: Routing, view: OpView) -> AxisResult | None:
    labels, shape, places = view.labels("self"), view.shape("self"), _positions(view.node)
    if shape is None or not places:
        return None
    table = view.record.nodes[str(operand(view.node, "self"))]
    fill = labels is None and table.base_op in FILLS and not routing.stale(table.name)
    if any(_is_mask(routing, name) for _, name in places):
        own = view.labels(f"indices.{places[0][0]}")
        known = labels
        if fill and own is not None:  # the same value everywhere: its dims are the mask's
            head, tail = shape[: places[0][0]], shape[places[0][0] + len(own) :]
            known = (*features(head), *own, *features(tail))
        masked = _mask_place(routing, view, known) if known is not None else None
        if masked is None or known is None:
            return None
        rows, dim, rank = masked
        out = (*known[:dim], rows.label, *known[dim + rank :])
        consumed = frozenset(["self"] if fill else [])
        return AxisResult((out,), {"self": Alignment(known, None)}, consumed=consumed)
    dims = [dim for dim, _ in places]
    if dims != list(range(dims[0], dims[-1] + 1)):
        return None
    indices = [view.labels(f"indices.{dim}") for dim in dims]
    first = indices[0]
    if fill and first is not None:
        if any(index != first for index in indices):
            return None
        routing.consume(*(name for _, name in places))
        out = (*features(shape[: dims[0]]), *first, *features(shape[dims[-1] + 1 :]))
        return AxisResult((out,), consumed=frozenset(["self"]))
    if labels is None or plain(labels):
        if first is None or any(index != first for index in indices):
            return None
        out = (*features(shape[: dims[0]]), *first, *features(shape[dims[-1] + 1 :]))
        aligned = {f"indices.{dim}": as_it_is(first) for dim in dims}
        return AxisResult((out,), {"self": Alignment(features(shape), None), **aligned})
    if len(places) == 1 and is_routed(labels[dims[0]]):
        return _undone(routing, view, places[0], labels)
    found = _whole_place(routing, places, labels, view)
    if found is None:
        return None
    out = (*labels[: dims[0]], found.label, *labels[dims[-1] + 1 :])
    return AxisResult((out,), {"self": Alignment(labels, None)})


def _undone(routing: Routing, view: OpView, place: tuple[int, str], labels: Labels) -> AxisResult | None:
    """Routed rows indexed by the inverse of their order."""
    dim, name = place
    back, own = routing.fact(name, Inverse), view.labels(f"indices.{dim}")
    if back is None or own is None or labels[dim] != back.rows.label:
        return None
    if not plain((*labels[:dim], *labels[dim + 1 :])) or not _covers(own, back.rows):
        return None
    routing.consume(name)
    routing.leave(back.rows)
    return AxisResult(((*labels[:dim], *own, *labels[dim + 1 :]),))


def _covers(own: Labels, rows: Rows) -> bool:
    """Whether dims, in order, are the places of the rows."""
    return tuple(f for dim in own for f in dim if f.axis) == tuple(f for f in rows.sources[0] if f.axis) and product(
        f.size for dim in own for f in dim
    ) == product(f.size for f in rows.sources[0])


@rule("gather", "index_select")
def _gather(routing: Routing, view: OpView) -> AxisResult | None:
    node, labels, shape = view.node, view.labels("self"), view.shape("self")
    index, own, wide = operand(node, "index"), view.labels("index"), view.shape("index")
    if labels is None or shape is None or own is None or wide is None:
        return None
    dim = view.dim("dim", len(labels))
    if not is_labelled(labels[dim]) or not plain((*labels[:dim], *labels[dim + 1 :])):
        return None
    at = dim if node.base_op == "aten.gather" else 0
    if node.base_op == "aten.gather" and not _same_but(wide, shape, dim):
        return None
    label = _along(routing, index, own, at, labels[dim])
    if label is None:
        return None
    routing.consume(index)
    return AxisResult((replaced(labels, dim, label),), {"self": Alignment(labels, None)})


def _along(routing: Routing, name: str | None, own: Labels, at: int, label: DimLabel) -> DimLabel | None:
    """The label of what an index with one dim of places (``at``) takes out of a dim of ``label``."""
    if not plain((*own[:at], *own[at + 1 :])):
        return None
    index, back = routing.fact(name, Index), routing.fact(name, Inverse)
    if index is not None and _whole(index) and own[at] == index.rows.label and index.label == label:
        return index.rows.label
    if back is not None and own[at] == back.rows.sources[0] and label == back.rows.label:
        routing.leave(back.rows)
        return own[at]
    return None


def _whole(index: Index) -> bool:
    """Whether one index alone says which token a row is."""
    return sum(is_labelled(source) for source in index.rows.sources) == 1


def _same_but(left: tuple[Size, ...], right: tuple[Size, ...], dim: int) -> bool:
    return len(left) == len(right) and all(a == b for d, (a, b) in enumerate(zip(left, right, strict=True)) if d != dim)


# -- the ways back ---------------------------------------------------------------------------------------------


def _target(
    routing: Routing, view: OpView, wanted: dict[int, DimLabel], whole: bool, path: str = "self"
) -> tuple[Labels, frozenset[str]] | None:
    """The labels of what rows are put into, with dims ``wanted``, and its path if it is a fresh fill.

    ``whole``: every element is written, so that it need hold nothing.
    """
    name, shape, labels = operand(view.node, path), view.shape(path), view.labels(path)
    if name is None or shape is None or routing.stale(name):
        return None
    out = tuple(wanted.get(dim, feature) for dim, feature in enumerate(features(shape)))
    if labels is not None:
        return (out, frozenset()) if labels == out else None
    fresh = routing.record.nodes[name].base_op
    if fresh not in FILLS and not (whole and fresh in _EMPTY):
        return None
    if any(product(f.size for f in label) != shape[dim] for dim, label in wanted.items()):
        return None
    return out, frozenset([path])


@rule("index_put")
def _index_put(routing: Routing, view: OpView) -> AxisResult | None:
    node, places, shape = view.node, _positions(view.node), view.shape("self")
    values, given = operand(node, "values"), view.labels("values")
    refused = AxisResult(None, mixing=f"{node.op} may move elements along the sequence: {_NOT_BACK}")
    if not places or shape is None or values is None:
        return refused
    adds, dims = node.args.get("accumulate") is True, [dim for dim, _ in places]
    if dims != list(range(dims[0], dims[-1] + 1)):
        return refused
    rows, wanted, once = _put_place(routing, view, places)
    if rows is None:
        return refused
    rest = [d for d in range(len(shape)) if d not in wanted]
    target = _target(routing, view, wanted, rows.complete and not adds)
    if target is None or not (adds or once) or not _in_range(rest, target[0]):
        return refused
    out, consumed = target
    if not adds and _counts_up(routing, values, out) and rows.complete:
        routing.consume(places[0][1])
        routing.learn(node.name, Inverse(rows))
        return AxisResult((out,), consumed=frozenset([*consumed, "values"]))
    if given is None or given != (*out[: dims[0]], rows.label, *out[max(wanted) + 1 :]):
        return refused
    routing.consume(*(name for _, name in places))
    routing.leave(rows)
    return AxisResult((out,), consumed=consumed)


def _in_range(rest: list[int], out: Labels) -> bool:
    return plain(tuple(out[dim] for dim in rest))


def _put_place(
    routing: Routing, view: OpView, places: list[tuple[int, str]]
) -> tuple[Rows | None, dict[int, DimLabel], bool]:
    """The rows that are put, the labels of the dims that they are put along, and whether each place occurs once."""
    nothing: dict[int, DimLabel] = {}
    if len(places) == 1 and _is_mask(routing, places[0][1]):
        dim, mask = places[0]
        own = view.labels(f"indices.{dim}")
        if own is None or plain(own) or has_routed(own) or routing.stale(mask):
            return None, nothing, False
        return _rows_of_mask(routing, view, mask, own), dict(enumerate(own, dim)), True
    facts = [routing.fact(name, Index) for _, name in places]
    rows = next((fact.rows for fact in facts if fact is not None), None)
    if rows is None or any(fact is None or fact.rows is not rows for fact in facts):
        return None, nothing, False
    wanted = {dim: fact.label for (dim, _), fact in zip(places, facts, strict=True) if fact is not None}
    columns = {fact.column for fact in facts if fact is not None}
    if any(view.labels(f"indices.{dim}") != (rows.label,) for dim in wanted):
        return None, nothing, False
    tokens = {place for place, source in enumerate(rows.sources) if is_labelled(source)}
    if len(rows.sources) > 1 and not tokens <= columns:
        return None, nothing, False
    once = None not in columns and set(range(len(rows.sources))) <= columns | rows.single
    return rows, wanted, once


def _counts_up(routing: Routing, name: str, out: Labels) -> bool:
    """Whether a value is 0, 1, 2, ... over all places."""
    node = routing.record.nodes[name]
    if node.base_op != "aten.arange" or len(out) != 1 or node.tensor is None or routing.stale(name):
        return False
    start, step = node.args.get("start", 0), node.args.get("step", 1)
    return start == 0 and step == 1 and node.tensor.shape == (product(f.size for f in out[0]),)


@rule("index_add", "scatter_add", "scatter", "torchtitan.deterministic_scatter_add.default")
def _add_back(routing: Routing, view: OpView) -> AxisResult | None:
    into = "out" if view.node.op.startswith("torchtitan.") else "self"  # that one adds along dim 0
    node, shape, index = view.node, view.shape(into), operand(view.node, "index")
    own, wide = view.labels("index"), view.shape("index")
    if shape is None or index is None or own is None or wide is None or not shape:
        return None
    source = "source" if node.base_op.startswith("aten.index_add") else "src"
    dim, given, fact = view.dim("dim", len(shape)), view.labels(source), routing.fact(index, Index)
    adds = "_add" in node.base_op
    if fact is None:
        return along_experts(view, routing) if source == "src" and not has_routed(own) else _refused(node)
    at = 0 if source == "source" else dim
    if (
        node.args.get("reduce") is not None
        or not _whole(fact)
        or own[at] != fact.rows.label
        or not plain((*own[:at], *own[at + 1 :]))
    ):
        return _refused(node)
    complete = fact.rows.complete and fact.column == 0
    target = _target(routing, view, {dim: fact.label}, complete and not adds, into)
    values = operand(node, source)
    if target is None or values is None or not (adds or complete):
        return _refused(node)
    if source == "src" and (wide != view.shape(source) or not _same_but(wide, shape, dim)):
        return _refused(node)
    out, consumed = target
    if not adds and _counts_up(routing, values, out):
        routing.consume(index)
        routing.learn(node.name, Inverse(fact.rows))
        return AxisResult((out,), consumed=frozenset([*consumed, "src"]))
    if given != replaced(out, dim, fact.rows.label):
        return _refused(node)
    routing.consume(index)
    routing.leave(fact.rows)
    return AxisResult((out,), consumed=consumed)


def _refused(node: Node) -> AxisResult:
    return AxisResult(None, mixing=f"{node.op} may move elements along the sequence: {_NOT_BACK}")
