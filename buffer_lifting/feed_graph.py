"""The part of the original graph that lies above the cuts: what the feed evaluates outside the lifted program."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.tables import use_device


@dataclass
class FeedGraph:
    """A part of the original graph: the nodes above the cuts."""

    module: GraphModule
    states: dict[str, str]  # placeholder -> FQN
    carriers: tuple[str, ...]  # user inputs that it reads (the contents too, in the hoisted graph)
    targets: tuple[str, ...]
    iotas: Mapping[str, str] = field(default_factory=dict)  # placeholders for an arange of position ids, and its axis

    def run(self, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The targets' values, by node name, without gradients or autocast."""
        first = next((v for v in values.values() if isinstance(v, torch.Tensor)), None)
        kind = first.device.type if first is not None else "cpu"
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            results = self.module(**values)
        return dict(zip(self.targets, results, strict=True))


def above(
    nodes: Mapping[str, Node],
    targets: Iterable[str],
    known: Container[str],
    operands: Callable[[Node], Iterable[Node]] = lambda node: node.all_input_nodes,
) -> set[Node]:
    """The nodes that ``targets`` are computed from, themselves included; it stops at ``known`` nodes."""
    found: set[Node] = set()
    stack = [nodes[name] for name in targets]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node.name not in known:
                stack.extend(operands(node))
    return found


def extract(
    graph: Graph,
    targets: list[str],
    states: Mapping[str, str],
    iotas: Mapping[str, str],
    device: torch.device | None = None,
) -> FeedGraph | None:
    """The part of ``graph`` above ``targets``. ``iotas`` (by name, with their axis) become placeholders.

    ``device``: where it runs; default: where the program was exported.
    """
    if not targets:
        return None
    nodes = {node.name: node for node in graph.nodes}
    needed = above(nodes, targets, iotas)
    new = Graph()
    env: dict[Node, Node] = {}
    found_states, carriers, found_iotas, contents = {}, [], {}, set()
    for node in graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder" or node.name in iotas:
            env[node] = new.placeholder(node.name)
            if node.name in iotas:
                found_iotas[node.name] = iotas[node.name]
            elif node.name in states:
                found_states[node.name] = states[node.name]
            else:
                carriers.append(node.name)
                if any(user in needed and "sym_size" not in str(user.target) for user in node.users):
                    contents.add(node.name)
                if node.name in targets:
                    contents.add(node.name)
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    # placeholders first, as fx's code generation wants them
    first = next((n for n in new.nodes if n.op != "placeholder"), None)
    for node in list(new.nodes):
        if node.op == "placeholder" and first is not None and node > first:
            first.prepend(node)
    new.output(tuple(env[nodes[name]] for name in targets))
    if device is not None:
        use_device(new, device)
    module = GraphModule(torch.nn.Module(), new)
    module.meta["contents"] = contents
    return FeedGraph(module, found_states, tuple(carriers), tuple(targets), found_iotas)
