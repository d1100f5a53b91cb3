"""Fake values of new and changed nodes, without fixing a dynamic size of the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.labels import BATCH
from buffer_lifting.program import InputAxes
from buffer_lifting.torch_compat import fake_mode_of, replacements, symbolic_kernels


class Fakes:
    """Computes fake values. Layers repeat the same calls, so equal calls on the same fakes are computed once."""

    def __init__(self, graph: Graph, input_axes: Mapping[str, InputAxes] | None = None) -> None:
        """``input_axes``: dims of two inputs on one axis have one size, whatever symbols export gave them."""
        metas = {node.name: node.meta.get("val") for node in graph.nodes if node.op == "placeholder"}
        self._any_fake = next(value for value in metas.values() if isinstance(value, torch.Tensor))
        self._known: dict[Any, Any] = {}
        self._replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._size: dict[str, torch.SymInt] = {}  # of an axis, for each symbol that stands for another one
        of_axis: dict[str, torch.SymInt] = {}
        for name, own in (input_axes or {}).items():
            for dim, axis in [(own.batch_dim, BATCH), *((dim, axis) for dim, axis, _ in own.seq_dims)]:
                size = metas[name].shape[dim] if dim is not None and metas.get(name) is not None else 0
                if isinstance(size, torch.SymInt) and str(size) != str(first := of_axis.setdefault(axis, size)):
                    self._size[str(size)] = first

    def of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of a call whose operands are nodes with fake values.

        Raises:
            UnsupportedReadError: torch's fake of the op would fix a dynamic size.
        """
        values = torch.fx.map_arg((args, kwargs), lambda n: self._of_one_size(n.meta["val"]))
        key = (target, _identity(values))
        if key not in self._known:
            own = [self._of_one_size(n.meta["val"]) for n in operands(args, kwargs)]
            fakes = [value for value in own if isinstance(value, torch.Tensor)]
            sizes: list[Any] = [size for fake in fakes for size in fake.shape]
            symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
            before = replacements(symbols[0]) if symbols else 0
            if target is torch.ops.aten.sym_size.int:  # the op itself would fix a symbolic size to its example
                return values[0][0].shape[values[0][1]]
            if target is torch.ops.aten.polar.default:  # its fake compares sizes, and fixes them
                target = torch.ops.aten.complex.default
            with fake_mode_of(fakes[0] if fakes else self._any_fake), torch.no_grad(), symbolic_kernels():
                result = target(*values[0], **values[1])
            if symbols and replacements(symbols[0]) != before:
                raise UnsupportedReadError(
                    f"emitting {target} would fix a dynamic size of the program; please report this model"
                )
            self._known[key] = (result, values)
        return self._known[key][0]

    def _of_one_size(self, value: Any) -> Any:
        """An operand with one symbol for each axis: with two, an op would equate them in the caller's program."""
        if not self._size:
            return value
        if isinstance(value, torch.SymInt):
            return self._size.get(str(value), value)
        if not isinstance(value, torch.Tensor) or not any(str(size) in self._size for size in value.shape):
            return value
        if id(value) not in self._replaced:
            with fake_mode_of(value):
                sizes = [self._size.get(str(size), size) for size in value.shape]
                self._replaced[id(value)] = (torch.empty(sizes, dtype=value.dtype, device=value.device), value)
        return self._replaced[id(value)][0]


def same_layout(one: Any, other: Any) -> bool:
    """Whether two fake tensors have the same dtype, sizes and strides."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dtype != other.dtype:
        return False
    return _sizes(one.shape) == _sizes(other.shape) and _sizes(one.stride()) == _sizes(other.stride())


def _sizes(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def operands(args: Any, kwargs: Any) -> list[Node]:
    """The nodes among the arguments of a call."""
    found: list[Node] = []
    torch.fx.map_arg((args, kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_identity(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, torch.Tensor | torch.SymInt):
        return id(value)
    return (type(value).__name__, str(value))
