"""Which stream a value read by position follows: one rule, whatever the form and the other reads of the program.

What compares a query with a key (causal, window, chunk, distance) follows the slots, and so does a boolean that says
which keys are seen. Any other value of one axis (rotary, learned tables, scales, a bias for each key such as ALiBi)
follows the positions, also where it is joined with a mask before it meets the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer_lifting.contents import Contents
from buffer_lifting.graph.record import Node, NodeKind
from buffer_lifting.labels import COL, Labels, seq_axes
from buffer_lifting.ops import is_pointwise, is_view
from buffer_lifting.plan import Context

if TYPE_CHECKING:
    from buffer_lifting.planner import Planner

_COPIES = frozenset(
    f"aten.{name}" for name in ["clone", "contiguous", "repeat", "repeat_interleave", "lift_fresh_copy"]
)


def stream_of(contents: Contents, name: str, labels: Labels) -> str:
    """The stream of a whole value where it is read, with dims ``labels``."""
    axes = _axes(contents, name, labels)
    if len(axes) != 1:
        return "slots" if len(axes) > 1 or len(seq_axes(labels)) > 1 else "positions"
    sees = len(seq_axes(labels)) > 1 or any(role == COL for _, role in axes)
    return "slots" if sees and is_flag(contents, name) else "positions"


def joined(planner: Planner, node: Node, labels: Labels, context: Context) -> frozenset[str]:
    """The operands (by path) of an elementwise op that follow the positions though its result follows the slots.

    They vary along one axis, and another operand along two: a bias for each key beside a mask. Where a value of the
    queries meets one of the keys, both are compared and follow the slots. The planner keeps them for verification.
    """
    if context.stream != "slots" or len(seq_axes(labels)) < 2:
        return frozenset()
    paths = _biases(planner, node, labels)
    for path, name in node.named_refs():
        if path in paths:
            planner.joined[node.name, path] = labels[len(labels) - len(planner.variation.of(name)) :]
    return paths


def _biases(contents: Contents, node: Node, labels: Labels) -> frozenset[str]:
    found: dict[str, set[tuple[str, str]]] = {}
    names: dict[str, str] = {}
    for path, name in node.named_refs():
        meta = contents.record.nodes[name].tensor
        if meta is not None and len(meta.shape) <= len(labels):
            found[path] = _axes(contents, name, labels[len(labels) - len(meta.shape) :])
            names[path] = name
    if not any(len(axes) > 1 for axes in found.values()):
        return frozenset()
    return frozenset(path for path, axes in found.items() if len(axes) == 1 and not is_flag(contents, names[path]))


def is_flag(contents: Contents, name: str) -> bool:
    """Whether a value varies because of booleans alone: a mask, also as zeros and minus infinities."""
    stack, seen = [name], set()
    while stack:
        node = contents.record.nodes[stack.pop()]
        if node.name in seen or (node.tensor is not None and node.tensor.dtype == "bool"):
            continue
        seen.add(node.name)
        if not any(contents.variation.of(node.name)):
            continue
        if node.kind is not NodeKind.OP or not (is_pointwise(node) or is_view(node) or node.base_op in _COPIES):
            return False
        stack.extend(ref for ref in node.refs() if contents.record.nodes[ref].tensor is not None)
    return True


def _axes(contents: Contents, name: str, labels: Labels) -> set[tuple[str, str]]:
    """The sequence axes, with roles, that a value can differ along."""
    flags = contents.variation.of(name)
    return seq_axes(tuple(dim for dim, flag in zip(labels, flags, strict=True) if flag))
