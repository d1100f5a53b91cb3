"""The shapes at stage boundaries, as expressions of the batch and of each sequence axis.

A boundary shape is known from the program before anything runs: ``("batch", "seq", "32")``. ``batch`` is the
microbatch that a stage gets at once, the name of an axis the length of the rank's own part of that axis. torch is
imported only to make tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from buffer_lifting.axes import InputLabels
from buffer_lifting.errors import FeedError, PartitionError
from buffer_lifting.graph.record import Node, TensorMeta
from buffer_lifting.graph.sizes import Size, rename
from buffer_lifting.labels import BATCH, COL

if TYPE_CHECKING:
    import torch

_FACTOR = re.compile(r"(?P<name>.+?)(/(?P<by>\d+))?(\*\*(?P<power>\d+))?")
_NUMBER = re.compile(r"-?\d+")
_NO_TENSOR = "number"  # the dtype of a size that a stage hands on


@dataclass(frozen=True, slots=True)
class BoundaryTensor:
    """A tensor that a stage gets or hands on.

    Attributes:
        name: of the value in the program's graph.
        dtype: ``"float32"``, as the program computes it; ``"number"`` of what is no tensor.
        shape: each dim as a sum of products of ``batch``, axis names (``seq``, or ``seq/8`` of an axis whose length
            is a multiple of 8) and integers: ``"32"``, ``"2*batch"``.
        module: FQN of the module that computes it.
        op: the op that does; empty for a user input.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    module: str = ""
    op: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.shape)}]"

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of ``batch`` and the axes.

        Raises:
            PartitionError: a dim depends on more than those (the values of a tensor, a ``Max`` of two lengths).
            FeedError: a length that the program does not take (no multiple of what it has to be).
        """
        return tuple(_value(text, sizes, self) for text in self.shape)

    def empty(self, sizes: Mapping[str, int], floating: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the meta device, contiguous.

        Floating tensors have the dtype ``floating`` if that is given, and require a gradient: whether they get one is
        decided by the parameters of other ranks, which may freeze them, and both sides of a boundary must agree.

        Raises:
            PartitionError, FeedError: as :meth:`concrete`; a number, which torch finds on the first step.
        """
        import torch

        if self.dtype == _NO_TENSOR:
            raise PartitionError(f"{self.name!r} is a number, not a tensor: build its stages without sizes")
        dtype: torch.dtype = getattr(torch, self.dtype)
        differentiable = dtype.is_floating_point or dtype.is_complex
        if floating is not None and dtype.is_floating_point:
            dtype = floating
        return torch.empty(self.concrete(sizes), dtype=dtype, device="meta", requires_grad=differentiable)


def axis_names(labels: InputLabels) -> dict[str, str]:
    """Size symbol -> the batch or axis that it is the size of, for the symbols of a program's inputs.

    The length of an axis is that of its rows: under context parallelism the rank's own shard.
    """
    names: dict[str, str] = {}
    for axis, size in [(BATCH, labels.batch), *labels.lengths.items()]:
        if size is None or isinstance(size, int) or len(size.terms) != 1:
            continue
        ((monomial, factor),) = size.terms
        if len(monomial) == 1 and monomial[0][1] == 1 and factor > 0:
            names.setdefault(monomial[0][0], axis if factor == 1 else f"{axis}/{factor}")
    return names


def local_length(length: int, cp_size: int | None) -> int:
    """What a context-parallel rank has of a sequence: activations run along its shard, the dims of role ``row``.

    Raises:
        FeedError: a sequence that does not divide.
    """
    parts = cp_size or 1
    if length % parts:
        raise FeedError(f"a sequence of {length} does not divide into {parts} context-parallel shards")
    return length // parts


def whole_length(length: int, cp_size: int | None, role: str) -> int:
    """The sequence of which a rank was given ``length``: a shard of it for role ``row``, all of it for ``col``."""
    return length if role == COL else length * (cp_size or 1)


def describe(node: Node, names: Mapping[str, str]) -> BoundaryTensor:
    """The record of a node's value; ``names`` as of :func:`axis_names`."""
    meta = node.meta if isinstance(node.meta, TensorMeta) else TensorMeta((), _NO_TENSOR)
    return BoundaryTensor(node.name, meta.dtype, tuple(_text(size, names) for size in meta.shape), node.module, node.op)


def _text(size: Size, names: Mapping[str, str]) -> str:
    return str(rename(size, dict(names)))


def _value(text: str, sizes: Mapping[str, int], tensor: BoundaryTensor) -> int:
    total = 0
    for term in text.split(" + "):
        product = 1
        for part in re.split(r"(?<!\*)\*(?!\*)", term):
            product *= int(part) if _NUMBER.fullmatch(part) else _factor(part, sizes, tensor)
        total += product
    return total


def _factor(part: str, sizes: Mapping[str, int], tensor: BoundaryTensor) -> int:
    match = _FACTOR.fullmatch(part)
    if match is None or match["name"] not in sizes:
        raise PartitionError(
            f"the shape of {tensor.name!r}, ({', '.join(tensor.shape)}), is no expression of {', '.join(sizes)} alone: "
            "build its stages without sizes, so that torch finds it on the first step"
        )
    value, by = sizes[match["name"]], int(match["by"] or 1)
    if not by or value % by:
        raise FeedError(f"the program takes a {match['name']} that is a multiple of {by}, not {value}")
    return int((value // by) ** int(match["power"] or 1))
