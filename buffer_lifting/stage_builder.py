"""Builds the module of one stage: its part of the graph, with positional values recomputed from its own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.graph.record import GraphRecord, NodeKind, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.graph.sizes import product
from buffer_lifting.shared_nodes import SharedNodes
from buffer_lifting.tables import keep_transient
from buffer_lifting.torch_compat import StageModule, returns_alias, size_of


@dataclass
class StageGraph:
    """The graph of one stage while it is built."""

    module: GraphModule
    activations: tuple[str, ...]
    kwargs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[str, ...]


class StageBuilder:
    """Copies what a stage needs from the whole graph.

    ``owned`` nodes are computed here; ``received`` come from the previous stage; everything else that they need is
    state, an input, or position arithmetic, which is recomputed. A size is read off any value at hand that has it.
    """

    def __init__(
        self,
        record: GraphRecord,
        nodes: dict[str, Node],
        stage_of: dict[str, int],
        index: int,
        owned: list[str],
        carried: list[str],
        sent: list[str],
        positional: tuple[str, ...],
        state: dict[str, Any],
        order: dict[str, int],
    ) -> None:
        """``carried`` are values of earlier stages that must pass through; ``sent`` is what this stage hands on."""
        self.record, self.nodes, self.stage_of, self.index, self.state = record, nodes, stage_of, index, state
        self.sent, self.positional = sent, positional
        self.order = order
        self.needed: set[str] = set()
        self.carriers: dict[str, tuple[str, int]] = {}
        self._sizes: list[str] = []
        received = set(carried)
        for name in [*owned, *sent]:
            self._need(name, received)
        for name in sorted(received, key=self.order.__getitem__):
            self._offer(name)
        while self._sizes:
            self._need_size(self._sizes.pop(), received)
        self.received = sorted(received, key=self.order.__getitem__)

    def _offer(self, name: str) -> None:
        """Notes the sizes that a received value carries, so that they need not be read off another input."""
        meta = self.record.nodes[name].tensor
        for dim, size in enumerate(meta.shape if meta else ()):
            if not isinstance(size, int):
                self.carriers.setdefault(str(size), (name, dim))

    def carried(self, name: str) -> tuple[str, int] | None:
        """Where a size node's value can be read off instead, if anywhere."""
        node = self.record.nodes[name]
        if not isinstance(node.meta, ScalarMeta) or node.meta.size is None or isinstance(node.meta.size, int):
            return None
        return self.carriers.get(str(node.meta.size))

    def _need(self, name: str, received: set[str]) -> None:
        """Marks a node and what it is computed from; stops at earlier stages' activations and at sizes."""
        stack = [name]
        while stack:
            current = stack.pop()
            if current in self.needed:
                continue
            self.needed.add(current)
            if self.stage_of.get(current, self.index) < self.index:
                received.add(current)
                self._offer(current)
            elif isinstance(self.record.nodes[current].meta, ScalarMeta):
                self._sizes.append(current)
            else:
                stack.extend(self.record.nodes[current].refs())

    def _need_size(self, name: str, received: set[str]) -> None:
        place = self.carried(name)
        if place is not None:
            self.needed.add(place[0])
            return
        for operand in self.record.nodes[name].refs():
            self._need(operand, received)

    def build(self, first: bool, last: bool) -> StageGraph:
        """The stage's module; ``last`` returns the program's outputs as they are laid out, others what is sent."""
        graph = Graph()
        env: dict[str, Node] = {}
        inputs = [n for n in self.needed if self.record.nodes[n].kind is NodeKind.INPUT]
        keywords = sorted((n for n in inputs if n not in self.positional or not first), key=self.order.__getitem__)
        tail = _unread_tail(self.positional, self.needed) if first else ()
        arguments = [name for name in self.positional if name not in tail] if first else self.received
        for name in arguments:
            env[name] = graph.placeholder(name)
        if tail:
            graph.placeholder("*unread_args")
        for name in keywords:
            env[name] = graph.placeholder(name)
        for name in env:
            env[name].meta.update(self.nodes[name].meta)
        graph.placeholder("**unread")
        root = Module()
        states: list[str] = []
        shared = SharedNodes(self.record, self.nodes, self.stage_of, self.needed, self.sent)
        for name in sorted(self.needed, key=self.order.__getitem__):
            if name in env:
                continue
            node = self.record.nodes[name]
            place = self.carried(name)
            if node.kind is NodeKind.STATE:
                _register(root, node.fqn, self.state[node.fqn], node.state_kind, node.persistent)
                states.append(node.fqn)
                env[name] = graph.get_attr(node.fqn)
                env[name].meta.update(self.nodes[name].meta)
            elif place is not None:
                size = shared.size(env[place[0]], place[1])
                if size is None:
                    size = graph.call_function(torch.ops.aten.sym_size.int, (env[place[0]], place[1]))
                    size.meta.update(self.nodes[name].meta)
                    shared.note_size(size, env[place[0]], place[1])
                env[name] = size
            else:
                known = shared.known(name, env)
                if known is not None:
                    env[name] = known
                    continue
                env[name] = copy_node(graph, self.nodes[name], lambda n: env[n.name])
                shared.note(env[name])
                if env[name].op == "get_attr":
                    _register_body(root, str(env[name].target), attribute_of(self.nodes[name]))
        results = [self._fresh(graph, env[name], name, last) for name in self.sent]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        module = StageModule(root, graph)
        keep_transient(root, module)
        return StageGraph(module, tuple(arguments), tuple(keywords), tuple(self.sent), tuple(states))

    def _fresh(self, graph: Graph, node: Node, name: str, last: bool) -> Node:
        """A non-view tensor: schedules detach what a stage returns in place, which a view refuses.

        What is sent is contiguous as well: process groups send nothing else.
        """
        if not isinstance(self.record.nodes[name].meta, TensorMeta):
            return node
        target = self.nodes[name].target
        dense = last or _is_contiguous(node.meta.get("val"))
        fresh = node.op == "call_function" and not returns_alias(self.nodes[name]) and "getitem" not in str(target)
        if fresh and dense:
            return node
        layout: dict[str, Any] = {} if dense else {"memory_format": torch.contiguous_format}
        clone = graph.call_function(torch.ops.aten.clone.default, (node,), layout)
        clone.meta = dict(node.meta)
        return clone


def _is_contiguous(value: Any) -> bool:
    """Whether a tensor is contiguous for every size of its symbols; nothing is guarded on."""
    if not isinstance(value, torch.Tensor):
        return True
    sizes = [size_of(size) for size in value.shape]
    strides = [size_of(stride) for stride in value.stride()]
    return all(
        size == 1 or stride == product(sizes[dim + 1 :])
        for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    )


def _unread_tail(positional: tuple[str, ...], needed: set[str]) -> tuple[str, ...]:
    """The positional inputs behind the last one that the first stage reads: they may be given or left out."""
    read = [index for index, name in enumerate(positional) if name in needed]
    return positional[max(read, default=-1) + 1 :]


def _register_body(root: Module, target: str, value: Any) -> None:
    """Puts the body of a higher-order op (or a spec that one takes) where its node looks for it."""
    *path, leaf = target.split(".")
    holder = root
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, Module())
        holder = holder.get_submodule(part)
    setattr(holder, leaf, value)


def _register(root: Module, fqn: str, value: Any, kind: StateKind | None, persistent: bool) -> None:
    """Puts a tensor at its FQN below ``root``."""
    *path, leaf = fqn.split(".")
    holder = root
    for part in path:
        child = holder._modules.get(part)
        if child is None:
            child = Module()
            holder.add_module(part, child)
        holder = child
    if kind is StateKind.PARAMETER:
        holder.register_parameter(leaf, value)
    elif kind is StateKind.BUFFER:
        holder.register_buffer(leaf, value, persistent=persistent)
    else:
        setattr(holder, leaf, value)
