"""The registry of local rules, what rules share, and the rules for elementwise ops, fills and reductions.

A rule gets the planner, the node and the labels that its result must have, and returns a :class:`Value`, or
raises :class:`Refuse`. A new pattern is one entry in a module of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from buffer_lifting.dataflow import Dep
from buffer_lifting.gathering import operand_of
from buffer_lifting.graph.record import Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size, atoms, symbols
from buffer_lifting.labels import BATCH, COL, DimLabel, Factor, Labels, has_seq, is_labelled
from buffer_lifting.ops import FILLS, ORDER_FREE, is_mutating, is_pointwise
from buffer_lifting.plan import AxisSize, Call, Context, Existing, Plan, Reapply, Refuse, Value
from buffer_lifting.stream_rule import joined

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner

LocalRule = Callable[["Planner", Node, Labels, Context], Value]
_RULES: dict[str, LocalRule] = {}


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
    dep = planner.deps[node.name]
    of_whole = Dep.LENGTH in dep and not dep & (Dep.USER | Dep.RANDOM) and not has_batch_or_seq(labels)
    if of_whole and (rule is None or node.base_op in _SUMS):  # nothing is left of the sequences that it is made from
        operands = (planner.record.nodes[name].tensor for name in node.refs())
        return at_full_length(planner, node, [size for meta in operands if meta for size in meta.shape])
    if rule is None:
        raise Refuse(f"{node.op or node.kind.value} is not known to be local along the sequence", node.name)
    return rule(planner, node, labels, context)


def axis_size(factor: Factor) -> AxisSize:
    """The run-time size of a labelled factor."""
    return AxisSize(factor.axis, factor.role, factor.size if isinstance(factor.size, int) else None)


def dim_size(dim: DimLabel, size: Size, node: str, inferred: bool = False) -> object:
    """The size of a rebuilt dim as an argument: the own batch is 1, sequences are read at run time.

    ``inferred``: -1 stands for a product of sizes, as in a reshape.
    """
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
            elif inferred:
                return -1
            else:
                raise Refuse("two sequence axes are folded into one dim", node)
        elif isinstance(factor.size, int):
            constant *= factor.size
        else:
            raise Refuse(f"a dim of size {factor.size} is folded with the sequence", node)
    if result == 1:
        return constant
    return result if constant == 1 else -1


def has_batch_or_seq(labels: Labels) -> bool:
    """Whether any dim is labelled."""
    return any(is_labelled(dim) for dim in labels)


def unchanged(node: Node, *values: Value) -> Value | None:
    """The node itself if none of its operands changed."""
    if any(value.changed for value in values):
        return None
    assert node.tensor is not None
    return Value(Existing(node.name), False, len(node.tensor.shape))


def of_one_sample(planner: Planner, name: str, labels: Labels, value: Value) -> Value:
    """A value that stays as it is, with one sample of its batch: a rebuilt value has its samples in the lane.

    Raises:
        Refuse: its samples differ, or cannot be told from what they are folded with.
    """
    meta = planner.record.nodes[name].tensor
    if value.changed or meta is None or planner.deps[name] & (Dep.USER | Dep.DATA) or len(labels) != len(meta.shape):
        return value
    plan = value.plan
    for dim, (label, size) in enumerate(zip(labels, meta.shape, strict=True)):
        if size == 1 or not any(factor.axis == BATCH for factor in label):
            continue
        if planner.variation.of(name)[dim]:
            why = "it has a row for each sample, or a batch that is folded with other dims: which row is a sample's "
            raise Refuse(why + "is not known", name, hint="let it broadcast over the batch")
        plan = Call("aten.slice.Tensor", (plan, dim, 0, 1), name)
    return replace(value, plan=plan)


def spread(value: Value, lane: Plan, anchor: str) -> Plan:
    """A value that is the same for all samples, repeated for each."""
    lifted = Call("aten.unsqueeze.default", (value.plan, 0), anchor)
    return Call("aten.expand.default", (lifted, (lane, *[-1] * value.rank)), anchor)


def widened(value: Value, rank: int, anchor: str) -> Plan:
    """The plan of an operand that broadcasts to ``rank`` dims: its lane stays in front of the missing ones."""
    plan = value.plan
    if value.lane:
        for _ in range(rank - value.rank):
            plan = Call("aten.unsqueeze.default", (plan, 1), anchor)
    return plan


def _pointwise(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    rank = len(labels)
    biases = joined(planner, node, labels, context)
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
        along = replace(context, stream="positions") if path in biases else context
        operands.append((path, planner.rebuild(name, own, along)))
    same = None if numbers else unchanged(node, *(value for _, value in operands))
    if same:
        return same
    lane = any(value.lane for _, value in operands)
    plans = [(path, widened(value, rank, node.name)) for path, value in operands]
    return Value(Reapply(node.name, (*numbers, *plans)), lane, rank)


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


def at_full_length(planner: Planner, node: Node, sizes: Sequence[Size]) -> Value:
    """A value without sequence dims that is made from whole sequences; ``sizes`` are the dims that it has lost."""
    for axis in {axis for size in sizes for axis in _axes_of(planner, size)}:
        keys = Factor(axis, COL, planner.inputs.lengths[axis])
        planner.iota(keys, Context("slots", "positions"))  # its length is read, also where the plan is known
    assert node.tensor is not None
    return Value(planner.at_full_length(node.name), False, len(node.tensor.shape))


#: Products that sum over a dim of their operands.
_SUMS = frozenset(f"aten.{name}" for name in ["matmul", "bmm", "mm", "mv", "dot", "einsum", "linear", "addmm"])


def _axes_of(planner: Planner, size: Size) -> set[str]:
    """The sequence axes whose length is the size, or of which it is made."""
    lengths = planner.inputs.lengths.items()
    return {axis for axis, length in lengths if size == length or symbols(size) & atoms(length)}


def check_summed(planner: Planner, node: Node, sizes: Iterable[Size]) -> None:
    """Refuses a sum over dims one of which runs along the sequence: a rank has a part of it.

    (Of a static program, whose sizes are numbers, the one rank has the whole.)
    """
    if any(not isinstance(size, int) and _axes_of(planner, size) for size in sizes):
        raise Refuse("a sum over the sequence", node.name)


def part_of_whole(
    planner: Planner, node: Node, source: Node, size: Size, labels: Labels, from_front: bool
) -> Value | None:
    """The part that a select or slice takes of the whole sequence, where a shard's own would be another one.

    ``None`` where it is the same: the dim of ``size`` is no sequence, or the part counts from the front
    (``from_front``) of a value whose elements do not depend on the length.

    Raises:
        Refuse: the rest of the value still runs along the batch or a sequence.
    """
    if not _axes_of(planner, size) or Dep.USER in planner.deps[source.name]:
        return None
    if from_front and is_prefix(planner, source.name):
        return None
    if has_batch_or_seq(labels):
        raise Refuse("a part at a fixed place of the sequence", node.name)
    return at_full_length(planner, node, [size])


_KEPT = ("aten.unsqueeze", "aten.expand", "aten.alias", "aten.clone", "aten.to", "aten._to_copy", "aten.detach")


def is_prefix(planner: Planner, name: str) -> bool:
    """Whether a value of a longer sequence begins with the value: rows of a table from the front, an index."""
    stack, seen = [name], set()
    while stack:
        node = planner.record.nodes[stack.pop()]
        if node.name in seen or node.kind is not NodeKind.OP:
            continue
        seen.add(node.name)
        if not isinstance(node.meta, TensorMeta):
            continue
        numbers = [node.args.get(key) for key in ("start", "step")]
        plain = all(number is None or isinstance(number, int) for number in numbers)
        front = plain and (not isinstance(numbers[0], int) or numbers[0] >= 0)
        kept = is_pointwise(node) or node.base_op in _KEPT or node.base_op in FILLS
        if Dep.LENGTH in planner.deps[node.name] or not (
            kept or (front and node.base_op in ("aten.slice", "aten.arange"))
        ):
            return False
        stack.extend(node.refs())
    return True


@local_rule("max", "min", "amax", "amin", "any", "all", "sum", "mean")
def _reduction(planner: Planner, node: Node, labels: Labels, context: Context) -> Value:
    """A reduction over a sequence axis is taken over the keys, which are the whole sequence on every rank.

    A floating sum or mean over positions is computed in natural order. Over user inputs it is computed in the order
    of the tokens, up to rounding, if it cannot be computed outside.
    """
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
    if chosen and not any(planner.keys_axis(shape[dim]) for dim in over):
        return over_features(planner, node, labels, context)
    if not exact and Dep.USER not in planner.deps[node.name] and not has_batch_or_seq(labels):
        return at_full_length(planner, node, [shape[dim] for dim in over])
    if not exact and (node.args.get("dtype") is not None or not context.rounded):
        raise Refuse(f"{node.op} is not known to be local along the sequence", node.name)
    own: list[DimLabel] = []
    rest = list(labels)
    for dim, size in enumerate(shape):
        along = planner.keys_axis(size) if dim in over else None
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
    overload = {"aten.amax": "default", "aten.amin": "default", "aten.sum": "dim_IntList", "aten.mean": "dim"}.get(
        op, "dims"
    )
    over_lane = tuple(d + 1 for d in over)
    return Value(Call(f"{op}.{overload}", (value.plan, over_lane, keep), node.name), True, len(labels))


@local_rule("prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "argmax", "argmin")
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
