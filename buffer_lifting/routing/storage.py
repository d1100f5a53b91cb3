"""Which values can be trusted by their name although the graph writes in place."""

from __future__ import annotations

from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.ops import content_operands, is_mutating, is_view


def stale_names(record: GraphRecord) -> frozenset[str]:
    """The names of all values of a storage that is read by an old name after it was written to.

    Where each write's result takes the place of what it wrote to (``y = y.index_add_(...)``), a name stands for one
    value, as in a functional graph. Where it does not (a write through a view, then a read of the base), the names of
    that storage say nothing.
    """
    if not any(is_mutating(node) for node in record.nodes.values()):
        return frozenset()
    base: dict[str, str] = {}
    last_write: dict[str, str] = {}  # base -> the name of the latest write
    current: dict[str, set[str]] = {}  # base -> the names that show what the latest write left
    stale: set[str] = set()
    for node in record.nodes.values():
        reads = node.refs() if node.kind is NodeKind.OUTPUT else content_operands(node)
        for name in reads:
            root = base.get(name, name)
            if root in last_write and name not in current[root]:
                stale.add(root)
        first = next((arg for arg in node.args.values() if isinstance(arg, Ref)), None)
        if first is None or not isinstance(node.meta, TensorMeta | tuple) or node.kind is NodeKind.OUTPUT:
            continue
        root = base.get(first.name, first.name)
        if is_mutating(node):
            base[node.name] = root
            last_write[root] = node.name
            current[root] = {node.name}
        elif is_view(node) or (node.op == "getitem" and is_view(record.nodes[first.name])):
            base[node.name] = root
            if root in last_write and first.name in current[root]:
                current[root].add(node.name)
    return frozenset(name for name in record.nodes if base.get(name, name) in stale)


def makes_rows(record: GraphRecord, node: Node) -> bool:
    """Whether an op may put rows in an order of data's: sorts, and selections by a mask."""
    if node.base_op in ("aten.sort", "aten.argsort", "aten.nonzero", "aten.nonzero_numpy"):
        return True
    if node.base_op != "aten.index":
        return node.op == "aten.where.default"
    metas = (record.nodes[name].tensor for path, name in node.named_refs() if path != "self")
    return any(meta is not None and meta.dtype in ("bool", "uint8") for meta in metas)
