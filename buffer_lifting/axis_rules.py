"""How batch and sequence labels pass through each kind of op, forward, for values that carry data.

A rule also says how the op's other operands line up with the data (that is where position values are read), and
whether the op mixes the sequence. An op without a rule is unknown, never assumed to be local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from buffer_lifting.graph.record import GraphRecord, Node, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import (
    COL,
    DimLabel,
    Labels,
    batch_dim,
    broadcast,
    feature,
    features,
    has_batch,
    has_seq,
    is_labelled,
    regroup,
    with_role,
)
from buffer_lifting.ops import ASSERTIONS, ATTENTION, is_pointwise


@dataclass(frozen=True, slots=True)
class Alignment:
    """How an operand lines up with the data at one op.

    ``labels`` are those of the operand's own dims. ``batch_from_right`` is the data's batch dim counted from the
    right, to which a broadcasting operand is aligned; ``None`` when the operand does not broadcast.
    """

    labels: Labels
    batch_from_right: int | None


@dataclass(slots=True)
class AxisResult:
    """What a rule finds. ``outputs`` is ``None`` where the labels are lost."""

    outputs: tuple[Labels, ...] | None
    operands: dict[str, Alignment] = field(default_factory=dict)
    mixing: str = ""  # why the op moves information along the sequence; "" if it does not
    handled: bool = False  # the context-parallel pass takes care of it


class OpView:
    """One node with what is known of its operands."""

    def __init__(self, record: GraphRecord, node: Node, known: dict[str, tuple[Labels, ...] | None]) -> None:
        self.record, self.node, self.known = record, node, known

    def shape(self, path: str) -> tuple[Size, ...] | None:
        """The shape of a tensor operand (or of ``"out"``, the first output)."""
        meta = self.node.meta if path == "out" else self._meta(path)
        if isinstance(meta, tuple):
            meta = meta[0]
        return meta.shape if isinstance(meta, TensorMeta) else None

    def shapes_out(self) -> list[tuple[Size, ...]]:
        """The shapes of all tensor outputs."""
        metas = self.node.meta if isinstance(self.node.meta, tuple) else (self.node.meta,)
        return [meta.shape for meta in metas if isinstance(meta, TensorMeta)]

    def _meta(self, path: str) -> object:
        name = dict(self.node.named_refs()).get(path)
        return self.record.nodes[name].meta if name else None

    def labels(self, path: str) -> Labels | None:
        """The labels of a data operand; ``None`` for anything else."""
        name = dict(self.node.named_refs()).get(path)
        known = self.known.get(name) if name else None
        return known[0] if known else None

    def dim(self, key: str, rank: int, default: int = 0) -> int:
        """A dim argument, made non-negative."""
        value = self.node.args.get(key, default)
        return (value if isinstance(value, int) else default) % max(rank, 1)

    def tensors(self) -> list[tuple[str, tuple[Size, ...]]]:
        """Path and shape of every tensor operand."""
        pairs = []
        for path, name in self.node.named_refs():
            meta = self.record.nodes[name].meta
            if isinstance(meta, TensorMeta):
                pairs.append((path, meta.shape))
        return pairs


Rule = Callable[[OpView], AxisResult]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name if "." in name or name == "getitem" else f"aten.{name}"] = function
        return function

    return register


def apply_rule(view: OpView) -> AxisResult | None:
    """The axis result of an op, or ``None`` if no rule knows the op."""
    node = view.node
    if node.base_op in ASSERTIONS:
        return AxisResult(())
    rule = _RULES.get(node.base_op) or _RULES.get(node.op)
    if rule is None and is_pointwise(node):
        rule = _pointwise
    return rule(view) if rule else None


def align(out: Labels, shape: tuple[Size, ...]) -> Alignment:
    """How an operand of ``shape`` broadcasts against a result with labels ``out``."""
    batch = batch_dim(out)
    labels: list[DimLabel] = []
    for offset in range(len(shape), 0, -1):
        dim = out[-offset] if offset <= len(out) else ()
        labels.append(() if shape[-offset] == 1 else dim)
    return Alignment(tuple(labels), None if batch is None else len(out) - batch)


def _pointwise(view: OpView) -> AxisResult:
    shape = view.shape("out")
    if shape is None:
        return AxisResult(None)
    known = [labels for path, _ in view.tensors() if (labels := view.labels(path)) is not None]
    out = broadcast(known, shape)
    if out is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    operands = {path: align(out, s) for path, s in view.tensors()}
    return AxisResult((out,) * len(view.shapes_out()), operands)


def _as_it_is(labels: Labels) -> Alignment:
    """An operand whose dims are the result's, up to the last: user contents without parameters reach it too."""
    batch = batch_dim(labels)
    return Alignment(labels, None if batch is None else len(labels) - batch)


def _same(view: OpView, path: str = "self") -> AxisResult:
    labels = view.labels(path)
    return AxisResult(None if labels is None else (labels,))


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as")
def _view(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    out = regroup(labels, shape)
    return AxisResult(None if out is None else (out,), mixing="" if out else "a sequence or batch axis is split up")


@_rule("unsqueeze")
def _unsqueeze(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels) + 1)
    return AxisResult(((*labels[:dim], (), *labels[dim:]),))


@_rule("permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes")
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


@_rule("expand", "expand_as", "broadcast_to", "repeat")
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


@_rule("slice", "narrow")
def _slice(view: OpView) -> AxisResult:
    labels, shape, source = view.labels("self"), view.shape("out"), view.shape("self")
    if labels is None or shape is None or source is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if shape[dim] == source[dim]:
        return AxisResult((labels,))
    if is_labelled(labels[dim]):
        what = "sequence" if has_seq(labels[dim]) else "batch"
        return AxisResult(None, mixing=f"a part of the {what} is cut out")
    return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim + 1 :]),))


@_rule("select")
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


@_rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing="the sequence is split")
    return AxisResult(tuple((*labels[:dim], feature(s[dim]), *labels[dim + 1 :]) for s in view.shapes_out()))


@_rule("unbind")
def _unbind(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels))
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing="the sequence is split")
    return AxisResult(((*labels[:dim], *labels[dim + 1 :]),) * len(view.shapes_out()))


@_rule("getitem")
def _getitem(view: OpView) -> AxisResult:
    source = view.node.args.get("0")
    index = view.node.args.get("1")
    known = view.known.get(source.name) if isinstance(source, Ref) else None
    if not known or not isinstance(index, int) or index >= len(known):
        return AxisResult(None)
    return AxisResult((known[index],))


@_rule("cat", "stack")
def _cat(view: OpView) -> AxisResult:
    shape = view.shape("out")
    if shape is None:
        return AxisResult(None)
    stacked = view.node.base_op == "aten.stack"
    dim = view.dim("dim", len(shape))
    parts: list[Labels] = []
    for path, _ in view.tensors():
        labels = view.labels(path)
        if labels is not None:
            if not stacked and is_labelled(labels[dim]):
                return AxisResult(None, mixing="values are joined along the sequence or batch")
            parts.append((*labels[:dim], (), *labels[dim if stacked else dim + 1 :]))
    out = broadcast(parts, shape)
    if out is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    batch = batch_dim(out)
    operands = {}
    for path, _ in view.tensors():
        own = (*out[:dim], *out[dim + 1 :]) if stacked else (*out[:dim], (), *out[dim + 1 :])
        operands[path] = Alignment(own, None if batch is None else len(out) - batch)
    return AxisResult((out,), operands)


@_rule("linear")
def _linear(view: OpView) -> AxisResult:
    labels, shape = view.labels("input"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    if is_labelled(labels[-1]):
        return AxisResult(None, mixing="a learned projection runs along the sequence")
    out = (*labels[:-1], feature(shape[-1]))
    operands = {path: Alignment(features(s), None) for path, s in view.tensors() if path != "input"}
    return AxisResult((out,), {"input": _as_it_is(labels), **operands})


@_rule("matmul", "bmm", "mm", "addmm", "baddbmm")
def _matmul(view: OpView) -> AxisResult:
    added = view.node.base_op in ("aten.addmm", "aten.baddbmm")
    left_path, right_path = {
        "aten.matmul": ("self", "other"),
        "aten.bmm": ("self", "mat2"),
        "aten.mm": ("self", "mat2"),
        "aten.addmm": ("mat1", "mat2"),
        "aten.baddbmm": ("batch1", "batch2"),
    }[view.node.base_op]
    left_shape, right_shape, shape = view.shape(left_path), view.shape(right_path), view.shape("out")
    if left_shape is None or right_shape is None or shape is None:
        return AxisResult(None)
    if len(left_shape) < 2 or len(right_shape) < 2:
        return AxisResult(None, mixing="a matrix-vector product whose axes are not known")
    left, right = view.labels(left_path), view.labels(right_path)
    lhs = left if left is not None else features(left_shape)
    rhs = right if right is not None else features(right_shape)
    outer = broadcast([lhs[:-2], rhs[:-2]], shape[:-2])
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
    if any(has_seq(dim) for dim in inner):
        if any(factor.role == COL for dim in inner for factor in dim):
            mixing, handled = "attention: a sum over keys", True
        else:
            mixing = "a sum over the sequence"
    elif any(is_labelled(dim) for dim in inner):
        mixing = "a sum over the batch"
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


@_rule("einsum")
def _einsum(view: OpView) -> AxisResult:
    equation, shape = view.node.args.get("equation"), view.shape("out")
    if not isinstance(equation, str) or shape is None or "." in equation or "->" not in equation:
        return AxisResult(None)
    left, target = equation.replace(" ", "").split("->")
    by_letter: dict[str, DimLabel] = {}
    for (path, _), letters in zip(view.tensors(), left.split(","), strict=True):
        for letter, dim in zip(letters, view.labels(path) or (), strict=False):
            if is_labelled(dim):
                if by_letter.setdefault(letter, dim) != dim:
                    return AxisResult(None, mixing="elements at different sequence positions meet")
    out: list[DimLabel] = []
    for letter, size in zip(target, shape, strict=True):
        dim = by_letter.get(letter, feature(size))
        if has_seq(dim) and any(has_seq(previous) for previous in out):
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
        labels = tuple(by_letter.get(letter, feature(size)) for letter, size in zip(letters, own, strict=True))
        operands[path] = Alignment(labels, None)
    return AxisResult((tuple(out),), operands, mixing, handled)


@_rule("embedding")
def _embedding(view: OpView) -> AxisResult:
    labels, weight, shape = view.labels("indices"), view.shape("weight"), view.shape("out")
    if labels is None or weight is None or shape is None:
        return AxisResult(None)
    out = (*labels, feature(shape[-1]))
    return AxisResult((out,), {"indices": Alignment(labels, None), "weight": Alignment(features(weight), None)})


@_rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _norm(view: OpView) -> AxisResult:
    labels = view.labels("input")
    over = view.node.args.get("normalized_shape")
    if labels is None or not isinstance(over, tuple):
        return AxisResult(None)
    mixed = any(is_labelled(dim) for dim in labels[len(labels) - len(over) :])
    operands = {path: Alignment(features(s), None) for path, s in view.tensors() if path != "input"}
    operands["input"] = _as_it_is(labels)
    outs: list[Labels] = [labels]
    for shape in view.shapes_out()[1:]:
        outs.append(tuple(() if size == 1 else dim for dim, size in zip(labels, shape, strict=True)))
    return AxisResult(tuple(outs), operands, "a norm runs along the sequence or batch" if mixed else "")


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = labels[view.dim("dim", len(labels), -1)]
    if has_seq(dim):
        handled = any(factor.role == COL for factor in dim)
        why = "attention: a softmax over keys" if handled else "a softmax along the sequence"
        return AxisResult((labels,), mixing=why, handled=handled)
    if is_labelled(dim):
        return AxisResult((labels,), mixing="a softmax along the batch")
    return AxisResult((labels,))


_REDUCTIONS = """sum mean amax amin prod var std logsumexp norm linalg_vector_norm all any argmax argmin max min
nansum median var_mean std_mean count_nonzero"""


@_rule(*_REDUCTIONS.split())
def _reduce(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    if view.node.op in ("aten.max.other", "aten.min.other"):
        return _pointwise(view)
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
        if has_seq(dim):
            handled = len(over) == rank  # everything is reduced: a loss, which the CP contract normalises
            mixing = "a loss: a reduction over all tokens" if handled else "a reduction over the sequence"
        elif is_labelled(dim) and len(over) < rank:
            mixing = mixing or "a reduction over the batch"
        if keep:
            out.append(())
    return AxisResult((tuple(out),) * len(view.shapes_out()), {}, mixing, handled)


@_rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
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


@_rule(ATTENTION)
def _attention(view: OpView) -> AxisResult:
    query, key, value = (view.labels(path) for path in ("query", "key", "value"))
    shape = view.shape("out")
    if query is None or key is None or value is None or shape is None:
        return AxisResult(None, mixing="attention whose keys or queries are not known to follow the sequence")
    out = (*query[:-1], feature(shape[-1]))
    operands = {}
    mask = view.shape("attn_mask")
    if mask is not None:
        scores = (*query[:-1], with_role(key[-2], COL))
        operands["attn_mask"] = align(scores, mask)
    if not has_seq(query[-2]) or not has_seq(key[-2]):
        over_features = not has_seq(key[-2])
        return AxisResult((out,), operands, "" if over_features else "attention: a sum over keys", True)
    return AxisResult((out,), operands, "attention: a sum over keys", True)


@_rule("view_as_complex")
def _view_as_complex(view: OpView) -> AxisResult:
    labels = view.labels("self")
    return AxisResult(None if labels is None or is_labelled(labels[-1]) else (labels[:-1],))


@_rule("view_as_real")
def _view_as_real(view: OpView) -> AxisResult:
    labels = view.labels("self")
    return AxisResult(None if labels is None else ((*labels, feature(2)),))


@_rule("topk", "sort", "argsort", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff")
def _along_dim(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels), -1)
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing=f"{view.node.base_op} runs along the sequence or batch")
    outs = tuple((*labels[:dim], feature(s[dim]), *labels[dim + 1 :]) for s in view.shapes_out())
    return AxisResult(outs)


@_rule(
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
    if op in ("aten.gather", "aten.index_select"):
        dim = view.dim("dim", len(labels))
        if not is_labelled(labels[dim]):
            out = (*labels[:dim], feature(shape[dim]), *labels[dim + 1 :])
            operands = {"index": align(out, view.shape("index") or ())} if op == "aten.gather" else {}
            return AxisResult((out,), operands)
    return AxisResult(None, mixing=f"{op} may move elements along the sequence")


@_rule("glu")
def _glu(view: OpView) -> AxisResult:
    labels, shape = view.labels("self"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    dim = view.dim("dim", len(labels), -1)
    if is_labelled(labels[dim]):
        return AxisResult(None, mixing="the sequence is split")
    return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim + 1 :]),))


def batch_is_first(labels: Labels) -> bool:
    """Whether no batch factor stands behind another factor."""
    index = batch_dim(labels)
    return index is None or (has_batch(labels[index]) and labels[index][0].axis == "batch")
