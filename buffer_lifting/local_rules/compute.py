"""Local rules for ops that compute along features: products, norms, paddings, moves along a dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer_lifting.gathering import operand_of
from buffer_lifting.graph.record import Node, Ref
from buffer_lifting.graph.sizes import product
from buffer_lifting.labels import BATCH, DimLabel, Factor, Labels, is_labelled
from buffer_lifting.local_rules.core import check_summed, local_rule, spread, unchanged, widened
from buffer_lifting.plan import Call, Context, Reapply, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner


@local_rule("linear")
def _linear(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A projection of each row: the weight has no rows of its own."""
    source, shape = operand_of(planner, node, "input")
    if is_labelled(labels[-1]):
        raise Refuse("a projection whose features run along the sequence", node.name)
    check_summed(planner, node, [shape[-1]])
    value = planner.rebuild(source.name, (*labels[:-1], ()), context)
    return unchanged(node, value) or Value(Reapply(node.name, (("input", value.plan),)), value.lane, len(labels))


@local_rule("layer_norm", "rms_norm")
def _norm(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node, "input")
    over = node.args.get("normalized_shape")
    if not isinstance(over, tuple) or any(is_labelled(dim) for dim in labels[len(labels) - len(over) :]):
        raise Refuse("a norm along the sequence", node.name)
    value = planner.rebuild(source.name, labels, context)
    return unchanged(node, value) or Value(Reapply(node.name, (("input", value.plan),)), value.lane, len(labels))


@local_rule("matmul", "bmm", "mm")
def _matmul(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Rows come from the left operand, columns from the right; what is summed over is never the sequence."""
    right_key = "other" if node.base_op == "aten.matmul" else "mat2"
    left, left_shape = operand_of(planner, node)
    right, right_shape = operand_of(planner, node, right_key)
    if len(left_shape) < 2 or len(right_shape) < 2:
        raise Refuse("a product of a matrix and a vector", node.name)
    check_summed(planner, node, [left_shape[-1]])
    rank = len(labels)
    values = []
    for source, shape, matrix in (
        (left, left_shape, (labels[-2], ())),
        (right, right_shape, ((), labels[-1])),
    ):
        own = (*labels[rank - len(shape) : rank - 2], *matrix)
        own = tuple(() if size == 1 else dim for size, dim in zip(shape, own, strict=True))
        values.append(planner.rebuild(source.name, own, context))
    same = unchanged(node, *values)
    if same:
        return same
    plans = tuple(widened(value, rank, node.name) for value in values)
    return Value(Call("aten.matmul.default", plans, node.name), any(value.lane for value in values), rank)


@local_rule("einsum")
def _einsum(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Outer products and products along features: ``"i, f -> i f"``."""
    equation, tensors = node.args.get("equation"), node.args.get("tensors")
    if not isinstance(equation, str) or "->" not in equation or not isinstance(tensors, tuple):
        raise Refuse("an einsum without an output", node.name)
    left, target = equation.replace(" ", "").split("->")
    parts = left.split(",")
    free = iter(letter for letter in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if letter not in equation)
    lane = next(free)
    outer = len(labels) - len(target.replace("...", "")) if "..." in target else 0
    broadcast = [next(free) for _ in range(outer)]
    letters = _spelled(target, broadcast)
    by_letter = dict(zip(letters, labels, strict=True))
    values, written = [], []
    for part, arg in zip(parts, tensors, strict=True):
        if not isinstance(arg, Ref):
            raise Refuse("an einsum of something that is no value", node.name)
        shape = planner.record.nodes[arg.name].tensor
        if shape is None:
            raise Refuse("an einsum of something that is no tensor", node.name)
        own_outer = len(shape.shape) - len(part.replace("...", "")) if "..." in part else 0
        own_letters = _spelled(part, broadcast[outer - own_outer :])
        sizes = zip(own_letters, shape.shape, strict=True)
        check_summed(planner, node, [size for letter, size in sizes if letter not in by_letter])
        own: list[DimLabel] = [
            () if size == 1 else by_letter.get(letter, ())
            for letter, size in zip(own_letters, shape.shape, strict=True)
        ]
        value = planner.rebuild(arg.name, tuple(own), context)
        values.append(value)
        written.append((lane if value.lane else "") + "".join(own_letters))
    same = unchanged(node, *values)
    if same:
        return same
    any_lane = any(value.lane for value in values)
    text = f"{','.join(written)}->{lane if any_lane else ''}{''.join(letters)}"
    plans = tuple(value.plan for value in values)
    return Value(Call("aten.einsum.default", (text, plans), node.name), any_lane, len(labels))


def _spelled(part: str, broadcast: list[str]) -> list[str]:
    """The letters of the dims, with an ellipsis written out."""
    before, dots, after = part.partition("...")
    return [*before, *(broadcast if dots else []), *after]


@local_rule("pad", "constant_pad_nd")
def _pad(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Padding of dims other than the sequence; widths count from the last dim, so a lane in front changes nothing."""
    source, shape = operand_of(planner, node)
    widths = node.args.get("pad")
    if not isinstance(widths, tuple) or not all(isinstance(width, int) for width in widths):
        raise Refuse("a padding of computed width", node.name)
    changed = {len(shape) - 1 - index // 2 for index, width in enumerate(widths) if width}
    if any(is_labelled(labels[dim]) for dim in changed):
        raise Refuse("a padding along the sequence", node.name)
    own = tuple(() if d in changed or size == 1 else labels[d] for d, size in enumerate(shape))
    value = planner.rebuild(source.name, own, context)
    if not changed and value.changed:
        return value
    return unchanged(node, value) or Value(Reapply(node.name, (("self", value.plan),)), value.lane, len(labels))


@local_rule("repeat_interleave")
def _repeat_interleave(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """Copies of each element along features; copies for the samples of the batch are the lane."""
    source, shape = operand_of(planner, node)
    times, dim = node.args.get("repeats"), node.args.get("dim")
    if not isinstance(dim, int):
        raise Refuse("a value repeated over all its dims", node.name)
    dim %= len(shape)
    *features, last = labels[dim] or (Factor("", "", 1),)
    if last.axis == BATCH and product([f.size for f in features]) == shape[dim]:
        return planner.rebuild(source.name, (*labels[:dim], tuple(features), *labels[dim + 1 :]), context)
    if not isinstance(times, int) or is_labelled(labels[dim]):
        raise Refuse("a value repeated along the sequence", node.name)
    value = planner.rebuild(source.name, (*labels[:dim], (), *labels[dim + 1 :]), context, picked=dim)
    call = Call("aten.repeat_interleave.self_int", (value.plan, times, dim + value.lane), node.name)
    return unchanged(node, value) or Value(call, value.lane, len(labels))


@local_rule("flip", "roll")
def _moved(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    dims = node.args.get("dims")
    over = [d % len(shape) for d in dims if isinstance(d, int)] if isinstance(dims, tuple) else []
    if not over or any(is_labelled(labels[d]) for d in over):
        raise Refuse(f"{node.op} along the sequence", node.name)
    value = planner.rebuild(source.name, labels, context)
    moved = tuple(d + value.lane for d in over)
    args = (value.plan, moved) if node.base_op == "aten.flip" else (value.plan, node.args["shifts"], moved)
    return unchanged(node, value) or Value(Call(f"{node.base_op}.default", args, node.name), value.lane, len(labels))


@local_rule("softmax", "log_softmax")
def _softmax(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, shape = operand_of(planner, node)
    dim = int(node.args["dim"]) % len(shape)  # type: ignore[arg-type]
    if is_labelled(labels[dim]):
        raise Refuse("a softmax along the sequence", node.name)
    value = planner.rebuild(source.name, labels, context)
    call = Call(f"{node.base_op}.int", (value.plan, dim + value.lane), node.name)
    return unchanged(node, value) or Value(call, value.lane, len(labels))


@local_rule("view_as_complex", "view_as_real")
def _complex(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    source, _ = operand_of(planner, node)
    own = (*labels, ()) if node.base_op == "aten.view_as_complex" else labels[:-1]
    value = planner.rebuild(source.name, own, context)
    return unchanged(node, value) or Value(Reapply(node.name, (("self", value.plan),)), value.lane, len(labels))


@local_rule("slice_scatter", "select_scatter")
def _part_replaced(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A part of a dim other than the sequence replaced: ``r[..., 0::2] = sin``."""
    source, shape = operand_of(planner, node)
    part, _ = operand_of(planner, node, "src")
    dim = int(node.args.get("dim", 0)) % len(shape)  # type: ignore[arg-type]
    selects = node.base_op == "aten.select_scatter"
    if not selects and part.tensor == source.tensor:  # nothing of it is left
        value = planner.rebuild(part.name, labels, context)
        return unchanged(node, value) or value
    if is_labelled(labels[dim]):
        raise Refuse("a part of the sequence replaced", node.name)
    own = (*labels[:dim], *labels[dim + 1 :]) if selects else (*labels[:dim], (), *labels[dim + 1 :])
    whole, piece = planner.rebuild(source.name, labels, context), planner.rebuild(part.name, own, context)
    same = unchanged(node, whole, piece)
    if same:
        return same
    first = whole.plan if whole.lane else piece.plan
    lane = Call("aten.sym_size.int", (first, 0), node.name)
    plans = [value.plan if value.lane else spread(value, lane, node.name) for value in (whole, piece)]
    if selects:
        args: tuple[object, ...] = (*plans, dim + 1, node.args["index"])
    else:
        args = (*plans, dim + 1, *(node.args.get(key) for key in ("start", "end", "step")))
    if any(isinstance(arg, Ref) for arg in args):
        raise Refuse("a part with computed bounds replaced", node.name)
    return Value(Call(f"{node.base_op}.default", args, node.name), True, len(labels))


@local_rule("bucketize", "searchsorted")
def _bucketize(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """The bucket of each element, between borders that are the same everywhere."""
    borders = node.args.get("boundaries", node.args.get("sorted_sequence"))
    if not isinstance(borders, Ref) or not planner.is_table(borders.name) or node.ref("sorter"):
        raise Refuse("buckets whose borders are no table", node.name)
    meta = planner.record.nodes[borders.name].tensor
    if meta is None or len(meta.shape) != 1:
        raise Refuse("buckets whose borders differ along a dim", node.name)
    source, _ = operand_of(planner, node)
    value = planner.rebuild(source.name, labels, context)
    return unchanged(node, value) or Value(Reapply(node.name, (("self", value.plan),)), value.lane, len(labels))
