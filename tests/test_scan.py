"""What the scan finds: a table for the zoo, and small modules for each way to read by position.

Every module that lifts must be bitwise the original in the natural order, and follow a different order for each
sample once its masks follow the slots. Every module that does not lift must say so: silence is the one failure
that a user cannot see.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import CASES, export_case

import buffer_lifting as bl

BATCH, SEQ, DIM, HEADS, TABLE, VOCAB = 3, 7, 12, 2, 32, 23

# Small modules -------------------------------------------------------------------------------------------

Read = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Tokens to features; ``read`` is the part of the forward that a test is about."""

    def __init__(self, read: Read, causal: bool = False) -> None:
        super().__init__()
        self.read, self.causal = read, causal
        self.emb = nn.Embedding(VOCAB, DIM)
        self.out = nn.Linear(DIM, DIM)
        self.wpe = nn.Embedding(TABLE, DIM)
        self.pos = nn.Parameter(torch.randn(1, TABLE, DIM))
        self.relative = nn.Embedding(2 * TABLE, HEADS)
        self.bias2d = nn.Parameter(torch.randn(TABLE, TABLE))
        self.register_buffer("table", torch.randn(TABLE, DIM))
        self.register_buffer("same_table", self.table.clone())
        self.register_buffer("alias", self.table)
        self.register_buffer("wide", torch.randn(DIM, TABLE))
        self.register_buffer("halves", torch.randn(TABLE, DIM // 2))
        self.register_buffer("first", torch.randn(TABLE, 1, DIM))
        self.register_buffer("ids", torch.arange(TABLE)[None])
        self.register_buffer("tril", torch.tril(torch.ones(TABLE, TABLE)).bool())
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.register_buffer("feature", torch.randn(DIM))
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.gru = nn.GRU(DIM, DIM, batch_first=True)
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        return self.out(self.read(self, x, tokens))


def attend(net: Net, x: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention with a boolean or additive mask."""
    b, s, _ = x.shape
    q = x.view(b, s, HEADS, -1).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2).reshape(b, s, -1)


def arange(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _window(net: Net, x: Tensor, _: Tensor) -> Tensor:
    i = arange(x)
    return attend(net, x, (i[:, None] >= i[None]) & (i[:, None] - i[None] < 3))


def _alibi(net: Net, x: Tensor, _: Tensor) -> Tensor:
    i = arange(x)
    bias = net.slopes[:, None, None] * (i[None] - i[:, None]).abs()
    return attend(net, x, -bias[None])


def _written_out(net: Net, x: Tensor, _: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2) / math.sqrt(DIM)
    s = x.shape[1]
    return scores.masked_fill(~net.tril[:s, :s], float("-inf")).softmax(-1) @ x


def _relative_bias(net: Net, x: Tensor, _: Tensor) -> Tensor:
    i = arange(x)
    bias = net.relative(i[None] - i[:, None] + TABLE)
    return attend(net, x, bias.permute(2, 0, 1)[None])


def _sinusoid(net: Net, x: Tensor, _: Tensor) -> Tensor:
    angles = torch.outer(arange(x).to(x.dtype), net.feature[: DIM // 2])
    return x + torch.cat([angles.cos(), angles.sin()], -1)


def _tril_of_ones(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return attend(net, x, torch.tril(torch.ones(s, s, dtype=torch.bool)))


def _triu_of_full(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return attend(net, x, torch.triu(torch.full((s, s), float("-inf"), dtype=x.dtype), 1))


def _padding_of_tokens(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    i = arange(x)
    keep = (tokens != 0)[:, None, None, :] | (i[:, None] == i[None])
    return attend(net, x, keep)


def _documents(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    doc = (tokens == 1).cumsum(1)
    i = arange(x)
    return attend(net, x, ((doc[:, :, None] == doc[:, None, :]) & (i[:, None] >= i[None]))[:, None])


def _right_aligned_mask(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return attend(net, x, net.tril[-s:, -s:])


def _reversed(net: Net, x: Tensor, _: Tensor) -> Tensor:
    return x + net.wpe(x.shape[1] - 1 - arange(x))


def _window_of_length(net: Net, x: Tensor, _: Tensor) -> Tensor:
    i = arange(x)
    return attend(net, x, (i[:, None] - i[None]).abs() <= x.shape[1] // 2)


def _sequence_first(net: Net, x: Tensor, _: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return (y + net.first[: y.shape[0]]).transpose(0, 1)


def _two_tables(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return (x + net.table[:s]).tanh() * net.same_table[:s]


def _aliases(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return (x + net.table[:s]).tanh() * net.alias[:s]


def _in_place(net: Net, x: Tensor, _: Tensor) -> Tensor:
    y = x.clone()
    y.add_(net.table[: x.shape[1]])
    return y


def _buckets(net: Net, x: Tensor, _: Tensor) -> Tensor:
    return x + net.wpe(torch.bucketize(arange(x), torch.tensor([2, 4])))


#: Parameters whose rows are read more than once a sample.
SUMMED = ("relative.weight", "bias2d", "wpe.weight", "out.weight")
#: Reads whose value is the same for every order: nothing would move if the feed were left natural.
BLIND = ("eye", "padding_of_tokens")
#: How to read -> names of the lifted inputs.
LIFTS: dict[str, tuple[Read, set[str]]] = {
    "slice": (lambda n, x, t: x + n.table[: x.shape[1]], {"lifted_table"}),
    "right_aligned": (lambda n, x, t: x + n.table[-x.shape[1] :], {"lifted_table"}),
    "offset": (lambda n, x, t: x + n.table[2 : 2 + x.shape[1]], {"lifted_table"}),
    "from_length": (lambda n, x, t: x + n.table[x.shape[1] : 2 * x.shape[1]], {"lifted_table"}),
    "step": (lambda n, x, t: x + n.table[: 2 * x.shape[1] : 2], {"lifted_table"}),
    "narrow": (lambda n, x, t: x + n.table.narrow(0, 0, x.shape[1]), {"lifted_table"}),
    "narrow_offset": (lambda n, x, t: x + n.table.narrow(0, 3, x.shape[1]), {"lifted_table"}),
    "index_select": (lambda n, x, t: x + n.table.index_select(0, arange(x)), {"lifted_table"}),
    "index": (lambda n, x, t: x + n.table[arange(x)], {"lifted_table"}),
    "transposed": (lambda n, x, t: x + n.wide[:, : x.shape[1]].t(), {"lifted_wide"}),
    "flat": (
        lambda n, x, t: (x.reshape(-1, DIM) + n.table[: x.shape[1]].repeat(x.shape[0], 1)).view(x.shape),
        {"lifted_table"},
    ),
    "projected": (lambda n, x, t: x + n.table[: x.shape[1]] @ n.out.weight, {"lifted_table"}),
    "flipped": (lambda n, x, t: x + n.table[: x.shape[1]].flip(0), {"lifted_table"}),
    "rolled_table": (lambda n, x, t: x + n.table.roll(1, 0)[: x.shape[1]], {"lifted_table"}),
    "batch_first": (lambda n, x, t: x + n.table[: x.shape[1]].expand(x.shape[0], -1, -1), {"lifted_table"}),
    "sequence_first": (_sequence_first, {"lifted_first"}),
    "cat": (lambda n, x, t: x * torch.cat([n.halves[: x.shape[1]]] * 2, -1), {"lifted_halves"}),
    "stack": (
        lambda n, x, t: x * torch.stack([n.halves[: x.shape[1]]] * 2, -1).flatten(-2),
        {"lifted_halves"},
    ),
    "in_place": (_in_place, {"lifted_table"}),
    "sinusoid": (_sinusoid, {"lifted_feature"}),
    "scale": (lambda n, x, t: x * (arange(x) + 1).to(x.dtype).log()[:, None], {"lifted_log"}),
    "wpe": (lambda n, x, t: x + n.wpe(arange(x)), {"lifted_positions"}),
    "reversed": (_reversed, {"lifted_rsub"}),
    "cumsum_of_ones": (lambda n, x, t: x + n.wpe(torch.ones_like(t).cumsum(1) - 1), {"lifted_sub"}),
    "position_ids": (lambda n, x, t: x + n.wpe(n.ids[:, : x.shape[1]]), {"lifted_ids"}),
    "parameter": (lambda n, x, t: x + n.pos[:, : x.shape[1]], {"lifted_positions"}),
    "parameter_offset": (lambda n, x, t: x + n.pos[:, 4 : 4 + x.shape[1]], {"lifted_positions"}),
    "equal_tables": (_two_tables, {"lifted_table"}),
    "aliases": (_aliases, {"lifted_alias"}),
    "is_causal": (lambda n, x, t: attend(n, x, None, True), set()),
    "tril": (_tril_of_ones, {"lifted_slots", "lifted_slots_keys"}),
    "triu": (_triu_of_full, {"lifted_slots", "lifted_slots_keys"}),
    "window": (_window, {"lifted_slots", "lifted_slots_keys"}),
    "alibi": (_alibi, {"lifted_slots", "lifted_slots_keys"}),
    "written_out": (_written_out, {"lifted_slots", "lifted_slots_keys"}),
    "relative_bias": (_relative_bias, {"lifted_slots", "lifted_slots_keys"}),
    "right_aligned_mask": (_right_aligned_mask, {"lifted_slots", "lifted_slots_keys"}),
    "window_of_length": (_window_of_length, {"lifted_slots", "lifted_slots_keys"}),
    "eye": (
        lambda n, x, t: attend(n, x, torch.eye(x.shape[1], dtype=x.dtype)),
        {"lifted_slots", "lifted_slots_keys"},
    ),
    "padding_of_tokens": (_padding_of_tokens, set()),
    "documents": (_documents, set()),
    "buckets": (_buckets, {"lifted_lifted_tensor_0"}),
    "learned_mask": (
        lambda n, x, t: attend(n, x, n.bias2d[: x.shape[1], : x.shape[1]]),
        {"lifted_slots", "lifted_slots_keys"},
    ),
}


def make(read: Read) -> Net:
    """A seeded float64 net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Net(read).double()
    if read is _aliases:  # .double() copied each
        net.alias = net.table
    return net


def tokens(batch: int = BATCH, seq: int = SEQ, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def export(model: nn.Module, *args: Tensor, dynamic: bool = True) -> ExportedProgram:
    """Exported with dynamic batch and sequence, or statically."""
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in args) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


def orders(batch: int, seq: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(batch)])


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((out * weights).sum(), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def follow(lifted: Any, order: Tensor, batch: int, seq: int, **inputs: Tensor) -> Tensor:
    """The output of a program whose masks follow the slots, on inputs in ``order``."""
    feed = lifted.feed(batch, seq, inputs=inputs, order=order)
    return lifted.program.module()(*lifted.shard_inputs(order=order, **inputs).values(), **feed)


def gathered(out: Tensor, order: Tensor) -> Tensor:
    return out.gather(1, order[..., None].expand(-1, -1, out.shape[-1]))


def check_lift(
    model: nn.Module, ep: ExportedProgram, x: Tensor, sensitive: bool = True, summed: tuple[str, ...] = ()
) -> Any:
    """Identity, bitwise with gradients, and equivariance with a control; returns the lifted program."""
    batch, seq = x.shape
    lifted = bl.lift(ep)
    original, new = ep.module(), lifted.program.module()
    want = original(x)
    got = new(x, **lifted.feed(batch, seq, inputs={"tokens": x}))
    assert torch.equal(got, want)
    before, after = gradients(original, want), gradients(new, got)
    assert before.keys() == after.keys() and before
    for name, gradient in before.items():
        # a row of a parameter that several reads share is summed in another order
        if name in summed:
            torch.testing.assert_close(after[name], gradient, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(after[name], gradient), name
    cp = bl.context_parallel(lifted)
    order = orders(batch, seq)
    torch.testing.assert_close(follow(cp, order, batch, seq, tokens=x), gathered(want, order), rtol=1e-9, atol=1e-9)
    if sensitive:  # the control: without the order in the feed, the same comparison fails
        natural = cp.feed(batch, seq, inputs={"tokens": x})
        wrong = cp.program.module()(x.gather(1, order), **natural)
        assert (wrong - gathered(want, order)).abs().max() > 1e-3
    return lifted


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", LIFTS)
def test_lifts(name: str, dynamic: bool) -> None:
    read, names = LIFTS[name]
    model, x = make(read), tokens()
    ep = export(model, x, dynamic=dynamic)
    lifted = check_lift(model, ep, x, name not in BLIND, SUMMED)
    if names:
        assert {item.name for item in lifted.inputs} == names


def test_equal_tables_are_one_input() -> None:
    model, x = make(_two_tables), tokens()
    reads = bl.scan(export(model, x)).reads
    assert [read.source for read in reads] == ["table", "same_table"]
    assert [item.source for item in bl.lift(export(model, x)).inputs] == ["table"]


def test_aliases_are_reported() -> None:
    report = bl.scan(export(make(_aliases), tokens()))
    assert [(read.source, read.aliases) for read in report.reads] == [("alias", ("table",))] * 2


# What is refused, and what is left alone -----------------------------------------------------------------


def _moe_by_arange(net: Net, x: Tensor, _: Tensor) -> Tensor:
    flat = x.reshape(-1, DIM)
    gates = flat.softmax(-1)
    return (flat * gates[torch.arange(flat.shape[0]), gates.argmax(-1)][:, None]).view(x.shape)


def _moe_by_gather(net: Net, x: Tensor, _: Tensor) -> Tensor:
    flat = x.reshape(-1, DIM)
    gates = flat.softmax(-1)
    return (flat * gates.gather(1, gates.argmax(-1, keepdim=True))).view(x.shape)


def _first_zeroed(net: Net, x: Tensor, _: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].zero_()
    return y


def _pair_mask(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return ((x[:, :, None] - x[:, None]) * net.tril[:s, :s][None, :, :, None]).sum(2)


def _running_mean(net: Net, x: Tensor, _: Tensor) -> Tensor:
    s = x.shape[1]
    return torch.tril(torch.ones(s, s, dtype=x.dtype)) @ x


#: How to mix -> words of the finding.
REFUSED: dict[str, tuple[Read, str]] = {
    "mean": (lambda n, x, t: x + x.mean(1, keepdim=True), "a reduction over the sequence"),
    "argmax": (lambda n, x, t: x * x.argmax(1, keepdim=True), "a reduction over the sequence"),
    "roll": (lambda n, x, t: x.roll(1, 1), "aten.roll may move elements"),
    "flip": (lambda n, x, t: x.flip(1), "aten.flip may move elements"),
    "cumsum": (lambda n, x, t: x.cumsum(1), "aten.cumsum runs along the sequence"),
    "sort": (lambda n, x, t: x.sort(1)[0], "aten.sort runs along the sequence"),
    "last_token": (lambda n, x, t: x + x[:, -1:], "a part of the sequence is cut out"),
    "last_token_select": (lambda n, x, t: x + x[:, -1][:, None], "one element of the sequence is picked"),
    "conv1d": (lambda n, x, t: n.conv(x.transpose(1, 2)).transpose(1, 2), "aten.conv1d.default is not known"),
    "gru": (lambda n, x, t: n.gru(x)[0], "aten.gru.input is not known"),
    "batch_norm": (
        lambda n, x, t: n.norm(x.transpose(1, 2)).transpose(1, 2),
        "aten.batch_norm.default is not known",
    ),
    "softmax": (lambda n, x, t: x.softmax(1), "a softmax along the sequence"),
    "softmax_of_queries": (lambda n, x, t: (x @ x.mT).softmax(-2) @ x, "a sum over the sequence"),
    "token_shift": (lambda n, x, t: F.pad(x, (0, 0, 1, -1)), "aten.pad may move elements"),
    "running_mean": (_running_mean, "a sum over the sequence"),
    "mixing_matrix": (lambda n, x, t: n.bias2d[: x.shape[1], : x.shape[1]] @ x, "a sum over the sequence"),
    "first_zeroed": (_first_zeroed, "one element of the sequence is picked"),
    "scores_of_positions": (
        lambda n, x, t: (x @ n.table[: x.shape[1]].t()).softmax(-1) @ x,
        "line up|a sum over",
    ),
    "pair_mask": (_pair_mask, "elements at different sequence positions meet"),
    "batch_iota": (lambda n, x, t: x + torch.arange(x.shape[0])[:, None, None], "varies along the batch"),
    "random": (
        lambda n, x, t: x + torch.rand(x.shape[1], DIM, dtype=x.dtype),
        "draws random numbers",
    ),
    "moe_by_arange": (_moe_by_arange, "lines up with the sequence is not known"),
    "batch_mean": (lambda n, x, t: x + x.mean(0, keepdim=True), "a reduction over the batch"),
    "batch_softmax": (lambda n, x, t: x.softmax(0), "a softmax along the batch"),
    "batch_select": (lambda n, x, t: x + x[0], "one element of the batch is picked"),
    "batch_einsum": (lambda n, x, t: torch.einsum("bsd,csd->bsd", x, x), "a sum over the batch"),
    "batch_matmul": (
        lambda n, x, t: x * (x.permute(1, 2, 0) @ x.permute(1, 0, 2)).mean((1, 2))[None, :, None],
        "a sum over the batch",
    ),
}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, dynamic: bool) -> None:
    read, words = REFUSED[name]
    ep = export(make(read), tokens(), dynamic=dynamic)
    report = bl.scan(ep)
    reasons = [getattr(item, "refusal", None) or getattr(item, "reason", "") for item in report.refused]
    assert any(re.search(words, reason) for reason in reasons), reasons
    with pytest.raises(bl.UnsupportedReadError, match="cannot be lifted"):
        bl.lift(ep)


def test_a_length_in_data_is_the_number_of_keys() -> None:
    """The local length would be that of the shard; a static program states the number."""
    model, x = make(lambda n, x, t: x * x.shape[1]), tokens()
    lifted = check_lift(model, export(model, x), x, sensitive=False)
    assert [(read.code, read.source_kind) for read in lifted.report.reads] == [("BL003", "length")]
    assert [item.name for item in lifted.inputs] == ["lifted_slots_keys"]
    assert bl.scan(export(model, x, dynamic=False)).reads == ()


def test_padding_by_widths() -> None:
    """``(1, -1)`` shifts the tokens and keeps the size."""
    gm = make_fx(lambda x: torch.ops.aten.constant_pad_nd(x * 2, [0, 0, 1, -1]), tracing_mode="fake")(
        torch.randn(2, 7, 4)
    )
    assert [mix.op for mix in bl.scan(gm).mixing] == ["aten.constant_pad_nd.default"]
    gm = make_fx(lambda x: torch.ops.aten.constant_pad_nd(x * 2, [1, 0]), tracing_mode="fake")(torch.randn(2, 7, 4))
    assert bl.scan(gm).mixing == ()


#: Values of the size of the sequence (static) that are no positions.
DISTRACTORS: dict[str, Read] = {
    "feature_scale": lambda n, x, t: x * n.feature,
    "feature_matrix": lambda n, x, t: x @ n.table[:DIM],
    "feature_iota": lambda n, x, t: x + torch.arange(DIM),
    "transposed": lambda n, x, t: (x.transpose(1, 2) + n.feature[:, None]).transpose(1, 2),
    "feature_mask": lambda n, x, t: x * torch.tril(torch.ones(DIM, DIM)).sum(0),
    "moe_by_gather": _moe_by_gather,
    "feature_cumsum": lambda n, x, t: x.cumsum(-1),
}


@pytest.mark.parametrize("name", DISTRACTORS)
def test_distractors_are_left_alone(name: str) -> None:
    x = tokens(seq=DIM)
    model = make(DISTRACTORS[name])
    ep = export(model, x, dynamic=False)
    assert bl.scan(ep).reads == () and bl.scan(ep).refused == ()
    assert check_lift(model, ep, x, sensitive=False).inputs == ()


def test_a_position_beside_a_distractor() -> None:
    """Static S == D: the same table is read by position and as a feature matrix."""
    x = tokens(seq=DIM)
    model = make(lambda n, x, t: (x + n.table[:DIM]) @ n.table[:DIM])
    ep = export(model, x, dynamic=False)
    assert [(read.source, read.op) for read in bl.scan(ep).reads] == [("table", "aten.add.Tensor")]
    check_lift(model, ep, x)


class Signal(nn.Module):
    """Without parameters up to the projection: the position is added to a plain ``[B, S]`` input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(TABLE))
        self.lin = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin((x + self.table[: x.shape[1]])[..., None])


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_position_before_any_parameter(dynamic: bool) -> None:
    model, x = Signal(), torch.randn(BATCH, SEQ)
    lifted = bl.lift(export(model, x, dynamic=dynamic), axes={"x": {0: "batch", 1: "seq"}})
    assert [item.name for item in lifted.inputs] == ["lifted_table"]
    order = orders(BATCH, SEQ)
    assert torch.equal(follow(lifted, order, BATCH, SEQ, x=x), gathered(model(x), order))


class Ids(nn.Module):
    """Position ids ``[3, B, S]`` as an input, as for rotary embeddings in three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.wpe = nn.Embedding(VOCAB, 4), nn.Embedding(TABLE, 4)

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        return self.emb(tokens) + self.wpe(ids[0]) * self.wpe(ids[1])


def test_batch_dim_that_is_not_the_first() -> None:
    def scan(batch: int, **kwargs: Any) -> bl.ScanReport:
        ids = torch.zeros(3, batch, SEQ, dtype=torch.int64)
        return bl.scan(export(Ids(), tokens(batch), ids, dynamic=False), **kwargs)

    assert scan(2).inputs[1] == bl.InputAxes("ids", 1, ((2, "seq", "row"),), 3)
    assert [finding.code for finding in scan(3).findings] == ["BL103"]
    given = scan(3, axes={"ids": {1: "batch", 2: "seq"}})
    assert given.findings == () and given.inputs[1].batch_dim == 1


# The zoo -------------------------------------------------------------------------------------------------

ROPE = {("buffer", "freqs_cis", "values"): 4}
CAUSAL = {("is_causal", "is_causal", "positions"): 2}
INV_FREQ = {("buffer", "model.rotary_emb.inv_freq", "values"): 8}
HF_MASK = {("iota", "aten.arange", "values"): 2}
LEARNED = {("parameter", "transformer.wpe.weight", "positions"): 1}
TRIL = {("buffer", f"transformer.h.{layer}.attn.bias", "positions"): 1 for layer in range(2)}
SLOTS = {"lifted_slots", "lifted_slots_keys"}
HF_ROPE = {"lifted_model_rotary_emb_inv_freq", "lifted_model_rotary_emb_inv_freq_1"}
HF_DOCS = {"lifted_index", "lifted_index_1_keys", "lifted_index_2", "lifted_index_3_keys"}

#: Case -> reads (kind, source, form) with their number, and the lifted inputs.
ZOO: dict[str, tuple[dict[tuple[str, str, str], int], set[str]]] = {
    "llama_pr1797": (ROPE | CAUSAL, {"lifted_freqs_cis"}),
    "llama_attribute": ({("constant", "freqs_cis", "values"): 4} | CAUSAL, {"lifted_freqs_cis"}),
    "llama_full_table": (ROPE | CAUSAL, {"lifted_freqs_cis"}),
    "llama_masked": (ROPE | {("input", "attention_mask", "positions"): 2}, {"lifted_freqs_cis"} | SLOTS),
    "llama_loss": (ROPE | CAUSAL, {"lifted_freqs_cis"}),
    "nanogpt": (LEARNED | TRIL, {"lifted_positions"} | SLOTS),
    "nanogpt_tied": (LEARNED | TRIL, {"lifted_positions"} | SLOTS),
    "sinusoid": ({("buffer", "pos_encoder.pe", "values"): 1}, {"lifted_pos_encoder_pe"}),
    "hf_llama": (INV_FREQ | HF_MASK, HF_ROPE | HF_DOCS),
    "hf_llama_eager": (INV_FREQ | HF_MASK, HF_ROPE | HF_DOCS),
    "hf_llama_mask": (
        INV_FREQ | {("input", "attention_mask", "values"): 2},
        HF_ROPE | SLOTS | {"lifted_attention_mask_keys"},
    ),
    "hf_llama_labels": (INV_FREQ | HF_MASK | {("input", "labels", "values"): 1}, HF_ROPE | HF_DOCS | {"lifted_labels"}),
    "hf_gpt2": (LEARNED | HF_MASK, {"lifted_positions"} | HF_DOCS),
    "tune_llama3": (
        {("buffer", "layers.1.attn.pos_embeddings.cache", "values"): 16} | CAUSAL,
        {"lifted_layers_1_attn_pos_embeddings_cache"},
    ),
}
#: Inputs whose sequence dim only keys read.
KEYS_ONLY = {("llama_masked", "attention_mask")}


def count(report: bl.ScanReport) -> dict[tuple[str, str, Any], int]:
    return dict(Counter((read.source_kind, read.source, read.form) for read in report.reads))


def test_the_table_has_every_case() -> None:
    assert ZOO.keys() == CASES.keys()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str, dynamic: bool) -> None:
    reads, names = ZOO[name]
    _, ep = export_case(name, dynamic=dynamic)
    before = str(ep.graph), str(ep.graph_signature)
    report = bl.scan(ep)
    assert (str(ep.graph), str(ep.graph_signature)) == before
    assert count(report) == reads
    assert report.refused == () and report.mixing and all(mix.handled for mix in report.mixing)
    for item in report.inputs:
        role = "col" if (name, item.name) in KEYS_ONLY else "row"
        assert (item.batch_dim, item.seq_dims, item.rank) == (0, ((1, "seq", role),), 2)
    assert [item.name for item in report.inputs] == list(CASES[name].seq_inputs)
    lifted = {item.name for item in bl.lift(ep).inputs}
    assert lifted == names


@pytest.mark.parametrize("name", ["llama_pr1797", "llama_masked", "nanogpt", "sinusoid"])
def test_locations_are_the_lines_of_the_model(name: str) -> None:
    code = {
        "freqs_cis": "apply_rotary_emb(xq, xk",
        "is_causal": "is_causal=True",
        "attention_mask": "padded_causal_mask(mask)",
        "transformer.wpe.weight": '["wpe"](pos)',
        "transformer.h.0.attn.bias": "self.bias[:, :, :t, :t]",
        "transformer.h.1.attn.bias": "self.bias[:, :, :t, :t]",
        "pos_encoder.pe": "self.pe[",
    }
    for read in bl.scan(export_case(name)[1]).reads:
        assert read.location is not None
        path = Path(read.location.file)
        assert path.parts[-3:] == ("tests", "zoo", "reference.py")
        line = path.read_text().splitlines()[read.location.line - 1]
        assert code[read.source] in line


@pytest.mark.parametrize("name", ["llama_pr1797", "llama_masked", "nanogpt", "hf_llama"])
def test_graph_module(name: str) -> None:
    """A plain GraphModule with ``get_attr`` state gives the reads of the program that it came from."""
    _, ep = export_case(name)
    module = ep.module(check_guards=False)
    text = str(module.graph)
    assert count(bl.scan(module)) == ZOO[name][0]
    assert str(module.graph) == text


def test_make_fx() -> None:
    model, x = make(LIFTS["slice"][0]), tokens()
    params = dict(model.named_parameters()) | dict(model.named_buffers())

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,))

    gm = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    report = bl.scan(gm)
    assert report.refused == () and len(report.reads) == 1
    assert report.reads[0].form == "values" and report.reads[0].stream == "positions"
