"""Writes in place become values, in the record of an archive.

The same as ``passes/functionalize.py`` does to an fx graph, node by node and name by name; see there for what is done
and why. ``tests/test_archive.py`` compares the two.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import islice

from buffer_lifting.graph.archive_schema import SchemaError
from buffer_lifting.graph.op_schemas import arguments_of, write_of
from buffer_lifting.graph.record import Arg, Meta, Node, NodeKind, Opaque, Ref, ScalarMeta, TensorMeta
from buffer_lifting.graph.shape_grammar import short
from buffer_lifting.graph.sizes import Size, add

_VIEWS = frozenset(
    f"aten.{name}"
    for name in """
alias detach expand permute select slice squeeze t transpose unsqueeze view narrow view_as expand_as
unflatten movedim swapaxes numpy_T mT
""".split()  # noqa: SIM905
)
_AMBIGUOUS = frozenset(
    f"aten.{name}"
    for name in """
reshape flatten contiguous to reshape_as ravel
""".split()  # noqa: SIM905
)
_LEFT_ALONE = frozenset(
    f"aten.{name}"
    for name in """
detach_ resize_ set_ squeeze_ unsqueeze_ t_ transpose_ resize_as_ requires_grad_
""".split()  # noqa: SIM905
)
_INVERTED = frozenset(
    f"aten.{name}"
    for name in """
slice narrow select permute transpose t unsqueeze squeeze view unflatten alias detach
""".split()  # noqa: SIM905
)
_CAMEL = re.compile(r"(?<=[a-z])([A-Z])")


def functionalize(nodes: dict[str, Node], droppable: frozenset[str]) -> dict[str, Node]:
    """The nodes with their writes as values. ``droppable``: placeholders of states that are in no checkpoint."""
    if not any(_writes(node) for node in nodes.values()):
        return nodes
    return _Functionalizer(nodes, droppable).run()


def _writes(node: Node) -> bool:
    return node.kind is NodeKind.OP and write_of(node.op) is not None and node.base_op not in _LEFT_ALONE


def _form(node: Node) -> str | None:
    """The op that returns what a write leaves; of the diagonal of one matrix, ``masked_fill``. Empty: no such op."""
    if node.op != "aten.fill_diagonal_.default":
        return write_of(node.op)
    matrix = node.tensor is not None and len(node.tensor.shape) == 2
    return "masked_fill.Scalar" if matrix and not node.args.get("wrap") else ""


@dataclass
class _Storage:
    """One storage: the node that made it, and its latest value."""

    base: str
    current: str
    version: int = 0
    views: set[str] = field(default_factory=set)
    latest: dict[object, str] = field(default_factory=dict)  # view signature or name -> its value at this version
    effect: str | None = None
    frozen: bool = False


class _Functionalizer:
    def __init__(self, nodes: dict[str, Node], droppable: frozenset[str]) -> None:
        self.nodes, self.droppable = dict(nodes), droppable
        self.old = list(nodes)
        self.out: dict[str, None] = {}
        self.storage: dict[str, _Storage] = {}
        self.source: dict[str, str] = {}
        self.final: dict[str, str] = {}  # a write -> the value it left in its operand
        self.made: set[str] = set()  # values of writes that are new nodes
        self.returned: dict[str, str] = {}  # what an output reads now -> the name it read before

    def run(self) -> dict[str, Node]:
        """Edits the nodes; the remaining ones in order."""
        self._families()
        for name in self.old:
            node = self.nodes[name]
            if node.kind in (NodeKind.OP, NodeKind.OUTPUT):
                self._update_operands(node)
                if _writes(node):
                    self._write(node)
            self.out[name] = None
        for name in self.final:
            del self.out[name]
        self._keep_names()
        self._drop_effects()
        self._drop_dead()
        return {name: self.nodes[name] for name in self.out}

    # -- who shares storage -----------------------------------------------------------------------------------------

    def _families(self) -> None:
        order = {name: index for index, name in enumerate(self.old)}
        users: dict[str, list[str]] = {name: [] for name in self.old}
        for name in self.old:
            for used in dict.fromkeys(self.nodes[name].refs()):
                users[used].append(name)
        ambiguous: list[tuple[str, str]] = []
        written: dict[str, list[int]] = {}
        for name in self.old:
            node = self.nodes[name]
            first = self._first(node)
            if first is None or node.kind is not NodeKind.OP:
                self.storage[name] = _Storage(name, name)
                continue
            if node.base_op in _VIEWS or _writes(node) or node.op == "aten.to.device":
                known = self.storage[name] = self.storage[first]
                known.views.add(name)
                self.source[name] = first
                if _writes(node):
                    written.setdefault(known.base, []).append(order[name])
                    if not _form(node) or not self._invertible(first):
                        known.frozen = True
                continue
            self.storage[name] = _Storage(name, name)
            if node.base_op in _AMBIGUOUS:
                ambiguous.append((first, name))
        last = self._last_uses(users, order) if ambiguous and written else {}
        for first, name in ambiguous:
            left, right = self.storage[first], self.storage[name]
            for one, other in ((left, right), (right, left)):
                writes = written.get(one.base, [])
                late = bisect_right(writes, order[name])
                uses = [use for use in last.get(other.base, ()) if use != order[name]]
                if late < len(writes) and uses and uses[0] > writes[late]:
                    left.frozen = right.frozen = True

    def _last_uses(self, users: dict[str, list[str]], order: dict[str, int]) -> dict[str, list[int]]:
        """For each storage by its base the places of the last two nodes that read it or a view of it."""
        last: dict[str, list[int]] = {}
        for name, readers in users.items():
            base = self.storage[name].base
            places = {*last.get(base, ()), *(order[reader] for reader in readers)}
            last[base] = nlargest(2, places)
        return last

    def _first(self, node: Node) -> str | None:
        """The operand that a view looks at, or that a write writes to."""
        first = next(iter(node.args.values()), None)
        return first.name if isinstance(first, Ref) and self.nodes[first.name].tensor is not None else None

    def _invertible(self, view: str) -> bool:
        while view != self.storage[view].base:
            node = self.nodes[view]
            if not _writes(node) and node.base_op not in _INVERTED:
                return False
            view = self.source[view]
        return True

    # -- reads ------------------------------------------------------------------------------------------------------

    def _update_operands(self, node: Node) -> None:
        stale = {name for name in node.refs() if (known := self.storage.get(name)) is not None and known.version}
        if stale:
            fresh = {name: self._value(name) for name in dict.fromkeys(node.refs()) if name in stale}
            changed = Node(node.name, node.kind, node.op, {key: _renamed(arg, fresh) for key, arg in node.args.items()})
            changed.meta, changed.modules, changed.location = node.meta, node.modules, node.location
            self.nodes[node.name] = changed
            if node.kind is NodeKind.OUTPUT:
                self.returned = {new: old for old, new in fresh.items()}

    def _value(self, name: str) -> str:
        """The value of a base or one of its views as of now."""
        known = self.storage[name]
        if known.version == 0:
            return name
        if name == known.base:
            return known.current
        if name not in known.latest:
            same = known.latest.get(self._signature(name))
            node = self.nodes[name]
            if same is not None:
                known.latest[name] = same
            elif _writes(node):
                known.latest[name] = self._value(self.source[name])
            else:
                source = self._value(self.source[name])
                args: dict[str, Arg] = {**node.args, next(iter(node.args)): Ref(source)}
                known.latest[name] = self._make(node.op, args, node.meta, node)
        return known.latest[name]

    def _signature(self, name: str) -> tuple[object, ...]:
        """Equal for views that look at the same part of one storage."""
        parts: list[object] = []
        base = self.storage[name].base
        while name != base:
            node = self.nodes[name]
            if not _writes(node):
                parts.append(
                    (node.op, tuple(self._text(arg) for key, arg in sorted(node.args.items()) if key != "self"))
                )
            name = self.source[name]
        return tuple(parts)

    def _text(self, arg: Arg) -> str:
        if isinstance(arg, Ref):
            meta = self.nodes[arg.name].meta
            return str(meta.size) if isinstance(meta, ScalarMeta) else arg.name
        if isinstance(arg, tuple):
            return f"({', '.join(self._text(item) for item in arg)})"
        return str(2**63 - 1) if arg is None else str(arg)

    # -- writes -----------------------------------------------------------------------------------------------------

    def _write(self, node: Node) -> None:
        node = self.nodes[node.name]
        known, form = self.storage[node.name], _form(node)
        if known.frozen or not form:
            return
        count = len(self.nodes)
        value = current = self._functional(node, form)
        self.made.update(islice(reversed(self.nodes), len(self.nodes) - count))
        pieces: dict[object, str] = {}
        at = self.source[node.name]
        while at != known.base:
            pieces[at] = current
            if not _writes(self.nodes[at]):
                pieces.setdefault(self._signature(at), current)
                below = self._value(self.source[at])
                current = self._inverse(self.nodes[at], below, current, node, self.nodes[self.source[at]].meta)
            at = self.source[at]
        known.current, known.latest = current, pieces
        known.version += 1
        known.latest[node.name] = value
        base = self.nodes[known.base]
        if base.kind in (NodeKind.INPUT, NodeKind.STATE):
            if known.effect is not None:
                del self.out[known.effect]
            known.effect = self._call("copy_.default", (Ref(known.base), Ref(current)), base.meta, node)
        self.final[node.name] = value

    def _functional(self, node: Node, form: str) -> str:
        """The value that the write leaves in the operand."""
        operands = list(node.args.values())
        first = operands[0]
        before = self.nodes[first.name].tensor if isinstance(first, Ref) else None
        if before is None or not isinstance(first, Ref):
            raise SchemaError(f"{short(node.name)} writes to what is not one tensor")
        dtype = Opaque(f"torch.{before.dtype}")
        if form == "copy.default":
            source = operands[1]
            meta = self.nodes[source.name].tensor if isinstance(source, Ref) else None
            if not isinstance(source, Ref) or meta is None:
                return self._call(form, (first, *operands[1:]), node.meta, node)
            made = source.name
            if meta.dtype != before.dtype:
                made = self._call("to.dtype", (source, dtype), TensorMeta(meta.shape, before.dtype), node)
            if meta.shape == before.shape:
                return made
            if all(isinstance(size, int) for size in before.shape):
                return self._call("expand.default", (Ref(made), tuple(int(str(s)) for s in before.shape)), before, node)
            return self._call("expand_as.default", (Ref(made), first), before, node)
        if node.base_op == "aten.fill_diagonal_":
            where = TensorMeta(before.shape, "bool")
            ones = self._call("ones_like.default", (first, Opaque("torch.bool")), where, node)
            upper = self._call("triu.default", (Ref(ones),), where, node)
            diagonal = self._call("tril.default", (Ref(upper),), where, node)
            return self._call(form, (first, Ref(diagonal), node.args["fill_value"]), node.meta, node)
        arguments = operands if form != "zeros_like.default" else operands[:1]
        made = self._call(form, tuple(arguments), node.meta, node)
        others = [self.nodes[name].tensor for name in dict.fromkeys(node.refs()) if name != first.name]
        wider = any(meta is not None and meta.dtype != before.dtype and meta.shape for meta in others)
        if wider and form not in ("index_put.default", "masked_fill.Tensor") and before.dtype != "bool":
            made = self._call("to.dtype", (Ref(made), dtype), node.meta, node)
        return made

    def _inverse(self, view: Node, source: str, value: str, like: Node, meta: Meta) -> str:
        """What ``source`` is when its view holds ``value``."""
        args, kind = view.args, view.base_op.removeprefix("aten.")
        if kind == "slice":
            bounds = tuple(args[key] for key in ("dim", "start", "end", "step"))
            return self._call("slice_scatter.default", (Ref(source), Ref(value), *bounds), meta, like)
        if kind == "narrow":
            start, dim = args["start"], args["dim"]
            shape = view.tensor.shape if view.tensor else ()
            if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
                raise SchemaError(f"{short(view.name)} narrows a dim that its operand does not have")
            size = shape[dim]
            end: Arg
            if isinstance(start, int) and isinstance(size, int):
                end = start + size
            else:
                total = ScalarMeta(add(self._number(start), self._number(args["length"])))
                bare = Node("", NodeKind.OP)
                end = Ref(self._make("sym.add", {"0": start, "1": args["length"]}, total, bare))
            return self._call("slice_scatter.default", (Ref(source), Ref(value), dim, start, end), meta, like)
        if kind == "select":
            operands = (Ref(source), Ref(value), args["dim"], args["index"])
            return self._call("select_scatter.default", operands, meta, like)
        if kind == "permute":
            dims = args["dims"] if isinstance(args["dims"], tuple) else ()
            order = [dim % len(dims) for dim in dims if isinstance(dim, int)]
            if not dims or sorted(order) != list(range(len(dims))):
                raise SchemaError(f"{short(view.name)} does not permute the dims of its operand")
            inverse = tuple(order.index(dim) for dim in range(len(order)))
            return self._call("permute.default", (Ref(value), inverse), meta, like)
        if kind == "transpose":
            return self._call("transpose.int", (Ref(value), *list(args.values())[1:]), meta, like)
        if kind == "t":
            return self._call("t.default", (Ref(value),), meta, like)
        if kind in ("alias", "detach"):
            return self._call("alias.default", (Ref(value),), meta, like)
        return self._call("view_as.default", (Ref(value), Ref(source)), meta, like)

    def _number(self, arg: Arg) -> Size:
        if isinstance(arg, Ref):
            meta = self.nodes[arg.name].meta
            if isinstance(meta, ScalarMeta) and meta.size is not None:
                return meta.size
        return arg if isinstance(arg, int) else 0

    def _call(self, op: str, operands: tuple[Arg, ...], meta: Meta, like: Node) -> str:
        """A new node that calls an aten op of the table with these leading operands."""
        arguments = arguments_of(op) or ()
        args = {argument.name: argument.default for argument in arguments}
        args.update(zip(args, operands, strict=False))
        return self._make(f"aten.{op}", args, meta, like)

    def _make(self, op: str, args: dict[str, Arg], meta: Meta, like: Node) -> str:
        target = op.removeprefix("aten.").removeprefix("sym.")
        base = _CAMEL.sub(r"_\1", target).lower().replace(".", "_")
        name, count = base, 0
        while name in self.nodes:
            count += 1
            name = f"{base}_{count}"
        self.nodes[name] = Node(name, NodeKind.OP, op, args, meta, like.modules, like.location)
        self.out[name] = None
        return name

    # -- names ------------------------------------------------------------------------------------------------------

    def _keep_names(self) -> None:
        """Values of writes take the writes' names, and outputs keep the names that the signature has for them."""
        self._rename({value: name for name, value in self.final.items() if value in self.made})
        for value, old in self.returned.items():
            if value == old:
                continue
            if old not in self.out and value in self.made:
                self._rename({value: old})
                continue
            self._rename({old: f"{old}_before"} if old in self.out else {})
            output = next(name for name in self.out if self.nodes[name].kind is NodeKind.OUTPUT)
            node, results = self.nodes[value], self.nodes[output]
            copy = Node(old, NodeKind.OP, "aten.alias.default", {"self": Ref(value)}, node.meta, node.modules)
            copy.location = node.location
            args = {key: _renamed(arg, {value: old}) for key, arg in results.args.items()}
            del self.out[output]
            self.nodes[old], self.nodes[output] = copy, Node(output, NodeKind.OUTPUT, results.op, args, results.meta)
            self.out[old] = self.out[output] = None

    def _rename(self, names: dict[str, str]) -> None:
        if not names:
            return
        self.returned = {names.get(new, new): old for new, old in self.returned.items()}
        self.made = {names.get(name, name) for name in self.made}
        renamed: dict[str, Node] = {}
        for name in self.out:
            node = self.nodes[name]
            if name in names or any(ref in names for ref in node.refs()):
                node = replace(node, args={key: _renamed(arg, names) for key, arg in node.args.items()})
                node.name, node._refs = names.get(name, name), None
            renamed[node.name] = node
        self.nodes, self.out = renamed, dict.fromkeys(renamed)
        for known in {id(item): item for item in self.storage.values()}.values():
            known.base, known.current = names.get(known.base, known.base), names.get(known.current, known.current)
            known.views = {names.get(view, view) for view in known.views}
            known.effect = names.get(known.effect, known.effect) if known.effect else None

    # -- what is left of the writes ---------------------------------------------------------------------------------

    def _drop_effects(self) -> None:
        needed: set[str] = set()
        stack = [name for name in self.out if self.nodes[name].kind is NodeKind.OUTPUT]
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack.extend(self.nodes[name].refs())
        for known in {id(item): item for item in self.storage.values()}.values():
            if known.effect is None or known.base not in self.droppable or known.base in needed:
                continue
            if not self._keeps_count(known.current, known.base):
                del self.out[known.effect]

    def _keeps_count(self, value: str, base: str) -> bool:
        """Whether what is written is computed from what the buffer held (a counter), not only put beside it."""
        stack, seen = [value], set()
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name == base:
                return True
            node = self.nodes[name]
            operands = list(node.refs())
            whole = node.args.get("self")
            if node.base_op in ("aten.slice_scatter", "aten.select_scatter") and isinstance(whole, Ref):
                at: Arg = whole
                while isinstance(at, Ref) and self.nodes[at.name].base_op in _VIEWS:
                    at = next(iter(self.nodes[at.name].args.values()), None)
                if isinstance(at, Ref) and at.name == base:
                    operands.remove(whole.name)
            stack.extend(operands)
        return False

    def _drop_dead(self) -> None:
        """New nodes, and nodes of written storages, that nothing reads."""
        stale = {n for known in self.storage.values() if known.version for n in (known.base, *known.views)}
        kept = set(self.old) - stale
        used: set[str] = set()
        for name in reversed(list(self.out)):
            node = self.nodes[name]
            pure = node.kind is NodeKind.OP and name not in kept and write_of(node.op) is None
            if pure and name not in used:
                del self.out[name]
            else:
                used.update(node.refs())


def _renamed(arg: Arg, names: dict[str, str]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(names.get(arg.name, arg.name))
    if isinstance(arg, tuple):
        return tuple([_renamed(item, names) for item in arg])
    return arg
