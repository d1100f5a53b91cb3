"""How batch and sequence labels pass through the ops of a backward pass.

They are asked in graphs of ATen ops that are no exported program, before the general rules. A parameter's gradient is
a sum over all tokens: it is the same in any order, and the sum of the ranks' where each has a part of them.
"""

from __future__ import annotations

from collections.abc import Callable

from buffer_lifting.axis_rules import Alignment, AxisResult, OpView, align
from buffer_lifting.axis_rules.core import as_it_is, pointwise
from buffer_lifting.graph.record import Ref
from buffer_lifting.labels import (
    BATCH,
    COL,
    KEYS,
    ROW,
    Labels,
    batch_dim,
    broadcast,
    feature,
    features,
    has_batch,
    has_seq,
    is_labelled,
    with_role,
)
from buffer_lifting.ops import (
    FUSED_ATTENTION,
    FUSED_ATTENTION_BACKWARD,
    MATRIX_OPERANDS,
    MATRIX_PRODUCTS,
)

#: A handled mixing: what a parameter's gradient is.
OF_TOKENS = "a gradient: a sum over all tokens"
#: A handled mixing: what the gradients of keys and values are.
OF_QUERIES = "attention: a gradient of keys, a sum over queries"
Rule = Callable[[OpView], AxisResult | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ops, by their name without namespace and overload."""

    def register(function: Rule) -> Rule:
        _RULES.update((name if "." in name else f"aten.{name}", function) for name in names)
        return function

    return register


def backward_rule(view: OpView) -> AxisResult | None:
    """The axis result of an op of a backward pass; ``None`` if it is none, and the general rules are to be asked."""
    known = _RULES.get(view.node.base_op)
    return known(view) if known else None


def has_backward_ops(names: set[str]) -> bool:
    """Whether ops, by name without overload, are those of a backward pass."""
    return any(name.endswith(("_backward", "_backward_data")) for name in names)


def settle(view: OpView, result: AxisResult) -> AxisResult:
    """A result of the general rules, with sums that a backward pass is made of recognised as such."""
    op = view.node.base_op
    if result.outputs is None or not result.mixing or result.handled:
        return result
    if op not in MATRIX_PRODUCTS and op != "aten.sum":
        return result
    (out,) = result.outputs
    if not any(is_labelled(dim) for dim in out):
        return AxisResult(result.outputs, result.operands, OF_TOKENS, True)
    if op in MATRIX_PRODUCTS and _sums_queries(view):
        return AxisResult((tuple(with_role(dim, ROW) for dim in out),), result.operands, OF_QUERIES, True)
    return result


def _sums_queries(view: OpView) -> bool:
    """Whether a product of scores (queries x keys) and data of the queries leaves data of the keys."""
    left_path, right_path = MATRIX_OPERANDS[view.node.base_op]
    left, right = view.labels(left_path), view.labels(right_path)
    if not left or not right:
        return False
    inner = [f for dim in (left[-1], right[-2]) for f in dim if f.axis]
    outer = [f for dim in (left[-2], right[-1]) for f in dim if f.axis]
    sums = len(inner) == 2 and all(f.is_seq and f.role == ROW for f in inner) and inner[0].axis == inner[1].axis
    return sums and len(outer) == 1 and outer[0].role == COL and outer[0].axis == inner[0].axis


@rule("embedding_dense_backward")
def _embedding(view: OpView) -> AxisResult:
    labels, shape = view.labels("grad_output"), view.shape("out")
    if labels is None or shape is None or is_labelled(labels[-1]):
        return AxisResult(None)
    operands = {"grad_output": as_it_is(labels), "indices": Alignment(labels[:-1], None)}
    mixing = OF_TOKENS if any(is_labelled(dim) for dim in labels) else ""
    return AxisResult((features(shape),), operands, mixing, bool(mixing))


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def _norm(view: OpView) -> AxisResult:
    grad, labels, over = view.labels("grad_out"), view.labels("input"), view.node.args.get("normalized_shape")
    if grad is None or labels is None or not isinstance(over, tuple):
        return AxisResult(None)
    out = broadcast([grad, labels], view.shape("input") or ())
    if out is None or any(is_labelled(dim) for dim in labels[len(labels) - len(over) :]):
        return AxisResult(None, mixing="a norm runs along the sequence or batch")
    operands = {path: Alignment(features(s), None) for path, s in view.tensors() if path in ("weight", "bias")}
    return AxisResult((out, *(features(s) for s in view.shapes_out()[1:])), operands)


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax(view: OpView) -> AxisResult:
    grad, output = view.labels("grad_output"), view.labels("output")
    if grad is None or output is None:
        return AxisResult(None)
    out = broadcast([grad, output], view.shape("out") or ())
    if out is None:
        return AxisResult(None, mixing="elements at different sequence positions meet")
    dim = out[view.dim("dim", len(out), -1)]
    if has_batch(dim) or (has_seq(dim) and not all(f.role in KEYS for f in dim if f.is_seq)):
        return AxisResult((out,), mixing="a softmax along the sequence or batch")
    mixing = "attention: a softmax over keys" if has_seq(dim) else ""
    return AxisResult((out,), {}, mixing, bool(mixing))


@rule("slice_backward", "select_backward")
def _into_zeros(view: OpView) -> AxisResult:
    """The gradient of a part: that of the rest is 0."""
    labels, shape = view.labels("grad_output"), view.shape("out")
    if labels is None or shape is None:
        return AxisResult(None)
    dim = view.dim("dim", len(shape))
    if view.node.base_op == "aten.select_backward":
        return AxisResult(((*labels[:dim], feature(shape[dim]), *labels[dim:]),))
    if is_labelled(labels[dim]) and (view.shape("grad_output") or ())[dim] != shape[dim]:
        return AxisResult(None, mixing="a part of the sequence was cut out")
    own = labels[dim] if is_labelled(labels[dim]) else feature(shape[dim])
    return AxisResult(((*labels[:dim], own, *labels[dim + 1 :]),))


@rule("index_put", "_unsafe_index_put")
def _index_put(view: OpView) -> AxisResult | None:
    """The gradient of what an index picks: rows of a table of parameters, or features of data."""
    values, shape, indices = view.labels("values"), view.shape("out"), view.node.args.get("indices")
    if view.is_data("self") or values is None or shape is None or view.node.args.get("accumulate") is not True:
        return None
    given = [d for d, item in enumerate(indices) if isinstance(item, Ref)] if isinstance(indices, tuple) else []
    if len(given) != 1:
        return None
    dim, rank = given[0], len(view.shape(f"indices.{given[0]}") or ())
    if rank == 1 and len(values) == len(shape) and not is_labelled(values[dim]):
        out = (*values[:dim], feature(shape[dim]), *values[dim + 1 :])
        plain = {"values": as_it_is(values), "self": align(out, view.shape("self") or ())}
        return AxisResult((out,), {**plain, f"indices.{dim}": Alignment(((),), None)})
    if dim or any(is_labelled(own) for own in values[rank:]):
        return None
    mixing = OF_TOKENS if any(is_labelled(dim) for dim in values) else ""
    operands = {"values": as_it_is(values), "indices.0": Alignment(values[:rank], None)}
    operands["self"] = Alignment(features(shape), None)
    return AxisResult((features(shape),), operands, mixing, bool(mixing))


@rule("leaky_relu_backward", "elu_backward", "hardswish_backward", "softplus_backward", "mse_loss_backward")
def _elementwise(view: OpView) -> AxisResult | None:
    return pointwise(view)


@rule("nll_loss_forward")
def _nll_loss(view: OpView) -> AxisResult:
    labels, shapes = view.labels("self"), view.shapes_out()
    if labels is None:
        return AxisResult(None)
    if len(labels) > 1 and is_labelled(labels[1]):
        return AxisResult(None, mixing="the classes of a loss run along the sequence")
    rest = labels[:1] if len(labels) > 1 else ()
    operands = {"target": as_it_is(rest), "self": as_it_is(labels)}
    if view.node.args.get("reduction") == 0:
        return AxisResult((rest, features(shapes[1])), operands)
    return AxisResult(((), ()), operands, "a loss: a reduction over all tokens", True)


@rule("nll_loss_backward")
def _nll_loss_backward(view: OpView) -> AxisResult:
    labels = view.labels("self")
    if labels is None:
        return AxisResult(None)
    rest = labels[:1] if len(labels) > 1 else ()
    return AxisResult((labels,), {"target": as_it_is(rest), "self": as_it_is(labels)})


@rule(*FUSED_ATTENTION, *FUSED_ATTENTION_BACKWARD)
def _attention(view: OpView) -> AxisResult:
    query, key, value = (view.labels(path) for path in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return AxisResult(None, mixing="attention whose keys or queries are not known to follow the sequence")
    if any(f.axis == BATCH for dim in (query[-2], key[-2]) for f in dim) or _axes(key) != _axes(value):
        return AxisResult(None, mixing="attention along the batch, or whose keys and values differ in their axes")
    operands = {}
    mask = view.shape("attn_mask")
    if mask is not None:
        scores = (*query[:-1], with_role(key[-2], COL))
        operands["attn_mask"] = align(scores, mask)
        if not view.is_data("attn_mask"):
            batch = batch_dim(scores)
            operands["attn_mask"] = Alignment(
                operands["attn_mask"].labels, None if batch is None else len(scores) - batch
            )
    outs: tuple[Labels, ...]
    if view.node.base_op in FUSED_ATTENTION_BACKWARD:
        outs = (query, key, value)
    else:
        outs = ((*query[:-1], feature((view.shape("out") or (1,))[-1])), query[:-1])
    return AxisResult(outs, operands, "attention: a sum over keys", True)


def _axes(labels: Labels) -> set[str]:
    return {f.axis for f in labels[-2] if f.is_seq}
