"""Rebuilds position values from lifted inputs: decides where to cut, and plans what to emit below the cut.

The formulation: a value that varies along one sequence axis, with no parameter above it, may be cut (made an
input). Form ``values`` cuts at the latest computed value, taken up through its views; form ``positions`` cuts as
early as it can. A value along two axes (a mask) is rebuilt from one-axis values. What is not local along the
sequence is cut where that is legal, else refused.
"""

from __future__ import annotations

from dataclasses import replace

from buffer_lifting.axes import InputLabels
from buffer_lifting.contents import Contents
from buffer_lifting.dataflow import Dep
from buffer_lifting.gathering import gather_rows
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, TensorMeta
from buffer_lifting.graph.sizes import multiply
from buffer_lifting.labels import (
    COL,
    Factor,
    Labels,
    batch_dim,
    has_batch,
    has_seq,
    is_labelled,
    seq_axes,
)
from buffer_lifting.local_rules import local
from buffer_lifting.local_rules.core import of_one_sample
from buffer_lifting.ops import INDICES, is_random, is_view
from buffer_lifting.plan import (
    AxisSize,
    Call,
    Context,
    Cut,
    CutKey,
    Existing,
    Lifted,
    Plan,
    Reapply,
    Refuse,
    Trace,
    Value,
    drawn,
)

_MOVED = ("aten.flip", "aten.roll", "aten.embedding")  # of parameters' rows: another index does it, or it is refused


class Planner(Contents):
    """Plans for one record. Memoised, so that what N layers read is planned (and later emitted) once."""

    def __init__(
        self,
        record: GraphRecord,
        deps: dict[str, Dep],
        inputs: InputLabels,
        col_inputs: frozenset[str],
    ) -> None:
        super().__init__(record, deps, inputs)
        self.col_inputs = col_inputs
        self.cuts: dict[CutKey, Cut] = {}
        self.input_roles: dict[str, set[str]] = {}
        self.position_iotas: set[tuple[str, str]] = set()  # (arange, axis) that a one-axis read takes as position ids
        self.trail: list[CutKey] = []  # the cuts that the read being planned has used, for its report
        self.trace = Trace()
        self.batch_sums: dict[str, Value] = {}  # gradient that is summed over the batch -> what it is before the sum
        self.joined: dict[tuple[str, str], Labels] = {}  # operands of masks that follow the positions
        self.natural: set[str] = set()  # rows made of rows of parameters, which stay in natural order in the stage
        self.summed: set[str] = set()  # those, and what is computed from them row by row
        self._memo = self.trace.rebuilt
        self._scalars: dict[str, Plan] = {}
        self._whole: dict[str, Plan] = {}
        self._whole_open: list[str] = []

    # -- what does not follow the shard ---------------------------------------------------------------------

    def scalar(self, name: str) -> Plan:
        """A symbolic number, made from the lengths of the whole sequences (the number of keys), not of the shard."""
        node = self.record.nodes[name]
        if Dep.LENGTH not in self.deps[name]:
            return Existing(name)
        if Dep.USER in self.deps[name] or Dep.DATA in self.deps[name]:
            raise Refuse("a number computed from user inputs", name, "BL104")
        assert isinstance(node.meta, ScalarMeta)
        for axis, length in self.inputs.lengths.items():
            if node.meta.size == length:
                keys = self.iota(Factor(axis, COL, length), Context("slots", "positions"))
                assert isinstance(keys, Lifted)
                size = AxisSize(axis, COL, length if isinstance(length, int) else None, keys.key)
                return self._scalars.setdefault(f"length of {axis}", size)
        for axis, length in self.inputs.lengths.items():
            if node.base_op == "aten.sym_numel" and node.meta.size == multiply(self.inputs.batch or 1, length):
                keys = self.iota(Factor(axis, COL, length), Context("slots", "positions"))
                return self._scalars.setdefault(f"tokens of {axis}", Call("aten.sym_numel.default", (keys,), name))
        if node.op.startswith("sym."):
            parts = [(path, self.scalar(ref)) for path, ref in node.named_refs() if Dep.LENGTH in self.deps[ref]]
            return self._scalars.setdefault(name, Reapply(name, tuple(parts)))
        raise Refuse(f"a number computed from the sequence length by {node.op}", name, "BL104")

    def at_full_length(self, name: str) -> Plan:
        """A value without user contents in natural order, as long as the whole sequence on every rank.

        Raises:
            Refuse: a size on the way is not known to be made from the length.
        """
        if name in self._whole:
            return self._whole[name]
        if len(self._whole_open) > 400:
            raise Refuse("a chain of more than 400 ops", name)
        node = self.record.nodes[name]
        replace: list[tuple[str, object]] = []
        self._whole_open.append(name)
        for path, ref in node.named_refs():
            operand = self.record.nodes[ref]
            if not isinstance(operand.meta, TensorMeta | tuple):
                plan = self.scalar(ref)
            elif Dep.USER in self.deps[ref]:
                raise Refuse("it is computed from user inputs", ref)
            else:
                plan = self.at_full_length(ref)
            if not isinstance(plan, Existing):
                replace.append((path, plan))
        self._whole_open.pop()
        self._whole[name] = Reapply(name, tuple(replace)) if replace else Existing(name)
        return self._whole[name]

    # -- rebuilding -----------------------------------------------------------------------------------------

    def rebuild_read(self, name: str, labels: Labels, context: Context) -> Value:
        """The value of a read: exact if that can be had, else with sums over user inputs up to rounding.

        Raises:
            Refuse: with the reason.
        """
        self.trail.clear()
        try:
            return self.rebuild(name, labels, context)
        except Refuse as refusal:
            if Dep.USER not in self.deps[name]:
                raise
            try:
                return self.rebuild(name, labels, replace(context, rounded=True))
            except Refuse:
                raise refusal from None

    def rebuild(self, name: str, labels: Labels, context: Context, picked: int | None = None) -> Value:
        """The value of node ``name`` with dims ``labels``, made of lifted inputs.

        ``picked`` is a dim of which the reader takes a part, so that its label is empty although it may vary.

        Raises:
            Refuse: with the reason.
        """
        key = (name, labels, context)
        known = self._memo.get(key)
        if known is None:
            start = len(self.trail)
            try:
                value = of_one_sample(self, name, labels, self._rebuild(name, labels, context))
                known = (value, tuple(self.trail[start:]))
            except Refuse as refusal:
                known = refusal
                del self.trail[start:]
            self._memo[key] = known
        elif not isinstance(known, Refuse):
            self.trail.extend(known[1])
        if isinstance(known, Refuse):
            raise known
        return known[0]

    def _rebuild(self, name: str, labels: Labels, context: Context) -> Value:
        node, dep = self.record.nodes[name], self.deps[name]
        if not isinstance(node.meta, TensorMeta):
            if node.kind is NodeKind.OP and isinstance(node.meta, tuple):
                raise Refuse(f"{node.op} has several results", name)
            return Value(Existing(name), False, 0)
        if name in self.batch_sums:
            return self.batch_sums[name]
        if name in self.summed:
            return local(self, node, labels, context)
        if Dep.DATA in dep:
            raise Refuse("it is computed from differentiable data", name, "BL108", "positions must not depend on data")
        follows = any(has_seq(dim) for dim in labels)
        if not dep & (Dep.USER | Dep.LENGTH) and not follows and not any(has_batch(dim) for dim in labels):
            return Value(Existing(name), False, len(labels))
        if Dep.WRITTEN in dep:
            raise drawn(name, labels) if Dep.RANDOM in dep else self._written(node)
        if node.kind is NodeKind.INPUT:
            return self._user_input(node, labels, context)
        if Dep.USER in dep:
            return self._rebuild_user(node, labels, context)
        if not follows:
            return local(self, node, labels, context)
        if node.kind is NodeKind.OP and is_random(node):
            raise drawn(name, labels)
        legal = len(seq_axes(labels)) == 1 and not dep & (Dep.PARAM | Dep.RANDOM)
        refusals: list[Refuse] = []
        climbs = not legal or not self.varies_along(node.name, labels) or self._climbs(node, labels, context)
        for attempt in (self._local, self.cut) if climbs else (self.cut, self._local):
            if attempt == self.cut and not legal:
                continue
            mark = len(self.trail)
            try:
                return attempt(node, labels, context)
            except Refuse as refusal:
                del self.trail[mark:]  # what the refused attempt has used
                refusals.append(refusal)
                self.trace.tried[name, labels, context, attempt.__name__] = refusal
        whole = self.record.nodes[refusals[0].node].base_op not in _MOVED and Dep.RANDOM not in dep
        if whole and Dep.PARAM in dep and len(seq_axes(labels)) == 1:
            value = gather_rows(self, node, labels, context, natural=True)  # its parameters keep their gradient
            self.natural.add(name)
            return value
        raise refusals[0]

    def _local(self, node: Node, labels: Labels, context: Context) -> Value:
        if node.kind is NodeKind.STATE:
            return gather_rows(self, node, labels, context)
        return local(self, node, labels, context)

    def _climbs(self, node: Node, labels: Labels, context: Context) -> bool:
        if context.form == "positions":
            return True
        if not is_view(node) or node.kind is not NodeKind.OP:
            return False
        source = node.args.get("self")
        meta = self.record.nodes[source.name].tensor if isinstance(source, Ref) else None
        if meta is None or node.tensor is None or meta.dtype != node.tensor.dtype:
            return False
        if node.base_op in ("aten.slice", "aten.narrow", "aten.select"):
            dim = int(node.args.get("dim", 0)) % len(meta.shape)  # type: ignore[arg-type]
            if node.base_op != "aten.select" and node.tensor.shape[dim] != meta.shape[dim]:
                return not is_labelled(labels[dim])
        return True

    def _rebuild_user(self, node: Node, labels: Labels, context: Context) -> Value:
        mark = len(self.trail)
        try:
            return local(self, node, labels, context)
        except Refuse as refusal:
            self.trace.tried[node.name, labels, context, "_local"] = refusal
            del self.trail[mark:]  # what the refused attempt has used
            if not context.hoist or refusal.code in ("BL104",):
                raise
            if len(seq_axes(labels)) != 1 or self.deps[node.name] & (Dep.PARAM | Dep.RANDOM):
                raise
            return self.cut(node, labels, context, hoisted=True)

    def _user_input(self, node: Node, labels: Labels, context: Context) -> Value:
        own = self.inputs.labels.get(node.name)
        if own is None:
            raise Refuse(f"the axes of input {node.fqn!r} are not known", node.name, "BL103", "pass axes=")
        wanted, has = _plain(labels), _plain(own)
        if node.name in self.col_inputs:
            has = [(axis, COL if role else role) for axis, role in has]
        roles = self.input_roles.setdefault(node.name, set())
        roles.update(role for _, role in wanted if role)
        if wanted != has:
            if _axes(wanted) == _axes(has) and len([r for _, r in wanted if r]) == 1:
                return self.cut(node, labels, context, hoisted=True)
            if any(role for _, role in has) and not any(role for _, role in wanted):
                why = f"input {node.fqn!r} runs along the sequence, and what is made of it here does not"
                raise Refuse(why, node.name, hint="pass axes= if it does not run along it; index it by token otherwise")
            hint = "pass axes= for it"
            if any(has_batch(dim) and has_seq(dim) for dim in labels):
                hint = "give it as [batch, seq], and fold its dims in the model"
            raise Refuse(f"input {node.fqn!r} is read along other axes than it has", node.name, "BL103", hint)
        batch = batch_dim(own)
        if batch is None:
            return Value(Existing(node.name), False, len(labels))
        return Value(self._own_batch_to_lane(Existing(node.name), batch, len(labels), node.name), True, len(labels))

    @staticmethod
    def _own_batch_to_lane(plan: Plan, batch: int, rank: int, anchor: str) -> Plan:
        if batch == 0:
            return Call("aten.unsqueeze.default", (plan, 1), anchor)
        order = (batch, *(d for d in range(rank) if d != batch))
        moved = Call("aten.permute.default", (plan, order), anchor)
        return Call("aten.unsqueeze.default", (moved, batch + 1), anchor)

    def _written(self, node: Node) -> Refuse:
        for name in sorted(self.ancestors(node.name)):
            state = self.record.nodes[name]
            if state.kind is NodeKind.STATE and state.mutated:
                return Refuse(
                    f"buffer {state.fqn!r} is written by the graph (a cache), so its rows are not fixed",
                    node.name,
                    "BL101",
                    "export the model without its cache (use_cache=False)",
                )
        return Refuse(
            "its storage is written in place by another op of the graph",
            node.name,
            "BL102",
            "build the value out of place in the model, or export after run_decompositions()",
        )

    # -- cutting --------------------------------------------------------------------------------------------

    def iota(self, factor: Factor, context: Context) -> Plan:
        """The lifted index of an axis in a role: ``[batch, seq]``, int64."""
        key = CutKey("iota", factor.axis, factor.role, context.stream, ())
        cut = self.cuts.setdefault(key, Cut(key, None, read_form="positions"))
        cut.one_axis_read |= context.stream == "positions"
        self.trail.append(key)
        return Lifted(key)

    def cut(self, node: Node, labels: Labels, context: Context, hoisted: bool = False) -> Value:
        """Makes a one-axis value a lifted input, and views it back into the value's layout (with a lane)."""
        assert node.tensor is not None
        seq = [d for d, dim in enumerate(labels) if has_seq(dim)]
        batch = batch_dim(labels)
        if len(seq) != 1 or len(labels[seq[0]]) != 1 or (batch is not None and len(labels[batch]) != 1):
            raise Refuse("its sequence dim is folded with other dims", node.name)
        factor = labels[seq[0]][0]
        if node.tensor.shape[seq[0]] != factor.size:
            raise Refuse(
                f"its dim of size {node.tensor.shape[seq[0]]} does not run along the whole sequence", node.name
            )
        if not hoisted and self.counts_samples(node.name):
            why = "it is computed from the batch size as a number, of which a microbatch has a part"
            raise Refuse(why, node.name, hint="compute it without the batch size, or give it to the model as an input")
        number = "iota" if hoisted is False and self.is_iota(node.name) else self.number(node.name)
        drop: list[int] = []
        row: list[int] = []
        for dim, size in enumerate(node.tensor.shape):
            if dim in (seq[0], batch):
                continue
            if size == 1:
                drop.append(dim)
            elif isinstance(size, int):
                row.append(dim)
            else:
                raise Refuse(f"a dim of size {size} is neither batch, sequence nor of fixed size", node.name)
        row_shape = tuple(int(node.tensor.shape[d]) for d in row)  # type: ignore[arg-type]
        stream = "inputs" if hoisted else context.stream
        plan: Plan
        if number == "iota":
            plan = self.iota(factor, context)
            if context.stream == "positions":
                self.position_iotas.update(
                    (a, factor.axis) for a in self.ancestors(node.name) if self.record.nodes[a].base_op == "aten.arange"
                )
        else:
            layout = row_shape
            key = CutKey(number, factor.axis, factor.role, stream, layout)
            if key not in self.cuts:
                self.cuts[key] = Cut(
                    key,
                    node,
                    ancestors=self.ancestors(node.name),
                    dtype=node.tensor.dtype,
                    row_shape=row_shape,
                    seq_dim=seq[0],
                    batch_dim=batch,
                    drop_dims=tuple(drop),
                    hoisted=hoisted,
                    mixes=not hoisted and stream == "slots" and self._mixes(node, labels, context),
                )
            cut = self.cuts[key]
            cut.one_axis_read |= stream == "positions"
            self.trail.append(key)
            plan = Lifted(key)
        ones = drop if batch is None else [*drop, batch]
        return Value(self._restore(plan, node.name, seq[0], row, ones), True, len(labels))

    def _mixes(self, node: Node, labels: Labels, context: Context) -> bool:
        """Whether a value is not, element by element, a function of the index (document ids)."""
        if node.base_op in INDICES:
            return False
        mark = len(self.trail)
        try:
            self._local(node, labels, replace(context, form="positions"))
            return any(self.cuts[key].mixes for key in self.trail[mark:])
        except Refuse:
            return True
        finally:
            del self.trail[mark:]

    @staticmethod
    def _restore(plan: Plan, anchor: str, seq: int, row: list[int], ones: list[int]) -> Plan:
        """``[lane, seq, *row]`` to ``[lane, *dims]``."""
        kept = sorted([seq, *row])
        order = tuple(1 + [seq, *row].index(dim) for dim in kept)
        if order != tuple(range(1, len(order) + 1)):
            plan = Call("aten.permute.default", (plan, (0, *order)), anchor)
        for dim in sorted(ones):
            plan = Call("aten.unsqueeze.default", (plan, dim + 1), anchor)
        return plan


def _plain(labels: Labels) -> list[tuple[str, str]]:
    """Axis and role by dim (``("", "")`` for features), sizes left out."""
    result = []
    for dim in labels:
        factor = next((f for f in dim if f.axis), None)
        result.append((factor.axis, factor.role) if factor else ("", ""))
    return result


def _axes(plain: list[tuple[str, str]]) -> list[str]:
    return [axis for axis, _ in plain]
