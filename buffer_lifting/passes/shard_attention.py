"""Makes a graph whose attention sees the keys of all ranks: gathers, and the sizes that follow from them.

A rank has ``S / size`` rows of each sequence. What runs along the keys has ``S`` columns: the lifted inputs of role
``col`` from the feed, data by a gather. The labels of every value tell which of its dims are which, so each size
argument of a view is what its labels say, and every value is checked against them: a value that has the rows of one
rank where its reader wants the columns of all cannot pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.graph.record import GraphRecord, TensorMeta
from buffer_lifting.graph.sizes import Size, add, multiply, product, rename
from buffer_lifting.keys import CODE, Gather, KeyPlan
from buffer_lifting.labels import BATCH, COL, KEYS, ROW, DimLabel, Factor, Labels, has_seq
from buffer_lifting.passes.base import GraphPass, PassResult, check_topology
from buffer_lifting.passes.broadcast_batch import root_stack
from buffer_lifting.passes.collectives import Emit, Exchange, gather_dim
from buffer_lifting.passes.fakes import Fakes, same_layout
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import InputAxes
from buffer_lifting.torch_compat import fake_mode_of, replace_operands, schema_args, size_of

_COPIED = ("stack_trace", "nn_module_stack", "torch_fn", "custom", "source_fn_stack")
#: The argument of each op that lists the sizes of its result.
_SIZED = {"aten.view": "size", "aten.reshape": "shape", "aten._unsafe_view": "size", "aten.expand": "size"}


@dataclass
class ShardState:
    """A graph that may be edited, its analysis, and for how many ranks it is made."""

    graph: Graph
    record: GraphRecord
    plan: LiftPlan
    keys: KeyPlan
    size: int
    mesh_dim: str
    exchange: Exchange  # emits what takes the place of the attention that the key plan names


class ShardAttention(GraphPass[ShardState]):
    """Gathers keys and values, and gives every value along them the size of the whole sequence."""

    name = "shard_attention"

    def requires(self, state: ShardState) -> None:
        """The plan names nodes of the graph, and every axis is dynamic."""
        names = {node.name for node in state.graph.nodes}
        assert all(gather.value in names for gather in state.keys.gathers)
        fixed = sorted(axis for axis, length in state.plan.lengths.items() if isinstance(length, int))
        if fixed:
            raise UnsupportedReadError(
                f"the program was exported with a static sequence (axis {fixed[0]!r}, "
                f"{state.plan.lengths[fixed[0]]} tokens), which fits one rank only; export with a dynamic sequence dim "
                "(torch.export.Dim) to run it on more"
            )

    def call(self, state: ShardState) -> PassResult[ShardState]:
        """Edits the graph and its fake values in one walk."""
        _Sharding(state).run()
        return PassResult(state, True)

    def ensures(self, result: PassResult[ShardState]) -> None:
        """Nodes are in order."""
        check_topology(result.state.graph)


class _Sharding:
    def __init__(self, state: ShardState) -> None:
        self.state, self.graph, self.record = state, state.graph, state.record
        self.labels = state.keys.labels
        self.nodes = {node.name: node for node in state.graph.nodes}
        self.fakes = Fakes(state.graph)
        self.changed: set[Node] = set()
        self.canonical: dict[str, Size] = {}
        placeholders = [node for node in state.graph.nodes if node.op == "placeholder"]
        self.last = placeholders[-1]
        self.stack = root_stack(state.graph)
        self._sizes: dict[tuple[str, str], Node] = {}
        for node in placeholders:
            self._note_symbols(node)
        if self.canonical:
            self._unify(placeholders)

    def run(self) -> None:
        """Placeholders first, then gathers, then every node in order."""
        for axes in self.state.plan.input_axes.values():
            self._widen_input(axes)
        gathers: dict[str, list[Gather]] = {}
        for gather in self.state.keys.gathers:
            gathers[gather.value] = [*gathers.get(gather.value, []), gather]
        for node in list(self.graph.nodes):
            if node.name in self.state.keys.exchanges:
                self._fix_operands(node)
                self._exchange(node)
            elif node.op == "call_function":
                self._visit(node)
            for gather in gathers.get(node.name, []):
                self._gather(node, gather.dim, set(gather.below), gather.readers)

    # -- sizes ----------------------------------------------------------------------------------------------

    def _note_symbols(self, node: Node) -> None:
        """The record unifies symbols that stand for one axis; the fakes keep those of the export."""
        value, meta = node.meta.get("val"), self.record.nodes[node.name].tensor
        if isinstance(value, torch.Tensor) and meta is not None:
            for raw, size in zip(value.shape, meta.shape, strict=True):
                raw_size = size_of(raw, self.record.ranges)
                if raw_size != size:
                    self.canonical[str(raw_size)] = size

    def _unify(self, placeholders: list[Node]) -> None:
        """Gives each input the symbols of the record: with two symbols for one axis, an op would equate them itself."""
        symbols: dict[Size, Any] = {}
        for node in placeholders:
            for raw in getattr(node.meta.get("val"), "shape", ()):
                symbols.setdefault(size_of(raw, self.record.ranges), raw)
        for node in placeholders:
            value, meta = node.meta.get("val"), self.record.nodes[node.name].tensor
            if not isinstance(value, torch.Tensor) or meta is None:
                continue
            own = [size_of(raw, self.record.ranges) for raw in value.shape]
            sizes = [symbols.get(size, raw) for raw, size in zip(value.shape, meta.shape, strict=True)]
            if own != [size_of(size, self.record.ranges) for size in sizes]:
                with fake_mode_of(value):
                    node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
                self.changed.add(node)

    def _widen_input(self, axes: InputAxes) -> None:
        """Gives the column dims of an input the size of the whole sequence."""
        columns = [(dim, axis) for dim, axis, role in axes.seq_dims if role == COL]
        if not columns:
            return
        node = self.nodes[axes.name]
        value = node.meta["val"]
        sizes = list(value.shape)
        for dim, axis in columns:
            sizes[dim] = self._row_size(axis).meta["val"] * self.state.size
        with fake_mode_of(value):
            node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
        self.changed.add(node)

    def _row_size(self, axis: str) -> Node:
        return self._made(axis, ROW, lambda: self._carrier(axis))

    def _column_size(self, axis: str) -> Node:
        rows = self._row_size(axis)
        return self._made(axis, COL, lambda: (operator.mul, (rows, self.state.size)))

    def _batch_size(self) -> Node:
        return self._made(BATCH, "", lambda: self._carrier(BATCH))

    def _carrier(self, axis: str) -> tuple[Any, tuple[Any, ...]]:
        """The op that reads an axis off a user input that has the rows of this rank."""
        for axes in self.state.plan.input_axes.values():
            if axis == BATCH and axes.batch_dim is not None:
                return torch.ops.aten.sym_size.int, (self.nodes[axes.name], axes.batch_dim)
            for dim, name, role in axes.seq_dims:
                if (name, role) == (axis, ROW):
                    return torch.ops.aten.sym_size.int, (self.nodes[axes.name], dim)
        raise UnsupportedReadError(
            f"no input has the rows of axis {axis!r}: all of them are read by keys, so it cannot be sharded"
        )

    def _made(self, axis: str, role: str, how: Any) -> Node:
        key = (axis, role)
        if key not in self._sizes:
            target, args = how()
            with self.graph.inserting_after(self.last):
                node = self.graph.call_function(target, args)
            node.meta = {"nn_module_stack": self.stack, "val": self.fakes.of(target, args, {})}
            self.last = self._sizes[key] = node
        return self._sizes[key]

    def _size_of_factor(self, factor: Factor) -> Size:
        """The size of a factor on a rank."""
        if factor.is_seq and factor.role in KEYS:
            return add(factor.size, multiply(self.state.size - 1, self.state.plan.lengths[factor.axis]))
        return factor.size

    def _expected(self, dim: DimLabel) -> Size:
        return product(self._size_of_factor(factor) for factor in dim)

    def _actual(self, size: Any) -> Size:
        if isinstance(size, Node):
            size = size.meta["val"]
        return rename(size_of(size, self.record.ranges), self.canonical)

    def _emit_size(self, dim: DimLabel, at: Node) -> Any:
        """An int or a node for the size of a dim."""
        result: Any = 1
        for factor in dim:
            part: Any = factor.size
            if factor.axis == BATCH:
                part = part if isinstance(part, int) else self._batch_size()
            elif factor.is_seq and factor.role in KEYS:
                extra = add(factor.size, multiply(-1, self.state.plan.lengths[factor.axis]))
                part = self._column_size(factor.axis)
                part = part if extra == 0 else self._arithmetic(operator.add, part, self._known(extra, at), at)
            elif factor.is_seq:
                part = self._row_size(factor.axis)
            result = part if result == 1 else self._arithmetic(operator.mul, result, self._known(part, at), at)
        return result

    def _known(self, size: Any, at: Node) -> Any:
        if isinstance(size, int | Node):
            return size
        raise _problem(at, f"a size of it, {size}, is made of dims that no input has")

    def _arithmetic(self, target: Any, left: Any, right: Any, at: Node) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return target(left, right)
        with self.graph.inserting_before(at):
            node = self.graph.call_function(target, (left, right))
        node.meta = {key: at.meta[key] for key in _COPIED if key in at.meta}
        node.meta["val"] = self.fakes.of(target, (left, right), {})
        return node

    # -- the walk -------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        known = self.labels.get(node.name)
        if "_assert_scalar" in str(node.target) and any(n in self.changed for n in node.all_input_nodes):
            self.graph.erase_node(node)
            return
        if known:
            self._fix_sizes(node, known[0])
            self._fix_operands(node)
        if self.canonical or node in self.changed or any(operand in self.changed for operand in node.all_input_nodes):
            self._refake(node)
        if known:
            self._check(node, known)

    def _refake(self, node: Node) -> None:
        try:
            value = self.fakes.of(node.target, node.args, dict(node.kwargs))
        except UnsupportedReadError as error:  # a fake value that would fix a size
            raise _problem(node, str(error).partition(";")[0]) from error
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _problem(node, f"it does not run on a shard: {text}") from error
        if same_layout(value, node.meta.get("val")):
            self.changed.discard(node)  # attention's result is as it was: nothing below it changes
            return
        node.meta["val"] = value
        self.changed.add(node)

    def _fix_sizes(self, node: Node, labels: Labels) -> None:
        """Makes the size arguments of a view what its labels say."""
        record = self.record.nodes.get(node.name)
        base = record.base_op if record else ""
        if base in _SIZED:
            path = _SIZED[base]
            sizes = list(schema_args(node)[path])
            for index, (size, dim) in enumerate(zip(sizes, labels, strict=True)):
                if not _is_minus_one(size) and has_seq(dim) and self._actual(size) != self._expected(dim):
                    sizes[index] = self._emit_size(dim, node)
                    self.changed.add(node)
            node.args, node.kwargs = replace_operands(node, {path: sizes})
        elif base == "aten.slice":
            self._fix_slice(node, labels)

    def _fix_slice(self, node: Node, labels: Labels) -> None:
        """``scores[..., :S]``: the end is what is left of the columns."""
        args = schema_args(node)
        dim = int(args["dim"]) % len(labels)
        end = args["end"]
        if not has_seq(labels[dim]) or not isinstance(end, Node) or self._actual(end) == self._expected(labels[dim]):
            return
        if args["start"] not in (0, None) or args["step"] != 1:
            raise _problem(node, "it slices the keys at an offset")
        node.args, node.kwargs = replace_operands(node, {"end": self._emit_size(labels[dim], node)})
        self.changed.add(node)

    def _fix_operands(self, node: Node) -> None:
        """Operands that are the same at every position (a mask of zeros) get the size of the keys."""
        record = self.record.nodes.get(node.name)
        alignments = self.state.plan.alignments.get(node.name)
        if record is None or alignments is None:
            return
        for path, name in record.named_refs():
            alignment = alignments.get(path)
            if alignment is None or self.labels.get(name) is not None or name not in self.nodes:
                continue
            operand = _operand(node, path)
            value = operand.meta.get("val") if isinstance(operand, Node) else None
            if not isinstance(operand, Node) or not isinstance(value, torch.Tensor):
                continue
            if len(value.shape) != len(alignment.labels):
                continue
            for dim, label in enumerate(alignment.labels):
                size = self._actual(value.shape[dim])
                if not has_seq(label) or size in (1, self._expected(label)):
                    continue
                operand = self._stretch(operand, name, dim, label, node)
                node.args, node.kwargs = replace_operands(node, {path: operand})
                self.changed.add(node)

    def _stretch(self, operand: Node, name: str, dim: int, label: DimLabel, reader: Node) -> Node:
        """One element of a value that is the same along ``dim``, expanded to the size that its reader wants."""
        varies = self.state.plan.varies(name)
        if len(varies) <= dim or varies[dim]:
            raise _problem(reader, f"it reads {name!r} by position, which was not lifted for the keys of all ranks")
        size = self._emit_size(label, reader)
        one = self._insert(reader, torch.ops.aten.slice.Tensor, operand, dim, 0, 1)
        sizes = [size if d == dim else -1 for d in range(len(operand.meta["val"].shape))]
        return self._insert(reader, torch.ops.aten.expand.default, one, sizes)

    def _insert(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: before.meta[key] for key in _COPIED if key in before.meta}
        node.meta["val"] = self.fakes.of(target, args, kwargs)
        return node

    def _gather(self, node: Node, dim: int, below: set[str], readers: tuple[tuple[str, str], ...]) -> None:
        """All ranks' rows of a value, for its readers or for the views between it and them."""
        whole = gather_dim(self._behind(node), node, dim, self.state.size, self.state.mesh_dim)
        self.changed.add(whole)
        if below:
            node.replace_all_uses_with(whole, lambda user: user.name in below)
            return
        for reader, path in readers:
            user = self.nodes[reader]
            user.args, user.kwargs = replace_operands(user, {path: whole})

    def _behind(self, node: Node) -> Emit:
        """Inserts nodes behind ``node``, one behind the other."""
        after = node

        def emit(target: Any, *args: Any, **kwargs: Any) -> Node:
            nonlocal after
            with self.graph.inserting_after(after):
                new = self.graph.call_function(target, args, kwargs)
            new.meta = {key: node.meta[key] for key in _COPIED if key in node.meta}
            new.meta["val"] = self.fakes.of(target, args, kwargs)
            after = new
            return new

        return emit

    def _exchange(self, node: Node) -> None:
        """Puts attention by another strategy in the place of ``node``."""
        mask = schema_args(node)["attn_mask"]
        behind_mask = self._behind(mask) if isinstance(mask, Node) else self._behind(node)
        result = self.state.exchange.attention(partial(self._insert, node), behind_mask, node)
        node.replace_all_uses_with(result)
        self.changed.add(result)
        self.graph.erase_node(node)

    def _check(self, node: Node, known: tuple[Labels, ...]) -> None:
        """Every dim of a value has the size that its labels say."""
        values = node.meta.get("val")
        tensors = [
            v for v in (values if isinstance(values, tuple | list) else (values,)) if isinstance(v, torch.Tensor)
        ]
        before = self.record.nodes[node.name].meta if node.name in self.record.nodes else None
        metas = before if isinstance(before, tuple) else (before,)
        shapes = [meta.shape for meta in metas if isinstance(meta, TensorMeta)]
        for labels, value, old in zip(known, tensors, shapes, strict=False):
            if len(labels) != len(value.shape):
                continue
            for label, size, was in zip(labels, value.shape, old, strict=True):
                if not has_seq(label) or was != product(f.size for f in label):
                    continue  # a dim of size 1 that broadcasts along the sequence
                if self._actual(size) != self._expected(label):
                    raise _problem(
                        node,
                        f"it has {self._actual(size)} elements where the sequence has {self._expected(label)}",
                    )


def _operand(node: Node, path: str) -> Any:
    key, _, index = path.partition(".")
    value = schema_args(node).get(key)
    return value[int(index)] if index and isinstance(value, list | tuple) else value


def _is_minus_one(size: Any) -> bool:
    return isinstance(size, int) and size == -1


def _problem(node: Node, why: str) -> UnsupportedReadError:
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    where = f" [{lines[-1]}]" if lines else ""
    return UnsupportedReadError(
        f"{CODE} node {node.name!r} ({node.target}): under context parallelism {why}{where} -> please report "
        "this model; context_parallel(lifted, size=1) runs it on one rank"
    )
