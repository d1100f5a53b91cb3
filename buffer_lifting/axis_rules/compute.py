"""Rules for ops that compute: products, norms, reductions, attention, losses, moves along a dim."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import Alignment, AxisResult, OpView, align, as_it_is, pointwise, rule
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import (
    BATCH,
    COL,
    KEYS,
    ROW,
    DimLabel,
    Labels,
    batch_dim,
    broadcast,
    feature,
    features,
    has_seq,
    is_labelled,
    with_role,
)
from buffer_lifting.ops import ATTENTION, MATRIX_OPERANDS


@rule("linear")
def _linear(view: OpView) -> AxisResult:
    labels, shape = view.labels("input"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    if is_labelled(labels[-1]):
        return AxisResult(None, mixing="a learned projection runs along the sequence")
    out = (*labels[:-1], feature(shape[-1]))
    operands = {path: Alignment(features(s), None) for path, s in view.tensors() if path != "input"}
    return AxisResult((out,), {"input": as_it_is(labels), **operands})


@rule("matmul", "bmm", "mm", "addmm", "baddbmm")
def _matmul(view: OpView) -> AxisResult:
    added = view.node.base_op in ("aten.addmm", "aten.baddbmm")
    left_path, right_path = MATRIX_OPERANDS[view.node.base_op]
    left_shape, right_shape, shape = view.shape(left_path), view.shape(right_path), view.shape("out")
    if left_shape is None or right_shape is None or shape is None:
        return AxisResult(None)
    if len(left_shape) < 2 or len(right_shape) < 2:
        return AxisResult(None, mixing="a matrix-vector product whose axes are not known")
    left, right = view.labels(left_path), view.labels(right_path)
    lhs = left if left is not None else features(left_shape)
    rhs = right if right is not None else features(right_shape)
    outer = broadcast([own[:-2] for own in (left, right) if own is not None], shape[:-2])
    if outer is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    row, col = lhs[-2], rhs[-1]
    if has_seq(row) and has_seq(col):
        col = with_role(col, COL)
    out = (
        *outer,
        row if is_labelled(row) else feature(shape[-2]),
        col if is_labelled(col) else feature(shape[-1]),
    )
    mixing, handled = "", False
    inner = (lhs[-1], rhs[-2])
    if _meet(*inner):
        return AxisResult(None, mixing="elements at positions of different sequences meet")
    if any(f.axis == BATCH for dim in inner for f in dim):
        mixing = "a sum over the batch"
    elif any(has_seq(dim) for dim in inner):
        if any(factor.role == COL for dim in inner for factor in dim):
            mixing, handled = "attention: a sum over keys", True
        else:
            mixing = "a sum over the sequence"
    operands = {left_path: Alignment(lhs, None), right_path: Alignment(rhs, None)}
    batch = batch_dim(out)
    for path, own in operands.items():
        operands[path] = Alignment(own.labels, None if batch is None else len(out) - batch)
    if added:
        operands["self"] = align(out, view.shape("self") or ())
    if left is None or right is None:
        unknown = left_path if left is None else right_path
        operands[unknown] = _operand_of_matmul(view, unknown, left_path, lhs, rhs, out)
    return AxisResult((out,), operands, mixing, handled)


def _operand_of_matmul(view: OpView, path: str, left_path: str, lhs: Labels, rhs: Labels, out: Labels) -> Alignment:
    """The alignment of a matmul operand that carries no data: its contracted dim runs along the data's."""
    shape = view.shape(path) or ()
    outer = align(out[:-2], shape[:-2]).labels
    if path == left_path:
        matrix = (feature(shape[-2]), rhs[-2])
    else:
        matrix = (lhs[-1], feature(shape[-1]))
    batch = batch_dim(out)
    return Alignment((*outer, *matrix), None if batch is None else len(out) - batch)


def _meet(one: DimLabel, other: DimLabel) -> bool:
    """Whether two dims that are paired element by element run along different sequence axes."""
    axes = [{factor.axis for factor in dim if factor.is_seq} for dim in (one, other)]
    return bool(axes[0] and axes[1] and axes[0] != axes[1])


@rule("einsum")
def _einsum(view: OpView) -> AxisResult:
    equation, shape = view.node.args.get("equation"), view.shape("out")
    if not isinstance(equation, str) or shape is None or "." in equation or "->" not in equation:
        return AxisResult(None)
    left, target = equation.replace(" ", "").split("->")
    if [len(part) for part in left.split(",")] != [len(own) for _, own in view.tensors()] or len(target) != len(shape):
        return AxisResult(None)  # a damaged archive: torch itself makes no such node
    by_letter: dict[str, DimLabel] = {}
    for (path, _), letters in zip(view.tensors(), left.split(","), strict=True):
        for letter, dim in zip(letters, view.labels(path) or (), strict=False):
            known = by_letter.setdefault(letter, dim) if is_labelled(dim) else dim
            if known != dim and (letter in target or with_role(known, COL) != with_role(dim, COL)):
                return AxisResult(None, mixing="elements at different sequence positions meet")
            if known != dim:
                by_letter[letter] = with_role(dim, COL)  # summed over: the keys of scores and of values
    for (path, _), letters in zip(view.tensors(), left.split(","), strict=True):
        for letter, dim in zip(letters, view.positional(path) or (), strict=False):
            if has_seq(dim) and letter in target and letter not in by_letter:  # relative positions bring the keys
                rows = any(f.axis == dim[0].axis for known in by_letter.values() for f in known)
                by_letter[letter] = with_role(dim, COL if rows else ROW)
    out: list[DimLabel] = []
    for letter, size in zip(target, shape, strict=True):
        dim = by_letter.get(letter, feature(size))
        if has_seq(dim) and any({(f.axis, f.role) for f in dim} & {(f.axis, f.role) for f in old} for old in out):
            dim = with_role(dim, COL)
        out.append(dim)
    mixing, handled = "", False
    for letter, dim in by_letter.items():
        if letter not in target and has_seq(dim):
            handled = any(factor.role == COL for factor in dim)
            mixing = "attention: a sum over keys" if handled else "a sum over the sequence"
        elif letter not in target and is_labelled(dim):
            mixing = mixing or "a sum over the batch"
    operands = {}
    for (path, own), letters in zip(view.tensors(), left.split(","), strict=True):
        of_data = view.labels(path) if view.is_data(path) else None
        labels = tuple(by_letter.get(letter, feature(size)) for letter, size in zip(letters, own, strict=True))
        # a value of positions has no batch dim of its own: lifting puts one in front, and into the equation
        front = len(labels) + 1 if batch_dim(labels) is None else len(labels) - (batch_dim(labels) or 0)
        operands[path] = Alignment(of_data or labels, None if of_data else front)
    return AxisResult((tuple(out),), operands, mixing, handled)


@rule("embedding")
def _embedding(view: OpView) -> AxisResult:
    labels, weight, shape = view.labels("indices"), view.shape("weight"), view.shape("out")
    if labels is None or weight is None or shape is None:
        return AxisResult(None)
    out = (*labels, feature(shape[-1]))
    return AxisResult((out,), {"indices": Alignment(labels, None), "weight": Alignment(features(weight), None)})


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _norm(view: OpView) -> AxisResult:
    labels = view.labels("input")
    over = view.node.args.get("normalized_shape")
    if labels is None or not isinstance(over, tuple):
        return AxisResult(None)
    mixed = any(is_labelled(dim) for dim in labels[len(labels) - len(over) :])
    operands = {path: Alignment(features(s), None) for path, s in view.tensors() if path != "input"}
    operands["input"] = as_it_is(labels)
    outs: list[Labels] = [labels]
    for shape in view.shapes_out()[1:]:
        outs.append(tuple(() if size == 1 else dim for dim, size in zip(labels, shape, strict=True)))
    return AxisResult(tuple(outs), operands, "a norm runs along the sequence or batch" if mixed else "")


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = labels[view.dim("dim", len(labels), -1)]
    if has_seq(dim) and any(f.axis == BATCH for f in dim):
        return AxisResult((labels,), mixing="a softmax along the batch")
    if has_seq(dim):
        handled = any(factor.role in KEYS for factor in dim)
        why = "attention: a softmax over keys" if handled else "a softmax along the sequence"
        return AxisResult((labels,), mixing=why, handled=handled)
    if is_labelled(dim):
        return AxisResult((labels,), mixing="a softmax along the batch")
    return AxisResult((labels,))


_REDUCTIONS = """sum mean amax amin prod var std logsumexp norm linalg_vector_norm all any argmax argmin max min
nansum median var_mean std_mean count_nonzero"""


@rule(*_REDUCTIONS.split())
def _reduce(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    if view.node.op in ("aten.max.other", "aten.min.other"):
        return pointwise(view)
    dims = view.node.args.get("dim", view.node.args.get("dims"))
    rank = len(labels)
    if isinstance(dims, int):
        over = {dims % max(rank, 1)}
    elif isinstance(dims, tuple) and dims:
        over = {d % rank for d in dims if isinstance(d, int)}
    else:
        over = set(range(rank))
    keep = bool(view.node.args.get("keepdim"))
    out: list[DimLabel] = []
    mixing, handled = "", False
    for index, dim in enumerate(labels):
        if index not in over:
            out.append(dim)
            continue
        if has_seq(dim) and view.node.base_op in ("aten.argmax", "aten.argmin"):
            mixing, handled = "a reduction over the sequence: an index along it is taken from the data", False
        elif has_seq(dim) and all(f.role in KEYS for f in dim if f.is_seq):
            mixing, handled = "attention: a reduction over keys", True
        elif has_seq(dim):
            handled = len(over) == rank and view.node.base_op in (
                "aten.sum",
                "aten.mean",
                "aten.nansum",
            )  # everything is reduced: a loss, which the CP contract normalises
            mixing = "a loss: a reduction over all tokens" if handled else "a reduction over the sequence"
        elif is_labelled(dim) and len(over) < rank:
            mixing = mixing or "a reduction over the batch"
        if keep:
            out.append(())
    return AxisResult((tuple(out),) * len(view.shapes_out()), {}, mixing, handled)


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
def _loss(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    rest = (labels[0], *labels[2:]) if len(labels) > 1 else ()
    batch = batch_dim(rest)
    target = Alignment(rest, None if batch is None else len(rest) - batch)
    weight = view.shape("weight")
    operands = {"target": target}
    if weight is not None:
        operands["weight"] = Alignment(features(weight), None)
    if len(labels) > 1 and is_labelled(labels[1]):
        return AxisResult(None, operands, "the classes of a loss run along the sequence")
    if view.node.args.get("reduction") == 0:
        return AxisResult((rest,), operands)
    return AxisResult(((),), operands, "a loss: a reduction over all tokens", True)


@rule(ATTENTION)
def _attention(view: OpView) -> AxisResult:
    query, key, value = (view.labels(path) for path in ("query", "key", "value"))
    shape = view.shape("out")
    if query is None or key is None or value is None or shape is None:
        return AxisResult(None, mixing="attention whose keys or queries are not known to follow the sequence")
    if _meet(key[-2], value[-2]):
        return AxisResult(None, mixing="attention whose keys and values run along different sequences")
    out = (*query[:-1], feature(shape[-1]))
    operands = {}
    mask = view.shape("attn_mask")
    if mask is not None:
        scores = (*query[:-1], with_role(key[-2], COL))
        operands["attn_mask"] = align(scores, mask)
    if any(f.axis == BATCH for dim in (query[-2], key[-2]) for f in dim):
        return AxisResult((out,), operands, "attention along the batch")
    if not has_seq(query[-2]) or not has_seq(key[-2]):
        over_features = not has_seq(key[-2])
        return AxisResult((out,), operands, "" if over_features else "attention: a sum over keys", True)
    return AxisResult((out,), operands, "attention: a sum over keys", True)


@rule("view_as_complex")
def _view_as_complex(view: OpView) -> AxisResult:
    labels = view.labels("self")
    return AxisResult(None if labels is None or is_labelled(labels[-1]) else (labels[:-1],))


@rule("view_as_real")
def _view_as_real(view: OpView) -> AxisResult:
    labels = view.labels("self")
    return AxisResult(None if labels is None else ((*labels, feature(2)),))


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
    index = view.labels(paths[0]) if len(paths) == 1 else None
    if index is None:
        return AxisResult(None)
    rest = shape[dim + len(index) :]
    out = (*features(shape[:dim]), *index, *features(rest))
    table = Alignment(features(view.shape("self") or ()), None)
    return AxisResult((out,), {paths[0]: as_it_is(index), "self": table})


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
