"""The pattern classes of position reads, and which of them occur in a program: derived from the graph and the scan.

An entry's ``patterns`` are written by hand, from the model's source. ``occurring`` derives the same from what the scan
found, without looking at the entry: a class is a condition on the chain above a read (the ops between its source and
the op on data that reads it) or on the scan's report. ``tests/test_catalog.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from buffer_lifting.dataflow import Dep, analyse
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.graph.sizes import atoms, multiply
from buffer_lifting.labels import BATCH, COL
from buffer_lifting.ops import FLEX_ATTENTION, INDICES, content_operands, is_view, length_operands
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Axes, PositionRead
from buffer_lifting.scanner import scan_record
from buffer_lifting.torch_compat import OpOverload
from buffer_lifting.variation import Variation

_CUTS = ("aten.slice", "aten.narrow", "aten.split", "aten.select")
_LOOKUPS = {"aten.index": "indices", "aten.index_select": "index", "aten.gather": "index", "aten.embedding": "indices"}
_WAVES = ("aten.sin", "aten.cos", "aten.polar")
_PRODUCTS = tuple(f"aten.{name}" for name in ["mul", "multiply", "div", "matmul", "bmm", "mm", "einsum", "outer"])
_ORDERS = tuple(f"aten.{name}" for name in ["le", "lt", "ge", "gt", "less_equal", "less", "greater_equal", "greater"])
_SUMS = ("aten.add", "aten.sub", "aten.rsub", "aten.subtract")
_DIVISIONS = ("aten.floor_divide", "aten.div", "aten.floor")
_EMPTY_WRITES = (torch.ops.aten.detach_.default,)
_WRITES = ("slice_scatter", "select_scatter")


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
            if node.base_op not in _LOOKUPS:
                continue
            key = _LOOKUPS[node.base_op]
            names = [name for path, name in node.named_refs() if path.partition(".")[0] == key]
            if names and not any(Dep.DATA in self.deps[name] for name in names):
                source = self.base(self.operand(node, "self", "weight"))
                yield node, source, [self.record.nodes[name] for name in names]


def _keeps_rows(node: Node) -> bool:
    return (is_view(node) or node.base_op == "aten.repeat") and node.base_op not in _CUTS


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


# Tables -------------------------------------------------------------------------------------------------

_STATIC = (StateKind.BUFFER, StateKind.CONSTANT)


def _sliced(facts: Facts, kinds: tuple[StateKind, ...]) -> Iterator[tuple[Node, Node]]:
    """Cuts of a table along the sequence, in a chain."""
    for trail in facts.trails:
        for node in trail.nodes:
            source = facts.operand(node, "self")
            if node.base_op not in ("aten.slice", "aten.narrow") or source is None:
                continue
            table = facts.base(source)
            while table is not None and table.base_op in _CUTS:
                table = facts.base(facts.operand(table, "self"))
            dim, meta = node.args.get("dim", 0), node.tensor
            along = isinstance(dim, int) and meta is not None and meta.shape[dim] in facts.lengths
            if along and facts.is_table(table, *kinds):
                yield node, source


def _slice(facts: Facts) -> bool:
    return any(True for _ in _sliced(facts, _STATIC))


def _offset(facts: Facts) -> bool:
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


def _index(facts: Facts) -> bool:
    """A buffer's rows by an index made of positions, the user's included."""
    for node, source, indices in facts.lookups():
        positional = any(facts.from_index(index.name) for index in indices)
        if positional and facts.is_table(source, *_STATIC) and facts.spans(node) < 2:
            return True
    return False


def _full(facts: Facts) -> bool:
    """A table of the sequence's own length that no read op takes rows of."""
    for trail in facts.trails:
        cut = [facts.base(facts.operand(n, "self", "weight")) for n in trail.nodes if n.base_op in (*_CUTS, *_LOOKUPS)]
        names = {table.name for table in cut if table is not None}
        for table in trail.nodes:
            if facts.is_table(table, *StateKind) and facts.spans(table) and table.name not in names:
                return True
    return False


def _computed(facts: Facts) -> bool:
    return any(_is_computed(facts, node) for node in facts.live if node.base_op in _WAVES)


def _is_computed(facts: Facts, wave: Node) -> bool:
    if Dep.DATA in facts.deps[wave.name]:
        return False
    products = (node for node in facts.chain(wave.name) if node.base_op in _PRODUCTS)
    return any(facts.from_index(node.name) for node in products)


def _learned(facts: Facts) -> bool:
    """Rows of a parameter: by a cut, by an index along one axis, or as it is."""
    if any(True for _ in _sliced(facts, (StateKind.PARAMETER,))):
        return True
    chains = {node.name for trail in facts.trails for node in trail.nodes} | {read.node for read in facts.reads}
    for node, source, indices in facts.lookups():
        along = all(facts.spans(index) == 1 and facts.is_position(index) for index in indices)
        if along and node.name in chains and facts.is_table(source, StateKind.PARAMETER):
            return True
    return any(facts.is_table(trail.value, StateKind.PARAMETER) and facts.spans(trail.value) for trail in facts.trails)


def _position_ids(facts: Facts) -> bool:
    """A row of integers in a buffer, that a lookup takes as its index."""
    for _, _, indices in facts.lookups():
        for index in indices:
            for node in facts.chain(index.name):
                meta = node.tensor
                plain = meta is not None and not meta.is_floating and sum(size != 1 for size in meta.shape) == 1
                if plain and facts.is_table(node, StateKind.BUFFER) and any(t.value for t in facts.trails):
                    return True
    return False


def _equal(facts: Facts) -> bool:
    """A table that is read under several names: aliases of one storage, or equal contents in several buffers."""
    nodes = {node.name: node for trail in facts.trails for node in trail.nodes if facts.is_table(node, *_STATIC)}
    tables = {name: node for name, node in nodes.items() if node.tensor and node.tensor.shape}
    contents = [node.content for node in tables.values() if node.content]
    return any(node.aliases for node in tables.values()) or len(set(contents)) < len(contents)


# Biases and masks ---------------------------------------------------------------------------------------


def _relative(facts: Facts) -> bool:
    """A lookup by an index that varies along rows and columns."""
    return any(any(facts.spans(index) > 1 for index in indices) for _, _, indices in facts.lookups())


def _alibi(facts: Facts) -> bool:
    """Scores plus positions times one slope a head: a product of an index and of something without rows."""
    for trail in facts.trails:
        if not trail.keys or trail.has(*_WAVES) or not _is_float(trail.value):
            continue
        for node in trail.nodes:
            names = [name for name in node.refs() if facts.record.nodes[name].tensor]
            if node.base_op not in _PRODUCTS or len(names) != 2 or not _is_float(node):
                continue
            rows = [facts.from_index(name) and facts.spans(facts.record.nodes[name]) > 0 for name in names]
            slopes = [name for name, row in zip(names, rows, strict=True) if not row]
            if len(slopes) == 1 and _numel(facts.record.nodes[slopes[0]]) != 1:
                return True
    return False


def _is_float(node: Node) -> bool:
    return node.tensor is not None and node.tensor.is_floating


def _numel(node: Node) -> int:
    return sum(size != 1 for size in node.tensor.shape) + 1 if node.tensor else 1


def _comparisons(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is compared of rows and columns in a chain or in a body of flex attention: each side, as ``_side`` says."""
    distances = (index for _, _, indices in facts.lookups() for index in indices if facts.spans(index) > 1)
    buckets = {name for index in distances for name in facts.above(index.name)}
    for trail in facts.trails:
        for node in trail.nodes if trail.keys else ():
            if node.name in buckets:
                continue
            if node.base_op in (*_ORDERS, "aten.eq"):
                left, right = facts.operand(node, "self"), facts.operand(node, "other")
                ends = [_side(facts, end) if end is not None else "number" for end in (left, right)]
                if all(ends) and (facts.spans(node) > 1 or "number" in ends):
                    yield ends[0] + node.base_op[4:], ends[1]
            elif node.base_op in ("aten.tril", "aten.triu"):
                diagonal = node.args.get("diagonal", 0)
                yield ("shifted" if isinstance(diagonal, int) and abs(diagonal) > 1 else "index") + "lt", "index"
    for plan in facts.plan.flex:
        for body in plan.bodies:
            yield from _body_comparisons(facts.record.bodies[body.body], {body.indices["q"], body.indices["kv"]})


def _body_comparisons(body: GraphRecord, ends: set[str]) -> Iterator[tuple[str, str]]:
    """The same of one body of flex attention, whose rows and columns are the placeholders ``ends``."""
    sides: dict[str, str] = {}
    for node in body.nodes.values():
        above = [sides[name] for name in node.refs() if name in sides]
        if node.base_op in _ORDERS and len(above) == 2:
            yield above[0] + node.base_op[4:], above[1]
        elif node.base_op in _ORDERS and above == ["distance"]:
            yield "distance" + node.base_op[4:], "number"
        elif node.name in ends:
            sides[node.name] = "index"
        elif node.base_op in _SUMS and above:
            moved = "shifted" if node.args.get("other") != 0 else above[0]
            sides[node.name] = "distance" if len(above) > 1 else moved
        elif above and (is_view(node) or node.base_op in _LOOKUPS):
            sides[node.name] = above[0]


def _side(facts: Facts, node: Node) -> str:
    """``"index"`` (rows or columns as they are), ``"shifted"``, ``"chunk"``, ``"distance"``; ``""`` if none of them."""
    found = "index"
    while True:
        if node.base_op in INDICES or (node.kind is NodeKind.INPUT and is_positions(node)):
            return found
        if node.base_op in _SUMS:
            left, right = facts.operand(node, "self"), facts.operand(node, "other")
            if left is not None and right is not None and left.tensor and right.tensor:
                if facts.spans(node) > 1:
                    return "distance"
                ends = [end for end in (left, right) if facts.spans(end)]
                if len(ends) != 1:
                    return ""
                node = ends[0]
                continue
            number = node.args.get("other")
            if number != 0 and not isinstance(number, Ref):
                found = "shifted"
        elif node.base_op in _DIVISIONS:
            found = "chunk"
        elif node.base_op in _LOOKUPS:  # position ids at an index
            if facts.is_table(facts.operand(node, "self", "weight"), *StateKind):
                return ""
        elif not is_view(node) and node.base_op not in ("aten.repeat", "aten.abs", "aten.neg"):
            return ""
        above = facts.operand(node, "self", "input")
        if above is None:
            return ""
        node = above


def _causal(facts: Facts) -> bool:
    """Rows and columns are compared as they are; or their distance with zero."""
    pairs = set(_comparisons(facts))
    orders = {(left, right) for left, right in pairs if not left.endswith("eq")}
    return any(left.startswith("index") and right == "index" for left, right in orders)


def _window(facts: Facts) -> bool:
    """Rows and columns are compared a number apart, or by chunks; or a mask's rows are written one by one."""
    for left, right in _comparisons(facts):
        if left.startswith(("shifted", "chunk")) or right in ("shifted", "chunk"):
            return True
        if left.startswith("distance") and right == "number" and not left.endswith("eq"):
            return True
    rows = min((length for length in facts.lengths if isinstance(length, int)), default=0)
    writes = (sum(node.op.partition(".")[2].startswith(_WRITES) for node in trail.nodes) for trail in facts.trails)
    return bool(rows) and any(count >= rows for count in writes)


def _is_documents(facts: Facts, cumsum: Node) -> bool:
    """Whether a cumsum counts the places where two neighbours differ by something else than one."""
    nodes = list(facts.chain(cumsum.name))
    neighbours = any(node.base_op in ("aten.diff", "aten.ne") for node in nodes)
    return neighbours and any(node.base_op in ("aten.diff", "aten.sub") for node in nodes)


def _sums(facts: Facts) -> Iterator[Node]:
    seen: set[str] = set()
    for trail in facts.trails:
        for node in trail.nodes:
            if node.base_op == "aten.cumsum" and node.name not in seen:
                seen.add(node.name)
                yield node


def _documents(facts: Facts) -> bool:
    return any(_is_documents(facts, node) for node in _sums(facts))


def _cumsum_ones(facts: Facts) -> bool:
    return any(not _is_documents(facts, n) and Dep.USER not in facts.deps[n.name] for n in _sums(facts))


def _cumsum_data(facts: Facts) -> bool:
    """A hoisted cumsum that is no document detection (in the chain of a read, or of a lookup that is one)."""
    return any(not _is_documents(facts, n) and Dep.USER in facts.deps[n.name] for n in _sums(facts))


def _padding(facts: Facts) -> bool:
    """Keys read a user's input, other than through the detection of documents; or the input itself is for keys."""
    ids = {node.name for node in facts.record.inputs() if is_positions(node)}
    if any(role == COL for axes in facts.plan.report.inputs if len(axes.seq_dims) == 1 for *_, role in axes.seq_dims):
        return True
    users = {node.name for node in facts.record.inputs()} - ids
    return any(trail.keys and any(node.name in users for node in trail.nodes) for trail in facts.trails)


def _mask_table(facts: Facts) -> bool:
    """Rows and columns of one buffer: a square table, not of indices."""
    for trail in facts.trails:
        for node in trail.nodes if trail.keys else ():
            meta = node.tensor
            if facts.is_table(node, *_STATIC) and isinstance(meta, TensorMeta) and meta.dtype != "int64":
                sizes = [size for size in meta.shape if size != 1]
                if len(sizes) != len(set(sizes)):
                    return True
    return False


# The rest -----------------------------------------------------------------------------------------------


def _length(facts: Facts) -> bool:
    """A number made from the length enters a chain or data, or the largest position of a sequence does."""
    numbers = {name for name, node in facts.record.nodes.items() if isinstance(node.meta, ScalarMeta)}
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    for node in facts.live:
        reads = node.name in chains or Dep.DATA in facts.deps[node.name]
        if node.tensor is None or not reads or node.base_op in _CUTS:
            continue
        if any(name in numbers and Dep.LENGTH in facts.deps[name] for _, name in length_operands(node)):
            return True
        largest = node.base_op in ("aten.max", "aten.amax") and not facts.spans(node)
        if largest and node.name in chains and facts.from_index(node.name):
            return True
    return False


def _scale(facts: Facts) -> bool:
    """A factor for each token: a logarithm or a power of its position."""
    for trail in facts.trails:
        logs = [node for node in trail.nodes if node.base_op in ("aten.log", "aten.log1p", "aten.pow")]
        if trail.two_axes or not _is_float(trail.value) or "mul" not in trail.read.op:
            continue
        if any(facts.from_index(node.name) and facts.spans(node) for node in logs):
            return True
    return False


def _hop(facts: Facts) -> bool:
    prefixes = tuple(f"{name}_" for name in facts.inlined)
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    return any(name.startswith(prefixes) for name in chains) if prefixes else False


def _hop_consumer(facts: Facts) -> bool:
    prefixes = tuple(f"{name}_" for name in facts.inlined)
    return any(trail.read.node.startswith(prefixes) for trail in facts.trails) if prefixes else False


def _written(facts: Facts) -> bool:
    """A write in place to a value of a chain, or of one, with nothing of data in it."""
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    for operands in facts.written:
        known = [names & facts.record.nodes.keys() for names in operands]
        data = any(Dep.DATA in facts.deps[name] for names in known for name in names)
        if not data and any(names & chains for names in known):
            return True
    return False


def _layout(facts: Facts) -> bool:
    """Positions with a dim that folds the batch with another, a sequence in front of the batch, or no batch at all."""
    batches = {f.size for labels in facts.inputs.values() for dim in labels for f in dim if f.axis == BATCH}
    if not batches:
        return bool(facts.axes)
    for node in facts.live:
        above = facts.operand(node, "self")
        if not is_view(node) or Dep.DATA in facts.deps[node.name] or not node.tensor or not above or not above.tensor:
            continue
        pairs = zip(above.tensor.shape, above.tensor.shape[1:], strict=False)
        folded = {multiply(left, right) for left, right in pairs if left in batches and right != 1}
        if folded & set(node.tensor.shape) - set(above.tensor.shape) and facts.from_index(node.name):
            return True
    for edge in facts.plan.frontier:
        batch = [d for d, dim in enumerate(edge.labels) if any(f.axis == BATCH for f in dim)]
        seq = [d for d, dim in enumerate(edge.labels) if any(f.is_seq for f in dim)]
        if batch and seq and seq[0] < batch[0]:
            return True
    return False


def _labels(facts: Facts) -> bool:
    return any(
        node.kind is NodeKind.INPUT and node.fqn == "labels"
        for trail in facts.trails
        if trail.read.code == "BL005"
        for node in trail.nodes
    )


def _distractor(facts: Facts) -> bool:
    """A value of the sequence's length meets data and is no read."""
    read = {(trail.read.node, trail.read.operand) for trail in facts.trails}
    symbols = {atom for length in facts.lengths for atom in atoms(length)}
    for node in facts.live:
        if Dep.DATA not in facts.deps[node.name]:
            continue
        for path, name in node.named_refs():
            value = facts.record.nodes[name]
            if facts.deps[name] & (Dep.USER | Dep.DATA) or (node.name, path) in read or value.tensor is None:
                continue
            if any(size in facts.lengths or atoms(size) & symbols for size in value.tensor.shape):
                return True
    return False


def _user_positions(facts: Facts) -> bool:
    return any(is_positions(node) for node in facts.record.inputs() if node.name in facts.record.live())


@dataclass(frozen=True)
class Pattern:
    """A class of position reads: what it is, and the condition that it occurs."""

    meaning: str
    occurs: Callable[[Facts], bool]


#: The pattern classes of position reads; each occurs in at least three entries.
PATTERNS = {
    "slice": Pattern("rows of a buffer or constant read by slice or narrow", _slice),
    "offset": Pattern("a slice that starts elsewhere than at row 0 (right-aligned, an expression)", _offset),
    "index": Pattern("rows of a buffer read by index, index_select, gather or embedding", _index),
    "full": Pattern("a table read at full length, with no op left", _full),
    "computed": Pattern("a table computed in the graph: arange x inv_freq", _computed),
    "learned": Pattern("a learned table (parameter) read by position", _learned),
    "relative": Pattern("relative bias or relative embedding by distance of row and column", _relative),
    "alibi": Pattern("ALiBi", _alibi),
    "cumsum_ones": Pattern("positions from a cumsum of ones", _cumsum_ones),
    "cumsum_data": Pattern("positions from a cumsum over user data (hoisted)", _cumsum_data),
    "length": Pattern("a number made from the sequence length in a value", _length),
    "scale": Pattern("a scale made from positions", _scale),
    "position_ids_buffer": Pattern("an integer buffer of position ids", _position_ids),
    "user_positions": Pattern("positions passed by the user", _user_positions),
    "hop": Pattern("a chain inside a wrap_* higher-order op", _hop),
    "hop_consumer": Pattern("a chain inside a wrap_* higher-order op, and its consumer too", _hop_consumer),
    "mask_causal": Pattern("a causal mask computed in the graph", _causal),
    "mask_window": Pattern("a sliding-window or chunked mask", _window),
    "mask_documents": Pattern("packed-document detection from position ids", _documents),
    "mask_padding": Pattern("a padding mask of the user, read by keys", _padding),
    "mask_table": Pattern("rows and columns of a mask buffer", _mask_table),
    "is_causal": Pattern(
        "sdpa(is_causal=True)", lambda facts: any(r.source_kind == "is_causal" for r in facts.plan.report.reads)
    ),
    "flex": Pattern(
        "flex_attention whose mask_mod or score_mod reads positions",
        lambda facts: any(node.base_op == FLEX_ATTENTION for node in facts.live),
    ),
    "written": Pattern("a table or mask written in place", _written),
    "layout": Pattern("sequence-first, [B*H, 1, S] or flat [T] layout", _layout),
    "equal_buffers": Pattern("aliased FQNs, or buffers of equal content in every layer", _equal),
    "labels": Pattern("the label shift in front of a loss in the graph", _labels),
    "routing": Pattern(
        "mixture-of-experts routing over flattened tokens",
        lambda facts: any("routed to experts" in mix.reason for mix in facts.plan.report.mixing),
    ),
    "two_axes": Pattern("two sequence axes (encoder-decoder)", lambda facts: len(facts.axes) > 1),
    "distractor": Pattern("sequence-sized values that are not positions", _distractor),
    "mixing": Pattern(
        "an op that mixes the sequence: a finding",
        lambda facts: any(not mix.handled for mix in facts.plan.report.mixing),
    ),
}


def occurring(facts: Facts) -> tuple[str, ...]:
    """The names of the classes that occur in a program."""
    return tuple(name for name, pattern in PATTERNS.items() if pattern.occurs(facts))
