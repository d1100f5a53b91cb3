"""Copies a program's graph and inlines the higher-order ops that only set a mode around position arithmetic.

Cases handled:
1. ``wrap_with_set_grad_enabled(True, body, ...)``: inlined.
2. ``wrap_with_set_grad_enabled(False, body, ...)``: inlined; an operand that can carry a gradient is detached.
3. ``wrap_with_autocast(device, dtype, enabled, ...)``: inlined; where it is on, its casts are written out
   (:mod:`buffer_lifting.passes.autocast`).
4. Bodies inside bodies: likewise.

5. Writes in place become values (:mod:`buffer_lifting.passes.functionalize`).

Case left alone: every other higher-order op.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.graph.copies import copy_node, erase_unused
from buffer_lifting.passes.autocast import with_casts
from buffer_lifting.passes.functionalize import functionalize, writes_in_place
from buffer_lifting.torch_compat import AUTOCAST_HOP, GRAD_MODE_HOP, tree_flatten, tree_unflatten


@dataclass
class Normalized:
    """A graph that may be edited, and the submodules that its ``get_attr`` nodes name."""

    graph: Graph
    submodules: dict[str, Any]  # and the specs that some higher-order ops take
    inlined: tuple[str, ...]  # names of the higher-order nodes that are gone


def normalize(program: ExportedProgram, read_only: bool = False) -> Normalized:
    """A normalised copy of the program's graph. Node names of the original are kept; the program is untouched.

    ``read_only`` promises that the caller does not edit the graph: it is the program's own if nothing is to inline.
    """
    inline = any(_inlinable(node, program.graph_module) for node in program.graph.nodes)
    if read_only and not inline and not writes_in_place(program.graph):
        return Normalized(program.graph, dict(program.graph_module.named_children()), ())
    inliner = _Inliner()
    new = Graph()
    inliner.copy_into(new, program.graph_module, {}, prefix="")
    _keep_output_names(new, program.graph)
    functionalize(new, _not_in_checkpoints(program))
    erase_unused(new, lambda node: node.op == "get_attr")
    modules = {str(n.target): n.meta["body"] for n in new.nodes if n.op == "get_attr" and "body" in n.meta}
    return Normalized(new, modules, tuple(inliner.inlined))


def _keep_output_names(new: Graph, original: Graph) -> None:
    """An output of an inlined body that the program returns gets the name which the program's signature has for it.

    A value that already has a name of the signature (an input, an output returned twice) is returned through an alias.
    """
    before, output = tree_flatten(original.output_node().args[0])[0], new.output_node()
    after, spec = tree_flatten(output.args[0])
    taken = {item.name for item in before if isinstance(item, Node)}
    for index, (old, node) in enumerate(zip(before, after, strict=True)):
        if not isinstance(old, Node) or not isinstance(node, Node) or node.name == old.name:
            continue
        if node.op == "placeholder" or node.name in taken:
            symbolic = not isinstance(node.meta.get("val"), torch.Tensor)
            with new.inserting_before(output):
                target, args = (operator.mul, (node, 1)) if symbolic else (torch.ops.aten.alias.default, (node,))
                after[index] = same = new.call_function(target, args)
            same.meta = {**old.meta, "val": node.meta.get("val")}
            node = same
        node.name = old.name
    output.args = (tree_unflatten(after, spec),)


def _not_in_checkpoints(program: ExportedProgram) -> frozenset[str]:
    signature = program.graph_signature
    transient = set(signature.non_persistent_buffers) | set(signature.lifted_tensor_constants)
    states = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    return frozenset(name for name, fqn in states.items() if fqn in transient)


class _Inliner:
    def __init__(self) -> None:
        self.inlined: list[str] = []

    def copy_into(
        self, new: Graph, module: GraphModule, env: dict[Node, Any], prefix: str, autocast: bool = False
    ) -> Any:
        """Copies the nodes of ``module`` to ``new``; returns what the body's output refers to."""
        for node in module.graph.nodes:
            if node.op == "placeholder" and node in env:
                continue
            if node.op == "output" and prefix:
                return torch.fx.map_arg(node.args[0], lambda n: env[n])
            body = _inlinable(node, module)
            if body is not None:
                self.inlined.append(node.name)
                env[node] = self._inline(new, node, body, env, autocast)
                continue
            if node.op == "call_function" and node.target is operator.getitem:
                source = env[node.args[0]]
                if isinstance(source, tuple | list):
                    env[node] = source[node.args[1]]
                    continue
            if autocast and node.op == "call_function":
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                args, kwargs = with_casts(new, node, args, kwargs)
                name = node.name if not prefix else f"{prefix}_{node.name}"
                copied = new.create_node("call_function", node.target, args, kwargs, name)
                copied.meta = dict(node.meta)
            else:
                copied = copy_node(new, node, lambda n: env[n])
            name = node.name if not prefix else f"{prefix}_{node.name}"
            if copied.name != name:
                copied.name = name
            if node.op == "get_attr":
                copied.meta["body"] = attribute_of(node, module)
                copied.target = node.target if not prefix else f"{prefix}_{str(node.target).replace('.', '_')}"
            env[node] = copied
        return None

    def _inline(self, new: Graph, node: Node, body: GraphModule, env: dict[Node, Any], autocast: bool) -> Any:
        skip = 2 if node.target is GRAD_MODE_HOP else 5
        no_grad = node.target is GRAD_MODE_HOP and node.args[0] is False
        inner: dict[Node, Any] = {}
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, operand in zip(placeholders, node.args[skip:], strict=True):
            value = env[operand] if isinstance(operand, Node) else operand
            if no_grad and isinstance(value, Node) and _may_require_grad(value):
                detached = new.call_function(torch.ops.aten.detach.default, (value,))
                detached.meta = {**value.meta, **{k: v for k, v in node.meta.items() if k != "val"}}
                value = detached
            inner[placeholder] = value
        if node.target is AUTOCAST_HOP:
            autocast = bool(node.args[2])
        return self.copy_into(new, body, inner, node.name, autocast)


def _inlinable(node: Node, module: GraphModule) -> GraphModule | None:
    target = node.target
    if target is GRAD_MODE_HOP:
        reference = node.args[1]
    elif target is AUTOCAST_HOP:
        reference = node.args[4]
    else:
        return None
    if isinstance(reference, Node) and reference.op == "get_attr":
        body = getattr(module, str(reference.target), None)
        return body if isinstance(body, GraphModule) else None
    return None


def _may_require_grad(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return node.op != "placeholder" or value.requires_grad
