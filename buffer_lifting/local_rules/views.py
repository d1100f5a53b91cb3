"""Local rules for ops that lay out a value anew: reshapes, permutations, expansions, copies, parts, joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import permutation
from buffer_lifting.gathering import gather_rows, operand_of
from buffer_lifting.graph.record import Node, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size, product
from buffer_lifting.labels import BATCH, DimLabel, Factor, Labels, has_seq, is_labelled, regroup
from buffer_lifting.local_rules.core import dim_size, has_batch_or_seq, local_rule, part_of_whole, spread, unchanged
from buffer_lifting.local_rules.tables import token_at
from buffer_lifting.plan import AxisSize, Call, Context, Existing, Reapply, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner

_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unbind")


@local_rule("getitem")
def _getitem(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """One part of a value that was split along a dim other than the sequence, or one of several broadcast ones."""
    parts, index = node.args.get("0"), node.args.get("1")
    split = planner.record.nodes[parts.name] if isinstance(parts, Ref) else None
    if split is not None and split.base_op == "aten.broadcast_tensors" and isinstance(index, int):
        source, shape = operand_of(planner, split, f"tensors.{index}")
        return _spread(planner, node, source, shape, labels, context)
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
    if not value.changed and any(len(dim) > 1 and dim[0].axis == BATCH for dim in labels):
        plan = Call("aten.alias.default", (plan,), node.name)  # one sample's part: no longer the node itself
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
    sizes = [dim_size(dim, size, node.name, True) for dim, size in zip(labels, node.tensor.shape, strict=True)]
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
    return _spread(planner, node, *operand_of(planner, node), labels, context)


def _spread(
    planner: Planner, node: Node, source: Node, shape: tuple[Size, ...], labels: Labels, context: Context
) -> Value:
    """``source``, of ``shape``, expanded to the shape of ``node``."""
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


@local_rule("alias", "contiguous", "clone", "detach", "detach_")
def _copy(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node)
    value = planner.rebuild(source.name, labels, context)
    if node.base_op == "aten.detach_" and value.changed:
        return Value(Call("aten.detach.default", (value.plan,), node.name), value.lane, len(labels))
    return unchanged(node, value) or Value(Reapply(node.name, (("self", value.plan),)), value.lane, len(labels))


@local_rule("select")
def _select(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    dim, index = int(node.args["dim"]) % len(shape), node.args["index"]  # type: ignore[arg-type]
    if not isinstance(index, int):
        raise Refuse("an element picked at a computed index", node.name)
    whole = part_of_whole(planner, node, source, shape[dim], labels, index >= 0)
    if whole is not None:
        return whole
    token = token_at(planner, node, (*labels[:dim], (), *labels[dim:]), dim, index, context)
    if token is not None:
        return Value(Call("aten.select.int", (token.plan, dim + 1, 0), node.name), True, len(labels))
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
            hint = "slice by sizes (tensor.shape) rather than .item(), or export with static shapes"
            raise Refuse("a slice with computed bounds", node.name, hint=hint)
        ends = [node.args.get(key) for key in ("start", "end")]
        front = all(end is None or (isinstance(end, int) and end >= 0) for end in ends)
        whole = part_of_whole(planner, node, source, shape[dim], labels, front)
        if whole is not None:
            return whole
        bounds = tuple(node.args.get(key) for key in ("start", "end", "step"))
        token = token_at(planner, node, labels, dim, bounds[0] or 0, context) if node.tensor.shape[dim] == 1 else None
        if token is not None:
            return token
        value = planner.rebuild(source.name, labels, context, picked=dim)
        return unchanged(node, value) or Value(
            Call("aten.slice.Tensor", (value.plan, dim + value.lane, *bounds), node.name),
            value.lane,
            len(labels),
        )
    return gather_rows(planner, node, labels, context)


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
