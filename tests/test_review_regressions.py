"""Faults that a later review found: a program lifts and verifies, or is refused with node, line and hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl
from buffer_lifting.oracles import identity
from buffer_lifting.passes.shard_attention import _Sharding

VOCAB, WIDTH, LENGTH = 17, 8, 10
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """An embedding, a learned table of positions and a head around the body under test."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.t = nn.Parameter(torch.randn(64, WIDTH))
        self.body = body

    def forward(self, ids: Tensor) -> Any:
        """The body's."""
        return self.body(self, ids)


def program(body: Body, dynamic: bool = True) -> torch.export.ExportedProgram:
    """The exported net."""
    ids = torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    shapes = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    return export(Net(body), (ids,), dynamic_shapes=shapes)


def _half() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _cast_is_returned(n: Net, i: Tensor) -> Tensor:
    with _half():
        return n.h(n.e(i) + n.t[: i.shape[1]]).float()


def _cast_outside(n: Net, i: Tensor) -> Tensor:
    with _half():
        x = n.h(n.e(i) + n.t[: i.shape[1]])
    return x.double()


def _cast_inside(n: Net, i: Tensor) -> Tensor:
    with _half():
        x = n.h(n.e(i) + n.t[: i.shape[1]]).double()
        return x


def _two_casts(n: Net, i: Tensor) -> Tensor:
    with _half():
        return n.h(n.e(i) + n.t[: i.shape[1]]).float().double()


def _casts_within(n: Net, i: Tensor) -> Tensor:
    with _half():
        x = n.h((n.h(n.e(i)) + n.t[: i.shape[1]].float()).float())
    return x.double()


def _one_value_twice(n: Net, i: Tensor) -> tuple[Tensor, ...]:
    with _half():
        x = n.h(n.e(i) + n.t[: i.shape[1]])
        y = x.float()
    return y, x, y.float()


AUTOCAST: dict[str, Body] = {
    "cast_is_returned": _cast_is_returned,
    "cast_outside": _cast_outside,
    "cast_inside": _cast_inside,
    "two_casts": _two_casts,
    "casts_within": _casts_within,
    "one_value_twice": _one_value_twice,
    "no_cast": lambda n, i: _cast_outside(n, i).to(torch.bfloat16),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", AUTOCAST)
def test_an_autocast_region_that_makes_the_outputs_lifts(name: str, dynamic: bool) -> None:
    """The inlined output had another name than the signature's, which torch's verifier refused."""
    ep = program(AUTOCAST[name], dynamic)
    lifted = bl.lift(ep)
    assert lifted.program.graph_signature.user_outputs == ep.graph_signature.user_outputs
    report = bl.verify(ep, bl.context_parallel(lifted, size=1))
    assert {check.name for check in report.checks if check.passed} >= {"values", "identity", "equivariance"}
    torch.export.unflatten(lifted.program)


def _mask(n: Net, i: Tensor) -> Tensor:
    p = torch.arange(i.shape[1])
    mask = torch.vmap(torch.vmap(lambda a, b: (a >= b) & (a - b < 5), (None, 0)), (0, None))(p, p)
    x = n.e(i)[:, None]
    return n.h(F.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, 0])


VMAP: dict[str, Body] = {
    "mask": _mask,
    "positions": lambda n, i: n.h(n.e(i) + n.t[torch.vmap(lambda p: p * 2)(torch.arange(i.shape[1]))]),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", VMAP)
def test_positions_under_vmap_are_refused_with_a_way_out_that_works(name: str, dynamic: bool) -> None:
    """``lift`` crashed on the fake value, or lifted a program that did not run."""
    ep = program(VMAP[name], dynamic)
    (read,) = bl.scan(ep).refused
    assert isinstance(read, bl.PositionRead) and read.location is not None and read.location.file == __file__
    assert "torch.vmap" in str(read.refusal) and "run_decompositions({})" in read.hint
    with pytest.raises(bl.UnsupportedReadError, match=r"under torch\.vmap.*\[.*test_review_regressions"):
        bl.lift(ep)
    kept = bl.lift(ep, strict=False).program
    ids = torch.randint(1, VOCAB, (3, LENGTH))
    assert torch.equal(kept.module()(ids), ep.module()(ids))
    written_out = ep.run_decompositions({})
    lifted = bl.lift(written_out)
    assert lifted.inputs and bl.verify(written_out, bl.context_parallel(lifted, size=1)).passed


@pytest.mark.parametrize("dynamic", [True, False])
def test_vmap_over_parameters_stays_in_the_program(dynamic: bool) -> None:
    """Entering and leaving the level was dropped as dead code."""
    ep = program(lambda n, i: F.linear(n.e(i) + n.t[: i.shape[1]], torch.vmap(lambda w: w * 2)(n.h.weight)), dynamic)
    assert bl.verify(ep, bl.lift(ep)).passed


class TwoInputs(nn.Module):
    """Sequences whose lengths the export keeps apart, and which the scan takes for one axis: they have one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h, self.t = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), nn.Embedding(64, WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Attention within each input, then from the second to the first, ``[B, S, VOCAB]``."""
        x = self.e(input_ids)[:, None]
        p = torch.arange(labels.shape[1])
        y = (self.e(labels) + self.t(p))[:, None]
        bias = (p[None] - p[:, None]).float()
        x = F.scaled_dot_product_attention(x, x, x)
        y = F.scaled_dot_product_attention(y, y, y, attn_mask=bias)
        return self.h(F.scaled_dot_product_attention(y, x, x)[:, 0])


def test_two_symbols_of_one_axis_become_context_parallel() -> None:
    """T5 with labels: attention on fakes of both symbols equated them, which was refused without a node."""
    ids = torch.randint(1, VOCAB, (3, LENGTH))
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("input_ids", "labels")}
    ep = export(TwoInputs(), (), {"input_ids": ids, "labels": ids.flip(1)}, dynamic_shapes=shapes)
    one, other = (node.meta["val"].shape[1] for node in ep.graph.nodes if node.name in shapes)
    assert str(one) != str(other)
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=2)).passed


def test_what_would_fix_a_size_under_context_parallelism_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal of a fake value had neither node nor line."""
    ids = torch.randint(1, VOCAB, (3, LENGTH))
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("input_ids", "labels")}
    ep = export(TwoInputs(), (), {"input_ids": ids, "labels": ids.flip(1)}, dynamic_shapes=shapes)
    monkeypatch.setattr(_Sharding, "_unify", lambda *_: None)
    with pytest.raises(bl.UnsupportedReadError, match=r"node '\w+' .*test_review_regressions.*size=1") as refusal:
        bl.context_parallel(bl.lift(ep), size=2)
    assert "would fix a dynamic size" in str(refusal.value)


class ReadsItsLength(nn.Module):
    """The length of the sequence is the only read."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Scaled by the logarithm of the length, ``[B, S, WIDTH]``."""
        return self.h(self.e(ids) * torch.full((), ids.shape[1]).float().log())


@pytest.mark.parametrize("size", [1, 2])
def test_a_length_is_perturbed_as_a_length(size: int) -> None:
    """The control of the shards changed the values of an input that is read for its size, and moved nothing."""
    ids = torch.randint(1, VOCAB, (2, LENGTH))
    ep = export(ReadsItsLength(), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=size)).passed


def _causal(n: Net, i: Tensor) -> Tensor:
    p, x = torch.arange(i.shape[1]), n.e(i)[:, None]
    return n.h(F.scaled_dot_product_attention(x, x, x, attn_mask=p[:, None] >= p)[:, 0])


def _identity_with(change: float, monkeypatch: pytest.MonkeyPatch) -> bl.Check:
    """The identity check of a program whose second run has a gradient that is off by ``change``, relative."""
    runs: list[Any] = []

    def run(*args: Any) -> Any:
        outputs, found, state = real(*args)
        runs.append(found)
        if len(runs) % 2 == 0:
            found["h.weight"] = found["h.weight"] * (1 + change)
        return outputs, found, state

    real = identity._run
    monkeypatch.setattr(identity, "_run", run)
    ep = program(_causal)
    report = bl.verify(ep, bl.lift(ep), checks=("identity",))
    (check,) = report.checks
    return check


def test_gradients_may_differ_in_the_last_places_where_outputs_are_bitwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient whose terms autograd sums in another order failed the check, by 4e-16."""
    check = _identity_with(4 * torch.finfo(torch.float32).eps, monkeypatch)
    assert check.passed and "1 gradients to 16 units in the last place" in check.detail
    assert check.detail.startswith("outputs bitwise")


def test_a_gradient_off_by_more_than_the_last_places_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred units are no rounding."""
    with pytest.raises(bl.VerificationError, match=r"h\.weight.*gradient differs"):
        _identity_with(100 * torch.finfo(torch.float32).eps, monkeypatch)


DIAGONALS: dict[str, Callable[[int], Tensor]] = {
    "eye": lambda s: torch.eye(s, dtype=torch.bool),
    "eye_of_floats": lambda s: torch.eye(s, s) == 1,
    "diag": lambda s: torch.diag(torch.ones(s, dtype=torch.bool)),
    "diag_embed": lambda s: torch.diag_embed(torch.ones(s)) == 1,
}


class Padded(nn.Module):
    """Attention under a user's padding mask, in which every query sees itself."""

    def __init__(self, diagonal: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.e, self.h, self.diagonal = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), diagonal

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, WIDTH]``."""
        x = self.e(ids)[:, None]
        seen = mask[:, None, None, :].bool() | self.diagonal(ids.shape[1])
        return self.h(F.scaled_dot_product_attention(x, x, x, attn_mask=seen)[:, 0])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", DIAGONALS)
def test_a_diagonal_beside_a_padding_mask_lifts(name: str, dynamic: bool) -> None:
    """It was not known to be local: without a user's mask it stayed in the stage in natural order."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 7:] = 0
    shapes = {key: {0: Dim.AUTO, 1: Dim.AUTO} for key in ("ids", "mask")} if dynamic else None
    ids = torch.randint(1, VOCAB, (2, LENGTH))
    ep = export(Padded(DIAGONALS[name]), (), {"ids": ids, "mask": mask}, dynamic_shapes=shapes)
    lifted = bl.lift(ep)
    assert bl.verify(ep, bl.context_parallel(lifted, size=1)).passed
    if dynamic:
        assert bl.verify(ep, bl.context_parallel(lifted, size=2)).passed


def _position_of_each_sample(n: Net, i: Tensor) -> Tensor:
    p = torch.arange(i.shape[1]) + torch.arange(i.shape[0])[:, None]
    return n.h(n.e(i) + n.t[p])


def _sequence_before_batch(n: Net, i: Tensor) -> Tensor:
    x = n.e(i).transpose(0, 1).flatten(0, 1)
    return n.h(x + n.t[: i.shape[1]].repeat_interleave(i.shape[0], 0))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("body", [_position_of_each_sample, _sequence_before_batch])
def test_refusals_behind_the_scan_name_code_node_line_and_way_out(body: Body, dynamic: bool) -> None:
    """They had no source line, one of them no code either."""
    with pytest.raises(bl.UnsupportedReadError, match=r"^BL105 node '\w+'.* \[.*test_review_regressions.*:\d+\] -> \w"):
        bl.lift(program(body, dynamic))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_write_through_a_view_that_cannot_be_inverted_is_refused(dynamic: bool) -> None:
    """A write to the diagonal of a mask was dropped as dead code: the lifted program computed something else."""

    def seen(mask: Tensor, length: int) -> Tensor:
        own = mask[:, None, None, :].bool().expand(-1, -1, length, -1).clone()
        own.diagonal(dim1=-2, dim2=-1).fill_(True)
        return own

    class Written(Padded):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.e(ids)[:, None]
            return self.h(F.scaled_dot_product_attention(x, x, x, attn_mask=seen(mask, ids.shape[1]))[:, 0])

    shapes = {key: {0: Dim.AUTO, 1: Dim.AUTO} for key in ("ids", "mask")} if dynamic else None
    inputs = {"ids": torch.randint(1, VOCAB, (2, LENGTH)), "mask": torch.ones(2, LENGTH, dtype=torch.long)}
    ep = export(Written(DIAGONALS["eye"]), (), inputs, dynamic_shapes=shapes)
    with pytest.raises(bl.UnsupportedReadError, match=r"BL102 .*written in place"):
        bl.lift(ep)


class RestartingPositions(nn.Module):
    """Learned positions that begin again at each separator, computed from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(23, 8), nn.Embedding(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        slots = torch.arange(ids.shape[1])[None]
        start = torch.where(ids == 5, slots, 0).cummax(1).values
        return self.embed(ids) + self.positions(slots - start)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_control_may_leave_its_table(size: int | None) -> None:
    """Perturbing the start of a document makes an index negative: the control has moved something."""
    torch.manual_seed(0)
    ids = torch.randint(3, 12, (3, 12))
    program = export(RestartingPositions(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    lifted = bl.lift(program)
    assert bl.verify(program, lifted if size is None else bl.context_parallel(lifted, size=size)).passed


def _by_frequency(n: Net, ids: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1])
    return n.h(n.e(ids) + F.embedding(at, n.t, scale_grad_by_freq=True))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "body", [_by_frequency, lambda n, ids: n.h(F.embedding(ids, n.t, scale_grad_by_freq=True))], ids=["table", "tokens"]
)
def test_gradients_by_frequency_are_refused(body: Body, dynamic: bool) -> None:
    """Lifting repeats each row's index for every sample, and a rank counts a part of the tokens."""
    with pytest.raises(bl.UnsupportedReadError, match="scale_grad_by_freq divides the gradient of each row"):
        bl.lift(program(body, dynamic))


OF_THE_BATCH: dict[str, Body] = {
    "divided": lambda n, ids: n.h(n.e(ids) + n.t.detach()[: ids.shape[1]] / ids.shape[0]),
    "divided by a float": lambda n, ids: n.h(n.e(ids) + n.t[: ids.shape[1]] * (1.0 / ids.shape[0])),
    "multiplied": lambda n, ids: n.h(n.e(ids) * (torch.arange(ids.shape[1]) * ids.shape[0])[None, :, None]),
    "first row": lambda n, ids: n.h(n.e(ids) + n.t.narrow(0, ids.shape[0], ids.shape[1])),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
@pytest.mark.parametrize("size", [1, 2])
def test_values_made_from_the_batch_size(name: str, size: int) -> None:
    """They were computed for two samples, however many there were. The example has three."""
    ep = program(OF_THE_BATCH[name])
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=size)).passed


WHOLE_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda ids: ids[:, :1].expand(-1, ids.shape[1]),
    "first repeated": lambda ids: ids[:, :1].repeat(1, ids.shape[1]),
    "last": lambda ids: ids[:, -1:].expand(ids.shape),
    "count": lambda ids: (ids == 0).sum(1, keepdim=True).expand(ids.shape),
    "largest": lambda ids: ids.amax(1, keepdim=True).expand(ids.shape),
    "any": lambda ids: (ids == 3).any(1, keepdim=True).long().expand(ids.shape),
}


class Attends(nn.Module):
    """Causal attention over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def attend(self, x: Tensor) -> Tensor:
        return self.h(F.scaled_dot_product_attention(*[x[:, None]] * 3, is_causal=True)[:, 0])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", WHOLE_SAMPLES)
def test_a_value_of_whole_samples_that_is_spread_over_the_tokens_is_hoisted(name: str, dynamic: bool) -> None:
    """It is the same at every token, so no position is read; a rank that has a part of a sample computes another."""

    class Model(Attends):
        def forward(self, ids: Tensor) -> Tensor:
            return self.attend(self.e(ids) + self.e(WHOLE_SAMPLES[name](ids)))

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    ep = export(Model(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)
    lifted = bl.lift(ep)
    assert "inputs" in [item.stream for item in lifted.inputs]
    for size in (1, 2) if dynamic else (1,):
        assert bl.verify(ep, bl.context_parallel(lifted, size=size)).passed


@pytest.mark.parametrize(
    "scores",
    [
        lambda a: a / a.norm(),
        lambda a: torch.exp(a - a.amax((-2, -1), keepdim=True)),
        lambda a: a / a.sum(),
        lambda a: F.relu(a - a.mean()),
        lambda a: (a / a.std()).softmax(-1),
        lambda a: ((a - a.mean((-2, -1), keepdim=True)) / a.std((-2, -1), keepdim=True)).softmax(-1),
        lambda a: a / a.sum((0, -1), keepdim=True),
    ],
)
@pytest.mark.parametrize("heads", [True, False])
def test_a_reduction_over_queries_and_keys_is_refused(scores: Callable[[Tensor], Tensor], heads: bool) -> None:
    """Over the keys alone it is whole on every rank; over the queries it is not."""

    class Model(Attends):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.e(ids)
            q = x.view(*x.shape[:2], 2, 4).transpose(1, 2) if heads else x
            out = scores(q @ q.mT) @ q
            return self.h(out.transpose(1, 2).reshape(x.shape) if heads else out)

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    ep = export(Model(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)
    with pytest.raises(bl.UnsupportedReadError, match=r"BL201 .*(reduction over|goes back into the tokens)"):
        bl.lift(ep)


SAMPLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "largest": lambda x, lengths: x * lengths.max(),
    "mean": lambda x, lengths: x * lengths.float().mean(),
    "number": lambda x, lengths: x * lengths.max().item(),
    "first sample": lambda x, lengths: x * lengths[0].item(),
    "norm": lambda x, lengths: x / x.sum((1, 2)).norm(),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_value_of_all_samples_is_refused(name: str) -> None:
    """A microbatch has a part of the samples."""

    class Model(Attends):
        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            return self.h(SAMPLES[name](self.e(ids), lengths))

    args = torch.randint(1, VOCAB, (3, LENGTH)), torch.tensor([4, 5, 6])
    ep = export(Model(), args, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO}))
    with pytest.raises(bl.UnsupportedReadError, match=r"mixes the sequence or the batch|all tokens or samples|BL201"):
        bl.lift(ep, axes={"ids": {0: "batch", 1: "seq"}, "lengths": {0: "batch"}})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (lambda x: x[..., : x.shape[1] // 4], "BL201"),
        (lambda x: torch.full_like(x, x.shape[1] % 3) + x, "BL003"),
        (lambda x: x * (x.shape[1] // 3), "BL003"),
    ],
)
def test_a_quotient_of_the_length_is_a_length(body: Callable[[Tensor], Tensor], code: str) -> None:
    """``S // 4`` of a shard is another number: features that are cut at it are refused, values are made of all of S."""

    class Model(Attends):
        def forward(self, ids: Tensor) -> Tensor:
            y = body(self.e(ids))
            return self.h(y) if y.shape[-1] == 8 else y

    ep = export(Model(), (torch.randint(1, VOCAB, (3, 16)),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert [item.code for item in bl.check(ep)] == [code]
    if code == "BL003":
        parallel = bl.context_parallel(bl.lift(ep), size=2)
        (length,) = parallel.inputs
        assert length.role == "col", "the keys of all ranks are as many as the sequence has tokens"
        ids = torch.randint(1, VOCAB, (3, 20))
        feed = parallel.feed(3, 20, shard=(1, 2))
        assert torch.equal(parallel.program.module()(ids[:, 10:], **feed), ep.module()(ids)[:, 10:])


def _offset(number: Tensor, ids: Tensor) -> int:
    start = cast(int, number.item())
    torch._check(start >= 0)
    torch._check(start + ids.shape[1] <= 64)
    return start


OFFSETS: dict[str, Callable[..., Tensor]] = {
    "slice": lambda net, ids, k: net.wpe.weight[(i := _offset(k, ids)) : i + ids.shape[1]],
    "narrow": lambda net, ids, k: net.wpe.weight.narrow(0, _offset(k, ids), ids.shape[1]),
    "chain": lambda net, ids, k: net.wpe.weight.narrow(0, _offset(k, ids), ids.shape[1]).sin()[None],
    "product": lambda net, ids, k: (net.wpe.weight * 1.5).narrow(0, _offset(k, ids), ids.shape[1]),
    "projected": lambda net, ids, k: F.linear(net.wpe.weight.narrow(0, _offset(k, ids), ids.shape[1]), net.w),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_a_learned_table_that_is_read_at_an_offset_of_the_user(name: str) -> None:
    """A number and a parameter make no activations: the rows are still read by position."""

    class Model(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.wpe, self.w = nn.Embedding(64, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, ids: Tensor, k: Tensor) -> Tensor:
            return self.h(self.e(ids) + OFFSETS[name](self, ids, k))

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO}, None)
    ep = export(Model(), (torch.randint(1, VOCAB, (3, LENGTH)), torch.tensor(5)), dynamic_shapes=shapes)
    assert {item.code for item in bl.check(ep)} == {"BL002"}
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=1)).passed


def test_a_layer_of_a_learned_table_that_the_user_picks_is_refused() -> None:
    class Model(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.Parameter(torch.randn(3, 64, 8))

        def forward(self, ids: Tensor, k: Tensor) -> Tensor:
            return self.h(self.e(ids) + self.tables[k][: ids.shape[1]])

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO}, None)
    ep = export(Model(), (torch.randint(1, VOCAB, (3, LENGTH)), torch.tensor(1)), dynamic_shapes=shapes)
    with pytest.raises(bl.UnsupportedReadError, match="'tables'"):
        bl.lift(ep)


def test_a_decomposed_linear_without_bias_is_no_read() -> None:
    """``run_decompositions()`` expands the weight to the batch, for ``bmm``."""

    class Model(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(8, 8, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.e(ids)
            q = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return self.o(y.transpose(1, 2).reshape(x.shape))

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    ep = export(Model(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes).run_decompositions()
    assert {item.code for item in bl.check(ep)} == {"BL003"}
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=2)).passed


class Alibi(Attends):
    """Attention whose scores get a slope for each head times the distance; ``spread`` gives ``[B, 2, 1, 1]``."""

    def __init__(self, spread: Callable[[Tensor, int], Tensor], learned: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.spread = spread
        slopes = torch.tensor([0.5, 0.25])
        if learned:
            self.slopes: Tensor = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)

    def forward(self, ids: Tensor) -> Tensor:
        x, p = self.e(ids), torch.arange(ids.shape[1])
        q, k, v = (own(x).unflatten(2, (2, 4)).transpose(1, 2) for own in (self.q, self.k, self.v))
        bias = self.spread(self.slopes, ids.shape[0]) * (p[None] - p[:, None])
        out = (q @ k.mT + bias).softmax(-1) @ v
        return self.h(out.transpose(1, 2).flatten(2))


SPREADS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": lambda s, b: s.view(1, 2, 1, 1).expand(b, 2, 1, 1),
    "broadcast": lambda s, b: s.view(1, 2, 1, 1).broadcast_to(b, 2, 1, 1),
    "repeat": lambda s, b: s.view(1, 2, 1, 1).repeat(b, 1, 1, 1),
    "ones": lambda s, b: torch.ones(b, 1, 1, 1) * s.view(1, 2, 1, 1),
    "element": lambda s, b: s[:1].repeat(b)[:, None, None, None],
    "picked": lambda s, b: s[torch.zeros(b, dtype=torch.long)][:, None, None, None],
}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", SPREADS)
def test_constants_spread_over_the_batch_meet_positions(name: str, learned: bool) -> None:
    """A rebuilt value has its samples in a dim of its own: what is repeated for the batch already has one of them."""
    ep = export(
        Alibi(SPREADS[name], learned),
        (torch.randint(1, VOCAB, (3, LENGTH)),),
        dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},),
    )
    lifted = bl.lift(ep)
    for size in (1, 2):
        assert bl.verify(ep, bl.context_parallel(lifted, size=size)).passed


class Folded(Attends):
    def __init__(self, spread: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.spread = spread
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))

    def forward(self, ids: Tensor) -> Tensor:
        x, p = self.e(ids), torch.arange(ids.shape[1])
        q = x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
        bias = self.spread(self.slopes, ids.shape[0])[:, None, None] * (p[None] - p[:, None])
        out = (q @ q.mT + bias).softmax(-1) @ q
        return self.h(out.unflatten(0, (ids.shape[0], 2)).transpose(1, 2).flatten(2))


def folded(spread: Callable[[Tensor, int], Tensor], dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    return export(Folded(spread), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)


@pytest.mark.parametrize("dynamic", [True, False])
def test_constants_of_heads_repeated_for_the_batch(dynamic: bool) -> None:
    """The rows of a sample are those of the constant."""
    ep = folded(lambda s, b: s.repeat(b), dynamic)
    lifted = bl.lift(ep)
    assert bl.verify(ep, bl.context_parallel(lifted, size=2 if dynamic else 1)).passed


@pytest.mark.parametrize("dynamic", [True, False])
def test_constants_of_heads_folded_in_another_order_are_refused(dynamic: bool) -> None:
    """Here a sample's rows depend on how many samples there are."""
    ep = folded(lambda s, b: s[:, None].repeat(1, b).flatten(), dynamic)
    with pytest.raises(bl.UnsupportedReadError, match=r"a reshape splits|folded"):
        bl.lift(ep)


def test_a_floating_mask_of_the_user_has_rows_and_keys() -> None:
    """``[batch, seq, seq]``: of dynamic sizes the last dim is the sequence again, and no number of features."""

    class Masked(Attends):
        def forward(self, ids: Tensor, bias: Tensor) -> Tensor:
            x = self.e(ids)[:, None]
            return self.h(F.scaled_dot_product_attention(x, x, x, attn_mask=bias[:, None])[:, 0])

    args = torch.randint(1, VOCAB, (3, LENGTH)), torch.randn(3, LENGTH, LENGTH)
    ep = export(Masked(), args, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}))
    _, bias = bl.scan(ep).inputs
    assert bias.seq_dims == ((1, "seq", "row"), (2, "seq", "col"))
    lifted = bl.context_parallel(bl.lift(ep), size=1)
    order = torch.stack([torch.randperm(LENGTH) for _ in range(3)])
    own = lifted.shard_inputs(order=order, ids=args[0], bias=args[1])
    result = lifted.program.module()(own["ids"], own["bias"], **lifted.feed(3, LENGTH, order=order))
    expected = ep.module()(*args).gather(1, order[..., None].expand(-1, -1, VOCAB))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_value_that_is_read_along_each_of_its_dims(dynamic: bool) -> None:
    """One node is cut along its rows and along its columns: each has a table of its own."""

    class Product(Attends):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.e(ids)[:, None]
            t = torch.ones(ids.shape[1], ids.shape[1]).tril()
            return self.h(F.scaled_dot_product_attention(x, x, x, attn_mask=(t @ t) > 0)[:, 0])

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    ep = export(Product(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)
    (read,) = bl.scan(ep).reads
    assert read.op == "aten.scaled_dot_product_attention.default" and read.refusal is None
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=1)).passed


@pytest.mark.parametrize("dynamic", [True, False])
def test_buckets_of_distances(dynamic: bool) -> None:
    class Buckets(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(5, 1)
            self.register_buffer("borders", torch.tensor([-4, -1, 1, 4]))

        def forward(self, ids: Tensor) -> Tensor:
            x, p = self.e(ids)[:, None], torch.arange(ids.shape[1])
            bias = self.bias(torch.bucketize(p[None] - p[:, None], self.borders))[..., 0]
            return self.h(((x @ x.mT + bias).softmax(-1) @ x)[:, 0])

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    ep = export(Buckets(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=1)).passed


@pytest.mark.parametrize("dynamic", [True, False])
def test_joined_rows_of_equal_places_are_no_read(dynamic: bool) -> None:
    """LayoutLMv3 without boxes: learned tables looked up at zeros, and joined."""

    class Boxes(Attends):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.top = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            box = torch.zeros(*ids.shape, 2, dtype=torch.long)
            place = torch.cat([self.left(box[:, :, 0]), self.top(box[:, :, 1])], -1)
            return self.h(self.e(ids) + place)

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    ep = export(Boxes(), (torch.randint(1, VOCAB, (3, LENGTH)),), dynamic_shapes=shapes)
    assert bl.check(ep) == ()
    assert bl.verify(ep, bl.context_parallel(bl.lift(ep), size=1)).passed
