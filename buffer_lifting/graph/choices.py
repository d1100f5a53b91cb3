"""Sizes such as ``53 - Max(0, 53 - s)`` that the range of ``s`` does not decide, but an op of the program does.

An elementwise op broadcasts only sizes that are equal (or 1). Where one side is such a size and the other is the size
of the result, the program runs only if they are equal, so they are one size in the analysis.
"""

from __future__ import annotations

from buffer_lifting.graph.record import GraphRecord, TensorMeta
from buffer_lifting.graph.sizes import Size, atoms, is_choice, rename, solve
from buffer_lifting.ops import is_pointwise


def resolve_choices(record: GraphRecord) -> None:
    """Replaces undecided choices by what broadcasting makes them."""
    found: dict[str, Size] = {}
    if not _has_choices(record):
        return
    for node in record.nodes.values():
        if node.tensor is None or not is_pointwise(node):
            continue
        shape = node.tensor.shape
        for name in node.refs():
            meta = record.nodes[name].meta
            if not isinstance(meta, TensorMeta):
                continue
            for offset in range(1, min(len(meta.shape), len(shape)) + 1):
                own, out = meta.shape[-offset], shape[-offset]
                if own is out or own == out or own == 1 or (type(own) is int and type(out) is int):
                    continue
                for left, right in ((own, out), (out, own)):
                    if not any(is_choice(a) for a in atoms(left)):
                        continue
                    solved = solve(rename(left, found), rename(right, found))
                    if solved is not None:
                        found[solved[0]] = solved[1]
                        break
    if found:
        record.rename_symbols(found)


def _has_choices(record: GraphRecord) -> bool:
    """Whether the shape of a tensor has an undecided choice."""
    seen: dict[int, Size] = {}
    for node in record.nodes.values():
        if type(node.meta) is TensorMeta:
            for size in node.meta.shape:
                if type(size) is not int and id(size) not in seen:
                    seen[id(size)] = size  # kept: no other size gets its address
                    if any(is_choice(atom) for atom in atoms(size)):
                        return True
    return False
