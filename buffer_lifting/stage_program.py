"""A stage as a torch.export program: its state becomes inputs of the graph, as torch.export has it."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ArgumentSpec,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.stages import Stage
from buffer_lifting.torch_compat import (
    Symbolic,
    guards_on,
    input_spec,
    program_from_graph_module,
    ranges_of,
    tree_flatten,
)

_PREFIX = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}


def exported_stage(stage: Stage, whole: ExportedProgram) -> ExportedProgram:
    """The program of one stage of ``whole``; it shares the stage's parameters. See :meth:`StagedProgram.exported`."""
    module = stage.module
    state = stage_state(module)
    graph, env = Graph(), dict[Node, Node]()
    inputs: list[InputSpec] = []
    readers = {str(node.target): node for node in module.graph.nodes if node.op == "get_attr"}
    held: dict[str, Node] = {}
    for fqn, (kind, persistent, _) in state.items():
        held[fqn] = _placeholder(graph, f"{_PREFIX[kind]}_{fqn.replace('.', '_')}", readers[fqn])
        inputs.append(InputSpec(kind, TensorArgument(name=held[fqn].name), fqn, persistent))
    submodules: dict[str, Any] = {}
    results: tuple[Any, ...] = ()
    single = False
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if not str(node.target).startswith("*"):  # what it ignores is no input
                env[node] = _placeholder(graph, node.name, node)
                inputs.append(InputSpec(InputKind.USER_INPUT, _argument(env[node]), None))
        elif node.op == "get_attr" and str(node.target) in held:
            env[node] = held[str(node.target)]
        elif node.op == "output":
            single = not isinstance(node.args[0], tuple)
            results = (node.args[0],) if single else node.args[0]
            graph.output(tuple(env[result] for result in results)).meta = dict(node.meta)
        else:
            env[node] = graph.node_copy(node, lambda operand: env[operand])
            if node.op == "get_attr":
                submodules[str(node.target)] = attribute_of(node)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(env[result]), None) for result in results]
    kept = {fqn: value for fqn, (kind, persistent, value) in state.items() if in_state_dict(kind, persistent)}
    names = {env[node].name for node in env if node.op == "placeholder"}
    return program_from_graph_module(
        submodules,
        graph,
        ExportGraphSignature(inputs, outputs),
        kept,
        {fqn: value for fqn, (_, _, value) in state.items() if fqn not in kept},
        input_spec(tuple(stage.activations), dict.fromkeys(stage.kwargs, 0)),
        tree_flatten(0 if single else (0,) * len(results))[1],
        [*stage.activations, *stage.kwargs],
        range_constraints=ranges_of(whole, graph),
        guards=guards_on(whole, names),
    )


def stage_state(module: GraphModule) -> dict[str, tuple[InputKind, bool | None, torch.Tensor]]:
    """FQN -> kind, whether it is in the state dict (of buffers), value: parameters, then buffers, then constants."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    persistent = module.state_dict().keys()
    constants = {
        str(node.target): value
        for node in module.graph.nodes
        if node.op == "get_attr"
        and str(node.target) not in parameters
        and str(node.target) not in buffers
        and isinstance(value := attribute_of(node), torch.Tensor)
    }
    return {
        **{fqn: (InputKind.PARAMETER, None, value) for fqn, value in parameters.items()},
        **{fqn: (InputKind.BUFFER, fqn in persistent, value) for fqn, value in buffers.items()},
        **{fqn: (InputKind.CONSTANT_TENSOR, None, value) for fqn, value in constants.items()},
    }


def in_state_dict(kind: InputKind, persistent: bool | None) -> bool:
    """Whether a tensor of a stage is one that a checkpoint of the model has."""
    return kind is InputKind.PARAMETER or bool(persistent)


def _placeholder(graph: Graph, name: str, source: Node) -> Node:
    node = graph.placeholder(name)
    node.meta = dict(source.meta)
    return node


def _argument(node: Node) -> ArgumentSpec:
    value = node.meta["val"]
    return SymIntArgument(name=node.name) if isinstance(value, (int, *Symbolic)) else TensorArgument(name=node.name)
