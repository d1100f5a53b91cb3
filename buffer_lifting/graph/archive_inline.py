"""Inlines the higher-order ops that only set a mode, in the graph of an archive.

The same as ``passes/normalize.py`` does to an fx graph: ``wrap_with_set_grad_enabled`` (operands that can carry a
gradient are detached where it is switched off) and ``wrap_with_autocast`` that switches autocast off, bodies in bodies
included. Every other higher-order op is left alone.
"""

from __future__ import annotations

from buffer_lifting.graph.archive_graph import RawGraph
from buffer_lifting.graph.archive_schema import SchemaError
from buffer_lifting.graph.record import Arg, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.shape_grammar import short

_GRAD_MODE, _AUTOCAST = "hop.wrap_with_set_grad_enabled", "hop.wrap_with_autocast"
_MAX_NODES = 2_000_000


def inline(raw: RawGraph) -> tuple[dict[str, Node], Arg]:
    """The nodes of a graph with its bodies inlined, and its results. Nodes of a body get its call's name in front."""
    if not any(_body(node, raw) for node in raw.nodes.values()):
        return raw.nodes, raw.results
    inliner = _Inliner(raw)
    results = inliner.copy(raw, {}, "")
    return inliner.nodes, results


def _body(node: Node, raw: RawGraph) -> tuple[str, RawGraph, int] | None:
    """The ``get_attr`` node, the body and the number of leading arguments of a call that is to be inlined."""
    if node.op == _GRAD_MODE:
        skip = 2
    elif node.op == _AUTOCAST and node.args.get("2") is False:
        skip = 5
    else:
        return None
    reference = node.args.get(str(skip - 1))
    if isinstance(reference, Ref) and reference.name in raw.bodies:
        return reference.name, raw.bodies[reference.name], skip
    return None


class _Inliner:
    def __init__(self, raw: RawGraph) -> None:
        self.nodes: dict[str, Node] = {}
        self.top = raw
        self.count = 0

    def copy(self, raw: RawGraph, env: dict[str, Arg], prefix: str) -> Arg:
        """Copies the nodes of a graph whose placeholders ``env`` has values for; the results in the new names."""
        inlined = {found[0] for node in raw.nodes.values() if (found := _body(node, raw))}
        for node in raw.nodes.values():
            if node.name in env or (node.op == "get_attr" and node.name in inlined):
                continue
            found = _body(node, raw)
            if found is not None:
                env[node.name] = self._inline(node, found[1], found[2], env)
                continue
            if node.op == "getitem":
                source, index = _replaced(node.args["0"], env), node.args["1"]
                if isinstance(source, tuple):
                    if type(index) is not int or not 0 <= index < len(source):
                        raise SchemaError(f"{short(node.name)} takes result {index} of {len(source)}")
                    env[node.name] = source[index]
                    continue
            copied = node
            if prefix:
                copied = Node(f"{prefix}_{node.name}", node.kind, node.op, meta=node.meta, modules=node.modules)
                copied.location = node.location
            copied.args = {key: _replaced(arg, env) for key, arg in node.args.items()}
            copied.name = self._unique(copied.name)
            self._add(copied)
            env[node.name] = Ref(copied.name)
        return _replaced(raw.results, env)

    def _inline(self, call: Node, body: RawGraph, skip: int, env: dict[str, Arg]) -> Arg:
        operands = [_replaced(arg, env) for arg in list(call.args.values())[skip:]]
        placeholders = [node.name for node in body.nodes.values() if node.kind is NodeKind.INPUT]
        if len(operands) != len(placeholders):
            raise SchemaError(f"{short(call.name)} gives {len(operands)} values to {len(placeholders)} inputs")
        no_grad = call.op == _GRAD_MODE and call.args.get("0") is False
        inner: dict[str, Arg] = {}
        for name, operand in zip(placeholders, operands, strict=True):
            if no_grad and isinstance(operand, Ref) and self._may_require_grad(operand.name):
                source = self.nodes[operand.name]
                node = Node(
                    self._unique("detach_default"), NodeKind.OP, "aten.detach.default", {"self": operand}, source.meta
                )
                node.modules, node.location = call.modules, call.location or source.location
                self._add(node)
                operand = Ref(node.name)
            inner[name] = operand
        return self.copy(body, inner, call.name)

    def _may_require_grad(self, name: str) -> bool:
        node = self.nodes[name]
        if not isinstance(node.meta, TensorMeta) or not node.meta.is_floating:
            return False
        return node.kind is NodeKind.OP or name in self.top.requires_grad

    def _add(self, node: Node) -> None:
        self.nodes[node.name] = node
        if len(self.nodes) > _MAX_NODES:
            raise SchemaError(f"more than {_MAX_NODES} nodes after inlining")

    def _unique(self, name: str) -> str:
        """The name, with a number behind it if a node has it or the top graph will have it."""
        candidate, count = name, 0
        while candidate in self.nodes or (candidate in self.top.nodes and candidate != name):
            count += 1
            candidate = f"{name}_{count}"
        return candidate


def _replaced(arg: Arg, env: dict[str, Arg]) -> Arg:
    if isinstance(arg, Ref):
        return env.get(arg.name, arg)
    if isinstance(arg, tuple):
        return tuple([_replaced(item, env) for item in arg])
    return arg
