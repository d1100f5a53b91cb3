"""Writes in place, autocast regions, lengths as numbers, and tables read by rows of rows: lifted, and verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule

import buffer_lifting as bl
from buffer_lifting.passes.normalize import normalize

VOCAB, WIDTH, LENGTH, TABLE = 17, 8, 9, 40
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """An embedding, tables, and a head around the read under test."""

    t: Tensor
    cache: Tensor
    count: Tensor

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h, self.rel = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 5), nn.Embedding(8, 1)
        self.p = nn.Parameter(torch.randn(TABLE, WIDTH))
        self.register_buffer("t", torch.randn(TABLE, WIDTH))
        self.register_buffer("cache", torch.zeros(TABLE, WIDTH), persistent=False)
        self.register_buffer("count", torch.zeros(WIDTH), persistent=False)
        self.body = body

    def forward(self, ids: Tensor) -> Any:
        """``[B, S]`` to ``[B, S, 5]``."""
        return self.h(self.body(self, ids))


def program(body: Body, dynamic: bool) -> ExportedProgram:
    ids = torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    shapes = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    return export(Net(body), (ids,), dynamic_shapes=shapes, strict=False)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def _halves(n: Net, i: Tensor) -> Tensor:
    rows = n.p[: i.shape[1]]
    out = torch.zeros_like(rows)
    out[..., 0::2] = rows[..., 0::2].sin()
    out[..., 1::2] = rows[..., 1::2].cos()
    return n.e(i) * out


def _bucket(n: Net, i: Tensor) -> Tensor:
    place = torch.arange(i.shape[1])
    far = place[None] - place[:, None]
    bucket = 0 * far
    bucket += (far > 0).long() * 4
    bucket += far.abs().clamp(max=3)
    return attend(n.e(i), n.rel(bucket)[..., 0])


def _cold_cache(n: Net, i: Tensor) -> Tensor:
    length = i.shape[1]
    n.cache[:length].copy_(torch.arange(length)[:, None] * n.t[0])
    return n.e(i) + n.cache[:length].cos()


def _causal_fill(n: Net, i: Tensor) -> Tensor:
    mask = torch.ones(i.shape[1], i.shape[1]).triu(1)
    mask.masked_fill_(mask.bool(), float("-inf"))
    return attend(n.e(i), mask)


def _autocast(n: Net, i: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = (n.e(i) * n.t[: i.shape[1]]) @ n.t[:WIDTH].T
    return x.float()


def _keys_in_place(n: Net, i: Tensor) -> Tensor:
    x = n.e(i)
    keys = x.new_empty(x.shape)
    keys[..., :4].copy_(x[..., :4])
    keys[..., 4:].copy_(x[..., 4:] * n.t[: i.shape[1], 4:])
    return attend(keys, torch.ones(i.shape[1], i.shape[1], dtype=torch.bool).tril())


def _distances(n: Net, i: Tensor) -> Tensor:
    """BERT's relative_key_query: queries and keys with an embedding of their distance."""
    x, place = n.e(i)[:, None], torch.arange(i.shape[1])
    far = n.p[place[:, None] - place[None] + 16]
    scores = x @ x.mT + torch.einsum("bhld,lrd->bhlr", x, far) + torch.einsum("bhrd,lrd->bhlr", x, far)
    return (scores.softmax(-1) @ x)[:, 0]


def _rotary(x: Tensor, n: Net, length: int, first: slice, second: slice) -> Tensor:
    """Both halves of the features written into storage of their own."""
    cos, sin = n.t[:length, :4].cos(), n.t[:length, :4].sin()
    out = torch.empty_like(x)
    out[:, :, first] = x[:, :, first] * cos - x[:, :, second] * sin
    out[:, :, second] = x[:, :, second] * cos + x[:, :, first] * sin
    return out


def _rotary_halves(n: Net, i: Tensor) -> Tensor:
    return _rotary(n.e(i), n, i.shape[1], slice(0, 4), slice(4, None))


def _rotary_pairs(n: Net, i: Tensor) -> Tensor:
    return _rotary(n.e(i), n, i.shape[1], slice(0, None, 2), slice(1, None, 2))


def _whole_in_place(n: Net, i: Tensor) -> Tensor:
    """Rows written over all of a value, and then over all of data."""
    x, rows = n.e(i), torch.ones(i.shape[1], WIDTH)
    rows[:, :] = n.p[: i.shape[1]]
    kept = torch.zeros_like(x)
    kept[:, : i.shape[1]] = x * torch.slice_scatter(torch.zeros_like(rows), rows)
    return torch.slice_scatter(torch.empty_like(x), kept, 1)


LIFTED: dict[str, Body] = {
    "halves": _halves,
    "rotary_halves": _rotary_halves,
    "rotary_pairs": _rotary_pairs,
    "whole_in_place": _whole_in_place,
    "bucket": _bucket,
    "cold_cache": _cold_cache,
    "causal_fill": _causal_fill,
    "autocast": _autocast,
    "keys_in_place": _keys_in_place,
    "clone_and_scale": lambda n, i: n.e(i) + n.t[: i.shape[1]].clone().mul_(2),
    "step": lambda n, i: n.e(i) + n.p[1 : 1 + 2 * i.shape[1] : 2],
    "length": lambda n, i: n.e(i) * torch.full((1,), i.shape[1]).float().log(),
    "highest": lambda n, i: n.e(i) * torch.arange(i.shape[1]).max().float(),
    "any_of_user": lambda n, i: n.e(i).masked_fill(~(i > 15).any(-1)[:, None, None], 0.0),
    "constant": lambda n, i: n.e(i) + torch.tensor([float(k) for k in range(LENGTH)])[: i.shape[1], None],
    "flipped_features": lambda n, i: n.e(i) + n.p[: i.shape[1]].flip(-1),
    "normalised": lambda n, i: n.e(i) + F.normalize(n.p[: i.shape[1]], dim=-1),
    "einsum": lambda n, i: n.e(i) * torch.einsum("s,d->sd", torch.arange(i.shape[1]).float(), n.p[0]),
    "einsum_of_distances": _distances,
    "concatenated": lambda n, i: torch.cat([n.e(i)[..., :4], n.p[: i.shape[1], :4].expand_as(n.e(i)[..., :4])], -1),
}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", LIFTED)
def test_lifted_and_right(name: str, dynamic: bool) -> None:
    ep = program(LIFTED[name], dynamic)
    lifted = bl.lift(ep)
    if dynamic or name not in ("length", "highest"):  # a static program states its length
        assert lifted.inputs
    assert bl.verify(ep, lifted).passed


def _neighbours(n: Net, i: Tensor) -> Tensor:
    """Each token, but the first, has the features of the one before."""
    x = n.e(i)
    out = x + n.t[: i.shape[1]]
    out[:, 1:, :4] = x[:, :-1, :4]
    return out


def _first_token(n: Net, i: Tensor) -> Tensor:
    out = n.e(i) + n.t[: i.shape[1]]
    out[:, 0] = 0
    return out


def _first_rows(n: Net, i: Tensor) -> Tensor:
    rows = torch.zeros(i.shape[1], WIDTH)
    rows[:4] = n.p[:4]
    return n.e(i) + rows


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("body", [_neighbours, _first_token])
def test_writes_to_a_part_of_the_sequence_stay_refused(body: Body, dynamic: bool) -> None:
    with pytest.raises(bl.UnsupportedReadError, match=r"test_writes.py:\d+\] ->"):
        bl.lift(program(body, dynamic))


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_rows_of_a_parameter_written_to_a_part_stay_whole(dynamic: bool) -> None:
    exported = program(_first_rows, dynamic)
    lifted = bl.lift(exported)
    assert [(read.source, read.form) for read in lifted.report.reads] == [("p", "natural")]
    assert bl.verify(exported, bl.context_parallel(lifted, size=2 if dynamic else 1)).passed


UNIFORM: dict[str, Body] = {
    "zeros": lambda n, i: n.e(i) + torch.zeros(i.shape[1], WIDTH),
    "ones_like": lambda n, i: n.e(i) * torch.ones_like(i)[..., None],
    "types": lambda n, i: n.e(i) + n.e(torch.zeros_like(i)),
    "always_true": lambda n, i: attend(n.e(i), (torch.arange(i.shape[1]) >= 0)[None, :].expand(i.shape[1], -1)),
    "users_positions": lambda n, i: n.e(i) + n.t[i] + n.t[None].expand(i.shape[0], -1, -1).gather(1, _wide(i)),
}


def _wide(i: Tensor) -> Tensor:
    return i[..., None].expand(-1, -1, WIDTH)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", UNIFORM)
def test_no_read_invented(name: str, dynamic: bool) -> None:
    report = bl.scan(program(UNIFORM[name], dynamic))
    assert not report.reads and not report.refused


def _counter(n: Net, i: Tensor) -> Tensor:
    x = n.e(i)
    with torch.no_grad():
        n.count.add_(x.sum((0, 1)))
    return x + n.t[: i.shape[1]]


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_a_counter_is_not_lost(dynamic: bool) -> None:
    """Its write stood in a higher-order op, and vanished from the lifted program."""
    with pytest.raises(bl.UnsupportedReadError, match="BL101"):
        bl.lift(program(_counter, dynamic))


# The pass by itself: what it makes computes what the program computed ----------------------------------------


def _aliases(x: Tensor) -> Tensor:
    y = x + 1
    z = y.reshape(-1, 4)
    y.mul_(2)
    return z * 1


def _through_views(x: Tensor) -> Tensor:
    y = x + 1
    z = y.t()
    z[0].fill_(3)
    y[:, 1:2].add_(z[:2, :1].sum())
    return y * z.t()


def _read_again(x: Tensor) -> Tensor:
    y = torch.zeros(3, 4)
    y[1].copy_(x[0])
    w = y[1]
    y[1] *= 2
    return w + y[1]


def _zeroed(x: Tensor) -> Tensor:
    y = x * 1
    u = y[0]
    y.zero_()
    return u + 1


def _contiguous(x: Tensor) -> Tensor:
    y = x * 1
    z = y.contiguous()
    z.add_(1)
    return y + z


@pytest.mark.parametrize("body", [_aliases, _through_views, _read_again, _zeroed, _contiguous])
def test_writes_become_values(body: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return body(x)

    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    normalized = normalize(export(Module(), (x,), strict=False))
    module = GraphModule(dict(normalized.submodules), normalized.graph)
    (result,) = module(x.clone())
    assert torch.equal(result, body(x.clone()))
