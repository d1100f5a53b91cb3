"""Rules for ops that compute: products, norms, reductions, attention, losses, moves along a dim."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import (
    OVER_KEYS,
    Alignment,
    AxisResult,
    OpView,
    align,
    as_it_is,
    by_keys,
    pointwise,
    rule,
    where_it_varies,
)
from buffer_lifting.axis_rules.key_major import keys_where_normalised
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
    vector = len(right_shape) == 1 and not view.is_data(right_path) and view.node.base_op == "aten.matmul"
    rows = view.labels(left_path) if vector else None
    if rows is not None and len(rows) > 1 and not is_labelled(rows[-1]):
        return AxisResult((rows[:-1],), {left_path: as_it_is(rows), right_path: Alignment(features(right_shape), None)})
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
    if left is None or right is None:
        unknown = left_path if left is None else right_path
        operands[unknown] = _operand_of_matmul(view, unknown, left_path, lhs, rhs, out)
    turned = out if left is None or right is None else keys_where_normalised(out, view.softmax_dim())
    if added:
        operands["self"] = align(turned, view.shape("self") or ())
    return AxisResult((turned,), operands, mixing, handled)


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
        shared = any(has_seq(by_letter.get(letter, ())) for letter in letters)
        rows = view.positional(path) if shared else view.brings(path)  # not the features of a projection
        for letter, dim in zip(letters, rows or (), strict=False):
            if has_seq(dim) and letter in target and letter not in by_letter:  # relative positions bring the keys
                known_rows = any(f.axis == dim[0].axis for known in by_letter.values() for f in known)
                by_letter[letter] = with_role(dim, COL if known_rows else ROW)
    out: list[DimLabel] = []
    for letter, size in zip(target, shape, strict=True):
        dim = by_letter.get(letter, feature(size))
        if has_seq(dim) and any({(f.axis, f.role) for f in dim} & {(f.axis, f.role) for f in old} for old in out):
            dim = with_role(dim, COL)
        out.append(dim)
    turned = keys_where_normalised(tuple(out), view.softmax_dim())
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
    return AxisResult((turned,), operands, mixing, handled)


#: Of ``scale_grad_by_freq``: a rank has a part of the tokens, and a microbatch a part of the batch.
BY_FREQUENCY = "scale_grad_by_freq divides the gradient of each row by how often all tokens name it"
NO_FREQUENCY = "make the embedding with scale_grad_by_freq=False"


@rule("embedding")
def _embedding(view: OpView) -> AxisResult:
    labels, weight, shape = view.labels("indices"), view.shape("weight"), view.shape("out")
    if labels is None or weight is None or shape is None:
        return AxisResult(None)
    out = (*labels, feature(shape[-1]))
    operands = {"indices": Alignment(labels, None), "weight": Alignment(features(weight), None)}
    counted = view.node.args.get("scale_grad_by_freq") is True and any(is_labelled(dim) for dim in labels)
    return AxisResult((out,), operands, BY_FREQUENCY if counted else "", hint=NO_FREQUENCY if counted else "")


@rule("bucketize", "searchsorted")
def _bucket(view: OpView) -> AxisResult:
    labels = view.labels("self")
    borders = "boundaries" if view.node.ref("boundaries") else "sorted_sequence"
    shape = view.shape(borders)
    if labels is None or shape is None or len(shape) != 1 or view.node.ref("sorter"):
        return AxisResult(None)
    if any(is_labelled(dim) for dim in view.labels(borders) or ()):
        return AxisResult(None, mixing="buckets between elements of the sequence")
    return AxisResult((labels,), {"self": as_it_is(labels), borders: Alignment(features(shape), None)})


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


@rule("tril", "triu")
def _triangle(view: OpView) -> AxisResult:
    """Features alone pass; a triangle of scores is a mask by place, of which the op has no operand to lift."""
    labels = view.labels("self")
    if labels is None or len(labels) < 2:
        return AxisResult(None)
    if not any(is_labelled(dim) for dim in labels[-2:]):
        return AxisResult((labels,))
    op = view.node.base_op
    if {f.role for dim in labels[-2:] for f in dim if f.is_seq} == {ROW, COL}:
        why = f"{op} zeroes scores by the places of query and key"
        name = op.removeprefix("aten.")
        hint = f"write the mask apart: scores.masked_fill(~torch.ones(S, S, dtype=torch.bool).{name}(k), 0)"
        return AxisResult((labels,), mixing=why, hint=hint)
    return AxisResult((labels,), mixing=f"{op} zeroes elements by their place in the sequence or batch")


_OVER_SEQUENCE = "a reduction over the sequence"
_POOLED = (
    "pool outside the model, of values for each token that it returns; a loss: reduce batch and sequence in one op; "
    "lift with strict=False if the sequence is never reordered or sharded"
)
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
    # everything is reduced: a loss, which the CP contract normalises
    is_loss = len(over) == rank and view.node.base_op in ("aten.sum", "aten.mean", "aten.nansum")
    found: list[tuple[bool, str]] = []  # whether it is handled, and what it is
    for index, dim in enumerate(labels):
        if index not in over:
            out.append(dim)
            continue
        if has_seq(dim) and view.node.base_op in ("aten.argmax", "aten.argmin"):
            found.append((False, "a reduction over the sequence: an index along it is taken from the data"))
        elif has_seq(dim) and all(f.role in KEYS for f in dim if f.is_seq):
            found.append((True, OVER_KEYS))
        elif has_seq(dim):
            found.append((is_loss, "a loss: a reduction over all tokens" if is_loss else _OVER_SEQUENCE))
        elif is_labelled(dim) and not is_loss:
            found.append((False, "a reduction over the batch"))
        if keep:
            out.append(())
    # of several dims the one that is not handled counts, and of rows and keys together the rows
    handled, mixing = min(found, key=lambda item: (item[0], item[1] == OVER_KEYS), default=(False, ""))
    hint = _POOLED if mixing == _OVER_SEQUENCE else ""
    return AxisResult((tuple(out),) * len(view.shapes_out()), {}, mixing, handled, hint=hint)


@rule("broadcast_tensors")
def _broadcast_tensors(view: OpView) -> AxisResult:
    return pointwise(view)  # every output has the shape and the axes of them all


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


@rule(
    *["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div", "poisson_nll_loss"],
    *["binary_cross_entropy", "binary_cross_entropy_with_logits"],
)
def _elementwise_loss(view: OpView) -> AxisResult:
    if view.node.args.get("reduction") == 0:
        return pointwise(view)
    tensors = view.tensors()
    shape = max((own for _, own in tensors), key=len)
    known = [labels for path, own in tensors if len(own) == len(shape) and (labels := view.labels(path)) is not None]
    whole = broadcast(known, shape) if known else None
    if whole is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    operands = {path: align(whole, own) for path, own in tensors}
    if not any(has_seq(dim) for dim in whole):
        return AxisResult(((),), operands)
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
        own = view.labels("attn_mask") if view.is_data("attn_mask") else None
        if own is not None and by_keys(where_it_varies(view, "attn_mask", own), scores):
            operands["attn_mask"] = Alignment(own, operands["attn_mask"].batch_from_right)
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
