"""Values: what each op on data reads equals, bitwise, what it read in the original, gathered by the order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from buffer_lifting.feed_graph import above
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.labels import BATCH, COL, Labels, has_batch
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.ops import ATTENTION
from buffer_lifting.oracles.compare import difference, same_bits
from buffer_lifting.oracles.flex import flex_error
from buffer_lifting.oracles.running import Case, Runnable, evaluate, per_sample, runnable
from buffer_lifting.passes.context_parallel import user_axes
from buffer_lifting.passes.undo_shift import undo_shifts_in
from buffer_lifting.plan import FrontierEdge, LiftPlan
from buffer_lifting.program import Check, PositionRead
from buffer_lifting.scanner import scan_record
from buffer_lifting.sharding import shard_inputs
from buffer_lifting.torch_compat import ALL_GATHER, ALL_TO_ALL, WAIT, schema_args, set_arguments

EXCHANGES = (ALL_GATHER, ALL_TO_ALL, WAIT)


class Arrangement:
    """One way to lay out the sequences: for each axis an order per sample and position ids; and a shard."""

    def __init__(
        self, case: Case, seed: int, permute: bool, packed: bool, shard: tuple[int, int], own_orders: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        orders = case.orders(generator, case.batch)
        self.orders = {axis: own if own_orders else own[:1] for axis, own in orders.items()} if permute else {}
        self.positions: dict[str, torch.Tensor] = {}
        for axis, length in case.lengths.items():
            if packed and length > 3:
                cuts = torch.randint(2, length - 1, (case.batch,), generator=generator).tolist()
                rows = [torch.cat([torch.arange(c), torch.arange(length - c)]) for c in cuts]
                self.positions[axis] = torch.stack(rows)
        self.shard = shard
        self.name = f"{'random order' if permute else 'natural order'}, shard {shard}{', packed' if packed else ''}"

    def slots(self, axis: str, sample: int, length: int, role: str) -> torch.Tensor:
        """The global slots that a sample's local slots on an axis hold."""
        orders = self.orders.get(axis)
        order = torch.arange(length) if orders is None else orders[sample if orders.shape[0] > 1 else 0]
        if role == COL:
            return order
        rank, size = self.shard
        part = length // size
        return order[rank * part : (rank + 1) * part]


def check_values(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case], seed: int) -> Check:
    """All frontier operands under several arrangements, the natural order first.

    They are what they are in any order, so that one which ring attention does not take is as good.
    """
    lifted = replace(lifted, ring_axes=())
    original, changed = runnable(program), runnable(lifted.program)
    record = build_record(program, original.graph)
    plan = scan_record(record, user_axes(lifted), "auto")
    undo_shifts_in(original.graph, plan.shifts)
    oracle = _Values(plan, original, changed, lifted)
    compared, of_all_ranks = 0, set[tuple[str, str]]()
    for case in cases:
        own = per_sample(lifted)
        arrangements = [
            Arrangement(case, seed, False, False, (0, 1)),
            Arrangement(case, seed + 1, True, False, (0, 1), own),
        ]
        if lifted.axes.has_batch and not lifted.feed_program.mixes_positions:
            arrangements.append(Arrangement(case, seed + 2, True, True, (0, 1), own))
        dynamic = all(length is None for length in lifted.axes.lengths.values())
        divisors = [size for size in (2, 3, 5) if all(length % size == 0 for length in case.lengths.values())]
        if dynamic and divisors:
            arrangements.append(Arrangement(case, seed + 3, True, False, (1, divisors[0]), own))
        for arrangement in arrangements:
            for edge in plan.frontier:
                if (arrangement.shard[1] > 1 and _keys_unknown(edge)) or oracle.exchanged(edge.consumer):
                    continue
                if oracle.of_all_ranks(edge):
                    of_all_ranks.add((edge.consumer, edge.path))
                    continue
                failed = oracle.edge(edge, case, arrangement)
                compared += 1
                if failed:
                    worst, why = failed
                    where = f"operand {edge.path!r} ({edge.read.source}) {why} [{arrangement.name}]"
                    return Check("values", False, compared, worst, edge.consumer, where)
            for flex in plan.flex:
                node, compared = oracle.nodes.get(flex.node), compared + 1
                why = flex_error(flex, node, case, arrangement, lambda n: oracle._lifted_value(n, case, arrangement))  # noqa: B023
                if why:
                    return Check("values", False, compared, float("inf"), flex.node, why)
            for read in plan.report.reads:
                if read.source_kind == "is_causal" and lifted.cp_size is not None and not oracle.exchanged(read.node):
                    why = oracle.causal(read, case, arrangement)
                    compared += 1
                    if why:
                        return Check("values", False, compared, float("inf"), read.node, why)
    detail = (
        f"bitwise (floating values: to rounding), {len(plan.frontier)} reads"
        if plan.frontier
        else "no reads with a tensor"
    )
    if of_all_ranks:
        detail += f"; {len(of_all_ranks)}, made from the size of gathered values, are left to the shards oracle"
    return Check("values", True, compared, 0.0, "", detail)


class _Values:
    def __init__(self, plan: LiftPlan, original: Runnable, changed: Runnable, lifted: LiftedProgram) -> None:
        self.plan, self.original, self.changed, self.lifted = plan, original, changed, lifted
        self.nodes = {node.name: node for node in changed.graph.nodes}
        self._original: dict[Any, dict[str, Any]] = {}
        self._biased = with_biases(original.graph, plan.biases) if plan.biases else original.graph
        self._changed: dict[Any, dict[str, Any]] = {}
        self._gathered = set[str]()  # what is computed from other ranks' values, be it from their sizes
        for node in changed.graph.nodes:
            if node.target in EXCHANGES or any(own.name in self._gathered for own in node.all_input_nodes):
                self._gathered.add(node.name)

    def of_all_ranks(self, edge: FrontierEdge) -> bool:
        """Whether no rank can compute an operand alone."""
        node = self.nodes.get(edge.consumer)
        operand = _operand(node, edge.path) if node is not None else None
        return operand is not None and operand.name in self._gathered

    def edge(self, edge: FrontierEdge, case: Case, arrangement: Arrangement) -> tuple[float, str] | None:
        """The worst difference and a reason if the operand is not what it has to be."""
        node = self.nodes.get(edge.consumer)
        if node is None:
            return float("inf"), "the op is gone"
        operand = _operand(node, edge.path)
        if operand is None:
            return float("inf"), "the operand is gone"
        try:
            actual = self._lifted_value(operand.name, case, arrangement)
        except (RuntimeError, IndexError) as broken:
            return float("inf"), f"cannot be computed: {str(broken).splitlines()[0]}"
        if not isinstance(actual, torch.Tensor):  # a number made from the length
            number = self._natural(edge.value, case)
            return None if actual == number else (float("inf"), f"is {actual} instead of {number}")
        expected = self._expected(edge, case, arrangement)
        try:
            laid_out = self._unfold(actual, edge, case, arrangement)
        except RuntimeError:
            laid_out = actual
        if laid_out.dtype != expected.dtype:
            return float("inf"), f"has dtype {laid_out.dtype} instead of {expected.dtype}"
        if laid_out.shape != expected.shape:
            return float("inf"), f"has shape {tuple(actual.shape)}, which is not that of the shard"
        if same_bits(laid_out, expected) or _rounded(laid_out, expected):
            return None
        return difference(laid_out, expected), f"differs by {difference(laid_out, expected):.2e}"

    def exchanged(self, consumer: str) -> bool:
        """Whether an attention was replaced by one on all rows of some heads: the shards oracle sees its mask."""
        return (
            consumer not in self.nodes
            and (self.lifted.cp_size or 1) > 1
            and any(read.node == consumer and read.op.startswith(ATTENTION) for read in self.plan.report.reads)
        )

    def causal(self, read: PositionRead, case: Case, arrangement: Arrangement) -> str:
        """Why the mask that replaced ``is_causal`` is wrong, or an empty string."""
        node = self.nodes.get(read.node)
        named = schema_args(node) if node is not None else {}
        if node is None or named.get("is_causal") or not hasattr(named.get("attn_mask"), "name"):
            return "is_causal was not replaced by a mask that follows the slots"
        try:
            mask = self._lifted_value(named["attn_mask"].name, case, arrangement)
        except (RuntimeError, IndexError) as broken:
            return f"the mask cannot be computed: {str(broken).splitlines()[0]} [{arrangement.name}]"
        axis = read.seq_dims[0][1]
        length = case.lengths[axis]
        expected = torch.stack(
            [
                arrangement.slots(axis, b, length, COL)[None, :] <= arrangement.slots(axis, b, length, "row")[:, None]
                for b in range(case.batch)
            ]
        )
        per_sample = mask.reshape(case.batch if self.lifted.axes.has_batch else 1, -1, *expected.shape[1:])
        wanted = expected.unsqueeze(1).expand(-1, per_sample.shape[1], -1, -1)[: per_sample.shape[0]]
        return (
            "" if torch.equal(per_sample, wanted) else f"the causal mask does not follow the slots [{arrangement.name}]"
        )

    def _lifted_value(self, name: str, case: Case, arrangement: Arrangement) -> Any:
        key = (id(case), id(arrangement))
        if key not in self._changed:
            inputs = case.tensors()
            feed = self.lifted._feed(
                case.batch,
                case.lengths,
                inputs,
                arrangement.orders,
                arrangement.positions,
                arrangement.shard,
                None,
            )
            known = {k: v for k, v in inputs.items() if k in self.lifted.input_axes}
            sharded = shard_inputs(self.lifted.input_axes, known, arrangement.orders, arrangement.shard)
            self._changed = {key: {**self.changed.state, **case.named, **sharded, **feed}}
        values = self._changed[key]
        if name not in values:
            values.update(evaluate(self.changed.graph, values, {name}))
        return values[name]

    def _natural(self, name: str, case: Case, iotas: dict[str, torch.Tensor] | None = None) -> Any:
        key = (id(case), name) if iotas is None else None
        if key is not None and key in self._original:
            return self._original[key][name]
        values = {**self.original.state, **case.named, **(iotas or {})}
        result = evaluate(self.original.graph, values, {name})
        if key is not None:
            self._original[key] = result
        return result[name]

    def _with_biases(
        self, name: str, case: Case, iotas: dict[str, torch.Tensor], arrangement: Arrangement, sample: int
    ) -> Any:
        """A value of one sample in natural order; what follows the positions in it is that of their position ids."""
        nodes = {node.name: node for node in self.original.graph.nodes}
        values = {**self.original.state, **case.named, **iotas}
        needed = {node.name for node in above({node.name: node for node in self._biased.nodes}, {name}, values)}
        for (node, path), labels in self.plan.biases.items():
            if node not in needed:
                continue
            bias = self._natural(_operand(nodes[node], path).name, case)
            for dim, factors in enumerate(labels):
                axis = next((f.axis for f in factors if f.is_seq), "")
                if axis in arrangement.positions and len(factors) == 1 and bias.shape[dim] == case.lengths[axis]:
                    bias = bias.index_select(dim, arrangement.positions[axis][sample])
            values[bias_name(node, path)] = bias
        return evaluate(self._biased, values, {name})[name]

    def _expected(self, edge: FrontierEdge, case: Case, arrangement: Arrangement) -> torch.Tensor:
        """The original's value, gathered: ``[batch, *dims]`` with folded dims unfolded and no batch dim of its own."""
        programs = {self.plan.outputs[key].program for key in edge.keys}
        along = {factor.role for dim in edge.labels for factor in dim if factor.is_seq}
        streams = {key.stream for key in edge.keys if key.role in along}  # keys read for their number have none
        if edge.stream == "positions" and len(streams) > 1:
            streams.discard("slots")
        samples = []
        for sample in range(case.batch):
            iotas = None
            if arrangement.positions and "substituted" in programs:
                known = self.plan.substituted.items()
                iotas = {
                    name: arrangement.positions[axis][sample] for name, axis in known if axis in arrangement.positions
                }
            value = self._natural(edge.value, case, iotas)
            if arrangement.positions and "positions" in streams and streams != {"positions"}:
                value = self._with_biases(edge.value, case, iotas or {}, arrangement, sample)
            value, roles = _unfold_own(value, edge.labels, case, sample)
            for dim, (axis, role) in enumerate(roles):
                if axis:
                    slots = arrangement.slots(axis, sample, case.lengths[axis], role)
                    if axis in arrangement.positions and streams == {"positions"}:
                        slots = arrangement.positions[axis][sample][slots]
                    value = value.index_select(dim, slots)
            samples.append(value)
        return torch.stack(samples)

    def _unfold(self, value: torch.Tensor, edge: FrontierEdge, case: Case, arrangement: Arrangement) -> torch.Tensor:
        """The lifted operand in the layout of :meth:`_expected`."""
        labels, batch = edge.labels, edge.batch_from_right
        own = next((d for d, dim in enumerate(labels) if has_batch(dim)), None)
        rank = arrangement.shard[1]

        def size(axis: str, role: str) -> int:
            return case.lengths[axis] if role == COL else case.lengths[axis] // rank

        if own is None:
            if batch is None or value.ndim == len(labels) < batch:
                return value.unsqueeze(0).expand(case.batch, *value.shape)
            at = value.ndim - batch
            moved = _one_head(value, at, case.batch).movedim(at, 0)
            kept = moved.shape[moved.ndim - len(labels) :] if moved.ndim > len(labels) else None
            if at == 0 and kept is not None:
                return moved.reshape(moved.shape[0], *_factors(labels, kept, size))
            result = moved.unsqueeze(at + 1)
            return result.reshape(result.shape[0], *_factors(labels, result.shape[1:], size))
        if value.ndim == len(labels) and value.shape[own] == 1 and len(labels[own]) == 1:  # one value for all samples
            value = value.expand(*(case.batch if dim == own else -1 for dim in range(value.ndim)))
        shape: list[int] = []
        where = 0
        for dim, (label, length) in enumerate(zip(labels, value.shape, strict=True)):
            if dim == own:
                where = len(shape)
            shape.extend(_factor_sizes(label, length, size, case.batch))
        return value.reshape(shape).movedim(where, 0)


def bias_name(node: str, path: str) -> str:
    """The placeholder that stands for an operand in :func:`with_biases`."""
    return f"bias_{node}_{path.replace('.', '_')}"


def with_biases(graph: Graph, biases: Collection[tuple[str, str]]) -> Graph:
    """A copy of a graph in which operands (node, path) are placeholders of their own."""
    new, env = Graph(), dict[Node, Node]()
    stand_ins: dict[str, dict[str, Node]] = defaultdict(dict)
    for name, path in biases:
        stand_ins[name][path] = new.placeholder(bias_name(name, path))
    for node in graph.nodes:
        env[node] = copy_node(new, node, lambda n: env[n])
        if node.name in stand_ins:
            set_arguments(env[node], stand_ins[node.name])
    return new


def _one_head(value: torch.Tensor, at: int, batch: int) -> torch.Tensor:
    """A value ``[..., B * H, ...]`` that is the same for all heads, for one of them; any other as it is."""
    if value.shape[at] <= batch or value.shape[at] % batch:
        return value
    heads = value.unflatten(at, (batch, -1))
    first = heads.narrow(at + 1, 0, 1)
    return first.squeeze(at + 1) if torch.equal(heads, first.expand_as(heads)) else value


#: Units of the dtype's precision, of the largest value, that floating values may differ by.
ROUNDING = 16


def _rounded(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding: vector kernels round the elements of another shape differently."""
    if not (actual.is_floating_point() or actual.is_complex()):
        return False
    finite = expected[expected.abs() < float("inf")].abs()
    allowed = ROUNDING * torch.finfo(actual.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    return bool(((actual == expected) | ((actual - expected).abs() <= allowed)).all())


def _factor_sizes(label: Any, length: int, size: Any, batch: int) -> list[int]:
    if not label:
        return [length]
    sizes = []
    for factor in label:
        if factor.axis == BATCH:
            sizes.append(batch)
        elif factor.axis:
            sizes.append(size(factor.axis, factor.role))
        else:
            sizes.append(int(factor.size) if isinstance(factor.size, int) else -1)
    return sizes if len(sizes) > 1 else [length]


def _factors(labels: Labels, shape: Any, size: Any) -> list[int]:
    result: list[int] = []
    for label, length in zip(labels, shape, strict=True):
        result.extend(_factor_sizes(label, length, size, 1))
    return result


def _unfold_own(
    value: torch.Tensor, labels: Labels, case: Case, sample: int
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """One sample of an original value, its folded dims unfolded; axis and role of each remaining dim."""
    shape: list[int] = []
    roles: list[tuple[str, str]] = []
    picked: int | None = None
    for label, length in zip(labels, value.shape, strict=True):
        sizes = _factor_sizes(label, length, lambda axis, role: case.lengths[axis], case.batch)
        factors = label if len(label) == len(sizes) else [None] * len(sizes)
        for factor, part in zip(factors, sizes, strict=True):
            if factor is not None and factor.axis == BATCH:
                picked = len(shape)
            roles.append((factor.axis, factor.role) if factor is not None and factor.is_seq else ("", ""))
            shape.append(part)
    value = value.reshape(shape)
    if picked is not None:
        value = value.select(picked, sample if value.shape[picked] > 1 else 0)
        del roles[picked]
    return value, roles


def _keys_unknown(edge: FrontierEdge) -> bool:
    """A value along keys without a lifted input that carries their number: it has the shape of one rank only."""
    along_keys = any(factor.role == COL for dim in edge.labels for factor in dim)
    return along_keys and not any(key.role == COL for key in edge.keys)


def _operand(node: Any, path: str) -> Any:
    key, _, index = path.partition(".")
    value = schema_args(node).get(key)
    if index and isinstance(value, list | tuple):
        value = value[int(index)] if int(index) < len(value) else None
    return value if hasattr(value, "name") else None
