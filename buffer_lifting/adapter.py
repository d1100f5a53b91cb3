"""Accepts what users have: an ExportedProgram, or an ``fx.GraphModule`` with ``get_attr`` state."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.torch_compat import fake_mode_of, input_spec, is_fake, program_from_graph_module, tree_flatten


def as_program(program: Any) -> ExportedProgram:
    """``program`` itself, or the ExportedProgram of a GraphModule (whose state becomes placeholders).

    Raises:
        TypeError: neither of the two, or a GraphModule whose nodes have no ``meta["val"]``.
    """
    if isinstance(program, ExportedProgram):
        return program
    if isinstance(program, GraphModule):
        return _from_graph_module(program)
    raise TypeError(
        f"expected a torch.export.ExportedProgram or an fx.GraphModule, got {type(program).__name__}; "
        "make one with torch.export.export(model, args, kwargs)"
    )


def _from_graph_module(module: GraphModule) -> ExportedProgram:
    parameters, buffers = (
        dict(module.named_parameters(remove_duplicate=False)),
        dict(module.named_buffers(remove_duplicate=False)),
    )
    persistent = set(module.state_dict())
    new = Graph()
    env: dict[Node, Any] = {}
    specs: list[InputSpec] = []
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    states: dict[str, Node] = {}
    bodies: set[str] = set()
    old_placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not fakes:
        raise TypeError(
            "the GraphModule's nodes have no meta['val']; trace it with fake tensors (torch.export, make_fx)"
        )
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        value = _attribute(module, target)
        if not isinstance(value, torch.Tensor):  # the body of a higher-order op, or a spec that one takes
            bodies.add(target)
            continue
        if target not in states:
            kind, prefix = InputKind.CONSTANT_TENSOR, "c"
            if target in parameters:
                kind, prefix = InputKind.PARAMETER, "p"
            elif target in buffers:
                kind, prefix = InputKind.BUFFER, "b"
            placeholder = new.placeholder(f"{prefix}_{target.replace('.', '_')}")
            fake = node.meta.get("val")
            if not isinstance(fake, torch.Tensor):
                fake = fake_mode_of(fakes[0]).from_tensor(value) if is_fake(fakes[0]) else value
            placeholder.meta = {"val": fake}
            keep = target in persistent if kind is InputKind.BUFFER else None
            specs.append(InputSpec(kind, TensorArgument(name=placeholder.name), target, persistent=keep))
            store = state if target in persistent else constants
            store[target] = value
            states[target] = placeholder
        env[node] = states[target]
    for node in module.graph.nodes:
        if node in env or (node.op == "call_module" and node.target == "_guards_fn"):
            continue  # ``ExportedProgram.module()`` calls its guards, which return nothing
        env[node] = new.node_copy(node, lambda n: env[n])
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=env[node].name), None))
    results = tree_flatten(module.graph.output_node().args[0])[0]
    out_spec = tree_flatten(module.graph.output_node().args[0])[1]
    output = new.output_node()
    output.args = (tuple(env[node] for node in results),)
    names = [env[node].name for node in old_placeholders]
    signature = ExportGraphSignature(
        specs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=env[n].name), None) for n in results]
    )
    root = {name: _attribute(module, name) for name in bodies}
    return program_from_graph_module(
        root, new, signature, state, constants, input_spec(tuple(0 for _ in names), {}), out_spec, names
    )


def _attribute(module: GraphModule, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
