"""Builds the record of an ExportedProgram's graph (or of the normalised copy of it)."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, GraphModule
from torch.fx import Node as FxNode

from buffer_lifting.dataflow import written_storage
from buffer_lifting.graph.bodies import attribute_of, body_nodes, flex_nodes, is_mod_index, mod_index_args
from buffer_lifting.graph.choices import resolve_choices
from buffer_lifting.graph.locations import innermost_location
from buffer_lifting.graph.record import (
    Arg,
    GraphRecord,
    Location,
    Meta,
    Node,
    NodeKind,
    Opaque,
    Ref,
    ScalarMeta,
    StateKind,
    TensorMeta,
)
from buffer_lifting.graph.sizes import Ranges, is_symbol
from buffer_lifting.tables import has_values
from buffer_lifting.torch_compat import (
    HigherOrderOperator,
    OpOverload,
    Symbolic,
    equal_sizes,
    schema_args,
    size_of,
    tree_flatten,
)

_STATE_KINDS = {
    InputKind.PARAMETER: StateKind.PARAMETER,
    InputKind.BUFFER: StateKind.BUFFER,
    InputKind.CONSTANT_TENSOR: StateKind.CONSTANT,
}
_PLAIN = frozenset([type(None), bool, int, float, str])
_OPERATORS = {"getitem": "getitem", "add": "sym.add", "sub": "sym.sub", "mul": "sym.mul"}


def build_record(
    program: ExportedProgram,
    graph: Graph | None = None,
    states: StateTable | None = None,
    recorded: Recorded | None = None,
) -> GraphRecord:
    """The record of ``graph`` (default: the program's own), with state and signature taken from the program.

    Linear in the number of nodes. Tensor data is read only to find buffers and constants of equal content, and
    only where two have the same shape and dtype; parameters are never read. Nodes of the graph that are ``recorded``
    and have not changed since are shared with that record.
    """
    graph = program.graph if graph is None else graph
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    states = StateTable(program) if states is None else states
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    locations: dict[str, Location | None] = {}
    modules: dict[tuple[Any, ...], tuple[tuple[str, str], ...]] = {}
    names = _user_names(program)
    ranges: dict[str, tuple[int, int | None]] = {}
    for name, bounds in program.range_constraints.items():
        upper = int(bounds.upper) if bounds.upper.is_Integer else None
        ranges[str(name)] = (int(bounds.lower) if bounds.lower.is_Integer else 0, upper)
    nodes: dict[str, Node] = {}
    known = recorded.unchanged(graph) if recorded is not None and recorded.ranges == ranges else {}
    for fx_node in graph.nodes:
        name = fx_node.name
        if name in known:
            nodes[name] = known[name]
            continue
        meta = fx_node.meta
        node = Node(name, NodeKind.OP, meta=_meta(meta.get("val"), ranges))
        nodes[name] = node
        if fx_node.op == "placeholder":
            spec = specs.get(fx_node.name)
            if spec is not None and spec.kind in _STATE_KINDS and spec.target is not None:
                states.fill(node, spec, mutated)
            else:
                node.kind = NodeKind.INPUT
                node.fqn = names.get(fx_node.name, fx_node.name)
        elif fx_node.op == "output":
            node.kind = NodeKind.OUTPUT
            node.args = {"results": _arg(fx_node.args[0])}
        else:
            node.op = _op_name(fx_node)
            given = schema_args(fx_node)
            node.args = {key: arg if type(arg) in _PLAIN else _arg(arg) for key, arg in given.items()}
            stack = meta.get("nn_module_stack") or {}
            entries = tuple(stack.values())
            if entries not in modules:
                modules[entries] = tuple([(entry[0], _class_name(entry[1])) for entry in entries])
            node.modules = modules[entries]
            trace = meta.get("stack_trace") or ""
            if trace not in locations:
                locations[trace] = innermost_location(trace)
            node.location = locations[trace]
    record = GraphRecord(nodes, ranges, _hints(program, nodes), _bodies(program, graph), shared=frozenset(known))
    resolve_choices(record)
    for name in written_storage(record):  # the training dialect writes in the graph, not by the signature
        if nodes[name].kind is NodeKind.STATE:
            nodes[name].mutated = True
    return record


class Recorded:
    """The calls of a graph whose record is known, with all that the record says of each: to tell which have changed.

    What was read is compared by identity and held here, so that no other object gets its address. None of it is changed
    in place but the bodies of higher-order ops, which a record has apart from its nodes.
    """

    def __init__(self, graph: Graph, record: GraphRecord) -> None:
        """Of a record that was built from ``graph``, or from one of the same nodes; neither was changed since.

        Raises:
            ValueError: the record was changed.
        """
        if record.renamed:
            raise ValueError("the record's sizes are no longer those of the graph")
        nodes = record.nodes
        self.ranges, self._equal = dict(record.ranges), equal_sizes(graph)
        self._calls: dict[FxNode, tuple[Any, ...]] = {}
        for node in graph.nodes:
            if node.op in ("call_function", "get_attr"):
                of = node.meta.get
                read = (node.args, node.kwargs, node.target, of("val"), of("nn_module_stack"), of("stack_trace"))
                self._calls[node] = (nodes[node.name], *read)

    def unchanged(self, graph: Graph) -> dict[str, Node]:
        """By name the recorded nodes of the calls of ``graph`` that are what they were.

        None if a name has changed, or what the shape environment knows of sizes.
        """
        found: dict[str, Node] = {}
        if any(environment.replacements != before for environment, before in self._equal):
            return found
        for node in graph.nodes:
            known = self._calls.get(node)
            if known is None:
                continue
            if known[0].name != node.name:
                return {}  # recorded operands are names
            kept, args, kwargs, target, value, stack, trace = known
            meta = node.meta
            if (
                args is node.args
                and value is meta.get("val")
                and kwargs is node.kwargs
                and target is node.target
                and stack is meta.get("nn_module_stack")
                and trace is meta.get("stack_trace")
            ):
                found[kept.name] = kept
        return found

    def __deepcopy__(self, memo: Any) -> Recorded:
        """Copies of a graph have nodes of their own: nothing is known of them."""
        copied = Recorded.__new__(Recorded)
        copied.ranges, copied._equal, copied._calls = dict(self.ranges), [], {}
        return copied


def _bodies(program: ExportedProgram, graph: Graph) -> dict[str, GraphRecord]:
    """The records of the bodies of ``flex_attention``, by the name of the node that names the body."""
    bodies = {}
    for fx_node in flex_nodes(graph):
        for node in body_nodes(fx_node).values():
            module = attribute_of(node, program.graph_module)
            if isinstance(module, GraphModule) and node.name not in bodies:
                bodies[node.name] = _body(module)
    return bodies


def _body(module: GraphModule) -> GraphRecord:
    nodes: dict[str, Node] = {}
    for fx_node in module.graph.nodes:
        node = Node(name=fx_node.name, kind=NodeKind.OP, meta=_meta(fx_node.meta.get("val"), {}))
        if fx_node.op == "placeholder":
            node.kind = NodeKind.INPUT
        elif fx_node.op == "output":
            node.kind, node.args = NodeKind.OUTPUT, {"results": _arg(fx_node.args[0])}
        elif is_mod_index(fx_node):
            node.op, node.args = "aten.index.Tensor", mod_index_args(fx_node)
        else:
            node.op = _op_name(fx_node)
            node.args = {key: _arg(value) for key, value in schema_args(fx_node).items()}
        node.location = innermost_location(fx_node.meta.get("stack_trace") or "")
        nodes[node.name] = node
    return GraphRecord(nodes)


def _hints(program: ExportedProgram, nodes: dict[str, Node]) -> dict[str, int]:
    """The size of each symbol in the example inputs."""
    if program.example_inputs is None:
        return {}
    hints: dict[str, int] = {}
    flat = tree_flatten(program.example_inputs)[0]
    for name, value in zip(program.graph_signature.user_inputs, flat, strict=False):
        meta = nodes[name].meta if isinstance(name, str) and name in nodes else None
        if isinstance(value, torch.Tensor) and isinstance(meta, TensorMeta):
            for size, actual in zip(meta.shape, value.shape, strict=True):
                if is_symbol(size):
                    hints.setdefault(str(size), int(actual))
    return hints


def _class_name(value: Any) -> str:
    return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


def _op_name(node: FxNode) -> str:
    return "get_attr" if node.op == "get_attr" else _name_of(node.target)


@functools.cache
def _name_of(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    name, module = getattr(target, "__name__", str(target)), getattr(target, "__module__", None) or ""
    if isinstance(target, HigherOrderOperator):
        return f"hop.{name}"
    if module.startswith("torch.") and not name.removeprefix("_").startswith("sym_"):
        return f"unknown.{module}.{name}"
    return _OPERATORS.get(name, f"sym.{name}")


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _user_names(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name -> the name a user calls the input by (they are the same for flat inputs)."""
    return {name: name for name in program.graph_signature.user_inputs if isinstance(name, str)}


def _arg(value: Any) -> Arg:
    if isinstance(value, FxNode):
        return Ref(value.name)
    if isinstance(value, tuple | list):
        return tuple(_arg(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return Opaque(str(value))


def _meta(value: Any, ranges: Ranges) -> Meta:
    if isinstance(value, torch.Tensor):
        shape = [size if type(size) is int else size_of(size, ranges) for size in value.shape]
        return TensorMeta(tuple(shape), _dtype_name(value.dtype))
    if isinstance(value, Symbolic):
        return ScalarMeta(size_of(value, ranges) if isinstance(value, torch.SymInt) else None)
    if isinstance(value, tuple | list):
        return tuple(_meta(item, ranges) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return ScalarMeta(value)
    return None


class StateTable:
    """Which states are the same storage, and which hold equal values."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.tensors: dict[str, Any] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind in _STATE_KINDS and spec.target is not None:
                store = program.state_dict if spec.target in program.state_dict else program.constants
                self.tensors[spec.target] = store.get(spec.target)
        self.aliases: dict[Any, list[str]] = defaultdict(list)
        for store in (program.state_dict, program.constants):
            for fqn, value in store.items():
                if isinstance(value, torch.Tensor):
                    self.aliases[_storage_key(value, fqn)].append(fqn)
        self.contents = self._contents()

    def _contents(self) -> dict[str, str]:
        parameters = set(self.program.graph_signature.inputs_to_parameters.values())
        groups: dict[Any, list[str]] = defaultdict(list)
        for fqn, value in self.tensors.items():
            if isinstance(value, torch.Tensor) and fqn not in parameters:
                groups[(value.dtype, tuple(value.shape))].append(fqn)
        contents = {}
        for fqns in groups.values():
            storages = {_storage_key(self.tensors[fqn], fqn) for fqn in fqns}
            for fqn in fqns:
                value = self.tensors[fqn]
                if len(storages) > 1 and _has_data(value):
                    contents[fqn] = _digest(value)
                else:
                    contents[fqn] = str(_storage_key(value, fqn))
        return contents

    def summary(self) -> dict[str, tuple[str, bool, tuple[str, ...]]]:
        """All that a record says of values: what each equals, whether all elements do, what shares its storage."""
        result = {}
        for fqn, value in self.tensors.items():
            tensor = isinstance(value, torch.Tensor)
            same = tuple(self.aliases[_storage_key(value, fqn)]) if tensor else ()
            result[fqn] = (self.contents.get(fqn, ""), tensor and fqn in self.contents and _is_uniform(value), same)
        return result

    def fill(self, node: Node, spec: InputSpec, mutated: set[str]) -> None:
        fqn = str(spec.target)
        value = self.tensors.get(fqn)
        node.kind = NodeKind.STATE
        node.fqn = fqn
        node.state_kind = _STATE_KINDS[spec.kind]
        node.persistent = bool(spec.persistent) if spec.kind is InputKind.BUFFER else True
        node.mutated = fqn in mutated
        node.content = self.contents.get(fqn, fqn)
        if isinstance(value, torch.Tensor):
            node.uniform = not (spec.kind is InputKind.BUFFER and node.persistent) and _is_uniform(value)
            group = self.aliases[_storage_key(value, fqn)]
            node.aliases = tuple(name for name in group if name != fqn)


def _has_data(value: torch.Tensor) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and value.device.type != "meta"


def _is_uniform(value: torch.Tensor) -> bool:
    if not _has_data(value) or value.is_floating_point() or value.is_complex() or not value.numel():
        return False
    return bool((value == value.flatten()[0]).all())


def _storage_key(value: torch.Tensor, fqn: str) -> Any:
    if not has_values(value):
        return ("object", id(value))  # tied, if it is one tensor under two names
    if not _has_data(value) or value.layout != torch.strided or not value.numel():
        return fqn
    return (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())


def _digest(value: torch.Tensor) -> str:
    data = value.detach().cpu().contiguous()
    raw = data.reshape(-1).view(torch.uint8) if data.numel() else data
    digest = hashlib.blake2b(raw.numpy().tobytes(), digest_size=16)
    return f"{digest.hexdigest()}:{value.dtype}:{tuple(value.shape)}"
