"""The graph of a stage as torch.export writes it to ``models/model.json``.

``torch.export.save`` does the same, but spends most of its time on copying the document to see whether it can be
sorted: of a program of 4,500 nodes, a tenth of the time that its export took. What is written here is the schema that
``graph/archive.py`` reads, for what a stage can have: aten ops, arithmetic of sizes, collectives; no higher-order ops.
"""

from __future__ import annotations

import inspect
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.archive import SCHEMA_VERSION
from buffer_lifting.graph.archive_schema import DTYPES, LAYOUTS, MEMORY_FORMATS
from buffer_lifting.stage_program import StageParts
from buffer_lifting.torch_compat import (
    TRAINING_DIALECT,
    max_operator_version,
    operator_name,
    raw_expression,
    schema_of,
    spec_text,
    symbolic_expression,
)

_DTYPE_NUMBERS = {f"torch.{name}": number for number, (name, _) in DTYPES.items()}
_LAYOUT_NUMBERS = {name: number for number, name in LAYOUTS.items()}
_FORMAT_NUMBERS = {name: number for number, name in MEMORY_FORMATS.items()}
_POSITIONAL, _KEYWORD = 1, 2
_SPECS = {
    InputKind.PARAMETER: ("parameter", "parameter_name"),
    InputKind.BUFFER: ("buffer", "buffer_name"),
    InputKind.CONSTANT_TENSOR: ("tensor_constant", "tensor_constant_name"),
}


def model_json(parts: StageParts) -> bytes:
    """The document of a stage's program.

    Raises:
        LiftingError: a node that has no form in it.
    """
    graph = _Graph(parts)
    call: dict[str, Any] = {
        "inputs": [],
        "outputs": [],
        "in_spec": spec_text(parts.in_spec),
        "out_spec": spec_text(parts.out_spec),
        "forward_arg_names": parts.arguments,
    }
    document = {
        "graph_module": {
            "graph": graph.document(),
            "signature": {"input_specs": graph.input_specs(), "output_specs": graph.output_specs()},
            "module_call_graph": [{"fqn": "", "signature": call}],
            "metadata": {},
            "treespec_namedtuple_fields": {},
        },
        "opset_version": {"aten": max_operator_version()},
        "range_constraints": {
            str(symbol): {"min_val": _bound(limits.lower), "max_val": _bound(limits.upper)}
            for symbol, limits in parts.ranges.items()
        },
        "schema_version": {"major": SCHEMA_VERSION[0], "minor": SCHEMA_VERSION[1]},
        "verifiers": [TRAINING_DIALECT],
        "torch_version": str(torch.__version__),
        "guards_code": parts.guards,
    }
    return json.dumps(document, allow_nan=False).encode()


def tensor_meta(tensor: torch.Tensor, device: torch.device | None = None) -> dict[str, Any]:
    """What the archive says about a tensor."""
    place = device or tensor.device
    return {
        "dtype": _DTYPE_NUMBERS[str(tensor.dtype)],
        "sizes": [_size(size) for size in tensor.shape],
        "requires_grad": tensor.requires_grad,
        "device": {"type": place.type, "index": place.index},
        "strides": [_size(stride) for stride in tensor.stride()],
        "storage_offset": _size(tensor.storage_offset()),
        "layout": _LAYOUT_NUMBERS[str(tensor.layout)],
    }


def _bound(value: Any) -> int | None:
    return int(value) if getattr(value, "is_Integer", isinstance(value, int)) else None  # infinite


def _size(value: Any) -> dict[str, Any]:
    return _symbolic(value, "as_int", int)


def _symbolic(value: Any, tag: str, plain: Callable[[Any], Any]) -> dict[str, Any]:
    found = symbolic_expression(value)
    if found is None:
        return {tag: plain(value)}
    text, hint = found
    return {"as_expr": {"expr_str": text, "hint": None if hint is None else {tag: hint}}}


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class _Graph:
    """Collects the nodes and values of a program's graph."""

    def __init__(self, parts: StageParts) -> None:
        self.parts = parts
        self.values: dict[str, dict[str, Any]] = {
            key: {} for key in ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values")
        }
        names = {item.fqn: item.name for item in parts.state}
        reads = [node for node in parts.graph.nodes if node.op == "get_attr"]
        #: What a node is called where that is not its own name: state, and an item of a result that is read twice.
        self.names = {node.name: names[str(node.target)] for node in reads if str(node.target) in names}
        self.metas: dict[Any, dict[str, Any]] = {}
        self.sizes: dict[Any, Any] = {}

    def document(self) -> dict[str, Any]:
        """The graph: inputs are the state and then what the stage is given."""
        inputs = [self._value(item.name, item.reader.meta["val"]) for item in self.parts.state if item.reader]
        inputs += [self._value(node.name, node.meta["val"]) for node in self.parts.inputs]
        nodes = []
        for node in self.parts.graph.nodes:
            if node.op == "call_function":
                if node.target is not operator.getitem:
                    nodes.append(self._call(node))
            elif node.op == "get_attr" and node.name not in self.names:
                raise LiftingError(
                    f"node {node.name!r} reads {node.target!r}, which is no tensor: a .pt2 cannot hold it"
                )
        return {
            "inputs": inputs,
            "outputs": [self._argument(result, result) for result in self.parts.results],
            "nodes": nodes,
            **self.values,
            "is_single_tensor_return": False,
            "custom_obj_values": {},
        }

    def input_specs(self) -> list[dict[str, Any]]:
        """What each input is."""
        specs: list[dict[str, Any]] = []
        for item in self.parts.state:
            kind, key = _SPECS[item.kind]
            entry: dict[str, Any] = {"arg": {"name": item.name}, key: item.fqn}
            if item.kind is InputKind.BUFFER:
                entry["persistent"] = item.in_state_dict
            specs.append({kind: entry})
        return specs + [{"user_input": {"arg": self._argument(node, node)}} for node in self.parts.inputs]

    def output_specs(self) -> list[dict[str, Any]]:
        """What each output is."""
        return [{"user_output": {"arg": self._argument(result, result)}} for result in self.parts.results]

    def _call(self, node: Node) -> dict[str, Any]:
        return {
            "target": operator_name(node.target),
            "inputs": self._inputs(node),
            "outputs": self._outputs(node),
            "metadata": self._metadata(node),
            "is_hop_single_tensor_return": None,
            "name": node.name,
        }

    def _inputs(self, node: Node) -> list[dict[str, Any]]:
        schema = schema_of(node.target)
        if schema is None:
            names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
            pairs = zip(names, node.args, strict=False)
            return [_named(name, self._argument(arg, node), _POSITIONAL) for name, arg in pairs]
        inputs = []
        for index, argument in enumerate(schema.arguments):
            if argument.name in node.kwargs:
                value = self._argument(node.kwargs[argument.name], node, argument)
                inputs.append(_named(argument.name, value, _KEYWORD))
            elif index < len(node.args) and not argument.kwarg_only:
                inputs.append(_named(argument.name, self._argument(node.args[index], node, argument), _POSITIONAL))
        return inputs

    def _outputs(self, node: Node) -> list[dict[str, Any]]:
        value, schema = node.meta.get("val"), schema_of(node.target)
        if schema is None or (len(schema.returns) == 1 and not isinstance(value, list | tuple)):
            return [self._value(node.name, value)]
        if not schema.returns:
            return []
        if not isinstance(value, list | tuple):
            raise LiftingError(f"node {node.name!r} ({node.target}) has no record of what it returns")
        names = self._item_names(node, len(value))
        items = [self._value(name, item) for name, item in zip(names, value, strict=True)]
        if len(schema.returns) > 1:
            return items
        return [{"as_tensors": [item["as_tensor"] for item in items]}]

    def _item_names(self, node: Node, count: int) -> list[str]:
        names: dict[int, str] = {}
        for user in node.users:
            if user.target is operator.getitem:
                first = names.setdefault(user.args[1], user.name)  # type: ignore[arg-type]
                if first != user.name:
                    self.names[user.name] = first
        return [names.get(index, f"{node.name}_unused_{index}") for index in range(count)]

    def _value(self, name: str, value: Any) -> dict[str, Any]:
        """Notes a value under its name; returns how it is referred to."""
        if value is None:
            return {"as_none": True}
        if isinstance(value, torch.Tensor):
            self.values["tensor_values"][name] = self._meta(value)
            return {"as_tensor": {"name": name}}
        for kind, types, plain in (
            ("bool", (bool, torch.SymBool), bool),
            ("int", (int, torch.SymInt), int),
            ("float", (float, torch.SymFloat), float),
        ):
            if isinstance(value, types):
                self.values[f"sym_{kind}_values"][name] = _symbolic(value, f"as_{kind}", plain)
                return {f"as_sym_{kind}": {"as_name": name}}
        raise LiftingError(f"{name!r} is a {type(value).__name__}, which a stage's program cannot hold")

    def _meta(self, tensor: torch.Tensor) -> dict[str, Any]:
        key = (
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.layout,
            tuple(self._key(size) for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset())),
        )
        if key not in self.metas:
            self.metas[key] = tensor_meta(tensor)
        return self.metas[key]

    def _key(self, size: Any) -> Any:
        """A size as something that can be looked up; what is symbolic is asked for its expression once."""
        if isinstance(size, int):
            return size
        raw = raw_expression(size)
        if raw not in self.sizes:
            self.sizes[raw] = symbolic_expression(size) or int(size)
        return self.sizes[raw]

    def _argument(self, value: Any, node: Node, schema: Any = None) -> dict[str, Any]:
        if isinstance(value, Node):
            name = self.names.get(value.name, value.name)
            for kind in ("int", "float", "bool"):
                if name in self.values[f"sym_{kind}_values"]:
                    return {f"as_sym_{kind}": {"as_name": name}}
            return {"as_tensor": {"name": name}}
        if value is None:
            return {"as_none": True}
        if isinstance(value, list | tuple):
            return self._list(list(value), node, schema)
        plain = _plain(value)
        if plain is None:
            raise LiftingError(
                f"node {node.name!r} has an argument of type {type(value).__name__}, which a .pt2 cannot hold"
            )
        return plain

    def _list(self, items: list[Any], node: Node, schema: Any) -> dict[str, Any]:
        if not items:
            text = str(schema.type) if schema is not None else "Tensor"
            return {next((tag for part, tag in _EMPTY if part in text), "as_ints"): []}
        arguments = [self._argument(item, node) for item in items]
        tags = {next(iter(argument)) for argument in arguments}
        found = [argument[tag] for argument in arguments for tag in argument]
        if len(tags) == 1 and (tag := tags.copy().pop()) in _LISTS:
            return {_LISTS[tag]: found}
        if tags == {"as_tensor", "as_none"}:
            return {"as_optional_tensors": arguments}
        for kind in ("int", "float", "bool"):
            if tags == {f"as_{kind}", f"as_sym_{kind}"}:
                return {
                    f"as_sym_{kind}s": [
                        argument if f"as_{kind}" in argument else argument[f"as_sym_{kind}"] for argument in arguments
                    ]
                }
        raise LiftingError(f"node {node.name!r} has a list of {sorted(tags)}, which a stage's program cannot hold")

    def _metadata(self, node: Node) -> dict[str, str]:
        metadata = {}
        if trace := node.meta.get("stack_trace"):
            metadata["stack_trace"] = trace
        if stack := node.meta.get("nn_module_stack"):
            metadata["nn_module_stack"] = ";".join(f"{key},{path},{kind}" for key, (path, kind) in stack.items())
        if function := node.meta.get("torch_fn"):
            metadata["torch_fn"] = ";".join(function)
        return metadata


_EMPTY = (("Tensor", "as_tensors"), ("bool", "as_bools"), ("float", "as_floats"), ("str", "as_strings"))
_LISTS = {
    **{f"as_{kind}": f"as_{kind}s" for kind in ("int", "float", "bool", "string", "tensor")},
    **{f"as_sym_{kind}": f"as_sym_{kind}s" for kind in ("int", "float", "bool")},
}


def _plain(value: Any) -> dict[str, Any] | None:
    """An argument that is no node and no list; ``None`` for what has no form."""
    match value:
        case bool():
            return {"as_bool": value}
        case int():
            return {"as_int": value}
        case float():
            return {"as_float": _float(value)}
        case str():
            return {"as_string": value}
        case complex():
            return {"as_complex": {"real": _float(value.real), "imag": _float(value.imag)}}
        case torch.dtype():
            return {"as_scalar_type": _DTYPE_NUMBERS[str(value)]}
        case torch.layout():
            return {"as_layout": _LAYOUT_NUMBERS[str(value)]}
        case torch.memory_format():
            return {"as_memory_format": _FORMAT_NUMBERS[str(value)]}
        case torch.device():
            return {"as_device": {"type": value.type, "index": value.index}}
    return None


def _named(name: str, value: dict[str, Any], kind: int) -> dict[str, Any]:
    return {"name": name, "arg": value, "kind": kind}
