"""Faults that random programs found (``tests/generator``), each by name and as a hand-written module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants import at_input, roll
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import buffer_lifting as bl

VOCAB, WIDTH, HEADS, TABLE = 13, 8, 2, 40
Body = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """An embedding, tables of several kinds, and a head around the read under test: ``body(net, ids, x)``."""

    buffer: Tensor
    square: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3)
        self.types = nn.Embedding(2, WIDTH)
        self.learned = nn.Parameter(torch.randn(TABLE, WIDTH))
        self.register_buffer("buffer", torch.randn(TABLE, WIDTH))
        self.register_buffer("square", torch.ones(TABLE, TABLE).tril())
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, S]`` to ``[B, S, 3]``."""
        return self.head(self.body(self, ids, self.embed(ids)))


def program(body: Body, dynamic: bool) -> ExportedProgram:
    """The exported net, two samples of six tokens."""
    ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    return export(Net(body).eval(), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None)


def heads(x: Tensor) -> Tensor:
    """``[B, S, W]`` to ``[B, H, S, D]``."""
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    """Fused attention of ``x`` with itself."""
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


def autocast_rows(n: Net, ids: Tensor, x: Tensor) -> Tensor:
    """The chain of a buffer goes through a higher-order op."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = n.buffer[: ids.shape[1]] * 0.5 + 1
    return x + rows


def alibi(n: Net, ids: Tensor, x: Tensor) -> Tensor:
    """A bias per head, without a batch dim."""
    place = torch.arange(ids.shape[1])
    slopes = torch.tensor([0.5, 0.25]).view(HEADS, 1, 1)
    return attend(x, -(place[:, None] - place[None, :]).abs() * slopes)


VERIFIES: dict[str, Body] = {
    "autocast_block_above_the_cut": autocast_rows,
    "sigmoid_of_a_learned_table": lambda n, i, x: x * torch.sigmoid(n.learned[: i.shape[1]]),
    "learned_table_through_bfloat16": lambda n, i, x: x + n.learned[: i.shape[1]].bfloat16().float(),
    "alibi_in_fused_attention": alibi,
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", VERIFIES)
def test_what_lifts_also_verifies(name: str, dynamic: bool) -> None:
    """A crash of the lift, and right programs that verify called wrong by a rounding."""
    ep = program(VERIFIES[name], dynamic)
    lifted = bl.lift(ep)
    assert lifted.inputs
    staged = bl.partition(bl.context_parallel(lifted, size=1), num_stages=1)
    assert bl.verify(ep, staged).passed


def index_both(n: Net, ids: Tensor, x: Tensor) -> Tensor:
    """Rows, then columns, by an index."""
    place = torch.arange(ids.shape[1])
    return attend(x, n.square.index_select(0, place).index_select(1, place) != 0)


def grid(n: Net, ids: Tensor, x: Tensor) -> Tensor:
    """Rows and columns by one index op."""
    place = torch.arange(ids.shape[1])
    return attend(x, n.square[place[:, None], place[None, :]] != 0)


SQUARES: dict[str, Body] = {
    "index_select": index_both,
    "grid": grid,
    "right_aligned": lambda n, i, x: attend(x, n.square[-i.shape[1] :, -i.shape[1] :] != 0),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_square_table_follows_the_shard(name: str) -> None:
    """Its keys kept the length of the shard; it may be refused, but not lifted wrongly."""
    ep = program(SQUARES[name], True)
    try:
        lifted = bl.lift(ep)
    except bl.UnsupportedReadError:
        return
    assert bl.verify(ep, lifted).passed


LENGTHS: dict[str, Callable[[Any], Any]] = {
    "fill_of_the_length": lambda length: torch.full((1,), length).float().log(),
    "scalar_tensor": lambda length: torch.scalar_tensor(length).log(),
    "division": lambda length: 1.0 / length,
    "root": lambda length: length**-0.5,
    "highest_index": lambda length: torch.arange(length).max().float(),
    "number_of_ones": lambda length: torch.ones(length).sum().log(),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_is_that_of_the_whole_sequence(name: str) -> None:
    """``full([1], S)`` was lifted without a finding, and took the length of the shard."""
    ep = program(lambda n, ids, x: x * LENGTHS[name](ids.shape[1]), True)
    try:
        lifted = bl.lift(ep)
    except bl.UnsupportedReadError:
        return
    assert bl.verify(ep, lifted).passed
    ids = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    module = lifted.program.module()
    for rank in range(2):
        shard = slice(4 * rank, 4 * rank + 4)
        try:
            feed = lifted.feed(2, 8, shard=(rank, 2))
        except bl.FeedError as error:
            assert "keys of the whole sequence" in str(error)  # without context_parallel
            continue
        torch.testing.assert_close(module(ids[:, shard], **feed), ep.module()(ids)[:, shard])


FILLS: dict[str, Body] = {
    "zeros": lambda n, i, x: x + torch.zeros(i.shape[1], WIDTH),
    "full": lambda n, i, x: x * torch.full((i.shape[0], i.shape[1], 1), 1.5),
    "zeros_like_data": lambda n, i, x: torch.zeros_like(x) + x,
    "token_types": lambda n, i, x: x + n.types(torch.zeros_like(i)),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", FILLS)
def test_a_fill_is_no_position(name: str, dynamic: bool) -> None:
    """The same value at every position: lifting it costs an input and gives nothing."""
    ep = program(FILLS[name], dynamic)
    lifted = bl.lift(ep)
    assert lifted.inputs == ()
    assert bl.verify(ep, lifted).passed


def causal(ids: Tensor) -> Tensor:
    """A causal mask of positions, ``[1, 1, S, S]``."""
    at = torch.arange(ids.shape[1])
    return (at[None, :] <= at[:, None])[None, None]


def test_data_that_lends_its_dtype_is_not_computed() -> None:
    """``table.type_as(h)`` made the values oracle compute ``h`` on a shard, where attention needs all keys."""

    def body(n: Net, ids: Tensor, x: Tensor) -> Tensor:
        h = attend(x, causal(ids))
        return h + n.learned[: ids.shape[1]].type_as(h)

    ep = program(body, True)
    assert bl.verify(ep, bl.lift(ep)).passed


def saturated(n: Net, ids: Tensor, x: Tensor) -> Tensor:
    """A softmax that is all but 0 and 1: its gradient is a difference of nearly equal sums."""
    return attend(x * (1 + 3e4 * n.buffer[: ids.shape[1]].abs()), causal(ids))


def test_a_program_that_amplifies_rounding_is_measured_by_its_own_rounding() -> None:
    """Gradients through a saturated softmax differ by more than 1e-9 in any other order of summation."""
    ep = program(saturated, False)
    lifted = bl.lift(ep)
    report = bl.verify(ep, lifted)
    assert report.passed
    assert any("one unit in the last place" in check.detail for check in report.checks)
    for item in lifted.inputs:
        with pytest.raises(bl.VerificationError):
            bl.verify(ep, at_input(lifted, item.name, roll(1)))
