"""Gradients in a graph of forward and backward: what its sums over tokens are, and where tables get theirs.

A table of parameters that is read by position gets the gradient of its rows summed over the batch *first*, because
every sample reads the same rows, and only then put into the rows. Where samples have orders of their own, the sum has
to wait until the rows are known: it is put off, through all that is local in a row, to where the rows are written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import AxisResult, OpView
from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import Node, Ref, StateKind, TensorMeta
from buffer_lifting.joint_rules import OF_TOKENS, backward_rule, settle
from buffer_lifting.labels import BATCH, DimLabel, Factor, Labels, features, has_batch, has_seq, is_labelled, seq_axes
from buffer_lifting.ops import content_operands, is_pointwise, is_view
from buffer_lifting.plan import Call, Context, Existing, GradientPlan, Plan, Refuse, Value

if TYPE_CHECKING:
    from buffer_lifting.frontier import Frontier

#: A handled mixing: a sum over the batch that is put off until the rows of a table are known.
OVER_BATCH = "a gradient of rows that all samples read: a sum over the batch"
_ROWS = ("aten.embedding_dense_backward", "aten.slice_backward", "aten.index_put", "aten._unsafe_index_put")


class GradientSums:
    """What one scan of a graph with a backward pass knows besides."""

    def __init__(self, scan: Frontier) -> None:
        assert scan.record.joint is not None
        self.scan, self.joint = scan, scan.record.joint
        self.plans: list[GradientPlan] = []
        self._tangents_of: dict[str, list[str]] = {}
        for tangent, result in self.joint.tangents.items():
            self._tangents_of.setdefault(result, []).append(tangent)

    def label_tangents(self, node: Node) -> None:
        """The gradient of a result runs along the axes of the result."""
        for tangent in self._tangents_of.get(node.name, ()):
            known = self.scan.labels.get(node.name)
            self.scan.labels[tangent] = known[:1] if known else None

    def apply(self, view: OpView) -> AxisResult | None:
        """The axis result of an op on data."""
        result = backward_rule(view)
        if result is not None:
            return result
        result = self.scan.routing.apply(view)
        if result is None or not self.joint.backward:
            return result
        result = settle(view, result)
        if result.mixing and not result.handled and self._put_off(view, result):
            return AxisResult(result.outputs, result.operands, OVER_BATCH, True)
        return result

    def takes(self, view: OpView) -> bool:
        """Whether a node reads sums that are put off: then it is dealt with here."""
        node = view.node
        summed = self.scan.planner.summed
        if summed.isdisjoint(node.refs()):
            return False
        if node.base_op in _ROWS:
            self._rows(node)
            return True
        if node.base_op == "aten.sum" and len(content_operands(node)) == 1:
            result = self.apply(view)
            if result is not None and result.outputs and not any(is_labelled(dim) for dim in result.outputs[0]):
                self._done(node)  # in the end all tokens are summed
                return True
        if (is_view(node) or is_pointwise(node)) and isinstance(node.meta, TensorMeta):
            result = self.scan.routing.apply(view)
            if result is not None and result.outputs and not result.mixing:
                self.scan.labels[node.name] = result.outputs
                summed.add(node.name)
                return True
        why = (
            f"the gradient of {self._of(node)}, which all samples share, is summed over the batch before this op, "
            "which is not known to keep the rows of the sequence apart"
        )
        self.scan.labels[node.name] = None
        self.scan.reports.mix(node, why, False, "BL201")
        return True

    def scales_loss(self, node: Node, path: str = "") -> bool:
        """Whether a number of tokens divides the loss where its gradient begins, and goes into nothing else.

        ``path``: the operand that the number is; without it, whether other reductions may be read there too.
        """
        if node.base_op == "aten.nll_loss_backward":
            gradient = node.ref("grad_output")
            return path in ("grad_output", "total_weight") or (not path and gradient not in self.scan.totals)
        return bool(path) and node.tensor is not None and not node.tensor.shape

    def returned(self, output: Node) -> None:
        """Sums that are returned as they are: gradients of tables that are read whole."""
        for name in dict.fromkeys(output.refs()):
            known = self.scan.labels.get(name)
            if not known or not seq_axes(known[0]) or Dep.DATA not in self.scan.deps[name]:
                continue
            node, labels = self.scan.record.nodes[name], known[0]
            try:
                if name not in self.scan.planner.summed:
                    if not self._of_a_parameter(node, labels):
                        continue
                    labels = self._of_one_sample(node, labels)
                dim, factor = _one_sequence(node, labels)
                size = node.tensor.shape[dim] if node.tensor else 0
                value = self._value(name, labels)
                index = self.scan.planner.iota(factor, self._context(name, labels))
                plan = _scatter(value, index, dim, size, node)
            except Refuse as refusal:
                self._refused(node, name, refusal)
                continue
            self.plans.append(GradientPlan(name, plan, tuple(dict.fromkeys(self.scan.planner.trail)), True))

    def _of_a_parameter(self, node: Node, labels: Labels) -> bool:
        """Whether a result that runs along the sequence is the gradient of a parameter that is read by position.

        Raises:
            Refuse: it may be, and nothing tells.
        """
        reads = {fqn for read in self.scan.reports.reads for fqn in (read.source, *read.aliases)}
        if self.joint.gradients:
            return self.joint.gradients.get(node.name) in reads
        parameters = [n for n in self.scan.record.nodes.values() if n.state_kind is StateKind.PARAMETER]
        same = [n.fqn for n in parameters if n.fqn in reads and n.tensor and node.tensor == n.tensor]
        if same and self.joint.backward:
            why = f"whether this is the gradient of {same[0]!r} is not known: a batch of 1 has no sum over it"
            raise Refuse(why, node.name, hint="capture the graph with a batch of 2 or more, or with descriptors")
        return False

    def _of_one_sample(self, node: Node, labels: Labels) -> Labels:
        """Makes a gradient that no batch was summed over one that is summed over a batch of 1."""
        if any(f.axis == BATCH and f.size != 1 for dim in labels for f in dim):
            raise Refuse("it runs along the batch", node.name)
        plain = tuple(tuple(f for f in dim if f.axis != BATCH) for dim in labels)
        lane = Call("aten.unsqueeze.default", (Existing(node.name), 0), node.name)
        self.scan.planner.batch_sums[node.name] = Value(lane, True, len(labels))
        self.scan.planner.summed.add(node.name)
        return plain

    # -- sums over the batch --------------------------------------------------------------------------------

    def _put_off(self, view: OpView, result: AxisResult) -> bool:
        """Whether an op only sums over the batch what goes on along the sequence; noted with what it sums."""
        node, labels = view.node, view.labels("self")
        dims = node.args.get("dim")
        if node.op != "aten.sum.dim_IntList" or labels is None or not isinstance(dims, tuple) or not result.outputs:
            return False
        rank = len(labels)
        over = {d % rank for d in dims if isinstance(d, int)}
        batch = [d for d in over if is_labelled(labels[d])]
        if len(batch) != 1 or not _is_batch(labels[batch[0]]) or node.args.get("dtype") is not None:
            return False
        if not seq_axes(result.outputs[0]) or any(has_batch(dim) for dim in result.outputs[0]):
            return False
        source = node.args["self"]
        assert isinstance(source, Ref)
        plan: Plan = Existing(source.name)
        others = [d for d in range(rank) if d != batch[0]]
        if batch[0]:
            plan = Call("aten.permute.default", (plan, (batch[0], *others)), node.name)
        rest = tuple(1 + others.index(d) for d in sorted(over) if d != batch[0])
        keep = bool(node.args.get("keepdim"))
        if rest:
            plan = Call("aten.sum.dim_IntList", (plan, rest, keep), node.name)
        if keep:
            plan = Call("aten.unsqueeze.default", (plan, 1 + batch[0]), node.name)
        self.scan.planner.batch_sums[node.name] = Value(plan, True, rank if keep else rank - len(over))
        self.scan.planner.summed.add(node.name)
        return True

    def _value(self, name: str, labels: Labels) -> Value:
        """A gradient before its sum over the batch, with the batch in front."""
        self.scan.planner.trail.clear()
        value = self.scan.planner.rebuild(name, labels, self._context(name, labels))
        if not value.lane:
            raise Refuse("its sum over the batch is not known", name)
        return value

    def _context(self, name: str, labels: Labels) -> Context:
        two_axis = len(seq_axes(labels)) > 1
        node = self.scan.record.nodes[name]
        return Context("slots" if two_axis else "positions", self.scan._form_of(node, two_axis))

    # -- rows of tables -------------------------------------------------------------------------------------

    def _rows(self, node: Node) -> None:
        """Where gradients are put into the rows of a table."""
        key = "values" if node.base_op.endswith("index_put") else "grad_output"
        gradient = node.args.get(key)
        assert isinstance(gradient, Ref)
        labels = self.scan.labels.get(gradient.name)
        try:
            if not labels or gradient.name not in self.scan.planner.summed:
                raise Refuse("how its operands run along the sequence is not known", node.name)
            value = self._value(gradient.name, labels[0])
            plan = self._into_rows(node, value, gradient.name, labels[0])
        except Refuse as refusal:
            self._refused(node, gradient.name, refusal)
        else:
            if plan is not None:
                trail = tuple(dict.fromkeys(self.scan.planner.trail))
                self.plans.append(GradientPlan(node.name, plan, trail))
        self._done(node)

    def _into_rows(self, node: Node, value: Value, gradient: str, labels: Labels) -> Plan | None:
        """The plan of a gradient of a table; ``None`` if the rows are the same in any order."""
        context = self._context(gradient, labels)
        if node.base_op == "aten.slice_backward":
            dim = int(node.args["dim"]) % len(labels)  # type: ignore[arg-type]
            if not has_seq(labels[dim]):
                raise Refuse("a part of the features of a table", node.name)
            at, factor = _one_sequence(node, labels)
            start, step, sizes = node.args.get("start") or 0, node.args.get("step", 1), node.args["input_sizes"]
            if at != dim or not isinstance(start, int) or not isinstance(step, int) or not isinstance(sizes, tuple):
                raise Refuse("a slice whose start is not a number", node.name)
            size = sizes[dim]
            index = self.scan.planner.iota(factor, context)
            if step != 1:
                index = Call("aten.mul.Scalar", (index, step), node.name)
            if start < 0:
                raise Refuse("a slice that counts from the end", node.name)
            if start:
                index = Call("aten.add.Scalar", (index, start), node.name)
            return _scatter(value, index, dim, size, node)
        path = "indices" if node.base_op == "aten.embedding_dense_backward" else "indices.0"
        name = node.ref(path)
        assert name is not None
        if node.base_op == "aten.embedding_dense_backward" and node.args.get("scale_grad_by_freq"):
            raise Refuse("gradients are divided by how often a row is read (scale_grad_by_freq)", node.name)
        if Dep.USER in self.scan.deps[name]:
            raise Refuse("rows that the user picks, of gradients that all samples share", name)
        shape = self.scan.record.nodes[name].tensor
        rank = len(shape.shape) if shape else 0
        if any(is_labelled(dim) for dim in labels[rank:]) or not any(is_labelled(dim) for dim in labels):
            raise Refuse("its features run along the sequence", node.name)
        rows = self.scan.planner.rebuild(name, labels[:rank], context)
        if not rows.changed:
            return None
        if not rows.lane:
            raise Refuse("the rows are not made from lifted inputs", name)
        if path == "indices":
            rest = tuple(node.args[k] for k in ("num_weights", "padding_idx", "scale_grad_by_freq"))
            return Call("aten.embedding_dense_backward.default", (value.plan, rows.plan, *rest), node.name)
        table = node.args.get("self")
        assert isinstance(table, Ref)
        return Call("aten.index_put.default", (Existing(table.name), (rows.plan,), value.plan, True), node.name)

    def _done(self, node: Node) -> None:
        """From here on it is a parameter's gradient like any other."""
        assert node.tensor is not None
        self.scan.labels[node.name] = (features(node.tensor.shape),)
        self.scan.totals.add(node.name)
        self.scan.reports.mix(node, OF_TOKENS, True, "BL200")

    def _refused(self, node: Node, value: str, refusal: Refuse) -> None:
        why = f"the gradient of {self._of(node)}, a table that is read by position: {refusal}"
        hint = refusal.hint or "read the table with an embedding or a slice in the model, or freeze it"
        found = Refuse(why, refusal.node, "BL105", hint)
        self.scan.reports.refused(node, "grad_output", self.scan.record.nodes[value], (), found)

    def _of(self, node: Node) -> str:
        """Whose gradient a node goes into, for a person."""
        users = self.scan.record.users()
        stack, seen, found = [node.name], set(), []
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.joint.gradients:
                found.append(self.joint.gradients[name])
            stack.extend(users[name])
        return ", ".join(repr(name) for name in sorted(set(found))[:3]) or "a parameter"


def _is_batch(dim: DimLabel) -> bool:
    return len(dim) == 1 and dim[0].axis == BATCH


def _one_sequence(node: Node, labels: Labels) -> tuple[int, Factor]:
    """The only sequence dim of a gradient and its factor."""
    seq = [d for d, dim in enumerate(labels) if has_seq(dim)]
    if len(seq) != 1 or len(labels[seq[0]]) != 1 or any(has_batch(dim) for dim in labels):
        raise Refuse("its rows are folded with other dims, or run along more than one sequence dim", node.name)
    return seq[0], labels[seq[0]][0]


def _scatter(value: Value, index: Plan, dim: int, size: object, node: Node) -> Plan:
    """``[lane, ..., seq, ...]`` added up in rows ``index`` ``[lane, seq]`` of zeros with ``size`` rows at ``dim``."""
    shape = node.tensor.shape if node.tensor else ()
    others = [d for d in range(value.rank) if d != dim]
    plan: Plan = value.plan
    if dim:
        plan = Call("aten.permute.default", (plan, (0, dim + 1, *(d + 1 for d in others))), node.name)
    sizes = (size, *(shape[d] for d in others))
    if not all(isinstance(item, int) for item in sizes):
        raise Refuse(f"a table of {sizes} rows and columns, which are no numbers", node.name)
    zeros = Call("aten.new_zeros.default", (plan, sizes), node.name)
    result: Plan = Call("aten.index_put.default", (zeros, (index,), plan, True), node.name)
    if dim:
        order = [others.index(d) + 1 if d != dim else 0 for d in range(value.rank)]
        result = Call("aten.permute.default", (result, tuple(order)), node.name)
    return result
