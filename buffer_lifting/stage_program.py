"""A stage as a torch.export program: its state becomes inputs of the graph, as torch.export has it."""

from __future__ import annotations

from dataclasses import dataclass
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
from buffer_lifting.layer_graphs import require_whole
from buffer_lifting.stages import Stage
from buffer_lifting.torch_compat import (
    Symbolic,
    TreeSpec,
    guards_on,
    input_spec,
    program_from_graph_module,
    ranges_of,
    tree_flatten,
)

_PREFIX = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}


@dataclass(frozen=True)
class StageState:
    """A tensor of a stage.

    Attributes:
        fqn: as in the original model.
        kind: parameter, buffer or constant.
        in_state_dict: whether it is one that a checkpoint of the model has.
        value: the tensor.
        name: of the graph input that it is in a program.
        reader: the node that reads it in the stage's module; ``None`` if nothing does.
    """

    fqn: str
    kind: InputKind
    in_state_dict: bool
    value: torch.Tensor
    name: str = ""
    reader: Node | None = None


@dataclass(frozen=True)
class StageParts:
    """What the program of a stage is made of; the nodes are those of the stage's module.

    Attributes:
        graph: the module's graph, in which the state is read by ``get_attr``.
        state: parameters, then buffers, then constants, in the order of the program's inputs.
        inputs: activations, then keywords.
        results: what the stage returns.
        arguments: the names of the inputs, in order.
        ranges, guards: of the whole program, as far as they are about this stage.
    """

    graph: Graph
    state: tuple[StageState, ...]
    inputs: tuple[Node, ...]
    results: tuple[Node, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    arguments: list[str]
    ranges: dict[Any, Any]
    guards: list[str]


def stage_parts(stage: Stage, whole: ExportedProgram) -> StageParts:
    """The parts of the program of one stage of ``whole``."""
    require_whole(stage.module, stage.index)
    graph = stage.module.graph
    taken = {node.name for node in graph.nodes}
    readers = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    state = []
    for item in stage_state(stage.module):
        name = f"{_PREFIX[item.kind]}_{item.fqn.replace('.', '_')}"
        while name in taken:
            name += "_"
        taken.add(name)
        state.append(StageState(item.fqn, item.kind, item.in_state_dict, item.value, name, readers[item.fqn]))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = tuple(node for node in placeholders if not str(node.target).startswith("*"))  # what it ignores is none
    (output,) = (node for node in graph.nodes if node.op == "output")
    single = not isinstance(output.args[0], tuple)
    results: Any = (output.args[0],) if single else output.args[0]
    return StageParts(
        graph,
        tuple(state),
        inputs,
        results,
        input_spec(tuple(stage.activations), dict.fromkeys(stage.kwargs, 0)),
        tree_flatten(0 if single else (0,) * len(results))[1],
        [*stage.activations, *stage.kwargs],
        ranges_of(whole, graph),
        guards_on(whole, {node.name for node in inputs}),
    )


def exported_stage(stage: Stage, whole: ExportedProgram) -> ExportedProgram:
    """The program of one stage of ``whole``: see :meth:`StagedProgram.exported`."""
    parts = stage_parts(stage, whole)
    graph, env = Graph(), dict[Node, Node]()
    specs: list[InputSpec] = []
    for item in parts.state:
        node = _placeholder(graph, item.name, item.reader)
        if item.reader is not None:
            env[item.reader] = node
        persistent = item.in_state_dict if item.kind is InputKind.BUFFER else None
        specs.append(InputSpec(item.kind, TensorArgument(name=node.name), item.fqn, persistent))
    for given in parts.inputs:
        env[given] = _placeholder(graph, given.name, given)
        specs.append(InputSpec(InputKind.USER_INPUT, _argument(env[given]), None))
    submodules: dict[str, Any] = {}
    by_target = {item.fqn: env[item.reader] for item in parts.state if item.reader is not None}
    for node in parts.graph.nodes:
        if node in env or node.op == "placeholder":
            continue
        if node.op == "output":
            graph.output(tuple(env[result] for result in parts.results)).meta = dict(node.meta)
        elif node.op == "get_attr" and str(node.target) in by_target:
            env[node] = by_target[str(node.target)]
        else:
            env[node] = graph.node_copy(node, lambda operand: env[operand])
            if node.op == "get_attr":
                submodules[str(node.target)] = attribute_of(node)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(env[result]), None) for result in parts.results]
    return program_from_graph_module(
        submodules,
        graph,
        ExportGraphSignature(specs, outputs),
        {item.fqn: item.value for item in parts.state if item.in_state_dict},
        {item.fqn: item.value for item in parts.state if not item.in_state_dict},
        parts.in_spec,
        parts.out_spec,
        parts.arguments,
        range_constraints=parts.ranges,
        guards=parts.guards,
    )


def stage_state(module: GraphModule) -> list[StageState]:
    """The tensors of a stage: parameters, then buffers, then constants."""
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
    return [
        *(StageState(fqn, InputKind.PARAMETER, True, value) for fqn, value in parameters.items()),
        *(StageState(fqn, InputKind.BUFFER, fqn in persistent, value) for fqn, value in buffers.items()),
        *(StageState(fqn, InputKind.CONSTANT_TENSOR, False, value) for fqn, value in constants.items()),
    ]


def _placeholder(graph: Graph, name: str, source: Node | None) -> Node:
    node = graph.placeholder(name)
    node.meta = dict(source.meta) if source is not None else {}
    return node


def _argument(node: Node) -> ArgumentSpec:
    value = node.meta["val"]
    return SymIntArgument(name=node.name) if isinstance(value, (int, *Symbolic)) else TensorArgument(name=node.name)
