"""Sums over all tokens, of which a context-parallel rank has a part: what may be made of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

VOCAB, BATCH, SEQ = 23, 2, 14


class Model(nn.Module):
    """Tokens with learned positions; ``compute`` makes the result of logits, hidden states and the second input."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.compute = compute
        self.embed = nn.Embedding(VOCAB, width)
        self.head = nn.Linear(width, VOCAB)
        self.table = nn.Parameter(torch.randn(64, width))

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.table[: ids.shape[1]]
        return self.compute(self.head(hidden), hidden, other)


def program(compute: Callable[[Tensor, Tensor, Tensor], Tensor], dynamic: bool = True) -> Any:
    """The second input is labels, some of them -100."""
    torch.manual_seed(0)
    ids = torch.randint(1, VOCAB, (BATCH, SEQ))
    labels = torch.randint(1, VOCAB, (BATCH, SEQ)).masked_fill(torch.rand(BATCH, SEQ) < 0.3, -100)
    labels[:, 0] = -100
    dims = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = {"ids": dims, "other": dims} if dynamic else None
    return export(Model(compute), (), {"ids": ids, "other": labels}, dynamic_shapes=shapes)


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


#: A loss, or a multiple of one: the parts of the ranks add up, weighed by their tokens.
ADDITIVE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda logits, hidden, labels: cross_entropy(logits, labels),
    "scaled": lambda logits, hidden, labels: -(cross_entropy(logits, labels) * 0.5).float() / 3,
    "sum": lambda logits, hidden, labels: cross_entropy(logits, labels, reduction="sum"),
    "by valid": lambda logits, hidden, labels: cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum(),
    "smooth": lambda logits, hidden, labels: cross_entropy(logits, labels, label_smoothing=0.1),
    "two sums": lambda logits, hidden, labels: cross_entropy(logits, labels, reduction="sum") + hidden.pow(2).sum(),
    "two means of all": lambda logits, hidden, labels: hidden.pow(2).mean() + 0.1 * logits.logsumexp(-1).pow(2).mean(),
    "two means of labels": lambda logits, hidden, labels: (
        cross_entropy(logits, labels)
        + 0.1 * (logits.logsumexp(-1).pow(2) * (labels != -100)).sum() / (labels != -100).sum()
    ),
    "by positions": lambda logits, hidden, labels: hidden.pow(2).sum() / torch.arange(1, hidden.shape[1] + 1).sum(),
    "weighed by positions": lambda logits, hidden, labels: (lambda w: (hidden.pow(2).sum(-1) * w).sum() / w.sum())(
        torch.arange(1, hidden.shape[1] + 1).sqrt()
    ),
    "mean of all": lambda logits, hidden, labels: hidden.pow(2).mean(),
    "squared error": lambda logits, hidden, labels: F.mse_loss(hidden, hidden.detach() * 2 + labels[..., None]),
    "absolute error": lambda logits, hidden, labels: F.l1_loss(logits[..., 0], labels.float(), reduction="sum"),
    "smooth error": lambda logits, hidden, labels: F.smooth_l1_loss(labels.float(), logits.mean(-1)),
    "yes or no": lambda logits, hidden, labels: F.binary_cross_entropy_with_logits(
        logits, (labels[..., None] > torch.arange(VOCAB)).float(), pos_weight=torch.linspace(0.5, 2, VOCAB)
    ),
    "weighed": lambda logits, hidden, labels: F.binary_cross_entropy(
        logits.sigmoid(), (logits > labels[..., None]).float(), weight=torch.linspace(0.5, 2, VOCAB)
    ),
    "divergence": lambda logits, hidden, labels: F.kl_div(
        logits.log_softmax(-1), logits.roll(1, -1).softmax(-1).detach(), reduction="batchmean"
    ),
    "errors of tokens": lambda logits, hidden, labels: F.mse_loss(
        logits[..., 0], labels.float(), reduction="none"
    ).sum(),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_multiple_of_a_loss_runs_on_several_ranks(name: str) -> None:
    """Loss and every gradient, in float64."""
    exported = program(ADDITIVE[name])
    lifted = bl.lift(exported)
    assert bl.verify(exported, lifted).passed
    assert bl.verify(exported, bl.context_parallel(lifted, size=2)).passed


#: The parts of ranks do not add up to these: right on one rank, refused on several.
NOT_ADDITIVE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "perplexity": (lambda g, h, labels: cross_entropy(g, labels).exp(), r"exp.*computed from a loss"),
    "root": (lambda g, h, labels: cross_entropy(g, labels).sqrt(), r"sqrt.*computed from a loss"),
    "square": (lambda g, h, labels: (lambda x: x * x)(cross_entropy(g, labels)), r"mul.*computed from a loss"),
    "inverse": (lambda g, h, labels: 1 / cross_entropy(g, labels), r"computed from a loss"),
    "two": (lambda g, h, labels: cross_entropy(g, labels) + h.pow(2).mean(), r"adds up losses that count tokens of"),
    "two means": (
        lambda g, h, labels: (
            cross_entropy(g, labels, reduction="sum") / (labels != -100).sum()
            + cross_entropy(g, labels, reduction="sum") / (labels > 3).sum()
        ),
        r"adds up losses that count tokens of",
    ),
    "other tokens": (
        lambda g, h, labels: cross_entropy(g, labels) + cross_entropy(g, labels.clamp(0), ignore_index=0),
        r"adds up losses that count tokens of",
    ),
    "mean and sum": (lambda g, h, labels: h.pow(2).mean() + g.pow(2).sum(), r"adds up losses that count tokens of"),
    "penalty": (lambda g, h, labels: cross_entropy(g, labels) + 1.0, r"add.*computed from a loss"),
    "weights": (
        lambda g, h, labels: cross_entropy(g, labels, weight=torch.arange(1.0, VOCAB + 1)),
        r"its mean divides by the class weights",
    ),
}


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_what_is_no_multiple_of_a_loss_runs_on_one_rank(name: str) -> None:
    """With node, line and what to do instead."""
    compute, why = NOT_ADDITIVE[name]
    exported = program(compute)
    lifted = bl.lift(exported)
    assert bl.verify(exported, lifted, checks=("values", "equivariance")).passed
    with pytest.raises(bl.UnsupportedReadError, match=rf"BL203 node.*{why}.*test_partial_sums.py:\d+\] ->"):
        bl.context_parallel(lifted, size=2)


def test_losses_that_count_other_tokens_are_to_be_returned_each() -> None:
    lifted = bl.lift(program(NOT_ADDITIVE["two"][0]))
    with pytest.raises(bl.UnsupportedReadError, match=r"-> return each loss by itself, with a TokenLoss.of\(program"):
        bl.context_parallel(lifted, size=2)


def test_a_mean_for_each_sample_says_how_to_write_the_loss() -> None:
    """A rank has a part of each sample's tokens: pooled values go on into the model, where nothing adds them up."""

    def pooled(logits: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        kept = (labels != -100)[..., None]
        return ((hidden * kept).sum(1) / kept.sum(1)).pow(2).mean()

    with pytest.raises(bl.UnsupportedReadError, match=r"a reduction over the sequence .*-> pool outside .*in one op"):
        bl.lift(program(pooled))


#: Totals of user inputs that are wrong on a part of the tokens, or in another order: no lift.
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "shifted count": (
        lambda g, h, labels: cross_entropy(g, labels, reduction="sum") / (labels[:, 1:] != -100).sum(),
        "mixes the sequence",
    ),
    "count of all": (
        lambda g, h, labels: h / (labels != -100).sum(),
        "a reduction over all tokens or samples of a user input",
    ),
    "longest sample": (
        lambda g, h, labels: h.pow(2).sum() / (labels != -100).sum(1).max(),
        "mixes the sequence",
    ),
    "share": (
        lambda g, h, labels: h * (labels > 3).float().mean(),
        "a reduction over all tokens or samples of a user input",
    ),
    "bounded": (
        lambda g, h, labels: h / labels.sum().clamp(min=1),
        "a reduction over all tokens or samples of a user input",
    ),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_totals_of_user_inputs_that_meet_tokens_are_refused(name: str, dynamic: bool) -> None:
    """They were accepted, and each rank took its own."""
    compute, why = REFUSED[name]
    exported = program(compute, dynamic)
    assert any(read.code == "BL105" and why in (read.refusal or "") for read in bl.scan(exported).reads)
    with pytest.raises(bl.UnsupportedReadError, match=rf"BL105 node.*'other'.*{why}.*test_partial_sums.py:\d+\]"):
        bl.lift(exported)


@pytest.mark.parametrize(("seq", "asks"), [(8, True), (12, False)])
def test_a_static_input_as_wide_as_the_sequence_is_long(seq: int, asks: bool) -> None:
    """A style ``[batch, 8]`` beside a hidden size of 8: whether it runs along the sequence, only the user knows."""
    torch.manual_seed(0)
    model = Model(lambda logits, hidden, style: logits.sum(-1, keepdim=True) * style.mean(-1)[:, None, None])
    exported = export(model, (torch.randint(VOCAB, (3, seq)), torch.randn(3, 8)))
    found = [finding.code for finding in bl.scan(exported).findings]
    assert found == (["BL103"] if asks else [])
    if asks:
        with pytest.raises(bl.AxesError, match=r"input 'other' has a last dim of 8.*pass axes="):
            bl.lift(exported)
    lifted = bl.lift(exported, axes={"other": {0: "batch"}})
    assert bl.verify(exported, lifted).passed
    assert lifted.input_axes["other"].seq_dims == ()
