"""Tokens routed to experts by data and back are local; what only looks like it is a finding."""

from __future__ import annotations

import pytest
import routing_faults
import routing_models
import torch
from routing_models import Experts, Grouped, export
from torch import Tensor

import buffer_lifting as bl


def _regions(lifted: bl.LiftedProgram) -> list[bl.SequenceMixing]:
    return [entry for entry in lifted.report.mixing if "routed to experts" in entry.reason]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("style", routing_models.RIGHT, ids=lambda style: style.__name__)
def test_a_style_of_routing_is_one_local_region_a_layer(style: type[Experts], dynamic: bool) -> None:
    """Lifted, split between the layers and verified; the indices and accumulators are no reads."""
    program = export(style, dynamic)
    lifted = bl.lift(program)
    regions = _regions(lifted)
    assert [(entry.handled, entry.code, entry.modules) for entry in regions] == [
        (True, "BL200", ("layers.0.experts",)),
        (True, "BL200", ("layers.1.experts",)),
    ]
    assert {read.source for read in lifted.report.reads} == {"positions", "aten.arange"}
    assert all(read.node.startswith(("add", "scaled_dot")) for read in lifted.report.reads)
    staged = bl.partition(bl.context_parallel(lifted, size=1), num_stages=2)
    assert bl.verify(program, staged).passed


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("style", routing_models.LOCAL, ids=lambda style: style.__name__)
def test_dense_experts_are_plainly_local(style: type[Experts], dynamic: bool) -> None:
    """No region, no finding."""
    program = export(style, dynamic)
    lifted = bl.lift(program)
    assert not _regions(lifted) and not lifted.report.refused
    assert bl.verify(program, bl.context_parallel(lifted, size=1)).passed


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("fault", routing_faults.WRONG, ids=lambda fault: fault.__name__)
def test_one_wrong_line_is_a_finding(fault: type[Experts], dynamic: bool) -> None:
    """A token's result depends on the others, or could: refused, with a node of the layer."""
    program = export(fault, dynamic, layers=1)
    report = bl.scan(program)
    found = [entry for entry in report.mixing if not entry.handled]
    refused = [read for read in report.reads if read.refusal]
    assert {entry.code for entry in found} <= {"BL201", "BL202"}
    assert {read.code for read in refused} <= {"BL104", "BL105"}
    assert found or refused
    assert all(entry.location is not None and entry.hint for entry in found)
    with pytest.raises(bl.UnsupportedReadError):
        bl.lift(program)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("NotUnsorted", "BL201", "rows are tokens in an order that data chose"),
        ("UnsortedByOrder", "BL201", "rows are tokens in an order that data chose"),
        ("RunningSumOfRows", "BL201", "cumsum runs along"),
        ("SoftmaxOverRows", "BL201", "a softmax along the sequence"),
        ("OwnPlaceOfRow", "BL201", "the places of routed tokens reach the data"),
        ("CountsInTheData", "BL201", "a number of tokens per expert reaches the data"),
        ("BalancedBias", "BL201", "a number of tokens per expert reaches the data"),
        ("LoopByNumber", "BL201", "a number of routed tokens enters"),
        ("AuxiliaryLoss", "BL201", "a reduction over the sequence"),
        ("CapacityByRank", "BL201", "cumsum runs along"),
        ("OtherKey", "BL201", "groups are not known to be the rows of one expert"),
        ("WrittenTwice", "BL201", "rows do not go back by the index that fetched them"),
        ("SortedTokens", "BL201", "sort runs along the sequence or batch"),
    ],
)
def test_a_fault_says_what_is_wrong(fault: str, code: str, words: str) -> None:
    """The reason, in a static program: nothing there is found by a symbol."""
    report = bl.scan(export(getattr(routing_faults, fault), False, layers=1))
    assert any(entry.code == code and words in entry.reason for entry in report.mixing if not entry.handled)


class _Permuted(Grouped):
    """Something after the unsorting."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return super().combine(rows, order, count) + torch.flip(super().combine(rows, order, count), [0])


def test_a_region_does_not_excuse_what_follows_it() -> None:
    """The tokens are in their places again, and must stay there."""
    with pytest.raises(bl.UnsupportedReadError, match="flip"):
        bl.lift(export(_Permuted, True, layers=1))


class _ReturnsRows(Grouped):
    """The rows leave the layer as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, dim]``, in the order of the experts."""
        flat = x.reshape(-1, x.shape[-1])
        return flat[torch.argsort(self.gate(flat)[:, 0])]


def test_layers_are_cut_not_their_experts() -> None:
    """Four experts in a list are more than two layers, and no place to cut."""
    program = export(routing_models.LoopModules, True)
    staged = bl.partition(bl.context_parallel(bl.lift(program), size=1), num_stages=2)
    assert any("layers.1" in name for name in staged.stages[1].parameters)
    assert not any("layers.0" in name for name in staged.stages[1].parameters)
    assert bl.verify(program, staged).passed


@pytest.mark.parametrize("point", ["layers.0.experts.each.1", "layers.1.experts.each.2"])
def test_a_stage_cannot_begin_inside_a_region(point: str) -> None:
    """Its boundary would carry a number of rows that data decides."""
    lifted = bl.context_parallel(bl.lift(export(routing_models.GroupedModules, True)), size=1)
    with pytest.raises(bl.PartitionError, match="inside the routing of tokens"):
        bl.partition(lifted, split_points=[point])


def test_returned_rows_are_a_finding() -> None:
    """The caller would get rows in an order that data chose."""

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.experts = torch.nn.Embedding(31, 8), _ReturnsRows()

        def forward(self, ids: Tensor) -> Tensor:
            return self.experts(self.embed(ids))

    program = torch.export.export(Whole(), (torch.zeros(3, 5, dtype=torch.int64),), strict=False)
    with pytest.raises(bl.UnsupportedReadError, match="rows are returned in an order that data chose"):
        bl.lift(program)
