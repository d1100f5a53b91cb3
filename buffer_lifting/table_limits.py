"""How long a sequence may be for the learned tables that a program looks up by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from buffer_lifting.errors import FeedError
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref
from buffer_lifting.graph.sizes import Size
from buffer_lifting.streams import Streams

_MOVES = frozenset(
    f"aten.{name}"
    for line in ["unsqueeze squeeze expand view reshape _unsafe_view to _to_copy clone alias contiguous", "lift_fresh"]
    for name in line.split()
)
_LOOKUPS = {"aten.embedding": ("weight", "indices"), "aten.index_select": ("self", "index")}


@dataclass(frozen=True)
class TableLimit:
    """A table of ``rows`` rows that is read at the position ids plus ``offset``."""

    axis: str
    table: str
    rows: int
    offset: int = 0


def table_limits(record: GraphRecord, lengths: Mapping[str, Size]) -> tuple[TableLimit, ...]:
    """The tables with a known number of rows that a record looks up at ``arange(S) + constant``."""
    found: set[TableLimit] = set()
    for node in record.nodes.values():
        for table, index in _lookups(node):
            state = record.nodes.get(table)
            if state is None or state.kind is not NodeKind.STATE or state.tensor is None or not state.tensor.shape:
                continue
            rows, read = state.tensor.shape[0], _arange(record, index)
            if read is None or not isinstance(rows, int):
                continue
            found.update(
                TableLimit(axis, state.fqn, rows, read[1]) for axis, size in lengths.items() if size == read[0]
            )
    return tuple(sorted(found, key=lambda limit: (limit.axis, limit.rows - limit.offset, limit.table)))


def _lookups(node: Node) -> list[tuple[str, str]]:
    if node.base_op in _LOOKUPS and node.args.get("dim", 0) == 0:
        table, index = (node.ref(path) for path in _LOOKUPS[node.base_op])
        return [(table, index)] if table and index else []
    indices = node.args.get("indices")
    if node.base_op == "aten.index" and isinstance(indices, tuple) and indices and isinstance(indices[0], Ref):
        table = node.ref("self")
        return [(table, indices[0].name)] if table else []
    return []


def _arange(record: GraphRecord, name: str) -> tuple[Size, int] | None:
    """The length and the first element of the arange that an index is, plus a constant."""
    node, offset = record.nodes[name], 0
    while node.base_op != "aten.arange":
        source = node.ref("self")
        if node.base_op == "aten.add" and isinstance(node.args.get("other"), int) and node.args.get("alpha", 1) == 1:
            offset += int(node.args["other"])  # type: ignore[arg-type]
        elif node.base_op not in _MOVES:
            return None
        if source is None:
            return None
        node = record.nodes[source]
    start = node.args.get("start", 0)
    if node.args.get("step", 1) != 1 or not isinstance(start, int) or node.tensor is None:
        return None
    return node.tensor.shape[0], offset + start


def check_tables(limits: Iterable[TableLimit], streams: Mapping[str, Streams]) -> None:
    """Refuses position ids that a table has no row for: the same on every rank, of whole sequences.

    Raises:
        FeedError: with the table, its rows and what was asked for.
    """
    for limit in limits:
        along = streams[limit.axis]
        most = limit.rows - limit.offset
        if along.positions is None:
            if along.length > most:
                raise FeedError(
                    f"a sequence of {along.length} is longer than the table {limit.table!r} allows on axis "
                    f"{limit.axis!r}: it has {limit.rows} rows, for {most} positions"
                )
        elif int(along.positions.max()) >= most:
            raise FeedError(
                f"positions go up to {int(along.positions.max())}, but the table {limit.table!r} has {limit.rows} "
                f"rows, for the positions 0 to {most - 1}"
            )
