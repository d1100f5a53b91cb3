"""Rules for ops that look at data in another way: reshapes, permutations, slices, joins."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import Alignment, AxisResult, OpView, as_it_is, rule
from buffer_lifting.graph.record import Node, Ref
from buffer_lifting.graph.sizes import Size, divide
from buffer_lifting.labels import (
    COL,
    SINKS,
    DimLabel,
    Factor,
    Labels,
    batch_dim,
    broadcast,
    feature,
    features,
    has_seq,
    is_labelled,
    regroup,
)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as")
def _view(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    out = regroup(labels, shape)
    return AxisResult(None if out is None else (out,), mixing="" if out else "a sequence or batch axis is split up")


@rule("unsqueeze")
def _unsqueeze(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels) + 1)
    return AxisResult(((*labels[:dim], (), *labels[dim:]),))


@rule("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes")
def _permute(view: OpView) -> AxisResult:
    labels = view.labels("self")
    order = None if labels is None else permutation(view.node, len(labels))
    if labels is None or order is None:
        return AxisResult(None)
    return AxisResult((tuple(labels[d] for d in order),))


def permutation(node: Node, rank: int) -> list[int] | None:
    """For each output dim of a permuting op the input dim it comes from."""
    order = list(range(rank))
    if node.base_op == "aten.permute":
        dims = node.args["dims"]
        return [d % rank for d in dims if isinstance(d, int)] if isinstance(dims, tuple) else None
    if node.base_op in ("aten.transpose", "aten.swapaxes"):
        first, second = (
            node.args.get("dim0", node.args.get("axis0")),
            node.args.get("dim1", node.args.get("axis1")),
        )
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
        return order
    if node.base_op in ("aten.t", "aten.numpy_T"):
        return order[::-1]
    if node.base_op == "aten.mT":
        return [*order[:-2], order[-1], order[-2]]
    source, target = node.args.get("source"), node.args.get("destination")
    if isinstance(source, int) and isinstance(target, int):
        moved = order.pop(source % rank)
        order.insert(target % rank, moved)
        return order
    return None


@rule("expand", "expand_as", "broadcast_to", "repeat")
def _expand(view: OpView) -> AxisResult:
    labels, shape, source = view.labels("self"), view.shape("out"), view.shape("self")
    if labels is None or shape is None or source is None:
        return AxisResult(None)
    missing = len(shape) - len(labels)
    out: list[DimLabel] = [feature(size) for size in shape[:missing]]
    for label, before, after in zip(labels, source, shape[missing:], strict=True):
        if before != after and is_labelled(label) and before != 1:
            return AxisResult(None, mixing="the sequence is repeated")
        out.append(label if before == after else feature(after))
    return AxisResult((tuple(out),))


@rule("slice", "narrow")
def _slice(view: OpView) -> AxisResult:
    labels, shape, source = view.labels("self"), view.shape("out"), view.shape("self")
    if labels is None or shape is None or source is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if shape[dim] == source[dim]:
        return AxisResult((labels,))
    if len(labels[dim]) == 1 and labels[dim][0].role == SINKS and not view.node.args.get("start"):
        length = view.length(labels[dim][0].axis)
        if length is not None and isinstance(divide(shape[dim], length), int):  # of this rank, or of all ranks
            return AxisResult(((*labels[:dim], (Factor(labels[dim][0].axis, COL, shape[dim]),), *labels[dim + 1 :]),))
    if is_labelled(labels[dim]):
        what = "sequence" if has_seq(labels[dim]) else "batch"
        return AxisResult(None, mixing=f"a part of the {what} is cut out")
    if isinstance(source[dim], int) and view.is_length(shape[dim]):
        return AxisResult(None, mixing="features are cut at a number made from the sequence length")
    return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim + 1 :]),))


@rule("select")
def _select(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    rest = (*labels[:dim], *labels[dim + 1 :])
    if is_labelled(labels[dim]):
        what = "sequence" if has_seq(labels[dim]) else "batch"
        return AxisResult((rest,), mixing=f"one element of the {what} is picked")
    return AxisResult((rest,))


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing=f"the {'sequence' if has_seq(labels[dim]) else 'batch'} is split")
    return AxisResult(tuple((*labels[:dim], feature(s[dim]), *labels[dim + 1 :]) for s in view.shapes_out()))


@rule("unbind")
def _unbind(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing=f"the {'sequence' if has_seq(labels[dim]) else 'batch'} is split")
    return AxisResult(((*labels[:dim], *labels[dim + 1 :]),) * len(view.shapes_out()))


@rule("getitem")
def _getitem(view: OpView) -> AxisResult:
    source = view.node.args.get("0")
    index = view.node.args.get("1")
    known = view.known.get(source.name) if isinstance(source, Ref) else None
    if not known or not isinstance(index, int) or index >= len(known):
        return AxisResult(None)
    if index == 1 and isinstance(source, Ref) and _picks_along_the_sequence(view, source.name):
        return AxisResult((known[index],), mixing="an index along the sequence is taken from the data")
    return AxisResult((known[index],))


def _picks_along_the_sequence(view: OpView, name: str) -> bool:
    """Whether a node returns, beside values, their places along a labelled dim (``max`` and its like)."""
    node = view.record.nodes[name]
    operand, dim = node.args.get("self"), node.args.get("dim")
    known = view.known.get(operand.name) if isinstance(operand, Ref) else None
    if node.base_op not in PLACES or not known or not isinstance(dim, int):
        return False
    return is_labelled(known[0][dim % len(known[0])])


#: Reductions whose second result says where along ``dim`` the first was found.
PLACES = frozenset(f"aten.{name}" for name in ["max", "min", "median", "nanmedian"])


@rule("cat", "concat", "concatenate", "stack")
def _cat(view: OpView) -> AxisResult:
    shape = view.shape("out")
    if shape is None:
        return AxisResult(None)
    stacked = view.node.base_op == "aten.stack"
    dim = view.dim("dim", len(shape))
    parts: list[Labels] = []
    joined: DimLabel = ()
    for path, own in view.tensors():
        labels = view.labels(path)
        if labels is not None and any(size == 0 for size in own):
            continue  # an empty cache
        if labels is not None:
            if not stacked and is_labelled(labels[dim]):
                joined = labels[dim]
            parts.append((*labels[:dim], (), *labels[dim if stacked else dim + 1 :]))
    if joined:
        extended = _joined(view, joined, dim, shape)
        if extended is None:
            return _not_joined(view, dim)
        parts = [(*labels[:dim], extended, *labels[dim + 1 :]) for labels in parts]
    out = broadcast(parts, shape)
    if out is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    batch = batch_dim(out)
    operands = {}
    for path, own in view.tensors():
        if any(size == 0 for size in own):
            operands[path] = Alignment(features(own), None)
            continue
        own_dims = (*out[:dim], *out[dim + 1 :]) if stacked else (*out[:dim], (), *out[dim + 1 :])
        operands[path] = Alignment(own_dims, None if batch is None else len(out) - batch)
    return AxisResult((out,), operands)


def _not_joined(view: OpView, dim: int) -> AxisResult:
    """Why values cannot be joined along ``dim``: the parts of which run along the batch or the sequence."""
    known = {path: view.labels(path) for path, _ in view.tensors()}
    follow = [labels[dim] for labels in known.values() if labels is not None and is_labelled(labels[dim])]
    if not any(has_seq(dim) for dim in follow):
        return AxisResult(None, mixing="values are joined along the batch")
    if len(follow) == len(known):
        return AxisResult(None, mixing="values are joined along the sequence")
    plain = [(path, own) for path, own in view.tensors() if known[path] is None and view.positional(path) is None]
    others = {path: Alignment(features(own), None) for path, own in plain}
    why = (
        "rows that are no tokens (memory keys, prefix tokens) are joined to the sequence: they have no slot in an order"
    )
    return AxisResult(None, others, why, hint=_NO_TOKENS)


_NO_TOKENS = (
    "export the model without them (num_memory_tokens, num_mem_kv, prefix length 0); a constant column of the scores "
    "behind the keys can stay (attention sinks); lift with strict=False if the sequence is never reordered or sharded"
)


@rule("slice_scatter", "select_scatter")
def _scatter_part(view: OpView) -> AxisResult:
    """A part of a dim replaced: keys assembled from two halves."""
    shape, dim = view.shape("out"), view.dim("dim", len(view.shape("self") or ()))
    if shape is None:
        return AxisResult(None)
    selects = view.node.base_op == "aten.select_scatter"
    written = view.labels("src")
    if not selects and view.shape("src") == shape and written is not None:
        return AxisResult((written,), {"src": as_it_is(written)}, consumed=frozenset(["self"]))  # nothing of it is left
    parts = []
    for path in ("self", "src"):
        labels = view.labels(path)
        if labels is None:
            if view.is_lost(path):
                return AxisResult(None)
            continue
        if path == "src" and selects:
            labels = (*labels[:dim], (), *labels[dim:])
        if is_labelled(labels[dim]):
            return AxisResult(None, mixing="a part of the sequence or batch is replaced")
        parts.append((*labels[:dim], (), *labels[dim + 1 :]))
    out = broadcast(parts, shape)
    if out is None or is_labelled(out[dim]):
        return AxisResult(None, mixing="elements at different sequence positions meet")
    batch = batch_dim(out)
    from_right = None if batch is None else len(out) - batch
    part = (*out[:dim], *out[dim + 1 :]) if selects else (*out[:dim], (), *out[dim + 1 :])
    return AxisResult((out,), {"self": Alignment(out, from_right), "src": Alignment(part, from_right)})


def _joined(view: OpView, label: DimLabel, dim: int, shape: tuple[Size, ...]) -> DimLabel | None:
    """Joined along a labelled dim: with nothing (an empty cache), or scores with columns that are no keys (sinks)."""
    if shape[dim] == label[0].size and len(label) == 1:
        return label
    if len(label) != 1 or label[0].role != COL:
        return None
    first = True
    for path, own in view.tensors():
        labels = view.labels(path)
        follows = labels is not None and is_labelled(labels[dim])
        if follows != first or not (follows or isinstance(own[dim], int)):
            return None
        first = False
    return (label[0]._replace(role=SINKS, size=shape[dim]),)
