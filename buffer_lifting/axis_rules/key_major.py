"""Which dim of attention's scores runs along the keys: the one over which they are normalised, further down."""

from __future__ import annotations

from buffer_lifting.graph.record import GraphRecord, Ref
from buffer_lifting.labels import COL, ROW, Labels, transposed
from buffer_lifting.ops import MATRIX_PRODUCTS, is_pointwise

_SOFTMAXES = frozenset(f"aten.{name}" for name in ["softmax", "_softmax", "_safe_softmax"])
_KEPT = frozenset(
    f"aten.{name}" for name in ["clone", "contiguous", "dropout", "to", "_to_copy", "alias", "tril", "triu"]
)


def softmax_dims(record: GraphRecord) -> dict[str, int]:
    """Each product that a softmax reads, through ops that keep the place of every element: the dim it runs over.

    Softmaxes over the last dim are left out.
    """
    found: dict[str, int] = {}
    torn: set[str] = set()
    for softmax in record.nodes.values():
        dim, source = softmax.args.get("dim"), softmax.args.get("self")
        if softmax.base_op not in _SOFTMAXES or softmax.tensor is None or not isinstance(dim, int):
            continue
        shape = softmax.tensor.shape
        if not shape or dim % len(shape) == len(shape) - 1:
            continue  # keys come last anyway
        stack, seen = [source.name] if isinstance(source, Ref) else [], set[str]()
        while stack:
            name = stack.pop()
            node = record.nodes[name]
            if name in seen or node.tensor is None or node.tensor.shape != shape:
                continue
            seen.add(name)
            if node.base_op == "aten.einsum" or node.base_op in MATRIX_PRODUCTS:
                if found.setdefault(name, dim % len(shape)) != dim % len(shape):
                    torn.add(name)
            elif is_pointwise(node) or node.base_op in _KEPT:
                stack.extend(node.refs())
    return {name: dim for name, dim in found.items() if name not in torn}


def keys_where_normalised(out: Labels, dim: int | None) -> Labels:
    """Labels of scores whose dim ``dim`` a softmax runs over: that is the keys, also where it comes first."""
    roles = [(f.axis, f.role) for own in out for f in own if f.is_seq]
    if dim is None or len(roles) != 2 or {role for _, role in roles} != {ROW, COL}:
        return out
    if not any(f.is_seq and f.role == ROW for f in out[dim]):
        return out
    return transposed(out)
