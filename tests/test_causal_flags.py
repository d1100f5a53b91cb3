"""``causal_flags``: a mask becomes ``is_causal=True`` where it is proven to be plain causal, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.torch_compat import schema_args

INF = float("inf")
MIN = torch.finfo(torch.float64).min
Mask = Callable[[nn.Module, int, Tensor], Tensor]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Models, masks and what they are compared by are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Attends(nn.Module):
    """Embeddings, one attention of 2 heads under a mask of the model's own, a projection. Tokens are ``[B, S]``."""

    def __init__(self, mask: Mask, dtype: torch.dtype = torch.float64, keys: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.q, self.kv = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.mask, self.keys = mask, keys
        ones = torch.ones(32, 32)
        self.register_buffer("triangle", ones.tril().bool(), persistent=False)
        self.register_buffer("bias", ones.tril().view(1, 1, 32, 32))  # persistent, as nanoGPT's
        self.register_buffer("additive", torch.full((32, 32), -INF).triu(1), persistent=False)
        self.register_buffer("window", ones.tril().triu(-3).bool(), persistent=False)
        self.register_buffer("bent", ones.tril().index_fill(0, torch.tensor([31]), 0.0).bool(), persistent=False)
        self.register_buffer("index", torch.arange(40), persistent=False)
        self.register_buffer("counter", ones.tril().bool(), persistent=False)
        self.learned = nn.Parameter(torch.full((32, 32), -INF).triu(1))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        k, v = self.kv(x).chunk(2, dim=-1)
        if self.keys:
            k, v = (F.pad(y, (0, 0, 0, self.keys)) for y in (k, v))
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.q(x), k, v))
        mask = self.mask(self, tokens.shape[1], tokens)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def program_of(model: nn.Module, length: int = 10, dynamic: bool = True) -> ExportedProgram:
    """An export of a model that takes tokens ``[B, S]``."""
    tokens = torch.arange(3 * length).view(3, length) % 16
    return export(model, (tokens,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO} if dynamic else None,), strict=False)


def flags(program: ExportedProgram) -> list[tuple[bool, bool]]:
    """Of each attention: whether it is causal by flag, whether it has a mask."""
    nodes = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    return [(schema_args(node)["is_causal"], schema_args(node)["attn_mask"] is not None) for node in nodes]


def rows(s: int) -> Tensor:
    """``[S, 1]``"""
    return torch.arange(s)[:, None]


def cols(s: int) -> Tensor:
    """``[1, S]``"""
    return torch.arange(s)[None]


def tri(s: int) -> Tensor:
    """The lower triangle of ones."""
    return torch.tril(torch.ones(s, s))


def written_in_place(model: nn.Module, s: int, tokens: Tensor) -> Tensor:
    mask = torch.full((s, s), -INF)
    mask.triu_(1)
    return mask


def filled_in_place(model: nn.Module, s: int, tokens: Tensor) -> Tensor:
    mask = torch.zeros(s, s)
    mask.masked_fill_(cols(s) > rows(s), -INF)
    return mask


def as_hugging_face(model: nn.Module, s: int, tokens: Tensor) -> Tensor:
    """Reads by index, new ones, logic, an expand."""
    b = tokens.shape[0]
    q, k = torch.arange(s)[None, None, :, None], torch.arange(s)[None, None, None, :]
    batch = torch.arange(b)[:, None, None, None]
    positions = torch.arange(s)[None].expand(b, -1)
    allowed = q.new_ones((), dtype=torch.bool) & (positions[batch, k] <= positions[batch, q])
    return allowed.expand(b, -1, s, s)


CAUSAL: dict[str, Mask] = {
    "tril of bool": lambda m, s, t: torch.ones(s, s, dtype=torch.bool).tril(),
    "compared": lambda m, s, t: cols(s) <= rows(s),
    "compared the other way": lambda m, s, t: rows(s) >= cols(s),
    "strict, with positions from one": lambda m, s, t: cols(s) < torch.arange(1, s + 1)[:, None],
    "scaled": lambda m, s, t: cols(s) * 3 <= rows(s) * 3 + 2,
    "distance": lambda m, s, t: (rows(s) - cols(s)) >= 0,
    "downwards": lambda m, s, t: torch.arange(s - 1, -1, -1)[None] >= (s - 1 - torch.arange(s))[:, None],
    "transposed": lambda m, s, t: torch.ones(s, s, dtype=torch.bool).triu().T,
    "negated": lambda m, s, t: ~torch.ones(s, s, dtype=torch.bool).triu(1),
    "logical not": lambda m, s, t: torch.logical_not(cols(s) > rows(s)),
    "four dims": lambda m, s, t: (cols(s) <= rows(s)).view(1, 1, s, s),
    "expanded to the batch": lambda m, s, t: (cols(s) <= rows(s))[None, None].expand(t.shape[0], 1, s, s),
    "expanded to the heads": lambda m, s, t: tri(s).bool().expand(t.shape[0], 2, -1, -1),
    "with what is always so": lambda m, s, t: (cols(s) <= rows(s)) & (cols(s) < s) & (rows(s) >= 0),
    "or what is never so": lambda m, s, t: (cols(s) <= rows(s)) | (cols(s) < 0),
    "two bounds": lambda m, s, t: (cols(s) < rows(s)) | (cols(s) == rows(s)),
    "additive, triu": lambda m, s, t: torch.full((s, s), -INF).triu(1),
    "additive, masked fill": lambda m, s, t: torch.zeros(s, s).masked_fill(cols(s) > rows(s), -INF),
    "additive, where": lambda m, s, t: torch.where(cols(s) <= rows(s), 0.0, -INF),
    "additive, lowest": lambda m, s, t: torch.where(cols(s) <= rows(s), 0.0, MIN),
    "one less mask": lambda m, s, t: (1.0 - tri(s)) * MIN,
    "masked and multiplied": lambda m, s, t: (1.0 - tri(s)).masked_fill(tri(s) == 0, MIN),
    "triangle by hand, as in Hugging Face": lambda m, s, t: torch.full((s, s), MIN)
    * (torch.arange(s) > torch.arange(s).reshape(-1, 1)),
    "buffer": lambda m, s, t: m.triangle[:s, :s],
    "persistent buffer": lambda m, s, t: m.bias[:, :, :s, :s] == 1,
    "buffer, filled": lambda m, s, t: torch.zeros(s, s).masked_fill(m.bias[0, 0, :s, :s] == 0, -INF),
    "additive buffer": lambda m, s, t: m.additive[:s, :s],
    "buffer, at an offset": lambda m, s, t: m.triangle[2 : s + 2, 2 : s + 2],
    "index buffer": lambda m, s, t: m.index[:s][None] <= m.index[:s][:, None],
    "every second": lambda m, s, t: torch.arange(2 * s)[::2][None] <= torch.arange(2 * s)[1::2][:, None],
    "written in place": written_in_place,
    "filled in place": filled_in_place,
    "as Hugging Face": as_hugging_face,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_idioms_become_flags(name: str) -> None:
    """In float64: outputs and gradients are equal at three lengths, and the input program is as it was."""
    program = program_of(Attends(CAUSAL[name]))
    before = [node.format_node() for node in program.graph.nodes]
    converted = bl.causal_flags(program)
    assert flags(program) == [(False, True)] and flags(converted) == [(True, False)]
    assert before == [node.format_node() for node in program.graph.nodes]
    assert not any(node.name.startswith(("triu", "tril", "le", "gt", "masked_fill")) for node in converted.graph.nodes)
    for length in (2, 10, 17):
        _equal(program, converted, length)


def _equal(program: ExportedProgram, converted: ExportedProgram, length: int) -> None:
    """Outputs and gradients of two programs."""
    tokens = torch.randint(0, 16, (2, length), generator=torch.Generator().manual_seed(length))
    found = []
    for each in (program, converted):
        module = each.module()
        module.zero_grad()
        result = module(tokens)
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)).sum().backward()
        found.append([result, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for one, two in zip(*found, strict=True):
        assert one.dtype == torch.float64 and (one - two).abs().max() <= 1e-12
