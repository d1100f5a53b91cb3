"""The table of ops that are local along the sequence: how labels map back to operands, and what to emit.

A rule gets the planner, the node and the labels that its result must have, and returns a :class:`Value`, or
raises :class:`Refuse`. A new pattern is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import permutation
from buffer_lifting.gathering import gather, gather_lane, gather_rows, operand_of
from buffer_lifting.graph.record import Node, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size, product
from buffer_lifting.labels import BATCH, COL, ROW, DimLabel, Factor, Labels, has_seq, is_labelled, regroup
from buffer_lifting.ops import FILLS, ORDER_FREE, is_mutating, is_pointwise
from buffer_lifting.plan import AxisSize, Call, Context, Existing, Plan, Reapply, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner

LocalRule = Callable[["Planner", Node, Labels, Context], Value]
_RULES: dict[str, LocalRule] = {}
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unbind")


def local_rule(*names: str) -> Callable[[LocalRule], LocalRule]:
    """Registers a rule for ops, by their name without namespace and overload."""

    def register(function: LocalRule) -> LocalRule:
        for name in names:
            _RULES[name if name == "getitem" else f"aten.{name}"] = function
        return function

    return register


def rule_docs() -> dict[str, str]:
    """Each op that has a rule, and the first line of the rule's documentation."""
    return {name: (function.__doc__ or "").strip().split("\n")[0] for name, function in _RULES.items()}


def local(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Rebuilds a value from its operands, if its op is local along the sequence.

    Raises:
        Refuse: the op is not local, or not known to be.
    """
    if is_mutating(node):
        raise Refuse(f"{node.op} writes in place", node.name, "BL102", "use the out-of-place op in the model")
    rule = _RULES.get(node.base_op)
    if rule is None and node.base_op in FILLS:
        rule = _fill
    if rule is None and is_pointwise(node):
        rule = _pointwise
    if rule is None:
        raise Refuse(f"{node.op or node.kind.value} is not known to be local along the sequence", node.name)
    return rule(planner, node, labels, context)


def axis_size(factor: Factor) -> AxisSize:
    """The run-time size of a labelled factor."""
    return AxisSize(factor.axis, factor.role, factor.size if isinstance(factor.size, int) else None)


def dim_size(dim: DimLabel, size: Size, node: str) -> object:
    """The size of a rebuilt dim as an argument: the own batch is 1, sequences are read at run time."""
    result: object = 1
    constant = 1
    if not is_labelled(dim):
        if not isinstance(size, int):
            raise Refuse(f"a dim of size {size} is neither batch, sequence nor of fixed size", node)
        return size
    for factor in dim:
        if factor.axis == BATCH:
            continue
        if factor.axis:
            part = axis_size(factor)
            if part.fixed is not None:
                constant *= part.fixed
            elif result == 1:
                result = part
            else:
                raise Refuse("two sequence axes are folded into one dim", node)
        elif isinstance(factor.size, int):
            constant *= factor.size
        else:
            raise Refuse(f"a dim of size {factor.size} is folded with the sequence", node)
    if result == 1:
        return constant
    return result if constant == 1 else -1


def unchanged(node: Node, *values: Value) -> Value | None:
    """The node itself if none of its operands changed."""
    if any(value.changed for value in values):
        return None
    assert node.tensor is not None
    return Value(Existing(node.name), False, len(node.tensor.shape))


def _pointwise(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    rank = len(labels)
    operands: list[tuple[str, Value]] = []
    numbers: list[tuple[str, object]] = []
    for path, name in node.named_refs():
        meta = planner.record.nodes[name].meta
        if not isinstance(meta, TensorMeta):
            if planner.is_length_of_sequence(name):
                numbers.append((path, planner.scalar(name)))
            continue
        if node.op in ("aten.type_as.default", "aten.to.other", "aten._to_copy.default") and path == "other":
            continue
        own = tuple(
            () if size == 1 else dim for size, dim in zip(meta.shape, labels[rank - len(meta.shape) :], strict=True)
        )
        operands.append((path, planner.rebuild(name, own, context)))
    same = None if numbers else unchanged(node, *(value for _, value in operands))
    if same:
        return same
    lane = any(value.lane for _, value in operands)
    operands_now = numbers
    for path, value in operands:
        plan = value.plan
        if value.lane:
            for _ in range(rank - value.rank):
                plan = Call("aten.unsqueeze.default", (plan, 1), node.name)
        operands_now.append((path, plan))
    return Value(Reapply(node.name, tuple(operands_now)), lane, rank)


def _fill(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """The same value everywhere: one element, expanded to the sizes of this shard."""
    fill = node.args.get("fill_value")
    plan: Plan = Existing(node.name)
    if isinstance(fill, Ref):
        if planner.record.nodes[fill.name].tensor is not None:
            raise Refuse("a fill with a computed value", node.name)
        if planner.is_length_of_sequence(fill.name):
            plan = Reapply(node.name, (("fill_value", planner.scalar(fill.name)),))
    if not any(is_labelled(dim) for dim in labels):
        return Value(plan, False, len(labels))
    assert node.tensor is not None
    sizes = []
    for index, (dim, size) in enumerate(zip(labels, node.tensor.shape, strict=True)):
        if is_labelled(dim):
            plan = Call("aten.slice.Tensor", (plan, index, 0, 1), node.name)
        sizes.append(dim_size(dim, size, node.name))
    return Value(Call("aten.expand.default", (plan, tuple(sizes)), node.name), False, len(labels))


@local_rule("scalar_tensor")
def _scalar_tensor(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    number = node.args.get("s")
    if not isinstance(number, Ref) or not planner.is_length_of_sequence(number.name):
        return Value(Existing(node.name), False, 0)
    return Value(Reapply(node.name, (("s", planner.scalar(number.name)),)), False, 0)


@local_rule("max", "min", "amax", "amin", "any", "all", "sum")
def _reduction(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A reduction over a sequence axis is taken over the keys, which are the whole sequence on every rank."""
    if node.op in ("aten.max.other", "aten.min.other"):
        return _pointwise(planner, node, labels, context)
    source, shape = operand_of(planner, node)
    assert node.tensor is not None
    exact = node.base_op in ORDER_FREE or not node.tensor.is_floating
    if node.op in ("aten.max.dim", "aten.min.dim"):
        raise Refuse(f"{node.op} is not known to be local along the sequence", node.name)
    dims = node.args.get("dim")
    chosen = dims if isinstance(dims, tuple) else () if dims is None else (dims,)
    over = sorted({d % len(shape) for d in chosen if isinstance(d, int)}) or list(range(len(shape)))
    keep = bool(node.args.get("keepdim"))
    if chosen and not any(planner.axis_of(shape[dim]) for dim in over):
        return over_features(planner, node, labels, context)
    if not exact:
        raise Refuse(f"{node.op} is not known to be local along the sequence", node.name)
    own: list[DimLabel] = []
    rest = list(labels)
    for dim, size in enumerate(shape):
        along = planner.axis_of(size) if dim in over else None
        own.append((Factor(along, COL, size),) if along else () if dim in over else rest[0])
        if keep or dim not in over:
            rest.pop(0)
    if sum(has_seq(dim) for d, dim in enumerate(own) if d in over) != 1:
        raise Refuse("a reduction over dims of which not exactly one is the sequence", node.name)
    # the length of the sequence, whatever its position ids
    value = planner.rebuild(source.name, tuple(own), replace(context, stream="slots"))
    if not value.lane:
        raise Refuse("a reduction of a value that does not follow the sequence", node.name)
    op = {"aten.max": "aten.amax", "aten.min": "aten.amin"}.get(node.base_op, node.base_op)
    overload = {"aten.amax": "default", "aten.amin": "default", "aten.sum": "dim_IntList"}.get(op, "dims")
    over_lane = tuple(d + 1 for d in over)
    return Value(Call(f"{op}.{overload}", (value.plan, over_lane, keep), node.name), True, len(labels))


def over_features(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A reduction over dims that are no sequence; dims are counted from the right, so a lane changes nothing."""
    source, shape = operand_of(planner, node)
    dims = node.args.get("dim")
    given = dims if isinstance(dims, tuple) else (dims,)
    over = {d % len(shape) for d in given if isinstance(d, int)}
    if not over or any(planner.axis_of(shape[d]) for d in over):
        raise Refuse(f"{node.op} is not known to be local along the sequence", node.name)
    keep = bool(node.args.get("keepdim"))
    rest = iter(labels)
    own: list[DimLabel] = []
    for dim in range(len(shape)):
        label = next(rest) if keep or dim not in over else ()
        own.append(() if dim in over else label)
    value = planner.rebuild(source.name, tuple(own), context)
    back = tuple(d - len(shape) for d in sorted(over))
    replaced = (("self", value.plan), ("dim", back if isinstance(dims, tuple) else back[0]))
    return unchanged(node, value) or Value(Reapply(node.name, replaced), value.lane, len(labels))


@local_rule("getitem")
def _getitem(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """One part of a value that was split along a dim other than the sequence."""
    parts, index = node.args.get("0"), node.args.get("1")
    split = planner.record.nodes[parts.name] if isinstance(parts, Ref) else None
    metas = split.meta if split is not None and isinstance(split.meta, tuple) else ()
    if split is None or not isinstance(index, int) or split.base_op not in _SPLITS:
        raise Refuse(f"a result of {split.op if split else 'an op'} is not known to be local", node.name)
    source, shape = operand_of(planner, split)
    dim = int(split.args.get("dim", 0)) % len(shape)  # type: ignore[arg-type]
    if split.base_op == "aten.unbind":
        value = planner.rebuild(source.name, (*labels[:dim], (), *labels[dim:]), context, picked=dim)
        call = Call("aten.select.int", (value.plan, dim + value.lane, index), node.name)
        return unchanged(node, value) or Value(call, value.lane, len(labels))
    if is_labelled(labels[dim]):
        raise Refuse("a value split along the sequence", node.name)
    sizes = [meta.shape[dim] for meta in metas if isinstance(meta, TensorMeta)]
    if not all(isinstance(size, int) for size in sizes):
        raise Refuse("a value split into parts of computed size", node.name)
    start = sum(size for size in sizes[:index] if isinstance(size, int))
    value = planner.rebuild(source.name, labels, context, picked=dim)
    bounds = (dim + value.lane, start, start + int(sizes[index]))  # type: ignore[arg-type]
    return unchanged(node, value) or Value(
        Call("aten.slice.Tensor", (value.plan, *bounds), node.name), value.lane, len(labels)
    )


@local_rule("repeat")
def _repeat(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Copies along the batch are the lane; along other dims they are made again."""
    source, shape = operand_of(planner, node)
    repeats = node.args.get("repeats")
    if not isinstance(repeats, tuple) or node.tensor is None:
        raise Refuse("a repeat by a computed number", node.name)
    missing = len(labels) - len(shape)
    own: list[DimLabel] = []
    again: list[object] = []
    spread: list[object] = []
    for index, (dim, times) in enumerate(zip(labels, repeats, strict=True)):
        before: Size = 1 if index < missing else shape[index - missing]
        rest = dim[1:] if dim and dim[0].axis == BATCH else dim
        spread.append(-1)
        again.append(1)
        if rest is not dim and product([f.size for f in rest]) == before:
            own.append(rest)
        elif before == 1 and has_seq(dim):
            own.append(())
            spread[-1] = dim_size(dim, node.tensor.shape[index], node.name)
        elif isinstance(times, int) and (times == 1 or not is_labelled(dim)):
            own.append(dim)
            again[-1] = times
        else:
            raise Refuse("a value repeated along the sequence", node.name)
    layout = zip(shape, own[missing:], strict=True)
    value = planner.rebuild(source.name, tuple(() if size == 1 else dim for size, dim in layout), context)
    if not value.changed and not has_batch_or_seq(labels):
        return Value(Existing(node.name), False, len(labels))
    plan = value.plan
    for _ in range(missing):
        plan = Call("aten.unsqueeze.default", (plan, int(value.lane)), node.name)
    if value.lane:
        again.insert(0, 1)
        spread.insert(0, -1)
    if any(size != -1 for size in spread):
        plan = Call("aten.expand.default", (plan, tuple(spread)), node.name)
    if any(times != 1 for times in again):
        plan = Call("aten.repeat.default", (plan, tuple(again)), node.name)
    return Value(plan, value.lane, len(labels))


def has_batch_or_seq(labels: Labels) -> bool:
    """Whether any dim is labelled."""
    return any(is_labelled(dim) for dim in labels)


@local_rule("unsqueeze")
def _unsqueeze(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    dim = int(node.args["dim"]) % (len(shape) + 1)  # type: ignore[arg-type]
    value = planner.rebuild(source.name, (*labels[:dim], *labels[dim + 1 :]), context)
    return unchanged(node, value) or Value(
        Call("aten.unsqueeze.default", (value.plan, dim + value.lane), node.name), value.lane, len(labels)
    )


@local_rule("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes")
def _permute(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    order = permutation(node, len(shape))
    if order is None:
        raise Refuse(f"the permutation of {node.op} is not known", node.name)
    own: list[DimLabel] = [()] * len(shape)
    for out_dim, in_dim in enumerate(order):
        own[in_dim] = labels[out_dim]
    value = planner.rebuild(source.name, tuple(own), context)
    dims = tuple(d + value.lane for d in order)
    return unchanged(node, value) or Value(
        Call("aten.permute.default", (value.plan, (0, *dims) if value.lane else dims), node.name),
        value.lane,
        len(labels),
    )


@local_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as")
def _view(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    assert node.tensor is not None
    own = regroup(_with_sizes(labels, node.tensor.shape), shape)
    if own is None:
        raise Refuse("a reshape splits the sequence or batch axis", node.name)
    own = tuple(() if size == 1 else dim for size, dim in zip(shape, own, strict=True))
    value = planner.rebuild(source.name, own, context)
    same = unchanged(node, value)
    if same:
        return same
    sizes = [dim_size(dim, size, node.name) for dim, size in zip(labels, node.tensor.shape, strict=True)]
    if value.lane:
        lane = AxisSize(BATCH, "", planner.fixed_batch()) if -1 in sizes else -1
        sizes.insert(0, lane)
    if sizes.count(-1) > 1:
        raise Refuse("a reshape folds the sequence with other dims in two places", node.name)
    return Value(Call("aten.reshape.default", (value.plan, tuple(sizes)), node.name), value.lane, len(labels))


def _with_sizes(labels: Labels, shape: tuple[Size, ...]) -> Labels:
    """Labels in which unlabelled dims state their size, as :func:`regroup` needs."""
    return tuple(
        dim if is_labelled(dim) or size == 1 else (Factor("", "", size),)
        for dim, size in zip(labels, shape, strict=True)
    )


@local_rule("expand", "expand_as", "broadcast_to")
def _expand(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    assert node.tensor is not None
    missing = len(labels) - len(shape)
    own = tuple(() if size == 1 else dim for size, dim in zip(shape, labels[missing:], strict=True))
    value = planner.rebuild(source.name, own, context)
    same = unchanged(node, value)
    if same and not any(has_seq(dim) for dim in labels):
        return same
    plan = value.plan
    if value.lane:
        for _ in range(missing):
            plan = Call("aten.unsqueeze.default", (plan, 1), node.name)
    sizes: list[object] = [-1] if value.lane else []
    for index, (dim, size) in enumerate(zip(labels, node.tensor.shape, strict=True)):
        before = 1 if index < missing else shape[index - missing]
        if index >= missing and before == size and before != 1 and not any(f.axis == BATCH for f in dim):
            sizes.append(-1)
        else:
            sizes.append(dim_size(dim, size, node.name))
    return Value(Call("aten.expand.default", (plan, tuple(sizes)), node.name), value.lane, len(labels))


@local_rule("alias", "contiguous", "clone", "detach")
def _copy(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node)
    value = planner.rebuild(source.name, labels, context)
    return unchanged(node, value) or Value(Reapply(node.name, (("self", value.plan),)), value.lane, len(labels))


@local_rule("select")
def _select(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    dim, index = int(node.args["dim"]) % len(shape), node.args["index"]  # type: ignore[arg-type]
    if not isinstance(index, int):
        raise Refuse("an element picked at a computed index", node.name)
    value = planner.rebuild(source.name, (*labels[:dim], (), *labels[dim:]), context, picked=dim)
    return unchanged(node, value) or Value(
        Call("aten.select.int", (value.plan, dim + value.lane, index), node.name), value.lane, len(labels)
    )


@local_rule("slice", "narrow")
def _slice(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    assert node.tensor is not None
    dim = int(node.args.get("dim", 0)) % len(shape)  # type: ignore[arg-type]
    if node.tensor.shape[dim] == shape[dim]:
        value = planner.rebuild(source.name, labels, context)
        return unchanged(node, value) or value
    if not is_labelled(labels[dim]):
        if node.base_op != "aten.slice" or not all(
            node.args.get(key) is None or isinstance(node.args.get(key), int) for key in ("start", "end")
        ):
            raise Refuse("a slice with computed bounds", node.name)
        value = planner.rebuild(source.name, labels, context, picked=dim)
        bounds = tuple(node.args.get(key) for key in ("start", "end", "step"))
        return unchanged(node, value) or Value(
            Call("aten.slice.Tensor", (value.plan, dim + value.lane, *bounds), node.name),
            value.lane,
            len(labels),
        )
    return gather_rows(planner, node, labels, context)


@local_rule("embedding")
def _embedding(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    operand_of(planner, node, "weight")
    indices, _ = operand_of(planner, node, "indices")
    if not planner.is_table(str(getattr(node.args["weight"], "name", ""))):
        raise Refuse("an embedding whose table follows the sequence", node.name)
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
        values.append((name, planner.rebuild(name, own, context)))
    same = unchanged(node, *(value for _, value in values))
    if same:
        return same
    plans: list[Plan] = []
    for _, value in values:
        plan = value.plan
        if value.lane:
            for _ in range(rank - value.rank):
                plan = Call("aten.unsqueeze.default", (plan, 1), node.name)
        plans.append(plan)
    order = [*dims, *(d for d in range(len(shape)) if d not in dims)]
    table: Plan = Existing(source.name)
    if dims[0]:
        table = Call("aten.permute.default", (table, tuple(order)), node.name)
    result: Plan = Call("aten.index.Tensor", (table, tuple(plans)), node.name)
    if dims[0]:  # [lane, *middle, *before, *after] -> [lane, *before, *middle, *after]
        first = [1 + rank + d for d in range(dims[0])]
        last = [1 + rank + d for d in range(dims[0], len(rest) - len(dims))]
        result = Call("aten.permute.default", (result, (0, *first, *range(1, 1 + rank), *last)), node.name)
    return Value(result, True, len(labels))


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
    """Rows along one dim of a value that follows the sequence along another: the columns of a mask's rows."""
    if not planner.is_fixed_along(source.name, dim):
        raise Refuse("a gather from a value that follows the sequence", node.name)
    value = planner.rebuild(source.name, rest, context, picked=dim)
    if not value.lane:
        raise Refuse("a gather from a value that follows the sequence", node.name)
    return gather_lane(node.name, value.plan, len(rest), dim, index)


@local_rule("cat", "concat", "concatenate", "stack")
def _cat(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    dim = int(node.args.get("dim", 0)) % len(labels)  # type: ignore[arg-type]
    if is_labelled(labels[dim]):
        raise Refuse("values joined along the sequence", node.name)
    stacked = node.base_op == "aten.stack"
    own = (*labels[:dim], *labels[dim + 1 :]) if stacked else (*labels[:dim], (), *labels[dim + 1 :])
    values = [(path, planner.rebuild(name, own, context)) for path, name in node.named_refs()]
    same = unchanged(node, *(value for _, value in values))
    if same:
        return same
    first = next((value.plan for _, value in values if value.lane), None)
    if first is None:
        raise Refuse("changed values without a batch are joined", node.name)
    lane = Call("aten.sym_size.int", (first, 0), node.name)
    parts = tuple(value.plan if value.lane else spread(value, lane, node.name) for _, value in values)
    return Value(Call(f"aten.{'stack' if stacked else 'cat'}.default", (parts, dim + 1), node.name), True, len(labels))


def spread(value: Value, lane: Plan, anchor: str) -> Plan:
    """A value that is the same for all samples, repeated for each."""
    lifted = Call("aten.unsqueeze.default", (value.plan, 0), anchor)
    return Call("aten.expand.default", (lifted, (lane, *[-1] * value.rank)), anchor)


@local_rule("tril", "triu")
def _triangle(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node)
    diagonal = node.args.get("diagonal", 0)
    row, col = labels[-2], labels[-1]
    if len(row) != 1 or len(col) != 1 or row[0].role != ROW or col[0].role != COL or not isinstance(diagonal, int):
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
