"""Faults that a review found, each by name: a program either lifts and verifies, or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

VOCAB, WIDTH, LENGTH = 17, 8, 10
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """An embedding, a position table and a head around the op under test."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.pe, self.h = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.body = body

    def forward(self, ids: Tensor) -> Any:
        """The body's."""
        return self.body(self, ids)


def program(body: Body, dynamic: bool) -> torch.export.ExportedProgram:
    """The exported net."""
    ids = torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    shapes = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    return export(Net(body), (ids,), dynamic_shapes=shapes)


def shifted_in_place(n: Net, ids: Tensor) -> Tensor:
    """``shift_tokens_right`` of transformers' decoders."""
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 2
    shifted.masked_fill_(shifted == 3, 1)
    return n.h(n.e(shifted))


HOISTED: dict[str, Body] = {
    "shifted_in_place": shifted_in_place,
    "shifted_by_cat": lambda n, i: n.h(n.e(torch.cat([i.new_full((i.shape[0], 1), 2), i[:, :-1]], 1))),
    "shifted_by_pad": lambda n, i: n.h(n.e(i) + n.e(F.pad(i, (1, 0))[:, :-1])),
    "flip": lambda n, i: n.h(n.e(i.flip(1))),
    "cummax": lambda n, i: n.h(n.e(i.cummax(1)[0])),
    "positions_from_mask": lambda n, i: n.h(n.e(i) + n.pe((i > 3).cumsum(1))),
    "roll": lambda n, i: n.h(n.e(i) + n.e(i.roll(1, 1))),
    "running_sum": lambda n, i: n.h(n.e(i.cumsum(1) % VOCAB)),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", HOISTED)
def test_integer_inputs_that_mix_the_sequence_are_hoisted(name: str, dynamic: bool) -> None:
    """They were read from the shard, silently, in static programs."""
    ep = program(HOISTED[name], dynamic)
    lifted = bl.lift(ep)
    assert [item.stream for item in lifted.inputs] == ["inputs"]
    assert bl.verify(ep, lifted).passed


@pytest.mark.parametrize("dynamic", [True, False])
def test_hoisted_tokens_are_what_stages_compute_with(dynamic: bool) -> None:
    """A model whose only tokens are shifted in the graph had no activations, and could not be split."""
    ep = program(HOISTED["shifted_by_cat"], dynamic)
    staged = bl.partition(bl.context_parallel(bl.lift(ep), size=1), split_points=["h"])
    assert bl.verify(ep, staged).passed
    assert "lifted_ids" in staged.stages[0].kwargs and not staged.stages[1].kwargs


TOKENS: dict[str, Body] = {
    "first": lambda n, i: n.h(n.e(i) + n.e(i[:, :1])),
    "last": lambda n, i: n.h(n.e(i) + n.e(i[:, -1])[:, None]),
    "last_but_one": lambda n, i: n.h(n.e(i) * (i == i[:, -2:-1])[..., None]),
    "of_a_mask": lambda n, i: n.h(n.e(i) * (i > 3)[:, 2][:, None, None]),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_one_token_of_the_user_is_found_among_the_keys(name: str, dynamic: bool) -> None:
    """It was refused: each sample has one, and no sequence dim to gather along."""
    ep = program(TOKENS[name], dynamic)
    lifted = bl.lift(ep)
    assert [(item.stream, item.role) for item in lifted.inputs] == [("inputs", "col"), ("slots", "col")]
    assert not bl.check(lifted)
    assert bl.verify(ep, bl.context_parallel(lifted, size=2 if dynamic else 1)).passed


WHOLE: dict[str, Body] = {
    "cumsum": lambda n, i: n.h(n.e(i) + n.pe.weight[: i.shape[1]].cumsum(0)),
    "centred": lambda n, i: n.h(
        n.e(i) + F.normalize(n.pe(torch.arange(i.shape[1])).diff(dim=0, prepend=n.h.weight[:1]))
    ),
    "resampled": lambda n, i: n.h(
        n.e(i) + F.interpolate(n.pe.weight.T[None], size=i.shape[1], mode="linear").squeeze(0).T
    ),
    "bias_of_keys": lambda n, i: n.h(
        F.scaled_dot_product_attention(
            *[n.e(i)[:, None]] * 3,
            attn_mask=torch.where(
                torch.ones(i.shape[1], i.shape[1], dtype=torch.bool).tril(),
                n.pe.weight[: i.shape[1], 0].cumsum(0),
                -1e9,
            ),
        )[:, 0]
    ),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_rows_made_of_rows_of_a_parameter_stay_whole(name: str, dynamic: bool) -> None:
    """They were refused: no input can carry a gradient. In natural order in the stage, their gradient flows."""
    ep = program(WHOLE[name], dynamic)
    lifted = bl.lift(ep)
    assert [read.form for read in lifted.report.reads] == ["natural"]
    assert bl.verify(ep, bl.context_parallel(lifted, size=2 if dynamic else 1)).passed
    assert not bl.check(lifted)


REFUSED: dict[str, tuple[Body, str]] = {
    "first_tokens": (lambda n, i: n.h(n.e(i) + n.e(i[:, :2]).sum(1, keepdim=True)), "mixes the sequence"),
    "a_part_alone": (lambda n, i: n.h(n.e(i[:, 1:])), "mixes the sequence"),
    "one_token_more": (lambda n, i: n.h(n.e(F.pad(i, (1, 0)))), "mixes the sequence"),
    "argmax_of_ids": (lambda n, i: n.h(n.e(i) + n.pe(i.argmax(1))[:, None]), "mixes the sequence"),
    "attention_over_the_batch": (
        lambda n, i: n.h(F.scaled_dot_product_attention(*[n.e(i).transpose(0, 1)] * 3).transpose(0, 1)),
        "attention along the batch",
    ),
    "attention_over_all_tokens": (
        lambda n, i: n.h(((x := n.e(i).flatten(0, 1)) @ x.T).softmax(-1) @ x).unflatten(0, i.shape),
        "a softmax along the batch",
    ),
    "best_key": (lambda n, i: n.h(n.e(i) + n.pe((n.e(i) @ n.e(i).mT).argmax(-1))), "an index along it is taken"),
    "best_key_of_max": (
        lambda n, i: n.h(n.e(i) + n.pe((n.e(i) @ n.e(i).mT).max(-1)[1])),
        "an index along the sequence",
    ),
    "global_mean": (lambda n, i: n.h(n.e(i) - n.e(i).mean()), "goes back into the tokens"),
    "argmax_of_data": (lambda n, i: n.h(n.e(i) + (n.e(i).argmax() % 7).float()), "a reduction over the batch"),
    "flattened_positions": (
        lambda n, i: n.h(n.e(i) + n.pe(torch.arange(i.numel()).view(i.shape))),
        "other values for each sample|folded|cut|cannot be lifted",
    ),
    "rows_of_a_table_by_batch": (lambda n, i: n.h(n.e(i) + n.pe.weight[: i.shape[0], None]), "varies along the batch"),
    "values_of_the_sample": (
        lambda n, i: n.h(
            n.e(i)
            + torch.sin((torch.arange(i.shape[0])[:, None] * 3 + torch.arange(i.shape[1])[None]).float())[..., None]
        ),
        "other values for each sample",
    ),
    "index_over_the_batch": (
        lambda n, i: n.h(n.e(i) + n.pe(torch.arange(i.shape[0]))[:, None]),
        "varies along the batch",
    ),
    "dropout_on_positions": (
        lambda n, i: n.h(n.e(i) + F.dropout(n.pe(torch.arange(i.shape[1])), 0.1, True)),
        "draws random numbers",
    ),
    "noise_of_each_token": (lambda n, i: n.h(n.e(i) + torch.randn_like(n.e(i))), "random numbers for the tokens"),
    "noise_written_in_place": (
        lambda n, i: n.h(n.e(i) * torch.empty_like(n.e(i)).uniform_(0.9, 1.1)),
        "random numbers for the tokens",
    ),
    "gumbel_softmax": (lambda n, i: n.h(F.gumbel_softmax(n.e(i), dim=-1)), "random numbers for the tokens"),
    "noise_around_data": (lambda n, i: n.h(torch.normal(n.e(i), 1.0)), "random numbers for the tokens"),
    "dropped_samples": (
        lambda n, i: n.h(n.e(i) * (torch.rand(i.shape[0], 1, 1) < 0.5)),
        "random numbers for the tokens",
    ),
    "returned_running_count": (lambda n, i: (n.h(n.e(i)), (i > 3).cumsum(1)), "it is returned"),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_is_refused(name: str, dynamic: bool) -> None:
    """Each of these lifted without a finding, and was wrong."""
    body, reason = REFUSED[name]
    with pytest.raises(bl.UnsupportedReadError, match=reason):
        bl.lift(program(body, dynamic))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_cut_that_no_read_kept_leaves_no_placeholder(dynamic: bool) -> None:
    """A refused length mask crashed the pass with an assertion."""
    ep = program(
        lambda n, i: n.h(n.e(i) * (torch.arange(i.shape[1])[None] < (i > 3).sum(1, keepdim=True))[..., None]), dynamic
    )
    try:
        lifted = bl.lift(ep)
    except bl.UnsupportedReadError:
        lifted = bl.lift(ep, strict=False)
    assert bl.verify(ep, lifted, checks=("identity",)).passed


def test_causal_cross_attention_is_refused() -> None:
    """The mask would have had the queries' length on both sides."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

        def forward(self, ids: Tensor, src: Tensor) -> Tensor:
            keys = self.e(src)
            return self.h(F.scaled_dot_product_attention(self.e(ids), keys, keys, is_causal=True))

    ep = export(Cross(), (torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)))
    axes = {"ids": {0: "batch", 1: "seq"}, "src": {0: "batch", 1: "enc"}}
    with pytest.raises(bl.UnsupportedReadError, match="another axis"):
        bl.lift(ep, axes=axes)


def test_equivariance_compares_integer_and_unknown_outputs() -> None:
    """Outputs that were left out made the oracle pass."""
    ep = program(lambda n, i: (n.h(n.e(i)), (i > 3).cumsum(1)), True)
    lifted = bl.lift(ep, strict=False)
    with pytest.raises(bl.VerificationError, match="equivariance"):
        bl.verify(ep, lifted, checks=("equivariance",))
    ep = program(lambda n, i: n.h(n.e(i)).argmax(-1), True)
    assert bl.verify(ep, bl.lift(ep), checks=("equivariance",)).passed


def test_dropout_and_low_precision_verify() -> None:
    """Equivariance switches dropout off; scatter-add gradients of a table are compared by its dtype."""

    def body(net: Net, ids: Tensor) -> Tensor:
        return net.h(F.dropout(net.e(ids) + net.pe(torch.arange(ids.shape[1])), 0.1, True))

    ep = program(body, True)
    report = bl.verify(ep, bl.lift(ep))
    assert report.passed and any("dropout" in note for note in report.notes)
    relative = program(
        lambda n, i: n.h(
            n.e(i) + n.pe((torch.arange(i.shape[1])[None] - torch.arange(i.shape[1])[:, None]).clamp(-4, 4) + 4).mean(1)
        ),
        True,
    )
    assert bl.verify(relative, bl.context_parallel(bl.lift(relative), size=2)).passed


@pytest.mark.parametrize(
    "axes",
    [
        {"ids": {0: "seq", 1: "seq"}},
        {"ids": {0: "batch", 1: "seq:query"}},
        {"ids": {0: "batch", 1: ""}},
        {"ids": {0: "batch:row", 1: "seq"}},
        {"ids": "batch"},
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: Any) -> None:
    """Two sizes for one axis, a role or name that does not exist, no mapping."""
    with pytest.raises(bl.AxesError, match="axes="):
        bl.scan(program(lambda n, i: n.h(n.e(i)), True), axes=axes)


def test_a_form_pattern_that_matches_nothing_is_refused() -> None:
    """A typo in a pattern would have changed nothing."""
    ep = program(lambda n, i: n.h(n.e(i) + n.pe(torch.arange(i.shape[1]))), True)
    with pytest.raises(ValueError, match="zzz"):
        bl.lift(ep, form={"zzz*": "values"})
    assert bl.lift(ep, form={"pe.*": "positions"}).inputs


def test_position_ids_without_a_batch_dim() -> None:
    """``[1, S]``: one order for all samples; an order per sample is refused by the input's name."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.pe, self.h = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH), nn.Linear(WIDTH, VOCAB)

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.h(self.e(ids) + self.pe(position_ids))

    ep = export(Given(), (torch.ones(3, LENGTH, dtype=torch.long), torch.arange(LENGTH)[None]))
    lifted = bl.lift(ep)
    assert bl.verify(ep, lifted).passed
    order = torch.stack([torch.randperm(LENGTH) for _ in range(3)])
    with pytest.raises(bl.FeedError, match="position_ids"):
        lifted.shard_inputs(order=order, position_ids=torch.arange(LENGTH)[None])


def test_feed_refuses_inputs_that_the_program_does_not_have() -> None:
    """A misspelt input was ignored."""
    lifted = bl.lift(program(HOISTED["flip"], True))
    with pytest.raises(bl.FeedError, match="idz"):
        lifted.feed(3, LENGTH, inputs={"idz": torch.ones(3, LENGTH, dtype=torch.long)})


def test_a_check_in_which_no_control_moves_anything_fails() -> None:
    """A table of zeros: the only lifted input is multiplied away, so equivariance holds for nothing."""
    ep = program(lambda n, i: n.h(n.e(i) + 0.0 * torch.arange(i.shape[1]).float()[:, None]), True)
    with pytest.raises(bl.VerificationError, match="proves nothing"):
        bl.verify(ep, bl.lift(ep, form="positions"), checks=("equivariance",))
