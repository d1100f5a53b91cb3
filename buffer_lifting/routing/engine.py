"""Routing of tokens to experts and back, recognised while labels are propagated.

Every step is proved from the graph: the rows come from a sort or a selection over whole tokens, each op on them is
local in a row, the weights that a row meets are chosen by its own expert, and the rows go back by the same index that
fetched them. What is not proved is a finding. Indices, counts and sizes that routing makes say where rows stand, so
they may reach nothing but routing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from buffer_lifting.axis_rules import AxisResult, OpView, apply_rule
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, TensorMeta
from buffer_lifting.graph.sizes import atoms
from buffer_lifting.labels import DimLabel, Labels, feature, is_labelled
from buffer_lifting.ops import ASSERTIONS, FILLS, content_operands, is_mutating
from buffer_lifting.program import SequenceMixing
from buffer_lifting.routing.facts import (
    PREFIX,
    Columns,
    Count,
    Counts,
    Fact,
    Index,
    Inverse,
    Place,
    Rows,
    has_routed,
)
from buffer_lifting.routing.storage import stale_names

#: What says where a row stands, or how many rows there are: it may not reach the data.
_CONFINED = (Index, Inverse, Columns, Counts, Count, Place)
_SIZE_ARGUMENTS = ("size", "shape", "split_sizes")
_SPOILED = "its storage is written to under another name"

_F = TypeVar("_F")
Rule = Callable[["Routing", OpView], AxisResult | None]
_RULES: dict[str, Rule] = {}
Carry = Callable[["Routing", OpView, AxisResult | None], None]
_CARRIES: dict[str, Carry] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule that is asked before the general ones; ``None`` passes the node on to those."""

    def register(function: Rule) -> Rule:
        _RULES.update((name if "." in name else f"aten.{name}", function) for name in names)
        return function

    return register


def carry(*names: str) -> Callable[[Carry], Carry]:
    """Registers what an op does with facts, once its labels are known."""

    def register(function: Carry) -> Carry:
        _CARRIES.update((name if "." in name or name == "getitem" else f"aten.{name}", function) for name in names)
        return function

    return register


class Routing:
    """The facts of one graph. Linear in its nodes; a graph without routing costs a look-up for each node."""

    def __init__(self, record: GraphRecord) -> None:
        self.record = record
        self.facts: dict[str, dict[type, Fact]] = {}
        self.several: dict[str, list[dict[type, Fact]]] = {}  # facts of each result of an op with several
        self.roots: dict[str, str] = {}  # value -> the value whose elements it holds, each once, in some order
        self.selections: dict[str, Rows] = {}
        self.sorts: dict[str, Rows] = {}  # by axis
        self.parts: dict[str, int] = {}  # axis of sorted rows -> into how many parts they are cut
        self._consumed: set[str] = set()
        self._regions: dict[str, Node] = {}
        self._counted: set[str] = set()  # the symbols of sizes that data decides
        self._stale: frozenset[str] | None = None

    # -- the scan's questions -------------------------------------------------------------------------------

    def apply(self, view: OpView) -> AxisResult | None:
        """The axis result of an op on data; facts of its result are noted."""
        node = view.node
        name = node.base_op.removesuffix("_") if is_mutating(node) else node.base_op
        known, self._consumed = _RULES.get(name), set()
        result = known(self, view) if known else None
        if result is None:
            result = apply_rule(view)
            if result is not None and result.mixing and self._reads_routed(view):
                why = f"{result.mixing}: the rows are tokens in an order that data chose"
                result = AxisResult(result.outputs, result.operands, why, False)
        follow = _CARRIES.get(node.base_op)
        if follow is not None:
            follow(self, view, result)
        if self.facts:
            result = self._confine(node, result)
        return result

    def aligned(self, value: Node, labels: tuple[DimLabel, ...]) -> str:
        """Why a value without data may not line up with routed rows; ``""`` if it may."""
        if not has_routed(labels) or self.is_fill(value):
            return ""
        return "it lines up with tokens in an order that data chose, so what a token reads depends on the others"

    def returned(self, name: str, labels: tuple[DimLabel, ...] | None) -> str:
        """Why a value of routing may not be returned; ``""`` if it may."""
        if has_routed(labels):
            return "rows are returned in an order that data chose"
        return "what routing knows of all tokens together is returned" if self._confined(name) else ""

    def inside(self, labels: Mapping[str, tuple[Labels, ...] | None]) -> frozenset[str]:
        """The values inside regions: routed rows, and what says where they stand or how many there are."""
        rows = {name for name, known in labels.items() if known and any(has_routed(own) for own in known)}
        return frozenset(rows | {name for name in self.facts if self._confined(name)})

    def regions(self) -> list[SequenceMixing]:
        """One handled entry for each module whose tokens are routed and back."""
        why = "tokens routed to experts by data and back: local in each token"
        return [
            SequenceMixing(n.name, n.op, why, n.location, (n.module,) if n.module else (), True, "BL200", "")
            for n in self._regions.values()
        ]

    def counted_sizes(self) -> list[tuple[Node, str]]:
        """The ops that take a number of routed rows for anything but a size, with that operand's path."""
        found: list[tuple[Node, str]] = []
        if not self._counted:
            return found
        for node in self.record.nodes.values():
            if node.kind is not NodeKind.OP or node.base_op in ASSERTIONS or isinstance(node.meta, ScalarMeta):
                continue
            for path, name in node.named_refs():
                shape = path.split(".")[0] in _SIZE_ARGUMENTS and "fill_value" not in path
                if isinstance(self.record.nodes[name].meta, ScalarMeta) and not shape and self._is_counted(name):
                    found.append((node, path))
        return found

    def is_fill(self, value: Node) -> bool:
        """Whether a value is the same everywhere, for good."""
        return value.base_op in FILLS and not self.stale(value.name)

    # -- what rules ask and say -----------------------------------------------------------------------------

    def fact(self, name: str | None, kind: type[_F]) -> _F | None:
        """A fact of a value that can be trusted by its name."""
        if name is None:
            return None
        found = self.facts.get(name, {}).get(kind)
        return found if isinstance(found, kind) and not self.stale(name) else None

    def learn(self, name: str, *facts: Fact) -> None:
        """Notes facts of a value."""
        for fact in facts:
            self.facts.setdefault(name, {})[type(fact)] = fact

    def consume(self, *names: str | None) -> None:
        """Says that the op being visited puts a confined operand to a use that is proved."""
        self._consumed.update(name for name in names if name)

    def root(self, name: str) -> str | None:
        """The value whose elements this one holds, each once; ``None`` if the name says nothing."""
        return None if self.stale(name) else self.roots.get(name, name)

    def stale(self, name: str) -> bool:
        """Whether a name does not stand for one value."""
        if self._stale is None:
            self._stale = stale_names(self.record)
        return name in self._stale

    def selection(self, mask: str, sources: tuple[DimLabel, ...], single: frozenset[int], view: OpView) -> Rows:
        """The rows where a mask is on."""
        rows = self.selections.get(mask)
        if rows is None:
            metas = view.shapes_out()
            size = metas[0][0] if metas and metas[0] else 0
            rows = Rows(PREFIX + mask, view.node.name, sources, size, False, single)
            self.selections[mask] = rows
            self._counted.update(atom for shape in metas for dim in shape[:1] for atom in atoms(dim) if _unbacked(atom))
        return rows

    def count_scalar(self, node: Node) -> None:
        """Notes that a number is a count of rows."""
        if isinstance(node.meta, ScalarMeta) and node.meta.size is not None:
            self._counted.update(atoms(node.meta.size))

    def leave(self, rows: Rows) -> None:
        """Notes that rows went back to where they came from."""
        entry = self.record.nodes[rows.node]
        self._regions.setdefault(entry.module or rows.axis, entry)

    def bound(self, name: str) -> int | None:
        """A number that integer elements are below (and at least 0), followed back to what made them."""
        while not self.stale(name):
            node = self.record.nodes[name]
            if node.base_op in ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack"):
                bounds = [self.bound(part) for part in node.refs()]
                known = [bound for bound in bounds if bound is not None]
                return max(known) if known and len(known) == len(bounds) else None
            source = node.args.get("self", node.args.get("0"))
            if not isinstance(source, Ref):
                return None
            made = self.record.nodes[source.name]
            if node.op == "getitem" and made.base_op in ("aten.topk", "aten.sort", "aten.max", "aten.min"):
                if node.args.get("1") == 1:
                    return _size_along(self.record, made)
                if made.base_op != "aten.sort":
                    return None
                source = made.args["self"]
            elif node.base_op in ("aten.argsort", "aten.argmax"):
                return _size_along(self.record, node)
            elif node.base_op not in _ELEMENTS_OF and node.op != "getitem":
                return None
            elif node.op == "getitem":
                if made.base_op not in ("aten.unbind", "aten.split", "aten.chunk"):
                    return None
                source = made.args["self"]
            if not isinstance(source, Ref) or node.tensor is None or not exact(node.tensor):
                return None
            name = source.name
        return None

    # -- confinement ----------------------------------------------------------------------------------------

    def _reads_routed(self, view: OpView) -> bool:
        return any(has_routed(view.labels(path)) for path, _ in view.node.named_refs())

    def _confined(self, name: str) -> bool:
        facts = self.facts.get(name)
        return facts is not None and any([isinstance(fact, _CONFINED) for fact in facts.values()])

    def _confine(self, node: Node, result: AxisResult | None) -> AxisResult | None:
        if (
            node.base_op in ASSERTIONS
            or node.op.startswith("sym.")
            or (result is not None and result.mixing and not result.handled)
        ):
            return result
        for name in content_operands(node):
            if name not in self.facts or name in self._consumed or not self._confined(name):
                continue
            facts = self.facts[name]
            if Counts in facts or Count in facts:
                why = "a number of tokens per expert reaches the data (a capacity, an auxiliary loss)"
            elif self.stale(name):
                why = f"where routed tokens go is not known: {_SPOILED}"
            else:
                why = "the places of routed tokens reach the data, or are not those that the rows came from"
            # no labels: the scan reports what mixes only if an operand has some, and counts have none
            return AxisResult(None, result.operands if result else {}, why, False)
        return result

    def _is_counted(self, name: str) -> bool:
        node = self.record.nodes[name]
        if not isinstance(node.meta, ScalarMeta):
            return False
        if node.meta.size is not None:
            return bool(atoms(node.meta.size) & self._counted)
        return any(self._is_counted(operand) for operand in node.refs())


_SAME = frozenset(
    f"aten.{n}" for n in ["to", "_to_copy", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy"]
)
_RESHAPES = ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose"]
_PARTS = ["t", "expand", "select", "slice", "narrow", "unbind", "index", "index_select", "gather", "repeat"]
_ELEMENTS_OF = _SAME | frozenset(f"aten.{n}" for n in [*_RESHAPES, *_PARTS, "repeat_interleave"])


def exact(meta: TensorMeta) -> bool:
    """Whether a dtype holds expert ids and counts exactly."""
    return meta.dtype in ("int64", "int32", "float32", "float64")


def _unbacked(atom: str) -> bool:
    return atom[:1] == "u" and atom[1:].isdigit()


def _size_along(record: GraphRecord, node: Node) -> int | None:
    source = node.args.get("self")
    meta = record.nodes[source.name].tensor if isinstance(source, Ref) else None
    dim = node.args.get("dim", -1)
    if meta is None or not meta.shape or not isinstance(dim, int):
        return None
    size = meta.shape[dim % len(meta.shape)]
    return size if isinstance(size, int) else None


def operand(node: Node, key: str) -> str | None:
    """The name of the node at an argument."""
    arg = node.args.get(key)
    return arg.name if isinstance(arg, Ref) else None


def plain(labels: tuple[DimLabel, ...]) -> bool:
    """Whether no dim runs over the batch or the sequence."""
    return not any(is_labelled(dim) for dim in labels)


def replaced(labels: tuple[DimLabel, ...], dim: int, label: DimLabel) -> tuple[DimLabel, ...]:
    """Labels with one dim's replaced."""
    return (*labels[:dim], label, *labels[dim + 1 :])


__all__ = ["Routing", "carry", "exact", "feature", "operand", "plain", "replaced", "rule"]
