"""Calls of a graph on meta tensors of the example's sizes: what an op costs or keeps is asked of torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from buffer_lifting.cost import evaluate
from buffer_lifting.torch_compat import Symbolic, size_of, tree_map


def concrete(value: Any, hints: dict[str, int], strides: bool = True) -> Any:
    """A ``meta["val"]`` with numbers for symbols: tensors become :class:`Shaped`, symbolic numbers plain ones.

    Without ``strides`` tensors are as if contiguous.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            shape = tuple(evaluate(size_of(size), hints) for size in item.shape)
            stride = tuple(evaluate(size_of(size), hints) for size in item.stride()) if strides else None
            return Shaped(shape, stride, item.dtype)
        if isinstance(item, torch.SymInt):
            return evaluate(size_of(item), hints)
        if isinstance(item, Symbolic):
            return 1
        return item

    return tree_map(leaf, value) if isinstance(value, list | tuple | dict) else leaf(value)


class Shaped:
    """Shape, stride (``None``: contiguous) and dtype of a tensor, by value."""

    __slots__ = ("dtype", "shape", "stride")

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...] | None, dtype: torch.dtype) -> None:
        self.shape, self.stride, self.dtype = shape, stride, dtype

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells two apart."""
        return self.shape, self.stride, self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous tensor of this shape."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def tensor(self, requires_grad: bool = False) -> torch.Tensor:
        """A meta tensor of this kind."""
        if self.stride is None:
            made = torch.empty(self.shape, dtype=self.dtype, device="meta")
        else:
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return made.requires_grad_() if requires_grad else made


def signature(value: Any) -> Any:
    """A hashable key of arguments in which tensors are :class:`Shaped`."""
    if isinstance(value, Shaped):
        return value.key
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(signature(item) for item in value))
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    return (type(value).__name__, str(value))


def operand_values(node: Node, hints: dict[str, int]) -> tuple[Any, Any]:
    """The args and kwargs of a call, as :func:`concrete` values without strides."""
    values = (node.args, dict(node.kwargs))
    args, kwargs = map_arguments(values, lambda operand: concrete(operand.meta.get("val"), hints, strides=False))
    return args, kwargs


def map_arguments(value: Any, replace: Callable[[Node], Any]) -> Any:
    """Arguments with every operand replaced, and devices by meta; fx's own containers become plain ones."""
    if isinstance(value, Node):
        return replace(value)
    if isinstance(value, tuple):
        return tuple(map_arguments(item, replace) for item in value)
    if isinstance(value, list):
        return [map_arguments(item, replace) for item in value]
    if isinstance(value, dict):
        return {key: map_arguments(item, replace) for key, item in value.items()}
    return torch.device("meta") if isinstance(value, torch.device) else value
