"""Shards: the ranks of a context-parallel program together are the original, outputs and every gradient.

All ranks run in lockstep in one process, in float64, each on its part of every sequence in another order per
sample. This sees what a permutation on one rank cannot: lengths, local means, keys that were not gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.labels import ROW
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.compare import gradients
from buffer_lifting.oracles.equivariance import TOLERANCE, Orders, Pair
from buffer_lifting.oracles.lockstep import run_ranks
from buffer_lifting.oracles.losses import loss_shares
from buffer_lifting.oracles.running import Case, double_feed, doubled, resize_case, runnable
from buffer_lifting.passes.context_parallel import user_axes
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import Check
from buffer_lifting.ring import RING
from buffer_lifting.scanner import scan_record
from buffer_lifting.sharding import shard_inputs
from buffer_lifting.torch_compat import head_tail_indices


def check_shards(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case], seed: int) -> Check:
    """Outputs and every parameter gradient of ``lifted.cp_size`` ranks, for one random permutation per sample.

    Along an axis of ring attention, for the two orders that it takes.
    """
    size = lifted.cp_size or 1
    plan = scan_record(build_record(program, normalize(program, read_only=True).graph), user_axes(lifted))
    pair = _Shards(program, double_feed(lifted), plan)
    compared, worst = 0, 0.0
    cases = [resize_case(case, lifted, size * (2 if lifted.ring_axes else 1), seed) for case in cases]
    for case, pair.head_tail in product(cases, (False, True) if lifted.ring_axes else (False,)):
        try:
            result = pair.compare(case, seed)
        except RuntimeError as broken:
            text = (str(broken).strip() or type(broken).__name__).splitlines()[0]
            return Check("shards", False, compared, float("inf"), "", f"the program does not run: {text}")
        compared += result.compared
        worst = max(worst, result.worst)
        if result.unknown or not result.compared:
            node = result.unknown[0] if result.unknown else ""
            detail = f"how the output {node!r} follows the sequence is not known: it cannot be compared"
            return Check("shards", False, compared, worst, node, detail)
        if result.worst > TOLERANCE and not pair.is_rounding(result.worst, case, seed):
            detail = f"{result.where} is off by {result.worst:.2e} (relative), tolerance {TOLERANCE:.0e}"
            detail += pair.rounding_note()
            return Check("shards", False, compared, result.worst, result.where.rpartition(" ")[2], detail)
    silent = pair.controls(cases[0], seed)
    moved = len(lifted.inputs) - len(silent)
    if lifted.inputs and not moved:
        detail = f"perturbing {', '.join(silent)} moves no output and no gradient: the check proves nothing for them"
        return Check("shards", False, compared, worst, silent[0], detail)
    note = f"float64, {size} ranks, {moved} controls move it{pair.rounding_note()}"
    if silent:
        note += f"; it proves nothing for {', '.join(silent)}, which move no output and no gradient here"
    if any(node.target is RING for node in lifted.program.graph.nodes):
        orders = " in contiguous and head-tail order" if lifted.ring_axes else ""
        note += f"; attention{orders} as torch's ring makes it: the ring itself did not run"
    return Check("shards", True, compared, worst, "", note)


class _Shards(Pair):
    """The original on whole inputs against all ranks on theirs: each value of a rank's inputs is a list of them."""

    def __init__(self, program: ExportedProgram, lifted: LiftedProgram, plan: LiftPlan) -> None:
        super().__init__(
            runnable(program, double=True), runnable(lifted.program, double=True), lifted, plan.labels_of_original()
        )
        self.size, self.plan = lifted.cp_size or 1, plan
        self.head_tail = False  # the order along an axis of ring attention
        self.losses = {loss.node: loss for loss in lifted.losses}

    def orders(self, case: Case, seed: int) -> Orders:
        """As in :class:`Pair`; along an axis of ring attention, one of the orders that it takes."""
        orders = super().orders(case, seed)
        for axis in self.lifted.ring_axes:
            length = case.lengths[axis]
            order = head_tail_indices(length, self.size) if self.head_tail else torch.arange(length).unsqueeze(0)
            orders[axis] = order.repeat(len(orders[axis]), 1)
        return orders

    def _inputs(self, case: Case, orders: Orders) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        whole = {name: doubled(value) for name, value in case.named.items()}
        tensors = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
        known = {name: value for name, value in tensors.items() if name in self.lifted.input_axes}
        own: dict[str, list[Any]] = {name: [value] * self.size for name, value in whole.items()}
        feed: dict[str, list[Any]] = {item.name: [] for item in self.lifted.inputs}
        for rank in range(self.size):
            for name, part in shard_inputs(self.lifted.input_axes, known, orders, (rank, self.size)).items():
                own[name] = [*own[name][:rank], part, *own[name][rank + 1 :]]
            fed = self.lifted._feed(case.batch, case.lengths, tensors, orders, None, (rank, self.size), None)
            for name, part in fed.items():
                feed[name].append(part)
        return whole, own, feed

    def _run_changed(self, values: Mapping[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(expected["seed"])
        ranks = [{name: parts[rank] for name, parts in values.items()} for rank in range(self.size)]
        outputs, parameters, _ = run_ranks(self.changed, ranks)
        kept = [
            self._joined([own[index] for own in outputs], name, ranks)
            for index, name in zip(expected["chosen"], expected["names"], strict=True)
        ]
        return {"outputs": kept, "gradients": gradients(kept, expected["weights"], parameters)}

    def _joined(self, parts: list[torch.Tensor], name: str, ranks: list[dict[str, Any]]) -> torch.Tensor:
        """One output of all ranks: their rows in a row; a loss as the context-parallel contract sums it."""
        for dim, label in enumerate(self._labels_of(name)):
            if any(factor.is_seq and factor.role == ROW for factor in label):
                if len(label) == 1:
                    return torch.cat(parts, dim)
                return self._joined_inside(parts, dim, label)
        if name in self.losses:
            shares = loss_shares(self.losses[name], ranks)
            return torch.stack([part * share for part, share in zip(parts, shares, strict=True)]).sum(0)
        return parts[0]

    def _joined_inside(self, parts: list[torch.Tensor], dim: int, label: Any) -> torch.Tensor:
        """Concatenates along a sequence that is folded with other dims (``[B*S, D]``)."""
        place = next(i for i, factor in enumerate(label) if factor.is_seq)
        outer = 1
        for factor in label[:place]:
            if not isinstance(factor.size, int):
                if outer != 1 or place != 1:
                    raise LiftingError("an output folds the sequence with several dynamic dims: it cannot be compared")
                outer = -1
            elif outer > 0:
                outer *= factor.size
        inner = 1
        for factor in label[place + 1 :]:
            if not isinstance(factor.size, int):
                raise LiftingError("an output folds the sequence with several dynamic dims: it cannot be compared")
            inner *= factor.size
        if outer == -1:
            outer = self.batch
        shape = parts[0].shape
        laid = [part.reshape(*shape[:dim], outer, -1, inner, *shape[dim + 1 :]) for part in parts]
        return torch.cat(laid, dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])

    def compare(self, case: Case, seed: int) -> Any:
        """All ranks against the original."""
        self.batch = case.batch
        return super().compare(case, seed)

    def controls(self, case: Case, seed: int) -> list[str]:
        """The lifted inputs whose perturbation, on every rank, moves nothing."""
        orders = self.orders(case, seed)
        whole, own, feed = self._inputs(case, orders)
        expected = self._run_original(whole, orders, seed)
        silent = []
        for item in self.lifted.inputs:
            for parts in zip(*(self.perturbed(item, part) for part in feed[item.name]), strict=False):
                if self._moves({**own, **feed, item.name: list(parts)}, expected):
                    break
            else:
                silent.append(item.name)
        return silent
