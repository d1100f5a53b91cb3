"""What the pattern classes look at: the record of a program, the plan of its scan, the chains above its reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from buffer_lifting.dataflow import Dep, analyse
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, StateKind
from buffer_lifting.labels import COL
from buffer_lifting.ops import FLEX_ATTENTION, INDICES, content_operands, is_view
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes, PositionRead
from buffer_lifting.scanner import scan_record
from buffer_lifting.torch_compat import OpOverload
from buffer_lifting.variation import Variation

STATIC = (StateKind.BUFFER, StateKind.CONSTANT)
CUTS = ("aten.slice", "aten.narrow", "aten.split", "aten.select")
LOOKUPS = {"aten.index": "indices", "aten.index_select": "index", "aten.gather": "index", "aten.embedding": "indices"}
WAVES = ("aten.sin", "aten.cos", "aten.polar")
PRODUCTS = tuple(f"aten.{name}" for name in ["mul", "multiply", "div", "matmul", "bmm", "mm", "einsum", "outer"])
ORDERS = tuple(f"aten.{name}" for name in ["le", "lt", "ge", "gt", "less_equal", "less", "greater_equal", "greater"])
SUMS = ("aten.add", "aten.sub", "aten.rsub", "aten.subtract")
DIVISIONS = ("aten.floor_divide", "aten.div", "aten.floor")
_EMPTY_WRITES = (torch.ops.aten.detach_.default,)
WRITES = ("slice_scatter", "select_scatter")


@dataclass(frozen=True)
class Trail:
    """A read with the nodes above the value that is read, that value included."""

    read: PositionRead
    value: Node
    nodes: tuple[Node, ...]

    @property
    def two_axes(self) -> bool:
        """Whether the value has rows and columns."""
        return len(self.read.seq_dims) > 1

    @property
    def keys(self) -> bool:
        """Whether the value is read by keys."""
        return any(role == COL for _, _, role in self.read.seq_dims)

    def has(self, *ops: str) -> bool:
        """Whether one of the ops is in the chain."""
        return any(node.base_op in ops for node in self.nodes)


class Facts:
    """What the conditions look at: the record, the plan of its scan, and what normalising the program changed."""

    def __init__(
        self, record: GraphRecord, plan: LiftPlan, inlined: tuple[str, ...], written: list[list[set[str]]]
    ) -> None:
        self.record, self.plan, self.inlined, self.written = record, plan, inlined, written
        known = {node.name: plan.data_labels.get(node.name) for node in record.inputs()}
        self.inputs = {name: labels[0] for name, labels in known.items() if labels}
        self.deps = analyse(record, self.inputs)
        self.variation = Variation(record)
        factors = [f for labels in self.inputs.values() for dim in labels for f in dim if f.is_seq]
        self.axes = {f.axis for f in factors}
        self.lengths = {f.size for f in factors}
        self._above: dict[str, frozenset[str]] = {}

    @cached_property
    def live(self) -> list[Node]:
        """The ops that an output depends on."""
        names = self.record.live()
        return [node for node in self.record.nodes.values() if node.name in names and node.kind is NodeKind.OP]

    @cached_property
    def trails(self) -> list[Trail]:
        """The reads with their chains; of a body of flex attention, those of its operands."""
        trails = []
        for read in self.reads:
            value = self.record.nodes[read.value]
            operands = [name for path, name in value.named_refs() if path.startswith(("mask_buffers", "score_buffers"))]
            names = operands if value.base_op == FLEX_ATTENTION else [value.name]
            trails.append(Trail(read, value, tuple(node for name in names for node in self.chain(name))))
        return trails

    @property
    def reads(self) -> list[PositionRead]:
        """The reads of a value: not the flag ``is_causal``."""
        return [read for read in self.plan.report.reads if read.source_kind != "is_causal"]

    def chain(self, name: str) -> Iterator[Node]:
        """The node and everything that its contents are computed from, short of data."""
        return (self.record.nodes[above] for above in sorted(self.above(name), key=self._rank.__getitem__))

    @cached_property
    def _rank(self) -> dict[str, int]:
        return {name: rank for rank, name in enumerate(self.record.nodes)}

    def above(self, name: str) -> frozenset[str]:
        """The names of :meth:`chain`."""
        if name not in self._above:
            seen: set[str] = set()
            stack = [name]
            while stack:
                current = stack.pop()
                if current in seen:
                    continue
                seen.add(current)
                node = self.record.nodes[current]
                stack.extend(ref for ref in content_operands(node) if Dep.DATA not in self.deps[ref])
            self._above[name] = frozenset(seen)
        return self._above[name]

    def operand(self, node: Node, *keys: str) -> Node | None:
        """The first of the arguments that is a node."""
        found = (node.args.get(key) for key in keys)
        return next((self.record.nodes[arg.name] for arg in found if isinstance(arg, Ref)), None)

    def base(self, node: Node | None) -> Node | None:
        """The node that a chain of views (and copies of it side by side) starts from."""
        while node is not None and node.kind is NodeKind.OP and _keeps_rows(node):
            node = self.operand(node, "self", "input")
        return node

    def spans(self, node: Node) -> int:
        """The number of dims of a sequence's length along which a value varies."""
        if node.tensor is None:
            return 0
        varies = self.variation.of(node.name)
        return sum(size in self.lengths and flag for size, flag in zip(node.tensor.shape, varies, strict=True))

    def is_table(self, node: Node | None, *kinds: StateKind) -> bool:
        """Whether a node is state of one of the kinds that is not the same everywhere."""
        return node is not None and node.kind is NodeKind.STATE and node.state_kind in kinds and not node.uniform

    def from_index(self, name: str) -> bool:
        """Whether a value is computed from an index (an arange, a cumsum) or from positions of the user."""
        nodes = [self.record.nodes[above] for above in self.above(name)]
        return any(n.base_op in (*INDICES, "aten.cumsum") or is_positions(n) for n in nodes)

    def is_position(self, index: Node) -> bool:
        """Whether an index is made of positions: by an op, by the user, or in a buffer."""
        return self.from_index(index.name) or any(self.is_table(n, StateKind.BUFFER) for n in self.chain(index.name))

    def lookups(self) -> Iterator[tuple[Node, Node | None, list[Node]]]:
        """Live reads by an index that is no data: the op, what it reads (behind views), and its indices."""
        for node in self.live:
            if node.base_op not in LOOKUPS:
                continue
            key = LOOKUPS[node.base_op]
            names = [name for path, name in node.named_refs() if path.partition(".")[0] == key]
            if names and not any(Dep.DATA in self.deps[name] for name in names):
                source = self.base(self.operand(node, "self", "weight"))
                yield node, source, [self.record.nodes[name] for name in names]


def _keeps_rows(node: Node) -> bool:
    return (is_view(node) or node.base_op == "aten.repeat") and node.base_op not in CUTS


def is_positions(node: Node) -> bool:
    """Whether a node is an input of position ids, which models call by these names."""
    return node.kind is NodeKind.INPUT and node.fqn in ("position_ids", "positions", "input_pos", "pos")


def facts_of(program: ExportedProgram, axes: Axes | None = None) -> Facts:
    """The facts of a program; it is scanned for them."""
    normalized = normalize(program, read_only=True)
    record = build_record(program, normalized.graph)
    prefixes = tuple(f"{name}_" for name in normalized.inlined)
    written = [[_names(operand, prefixes) for operand in operands] for operands in _writes(program.graph_module)]
    return Facts(record, scan_record(record, axes), normalized.inlined, written)


def _writes(module: GraphModule, env: dict[FxNode, FxNode] | None = None) -> Iterator[list[FxNode]]:
    """The operands of each write in place of the original program, those behind the arguments of inlined bodies."""
    env = env or {}
    for node in module.graph.nodes:
        body = next((n for n in node.all_input_nodes if n.op == "get_attr"), None)
        inner = getattr(module, str(body.target), None) if body is not None else None
        if isinstance(inner, GraphModule):
            slots = [n for n in inner.graph.nodes if n.op == "placeholder"]
            given = [env.get(n, n) for n in node.args[len(node.args) - len(slots) :] if isinstance(n, FxNode)]
            if len(given) == len(slots):
                yield from _writes(inner, dict(zip(slots, given, strict=True)))
        elif (
            isinstance(node.target, OpOverload) and node.target._schema.is_mutable and node.target not in _EMPTY_WRITES
        ):
            yield [env.get(n, n) for n in node.all_input_nodes]


def _names(operand: FxNode, prefixes: tuple[str, ...]) -> set[str]:
    """What an operand of the original, and what it is a view of, may be called in the record."""
    names = set()
    while True:
        names |= {f"{prefix}{operand.name}" for prefix in ("", *prefixes)}
        first = operand.args[0] if operand.args else None
        if not isinstance(first, FxNode):
            return names
        operand = first


def is_float(node: Node) -> bool:
    return node.tensor is not None and node.tensor.is_floating
