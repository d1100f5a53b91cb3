"""Rules for ops that move, pick or scatter elements along a dim: sorts, cumulative ops, gathers, rolls, pads."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import Alignment, AxisResult, OpView, align, as_it_is, broadcast, rule
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import (
    COL,
    ROW,
    DimLabel,
    Labels,
    feature,
    features,
    has_seq,
    is_labelled,
    with_role,
)


@rule("topk", "sort", "argsort", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff")
def _along_dim(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels), -1)
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing=f"{view.node.base_op} runs along the sequence or batch")
    outs = tuple((*labels[:dim], feature(s[dim]), *labels[dim + 1 :]) for s in view.shapes_out())
    return AxisResult(outs)


@rule(
    "roll",
    "flip",
    "gather",
    "index_select",
    "index",
    "index_put",
    "scatter",
    "scatter_add",
    "constant_pad_nd",
    "pad",
)
def _moves(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    op = view.node.base_op
    if labels is None and shape is not None and op in ("aten.gather", "aten.index", "aten.index_select"):
        return _from_table(view, shape)
    if labels is None or shape is None:
        return AxisResult(None)
    if op in ("aten.roll", "aten.flip"):
        dims = view.node.args.get("dims")
        over = {d % len(labels) for d in dims if isinstance(d, int)} if isinstance(dims, tuple) else set()
        if over and not any(is_labelled(labels[d]) for d in over):
            return AxisResult((labels,))
        if over and not any(has_seq(labels[d]) for d in over):
            return AxisResult((labels,), mixing=f"{op} moves elements along the batch")
    if op in ("aten.constant_pad_nd", "aten.pad"):
        # by the widths, not by the sizes: (1, -1) shifts a dim and keeps its size
        widths = view.node.args.get("pad")
        widths = widths if isinstance(widths, tuple) else ()
        changed = {len(labels) - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
        if widths and not any(is_labelled(labels[d]) for d in changed):
            return AxisResult((tuple(feature(shape[d]) if d in changed else x for d, x in enumerate(labels)),))
    if op == "aten.index":
        return _index(view, labels, shape)
    if op in ("aten.gather", "aten.index_select"):
        dim = view.dim("dim", len(labels))
        if not is_labelled(labels[dim]):
            picked = _picked(view, "index", dim if op == "aten.gather" else 0, labels)
            out = (*labels[:dim], picked, *labels[dim + 1 :])
            if op == "aten.index_select":
                return AxisResult((out,), {"index": Alignment((picked,), None)})
            return AxisResult((out,), {"index": align(out, view.shape("index") or ())})
        if not has_seq(labels[dim]):
            return AxisResult(None, mixing=f"{op} picks samples of the batch")
    return AxisResult(None, mixing=f"{op} may move elements along the sequence")


def _from_table(view: OpView, shape: tuple[Size, ...]) -> AxisResult:
    """Rows of a table without data or user contents, picked by an index with labels."""
    if view.is_lost("self"):
        return AxisResult(None)
    if view.node.base_op == "aten.gather":
        index = view.labels("index")
        if index is None:
            return AxisResult(None)
        table = Alignment(features(view.shape("self") or ()), None)
        return AxisResult((index,), {"index": as_it_is(index), "self": table})
    arg = view.node.args.get("indices")
    paths = [f"indices.{d}" for d, item in enumerate(arg) if item is not None] if isinstance(arg, tuple) else ["index"]
    dim = view.dim("dim", len(view.shape("self") or ())) if paths == ["index"] else int(paths[0].partition(".")[2])
    if len(paths) > 1:
        return _from_matrix(view, paths, shape)
    index = view.labels(paths[0])
    if index is None:
        return AxisResult(None)
    rest = shape[dim + len(index) :]
    out = (*features(shape[:dim]), *index, *features(rest))
    table = Alignment(features(view.shape("self") or ()), None)
    return AxisResult((out,), {paths[0]: as_it_is(index), "self": table})


def _from_matrix(view: OpView, paths: list[str], shape: tuple[Size, ...]) -> AxisResult:
    """Elements of a table, picked by the broadcast of several indices of neighbouring dims: ``bias[rows, columns]``."""
    places = [int(path.partition(".")[2]) for path in paths]
    own, known = [view.shape(path) or () for path in paths], [view.labels(path) for path in paths]
    labels = [each for each in known if each is not None]
    first, rank = places[0], max(len(each) for each in own)
    if places != list(range(first, first + len(places))) or len(labels) != len(paths):
        return AxisResult(None)
    metas = [view.record.nodes[dict(view.node.named_refs())[path]].tensor for path in paths]
    if any(meta is None or meta.dtype == "bool" for meta in metas):
        return AxisResult(None)
    picked = broadcast(labels, shape[first : first + rank])
    if picked is None:
        return AxisResult(None)
    taken = [(f.axis, f.role) for dim in picked for f in dim if f.is_seq]
    same = all(
        mine == dim for each in labels for mine, dim in zip(each[::-1], picked[::-1], strict=False) if has_seq(mine)
    )
    if len(set(taken)) != len(taken) or not same:
        return AxisResult(None)  # keys picked by data would have to be gathered
    out = (*features(shape[:first]), *picked, *features(shape[first + rank :]))
    operands = {path: align(picked, each) for path, each in zip(paths, own, strict=True)}
    return AxisResult((out,), {**operands, "self": Alignment(features(view.shape("self") or ()), None)})


@rule("repeat_interleave")
def _repeat_interleave(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    dim = view.node.args.get("dim")
    if labels is None or shape is None:
        return AxisResult(None)
    if not isinstance(dim, int) or is_labelled(labels[dim % len(labels)]):
        return AxisResult(None, mixing="the sequence is repeated")
    dim %= len(labels)
    return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim + 1 :]),))


def _picked(view: OpView, path: str, dim: int, labels: Labels) -> DimLabel:
    """The label of a dim that an index picks from features: ``scores.gather(-1, i - j)`` makes it the keys."""
    shape, own = view.shape(path) or (), view.labels(path) or view.positional(path)
    label = own[dim] if own else ()
    if not has_seq(label):
        return feature(shape[dim])
    taken = {(f.axis, f.role) for other in labels for f in other if f.is_seq}
    for role in (ROW, COL):
        if not any((f.axis, role) in taken for f in label):
            return with_role(label, role)
    return feature(shape[dim])


def _index(view: OpView, labels: Labels, shape: tuple[Size, ...]) -> AxisResult:
    """Features picked by one index: ``qkv[:, :, :, [-2]]``."""
    indices = view.node.args.get("indices")
    given = (
        [(d, f"indices.{d}") for d, arg in enumerate(indices) if arg is not None] if isinstance(indices, tuple) else []
    )
    if given and all(is_labelled(labels[d]) and not has_seq(labels[d]) for d, _ in given):
        return AxisResult(None, mixing="aten.index picks samples of the batch")
    if len(given) != 1 or is_labelled(labels[given[0][0]]):
        return AxisResult(None, mixing="aten.index may move elements along the sequence")
    dim, path = given[0]
    own = view.shape(path) or ()
    meta = view.record.nodes[dict(view.node.named_refs())[path]].tensor
    if meta is None or meta.dtype == "bool":
        return AxisResult(None, mixing="aten.index by a mask may move elements along the sequence")
    rest = (*labels[:dim], *labels[dim + 1 :])
    picked = tuple(_picked(view, path, d, rest) for d in range(len(own)))
    if len({(f.axis, f.role) for d in picked for f in d if f.is_seq}) != sum(has_seq(d) for d in picked):
        return AxisResult(None, mixing="aten.index may move elements along the sequence")
    out = (*labels[:dim], *picked, *labels[dim + 1 :])
    return AxisResult((out,), {path: Alignment(picked, None)})


@rule("glu")
def _glu(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels), -1)
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing="the sequence is split")
    return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim + 1 :]),))
