"""Axis labels: which dims of a value run over the batch and over a sequence axis, and in which role.

A dim's label is a tuple of factors, outermost first, whose sizes multiply to the dim's size: ``[B*S, D]`` has
``((batch, S-axis), (feature,))``. A value's labels have one entry a dim.
"""

from __future__ import annotations

from typing import NamedTuple

from buffer_lifting.graph.sizes import Size, divide, multiply

BATCH = "batch"
ROW = "row"  # the query side of attention, and every value that is not attention-shaped
COL = "col"  # the key side
SINKS = "col+"  # the keys, and behind them columns that are no keys (attention sinks)
KEYS = (COL, SINKS)


class Factor(NamedTuple):
    """A part of a dim: ``axis`` is ``""`` for features, :data:`BATCH`, or the name of a sequence axis."""

    axis: str
    role: str
    size: Size

    @property
    def is_seq(self) -> bool:
        """Whether the factor runs over a sequence axis."""
        return bool(self.axis) and self.axis != BATCH


DimLabel = tuple[Factor, ...]
Labels = tuple[DimLabel, ...]


def feature(size: Size) -> DimLabel:
    """The label of a dim that runs over neither batch nor sequence."""
    return () if size == 1 else (Factor("", "", size),)


def features(shape: tuple[Size, ...]) -> Labels:
    """All dims are features."""
    return tuple(feature(size) for size in shape)


def is_labelled(dim: DimLabel) -> bool:
    """Whether a dim has a batch or sequence factor."""
    for factor in dim:  # noqa: SIM110
        if factor.axis:
            return True
    return False


def has_seq(dim: DimLabel) -> bool:
    """Whether a dim has a sequence factor."""
    for factor in dim:  # noqa: SIM110
        if factor.axis and factor.axis != BATCH:
            return True
    return False


def has_batch(dim: DimLabel) -> bool:
    """Whether a dim has a batch factor."""
    for factor in dim:  # noqa: SIM110
        if factor.axis == BATCH:
            return True
    return False


def seq_axes(labels: Labels) -> set[tuple[str, str]]:
    """The (axis, role) pairs that occur."""
    return {(factor.axis, factor.role) for dim in labels for factor in dim if factor.axis and factor.axis != BATCH}


def batch_dim(labels: Labels) -> int | None:
    """The first dim with a batch factor."""
    return next((index for index, dim in enumerate(labels) if has_batch(dim)), None)


def with_role(dim: DimLabel, role: str) -> DimLabel:
    """The same dim with its sequence factors in another role."""
    return tuple(factor._replace(role=role) if factor.is_seq else factor for factor in dim)


def transposed(labels: Labels) -> Labels:
    """The same dims with the roles of queries and keys exchanged."""
    other = {ROW: COL, COL: ROW}
    return tuple(tuple(f._replace(role=other.get(f.role, f.role)) if f.is_seq else f for f in dim) for dim in labels)


def regroup(labels: Labels, shape: tuple[Size, ...]) -> Labels | None:
    """Labels after a reshape to ``shape``, or ``None`` if it splits a batch or sequence factor.

    Factors are matched in order, as in a row-major view: an output dim takes factors until their product is its
    size. A feature factor may be split between output dims, a labelled one may not.
    """
    queue = [f for dim in labels for f in dim if f.axis or f.size != 1]
    queue.reverse()
    result: list[DimLabel] = []
    for size in shape:
        dim: list[Factor] = []
        remaining = size
        while remaining != 1:
            if not queue:
                return None
            factor = queue.pop()
            quotient = divide(remaining, factor.size)
            if quotient is not None:
                dim.append(factor)
                remaining = quotient
                continue
            rest = None if factor.axis else divide(factor.size, remaining)
            if rest is None:
                return None
            dim.append(Factor("", "", remaining))
            queue.append(Factor("", "", rest))
            remaining = 1
        if queue and not dim and queue[-1].axis and queue[-1].size == 1:
            dim.append(queue.pop())
        result.append(_merge_features(dim))
    if any(factor.size != 1 for factor in queue):
        return None
    return tuple(result)


def _merge_features(dim: list[Factor]) -> DimLabel:
    merged: list[Factor] = []
    for factor in dim:
        if merged and not factor.axis and not merged[-1].axis:
            merged[-1] = Factor("", "", multiply(merged[-1].size, factor.size))
        else:
            merged.append(factor)
    return tuple(merged)


def broadcast(parts: list[Labels], shape: tuple[Size, ...]) -> Labels | None:
    """Labels of a broadcast result of ``shape`` from its operands' labels; ``None`` where two disagree.

    An operand that has features where another has a sequence or batch disagrees as well, unless its size is 1.
    """
    result: list[DimLabel] = []
    for offset in range(len(shape), 0, -1):
        found: DimLabel | None = None
        plain = False
        for labels in parts:
            if offset > len(labels):
                continue
            dim = labels[-offset]
            if not is_labelled(dim):
                plain |= bool(dim)
                continue
            if found is not None and found != dim:
                if all(f.size == 1 for f in found):
                    found = dim
                elif not all(f.size == 1 for f in dim):
                    return None
                continue
            found = dim
        if found is not None and plain and any(f.size != 1 for f in found):
            return None
        result.append(found if found is not None else feature(shape[-offset]))
    sequences = [(factor.axis, factor.role) for dim in result for factor in dim if factor.is_seq]
    return tuple(result) if len(sequences) == len(set(sequences)) else None
