"""What is known of the values inside a routing region, beyond the labels of their dims.

Rows that data put in an order of their own are an axis of their own: a dim of them is labelled with the factor
``Factor("routed:NODE", "row", size)``. Labels then do most of the work: an op that is local in each row keeps the
label, and one that mixes rows is reported like one that mixes the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import ROW, DimLabel, Factor, Labels

PREFIX = "routed:"


@dataclass(frozen=True, eq=False)
class Rows:
    """An order of rows that data chose.

    ``sources`` are the labels of the dims that a row's place has a coordinate in: one for a sort, one a dim of the
    mask for a selection. ``single`` says for each source dim that the selection has at most one row along it,
    whatever the other coordinates. ``complete``: every place is exactly one row (a permutation). ``key`` is the value
    that the rows are sorted by, ascending; ``size`` their number.
    """

    axis: str
    node: str
    sources: tuple[DimLabel, ...]
    size: Size
    complete: bool
    single: frozenset[int] = frozenset()
    key: str = ""

    @property
    def label(self) -> DimLabel:
        """The label of a dim that runs over these rows."""
        return (Factor(self.axis, ROW, self.size),)


@dataclass(frozen=True)
class Index:
    """For each row the index into a dim of ``label``; ``column``: it is exactly that coordinate of the row's place."""

    rows: Rows
    label: DimLabel
    column: int | None


@dataclass(frozen=True)
class Inverse:
    """For each place the row that it went to."""

    rows: Rows


@dataclass(frozen=True)
class Columns:
    """``nonzero``: ``[rows, coordinates]``."""

    rows: Rows


@dataclass(frozen=True)
class Counts:
    """For each expert 0..number-1, how often it occurs in the value ``key``; ``offsets``: summed up to and with it."""

    key: str
    number: int
    offsets: bool = False


@dataclass(frozen=True)
class Count:
    """One number made from counts: that of expert ``place``, or of several (-1)."""

    key: str
    number: int
    place: int


@dataclass(frozen=True)
class Hot:
    """Sums to the counts of ``key`` over all dims but ``dim``, which runs over ``number`` experts."""

    key: str
    number: int
    dim: int
    binary: bool  # all elements are 0 or 1


@dataclass(frozen=True)
class Single:
    """A mask (or one-hot) that is on at most once along each of ``dims``, whatever the other coordinates."""

    dims: frozenset[int]


@dataclass(frozen=True)
class Distinct:
    """Indices that differ from each other along ``dim``."""

    dim: int


@dataclass(frozen=True)
class Place:
    """Something else that says where a row or token stands."""


Fact = Index | Inverse | Columns | Counts | Count | Hot | Single | Distinct | Place


def is_routed(dim: DimLabel) -> bool:
    """Whether a dim runs over rows in an order that data chose."""
    return any([factor.axis.startswith(PREFIX) for factor in dim])


def has_routed(labels: Labels | None) -> bool:
    """Whether any dim does."""
    return labels is not None and any([factor.axis.startswith(PREFIX) for dim in labels for factor in dim])
