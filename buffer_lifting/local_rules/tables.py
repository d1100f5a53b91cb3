"""Local rules for reads of a table by an index that can be rebuilt, and triangles of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules.compute import BY_FREQUENCY, NO_FREQUENCY
from buffer_lifting.dataflow import Dep
from buffer_lifting.gathering import gather, gather_lane, operand_of, under_spread
from buffer_lifting.graph.record import Node, Ref
from buffer_lifting.labels import COL, ROW, Factor, Labels, has_seq, is_labelled
from buffer_lifting.local_rules.core import axis_size, dim_size, has_batch_or_seq, local_rule, unchanged, widened
from buffer_lifting.plan import Call, Context, Existing, Plan, Reapply, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner


@local_rule("embedding")
def _embedding(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    operand_of(planner, node, "weight")
    indices, _ = operand_of(planner, node, "indices")
    if not planner.is_table(str(getattr(node.args["weight"], "name", ""))):
        raise Refuse("an embedding whose table follows the sequence", node.name)
    if node.args.get("scale_grad_by_freq") is True:
        raise Refuse(BY_FREQUENCY, node.name, hint=NO_FREQUENCY)
    if is_labelled(labels[-1]):
        raise Refuse("the features of an embedding run along the sequence", node.name)
    value = planner.rebuild(indices.name, labels[:-1], context)
    return unchanged(node, value) or Value(Reapply(node.name, (("indices", value.plan),)), value.lane, len(labels))


@local_rule("index")
def _index(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    indices = node.args.get("indices")
    if not isinstance(indices, tuple):
        raise Refuse("an index without indices", node.name)
    given = [(dim, arg.name) for dim, arg in enumerate(indices) if isinstance(arg, Ref)]
    metas = [planner.record.nodes[name].tensor for _, name in given]
    if not given or any(meta is None or meta.dtype == "bool" for meta in metas):
        raise Refuse("a boolean index", node.name)
    dims = [dim for dim, _ in given]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        raise Refuse("indices of dims that are not side by side", node.name)
    rank = max(len(meta.shape) for meta in metas if meta is not None)
    before, middle, after = labels[: dims[0]], labels[dims[0] : dims[0] + rank], labels[dims[0] + rank :]
    rest = (*before, *[()] * len(dims), *after)
    if not planner.is_table(source.name) or has_batch_or_seq(rest):
        meta = metas[0]
        if len(given) > 1 or meta is None or len(meta.shape) != 1:
            raise Refuse("a gather from a value that follows the sequence", node.name)
        value = planner.rebuild(given[0][1], middle, context)
        if not value.lane:
            raise Refuse("an index that does not follow the sequence", node.name)
        return _rows_again(planner, node, source, rest, dims[0], value.plan, context)
    values = []
    for (_, name), meta in zip(given, metas, strict=True):
        assert meta is not None
        own = middle[rank - len(meta.shape) :]
        own = tuple(() if size == 1 else dim for size, dim in zip(meta.shape, own, strict=True))
        values.append(planner.rebuild(name, own, context))
    same = unchanged(node, *values)
    if same:
        return same
    plans = tuple(widened(value, rank, node.name) for value in values)
    lane = any(value.lane for value in values)
    order = [*dims, *(d for d in range(len(shape)) if d not in dims)]
    table: Plan = Existing(source.name)
    if dims[0]:
        table = Call("aten.permute.default", (table, tuple(order)), node.name)
    result: Plan = Call("aten.index.Tensor", (table, plans), node.name)
    if dims[0]:  # [lane, *middle, *before, *after] -> [lane, *before, *middle, *after]
        first = [lane + rank + d for d in range(dims[0])]
        last = [lane + rank + d for d in range(dims[0], len(rest) - len(dims))]
        order = [*range(lane), *first, *range(lane, lane + rank), *last]
        result = Call("aten.permute.default", (result, tuple(order)), node.name)
    return Value(result, lane, len(labels))


@local_rule("index_select")
def _index_select(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    index, _ = operand_of(planner, node, "index")
    dim = int(node.args["dim"]) % len(shape)  # type: ignore[arg-type]
    value = planner.rebuild(index.name, (labels[dim],), context)
    if not value.lane:
        raise Refuse("an index that does not follow the sequence", node.name)
    rest = (*labels[:dim], (), *labels[dim + 1 :])
    if not has_batch_or_seq(rest) and planner.is_table(source.name):
        return gather(node.name, Existing(source.name), len(shape), [(dim, value.plan)], len(labels))
    return _rows_again(planner, node, source, rest, dim, value.plan, context)


def _rows_again(
    planner: Planner, node: Node, source: Node, rest: Labels, dim: int, index: Plan, context: Context
) -> Value:
    """Rows along one dim of a value that follows the sequence along another: the columns of a mask's rows.

    Or rows of a table that is repeated for the batch.
    """
    below = under_spread(planner, source, rest, (dim,))
    if below is not None and not has_batch_or_seq(below[1]) and planner.is_table(below[0].name):
        table, own, spread = below
        value = gather(node.name, Existing(table.name), len(own), [(dim - spread.missing, index)], len(own))
        return spread.again(value, node.name)
    if not planner.is_fixed_along(source.name, dim):
        raise Refuse("a gather from a value that follows the sequence", node.name)
    value = planner.rebuild(source.name, rest, context, picked=dim)
    if not value.lane:
        raise Refuse("a gather from a value that follows the sequence", node.name)
    return gather_lane(node.name, value.plan, len(rest), dim, index)


@local_rule("gather")
def _gather(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Rows of a table, expanded to the index's shape, picked by an index that follows the sequence."""
    source, shape = operand_of(planner, node)
    index, _ = operand_of(planner, node, "index")
    dim = int(node.args["dim"]) % len(shape)  # type: ignore[arg-type]
    varies = planner.variation.of(source.name)
    labelled = [d for d, label in enumerate(labels) if is_labelled(label)]
    if any(varies[d] for d in labelled if d != dim) or not planner.is_table_along(source.name, dim):
        raise Refuse("a gather from a value that follows the sequence", node.name)
    value = planner.rebuild(index.name, labels, context)
    same = unchanged(node, value)
    if same:
        return same
    if not value.lane:
        raise Refuse("an index that does not follow the sequence", node.name)
    plan: Plan = Existing(source.name)
    assert node.tensor is not None
    sizes: list[object] = []
    for d, (label, size) in enumerate(zip(labels, node.tensor.shape, strict=True)):
        if d == dim:
            sizes.append(-1)
            continue
        if is_labelled(label) and shape[d] != 1:
            plan = Call("aten.slice.Tensor", (plan, d, 0, 1), node.name)
        elif shape[d] != size:
            if not isinstance(size, int):
                raise Refuse("a gather of a part of computed size", node.name)
            plan = Call("aten.slice.Tensor", (plan, d, 0, size), node.name)
        sizes.append(dim_size(label, size, node.name))
    plan = Call("aten.unsqueeze.default", (plan, 0), node.name)
    batch = Call("aten.sym_size.int", (value.plan, 0), node.name)
    plan = Call("aten.expand.default", (plan, (batch, *sizes)), node.name)
    return Value(Call("aten.gather.default", (plan, dim + 1, value.plan), node.name), True, len(labels))


def token_at(planner: Planner, node: Node, labels: Labels, dim: int, place: object, context: Context) -> Value | None:
    """What a user's input holds at one slot of the whole sequence (the first token, the last one), by sample.

    ``labels`` are those of the operand, in which dim ``dim`` has one element, ``place`` is its index. It is found among
    the keys, which every rank has. ``None`` where the dim is no sequence, or the value is not one of the user.
    """
    source, shape = operand_of(planner, node)
    axis = planner.keys_axis(shape[dim])
    of_user = Dep.USER in planner.deps[source.name] and not any(has_seq(label) for label in labels)
    assert source.tensor is not None
    exact = source.tensor.is_floating or source.tensor.dtype in ("int64", "bool")  # a sum keeps these dtypes
    if axis is None or not isinstance(place, int) or not of_user or not exact:
        return None
    keys = Factor(axis, COL, shape[dim])
    mark, own = len(planner.trail), (*labels[:dim], (keys,), *labels[dim + 1 :])
    try:
        value = planner.rebuild(source.name, own, replace(context, stream="slots"))
    except Refuse:  # features that are as many as the sequence is long
        del planner.trail[mark:]
        return None
    if not value.lane:
        return None
    slots: Plan = planner.iota(keys, Context("slots", "positions"))
    if place < 0:
        slots = Call("aten.sub.Tensor", (slots, axis_size(keys)), node.name)
    here: Plan = Call("aten.eq.Scalar", (slots, place), node.name)
    for _ in range(dim):
        here = Call("aten.unsqueeze.default", (here, 1), node.name)
    for _ in range(len(labels) - dim - 1):
        here = Call("aten.unsqueeze.default", (here, -1), node.name)
    if source.tensor.dtype == "bool":
        here = Call("aten.logical_and.default", (value.plan, here), node.name)
        return Value(Call("aten.any.dims", (here, (dim + 1,), True), node.name), True, len(labels))
    alone = Call("aten.where.ScalarOther", (here, value.plan, 0), node.name)  # a sum of one element is exact
    return Value(Call("aten.sum.dim_IntList", (alone, (dim + 1,), True), node.name), True, len(labels))


@local_rule("tril", "triu")
def _triangle(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node)
    diagonal = node.args.get("diagonal", 0)
    row, col = labels[-2], labels[-1]
    roles = {(dim[0].axis, dim[0].role) for dim in (row, col) if len(dim) == 1}  # the keys may come first
    if not row or roles != {(row[0].axis, ROW), (row[0].axis, COL)} or not isinstance(diagonal, int):
        raise Refuse("a triangle whose rows and columns are not queries and keys", node.name)
    value = planner.rebuild(source.name, labels, context)
    rows = Call("aten.unsqueeze.default", (planner.iota(row[0], context), 2), node.name)
    cols = Call("aten.unsqueeze.default", (planner.iota(col[0], context), 1), node.name)
    offset = Call("aten.sub.Tensor", (cols, rows), node.name)
    compare = "aten.le.Scalar" if node.base_op == "aten.tril" else "aten.ge.Scalar"
    keep: Plan = Call(compare, (offset, diagonal), node.name)
    for _ in range(len(labels) - 2):
        keep = Call("aten.unsqueeze.default", (keep, 1), node.name)
    assert node.tensor is not None
    if node.tensor.dtype == "bool":
        return Value(Call("aten.logical_and.default", (value.plan, keep), node.name), True, len(labels))
    return Value(Call("aten.where.ScalarOther", (keep, value.plan, 0), node.name), True, len(labels))


@local_rule("eye", "diag", "diag_embed")
def _diagonal(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A matrix whose only elements besides zero are those where the query is the key."""
    assert node.tensor is not None
    args = node.args
    row, col = (labels[-2], labels[-1]) if len(labels) == 2 else ((), ())
    square = len(row) == len(col) == 1 and row[0].axis == col[0].axis and row[0].is_seq
    whole = square and node.tensor.shape == (row[0].size, col[0].size)
    if not whole or row[0].role != ROW or col[0].role != COL or args.get("diagonal", 0) or args.get("offset", 0):
        raise Refuse("a diagonal whose rows and columns are not queries and keys", node.name)
    rows = Call("aten.unsqueeze.default", (planner.iota(row[0], context), 2), node.name)
    cols = Call("aten.unsqueeze.default", (planner.iota(col[0], context), 1), node.name)
    same: Plan = Call("aten.eq.Tensor", (rows, cols), node.name)
    if node.base_op != "aten.eye":
        source, shape = operand_of(planner, node)
        if len(shape) != 1:
            raise Refuse("the diagonal of a matrix", node.name)
        value = planner.rebuild(source.name, (row,), context)
        own: Plan = Call("aten.unsqueeze.default", (value.plan, value.rank + value.lane), node.name)
        if node.tensor.dtype == "bool":
            return Value(Call("aten.logical_and.default", (same, own), node.name), True, 2)
    elif node.tensor.dtype == "bool":
        return Value(same, True, 2)
    else:  # one, in the dtype of the matrix
        own = Reapply(node.name, tuple((size, 1) for size in ("n", "m") if isinstance(args.get(size), Ref | int)))
    return Value(Call("aten.where.ScalarOther", (same, own, 0), node.name), True, 2)
