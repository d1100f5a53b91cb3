"""What stages cost: FLOPs by torch's own formulas on the sizes of the example inputs, and parameter bytes."""

from __future__ import annotations

from torch.utils.flop_counter import mm_flop, sdpa_flop_count

from buffer_lifting.graph.record import GraphRecord, Node, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size
from buffer_lifting.ops import ATTENTION, FLEX_ATTENTION

ITEM_BYTES = {
    "complex128": 16,
    "float64": 8,
    "complex64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
}
#: A symbolic size whose example is not known counts as this.
DEFAULT_SIZE = 128


def evaluate(size: Size, hints: dict[str, int]) -> int:
    """A size with its symbols at their example values."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, coefficient in size.terms:
        term = coefficient
        for atom, power in monomial:
            term *= hints.get(atom, DEFAULT_SIZE) ** power
        total += term
    return total


def shape_of(meta: TensorMeta, hints: dict[str, int]) -> tuple[int, ...]:
    """A shape at example sizes."""
    return tuple(evaluate(size, hints) for size in meta.shape)


def tensor_bytes(meta: TensorMeta, hints: dict[str, int]) -> int:
    """Bytes of a tensor at example sizes."""
    count = 1
    for size in shape_of(meta, hints):
        count *= size
    return count * ITEM_BYTES.get(meta.dtype, 1)


def flops(record: GraphRecord, node: Node, hints: dict[str, int]) -> int:
    """Forward FLOPs of the ops that carry the cost of a model: matrix products and attention."""
    out = node.tensor
    if out is None and node.base_op != FLEX_ATTENTION:
        return 0

    def shape(key: str) -> tuple[int, ...] | None:
        arg = node.args.get(key)
        meta = record.nodes[arg.name].tensor if isinstance(arg, Ref) else None
        return None if meta is None else shape_of(meta, hints)

    if node.base_op in (ATTENTION, FLEX_ATTENTION):
        query, key, value = shape("query"), shape("key"), shape("value")
        if query and key and value and len(query) == 4 and len(key) == 4:
            heads = (key[0], query[1], *key[2:])
            return int(sdpa_flop_count(query, heads, (value[0], query[1], *value[2:])))
        return 0
    left = {
        "aten.linear": "input",
        "aten.matmul": "self",
        "aten.mm": "self",
        "aten.bmm": "self",
        "aten.addmm": "mat1",
        "aten.baddbmm": "batch1",
    }.get(node.base_op)
    operand = shape(left) if left else None
    if operand is None or out is None:
        return 0
    rows = 1
    result = shape_of(out, hints)
    for size in result[:-1]:
        rows *= size
    return int(mm_flop((rows, operand[-1]), (operand[-1], result[-1])))


def balance(costs: list[float], count: int) -> list[int]:
    """Splits a list of costs into ``count`` runs with the smallest largest sum: exact, by dynamic programming.

    Returns the first index of every run but the first. Quadratic in the number of candidate cuts (layers).
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)
    best = [[float("inf")] * (total + 1) for _ in range(count + 1)]
    cut = [[0] * (total + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for parts in range(1, count + 1):
        for end in range(parts, total + 1):
            for start in range(parts - 1, end):
                worst = max(best[parts - 1][start], prefix[end] - prefix[start])
                if worst < best[parts][end]:
                    best[parts][end], cut[parts][end] = worst, start
    starts = []
    end = total
    for parts in range(count, 0, -1):
        end = cut[parts][end]
        starts.append(end)
    return starts[::-1][1:]
