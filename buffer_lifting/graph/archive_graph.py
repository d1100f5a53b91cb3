"""A graph of an archive as nodes of a record, as torch's loader would name and order them.

Ops are strings here: an op of the aten table gets its arguments by schema name, any other keeps its name and the
arguments as they are written, and nothing is looked up in torch, in ``operator`` or in any other module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import field as default
from typing import Any

from buffer_lifting.graph.archive_schema import (
    MAX_DEPTH,
    SchemaError,
    as_bool,
    as_dict,
    as_identifier,
    as_list,
    as_name,
    as_text,
    as_union,
    field,
    shown,
)
from buffer_lifting.graph.archive_values import Sizes, read_argument
from buffer_lifting.graph.locations import innermost_location
from buffer_lifting.graph.op_schemas import Argument, arguments_of
from buffer_lifting.graph.record import Arg, Location, Meta, Node, NodeKind, Ref, ScalarMeta
from buffer_lifting.graph.shape_grammar import short
from buffer_lifting.graph.sizes import Ranges

Modules = tuple[tuple[str, str], ...]
_HOP = "torch.ops.higher_order."
_OPS = "torch.ops."
_TARGET = re.compile(r"[A-Za-z0-9_.:#<>\-]{1,256}")
_ILLEGAL = re.compile("[^0-9a-zA-Z_]+")
_CAMEL = re.compile(r"(?<=[a-z])([A-Z])")
_OPERATORS = {"getitem": "getitem", "add": "sym.add", "sub": "sym.sub", "mul": "sym.mul"}
_PYTHON = re.compile(r"(?:_operator|math)\.(\w+)|torch\.(_?sym_\w+)")
_RESERVED = {"aten", "hop", "sym", "unknown", "get_attr", "higher_order"}


@dataclass
class RawGraph:
    """A graph before inlining. Names are those of the graph itself, unique in it."""

    nodes: dict[str, Node] = default(default_factory=dict)
    results: Arg = ()  # of a graph with one tensor result that is no tuple: its reference
    bodies: dict[str, RawGraph] = default(default_factory=dict)  # by the name of the get_attr node
    requires_grad: set[str] = default(default_factory=set)
    input_metas: list[tuple[str, Any]] = default(default_factory=list)  # placeholder name, its tensor's JSON


class Reader:
    """What the graphs of one archive share: sizes, and caches of schemas, stack traces and module stacks."""

    def __init__(self, ranges: Ranges) -> None:
        self.sizes = Sizes(ranges)
        self.schemas: dict[str, dict[str, Argument] | None] = {}
        self._locations: dict[str, Location | None] = {}
        self._modules: dict[str, Modules] = {}
        self._entries: dict[str, tuple[str, str, str]] = {}

    def graph(self, value: Any, names: list[str] | None = None, depth: int = 0) -> RawGraph:
        """Reads one graph; ``names`` are those of its inputs in the signature."""
        if depth > MAX_DEPTH:
            raise SchemaError(f"graphs in graphs, deeper than {MAX_DEPTH}")
        return _GraphReader(self, as_dict(value, "the graph"), depth).read(names)

    def schema(self, op: str) -> dict[str, Argument] | None:
        """The arguments of an aten op by name; ``None`` if it is not in the table."""
        if op not in self.schemas:
            found = arguments_of(op)
            self.schemas[op] = None if found is None else {argument.name: argument for argument in found}
        return self.schemas[op]

    def location(self, metadata: dict[str, Any]) -> Location | None:
        """The source line of a node."""
        trace = as_text(metadata.get("stack_trace") or "", "a stack trace")
        if trace not in self._locations:
            found = innermost_location(trace)
            if found is not None:
                found = Location(shown(found.file), found.line, shown(found.code), shown(found.function))
            self._locations[trace] = found
        return self._locations[trace]

    def modules(self, metadata: dict[str, Any]) -> Modules:
        """The modules that a node was traced in, outermost first: ``key,path,class`` joined by ``;``."""
        text = as_text(metadata.get("nn_module_stack") or "", "a module stack")
        found = self._modules.get(text)
        if found is None:
            stack = dict([self._entry(item) for item in text.split(";")] if text else [])
            found = self._modules[text] = tuple(stack.values())
        return found

    def _entry(self, text: str) -> tuple[str, tuple[str, str]]:
        if text not in self._entries:
            parts = text.split(",") if "(" not in text and "[" not in text else _split(text)
            if len(parts) != 3:
                raise SchemaError(f"the module stack entry {short(text)} is not key,path,class")
            self._entries[text] = (parts[0], shown(parts[1]), shown(parts[2]))
        key, path, kind = self._entries[text]
        return key, (path, kind)


def _split(text: str) -> list[str]:
    """Splits at the commas that are not in brackets."""
    parts, start, depth = [], 0, 0
    for end, letter in enumerate(text):
        if letter in "[(":
            depth += 1
        elif letter in ")]":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:end])
            start = end + 1
    return [*parts, text[start:]]


class _GraphReader:
    def __init__(self, reader: Reader, value: dict[str, Any], depth: int) -> None:
        self.reader, self.sizes, self.value, self.depth = reader, reader.sizes, value, depth
        self.raw = RawGraph()
        self.tensors = as_dict(field(value, "tensor_values", "the graph"), "tensor_values")
        self.ints = as_dict(field(value, "sym_int_values", "the graph"), "sym_int_values")
        self.bools = as_dict(field(value, "sym_bool_values", "the graph"), "sym_bool_values")
        self.floats = as_dict(value.get("sym_float_values", {}), "sym_float_values")
        self.taken = {*self.tensors, *self.ints, *self.bools, *self.floats}

    def read(self, names: list[str] | None) -> RawGraph:
        """Inputs, nodes, outputs."""
        inputs = as_list(field(self.value, "inputs", "the graph"), "inputs")
        if names is not None and len(names) != len(inputs):
            raise SchemaError(f"the graph has {len(inputs)} inputs, its signature {len(names)}")
        for index, item in enumerate(inputs):
            self._input(item, None if names is None else names[index], index)
        for index, item in enumerate(as_list(field(self.value, "nodes", "the graph"), "nodes")):
            try:
                self._node(as_dict(item, "a node"))
            except SchemaError as error:
                name = item.get("name") if type(item) is dict else None
                label = f" ({shown(name)[:60]})" if type(name) is str else ""
                raise SchemaError(f"node {index}{label}: {error}") from None
        self._outputs()
        return self.raw

    # -- values -------------------------------------------------------------------------------------------------

    def _resolve(self, name: str, what: str) -> Ref:
        if name not in self.raw.nodes:
            raise SchemaError(f"{what} refers to {short(name)}, which is not computed before it")
        return Ref(name)

    def _fresh(self, candidate: str) -> str:
        """A name for a node that has none, as fx would make it."""
        base = _ILLEGAL.sub("_", candidate) or "_unnamed"
        base = f"_{base}" if base[0].isdigit() else base
        name, count = base, 0
        while name in self.raw.nodes or name in self.taken:
            count += 1
            name = f"{base}_{count}"
        return name

    def _define(self, node: Node) -> None:
        if node.name in self.raw.nodes:
            raise SchemaError(f"the name {short(node.name)} is defined twice")
        self.raw.nodes[node.name] = node

    def _tensor(self, name: str) -> Meta:
        if name not in self.tensors:
            raise SchemaError(f"there is no meta for the tensor {short(name)}")
        value = self.tensors[name]
        meta = self.sizes.tensor(value, f"the tensor {short(name)}")
        if value["requires_grad"]:
            self.raw.requires_grad.add(name)
        return meta

    def _scalar(self, tag: str, name: str) -> Meta:
        """The meta of a symbolic number by the kind of its output."""
        what = f"the number {short(name)}"
        if tag == "as_sym_int" and name in self.ints:
            return self.sizes.scalar(self.ints[name], what)
        for wanted, values, plain in (
            ("as_sym_bool", self.bools, "as_bool"),
            ("as_sym_float", self.floats, "as_float"),
        ):
            if tag == wanted and name in values:
                self.sizes.check(values[name], plain, what)
                return ScalarMeta(None) if "as_expr" in values[name] else None
        raise SchemaError(f"there is no meta for {what}")

    def _input(self, value: Any, name: str | None, index: int) -> None:
        what = f"input {index}"
        tag, item = as_union(value, what)
        meta: Meta = None
        if tag in ("as_tensor", "as_custom_obj"):
            own = as_identifier(field(as_dict(item, what), "name", what), what)
            if tag == "as_tensor":
                meta = self._tensor(own)
                self.raw.input_metas.append((own, self.tensors[own]))
        elif tag == "as_sym_int":
            kind, own = as_union(item, what)
            if kind != "as_name":
                raise SchemaError(f"{what} is a symbolic integer without a name")
            own = as_identifier(own, what)
            meta = self._scalar(tag, own)
        elif tag in ("as_int", "as_float", "as_bool", "as_none", "as_string"):
            constant = read_argument(tag, item, self._resolve, what)
            own = name or self._fresh(f"arg{index}")
            meta = ScalarMeta(constant) if type(constant) is int else None
            name = own
        else:
            raise SchemaError(f"{what} has the unknown kind {short(tag)}")
        if name is not None and name != own:
            raise SchemaError(f"{what} is {short(own)} in the graph and {short(name)} in the signature")
        self._define(Node(own, NodeKind.INPUT, meta=meta, fqn=own))

    def _outputs(self) -> None:
        results: list[Arg] = []
        for index, item in enumerate(as_list(field(self.value, "outputs", "the graph"), "outputs")):
            tag, value = as_union(item, f"output {index}")
            if tag not in (*_VALUES, "as_int", "as_float", "as_bool", "as_none"):
                raise SchemaError(f"output {index} has the unknown kind {short(tag)}")
            results.append(read_argument(tag, value, self._resolve, f"output {index}"))
        self.raw.results = tuple(results)
        if as_bool(self.value.get("is_single_tensor_return", False), "is_single_tensor_return"):
            if len(results) != 1:
                raise SchemaError(f"the graph returns {len(results)} values, and claims to return one tensor")
            self.raw.results = results[0]

    # -- nodes --------------------------------------------------------------------------------------------------

    def _node(self, value: dict[str, Any]) -> None:
        target = as_text(field(value, "target", "it"), "the target", 256)
        metadata = as_dict(field(value, "metadata", "it"), "the metadata")
        node = Node("", NodeKind.OP)
        node.location, node.modules = self.reader.location(metadata), self.reader.modules(metadata)
        self._call(node, target, as_list(field(value, "inputs", "it"), "the inputs"))
        given = value.get("name")
        name = None if given is None or given == "" else as_identifier(given, "the name")
        outputs = [as_union(item, "an output") for item in as_list(field(value, "outputs", "it"), "the outputs")]
        single = len(outputs) == 1 and outputs[0][0] in _VALUES
        if single and node.op.startswith("hop.") and value.get("is_hop_single_tensor_return") is False:
            single = False  # a tuple of one value
        if single:
            tag, item = outputs[0]
            node.name = _value_name(tag, item)
            node.meta = self._meta(tag, node.name)
            self._define(node)
        elif not outputs or [tag for tag, _ in outputs] == ["as_none"]:
            function = target.removeprefix(_HOP).removeprefix(_OPS)  # its __name__ is without the namespace
            function = function.partition(".")[2] if target.startswith(_OPS) and "." in function else function
            unused = _CAMEL.sub(r"_\1", function).lower() + "_unused"
            node.name = self._fresh(unused if outputs else name or function)
            self._define(node)
        else:
            node.name = self._fresh(name or target.rpartition(".")[2])
            self._define(node)
            if len(outputs) == 1 and outputs[0][0] == "as_tensors":
                tensors = as_list(outputs[0][1], "the outputs")
                outputs = [("as_tensor", item) for item in tensors]
            node.meta = self._getitems(node, node, outputs)

    def _meta(self, tag: str, name: str) -> Meta:
        return self._tensor(name) if tag == "as_tensor" else self._scalar(tag, name)

    def _getitems(self, node: Node, source: Node, outputs: list[tuple[str, Any]]) -> Meta:
        """The values of a call that returns several, each by a ``getitem``."""
        metas: list[Meta] = []
        for index, (tag, item) in enumerate(outputs):
            part = Node("", NodeKind.OP, "getitem", {"0": Ref(source.name), "1": index})
            part.location, part.modules = node.location, node.modules
            if tag in _VALUES:
                part.name = _value_name(tag, item)
                part.meta = self._meta(tag, part.name)
                self._define(part)
            elif tag == "as_none":
                part.name = self._fresh("as_none")
                self._define(part)
            elif tag == "as_tensors":
                part.name = self._fresh("getitem")
                self._define(part)
                part.meta = self._getitems(node, part, [("as_tensor", one) for one in as_list(item, "an output")])
            else:
                raise SchemaError(f"an output has the unknown kind {short(tag)}")
            metas.append(part.meta)
        return tuple(metas)

    def _call(self, node: Node, target: str, inputs: list[Any]) -> None:
        """The op and its arguments."""
        if not _TARGET.fullmatch(target):
            raise SchemaError(f"the target {short(target)} is not the name of an op")
        given = [self._argument(item, node) for item in inputs]
        if target.startswith(_HOP) and target.removeprefix(_HOP).isidentifier():
            node.op = f"hop.{target.removeprefix(_HOP)}"
            node.args = _positional(given)
            return
        if match := _PYTHON.fullmatch(target):
            name = match[1] or match[2]
            node.op = _OPERATORS.get(name, f"sym.{name}")
            node.args = {str(index): arg for index, (_, _, arg, _) in enumerate(given)}
            return
        name = target.removeprefix(_OPS)
        parts = name.split(".")
        schema = self.reader.schema(name.removeprefix("aten.")) if target.startswith(f"{_OPS}aten.") else None
        if schema is not None:
            node.op = name
            node.args = _by_schema(name, schema, given)
            return
        known = target.startswith(_OPS) and len(parts) == 3 and parts[0] not in _RESERVED
        node.op = name if known else f"unknown.{target}"
        node.args = _positional([(name, tag, arg, not name) for name, tag, arg, _ in given])

    def _argument(self, value: Any, node: Node) -> tuple[str, str, Arg, bool]:
        """Name, kind, value, and whether it is given by position."""
        item = as_dict(value, "an argument")
        name = as_text(field(item, "name", "an argument"), "an argument's name", 256)
        what = f"argument {short(name)}" if name else "an argument"
        kind = item.get("kind")
        if kind not in (None, 1, 2) or isinstance(kind, bool):
            raise SchemaError(f"{what} is neither positional nor a keyword")
        tag, content = as_union(field(item, "arg", what), what)
        if tag == "as_graph":
            return name, tag, self._body(content, node, what), True
        return name, tag, read_argument(tag, content, self._resolve, what), kind == 1 or not name

    def _body(self, value: Any, node: Node, what: str) -> Ref:
        graph = as_dict(value, what)
        name = self._fresh(as_name(field(graph, "name", what), what))
        self.raw.bodies[name] = self.reader.graph(field(graph, "graph", what), depth=self.depth + 1)
        self._define(Node(name, NodeKind.OP, "get_attr", location=node.location, modules=node.modules))
        return Ref(name)


_VALUES = ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool")


def _value_name(tag: str, item: Any) -> str:
    """The name of an output that is one value."""
    if tag == "as_tensor":
        return as_identifier(field(as_dict(item, "an output"), "name", "an output"), "an output")
    kind, name = as_union(item, "an output")
    if kind != "as_name":
        raise SchemaError("a symbolic output without a name")
    return as_identifier(name, "an output")


def _positional(given: list[tuple[str, str, Arg, bool]]) -> dict[str, Arg]:
    """Arguments of a call without a schema: by their place, or by keyword."""
    args: dict[str, Arg] = {}
    for name, _, arg, positional in given:
        key = str(len(args)) if positional else name
        if key in args:
            raise SchemaError(f"argument {short(key)} is given twice")
        args[key] = arg
    return args


def _by_schema(op: str, schema: dict[str, Argument], given: list[tuple[str, str, Arg, bool]]) -> dict[str, Arg]:
    """Arguments of an aten op in the order of its schema, defaults included."""
    found: dict[str, Arg] = {}
    for name, tag, arg, _ in given:
        argument = schema.get(name)
        if argument is None or name in found:
            raise SchemaError(f"{op} has no argument {short(name)}, or it is given twice")
        if argument.written is not None and tag not in argument.written:
            raise SchemaError(f"argument {name!r} of {op} cannot be written {short(tag)}")
        found[name] = arg
    args: dict[str, Arg] = {}
    for name, argument in schema.items():
        if name in found:
            args[name] = found[name]
        elif argument.has_default:
            args[name] = argument.default
        else:
            raise SchemaError(f"{op} has no value for its argument {name!r}")
    return args
