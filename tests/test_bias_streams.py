"""A bias for each key follows the position ids, a mask the slots, whatever the form and the program's other reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export
from zoo.transformers_decoders import build_model

import buffer_lifting as bl

VOCAB, WIDTH, BATCH, LENGTH = 17, 8, 3, 12
FORMS = ("auto", "values", "positions")
Join = Callable[[Tensor, Tensor, Tensor], Tensor]

#: How a bias ``[batch or 1, 1, 1, keys]`` of the position ids meets the causal mask; slots ``[seq]`` are the third.
BIASES: dict[str, Join] = {
    "where": lambda bias, seen, _: torch.where(seen, bias, -1e9),
    "masked_fill": lambda bias, seen, _: bias.expand(-1, -1, seen.shape[0], -1).masked_fill(~seen, -1e9),
    "sum": lambda bias, seen, _: bias + torch.zeros(seen.shape, dtype=bias.dtype).masked_fill(~seen, -1e9),
    "product": lambda bias, seen, _: bias * seen,
    "alone": lambda bias, seen, _: bias.expand(-1, -1, seen.shape[0], -1),
    "prefix": lambda bias, seen, i: torch.where(seen | (i < 3), bias, -1e9),
    "prefix_of_queries": lambda bias, seen, i: torch.where(seen | ((i < 3)[:, None] & (i < 3)), bias, -1e9),
    "window": lambda bias, seen, i: torch.where(seen & (i[:, None] - i < 4), bias, -1e9),
    "chunks": lambda bias, seen, i: torch.where(seen & (i[:, None] // 5 == i // 5), bias, -1e9),
    "tril": lambda bias, seen, _: torch.where(torch.ones_like(seen).tril(), bias, -1e9),
}


class Biased(nn.Module):
    """Attention with a bias of the key's position; ``learned`` reads the same position ids from a table as well."""

    def __init__(self, join: Join, learned: bool, counted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.t = nn.Parameter(torch.randn(64, WIDTH))
        self.join, self.learned, self.counted = join, learned, counted

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states ``[batch, seq, WIDTH]``; one index makes slots and, unless they are given, position ids."""
        slots = torch.arange(ids.shape[1])
        own = torch.ones_like(ids).cumsum(1) - 1 if self.counted else slots[None]
        p = own if positions is None else positions
        x = self.e(ids)
        if self.learned:
            x = x + self.t[p]
        bias = (-0.1 * p.to(x.dtype))[:, None, None, :]
        mask = self.join(bias, slots[:, None] >= slots, slots).expand(ids.shape[0], 1, len(slots), len(slots))
        return self.h(F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0])


def check_packed(model: Biased, form: str, dynamic: bool) -> None:
    """Lifted in a form, the program gives for packed documents what the model gives for their position ids."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=g)
    ep = export(model, (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None)
    lifted = bl.context_parallel(bl.lift(ep, form=form), size=1)
    positions = torch.stack([torch.cat([torch.arange(5 - b), torch.arange(LENGTH - 5 + b)]) for b in range(BATCH)])
    order = torch.stack([torch.randperm(LENGTH, generator=g) for _ in range(BATCH)])
    wanted = model(ids, positions)
    assert (wanted - model(ids)).abs().max() > 1e-3, "the position ids do not matter"
    got = lifted.program.module()(ids.gather(1, order), **lifted.feed(BATCH, LENGTH, order=order, positions=positions))
    torch.testing.assert_close(got, wanted.gather(1, order[..., None].expand_as(wanted)), rtol=0, atol=1e-12)
    assert bl.verify(ep, lifted).passed


CASES = [(name, "auto", False) for name in BIASES] + [(name, "values", True) for name in BIASES]
CASES += [("where", "positions", True), ("where", "values", False)]


@pytest.mark.parametrize(("name", "form", "learned"), CASES)
def test_a_bias_of_each_key_follows_the_positions(name: str, form: str, learned: bool) -> None:
    """It followed the slots, unless another read of the program took the same index for position ids."""
    check_packed(Biased(BIASES[name], learned, False).double(), form, True)


@pytest.mark.parametrize("form", ["auto", "values"])
def test_positions_that_are_counted(form: str) -> None:
    """Falcon's: a cumsum of ones, of which no index is a part."""
    check_packed(Biased(BIASES["where"], True, True).double(), form, False)


def test_the_streams_are_those_of_each_value() -> None:
    """The mask alone reads slots; a value of chunks that is lifted as such is one of slots, not of position ids."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    ep = export(Biased(BIASES["chunks"], True, False), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    streams = {(item.role, item.stream, item.name) for item in bl.lift(ep, form="values").inputs}
    assert {(role, stream) for role, stream, name in streams if "div" in name} == {("row", "slots"), ("col", "slots")}
    assert {stream for _, stream, name in streams if "mul" in name} == {"positions"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_alibi_of_real_models_follows_the_positions(name: str, form: str) -> None:
    """Falcon joins it with the mask, Bloom adds the mask to the scores behind it: both are biases of positions."""
    if name == "bloom":
        model = build_model("BloomForCausalLM", "BloomConfig", attention="eager", n_layer=1, n_head=4)
    else:
        options = {"alibi": True, "new_decoder_architecture": False, "multi_query": True, "num_hidden_layers": 1}
        model = build_model("FalconForCausalLM", "FalconConfig", attention="sdpa", **options)
    ids = {"input_ids": torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(1))}
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    ep = export(model.eval(), (), ids, dynamic_shapes=shapes, strict=False)
    lifted = bl.context_parallel(bl.lift(ep, form=form), size=1)
    assert {item.stream for item in lifted.inputs if "slots" not in item.name} == {"positions"}
    assert bl.verify(ep, lifted).passed
