"""Inlines the higher-order ops that only set a mode, in the graph of an archive.

The same as ``passes/normalize.py`` does to an fx graph: ``wrap_with_set_grad_enabled`` (operands that can carry a
gradient are detached where it is switched off) and ``wrap_with_autocast`` (where it is on, its casts are written out by
the rule of ``autocast_rule.py``), bodies in bodies included. Every other higher-order op is left alone.
"""

from __future__ import annotations

from buffer_lifting.graph.archive_graph import RawGraph
from buffer_lifting.graph.archive_schema import SchemaError
from buffer_lifting.graph.autocast_rule import Operand, cast_dtype, is_floating
from buffer_lifting.graph.op_schemas import arguments_of
from buffer_lifting.graph.record import Arg, Meta, Node, NodeKind, Opaque, Ref, TensorMeta
from buffer_lifting.graph.shape_grammar import short

_GRAD_MODE, _AUTOCAST = "hop.wrap_with_set_grad_enabled", "hop.wrap_with_autocast"
_MAX_NODES = 2_000_000


def inline(raw: RawGraph) -> tuple[dict[str, Node], Arg]:
    """The nodes of a graph with its bodies inlined, and its results. Nodes of a body get its call's name in front."""
    if not any(_body(node, raw) for node in raw.nodes.values()):
        return raw.nodes, raw.results
    inliner = _Inliner(raw)
    results = inliner.copy(raw, {}, "")
    return _keep_output_names(inliner.nodes, raw, results)


def _keep_output_names(nodes: dict[str, Node], raw: RawGraph, results: Arg) -> tuple[dict[str, Node], Arg]:
    """A result that an inlined body computes gets the name that the signature has for it, as in ``normalize.py``.

    A value that already has a name of the signature (an input, a result returned twice) is returned through an alias.
    """
    if not isinstance(raw.results, tuple) or not isinstance(results, tuple):
        return nodes, results
    taken = {item.name for item in raw.results if isinstance(item, Ref)}
    names: dict[str, str] = {}
    after: list[Arg] = []
    for old, new in zip(raw.results, results, strict=True):
        name = names.get(new.name, new.name) if isinstance(new, Ref) else ""
        if not isinstance(old, Ref) or not isinstance(new, Ref) or name == old.name:
            after.append(Ref(name) if isinstance(new, Ref) else new)
            continue
        source, after = nodes[new.name], [*after, Ref(old.name)]
        if source.kind is NodeKind.OP and name not in taken:
            names[new.name] = old.name
            continue
        tensor = isinstance(source.meta, TensorMeta)
        args: dict[str, Arg] = {"self": new} if tensor else {"0": new, "1": 1}
        same = Node(old.name, NodeKind.OP, "aten.alias.default" if tensor else "sym.mul", args, source.meta)
        same.modules, same.location = raw.nodes[old.name].modules, raw.nodes[old.name].location
        nodes[same.name] = same
    if not names:
        return nodes, tuple(after)
    replaced: dict[str, Arg] = {name: Ref(new) for name, new in names.items()}
    renamed: dict[str, Node] = {}
    for node in nodes.values():
        node.args = {key: _replaced(arg, replaced) for key, arg in node.args.items()}
        node.name, node._refs = names.get(node.name, node.name), None
        renamed[node.name] = node
    return renamed, tuple(after)


def _body(node: Node, raw: RawGraph) -> tuple[str, RawGraph, int] | None:
    """The ``get_attr`` node, the body and the number of leading arguments of a call that is to be inlined."""
    if node.op == _GRAD_MODE:
        skip = 2
    elif node.op == _AUTOCAST and isinstance(node.args.get("2"), bool):
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

    def copy(self, raw: RawGraph, env: dict[str, Arg], prefix: str, autocast: bool = False) -> Arg:
        """Copies the nodes of a graph whose placeholders ``env`` has values for; the results in the new names."""
        inlined = {found[0] for node in raw.nodes.values() if (found := _body(node, raw))}
        for node in raw.nodes.values():
            if node.name in env or (node.op == "get_attr" and node.name in inlined):
                continue
            found = _body(node, raw)
            if found is not None:
                env[node.name] = self._inline(node, found[1], found[2], env, autocast)
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
            if autocast and node.kind is NodeKind.OP:
                copied.args = self._with_casts(copied)
            copied.name = self._unique(copied.name)
            self._add(copied)
            env[node.name] = Ref(copied.name)
        return _replaced(raw.results, env)

    def _inline(self, call: Node, body: RawGraph, skip: int, env: dict[str, Arg], autocast: bool) -> Arg:
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
        if call.op == _AUTOCAST:
            autocast = call.args["2"] is True
        return self.copy(body, inner, call.name, autocast)

    def _with_casts(self, node: Node) -> dict[str, Arg]:
        """The arguments of a node in an autocast region, cast where autocast would, once for each use."""
        metas = [self.nodes[name].meta for name in node.refs()]
        operands = [Operand(meta.dtype, len(meta.shape)) for meta in metas if isinstance(meta, TensorMeta)]
        dtype = cast_dtype(node.op, _dtypes(node.meta), operands, node.args.get("dtype") is not None)
        if dtype is None:
            return node.args
        casts: dict[str, Arg] = {}
        for name in dict.fromkeys(node.refs()):
            meta = self.nodes[name].meta
            if isinstance(meta, TensorMeta) and is_floating(meta.dtype) and meta.dtype != dtype:
                casts[name] = Ref(self._cast(name, meta, dtype, node))
        return {key: _replaced(arg, casts) for key, arg in node.args.items()}

    def _cast(self, name: str, meta: TensorMeta, dtype: str, reader: Node) -> str:
        args = {argument.name: argument.default for argument in arguments_of("to.dtype") or ()}
        args |= {"self": Ref(name), "dtype": Opaque(f"torch.{dtype}")}
        made = Node(self._unique("to_dtype"), NodeKind.OP, "aten.to.dtype", args, TensorMeta(meta.shape, dtype))
        made.modules, made.location = reader.modules, reader.location
        self._add(made)
        return made.name

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


def _dtypes(meta: Meta) -> list[str]:
    """The dtypes of a node's tensors."""
    if isinstance(meta, tuple):
        return [dtype for item in meta for dtype in _dtypes(item)]
    return [meta.dtype] if isinstance(meta, TensorMeta) else []
