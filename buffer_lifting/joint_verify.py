"""Checks that a lifted graph of forward and backward is the original, wherever its tokens stand."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from buffer_lifting.errors import LiftingError, VerificationError
from buffer_lifting.examples import sizes_of
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.labels import Labels, has_seq
from buffer_lifting.lifted_graph import LiftedGraph, gm_inputs, in_layout_of
from buffer_lifting.oracles.compare import difference, same_bits
from buffer_lifting.oracles.equivariance import CONTROL, TOLERANCE, permuted, perturbed
from buffer_lifting.oracles.identity import LOOSE, TABLE_TOLERANCE, rounds_otherwise
from buffer_lifting.oracles.running import double_feed, doubled, to_double
from buffer_lifting.program import Check, VerifyReport
from buffer_lifting.sharding import shard_inputs
from buffer_lifting.tables import has_values
from buffer_lifting.torch_compat import tree_flatten


def verify_graph(lifted: LiftedGraph, gm: GraphModule, inputs: Sequence[Any], seed: int = 0) -> VerifyReport:
    """Compares a lifted graph with the one it was made from, on one call.

    - ``identity``: in natural order all results, gradients included, are the original's bitwise. Gradients of tables of
      parameters that are read by position are summed in another order: to the precision of their dtype. Where other
      kernels run (a mask in the place of a flag, values that are recomputed), all are to 1e-4; the detail says why.
    - ``equivariance``: in float64, with another permutation for each sample, results along the sequence are the
      original's, permuted, and all others, every gradient of a parameter among them, are the original's, to 1e-9 of
      their largest element. As controls, the original itself is run on the permuted inputs, and each lifted input is
      perturbed: both have to move something.

    Args:
        lifted: ``gm.meta["buffer_lifting"]``.
        gm: the lifted graph module.
        inputs: what the *original* is called with, flat or nested: whole sequences in natural order, with data.
        seed: of the permutations, and set before each run.

    Raises:
        VerificationError: a check failed; its ``report`` has both.
        LiftingError: inputs without data, or tables without values.
    """
    flat = list(tree_flatten(inputs)[0])
    names = [node.name for node in gm_inputs(lifted.original)]
    if len(flat) != len(names):
        raise LiftingError(f"the original has {len(names)} inputs, {len(flat)} were given")
    named = dict(zip(names, flat, strict=True))
    if any(isinstance(value, torch.Tensor) and not has_values(value) for value in flat):
        raise LiftingError("inputs to verify on need data: they are fake, or on the meta device")
    for node in lifted.original.graph.nodes:
        if node.name in lifted._tangents:
            named[node.name] = in_layout_of(named[node.name], node.meta["val"])
    pair = _Pair(lifted, gm, named, seed)
    checks = (pair.identity(), pair.equivariance())
    report = VerifyReport(checks)
    if not report.passed:
        failed = next(check for check in checks if not check.passed)
        error = VerificationError(f"{failed.name} does not hold at {failed.node!r}: {failed.detail}\n{report}")
        error.report = report
        raise error
    return report


class _Pair:
    def __init__(self, lifted: LiftedGraph, gm: GraphModule, named: dict[str, Any], seed: int) -> None:
        self.lifted, self.gm, self.named, self.seed = lifted, gm, named, seed
        tensors = {n: v for n, v in named.items() if isinstance(v, torch.Tensor) and n in lifted.input_axes}
        self.tensors = tensors
        self.batch, self.lengths = sizes_of(tensors, lifted.input_axes)
        results = tree_flatten(lifted.original.graph.output_node().args[0])[0]
        self.results = [item.name if isinstance(item, Node) else "" for item in results]

    def identity(self) -> Check:
        """Both graphs in natural order."""
        users = {n: v for n, v in self.tensors.items() if n not in self.lifted._tangents}
        feed = self.lifted.feed(self.batch, self._seq_len(), users)
        left = _run(self.lifted.original, list(self.named.values()), self.seed)
        right = _run(self.gm, self.lifted.arguments(list(self.named.values()), feed), self.seed)
        loose = self._why_not_bitwise()
        compared, worst, node, rounded = 0, 0.0, "", 0
        largest = max((float(v.abs().max()) for v in left.values() if _floating(v)), default=0.0)
        for index, value in left.items():
            compared += 1
            other = right[index]
            if same_bits(value, other):
                continue
            gap = difference(value, other) / max(float(value.abs().max()), 1e-3 * largest, 1e-30)
            worst = max(worst, gap)
            table = self.lifted._gradients.get(self.results[index]) in self.lifted._tables
            limit = max(LOOSE if loose else 0.0, TABLE_TOLERANCE.get(value.dtype, 0.0) if loose or table else 0.0)
            if not _floating(value) or gap > limit:
                node = node or self._name(index)
            rounded += 1
        detail = f"bitwise but for {rounded} of {compared}" if rounded else "bitwise"
        if rounded and loose:
            detail += f" ({loose})"
        detail += f", at batch {self.batch}, length {self.lengths}"
        return Check("identity", not node, compared, worst, node, detail)

    def _why_not_bitwise(self) -> str:
        reads = [read for read in self.lifted.report.reads if not read.refusal]
        if self.lifted.follows_slots and any(read.source_kind == "is_causal" for read in reads):
            return "a mask took the place of is_causal"
        return rounds_otherwise(self.lifted.original.graph, reads)

    def equivariance(self) -> Check:
        """Both graphs in float64, the lifted one in another order for each sample."""
        along = [axes for axes in self.lifted.input_axes.values() if axes.seq_dims]
        per_sample = self.lifted.axes.has_batch and all(axes.batch_dim is not None for axes in along)
        draw = torch.Generator().manual_seed(self.seed)
        rows = self.batch if per_sample else 1
        orders = {
            axis: torch.stack([torch.randperm(length, generator=draw) for _ in range(rows)])
            for axis, length in self.lengths.items()
        }
        before, after = _double(self.lifted.original), _double(self.gm)
        whole = {name: doubled(value) for name, value in self.named.items()}
        moved = {**whole, **shard_inputs(self.lifted.input_axes, {n: whole[n] for n in self.tensors}, orders, (0, 1))}
        for name in self.lifted._tangents:  # those whose dims are folded too
            moved[name] = in_layout_of(permuted(whole[name], self._labels(name), orders), whole[name])
        users = {n: whole[n] for n in self.tensors if n not in self.lifted._tangents}
        double = double_feed(self.lifted._lifted)
        feed = double._feed(self.batch, self.lengths, users, orders, None, (0, 1), None)
        expected = {
            index: permuted(value, self._labels(self.results[index]), orders)
            for index, value in _run(before, list(whole.values()), self.seed).items()
        }
        values = list(moved.values())
        compared, worst, place = _compare(expected, _run(after, self.lifted.arguments(values, feed), self.seed))
        if worst > TOLERANCE:
            detail = f"it is off by {worst:.2e} (relative), tolerance {TOLERANCE:.0e}"
            return Check("equivariance", False, compared, worst, self._name(place), detail)
        unlifted = _compare(expected, _run(before, values, self.seed))[1]
        silent = [item.name for item in self.lifted.inputs if not self._moves(item, after, values, feed, expected)]
        if self.lifted.inputs and (len(silent) == len(self.lifted.inputs) or unlifted < CONTROL):
            detail = "the controls move nothing, so the check proves nothing: " + (
                ", ".join(silent) or "the original is right on permuted inputs as well"
            )
            return Check("equivariance", False, compared, worst, "", detail)
        detail = f"float64; the original on the same inputs is off by {unlifted:.1e}"
        if silent:
            detail += f"; it proves nothing for {', '.join(silent)}"
        return Check("equivariance", True, compared, worst, "", detail)

    def _moves(self, item: Any, after: GraphModule, values: list[Any], feed: dict[str, Any], expected: Any) -> bool:
        dim = 1 if item.batched else 0
        for other in perturbed(feed[item.name], dim):
            try:
                result = _run(after, self.lifted.arguments(values, {**feed, item.name: other}), self.seed)
            except (IndexError, RuntimeError):
                return True
            if _compare(expected, result)[1] >= CONTROL:
                return True
        return False

    def _labels(self, name: str) -> Labels:
        known = self.lifted._labels.get(name, ())
        return known if any(has_seq(dim) for dim in known) else ()

    def _name(self, index: int) -> str:
        """A result for a person: whose gradient it is, or its node."""
        name = self.results[index]
        whose = self.lifted._gradients.get(name)
        return f"{name} (the gradient of {whose})" if whose else name

    def _seq_len(self) -> Any:
        return self.lengths if len(self.lengths) > 1 else next(iter(self.lengths.values()))


def _compare(expected: dict[int, torch.Tensor], actual: dict[int, torch.Tensor]) -> tuple[int, float, int]:
    """How many results were compared, the worst relative difference, and the result that has it."""
    worst, where = 0.0, next(iter(expected), 0)
    largest = max((float(v.abs().max()) for v in expected.values() if _floating(v)), default=0.0)
    for index, value in expected.items():
        scale = max(float(value.abs().max()), 1e-4 * largest) if _floating(value) else 0.0
        gap = difference(value, actual[index])
        error = (gap / scale if scale else gap) if _floating(value) else (float("inf") if gap else 0.0)
        if not error <= worst:
            worst, where = error, index
    return len(expected), worst, where


def _floating(value: torch.Tensor) -> bool:
    return bool(value.numel()) and (value.is_floating_point() or value.is_complex())


def _run(gm: GraphModule, flat: list[Any], seed: int) -> dict[int, torch.Tensor]:
    """The tensors that a graph returns, by their place among its results."""
    torch.manual_seed(seed)
    with torch.no_grad():
        results = Interpreter(gm).run(*flat, enable_io_processing=False)
    values = tree_flatten(results)[0]
    return {index: value.detach() for index, value in enumerate(values) if isinstance(value, torch.Tensor)}


def _double(gm: GraphModule) -> GraphModule:
    """A copy that computes in double precision, its own state included."""
    new = Graph()
    env: dict[Node, Node] = {}
    held: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            continue
        env[node] = copy_node(new, node, lambda n: env[n])
        if node.op == "get_attr":
            held[str(node.target)] = doubled(operator.attrgetter(str(node.target))(gm))
    to_double(new)
    return GraphModule(held if held else torch.nn.Module(), new)
