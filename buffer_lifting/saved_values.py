"""What autograd keeps of a stage's forward for its backward, in bytes, without running it.

Each call is made once on meta tensors of the example's sizes, with torch's own hooks for saved tensors: they tell which
of its operands and results the call keeps, and what else. Storage counts once however many calls keep it, or views of
it. Parameters, buffers and the stage's keyword inputs do not count: they are there anyway. What the stage receives and
hands on does: torch's runtime holds both until the backward.

An estimate: attention counts as a fused kernel does (queries, keys, values, result, one float32 number a row, and a
mask as the floating one that the kernel makes of it), temporary memory does not count, nor does a loss outside of the
program, and what a call keeps at sizes that the example does not tell is that of the assumed ones.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.stand_ins import Shaped, concrete, map_arguments, signature
from buffer_lifting.torch_compat import (
    FLEX_HOP,
    HigherOrderOperator,
    OpOverload,
    is_mutable,
    storage_id,
    tree_flatten,
    tree_map,
)


@dataclass(frozen=True)
class Value:
    """A tensor of the walk: its kind, whether it needs a gradient, and the storage that it lies in."""

    shaped: Shaped
    needs_grad: bool
    storage: int


@dataclass(frozen=True)
class _Call:
    """What a call does with storage: an operand by its index, or bytes of its own."""

    results: tuple[tuple[int | None, bool], ...]  # for each tensor it returns: the operand it is a view of; a gradient
    saved: tuple[int, ...]  # operands that are kept
    kept: tuple[int, ...]  # results that are kept
    more: int  # bytes that are kept besides


class SavedValues:
    """Walks the graphs of stages; calls of equal op, sizes and needs are tried once."""

    def __init__(self, hints: dict[str, int]) -> None:
        self.hints = hints
        self.unknown: list[str] = []
        self._calls: dict[Any, _Call | None] = {}
        self._bytes: list[int] = []  # of each storage
        self._saved: set[int] = set()

    def stage(self, module: GraphModule, received: tuple[str, ...]) -> int:
        """Bytes that one microbatch leaves behind until its backward. ``received`` are the activations sent here."""
        self._bytes, self._saved = [], set()
        env: dict[Node, Any] = {}
        sent = set(received)
        held: set[int] = set()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                own = node.name in sent
                env[node] = self._fresh(concrete(node.meta.get("val"), self.hints), own)
                if own:
                    held |= _storages(env[node])
            elif node.op == "get_attr":
                env[node] = self._state(attribute_of(node, module))
        outside = {storage for value in env.values() for storage in _storages(value)} - held
        results = self._walk(module.graph, env)
        kept = (self._saved | _storages(results) | held) - outside
        return sum(self._bytes[storage] for storage in kept)

    def _walk(self, graph: Graph, env: dict[Node, Any]) -> Any:
        result = None
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = self._result(node, env)
            elif node.op == "output":
                result = map_arguments(node.args[0], env.__getitem__)
        return result

    def _state(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        kind = Shaped(tuple(value.shape), tuple(value.stride()), value.dtype)
        return Value(kind, value.requires_grad, self._storage(0))

    def _storage(self, size: int) -> int:
        self._bytes.append(size)
        return len(self._bytes) - 1

    def _fresh(self, shapes: Any, needs_grad: bool = False) -> Any:
        """Values in storage of their own."""

        def make(item: Any) -> Any:
            if not isinstance(item, Shaped):
                return item
            grad = needs_grad and (item.dtype.is_floating_point or item.dtype.is_complex)
            return Value(item, grad, self._storage(item.nbytes))

        return tree_map(make, shapes)

    def _result(self, node: Node, env: Mapping[Node, Any]) -> Any:
        args, kwargs = map_arguments((node.args, dict(node.kwargs)), lambda item: env.get(item))
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else None
        expected = concrete(node.meta.get("val"), self.hints)
        operands = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Value)]
        if isinstance(node.target, HigherOrderOperator):
            return self._higher_order(node, args, operands, expected)
        if not isinstance(node.target, OpOverload):
            return expected
        call = self._call(node, args, kwargs, operands)
        wanted = [item for item in tree_flatten(expected)[0] if isinstance(item, Shaped)]
        if call is None or len(call.results) != len(wanted):
            self.unknown.append(node.name)
            grad = any(item.needs_grad for item in operands)
            self._saved |= {item.storage for item in operands} if grad else set()
            return self._fresh(expected, grad)
        made = iter(call.results)

        def place(item: Any) -> Any:
            if not isinstance(item, Shaped):
                return item
            view, grad = next(made)
            storage = self._storage(item.nbytes) if view is None else operands[view].storage
            return Value(item, grad, storage)

        result = tree_map(place, expected)
        flat = [item for item in tree_flatten(result)[0] if isinstance(item, Value)]
        self._saved |= {operands[index].storage for index in call.saved} | {flat[index].storage for index in call.kept}
        if call.more:
            self._saved.add(self._storage(call.more))
        return result

    def _call(self, node: Node, args: Any, kwargs: Any, operands: list[Value]) -> _Call | None:
        plain = tree_map(lambda item: item.shaped if isinstance(item, Value) else item, (args, kwargs))
        key = (node.target, signature(plain), tuple(item.needs_grad for item in operands))
        if key not in self._calls:
            self._calls[key] = _attention(node, operands) or _try(node.target, args, kwargs)
        return self._calls[key]

    def _higher_order(self, node: Node, args: Any, operands: list[Value], expected: Any) -> Any:
        """A checkpointed region keeps its operands, flex_attention what a fused kernel keeps, others what is inside."""
        grad = any(item.needs_grad for item in operands)
        bodies = [attribute_of(arg) for arg in node.all_input_nodes if arg.op == "get_attr"]
        result = self._fresh(expected, grad)
        if node.target is FLEX_HOP or "checkpoint" in str(node.target):
            if grad:
                self._saved |= {item.storage for item in operands}
                self._saved |= _storages(result) if node.target is FLEX_HOP else set()
            return result
        for body in bodies:
            if not isinstance(body, GraphModule):
                continue
            inputs = [item for item in body.graph.nodes if item.op == "placeholder"]
            given = operands[-len(inputs) :] if inputs else []
            env: dict[Node, Any] = dict(zip(inputs, given, strict=False))
            self._walk(body.graph, {**{item: None for item in inputs}, **env})
        return result


def _storages(value: Any) -> set[int]:
    return {item.storage for item in tree_flatten(value)[0] if isinstance(item, Value)}


def _attention(node: Node, operands: list[Value]) -> _Call | None:
    """Attention as fused kernels keep it; ``None`` where it is no attention, or none that they take."""
    if str(node.target) != "aten.scaled_dot_product_attention.default":
        return None
    query, _, value = operands[:3]
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if dropout or query.shaped.shape[-1] != value.shaped.shape[-1] or len(query.shaped.shape) != 4:
        return None
    grad = any(item.needs_grad for item in operands[:3])
    batch, heads, rows, _ = query.shaped.shape
    more = 4 * batch * heads * rows
    saved = [0, 1, 2]
    if len(operands) > 3:
        if operands[3].needs_grad:  # not fused
            return None
        mask = operands[3].shaped
        if mask.dtype is torch.bool:
            more += mask.nbytes * query.shaped.dtype.itemsize
        else:
            saved.append(3)
    return _Call(((None, grad),), tuple(saved) if grad else (), (0,) if grad else (), more if grad else 0)


def _try(target: Any, args: Any, kwargs: Any) -> _Call | None:
    """Makes a call on meta tensors; ``None`` if torch cannot."""
    tensors: list[torch.Tensor] = []

    def tensor(item: Any) -> Any:
        if not isinstance(item, Value):
            return item
        made = item.shaped.tensor()
        if item.needs_grad:
            leaf = made.requires_grad_()
            made = leaf.clone() if is_mutable(target) else leaf.view_as(leaf)  # autograd refuses writes to leaves
        tensors.append(made)
        return made

    saved: list[torch.Tensor] = []

    def keep(item: torch.Tensor) -> torch.Tensor:
        saved.append(item)
        return item

    try:
        with torch.enable_grad():
            made_args, made = tree_map(tensor, args), tree_map(tensor, kwargs)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda item: item):
                out = target(*made_args, **made)
    except Exception:  # an estimate must not keep a program from its stages
        return None
    results = [item for item in tree_flatten(out)[0] if isinstance(item, torch.Tensor)]
    places = {storage_id(item): index for index, item in reversed(list(enumerate(tensors)))}
    after = {
        storage_id(item): index for index, item in reversed(list(enumerate(results))) if storage_id(item) not in places
    }
    kept = {storage_id(item): item for item in saved}
    more = sum(item.untyped_storage().nbytes() for key, item in kept.items() if key not in places and key not in after)
    return _Call(
        tuple((places.get(storage_id(item)), item.requires_grad) for item in results),
        tuple(sorted(places[key] for key in kept if key in places)),
        tuple(sorted(after[key] for key in kept if key in after)),
        more,
    )
