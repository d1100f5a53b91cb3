"""Replaces writes in place by new values, so that analysis sees what each read really reads.

Masks filled by slices, biases with ``add_``, caches that a forward writes before it reads them: export leaves these
as writes through views. Each write to storage made in the graph becomes a value of its own (``aten.add_`` becomes
``aten.add``; a write to a slice becomes ``slice_scatter`` into the base), and later reads of any view of that storage
read the new value through the same views. A read through the view that was just written gets what was written.

A buffer that the graph overwrites before any read (rotary caches) is treated likewise; its write is dropped if no
read depends on what the buffer held before and it is in no checkpoint. Any other written state keeps its write.
What cannot be expressed without the write (``resize_``, a write through an ambiguous alias) is left as it is, and is
refused later if a read depends on it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.graph.copies import erase_unused
from buffer_lifting.passes.view_inverses import INVERSES
from buffer_lifting.torch_compat import OpOverload, functional_form, is_mutable, returns_alias, schema_args

aten = torch.ops.aten
#: Views that always share storage with their first operand.
_VIEWS = {
    getattr(aten, name)
    for name in [
        "alias",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
        "narrow",
        "view_as",
        "expand_as",
        "unflatten",
        "movedim",
        "swapaxes",
        "numpy_T",
        "mT",
    ]
}
#: May share storage or copy, depending on strides and dtype.
_AMBIGUOUS = {getattr(aten, name) for name in ["reshape", "flatten", "contiguous", "to", "reshape_as", "ravel"]}
_LEFT_ALONE = {
    "detach_",
    "resize_",
    "set_",
    "squeeze_",
    "unsqueeze_",
    "t_",
    "transpose_",
    "resize_as_",
    "requires_grad_",
}


def functionalize(graph: Graph, droppable: frozenset[str] = frozenset()) -> bool:
    """Edits ``graph``; returns whether anything changed. ``droppable``: placeholders of non-persistent buffers."""
    if not any(_writes(node) for node in graph.nodes):
        return False
    return _Functionalizer(graph, droppable).run()


def writes_in_place(graph: Graph) -> bool:
    """Whether some call writes to an operand."""
    return any(_writes(node) for node in graph.nodes)


def _writes(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return is_mutable(node.target) and _packet_name(node) not in _LEFT_ALONE


def _packet_name(node: Node) -> str:
    return str(node.target).split(".")[1]


@dataclass
class _Storage:
    """One storage: the node that made it, and its latest value."""

    base: Node
    current: Node
    version: int = 0
    views: set[Node] = field(default_factory=set)
    latest: dict[Any, Node] = field(default_factory=dict)  # view signature or node -> its value at this version
    effect: Node | None = None  # copy_ back into a state
    frozen: bool = False  # its writes stay as they are


class _Functionalizer:
    def __init__(self, graph: Graph, droppable: frozenset[str]) -> None:
        self.graph, self.droppable = graph, droppable
        self.storage: dict[Node, _Storage] = {}
        self.source: dict[Node, Node] = {}  # view -> what it looks at
        self.changed = False
        self.final: dict[Node, Node] = {}  # a write -> the value it left in its operand
        self.made: set[Node] = set()  # values of writes that this pass has made
        self.returned: dict[Node, str] = {}  # what an output reads now -> the name it read before

    def run(self) -> bool:
        nodes = list(self.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        related = sorted(_related(nodes), key=order.__getitem__)
        self._families(related, order)
        readers = {user for node in related for user in node.users}
        for node in sorted(readers.union(related), key=order.__getitem__):
            if node.op == "placeholder":
                continue
            self._update_operands(node)
            if _writes(node):
                self._write(node)
        self._drop_effects()
        stale = {n for known in self.storage.values() if known.version for n in (known.base, *known.views)}
        old = set(nodes) - stale
        erase_unused(self.graph, lambda n: n not in old and n.op != "placeholder" and not n.is_impure())
        return self.changed

    # -- who shares storage -----------------------------------------------------------------------------------

    def _families(self, nodes: list[Node], order: dict[Node, int]) -> None:
        """Of the nodes that can share storage with one that is written to; the others stay as they are."""
        ambiguous: list[tuple[Node, Node]] = []
        written: dict[Node, list[int]] = {}
        for node in nodes:
            first = _first(node)
            if first is None or node.op != "call_function":
                self.storage[node] = _Storage(node, node)
                continue
            if _shares(node):
                known = self.storage[first]
                self.storage[node] = known
                known.views.add(node)
                self.source[node] = first
                if _writes(node):
                    written.setdefault(known.base, []).append(order[node])
                    if _form(node) is None or not self._invertible(first):
                        known.frozen = True
                continue
            self.storage[node] = _Storage(node, node)
            if _may_share(node):
                ambiguous.append((first, node))
        for first, node in ambiguous:
            self._check_ambiguous(first, node, order, written)

    def _check_ambiguous(self, first: Node, node: Node, order: dict[Node, int], written: dict[Node, list[int]]) -> None:
        """A possible alias: harmless unless one side is written while the other is still to be read."""
        left, right = self.storage[first], self.storage[node]
        after = order[node]
        for one, other in ((left, right), (right, left)):
            late = [at for at in written.get(one.base, []) if at > after]
            if late and any(
                order[user] > min(late) for n in (other.base, *other.views) for user in n.users if user is not node
            ):
                left.frozen = right.frozen = True

    def _invertible(self, view: Node) -> bool:
        while view is not self.storage[view].base:
            if not _writes(view) and getattr(view.target, "overloadpacket", None) not in INVERSES:
                return False
            view = self.source[view]
        return True

    # -- reads ------------------------------------------------------------------------------------------------

    def _update_operands(self, node: Node) -> None:
        stale = {n for n in node.all_input_nodes if self._stale(n)}
        if not stale:
            return
        fresh = {n: self._value(n, before=node) for n in stale}
        if node.op == "output":
            self.returned = {new: old.name for old, new in fresh.items()}
        node.args = torch.fx.map_arg(node.args, lambda n: fresh.get(n, n))
        node.kwargs = torch.fx.map_arg(node.kwargs, lambda n: fresh.get(n, n))

    def _stale(self, node: Node) -> bool:
        known = self.storage.get(node)
        return known is not None and known.version > 0

    def _value(self, node: Node, before: Node) -> Node:
        """The value of ``node`` (a base or one of its views) as of now."""
        known = self.storage[node]
        if known.version == 0:
            return node
        if node is known.base:
            return known.current
        if node not in known.latest:
            same = known.latest.get(self._signature(node))
            if same is not None:
                known.latest[node] = same
            elif _writes(node):
                known.latest[node] = self._value(self.source[node], before)
            else:
                source = self._value(self.source[node], before)
                with self.graph.inserting_before(before):
                    assert callable(node.target)
                    made = self.graph.call_function(node.target, (source, *node.args[1:]), dict(node.kwargs))
                made.meta = dict(node.meta)
                known.latest[node] = made
        return known.latest[node]

    def _signature(self, node: Node) -> Any:
        """Equal for views that look at the same part of one storage."""
        parts: list[Any] = []
        base = self.storage[node].base
        while node is not base:
            if not _writes(node):
                named = {k: v for k, v in schema_args(node).items() if not isinstance(v, torch.fx.Node) or k != "self"}
                parts.append((str(node.target), tuple(_text(v) for k, v in sorted(named.items()) if k != "self")))
            node = self.source[node]
        return tuple(parts)

    # -- writes -----------------------------------------------------------------------------------------------

    def _write(self, node: Node) -> None:
        known = self.storage[node]
        target = _form(node)
        if known.frozen or target is None:
            return
        view = self.source[node]  # the operand written to, in the words of the original graph
        with self.graph.inserting_before(node):
            value = self._functional(node, target)
            pieces: dict[Any, Node] = {}
            at = view
            current = value
            while at is not known.base:
                pieces[at] = current
                if not _writes(at):
                    pieces.setdefault(self._signature(at), current)
                    below = self._value(self.source[at], before=node)
                    current = INVERSES[at.target.overloadpacket](self.graph, at, below, current)  # type: ignore[union-attr]
                    current.meta = {**node.meta, "val": self.source[at].meta["val"]}
                at = self.source[at]
        known.current, known.latest = current, pieces
        known.version += 1
        known.latest[node] = value
        self.changed = True
        if known.base.op == "placeholder":
            if known.effect is not None:
                self.graph.erase_node(known.effect)
            with self.graph.inserting_before(node):
                known.effect = self.graph.call_function(aten.copy_.default, (known.base, current))
            known.effect.meta = {**node.meta, "val": known.base.meta["val"]}
        self.final[node] = value

    def _functional(self, node: Node, target: Any) -> Node:
        """The value that the write leaves in the operand."""
        operand = node.args[0]
        assert isinstance(operand, Node)
        before, after = operand.meta["val"], node.meta["val"]
        if target is aten.copy.default:
            source = node.args[1]
            assert isinstance(source, Node)
            made = source
            if source.meta["val"].dtype != before.dtype:
                made = self._call(aten.to.dtype, (made, before.dtype), node, _cast(source.meta["val"], before.dtype))
            if tuple(source.meta["val"].shape) == tuple(before.shape):
                return made
            if all(isinstance(size, int) for size in before.shape):
                return self._call(aten.expand.default, (made, list(before.shape)), node, before)
            return self._call(aten.expand_as.default, (made, operand), node, before)
        if node.target is aten.fill_diagonal_.default:
            fill = schema_args(node)["fill_value"]
            return self._call(target, (operand, self._diagonal(node, operand), fill), node, after)
        made = self._call(target, node.args, node, after, dict(node.kwargs))
        others = [n.meta.get("val") for n in node.all_input_nodes if n is not operand]
        wider = [v for v in others if isinstance(v, torch.Tensor) and v.dtype != before.dtype and v.ndim]
        if wider and target not in (aten.index_put.default, aten.masked_fill.Tensor) and before.dtype != torch.bool:
            made = self._call(aten.to.dtype, (made, before.dtype), node, after)
        return made

    def _diagonal(self, node: Node, operand: Node) -> Node:
        """Where a matrix has its diagonal: bool, of its shape."""
        where = _cast(operand.meta["val"], torch.bool)
        ones = self._call(aten.ones_like.default, (operand,), node, where, {"dtype": torch.bool})
        return self._call(aten.tril.default, (self._call(aten.triu.default, (ones,), node, where),), node, where)

    def _call(self, target: Any, args: Any, like: Node, value: Any, kwargs: dict[str, Any] | None = None) -> Node:
        made = self.graph.call_function(target, tuple(args), kwargs or {})
        made.meta = {**like.meta, "val": value}
        self.made.add(made)
        return made

    def _rename_output(self, node: Node, name: str) -> None:
        """Keeps the name that the program's signature has for an output."""
        taken = {other.name for other in self.graph.nodes}
        if name not in taken and node in self.made:
            node.name = name
            return
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            copy = self.graph.call_function(aten.alias.default, (node,))
        copy.meta = dict(node.meta)
        output.args = torch.fx.map_arg(output.args, lambda n: copy if n is node else n)
        for other in self.graph.nodes:
            if other.name == name:
                other.name = f"{name}_before"
        copy.name = name

    # -- writes to state --------------------------------------------------------------------------------------

    def _drop_effects(self) -> None:
        """Removes the writes that are values now, and writes to buffers that no read needs."""
        names = {self.final[node]: node.name for node in self.final if self.final[node] in self.made}
        for node in reversed(self.final):  # in the order of the graph, from its end
            if node.users:
                node.replace_all_uses_with(self.final[node])
            self.graph.erase_node(node)
        for made, name in names.items():
            made.name = name  # findings and output specs go on naming it
        for made, name in self.returned.items():
            if made.name != name:
                self._rename_output(made, name)
        effects = {id(s): s for s in self.storage.values() if s.effect is not None and s.base.name in self.droppable}
        needed = self._needed() if effects else set()
        for known in effects.values():
            if known.effect is None or known.base in needed:
                continue
            if not self._keeps_count(known.current, known.base):
                self.graph.erase_node(known.effect)

    def _needed(self) -> set[Node]:
        """The nodes that what the graph returns depends on."""
        needed: set[Node] = set()
        stack = [self.graph.output_node()]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return needed

    def _keeps_count(self, value: Node, base: Node) -> bool:
        """Whether what is written is computed from what the buffer held (a counter), not only put beside it."""
        stack, seen = [value], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node is base:
                return True
            operands = list(node.all_input_nodes)
            if getattr(node.target, "overloadpacket", None) in (aten.slice_scatter, aten.select_scatter):
                whole = node.args[0]
                while isinstance(whole, Node) and getattr(whole.target, "overloadpacket", None) in _VIEWS:
                    whole = whole.args[0]
                if whole is base:
                    operands.remove(node.args[0])  # type: ignore[arg-type]
            stack.extend(operands)
        return False


def _shares(node: Node) -> bool:
    """Whether a call returns (a view of) its first operand: a view, an alias, a write."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _VIEWS or _writes(node) or node.target is aten.to.device:
        return True
    return not _may_share(node) and returns_alias(node)


def _may_share(node: Node) -> bool:
    """Whether it depends on strides and dtypes if a call returns (a view of) its first operand."""
    return node.target is operator.getitem or getattr(node.target, "overloadpacket", None) in _AMBIGUOUS


def _related(nodes: list[Node]) -> set[Node]:
    """The nodes that share, or may share, storage with one that is written to, directly or through others."""
    stack = [node for node in nodes if _writes(node)]
    found = set(stack)

    def add(node: Node) -> None:
        if node not in found:
            found.add(node)
            stack.append(node)

    while stack:
        node = stack.pop()
        first = _first(node)
        if first is not None and node.op == "call_function" and (_shares(node) or _may_share(node)):
            add(first)
        for user in node.users:
            if user.op == "call_function" and _first(user) is node and (_shares(user) or _may_share(user)):
                add(user)
    return found


def _first(node: Node) -> Node | None:
    """The operand that a view looks at, or that a write writes to."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, Node) and isinstance(first.meta.get("val"), torch.Tensor) else None


def _form(node: Node) -> Any:
    """The op that returns what a write leaves; of the diagonal of one matrix, ``masked_fill``. ``None``: no such op."""
    if node.target is not aten.fill_diagonal_.default:
        return functional_form(node.target)
    wraps = schema_args(node).get("wrap", False)
    return aten.masked_fill.Scalar if node.meta["val"].ndim == 2 and not wraps else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    from buffer_lifting.torch_compat import fake_mode_of

    with fake_mode_of(value), torch.no_grad():
        return value.to(dtype)


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return str(value.meta.get("val"))
    if isinstance(value, list | tuple):
        return f"({', '.join(_text(item) for item in value)})"
    return "9223372036854775807" if value is None else str(value)
