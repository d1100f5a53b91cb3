"""Biases of attention: of the user, of each key, folded with the batch, of buckets of distances."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import buffer_lifting as bl

BATCH, LENGTH, HEADS, WIDTH, VOCAB = 3, 10, 2, 8, 17


class Net(nn.Module):
    """Tokens to logits through one attention."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.e, self.rel = nn.Embedding(VOCAB, WIDTH), nn.Embedding(32, HEADS)
        self.qkv, self.h = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.register_buffer("borders", torch.tensor([1, 2, 4, 8]))

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.body(self, ids) if extra is None else self.body(self, ids, extra)


def heads(n: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, s = ids.shape
    q, k, v = n.qkv(n.e(ids)).view(b, s, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    return q, k, v


def joined(n: Any, y: Tensor) -> Tensor:
    return n.h(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], WIDTH))


def biased(n: Any, ids: Tensor, bias: Tensor) -> Tensor:
    return joined(n, F.scaled_dot_product_attention(*heads(n, ids), attn_mask=bias))


def relative(n: Any, ids: Tensor, distance: Tensor) -> Tensor:
    bias = n.rel(distance)
    return biased(n, ids, bias.permute(2, 0, 1)[None] if bias.ndim == 3 else bias.permute(0, 3, 1, 2))


def between(positions: Tensor) -> Tensor:
    return positions[:, :, None] - positions[:, None, :]


def folded(n: Any, ids: Tensor, bias: Tensor) -> Tensor:
    """Attention with batch and heads in one dim."""
    q, k, v = (part.flatten(0, 1) for part in heads(n, ids))
    y = torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1) @ v
    return joined(n, y.unflatten(0, (ids.shape[0], HEADS)))


def distances(n: int) -> Tensor:
    p = torch.arange(n)
    return p[:, None] - p[None, :]


def swin(n: Any, ids: Tensor) -> Tensor:
    """A table read by one flat index for all pairs, as window attention does."""
    s = ids.shape[1]
    flat = n.rel.weight[(distances(s) + 16).flatten()]
    return biased(n, ids, flat.view(s, s, HEADS).permute(2, 0, 1)[None])


def size_of_scores(n: Any, ids: Tensor) -> Tensor:
    """A causal mask of the size of the scores, which are of all ranks' keys."""
    q, k, v = heads(n, ids)
    scores = q @ k.transpose(2, 3)
    allowed = scores.new_ones(scores.shape[-2:]).tril() == 1
    return joined(n, scores.masked_fill(~allowed, -1e9).softmax(-1) @ v)


def gated_keys(n: Any, ids: Tensor) -> Tensor:
    """Data of each key, expanded to all queries before it meets a mask (Doge)."""
    s = ids.shape[1]
    gates = n.e(ids)[..., :HEADS].transpose(1, 2)[:, :, None].expand(-1, -1, s, -1)
    return biased(n, ids, gates.masked_fill(distances(s) < 0, -1e9))


def positions() -> Tensor:
    return torch.arange(LENGTH).repeat(BATCH, 1)


Case = tuple[Callable[..., Tensor], Callable[[], Tensor] | None]
LIFTED: dict[str, Case] = {
    "relative, of the user's positions": (
        lambda n, i, p: relative(n, i, between(p).clamp(-15, 15) + 16),
        positions,
    ),
    "buckets, of the user's positions": (
        lambda n, i, p: relative(n, i, torch.bucketize(between(p).abs(), n.borders)),
        positions,
    ),
    "buckets by searchsorted": (
        lambda n, i: relative(n, i, torch.searchsorted(n.borders, distances(i.shape[1]).abs())),
        None,
    ),
    "flat index": (swin, None),
    "slopes repeated": (
        lambda n, i: folded(n, i, -n.slopes.repeat(i.shape[0])[:, None, None] * distances(i.shape[1]).abs()),
        None,
    ),
    "mask of the size of scores": (size_of_scores, None),
    "mask of gates of keys": (gated_keys, None),
}


DATA: dict[str, Case] = {
    "[heads, rows, keys]": (lambda n, i, x: biased(n, i, x[None]), lambda: torch.rand(HEADS, LENGTH, LENGTH)),
    "[batch, rows, keys]": (lambda n, i, x: biased(n, i, x[:, None]), lambda: torch.rand(BATCH, LENGTH, LENGTH)),
    "[batch, heads, keys]": (lambda n, i, x: biased(n, i, x[:, :, None]), lambda: torch.rand(BATCH, HEADS, LENGTH)),
    "gates of queries times the user's of keys": (
        lambda n, i, x: biased(n, i, (n.e(i)[..., :1] * x[:, None])[:, None]),
        lambda: torch.rand(BATCH, LENGTH),
    ),
    "scale of the sample times the user's of keys": (
        lambda n, i, x: biased(n, i, n.rel(torch.zeros_like(i[:, 0]))[:, :1, None, None] * x[:, None, None]),
        lambda: torch.rand(BATCH, LENGTH).round().long(),
    ),
    "gates of keys": (lambda n, i: biased(n, i, n.e(i)[..., :HEADS].transpose(1, 2)[:, :, None]), None),
}


def program(case: Case, dynamic: bool) -> ExportedProgram:
    torch.manual_seed(0)
    body, make = case
    extra = make() if make else None
    shapes: dict[str, Any] = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}, "extra": None}
    if extra is not None:
        shapes["extra"] = {d: Dim.AUTO for d, size in enumerate(extra.shape) if size in (BATCH, LENGTH)}
    inputs = (torch.randint(0, VOCAB, (BATCH, LENGTH)), extra)
    return torch.export.export(Net(body), inputs, dynamic_shapes=shapes if dynamic else None)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", [*LIFTED, *DATA])
def test_lifted_and_right(name: str, dynamic: bool) -> None:
    exported = program({**LIFTED, **DATA}[name], dynamic)
    lifted = bl.lift(exported)
    assert len(lifted.report.reads) == (name in LIFTED)
    ranks = bl.context_parallel(lifted, size=2 if dynamic else 1)
    assert bl.verify(exported, ranks).passed
    assert not bl.check(lifted)
    assert not bl.check(ranks)


def test_data_of_the_keys_is_gathered_once() -> None:
    """The mask of a rank has its own rows in the place of the keys: it comes from all ranks, as keys and values do."""
    ranks = bl.context_parallel(bl.lift(program(DATA["gates of keys"], True)), size=2)
    gathers = [n for n in ranks.program.graph.nodes if "all_gather" in str(n.target)]
    assert len(gathers) == 3
    with pytest.raises(bl.UnsupportedReadError, match="its mask is data of the keys"):
        bl.context_parallel(bl.lift(program(DATA["gates of keys"], True)), size=2, strategy="alltoall")


def test_what_is_left_to_the_ranks_is_said() -> None:
    """No rank knows the size of all keys by itself: the values of such a mask are compared on two ranks."""
    exported = program(LIFTED["mask of the size of scores"], True)
    report = bl.verify(exported, bl.context_parallel(bl.lift(exported), size=2))
    assert "left to the shards oracle" in report["values"].detail
    alone = bl.verify(exported, bl.context_parallel(bl.lift(exported), size=1))
    assert "left to" not in alone["values"].detail and alone["values"].compared


def test_features_or_keys() -> None:
    """``[batch, S, S]`` of a static export where some parameter has S features: only the user knows."""
    narrow = Net(lambda n, i, x: biased(n, i, x[:, None]))
    inputs = (torch.randint(0, VOCAB, (BATCH, WIDTH)), torch.rand(BATCH, WIDTH, WIDTH))
    exported = torch.export.export(narrow, inputs)
    with pytest.raises(bl.LiftingError, match=r"'extra'.*a number of features.*axes="):
        bl.lift(exported)
    axes = {"ids": {0: "batch", 1: "seq"}, "extra": {0: "batch", 1: "seq:row", 2: "seq:col"}}
    lifted = bl.lift(exported, axes=axes)
    assert bl.verify(exported, bl.context_parallel(lifted)).passed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_with_sizes_of_its_own(attention: str) -> None:
    """``Dim.AUTO`` gives the mask's batch a symbol of its own: ALiBi made of the mask meets data of the tokens."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True, use_cache=False
    )
    config._attn_implementation = attention
    inputs = {"input_ids": torch.randint(0, 32, (3, 10)), "attention_mask": torch.ones(3, 10, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            FalconForCausalLM(config).eval(),
            (),
            inputs,
            dynamic_shapes={name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs},
        )
    before = exported.module()(**inputs).logits
    assert bl.verify(exported, bl.context_parallel(bl.lift(exported), size=2)).passed
    assert torch.equal(exported.module()(**inputs).logits, before)
