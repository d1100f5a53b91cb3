"""Graphs and records as plain JSON: what is read back can only be aten calls, size arithmetic and data.

A node is ``{"name", "op", "target", "args", "kwargs"}``. Numbers, strings, booleans, ``None`` and lists stand
for themselves; everything else is an object with one key that says what it is: ``{"node": "add_1"}``,
``{"dtype": "float32"}``, ``{"tuple": [...]}``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.errors import LiftingError
from buffer_lifting.ring import RING
from buffer_lifting.tables import keep_transient
from buffer_lifting.torch_compat import ALL_GATHER, ALL_TO_ALL, WAIT, OpOverload, call_operator, registered_operator

_PYTHON = "add sub mul truediv floordiv mod pow neg pos eq ne lt le gt ge and_ or_ not_ getitem"
_TORCH = "sym_float sym_int sym_max sym_min sym_not sym_ite"
#: What a graph calls besides aten ops: arithmetic of sizes, ``getitem``, and the collectives of context parallelism.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _PYTHON.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    "collective.all_gather": ALL_GATHER,
    "collective.all_to_all": ALL_TO_ALL,
    "collective.wait": WAIT,
    "collective.ring_attention": RING,
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
_REFUSED = frozenset({"aten.from_file"})  # reaches outside the graph
#: Ops of libraries that a package may call, and the module that registers each.
LIBRARY_OPS = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLACEHOLDER = re.compile(r"\*{0,2}[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of a name.

    Raises:
        LiftingError: no dtype has it.
    """
    return typing.cast(torch.dtype, _constant("dtype", name))


def _constant(kind: str, name: Any) -> Any:
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, _CONSTANTS[kind]):
        raise LiftingError(f"{name!r} is no {kind} of this torch ({torch.__version__})")
    return value


def encode_graph(graph: Graph) -> list[dict[str, Any]]:
    """The nodes of a graph.

    Raises:
        LiftingError: a call of something other than an aten op or size arithmetic, or an argument that has no
            form here.
    """
    return [_encode_node(node) for node in graph.nodes]


def _encode_node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_name(node),
        "args": [_encode(arg, node) for arg in node.args],
        "kwargs": {key: _encode(arg, node) for key, arg in node.kwargs.items()},
    }


def _target_name(node: Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    if node.op == "call_function":
        if node.target in _FUNCTION_NAMES:
            return _FUNCTION_NAMES[node.target]
        if isinstance(node.target, OpOverload):
            name = str(node.target)
            if name in LIBRARY_OPS or (name.startswith("aten.") and name.rpartition(".")[0] not in _REFUSED):
                return name
    raise LiftingError(f"node {node.name!r} calls {node.target}, which a package cannot hold (aten ops only)")


def _encode(value: Any, node: Node) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_encode(item, node) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, node) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, node) for key, item in value.items()}}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [_encode(item, node) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real, node), _encode(value.imag, node)]}
    for kind, type_ in _CONSTANTS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise LiftingError(
        f"node {node.name!r} has an argument of type {type(value).__name__}, which a package cannot hold"
    )


def decode_graph(nodes: Any, root: torch.nn.Module, kind: type[GraphModule] = GraphModule) -> GraphModule:
    """The module of :func:`encode_graph`, of class ``kind``; ``root`` holds its state.

    Raises:
        LiftingError: no such document, a call of something that is neither an aten op nor size arithmetic.
    """
    graph = Graph()
    env: dict[str, Node] = {}
    try:
        for entry in nodes:
            name, op, target = _match(_NAME, entry["name"]), entry["op"], entry["target"]
            args = tuple(_decode(arg, env) for arg in entry["args"])
            kwargs = {_match(_NAME, key): _decode(arg, env) for key, arg in entry["kwargs"].items()}
            if op == "output":
                graph.output(*args)
                continue
            resolved: Any
            if op == "placeholder":
                resolved = _match(_PLACEHOLDER, target)
            elif op == "get_attr":
                resolved = _match(_PATH, target)
            elif op == "call_function":
                resolved = _function(target)
            else:
                raise LiftingError(f"node {name!r} has the op {op!r}")
            env[name] = graph.create_node(op, resolved, args, kwargs, name=name)
        graph.lint()
        module = kind(root, graph)
        keep_transient(root, module)
        return module
    except LiftingError:
        raise
    except Exception as error:
        raise LiftingError(f"a graph in the package is damaged: {type(error).__name__}: {error}") from error


def _match(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise LiftingError(f"a graph in the package has the name {text!r}")
    return text


def _function(name: Any) -> Callable[..., Any]:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if isinstance(name, str) and name in LIBRARY_OPS:
        custom = registered_operator(name)
        if custom is None:
            raise LiftingError(f"a graph in the package calls {name!r}: first import {LIBRARY_OPS[name]}, which has it")
        return custom
    aten = isinstance(name, str) and name.startswith("aten.") and name.count(".") == 2
    if aten and name.rpartition(".")[0] not in _REFUSED:
        function = call_operator(name)
        if isinstance(function, OpOverload):
            return function
    raise LiftingError(f"a graph in the package calls {name!r}; only aten ops and size arithmetic are allowed")


def _decode(value: Any, env: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, env) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return env[content]
    if kind in _CONSTANTS:
        return _constant(kind, content)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind == "dict":
        return {key: _decode(item, env) for key, item in content.items()}
    items = [_decode(item, env) for item in content]
    if kind == "tuple":
        return tuple(items)
    if kind == "slice":
        return slice(*items)
    if kind == "complex":
        return complex(*items)
    raise LiftingError(f"a graph in the package has an argument of kind {kind!r}")


def encode_record(value: Any) -> Any:
    """A record (a dataclass of records, tuples, mappings and plain values) as JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode_record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode_record(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode_record(item) for key, item in value.items()}
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def decode_record(kind: Any, value: Any) -> Any:
    """The record of type ``kind`` that :func:`encode_record` wrote.

    Raises:
        LiftingError: the document does not have that type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(typing.cast(type, kind))
        if not set(value) - set(hints):
            fields = {name: decode_record(hints[name], item) for name, item in value.items()}
            try:
                return typing.cast(Any, kind)(**fields)
            except TypeError as error:
                raise LiftingError(f"the package's manifest: {error}") from error
    elif origin is tuple and isinstance(value, list):
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(decode_record(parts[0], item) for item in value)
        if len(parts) == len(value):
            return tuple(decode_record(part, item) for part, item in zip(parts, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: decode_record(parts[1], item) for key, item in value.items()}
    elif origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        (rest,) = [part for part in parts if part is not types.NoneType]
        return decode_record(rest, value)
    elif value in parts if origin is typing.Literal else type(value) is kind:
        return value
    raise LiftingError(f"the package's manifest has {value!r:.80} where {kind} is wanted")
