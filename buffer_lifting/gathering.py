"""Reads of a table: rows (and columns) gathered by lifted indices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buffer_lifting.graph.record import Node, Ref, ScalarMeta, TensorMeta
from buffer_lifting.graph.sizes import Size, bounds
from buffer_lifting.labels import BATCH, Labels, has_seq, is_labelled
from buffer_lifting.plan import Call, Context, Existing, Plan, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner


def operand_of(planner: Planner, node: Node, key: str = "self") -> tuple[Node, tuple[Size, ...]]:
    """A tensor operand and its shape (``"tensors.1"``: of a list); refuses anything else."""
    key, _, place = key.partition(".")
    arg = node.args.get(key)
    if place and isinstance(arg, tuple):
        arg = arg[int(place)]
    if not isinstance(arg, Ref):
        raise Refuse(f"operand {key!r} of {node.op} is not a value", node.name)
    source = planner.record.nodes[arg.name]
    if not isinstance(source.meta, TensorMeta):
        raise Refuse(f"operand {key!r} of {node.op} is not a tensor", node.name)
    return source, source.meta.shape


def gather_rows(planner: Planner, node: Node, labels: Labels, context: Context, natural: bool = False) -> Value:
    """Rows (and columns) of a table: successive slices down to the table, then one gather on all their dims.

    With ``natural`` the node itself is the table: a value of the whole sequence in natural order.
    """
    base, starts = node, {dim: 0 for dim, label in enumerate(labels) if has_seq(label)}
    computed: list[tuple[int, Plan]] = []
    steps: dict[int, int] = {}
    spreads: list[Spread] = []
    for dim in starts:
        if len(labels[dim]) != 1:
            raise Refuse("the rows of a table are folded with other dims", node.name)
    while not natural and base.base_op in ("aten.slice", "aten.narrow", *SPREADS) and base.tensor is not None:
        source, shape = operand_of(planner, base)
        if base.base_op not in ("aten.slice", "aten.narrow"):
            below = under_spread(planner, base, labels, starts)
            if below is None or not _is_spread_table(planner, base, labels, starts):
                break
            base, labels, spread = below
            spreads.append(spread)
            starts, steps = ({d - spread.missing: n for d, n in own.items()} for own in (starts, steps))
            computed = [(d - spread.missing, plan) for d, plan in computed]
            continue
        dim = int(base.args.get("dim", 0)) % len(shape)  # type: ignore[arg-type]
        assert base.tensor is not None
        if base.tensor.shape[dim] != shape[dim]:
            if dim not in starts:
                break
            start = base.args.get("start") or 0
            step = base.args.get("step", 1)
            if isinstance(step, int) and step > 1 and isinstance(start, int) and start >= 0 and not computed:
                starts[dim], steps[dim] = starts[dim] * step + start, steps.get(dim, 1) * step
            elif isinstance(start, Ref) and step == 1:
                computed.append((dim, planner.scalar(start.name)))
                starts[dim] += _from_the_end(planner, start.name, shape[dim], base)
            elif not isinstance(start, int) or step != 1:
                raise Refuse("a slice with a step", base.name)
            elif start >= 0:
                starts[dim] += start
            elif isinstance(shape[dim], int):
                starts[dim] += int(shape[dim]) + start  # type: ignore[arg-type]
            else:
                raise Refuse("a slice that starts at the end of a table of unknown length", base.name)
        base = source
    if any(is_labelled(labels[d]) and d not in starts for d in range(len(labels))):
        raise Refuse("a table with a batch dim", node.name)
    if not (planner.is_table(base.name) or natural) or base.tensor is None:
        raise Refuse("a slice along the sequence of a value that is no table", node.name)
    table: Plan = planner.at_full_length(base.name) if natural else Existing(base.name)
    for dim in starts:
        size = base.tensor.shape[dim]
        if not isinstance(size, int) and size != labels[dim][0].size:
            raise Refuse(f"a dim of size {size} that does not run along the whole sequence", node.name)
    indices: list[tuple[int, Plan]] = []
    for dim, start in starts.items():
        index = planner.iota(labels[dim][0], context)
        if steps.get(dim, 1) != 1:
            index = Call("aten.mul.Scalar", (index, steps[dim]), node.name)
        if start:
            index = Call("aten.add.Scalar", (index, start), node.name)
        for _, plan in (pair for pair in computed if pair[0] == dim):
            index = Call("aten.add.Tensor", (index, plan), node.name)
        indices.append((dim, index))
    value = gather(node.name, table, len(base.tensor.shape), indices, len(labels))
    for spread in reversed(spreads):
        value = spread.again(value, node.name)
    return value


def _is_spread_table(planner: Planner, base: Node, labels: Labels, starts: Collection[int]) -> bool:
    """Whether a value is no table by itself, or one that was repeated for the batch."""
    batched = any(is_labelled(label) for dim, label in enumerate(labels) if dim not in starts)
    return batched or not planner.is_table(base.name)


SPREADS = ("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.repeat")


@dataclass(frozen=True)
class Spread:
    """Copies of a value along dims of size 1 or in front; ``sizes``: of each dim of the result (-1: as it is)."""

    missing: int
    sizes: tuple[int, ...]

    def again(self, value: Value, anchor: str) -> Value:
        """The copies of a value with a lane, which is its batch: a batch dim of its own has size 1."""
        plan = value.plan
        for _ in range(self.missing):
            plan = Call("aten.unsqueeze.default", (plan, 1), anchor)
        if any(size not in (-1, 1) for size in self.sizes):
            plan = Call("aten.expand.default", (plan, (-1, *self.sizes)), anchor)
        return Value(plan, True, len(self.sizes))


def under_spread(
    planner: Planner, node: Node, labels: Labels, along: Collection[int]
) -> tuple[Node, Labels, Spread] | None:
    """What a value repeats, for the batch say, with its labels; ``None`` unless dims ``along`` are as they were."""
    while node.base_op == "aten.slice" and operand_of(planner, node)[0].tensor == node.tensor:
        node, _ = operand_of(planner, node)
    if node.base_op not in SPREADS or node.tensor is None:
        return None
    source, shape = operand_of(planner, node)
    missing = len(labels) - len(shape)
    own, sizes = [], []
    for dim, (label, size) in enumerate(zip(labels, node.tensor.shape, strict=True)):
        before: Size = 1 if dim < missing else shape[dim - missing]
        batched = len(label) == 1 and label[0].axis == BATCH
        if dim in along:
            if dim < missing or before != size:
                return None
            sizes.append(-1)
        elif before == size != 1:
            sizes.append(-1)
        elif before != 1 or not (batched or (isinstance(size, int) and not is_labelled(label))):
            return None
        else:
            sizes.append(1 if batched else int(size))  # type: ignore[arg-type]
        if dim >= missing:
            own.append(() if before == 1 else label)
    return source, tuple(own), Spread(missing, tuple(sizes))


def _from_the_end(planner: Planner, start: str, size: Size, node: Node) -> int:
    """What has to be added to a computed start: the table's length if it counts from the end (``table[-S:]``)."""
    meta = planner.record.nodes[start].meta
    low, high = bounds(meta.size, planner.record.ranges) if isinstance(meta, ScalarMeta) and meta.size else (None, None)
    if low is not None and low >= 0:
        return 0
    if high is not None and high <= 0 and isinstance(size, int):
        return size
    raise Refuse("a slice whose computed start may count from either end", node.name)


def gather(anchor: str, table: Plan, rank: int, indices: list[tuple[int, Plan]], out_rank: int) -> Value:
    """``table[..., idx, ...]`` on one or two dims with ``[lane, seq]`` indices, the lane in front."""
    dims = [dim for dim, _ in indices]
    rest = [dim for dim in range(rank) if dim not in dims]
    plan = table
    if [*dims, *rest] != list(range(rank)):
        plan = Call("aten.permute.default", (plan, (*dims, *rest)), anchor)
    if len(indices) == 1:
        plan = Call("aten.index.Tensor", (plan, (indices[0][1],)), anchor)
    elif len(indices) == 2:
        rows = Call("aten.unsqueeze.default", (indices[0][1], 2), anchor)
        cols = Call("aten.unsqueeze.default", (indices[1][1], 1), anchor)
        plan = Call("aten.index.Tensor", (plan, (rows, cols)), anchor)
    else:
        raise Refuse("a table read along more than two sequence dims", anchor)
    order = [0] + [1 + [*dims, *rest].index(dim) for dim in range(rank)]
    if order != list(range(rank + 1)):
        plan = Call("aten.permute.default", (plan, tuple(order)), anchor)
    return Value(plan, True, out_rank)


def gather_lane(anchor: str, plan: Plan, rank: int, dim: int, index: Plan) -> Value:
    """``plan[lane, ..., idx[lane], ...]``: rows along ``dim`` of a value with a lane, by an index ``[lane, seq]``."""
    for _ in range(dim):
        index = Call("aten.unsqueeze.default", (index, 1), anchor)
    for _ in range(rank - dim - 1):
        index = Call("aten.unsqueeze.default", (index, -1), anchor)
    sizes = [-1 if d == dim + 1 else Call("aten.sym_size.int", (plan, d), anchor) for d in range(rank + 1)]
    spread = Call("aten.expand.default", (index, tuple(sizes)), anchor)
    return Value(Call("aten.gather.default", (plan, dim + 1, spread), anchor), True, rank)
