"""Along which dims a value without data can vary: fills, expanded dims and constant tables do not.

A value that is the same at every position is no read by position (token types, all-ones masks).
"""

from __future__ import annotations

from buffer_lifting.axis_rules import permutation
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size
from buffer_lifting.ops import FILLS, is_pointwise, is_random

Varies = tuple[bool, ...]
_COPIES = frozenset(f"aten.{name}" for name in ["alias", "clone", "contiguous", "detach", "detach_", "lift_fresh_copy"])
_EXPANDS = ("aten.expand", "aten.expand_as", "aten.broadcast_to")
_PERMUTES = frozenset(f"aten.{name}" for name in ["permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes"])
_SAME_PART = ("aten.slice", "aten.narrow", "aten.split", "aten.chunk", "aten.split_with_sizes")

#: Every rank's part behind one another along the first dim: what is equal along it on each may differ between them.
_GATHER = "_c10d_functional_autograd.all_gather_into_tensor.default"
_OF_RANKS = (_GATHER, "_c10d_functional.wait_tensor.default")
_LOOKUPS = ("aten.gather", "aten.index_select", "aten.index")


class Variation:
    """Answers for one record; memoised, so linear in the nodes that are asked for."""

    def __init__(self, record: GraphRecord) -> None:
        self.record = record
        self._known: dict[str, Varies] = {}

    def of(self, name: str) -> Varies:
        """One flag for each dim: whether two elements along it can differ."""
        known, nodes = self._known, self.record.nodes
        flags = known.get(name)
        if flags is not None:
            return flags
        stack = [name]
        while stack:
            current = stack[-1]
            missing = [ref for ref in nodes[current].refs() if ref not in known]
            if current not in known and missing:
                stack.extend(missing)
                continue
            stack.pop()
            if current not in known:
                known[current] = self._of(nodes[current])
        return known[name]

    def is_uniform(self, name: str) -> bool:
        """Whether all elements are equal."""
        return not any(self.of(name))

    def looks_up_equals(self, node: Node) -> bool:
        """Whether an op takes elements at an index out of a value whose elements are all equal."""
        return node.base_op in _LOOKUPS and self._uniform(node.args.get("self"))

    def _of(self, node: Node) -> Varies:
        if node.tensor is None:
            meta = node.meta if isinstance(node.meta, tuple) else ()
            first = next((m for m in meta if isinstance(m, TensorMeta)), None)
            return _long(first.shape) if first else ()
        shape = node.tensor.shape
        if node.kind is NodeKind.STATE and node.uniform:
            return (False,) * len(shape)
        if node.kind is not NodeKind.OP or is_random(node):
            return _long(shape)
        flags = self._rule(node, shape)
        return tuple([flag and size != 1 for flag, size in zip(flags, shape, strict=True)])

    def _rule(self, node: Node, shape: tuple[Size, ...]) -> Varies:
        op = node.base_op
        if op in FILLS or op in ("aten.scalar_tensor", "aten.fill"):
            fill = node.args.get("fill_value", node.args.get("value"))
            plain = not isinstance(fill, Ref) or self.record.nodes[fill.name].tensor is None or not shape
            return (False,) * len(shape) if plain or self._uniform(fill) else _long(shape)
        if op == "aten.ge" and self._at_least(node.args.get("self"), node.args.get("other")):
            return (False,) * len(shape)
        if is_pointwise(node):
            return self._broadcast(node, shape)
        if op == "aten.embedding":
            return (*self._operand(node, "indices"), not self._uniform(node.args.get("weight")))
        if op == "aten.cat":
            return self._joined(node, shape)
        if node.op in _OF_RANKS and (name := next(iter(node.refs()), None)):
            own = self.of(name)
            if len(own) != len(shape):
                return _long(shape)
            return (True, *own[1:]) if node.op == _GATHER and own else own
        source = node.args.get("self")
        if self.looks_up_equals(node):
            return (False,) * len(shape)
        if not isinstance(source, Ref):
            return _long(shape)
        own = self.of(source.name)
        before = self.record.nodes[source.name].tensor
        if before is None or len(own) != len(before.shape):
            return _long(shape)
        if op in _COPIES or (op in _SAME_PART and len(own) == len(shape)):
            return own
        if op in _EXPANDS or op == "aten.repeat":
            return (False,) * (len(shape) - len(own)) + own
        if op in _PERMUTES:
            order = permutation(node, len(own))
            return tuple(own[d] for d in order) if order else _long(shape)
        dim = node.args.get("dim")
        if op == "aten.unsqueeze" and isinstance(dim, int):
            dim %= len(shape)
            return (*own[:dim], False, *own[dim:])
        if op == "aten.select" and isinstance(dim, int):
            dim %= len(own)
            return (*own[:dim], *own[dim + 1 :])
        if op == "aten.squeeze":
            dims = {dim} if isinstance(dim, int) else set(dim if isinstance(dim, tuple) else range(len(own)))
            gone = {d % len(own) for d in dims if isinstance(d, int) and before.shape[d % len(own)] == 1}
            return tuple(flag for d, flag in enumerate(own) if d not in gone)
        if op in ("aten.view", "aten.reshape") and before.shape == shape:
            return own
        if op in ("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten") and not any(own):
            return (False,) * len(shape)
        return _long(shape)

    def _joined(self, node: Node, shape: tuple[Size, ...]) -> Varies:
        dim = node.args.get("dim", 0)
        parts = [self.of(name) for name in node.refs()]
        if not isinstance(dim, int) or any(len(own) != len(shape) for own in parts):
            return _long(shape)
        return tuple(d == dim % len(shape) or any(own[d] for own in parts) for d in range(len(shape)))

    def _broadcast(self, node: Node, shape: tuple[Size, ...]) -> Varies:
        flags = [False] * len(shape)
        for _, name in node.named_refs():
            if self.record.nodes[name].tensor is None:
                continue
            own = self.of(name)
            if True in own:
                for offset, flag in enumerate(reversed(own), 1):
                    if flag and offset <= len(shape):
                        flags[-offset] = True
        return tuple(flags)

    def _at_least(self, arg: object, bound: object) -> bool:
        """Whether an index is at least ``bound`` everywhere (``q_idx >= 0``, how no mask at all is written)."""
        while isinstance(arg, Ref) and isinstance(bound, int):
            node = self.record.nodes[arg.name]
            if node.base_op == "aten.arange":
                start, step = node.args.get("start", 0) or 0, node.args.get("step", 1)
                return isinstance(start, int) and start >= bound and step in (1, None)
            other = node.args.get("other")
            if node.base_op == "aten.add" and isinstance(other, int) and node.args.get("alpha", 1) == 1:
                bound -= other
            elif node.base_op not in _EXPANDS and node.base_op not in ("aten.unsqueeze", "aten.slice", "aten.view"):
                return False
            arg = node.args.get("self")
        return False

    def _operand(self, node: Node, key: str) -> Varies:
        arg = node.args.get(key)
        return self.of(arg.name) if isinstance(arg, Ref) else ()

    def _uniform(self, arg: object) -> bool:
        return isinstance(arg, Ref) and self.record.nodes[arg.name].tensor is not None and self.is_uniform(arg.name)


def _long(shape: tuple[Size, ...]) -> Varies:
    return tuple([size != 1 for size in shape])
