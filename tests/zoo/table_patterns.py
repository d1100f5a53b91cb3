"""The pattern classes of tables: read by rows, computed, learned."""

from __future__ import annotations

from collections.abc import Iterator

from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import Node, Ref, StateKind

from .facts import (
    CUTS,
    LOOKUPS,
    PRODUCTS,
    STATIC,
    WAVES,
    Facts,
)


def _sliced(facts: Facts, kinds: tuple[StateKind, ...]) -> Iterator[tuple[Node, Node]]:
    """Cuts of a table along the sequence, in a chain."""
    for trail in facts.trails:
        for node in trail.nodes:
            source = facts.operand(node, "self")
            if node.base_op not in ("aten.slice", "aten.narrow") or source is None:
                continue
            table = facts.base(source)
            while table is not None and table.base_op in CUTS:
                table = facts.base(facts.operand(table, "self"))
            dim, meta = node.args.get("dim", 0), node.tensor
            along = isinstance(dim, int) and meta is not None and meta.shape[dim] in facts.lengths
            if along and facts.is_table(table, *kinds):
                yield node, source


def sliced(facts: Facts) -> bool:
    return any(True for _ in _sliced(facts, STATIC))


def offset(facts: Facts) -> bool:
    """A cut along the sequence that does not start at row 0."""
    for trail in facts.trails:
        for node in trail.nodes:
            dim, meta = node.args.get("dim", 0), node.tensor
            if node.base_op not in ("aten.slice", "aten.narrow") or not isinstance(dim, int) or meta is None:
                continue
            if meta.shape[dim] in facts.lengths and Dep.USER not in facts.deps[node.name]:
                start = node.args.get("start")
                if isinstance(start, Ref) or (isinstance(start, int) and start != 0):
                    return True
    return False


def indexed(facts: Facts) -> bool:
    """A buffer's rows by an index made of positions, the user's included."""
    for node, source, indices in facts.lookups():
        positional = any(facts.from_index(index.name) for index in indices)
        if positional and facts.is_table(source, *STATIC) and facts.spans(node) < 2:
            return True
    return False


def full(facts: Facts) -> bool:
    """A table of the sequence's own length that no read op takes rows of."""
    for trail in facts.trails:
        cut = [facts.base(facts.operand(n, "self", "weight")) for n in trail.nodes if n.base_op in (*CUTS, *LOOKUPS)]
        names = {table.name for table in cut if table is not None}
        for table in trail.nodes:
            if facts.is_table(table, *StateKind) and facts.spans(table) and table.name not in names:
                return True
    return False


def computed(facts: Facts) -> bool:
    return any(_is_computed(facts, node) for node in facts.live if node.base_op in WAVES)


def _is_computed(facts: Facts, wave: Node) -> bool:
    if Dep.DATA in facts.deps[wave.name]:
        return False
    products = (node for node in facts.chain(wave.name) if node.base_op in PRODUCTS)
    return any(facts.from_index(node.name) for node in products)


def learned(facts: Facts) -> bool:
    """Rows of a parameter: by a cut, by an index along one axis, or as it is."""
    if any(True for _ in _sliced(facts, (StateKind.PARAMETER,))):
        return True
    chains = {node.name for trail in facts.trails for node in trail.nodes} | {read.node for read in facts.reads}
    for node, source, indices in facts.lookups():
        along = all(facts.spans(index) == 1 and facts.is_position(index) for index in indices)
        if along and node.name in chains and facts.is_table(source, StateKind.PARAMETER):
            return True
    return any(facts.is_table(trail.value, StateKind.PARAMETER) and facts.spans(trail.value) for trail in facts.trails)


def position_ids(facts: Facts) -> bool:
    """A row of integers in a buffer, that a lookup takes as its index."""
    for _, _, indices in facts.lookups():
        for index in indices:
            for node in facts.chain(index.name):
                meta = node.tensor
                plain = meta is not None and not meta.is_floating and sum(size != 1 for size in meta.shape) == 1
                if plain and facts.is_table(node, StateKind.BUFFER) and any(t.value for t in facts.trails):
                    return True
    return False


def equal_buffers(facts: Facts) -> bool:
    """A table that is read under several names: aliases of one storage, or equal contents in several buffers."""
    nodes = {node.name: node for trail in facts.trails for node in trail.nodes if facts.is_table(node, *STATIC)}
    tables = {name: node for name, node in nodes.items() if node.tensor and node.tensor.shape}
    contents = [node.content for node in tables.values() if node.content]
    return any(node.aliases for node in tables.values()) or len(set(contents)) < len(contents)
