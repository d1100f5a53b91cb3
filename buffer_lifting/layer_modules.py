"""Layers of a stage as modules with a forward of their own.

A stage is one flat graph; its submodules hold parameters and no code. What wraps modules (FSDP, activation
checkpointing, ``torch.compile`` of a layer) needs one module for each layer. :func:`split_layers` makes them, at the
FQNs that the layers had in the original model, so that names of parameters, and checkpoints, stay what they were.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from buffer_lifting.errors import PartitionError
from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.layer_graphs import LayerModule, plain_name
from buffer_lifting.layer_regions import Region, find_regions, parent_order
from buffer_lifting.torch_compat import generate_code, same_transient


def split_layers(module: Any, layers: Iterable[str] | None = None) -> dict[str, Module]:
    """Gives each layer of a stage a forward of its own, in place, for FSDP, activation checkpointing or compilation.

    The stage computes what it did, in the same ops; the module, its parameters and their FQNs stay. Layers get what
    they need from outside (activations, positional values, sizes) by position. A module that is split already is
    left as it is.

    Args:
        module: a stage's module: ``stage.module``, the ``submod`` of a ``PipelineStage``, or one of
            ``StepRunner.modules``. Split it before anything wraps it.
        layers: FQNs of the layers in the original model; ``*`` stands for one component (``"model.layers.*"``), and
            names that the stage has no part of do not matter. Default: the entries of the outermost module lists
            (``"layers.0"``), whatever is in them.

    Returns:
        FQN -> module of each layer that the stage has a part of, in the order of execution.

    Raises:
        PartitionError: layers inside one another; layers that need each other's values, share a parameter, or are
            called several times and not alike; a value that is written in place across the border of a layer.
        TypeError: ``module`` is no stage's module.
    """
    if not isinstance(module, GraphModule):
        raise TypeError(f"split_layers takes the module of a stage, not {type(module).__name__}")
    done = _split_before(module)
    if done:
        return done
    generate_code(module)
    chosen = None if layers is None else _matcher(layers)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    read = {str(node.target): attribute_of(node, module) for node in module.graph.nodes if node.op == "get_attr"}
    bodies = {target: value for target, value in read.items() if not isinstance(value, torch.Tensor)}
    if not any(node.meta.get("nn_module_stack") for node in module.graph.nodes):
        raise PartitionError(
            "the stage does not say which modules its ops were traced in: its package was saved by an earlier version "
            "(save it again), or the program was not made by torch.export"
        )
    regions = find_regions(module.graph, parameters, bodies, chosen)
    by_fqn: dict[str, list[Region]] = {}
    for region in regions:
        by_fqn.setdefault(region.fqn, []).append(region)
    _check_state(module.graph, parameters, by_fqn)
    graphs = {region: _layer_graph(region) for region in regions}
    for fqn, calls in by_fqn.items():
        if len({_form(graphs[call]) for call in calls}) > 1:
            raise PartitionError(
                f"the layer {fqn!r} is called {len(calls)} times, and not alike; name the modules that hold it in "
                "layers="
            )
    graph = _parent_graph(module.graph, regions)
    made: dict[str, Module] = {}
    for fqn, calls in by_fqn.items():
        needed = {str(node.target) for node in calls[0].state}
        own = {target: body for target, body in bodies.items() if target in needed}
        made[fqn] = _put_layer(module, fqn, graphs[calls[0]], own)
    module.graph = graph
    generate_code(module)
    return made


def _split_before(module: GraphModule) -> dict[str, Module]:
    wrapped = {plain_name(name): part for name, part in module.named_modules() if isinstance(part, LayerModule)}
    order = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return {name: wrapped[name] for name in dict.fromkeys(order) if name in wrapped}


def _matcher(layers: Iterable[str]) -> Any:
    """Whether an FQN is one of the patterns; ``*`` stands for one component."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    split = [pattern.split(".") for pattern in patterns]

    def matches(fqn: str) -> bool:
        parts = fqn.split(".")
        return any(len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern)) for pattern in split)

    return matches


def _check_state(graph: Graph, parameters: set[str], by_fqn: dict[str, list[Region]]) -> None:
    """A parameter below a layer is read by that layer alone: what wraps the layer owns it."""
    layer_of = {node: fqn for fqn, calls in by_fqn.items() for call in calls for node in call.nodes}
    for node in graph.nodes:
        if node.op != "get_attr" or node.target not in parameters:
            continue
        home = next((fqn for fqn in _prefixes(str(node.target)) if fqn in by_fqn), None)
        other = next((user for user in node.users if layer_of.get(user) != home), None)
        if home is not None and other is not None:
            where = f"the layer {layer_of[other]!r}" if other in layer_of else "no layer"
            raise PartitionError(
                f"the parameter {str(node.target)!r} of the layer {home!r} is read outside of it as well, at "
                f"{other.name!r} in {where}: the layer cannot be wrapped alone; give layers= without it"
            )


def _prefixes(fqn: str) -> Iterator[str]:
    while fqn:
        fqn = fqn.rpartition(".")[0]
        yield fqn


def _layer_graph(region: Region) -> Graph:
    """The layer's own graph: what it takes from outside as placeholders, its state below its FQN."""
    graph, env = Graph(), dict[Node, Node]()
    for source in region.inputs:
        env[source] = graph.placeholder(source.name)
        env[source].meta = dict(source.meta)
    for source in region.state:
        env[source] = graph.get_attr(str(source.target).removeprefix(f"{region.fqn}."))
        env[source].meta = dict(source.meta)
    for node in region.nodes:
        env[node] = copy_node(graph, node, env.__getitem__)
    results = tuple(env[node] for node in region.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph


def _form(graph: Graph) -> str:
    """The same for graphs that compute the same."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def name(value: Any) -> Any:
        return f"%{numbers[value]}" if isinstance(value, Node) else value

    lines = []
    for node in graph.nodes:
        target = "" if node.op == "placeholder" else str(node.target)
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), name)
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


def _parent_graph(old: Graph, regions: list[Region]) -> Graph:
    """The stage's graph with a call in place of each region."""
    graph, env = Graph(), dict[Node, Node]()
    for item in parent_order(old, regions):
        if isinstance(item, Node):
            env[item] = copy_node(graph, item, env.__getitem__)
            continue
        call = graph.create_node("call_module", item.fqn, tuple(env[source] for source in item.inputs))
        if len(item.outputs) == 1:
            env[item.outputs[0]] = call
            call.meta["val"] = item.outputs[0].meta.get("val")
            continue
        call.meta["val"] = tuple(output.meta.get("val") for output in item.outputs)
        for place, output in enumerate(item.outputs):
            env[output] = graph.call_function(operator.getitem, (call, place))
            env[output].meta = dict(output.meta)
    return graph


def _put_layer(module: GraphModule, fqn: str, graph: Graph, bodies: dict[str, Any]) -> Module:
    """Puts a layer in the place of the module that holds its state."""
    path, _, leaf = fqn.rpartition(".")
    holder: Module = module
    for part in path.split(".") if path else ():
        if part not in holder._modules:
            holder.add_module(part, Module())
        holder = holder.get_submodule(part)
    state = holder._modules.get(leaf) or Module()
    for target, body in bodies.items():
        setattr(state, target, body)
    layer = LayerModule(state, graph)
    # all of the state, in its order: what the layer does not read itself is read by others
    for name in ("_modules", "_parameters", "_buffers"):
        getattr(layer, name).clear()
        getattr(layer, name).update(getattr(state, name))
    same_transient(state, layer)
    layer.train(module.training)
    holder.add_module(leaf, layer)
    generate_code(layer)
    return layer
