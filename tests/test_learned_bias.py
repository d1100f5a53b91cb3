"""A learned additive bias that is cut to the sequence, ``bias[:S, :S]``, on several context-parallel ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

HEADS, WIDTH = 2, 8


class Biased(nn.Module):
    """One layer of attention; the bias is of every head, or of all of them."""

    def __init__(self, each: bool, written_out: bool) -> None:
        super().__init__()
        self.each, self.written_out = each, written_out
        self.embed, self.qkv, self.out = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 9)
        self.bias = nn.Parameter(torch.randn(*((1, HEADS) if each else ()), 32, 32))

    def forward(self, ids: Tensor) -> Tensor:
        batch, seq = ids.shape
        heads = self.qkv(self.embed(ids)).view(batch, seq, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        bias = self.bias[:, :, :seq, :seq] if self.each else self.bias[:seq, :seq]
        if self.written_out:
            mixed = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, WIDTH))


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_a_learned_bias_on_two_ranks(each: bool, written_out: bool) -> None:
    """Outputs and every gradient, the bias's too, in float64."""
    torch.manual_seed(0)
    ids = torch.randint(9, (2, 8))
    program = export(Biased(each, written_out), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    lifted = bl.lift(program)
    for strategy in ["allgather"] if written_out else ["allgather", "alltoall"]:
        report = bl.verify(program, bl.context_parallel(lifted, size=2, strategy=strategy))
        assert report.passed, report


class Pairs(Biased):
    """The bias of two tokens: its columns are picked by the tokens of the keys, which another rank has."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        picked = hidden.argmax(-1)
        scores = hidden @ hidden.transpose(1, 2) + self.bias[picked[:, :, None], picked[:, None, :]]
        return self.out(scores.softmax(-1) @ hidden)


def test_columns_picked_by_data_are_refused_or_right() -> None:
    torch.manual_seed(0)
    ids = torch.randint(9, (2, 8))
    program = export(Pairs(False, True), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    with pytest.raises(bl.UnsupportedReadError, match=r"BL20\d node 'index'.*aten\.index"):
        bl.context_parallel(bl.lift(program), size=2)
