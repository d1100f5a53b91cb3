"""How facts follow values through views, casts and the arithmetic of indices."""

from __future__ import annotations

from buffer_lifting.axis_rules import AxisResult, OpView, permutation
from buffer_lifting.graph.record import Ref, TensorMeta
from buffer_lifting.graph.sizes import Size, divide
from buffer_lifting.labels import DimLabel, Factor, is_labelled
from buffer_lifting.routing.engine import Routing, carry, exact, operand
from buffer_lifting.routing.experts import summed
from buffer_lifting.routing.facts import Columns, Count, Counts, Distinct, Fact, Hot, Index, Inverse, Place, Single

_OF_VALUES = (Index, Inverse, Columns, Counts, Count, Place)


def _source(view: OpView) -> tuple[str, TensorMeta] | None:
    name = operand(view.node, "self")
    meta = view.record.nodes[name].tensor if name else None
    return (name, meta) if name and meta is not None else None


@carry("to", "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy")
def _same(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    source, out = _source(view), view.node.tensor
    if source is None or out is None or view.node.op == "aten.to.other":
        return
    name, _ = source
    for kind, fact in routing.facts.get(name, {}).items():
        if routing.fact(name, kind) is None:
            continue
        flag = isinstance(fact, Single) or (isinstance(fact, Hot) and fact.binary)
        if exact(out) or isinstance(fact, Place) or (flag and out.dtype in ("bool", "int8", "uint8")):
            routing.learn(view.node.name, fact)
            routing.consume(name)
    root = routing.root(name)
    if root is not None and exact(out):
        routing.roots[view.node.name] = root


@carry("getitem")
def _getitem(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    made, place = operand(view.node, "0"), view.node.args.get("1")
    if made is None or not isinstance(place, int):
        return
    several = routing.several.get(made, [])
    if place < len(several):
        routing.learn(view.node.name, *several[place].values())
    source = view.record.nodes[made]
    if place == 0 and source.base_op == "aten.sort" and made in routing.roots:
        routing.roots[view.node.name] = routing.roots[made]
    if place == 1 and source.base_op in ("aten.topk", "aten.sort") and source.op != "aten.sort.values":
        meta = view.node.tensor
        dim = source.args.get("dim", -1)
        if meta is not None and meta.shape and isinstance(dim, int) and not several:
            routing.learn(view.node.name, Distinct(dim % len(meta.shape)))


@carry("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "slice")
def _viewed(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    source, out = _source(view), view.node.tensor
    if source is None or out is None:
        return
    name, meta = source
    spread = view.node.base_op == "aten.expand"
    if view.node.base_op == "aten.slice" and out.shape != meta.shape:
        return
    root = routing.root(name)
    if root is not None and not spread:
        routing.roots[view.node.name] = root
    labels = result.outputs[0] if result is not None and result.outputs else None
    for kind, fact in list(routing.facts.get(name, {}).items()):
        if routing.fact(name, kind) is None:
            continue
        moved = _through_view(fact, meta.shape, out.shape, spread)
        if (
            isinstance(fact, Columns)
            and len(fact.rows.sources) == 1
            and len(out.shape) == 1
            and is_labelled(fact.rows.sources[0])
        ):
            moved = Index(fact.rows, fact.rows.sources[0], 0)
        if moved is not None and (labels is not None or not isinstance(fact, _OF_VALUES)):
            routing.learn(view.node.name, moved)
            routing.consume(name)


def _through_view(fact: Fact, before: tuple[Size, ...], after: tuple[Size, ...], spread: bool) -> Fact | None:
    if isinstance(fact, Index):
        single = spread or sum(size != 1 for size in before) <= 1
        return fact if single else None
    if isinstance(fact, Inverse | Place):
        return None if spread and isinstance(fact, Inverse) else fact
    if isinstance(fact, Counts):
        return fact if before == after else None
    if isinstance(fact, Columns | Count):
        return fact if before == after else None
    if isinstance(fact, Distinct):
        dim = _kept(before, after, fact.dim)
        return None if dim is None else Distinct(dim)
    if isinstance(fact, Single):
        dims = [_kept(before, after, dim) for dim in sorted(fact.dims)]
        return Single(frozenset(d for d in dims if d is not None))
    dim = _kept(before, after, fact.dim)
    return None if dim is None or spread else Hot(fact.key, fact.number, dim, fact.binary)


def _kept(before: tuple[Size, ...], after: tuple[Size, ...], dim: int) -> int | None:
    """Where a dim is after a view that leaves it, and all dims before or behind it, as they are."""
    if before[: dim + 1] == after[: dim + 1]:
        return dim
    tail = len(before) - dim
    return len(after) - tail if before[dim:] == after[-tail:] else None


@carry("permute", "transpose", "t")
def _permuted(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    source = _source(view)
    if source is None:
        return
    name, meta = source
    order = permutation(view.node, len(meta.shape))
    if order is None:
        return
    root = routing.root(name)
    if root is not None:
        routing.roots[view.node.name] = root
    for fact in _trusted(routing, name):
        if isinstance(fact, Inverse):
            routing.learn(view.node.name, fact)
            routing.consume(name)
        elif isinstance(fact, Single):
            routing.learn(view.node.name, Single(frozenset(order.index(d) for d in fact.dims)))
        elif isinstance(fact, Distinct):
            routing.learn(view.node.name, Distinct(order.index(fact.dim)))
        elif isinstance(fact, Hot):
            routing.learn(view.node.name, Hot(fact.key, fact.number, order.index(fact.dim), fact.binary))


def _trusted(routing: Routing, name: str) -> list[Fact]:
    return [] if routing.stale(name) else list(routing.facts.get(name, {}).values())


@carry("select", "unbind")
def _picked(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    source, node = _source(view), view.node
    if source is None:
        return
    name, meta = source
    dim = view.dim("dim", len(meta.shape))
    places = range(len(view.shapes_out())) if node.base_op == "aten.unbind" else [node.args.get("index")]
    found: list[dict[type, Fact]] = []
    for place in places:
        facts: dict[type, Fact] = {}
        for fact in _trusted(routing, name):
            picked = _pick(fact, dim, place) if isinstance(place, int) else None
            if picked is not None:
                facts[type(picked)] = picked
            if picked is not None or (isinstance(fact, Columns) and dim == 1 and isinstance(place, int)):
                routing.consume(name)
        found.append(facts)
    if node.base_op == "aten.unbind":
        routing.several[node.name] = found
    else:
        routing.learn(node.name, *found[0].values())


def _pick(fact: Fact, dim: int, place: int) -> Fact | None:
    if isinstance(fact, Columns) and dim == 1:
        place %= len(fact.rows.sources)
        label = fact.rows.sources[place]
        return Index(fact.rows, label, place) if is_labelled(label) else None
    if isinstance(fact, Counts):
        return Count(fact.key, fact.number, -1 if fact.offsets else place % fact.number)
    if isinstance(fact, Single):
        return Single(frozenset(d - (d > dim) for d in fact.dims if d != dim))
    if isinstance(fact, Distinct) and fact.dim != dim:
        return Distinct(fact.dim - (fact.dim > dim))
    return None


@carry("eq")
def _equal(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    """Distinct ids compared to something that is the same along their dim: on at most once along it."""
    out = view.node.tensor
    if out is None:
        return
    for own, other in (("self", "other"), ("other", "self")):
        name = operand(view.node, own)
        fact, shape, against = routing.fact(name, Distinct), view.shape(own), view.shape(other)
        if fact is None or shape is None or len(shape) != len(out.shape):
            continue
        against = against or ()
        place = fact.dim - len(shape)
        if len(against) < -place or against[place] == 1:
            routing.learn(view.node.name, Single(frozenset([fact.dim])))


@carry("floor_divide", "div", "remainder")
def _divided(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    """The index of a token copy divided by the number of copies: the token's."""
    node, by = view.node, view.node.args.get("other")
    name, out = operand(node, "self"), node.tensor
    fact = routing.fact(name, Index)
    whole = node.base_op != "aten.div" or node.args.get("rounding_mode") in ("floor", "trunc")
    if fact is None or not whole or not isinstance(by, int) or by < 1 or out is None or not exact(out):
        return
    last = fact.label[-1] if fact.label else None
    rest = divide(last.size, by) if last is not None and not last.axis else None
    if last is None or rest is None:
        if by != 1 or node.base_op == "aten.remainder":
            return
        rest, last = 1, None
    routing.consume(name)
    if node.base_op == "aten.remainder":
        return
    kept: DimLabel = fact.label if last is None else fact.label[:-1]
    label = kept if rest == 1 else (*kept, Factor("", "", rest))
    routing.learn(node.name, Index(fact.rows, label, fact.column if by == 1 else None))


@carry("index", "index_select")
def _indexed(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    """Elements taken by a whole permutation: the same elements, in another order."""
    name, indices = operand(view.node, "self"), view.node.args.get("indices", view.node.args.get("index"))
    index = indices[0] if isinstance(indices, tuple) and len(indices) == 1 else indices
    shape = view.shape("self")
    if name is None or shape is None or len(shape) != 1 or not isinstance(index, Ref):
        return
    fact, root = routing.fact(index.name, Index), routing.root(name)
    labels = view.labels("self")
    if fact is None or root is None or not fact.rows.complete or fact.column != 0 or labels is None:
        return
    if labels == (fact.label,):
        routing.roots[view.node.name] = root


@carry("item", "_local_scalar_dense")
def _number(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    name = operand(view.node, "self")
    fact = routing.fact(name, Count)
    if fact is not None:
        routing.learn(view.node.name, fact)
        routing.consume(name)
        routing.count_scalar(view.node)


@carry("cumsum")
def _summed_up(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    name, out = operand(view.node, "self"), view.node.tensor
    fact = routing.fact(name, Counts)
    if fact is not None and not fact.offsets and out is not None and exact(out):
        routing.learn(view.node.name, Counts(fact.key, fact.number, True))
        routing.consume(name)


@carry("sum")
def _fewer(routing: Routing, view: OpView, result: AxisResult | None) -> None:
    """One-hots summed over a token's copies."""
    name, labels, out = operand(view.node, "self"), view.labels("self"), view.node.tensor
    hot = routing.fact(name, Hot)
    if (
        hot is None
        or labels is None
        or out is None
        or not exact(out)
        or Counts in routing.facts.get(view.node.name, {})
    ):
        return
    dims = summed(view, len(labels))
    if hot.dim in dims or any(is_labelled(labels[d]) for d in dims) or view.node.args.get("keepdim"):
        return
    moved = hot.dim - sum(d < hot.dim for d in dims)
    routing.learn(view.node.name, Hot(hot.key, hot.number, moved, False))
