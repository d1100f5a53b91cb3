"""Patterns that were refused although they can be lifted, each beside the near miss that has to stay refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import buffer_lifting as bl

VOCAB, WIDTH, HEADS, BATCH, LENGTH = 17, 8, 2, 3, 11
Body = Callable[..., Tensor]


class Net(nn.Module):
    """An embedding, a position table, one projection to heads, and a head around the pattern under test."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.pe, self.h = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv, self.key = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, HEADS)
        self.conv, self.wide = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.body = body

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """The body's; ``given`` is its second input."""
        return self.body(self, ids) if given is None else self.body(self, ids, given)

    def embed(self, ids: Tensor) -> Tensor:
        """Tokens and positions."""
        return self.e(ids) + self.pe(torch.arange(ids.shape[1]))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[batch, heads, seq, features]``."""
        return tuple(self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))

    def done(self, y: Tensor) -> Tensor:
        """Logits of attention's output."""
        return self.h(y.transpose(1, 2).flatten(2))


def causal(length: int) -> Tensor:
    """True where a key is not behind its query."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def program(body: Body, dynamic: bool, *given: Tensor, shape: tuple[int, int] = (BATCH, LENGTH)) -> ExportedProgram:
    """The exported net; dynamic means ``Dim.AUTO`` on every dim of every input."""
    ids = torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))
    args = (ids, *given)
    shapes = tuple({d: Dim.AUTO for d in range(a.ndim)} for a in args)
    return export(Net(body), args, dynamic_shapes=shapes if dynamic else None)


def lift_and_verify(ep: ExportedProgram, **options: Any) -> bl.LiftedProgram:
    """Lifted, and every oracle passed on what the context-parallel pass makes of it."""
    lifted = bl.lift(ep, **options)
    assert bl.verify(ep, bl.context_parallel(lifted, size=1)).passed
    return lifted


def key_gate(net: Net, ids: Tensor) -> Tensor:
    """Scores get a bias that the key's own data decides, expanded to the queries (Doge's dynamic mask)."""
    x = net.embed(ids)
    q, k, v = net.heads(x)
    gate = net.key(x).transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[1], -1)
    return net.done(F.scaled_dot_product_attention(q, k, v, attn_mask=gate.masked_fill(~causal(x.shape[1]), -1e9)))


def key_bias(net: Net, ids: Tensor) -> Tensor:
    """The same, broadcast, in attention that is written out."""
    x = net.embed(ids)
    q, k, v = net.heads(x)
    scores = q @ k.mT + net.key(x).transpose(1, 2)[:, :, None]
    return net.done(scores.masked_fill(~causal(x.shape[1]), -1e9).softmax(-1) @ v)


def key_mask(net: Net, ids: Tensor) -> Tensor:
    """The same, as the mask itself."""
    x = net.embed(ids)
    return net.done(F.scaled_dot_product_attention(*net.heads(x), attn_mask=net.key(x).transpose(1, 2)[:, :, None]))


def normalized_scores(net: Net, ids: Tensor) -> Tensor:
    """A norm over the keys is expanded to them: data that is uniform along a dim."""
    q, k, v = net.heads(net.embed(ids))
    return net.done(F.normalize((q @ k.mT).masked_fill(~causal(ids.shape[1]), 0.0), dim=-1) @ v)


def pointwise_conv(net: Net, ids: Tensor) -> Tensor:
    """A convolution of kernel 1 is a projection of each token (SqueezeBERT)."""
    return net.h(net.conv(net.embed(ids).mT).mT)


def talking_heads(net: Net, ids: Tensor) -> Tensor:
    """Scores of all heads are projected by a kernel of one element."""
    q, k, v = net.heads(net.embed(ids))
    scores = F.conv2d(q @ k.mT, torch.ones(HEADS, HEADS, 1, 1)).masked_fill(~causal(ids.shape[1]), -1e9)
    return net.done(scores.softmax(-1) @ v)


def matrix_and_vector(net: Net, ids: Tensor) -> Tensor:
    """A gate for each token: its features by a parameter of one dim."""
    x = net.embed(ids)
    return net.h(x * (x @ net.key.weight[0])[..., None])


def diagonal(net: Net, ids: Tensor) -> Tensor:
    """A mask whose diagonal is filled in place."""
    mask = torch.where(causal(ids.shape[1]), 0.0, -1e9)
    mask.fill_diagonal_(1.5)
    return net.done(F.scaled_dot_product_attention(*net.heads(net.embed(ids)), attn_mask=mask))


def keys_first(net: Net, ids: Tensor) -> Tensor:
    """Scores with the keys in front of the queries, their softmax and their masks likewise."""
    q, k, v = net.heads(net.embed(ids))
    i = torch.arange(ids.shape[1])
    bias = net.pe.weight[:, 0][(i[:, None] - i).clamp(-20, 20) + 20] - 0.1 * i[:, None]
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k).masked_fill(i[:, None] > i, -1e9) + bias
    return net.done(torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v))


def triangle_apart(net: Net, ids: Tensor) -> Tensor:
    """What the refusal of a triangle of scores tells to write, without a softmax."""
    q, k, v = net.heads(net.embed(ids))
    return net.done((q @ k.mT).masked_fill(~causal(ids.shape[1]), 0) @ v)


def triangle_of_features(net: Net, ids: Tensor) -> Tensor:
    """A matrix of features for each token."""
    x = net.embed(ids)
    return net.h(((x[..., None] * x[..., None, :]).tril() @ x[..., None])[..., 0])


def keys_first_by_matmul(net: Net, ids: Tensor) -> Tensor:
    """The same by products of matrices, with a triangle of keys."""
    q, k, v = net.heads(net.embed(ids))
    scores = (k @ q.mT).masked_fill(~causal(ids.shape[1]).mT, -1e9)
    return net.done(scores.softmax(2).mT @ v)


def keys_between(net: Net, ids: Tensor) -> Tensor:
    """Heads last, and the keys in front of the queries."""
    q, k, v = net.heads(net.embed(ids))
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu()
    scores = torch.einsum("bhqd,bhkd->bkqh", q, k).masked_fill(~seen[..., None], -1e9)
    return net.h(torch.einsum("bkqh,bhkd->bqhd", scores.softmax(1), v).flatten(2))


def sum_of_positions(net: Net, ids: Tensor) -> Tensor:
    """A floating sum over positions, a number made of the length."""
    return net.h(net.embed(ids) / torch.arange(1, ids.shape[1] + 1).float().sum())


def folded(net: Net, ids: Tensor, bias: Tensor) -> Tensor:
    """Attention over ``[batch * heads, seq, seq]`` with a bias in that layout."""
    x = net.embed(ids)
    q, k, v = (part.flatten(0, 1) for part in net.heads(x))
    scores = torch.baddbmm(bias, q, k.mT) + torch.where(causal(x.shape[1]), 0.0, -1e9)
    return net.done((scores.softmax(-1) @ v).unflatten(0, (x.shape[0], HEADS)))


def slopes(length: int) -> Tensor:
    """ALiBi ``[heads, seq, seq]``."""
    return (torch.tensor([0.5, 0.25])[:, None, None] * torch.arange(length).float()).expand(HEADS, length, length)


def alibi_repeated(net: Net, ids: Tensor) -> Tensor:
    """ALiBi copied for each sample by repeat."""
    return folded(net, ids, slopes(ids.shape[1]).repeat(ids.shape[0], 1, 1))


def alibi_interleaved(net: Net, ids: Tensor) -> Tensor:
    """ALiBi copied for each sample by repeat_interleave."""
    return folded(net, ids, slopes(ids.shape[1])[None].repeat_interleave(ids.shape[0], 0).flatten(0, 1))


def alibi_interleaved_heads(net: Net, ids: Tensor) -> Tensor:
    """Each head's copies side by side, then put in order."""
    batch = ids.shape[0]
    bias = slopes(ids.shape[1]).repeat_interleave(batch, 0).unflatten(0, (HEADS, batch))
    return folded(net, ids, bias.transpose(0, 1).flatten(0, 1))


def table(net: Net, ids: Tensor) -> Tensor:
    """A learned table, expanded to the batch before its rows are read."""
    return net.pe.weight[None].expand(ids.shape[0], -1, -1)


def expanded_table(net: Net, ids: Tensor) -> Tensor:
    """Rows of it by a slice."""
    return net.h(net.e(ids) + table(net, ids)[:, 2 : 2 + ids.shape[1]])


def expanded_rows(net: Net, ids: Tensor) -> Tensor:
    """Rows by an index, of copies that repeat made."""
    copies = net.pe.weight.repeat(ids.shape[0], 1, 1)
    return net.h(net.e(ids) + copies.index_select(1, torch.arange(ids.shape[1]) + 1))


def expanded_index(net: Net, ids: Tensor) -> Tensor:
    """The same, by indexing."""
    return net.h(net.e(ids) + table(net, ids)[:, torch.arange(ids.shape[1])])


def expanded_number(net: Net, ids: Tensor) -> Tensor:
    """One number a position, expanded to the batch and to the features."""
    return net.h(net.e(ids) * net.pe.weight[:, :1].expand(ids.shape[0], -1, WIDTH).narrow(1, 3, ids.shape[1]))


def expanded_bias(net: Net, ids: Tensor) -> Tensor:
    """A learned bias of queries and keys, expanded to the batch and to the heads."""
    bias = (net.pe.weight @ net.pe.weight.T)[None, None].expand(ids.shape[0], HEADS, -1, -1)
    own = bias[:, :, : ids.shape[1], : ids.shape[1]]
    return net.done(F.scaled_dot_product_attention(*net.heads(net.e(ids)), attn_mask=own))


LIFTED = [
    expanded_table,
    expanded_rows,
    expanded_index,
    expanded_number,
    expanded_bias,
    key_gate,
    key_bias,
    key_mask,
    normalized_scores,
    pointwise_conv,
    talking_heads,
    matrix_and_vector,
    diagonal,
    keys_first,
    keys_first_by_matmul,
    keys_between,
    triangle_apart,
    triangle_of_features,
    sum_of_positions,
    alibi_repeated,
    alibi_interleaved,
    alibi_interleaved_heads,
]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("body", LIFTED, ids=lambda body: body.__name__)
def test_lifts(body: Body, dynamic: bool) -> None:
    """What is liftable is lifted, by all oracles."""
    lift_and_verify(program(body, dynamic))


@pytest.mark.parametrize("body", [keys_first, keys_first_by_matmul, keys_between], ids=lambda body: body.__name__)
def test_keys_first_on_two_ranks(body: Body) -> None:
    """The keys are gathered, not the queries."""
    ep = program(body, True)
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=2)).passed


def mask(dtype: torch.dtype) -> Tensor:
    """A padding mask."""
    return (torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [LENGTH - 2], [LENGTH - 4]])).to(dtype)


OF_USERS: dict[str, tuple[Body, Tensor]] = {
    "share": (lambda n, i, m: n.h(n.embed(i) * (m / m.sum(1, keepdim=True))[..., None]), mask(torch.float32)),
    "per_sample": (lambda n, i, m: n.h(n.embed(i) / m.sum(1)[:, None, None]), mask(torch.float32)),
    "per_sample_mean": (lambda n, i, m: n.h(n.embed(i) * m.mean(-1)[:, None, None]), torch.rand(BATCH, LENGTH) + 1),
    "count": (lambda n, i, m: n.h(n.embed(i) / m.sum(1).sqrt()[:, None, None]), mask(torch.bool)),
    "mean_token_loss": (
        lambda n, i, y: F.cross_entropy(n.h(n.embed(i)).mT, y, reduction="sum") / (y != -100).sum(),
        torch.randint(0, VOCAB, (BATCH, LENGTH)),
    ),
    "sum_over_all_tokens": (
        lambda n, i, y: F.cross_entropy(n.h(n.embed(i)).mT, y, reduction="sum") / i.numel(),
        torch.randint(0, VOCAB, (BATCH, LENGTH)),
    ),
    "rows_of_positions": (  # [3, batch, seq] with batch 3: its first dim is no batch
        lambda n, i, p: n.h(n.e(i) + n.pe(p[0]) + 2 * n.pe(p[1]) + 3 * n.pe(p[2])),
        torch.arange(LENGTH).expand(3, BATCH, LENGTH).contiguous(),
    ),
}


@pytest.mark.parametrize("name", OF_USERS)
def test_numbers_of_user_inputs(name: str) -> None:
    """Sums over what the user gives, for each sample or for all, under ``Dim.AUTO`` on every dim."""
    body, given = OF_USERS[name]
    lift_and_verify(program(body, True, given))


def test_exact_where_it_can_be() -> None:
    """A floating sum is computed outside, in natural order, where its result follows the sequence."""
    body, given = OF_USERS["share"]
    assert [item.stream for item in bl.lift(program(body, True, given)).inputs] == ["positions", "inputs"]


def rows_that_differ(net: Net, ids: Tensor) -> Tensor:
    """As many features as tokens, and a mask of that size: rows of the data are features, not queries."""
    x = net.embed(ids)
    return net.h(x.mT.masked_fill(~causal(ids.shape[1]), 0.0).mT)


def test_rows_that_differ_are_no_queries() -> None:
    """Where sizes are equal, a mask's rows that meet features stay features: one axis is read, not two."""
    ep = program(rows_that_differ, False, shape=(BATCH, WIDTH))
    lifted = lift_and_verify(ep)
    assert [read.seq_dims for read in lifted.report.reads] == [((0, "seq", "row"),), ((1, "seq", "row"),)]


def bias_of_rows(net: Net, ids: Tensor) -> Tensor:
    """Data of two tokens at a time without keys: an outer product of the sequence with itself."""
    one = net.key(net.embed(ids))[..., 0]
    return net.h(net.embed(ids) * (one[:, :, None] + one[:, None, :]).amax(-1, keepdim=True))


def wide_conv(net: Net, ids: Tensor) -> Tensor:
    """A convolution of kernel 3 looks at neighbours."""
    return net.h(net.wide(net.embed(ids).mT).mT)


def strided_conv(net: Net, ids: Tensor) -> Tensor:
    """Kernel 1, but every other token."""
    return net.h(F.conv1d(net.embed(ids).mT, net.conv.weight, stride=2).mT)


def conv_over_tokens(net: Net, ids: Tensor) -> Tensor:
    """Tokens as channels."""
    return net.h(F.conv1d(net.embed(ids), torch.ones(ids.shape[1], ids.shape[1], 1)))


def local_scores(net: Net, ids: Tensor) -> Tensor:
    """Scores that a kernel of three keys smooths."""
    q, k, v = net.heads(net.embed(ids))
    return net.done(F.conv2d(q @ k.mT, torch.ones(HEADS, HEADS, 1, 3), padding=(0, 1)).softmax(-1) @ v)


def vector_of_tokens(net: Net, ids: Tensor) -> Tensor:
    """Tokens summed by a table of positions."""
    return net.h(net.embed(ids) + (net.embed(ids).mT @ net.pe.weight[: ids.shape[1], 0])[:, None])


def diagonals(net: Net, ids: Tensor) -> Tensor:
    """A diagonal that runs on below a tall matrix."""
    mask = torch.zeros(3 * ids.shape[1], ids.shape[1])
    mask.fill_diagonal_(-1e9, wrap=True)
    return net.done(F.scaled_dot_product_attention(*net.heads(net.embed(ids)), attn_mask=mask[: ids.shape[1]]))


def product_of_positions(net: Net, ids: Tensor) -> Tensor:
    """No sum: what a product over the ids of the user gives is not recomputed."""
    return net.h(net.embed(ids) * ids.float().var(1)[:, None, None])


def alibi_of_other_heads(net: Net, ids: Tensor) -> Tensor:
    """Copies side by side, read as if heads came last: sample and head are exchanged."""
    return folded(net, ids, slopes(ids.shape[1]).repeat_interleave(ids.shape[0], 0))


def heads_first(net: Net, ids: Tensor) -> Tensor:
    """The batch behind the heads: no place for the lane of a mask."""
    x = net.embed(ids)
    q, k, v = (part.transpose(0, 1).flatten(0, 1) for part in net.heads(x))
    scores = q @ k.mT + torch.where(causal(x.shape[1]), 0.0, -1e9)
    return net.done((scores.softmax(-1) @ v).unflatten(0, (HEADS, x.shape[0])).transpose(0, 1))


def triangle_of_scores(net: Net, ids: Tensor) -> Tensor:
    """The triangle is an op on the scores themselves."""
    q, k, v = net.heads(net.embed(ids))
    return net.done((q @ k.mT).tril() @ v)


def triangle_of_keys_first(net: Net, ids: Tensor) -> Tensor:
    """Scores below zero stand for those that are not seen."""
    q, k, v = net.heads(net.embed(ids))
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k).triu()
    return net.done(scores.masked_fill(scores == 0, -1e9).softmax(-2).mT @ v)


def softmax_over_queries(net: Net, ids: Tensor) -> Tensor:
    """Scores that are normalised over the queries and summed over the keys: no rank has all queries."""
    q, k, v = net.heads(net.embed(ids))
    return net.done((q @ k.mT).softmax(-2) @ v)


def row_for_each_sample(net: Net, ids: Tensor) -> Tensor:
    """Another table for each sample: what microbatches would read is not theirs."""
    return net.h(net.e(ids) + net.pe.weight.view(4, 16, WIDTH)[: ids.shape[0], : ids.shape[1]])


def copies_along_the_sequence(net: Net, ids: Tensor) -> Tensor:
    """Rows repeated one after another, for each sample."""
    return net.h(net.e(ids) + net.pe.weight[:8].repeat(ids.shape[0], 4, 1)[:, : ids.shape[1]])


NEAR_MISSES: list[tuple[Body, bool, str]] = [
    (row_for_each_sample, False, "a table with a batch dim"),
    (copies_along_the_sequence, True, "a table with a batch dim"),
    (copies_along_the_sequence, False, "a table with a batch dim"),
    (bias_of_rows, True, "elements at different sequence positions meet"),
    (bias_of_rows, False, "elements at different sequence positions meet"),
    (wide_conv, True, "conv1d"),
    (wide_conv, False, "conv1d"),
    (strided_conv, False, "conv1d"),
    (conv_over_tokens, False, "a learned projection runs along the sequence"),
    (local_scores, True, "conv2d"),
    (local_scores, False, "conv2d"),
    (vector_of_tokens, True, "BL201"),
    (vector_of_tokens, False, "BL201"),
    (diagonals, False, "BL102"),
    (product_of_positions, True, "mixes the sequence"),
    (alibi_of_other_heads, True, "BL105"),
    (alibi_of_other_heads, False, "BL105"),
    (triangle_of_scores, True, "zeroes scores by the places of query and key.* -> write the mask apart"),
    (triangle_of_keys_first, False, "zeroes scores by the places of query and key.* -> write the mask apart"),
    (softmax_over_queries, True, "a sum over the sequence"),
    (softmax_over_queries, False, "a sum over the sequence"),
    (heads_first, True, "the batch is folded behind another dim"),
    (heads_first, False, "the batch is folded behind another dim"),
]


@pytest.mark.parametrize(("body", "dynamic", "why"), NEAR_MISSES, ids=lambda item: getattr(item, "__name__", None))
def test_near_misses_stay_refused(body: Body, dynamic: bool, why: str) -> None:
    """Refused with a reason, the source line and a hint."""
    with pytest.raises(bl.LiftingError, match=why) as caught:
        bl.lift(program(body, dynamic))
    assert "test_refusals.py" in str(caught.value) and "->" in str(caught.value)


def test_a_square_example_asks_for_axes_and_the_hint_works() -> None:
    """Two symbols of one size in the example: labels that only a reshape reads have symbols of their own."""
    body = lambda n, i, y: F.cross_entropy(n.h(n.embed(i)).flatten(0, 1), y.flatten())  # noqa: E731
    ep = program(body, True, torch.randint(0, VOCAB, (7, 7)), shape=(7, 7))
    with pytest.raises(bl.AxesError, match="both the batch size and the sequence length"):
        bl.lift(ep)
    lift_and_verify(ep, axes={"given": {0: "batch", 1: "seq"}})


def einsum_projection(net: Net, ids: Tensor) -> Tensor:
    """Queries of all heads by an einsum with a weight whose dims are as long as the sequence."""
    weight = net.h.weight.new_ones(WIDTH, HEADS, WIDTH // HEADS) * net.qkv.bias[:WIDTH].view(HEADS, -1)
    q = torch.einsum("bsd,dhk->bshk", torch.einsum("bsd,ed->bse", net.embed(ids), net.conv.weight[..., 0]), weight)
    scores = torch.einsum("bshk,bthk->bhst", q, q).masked_fill(~causal(ids.shape[1]), -1e9)
    return net.h(torch.einsum("bhst,bthk->bshk", scores.softmax(-1), q).flatten(2))


@pytest.mark.parametrize("axes", [None, {"ids": {0: "batch", 1: "seq"}}], ids=["inferred", "given"])
@pytest.mark.parametrize("length", [WIDTH, HEADS, WIDTH // HEADS])
def test_features_of_an_einsum_are_no_keys(length: int, axes: Any) -> None:
    """A static sequence as long as the model is wide, or has heads: the weight's dims stay features."""
    lift_and_verify(program(einsum_projection, False, shape=(BATCH, length)), axes=axes)


def key_table(net: Net, ids: Tensor) -> Tensor:
    """Queries meet a learned vector of each key's position."""
    q, k, v = net.heads(net.e(ids))
    rows = net.pe.weight[: ids.shape[1], : WIDTH // HEADS]
    return net.done((q @ k.mT + torch.einsum("bhid,jd->bhij", q, rows)).softmax(-1) @ v)


def rows_of_tokens(net: Net, ids: Tensor) -> Tensor:
    """Tokens mixed by a learned matrix of positions."""
    return net.h(torch.einsum("bsd,st->btd", net.e(ids), net.pe.weight[: ids.shape[1], : ids.shape[1]]))


@pytest.mark.parametrize("dynamic", [True, False])
def test_rows_of_a_table_in_an_einsum_are_keys(dynamic: bool) -> None:
    lift_and_verify(program(key_table, dynamic))


@pytest.mark.parametrize("body", [key_table, rows_of_tokens])
def test_where_features_may_be_keys_the_refusal_says_so(body: Body) -> None:
    """Sizes alone do not tell: refused, and the hint names the length."""
    with pytest.raises(bl.UnsupportedReadError, match=r"the sequence is 8 long, and so are features: .*dynamic.*axes="):
        bl.lift(program(body, False, shape=(BATCH, WIDTH)))


OF_THE_BATCH: dict[str, tuple[Body, str]] = {
    "flip": (lambda n, i: n.h(n.embed(i) + n.e(i).flip(0)), "aten.flip moves elements along the batch"),
    "roll": (lambda n, i: n.h(n.embed(i) + n.e(i).roll(1, 0)), "aten.roll moves elements along the batch"),
    "index": (lambda n, i: n.h(n.embed(i) + n.e(i)[torch.arange(2, -1, -1)]), "aten.index picks samples of the batch"),
    "select": (
        lambda n, i: n.h(n.embed(i) + n.e(i).index_select(0, torch.arange(2, -1, -1))),
        "aten.index_select picks samples of the batch",
    ),
    "unbind": (lambda n, i: n.h(torch.stack(n.embed(i).unbind()[::-1])), "the batch is split"),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_samples_that_meet_are_not_called_the_sequence(name: str) -> None:
    """What is wrong with them is microbatches, not the order of tokens."""
    body, why = OF_THE_BATCH[name]
    with pytest.raises(bl.UnsupportedReadError, match=rf"BL201 .*: {why} .*-> microbatches change what it computes"):
        bl.lift(program(body, False))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dims", [(1,), (0, 1)])
def test_tokens_that_change_places_are(dims: tuple[int, ...], dynamic: bool) -> None:
    with pytest.raises(bl.UnsupportedReadError, match=r"aten.flip may move elements along the sequence.*strict=False"):
        bl.lift(program(lambda n, i: n.h(n.embed(i).flip(dims)), dynamic))


def memory_keys(net: Net, ids: Tensor) -> Tensor:
    """Learned keys and values in front of those of the tokens."""
    q, k, v = net.heads(net.embed(ids))
    memory = net.pe.weight[:6].view(HEADS, -1, WIDTH // HEADS).expand(ids.shape[0], -1, -1, -1)
    keys, values = torch.cat((memory, k), 2), torch.cat((memory, v), 2)
    return net.done(F.scaled_dot_product_attention(q, keys, values))


def prefix_tokens(net: Net, ids: Tensor) -> Tensor:
    """Learned tokens in front of the others, cut off again."""
    x = torch.cat((net.pe.weight[:3].expand(ids.shape[0], -1, -1), net.embed(ids)), 1)
    return net.done(F.scaled_dot_product_attention(*net.heads(x)))[:, 3:]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("body", [memory_keys, prefix_tokens])
def test_rows_that_are_no_tokens_are_refused_as_such(body: Body, dynamic: bool) -> None:
    """One finding for each join, which says what joins: it named a read of a parameter that there is not."""
    report = bl.scan(program(body, dynamic))
    why = "rows that are no tokens (memory keys, prefix tokens) are joined to the sequence"
    joins = [mix for mix in report.mixing if mix.reason.startswith(why)]
    assert len(joins) == (2 if body is memory_keys else 1)
    assert all(mix.code == "BL201" and "num_mem_kv" in mix.hint for mix in joins)
    assert not any(read.refusal for read in report.reads)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_sequence_joined_to_itself_has_other_words(dynamic: bool) -> None:
    twice = lambda n, i: n.h(torch.cat((n.embed(i), n.e(i)), 1))  # noqa: E731
    with pytest.raises(bl.UnsupportedReadError, match="values are joined along the sequence"):
        bl.lift(program(twice, dynamic))
