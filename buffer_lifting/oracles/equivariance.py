"""Order equivariance: with another permutation per sample, the lifted program permutes the original's outputs.

Each sequence axis has permutations of its own. In float64. A control perturbs each lifted input: if nothing moves by
100 times the tolerance, the check proves nothing, and says so. A program may amplify rounding itself (a saturated
softmax, large cancelling sums): what exceeds the tolerance is compared with how far the original moves when its
parameters change by one unit in the last place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from buffer_lifting.errors import FeedError, LiftingError
from buffer_lifting.graph.bodies import flex_nodes
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.labels import BATCH, Factor, Labels, has_batch, has_seq
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.compare import difference, gradient_error, gradients, loss_weights
from buffer_lifting.oracles.running import Case, Runnable, double_feed, doubled, nudged, per_sample, runnable
from buffer_lifting.passes.context_parallel import context_parallel, user_axes
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.program import Check, LiftedInput
from buffer_lifting.scanner import scan_record
from buffer_lifting.sharding import shard_inputs

TOLERANCE = 1e-9
CONTROL = 100 * TOLERANCE
#: Rounding excuses an error of up to so many times its own effect, and no error above LARGEST.
MARGIN = 10
LARGEST = 1e-6
Orders = dict[str, torch.Tensor]


def check_equivariance(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case], seed: int) -> Check:
    """Outputs and every parameter gradient, for one random permutation per sample and case."""
    follows = lifted if lifted.cp_size is not None else context_parallel(lifted, size=1)
    if follows.cp_size != 1:
        raise LiftingError("order equivariance is checked on a program of context-parallel size 1")
    follows = double_feed(follows)
    plan = scan_record(build_record(program, normalize(program, read_only=True).graph), user_axes(lifted))
    pair = Pair(
        runnable(program, double=True), runnable(follows.program, double=True), follows, plan.labels_of_original()
    )
    if flex_nodes(program.graph):
        pair.try_backward(cases[0], seed)
    compared, worst = 0, 0.0
    for case in cases:
        result = pair.compare(case, seed)
        compared += result.compared
        worst = max(worst, result.worst)
        if result.unknown:
            detail = f"how the output {result.unknown[0]!r} follows the sequence is not known: it cannot be compared"
            return Check("equivariance", False, compared, worst, result.unknown[0], detail)
        if not result.compared:
            detail = "no output of the program is known to follow the sequence; there was nothing to compare"
            return Check("equivariance", False, 0, 0.0, "", detail)
        if result.worst > TOLERANCE and not pair.is_rounding(result.worst, case, seed):
            node = pair.first_difference(case, seed) or result.where
            detail = f"{result.where} is off by {result.worst:.2e} (relative), tolerance {TOLERANCE:.0e}"
            detail += pair.rounding_note()
            return Check("equivariance", False, compared, result.worst, node, detail)
    silent = pair.controls(cases[0], seed)
    if silent and len(silent) == len(follows.inputs):
        detail = f"perturbing {', '.join(silent)} moves no output and no gradient: the check proves nothing for them"
        return Check("equivariance", False, compared, worst, silent[0], detail)
    note = f"float64, {len(follows.inputs) - len(silent)} controls move it{pair.rounding_note()}"
    if silent:
        note += f"; it proves nothing for {', '.join(silent)}, which move no output and no gradient here"
    if pair.forward_only:
        note += f"; forward only: the original's own backward does not run ({pair.forward_only})"
    return Check("equivariance", True, compared, worst, "", note)


def _is_size(node: Node) -> bool:
    return "sym_size" in str(node.target)


class _Result:
    def __init__(self) -> None:
        self.compared, self.worst, self.where = 0, 0.0, ""
        self.unknown: list[str] = []

    def add(self, error: float, where: str) -> None:
        """Counts one comparison."""
        self.compared += 1
        if error > self.worst:
            self.worst, self.where = error, where


class Pair:
    def __init__(
        self,
        original: Runnable,
        changed: Runnable,
        lifted: LiftedProgram,
        labels: dict[str, tuple[Labels, ...] | None],
    ) -> None:
        self.original, self.changed, self.lifted, self.labels = original, changed, lifted, labels
        self.forward_only = ""  # why there are no gradients to compare
        self.rounding = 0.0  # how far rounding moves the original, where that was asked

    def try_backward(self, case: Case, seed: int) -> None:
        """Finds out whether the original has gradients: eager flex_attention cannot differentiate every body."""
        whole, _, _ = self._inputs(case, self.orders(case, seed))
        try:
            outputs, parameters, _ = self.original.run(whole)
            kept = [value for value in outputs if isinstance(value, torch.Tensor)]
            gradients(kept, loss_weights(kept, seed), parameters)
        except (RuntimeError, AssertionError, ValueError, IndexError) as broken:
            self.forward_only = (str(broken).strip() or type(broken).__name__).splitlines()[0]
            self.original.frozen = self.changed.frozen = True

    def orders(self, case: Case, seed: int) -> Orders:
        """A random permutation per sample (one for all without a batch axis) and axis."""
        return case.orders(torch.Generator().manual_seed(seed), case.batch if per_sample(self.lifted) else 1)

    def _inputs(self, case: Case, orders: Orders) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        whole = {name: doubled(value) for name, value in case.named.items()}
        tensors = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
        known = {name: value for name, value in tensors.items() if name in self.lifted.input_axes}
        permuted = {**whole, **shard_inputs(self.lifted.input_axes, known, orders, (0, 1))}
        feed = self.lifted._feed(case.batch, case.lengths, tensors, orders, None, (0, 1), None)
        return whole, permuted, feed

    def compare(self, case: Case, seed: int) -> _Result:
        """The original on whole inputs against the lifted program on permuted ones."""
        orders = self.orders(case, seed)
        whole, permuted, feed = self._inputs(case, orders)
        expected = self._run_original(whole, orders, seed)
        return self._against(expected, self._run_changed({**permuted, **feed}, expected))

    def is_rounding(self, error: float, case: Case, seed: int) -> bool:
        """Whether the original moves as far when its parameters change by one unit in the last place."""
        orders = self.orders(case, seed)
        whole, _, _ = self._inputs(case, orders)
        before = self._run_original(whole, orders, seed)
        after = self._run_original(whole, orders, seed, nudged(self.original, seed))
        self.rounding = self._against(before, after).worst
        return error <= min(MARGIN * self.rounding, LARGEST)

    def rounding_note(self) -> str:
        """For the detail of a check in which rounding excused an error."""
        return f"; one unit in the last place moves the original by {self.rounding:.1e}" if self.rounding else ""

    def _run_original(
        self, whole: dict[str, Any], orders: Orders, seed: int, original: Runnable | None = None
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        outputs, parameters, _ = (original or self.original).run(whole)
        tensors = [i for i, value in enumerate(outputs) if isinstance(value, torch.Tensor)]
        chosen = [i for i in tensors if self._known(self.original.outputs[i], outputs[i])]
        kept = [outputs[i] for i in chosen]
        weights = loss_weights(kept, seed)
        names = [self.original.outputs[i] for i in chosen]
        return {
            "chosen": chosen,
            "names": names,
            "outputs": [self._permute(value.detach(), name, orders) for value, name in zip(kept, names, strict=True)],
            "weights": [self._permute(weight, name, orders) for weight, name in zip(weights, names, strict=True)],
            "gradients": gradients(kept, weights, parameters),
            "unknown": [self.original.outputs[i] for i in tensors if i not in chosen],
            "seed": seed,
        }

    def _run_changed(self, values: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(expected["seed"])
        outputs, parameters, _ = self.changed.run(values)
        kept = [outputs[i] for i in expected["chosen"]]
        return {"outputs": kept, "gradients": gradients(kept, expected["weights"], parameters)}

    @staticmethod
    def _against(expected: dict[str, Any], actual: dict[str, Any]) -> _Result:
        result = _Result()
        for name, left, right in zip(expected["names"], expected["outputs"], actual["outputs"], strict=True):
            scale = float(left.abs().max()) if left.numel() else 0.0
            gap = difference(left, right)
            exact = not (left.is_floating_point() or left.is_complex())
            result.add((float("inf") if gap else 0.0) if exact else gap / scale if scale else gap, name)
        error, where = gradient_error(expected["gradients"], actual["gradients"])
        for gradient in expected["gradients"].values():
            if gradient is not None:
                result.add(0.0, "")
        result.unknown = expected["unknown"]
        if error > result.worst:
            result.worst, result.where = error, f"the gradient of {where}"
        return result

    def controls(self, case: Case, seed: int) -> list[str]:
        """The lifted inputs whose perturbation moves nothing."""
        orders = self.orders(case, seed)
        whole, permuted, feed = self._inputs(case, orders)
        expected = self._run_original(whole, orders, seed)
        silent = []
        for lifted in self.lifted.inputs:
            for other in self.perturbed(lifted, feed[lifted.name]):
                if self._moves({**permuted, **feed, lifted.name: other}, expected):
                    break
            else:
                silent.append(lifted.name)
        return silent

    def _moves(self, inputs: dict[str, Any], expected: dict[str, Any]) -> bool:
        """Whether perturbed inputs give something else; so does an index that leaves its table, or slots that a ring
        refuses."""
        try:
            return bool(self._against(expected, self._run_changed(inputs, expected)).worst >= CONTROL)
        except (IndexError, RuntimeError, FeedError):
            return True

    def perturbed(self, lifted: LiftedInput, value: torch.Tensor) -> list[torch.Tensor]:
        """Other values for a lifted input: another length, if only the number of keys is read from it."""
        dim = 1 if lifted.batched else 0
        if self._is_read_for_its_size(lifted.name):
            return [torch.cat([value, value.narrow(dim, 0, 1)], dim)]
        return perturbed(value, dim)

    def _is_read_for_its_size(self, name: str) -> bool:
        """Whether only the number of keys is read from a lifted input."""
        node = next(n for n in self.changed.graph.nodes if n.op == "placeholder" and n.name == name)
        readers = [user for spread in node.users for user in ([spread] if _is_size(spread) else spread.users)]
        return bool(readers) and all(_is_size(user) for user in readers)

    def first_difference(self, case: Case, seed: int) -> str:
        """The first op on data, in graph order, whose value is not the original's, permuted."""
        orders = self.orders(case, seed)
        whole, permuted, feed = self._inputs(case, orders)
        names = {name for name, known in self.labels.items() if known and any(has_seq(d) for d in known[0])}
        present = {node.name for node in self.changed.graph.nodes}
        names &= present & {node.name for node in self.original.graph.nodes}
        _, _, left = self.original.run(whole, names)
        _, _, right = self.changed.run({**permuted, **feed}, names)
        for node in self.original.graph.nodes:
            if node.op == "placeholder" or node.name not in left or not isinstance(left[node.name], torch.Tensor):
                continue
            if node.name not in right or left[node.name].shape != right[node.name].shape:
                return node.name
            if not any(has_batch(d) for d in self._labels_of(node.name)) or not self._plain(node.name):
                continue
            expected = self._permute(left[node.name], node.name, orders)
            scale = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 1.0
            if difference(expected, right[node.name]) > 1e-7 * max(scale, 1e-12):
                return node.name
        return ""

    def _labels_of(self, name: str) -> Labels:
        known = self.labels.get(name)
        return known[0] if known else ()

    def _plain(self, name: str) -> bool:
        """Whether no dim folds the sequence with something else than the batch in front of it."""
        return all(len(dim) <= 1 for dim in self._labels_of(name) if has_seq(dim))

    def _known(self, name: str, value: Any) -> bool:
        known = self.labels.get(name)
        return bool(known) and len(self._labels_of(name)) == value.ndim

    def _permute(self, value: torch.Tensor, name: str, orders: Orders) -> torch.Tensor:
        """A value of the original with its sequence dims in the order of the shards."""
        return permuted(value, self._labels_of(name), orders)


def permuted(value: torch.Tensor, labels: Labels, orders: Orders) -> torch.Tensor:
    """A value whose dims run as ``labels`` say, with its sequence dims in the order of the shards.

    Without labels it is the value itself.
    """
    if not labels:
        return value
    shape: list[int] = []
    batch: int | None = None
    sequences: list[tuple[int, str]] = []
    for label, size in zip(labels, value.shape, strict=True):
        for factor in label or (None,):
            if factor is not None and factor.axis == BATCH:
                batch = len(shape)
            elif factor is not None and factor.is_seq:
                sequences.append((len(shape), factor.axis))
            shape.append(size if len(label) <= 1 else _factor_size(factor, orders))
    laid = value.reshape(shape)
    for dim, axis in sequences:
        order = orders[axis]
        if batch is None:
            laid = laid.index_select(dim, order[0])
            continue
        moved = laid.movedim((batch, dim), (0, 1))
        index = order.expand(moved.shape[0], -1)
        index = index.view(*index.shape, *[1] * (moved.ndim - 2)).expand_as(moved)
        laid = moved.gather(1, index).movedim((0, 1), (batch, dim))
    return laid.reshape(value.shape)


def _factor_size(factor: Factor | None, orders: Orders) -> int:
    """The run-time size of a factor of a folded dim; -1 for what a reshape can infer."""
    if factor is None or not factor.axis:
        return factor.size if factor is not None and isinstance(factor.size, int) else -1
    return orders[factor.axis].shape[1] if factor.is_seq else next(iter(orders.values())).shape[0]


def perturbed(value: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Other values of the same kind: reversed along the sequence, shifted in its second half, and zero."""
    half = value.shape[dim] // 2
    moved = value.clone()
    part = moved.narrow(dim, half, value.shape[dim] - half)
    if value.dtype == torch.bool:
        part.logical_not_()
    else:
        part.add_(1)
    flipped = value.flip(dim)
    return [*([] if torch.equal(flipped, value) else [flipped]), moved, torch.zeros_like(value)]
