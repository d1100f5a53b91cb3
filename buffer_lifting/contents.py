"""What the contents of position values are: tables, indices, lengths, what is equal, what comes from where.

The planner asks; nothing is rebuilt or cut here.
"""

from __future__ import annotations

from buffer_lifting.axes import InputLabels
from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind
from buffer_lifting.graph.sizes import Expr, Size, atoms, symbols
from buffer_lifting.labels import Labels, has_seq
from buffer_lifting.ops import INDICES, content_operands
from buffer_lifting.variation import Variation

#: Arguments that decide how many elements a result has, and nothing of what they are.
_SIZES = frozenset(
    {"size", "sizes", "shape", "end", "length", "repeats", "split_size", "split_sizes", "sections", "chunks"}
    | {"output_size", "normalized_shape", "stride", "implicit"}
)


class Contents:
    """Questions about the values of one record; answers that take a walk are kept."""

    def __init__(self, record: GraphRecord, deps: dict[str, Dep], inputs: InputLabels) -> None:
        self.record, self.deps, self.inputs = record, deps, inputs
        self.variation = Variation(record)
        self._numbers: dict[str, str] = {}
        self._interned: dict[object, int] = {}
        self._tables: dict[str, bool] = {}
        self._ancestors: dict[str, frozenset[str]] = {}
        self._length_atoms = frozenset(a for size in inputs.lengths.values() for a in atoms(size))

    # -- sizes and axes ---------------------------------------------------------------------------------------

    def fixed_batch(self) -> int | None:
        """The batch size of a static program."""
        return self.inputs.batch if isinstance(self.inputs.batch, int) else None

    def axis_of(self, size: Size) -> str | None:
        """The sequence axis that has this size, if exactly one has."""
        axes = [axis for axis, length in self.inputs.lengths.items() if size == length]
        return axes[0] if len(axes) == 1 else None

    def keys_axis(self, size: Size) -> str | None:
        """The sequence axis of which this is the length of a rank's part or, by the inputs, that of all ranks' keys."""
        labels = [dim for own in self.inputs.labels.values() for dim in own]
        axes = {factor.axis for dim in labels for factor in dim if factor.is_seq and factor.size == size}
        return self.axis_of(size) or (axes.pop() if len(axes) == 1 else None)

    def is_length_of_sequence(self, name: str) -> bool:
        """Whether a symbolic number is made from a sequence length."""
        meta = self.record.nodes[name].meta
        if not isinstance(meta, ScalarMeta):
            return False
        if meta.size is not None:
            return bool(symbols(meta.size) & self._length_atoms)
        return any(self.is_length_of_sequence(operand) for operand in self.record.nodes[name].refs())

    def counts_samples(self, name: str) -> bool:
        """Whether the contents of a value are made from the batch size as a number (a dynamic one)."""
        batch = atoms(self.inputs.batch) if isinstance(self.inputs.batch, Expr) else frozenset()
        if not batch:
            return False
        for node in (self.record.nodes[ancestor] for ancestor in self.ancestors(name)):
            if node.tensor is not None and any(
                path.split(".")[0] not in _SIZES and self._is_made_from(ref, batch) for path, ref in node.named_refs()
            ):
                return True
        return False

    def _is_made_from(self, name: str, names: frozenset[str]) -> bool:
        """Whether a symbolic number is made from one of some symbols."""
        node = self.record.nodes[name]
        if not isinstance(node.meta, ScalarMeta):
            return False
        if node.meta.size is not None:
            return not names.isdisjoint(symbols(node.meta.size))
        return any(self._is_made_from(operand, names) for operand in node.refs())

    def varies_along(self, name: str, labels: Labels) -> bool:
        """Whether a value can differ along one of the sequence dims of ``labels``."""
        return any(flag and has_seq(dim) for flag, dim in zip(self.variation.of(name), labels, strict=True))

    def has_rows(self, name: str) -> bool:
        """Whether a value of state has the length of a sequence because rows are read, not as a number of features."""
        meta = self.record.nodes[name].tensor
        sizes = {size for size in meta.shape if self.axis_of(size) is not None} if meta is not None else set()
        if not all(isinstance(size, int) for size in sizes):
            return True
        return not sizes & self.inputs.features and any(self._cuts(each, sizes) for each in self.ancestors(name))

    def _cuts(self, name: str, sizes: set[Size]) -> bool:
        """Whether an op cuts a dim to one of some sizes."""
        node = self.record.nodes[name]
        source = node.args.get("self")
        if node.base_op not in ("aten.slice", "aten.narrow") or not isinstance(source, Ref) or node.tensor is None:
            return False
        before = self.record.nodes[source.name].tensor
        both = zip(node.tensor.shape, before.shape, strict=True) if before is not None else ()
        return any(size != old and size in sizes for size, old in both)

    # -- what a value holds -----------------------------------------------------------------------------------

    def is_table(self, name: str) -> bool:
        """Whether a value is made from state alone, so that its rows are positions whatever the sequence."""
        if name not in self._tables:
            node, dep = self.record.nodes[name], self.deps[name]
            shape = node.tensor.shape if node.tensor else ()
            fixed = not dep & (Dep.USER | Dep.DATA | Dep.RANDOM | Dep.LENGTH)
            fixed = fixed and not any(symbols(size) & self._length_atoms for size in shape)
            self._tables[name] = fixed and not (Dep.IOTA in dep and self._counts_the_sequence(name))
        return self._tables[name]

    def is_table_along(self, name: str, dim: int) -> bool:
        """Whether a value is a table along ``dim``; it may be repeated along other dims, for the batch say."""
        node = self.record.nodes[name]
        if self.is_table(name):
            return True
        source = node.args.get("self")
        if node.base_op not in ("aten.expand", "aten.expand_as", "aten.unsqueeze") or not isinstance(source, Ref):
            return False
        meta = self.record.nodes[source.name].tensor
        if meta is None or node.tensor is None:
            return False
        if node.base_op == "aten.unsqueeze":
            added = int(node.args["dim"]) % len(node.tensor.shape)  # type: ignore[arg-type]
            return added != dim and self.is_table_along(source.name, dim - (added < dim))
        below = dim - (len(node.tensor.shape) - len(meta.shape))
        return below >= 0 and meta.shape[below] == node.tensor.shape[dim] and self.is_table_along(source.name, below)

    def is_fixed_along(self, name: str, dim: int) -> bool:
        """Whether a value has, along ``dim``, a table's rows and not the sequence."""
        node = self.record.nodes[name]
        source = node.args.get("self")
        if self.is_table(name):
            return True
        if node.tensor is None or not isinstance(node.tensor.shape[dim], int) or not isinstance(source, Ref):
            return False
        if self.axis_of(node.tensor.shape[dim]) is not None:
            return False
        if node.base_op == "aten.index_select":
            return node.args["dim"] != dim and self.is_fixed_along(source.name, dim)
        indices = node.args.get("indices")
        if node.base_op == "aten.index" and isinstance(indices, tuple) and len(indices) == 1:
            added = len(node.tensor.shape) - len(self.record.nodes[source.name].tensor.shape)  # type: ignore[union-attr]
            return dim > added and self.is_fixed_along(source.name, dim - added)
        return False

    def _counts_the_sequence(self, name: str) -> bool:
        """Whether a value is computed from an arange as long as a sequence (or one whose length is not known)."""
        lengths = set(self.inputs.lengths.values())
        indices = [self.record.nodes[a] for a in self.ancestors(name) if self.record.nodes[a].base_op in INDICES]
        sizes = [size for node in indices for size in (node.tensor.shape if node.tensor else (None,))]
        return any(not isinstance(size, int) or size in lengths for size in sizes)

    def is_iota(self, name: str) -> bool:
        """Whether a value is ``0, 1, 2, ...`` along the sequence."""
        node = self.record.nodes[name]
        if node.base_op == "aten.add" and node.args.get("other") == 0 and isinstance(node.args.get("self"), Ref):
            return self.is_iota(node.args["self"].name)  # type: ignore[union-attr]
        if node.base_op in ("aten.unsqueeze", "aten.expand", "aten.alias", "aten.detach", "aten.view"):
            source = node.args.get("self")
            if not isinstance(source, Ref) or not self.is_iota(source.name):
                return False
            return node.base_op != "aten.view" or self._long_dims(node) == self._long_dims(
                self.record.nodes[source.name]
            )
        if node.base_op != "aten.arange" or node.tensor is None or node.tensor.dtype != "int64":
            return False
        return node.args.get("start", 0) in (0, None) and node.args.get("step", 1) in (1, None)

    @staticmethod
    def _long_dims(node: Node) -> list[Size]:
        return [size for size in node.tensor.shape if size != 1] if node.tensor else []

    # -- which values are equal -------------------------------------------------------------------------------

    def number(self, name: str) -> str:
        """A value number: equal for nodes that compute the same from the same state."""
        if name in self._numbers:
            return self._numbers[name]
        stack = [name]
        while stack:
            current = stack[-1]
            node = self.record.nodes[current]
            missing = [ref for ref in node.refs() if ref not in self._numbers]
            if missing and current not in self._numbers:
                stack.extend(missing)
                continue
            stack.pop()
            if current not in self._numbers:
                self._numbers[current] = self._number_of(node)
        return self._numbers[name]

    def _number_of(self, node: Node) -> str:
        key: object
        if node.kind is NodeKind.STATE:
            key = ("state", node.content or node.fqn)
        elif node.kind is NodeKind.INPUT or self.deps[node.name] & Dep.RANDOM:
            key = ("node", node.name)
        else:
            key = (node.op, self._frozen(tuple(node.args.items())))
        return f"v{self._interned.setdefault(key, len(self._interned))}"

    def _frozen(self, arg: object) -> object:
        if isinstance(arg, Ref):
            return ("ref", self._numbers[arg.name])
        if isinstance(arg, tuple):
            return tuple(self._frozen(item) for item in arg)
        return (type(arg).__name__, arg)

    # -- what a value is computed from ------------------------------------------------------------------------

    def ancestors(self, name: str) -> frozenset[str]:
        """All nodes whose contents a position value is computed from, itself included."""
        if name not in self._ancestors:
            seen: set[str] = set()
            stack = [name]
            while stack:
                current = stack.pop()
                if current not in seen:
                    seen.add(current)
                    stack.extend(content_operands(self.record.nodes[current]))
            self._ancestors[name] = frozenset(seen)
        return self._ancestors[name]

    def sources_of(self, name: str) -> tuple[str, ...]:
        """Everything that a position value is made from, sorted: state with elements, inputs; else its one source."""
        own = Dep.USER in self.deps[name]
        found = {self.source_of(name)[1]}
        for node in (self.record.nodes[ancestor] for ancestor in self.ancestors(name)):
            told = own if node.kind is NodeKind.INPUT else node.kind is NodeKind.STATE and not node.uniform
            if told and node.tensor is not None and node.tensor.shape:
                found.add(node.fqn)
        return tuple(sorted(found))

    def source_of(self, name: str) -> tuple[str, str, tuple[str, ...]]:
        """Kind, name and aliases of what a position value comes from: parameter, then state, input, iota."""
        nodes = [self.record.nodes[ancestor] for ancestor in sorted(self.ancestors(name))]
        for kind in (StateKind.PARAMETER, StateKind.BUFFER, StateKind.CONSTANT):
            for node in nodes:
                if node.state_kind is kind and node.tensor is not None and node.tensor.shape:  # a number has no rows
                    return kind.value, node.fqn, node.aliases
        for node in nodes:
            if node.kind is NodeKind.INPUT and Dep.USER in self.deps[name]:
                return "input", node.fqn, ()
        for node in nodes:
            if node.base_op == "aten.arange":
                return "iota", "aten.arange", ()
        return "length", "sym_size", ()
