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
from zoo.catalog import entries, export_cell, export_of

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
    "triangle by hand, as in Hugging Face": lambda m, s, t: (
        torch.full((s, s), MIN) * (torch.arange(s) > torch.arange(s).reshape(-1, 1))
    ),
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


def bump(model: Any, s: int, tokens: Tensor) -> Tensor:
    """A buffer that the forward changes."""
    model.counter.logical_not_()
    model.counter.logical_not_()
    return model.counter[:s, :s]


def by_documents(model: nn.Module, s: int, tokens: Tensor) -> Tensor:
    """Document ids from positions made in the graph: one document, until others are fed."""
    positions = torch.arange(s)[None]
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (cols(s) <= rows(s)) & (documents[:, None] == documents[:, :, None])


def neighbours(model: nn.Module, s: int, tokens: Tensor) -> Tensor:
    """Documents by a difference of slices."""
    positions = torch.arange(s)
    documents = F.pad((positions[1:] - positions[:-1] != 1).long(), (1, 0)).cumsum(0)
    return (cols(s) <= rows(s)) & (documents[None] == documents[:, None])


NEAR: dict[str, tuple[Mask, str]] = {
    "one more": (lambda m, s, t: torch.ones(s, s).tril(1).bool(), "not the lower triangle"),
    "strict": (lambda m, s, t: cols(s) < rows(s), "not the lower triangle"),
    "strict but for the first": (lambda m, s, t: (cols(s) < rows(s)) | (cols(s) == 0), "something else than positions"),
    "window": (lambda m, s, t: (cols(s) <= rows(s)) & (rows(s) - cols(s) < 4), "not the lower triangle"),
    "window, wider than the export": (lambda m, s, t: (cols(s) <= rows(s)) & (cols(s) > rows(s) - 64), "not the lower"),
    "window of half the length": (lambda m, s, t: (cols(s) <= rows(s)) & (rows(s) - cols(s) < s // 2), ""),
    "upper": (lambda m, s, t: torch.ones(s, s).triu().bool(), "not the lower triangle"),
    "transposed": (lambda m, s, t: (cols(s) <= rows(s)).T, "not the lower triangle"),
    "all": (lambda m, s, t: torch.ones(s, s, dtype=torch.bool), "not the lower triangle"),
    "bidirectional zeros": (lambda m, s, t: torch.zeros(s, s), "not the lower triangle"),
    "chunks": (lambda m, s, t: (cols(s) <= rows(s)) & (cols(s) // 4 == rows(s) // 4), "floor_divide"),
    "prefix": (lambda m, s, t: (cols(s) <= rows(s)) | (cols(s) < 3), "something else than positions"),
    "padding": (lambda m, s, t: (cols(s) <= rows(s)) & (t != 0)[:, None, None], "the input 'tokens'"),
    "padding, added": (lambda m, s, t: torch.full((s, s), -INF).triu(1) + (t == 0)[:, None, None] * -1.0, "'tokens'"),
    "documents": (by_documents, "documents=False"),
    "documents, by slices": (neighbours, "aten.pad.default"),
    "slopes": (lambda m, s, t: torch.full((s, s), -INF).triu(1) + (cols(s) - rows(s)) * 0.5, "of positions"),
    "additive, shifted": (lambda m, s, t: torch.full((s, s), -INF).triu(1) + 1.0, "not the lower triangle"),
    "additive, a large number": (lambda m, s, t: torch.full((s, s), -1e9).triu(1), "numbers other than"),
    "additive, one": (lambda m, s, t: -torch.ones(s, s).triu(1), "-1.0 in float64 is not -inf"),
    "times infinity": (lambda m, s, t: (1 - tri(s)) * -INF, "numbers other than"),  # 0 * -inf is nan
    "blocked with True": (lambda m, s, t: cols(s) > rows(s), "not the lower triangle"),
    "buffer, off by one": (lambda m, s, t: m.triangle[1 : s + 1, :s], "not the lower triangle"),
    "buffer with a window": (lambda m, s, t: m.window[:s, :s], "not the lower triangle"),
    "buffer, bent in its last row": (lambda m, s, t: m.bent[:s, :s], "are no triangle"),
    "buffer that changes": (bump, "is written in place"),
    "parameter": (lambda m, s, t: m.learned[:s, :s], "can change"),
    "one row": (lambda m, s, t: m.triangle[s - 1 : s, :s].expand(s, s), ""),
    "by scaled columns": (lambda m, s, t: cols(s) * 2 <= rows(s), "something else than positions"),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", NEAR)
def test_near_misses_stay(name: str, dynamic: bool) -> None:
    """The same program is returned, and the reason is said."""
    mask, why = NEAR[name]
    program = program_of(Attends(mask), dynamic=dynamic)
    found: list[Any] = []
    assert bl.causal_flags(program, report=found.append) is program
    assert [proof.causal for proof in found] == [False]
    assert "not proven" in str(found[0]) and why in found[0].why, found[0]
    assert "test_causal_flags.py" in found[0].location


def test_more_keys_than_queries_stay() -> None:
    """``is_causal`` aligns at the top left; so does this mask, but it is not square."""
    found: list[Any] = []
    model = Attends(lambda m, s, t: torch.ones(s, s + 1, dtype=torch.bool).tril(), keys=1)
    program = program_of(model)
    assert bl.causal_flags(program, report=found.append) is program
    assert "queries and" in found[0].why


@pytest.mark.parametrize(
    ("dtype", "converted"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_the_lowest_number_of_a_dtype(dtype: torch.dtype, converted: bool) -> None:
    """Scores can be as far apart as the range of float16, and then a blocked key has a weight."""
    low = torch.finfo(dtype).min
    model = Attends(lambda m, s, t: torch.zeros(s, s, dtype=dtype).masked_fill(cols(s) > rows(s), low), dtype)
    found: list[Any] = []
    program = program_of(model)
    assert flags(bl.causal_flags(program, report=found.append)) == [(converted, not converted)]
    assert converted or "-65504.0 in float16 is not -inf" in found[0].why
    infinite = Attends(lambda m, s, t: torch.zeros(s, s, dtype=dtype).masked_fill(cols(s) > rows(s), -INF), dtype)
    assert flags(bl.causal_flags(program_of(infinite))) == [(True, False)]


class Crosses(nn.Module):
    """Queries of one sequence, keys of another, which have the same length in a static export."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(16, 8), nn.Embedding(16, 8)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        q, k = self.one(tokens)[:, None], self.two(others)[:, None]
        return F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(10, 10, dtype=torch.bool).tril())


def test_attention_between_two_axes_stays() -> None:
    """Axes as told; along one axis the same mask is converted."""
    tokens = torch.zeros(2, 10, dtype=torch.long)
    program = export(Crosses(), (tokens, tokens.clone()))
    found: list[Any] = []
    two = {"tokens": {0: "batch", 1: "one"}, "others": {0: "batch", 1: "two"}}
    assert bl.causal_flags(program, axes=two, report=found.append) is program
    assert "one sequence axis" in found[0].why
    same = {"tokens": {0: "batch", 1: "one"}, "others": {0: "batch", 1: "one"}}
    assert flags(bl.causal_flags(program, axes=same)) == [(True, False)]


def test_what_has_no_mask_is_as_it_was() -> None:
    """And there is nothing to report."""
    program = export_case("llama_pr1797", dynamic=True, batch=3, seq=12)[1]
    found: list[Any] = []
    assert bl.causal_flags(program, report=found.append) is program and not found
    with pytest.raises(TypeError):
        bl.causal_flags("no program")  # type: ignore[arg-type]


def test_one_mask_of_two_is_converted() -> None:
    """The other stays, and what both are made of stays for it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)[:, None]
            distance = rows(tokens.shape[1]) - cols(tokens.shape[1])
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=distance >= 0, dropout_p=0.0, scale=0.3)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance >= 0) & (distance < 3))

    program = program_of(Two())
    converted = bl.causal_flags(program)
    assert flags(converted) == [(True, False), (False, True)]
    node = next(node for node in converted.graph.nodes if "scaled_dot_product" in str(node.target))
    assert schema_args(node)["scale"] == 0.3
    _equal_outputs(program, converted, 17)


def _equal_outputs(program: ExportedProgram, converted: ExportedProgram, length: int) -> None:
    tokens = torch.randint(0, 16, (2, length))
    assert (program.module()(tokens) - converted.module()(tokens)).abs().max() <= 1e-12


# -- real models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "hf_llama_labels"])
def test_hugging_face_without_documents(name: str) -> None:
    """Every mask, when asked to take the documents of the export; lifted, sharded and verified afterwards."""
    torch.set_default_dtype(torch.float32)
    program = export_case(name, dynamic=True, batch=4, seq=12)[1]
    assert bl.causal_flags(program) is program, "documents may be fed"
    converted = bl.causal_flags(program, documents=False)
    assert flags(converted) == [(True, False)] * 2
    read = {read.source_kind for read in bl.scan(converted).reads}
    assert "is_causal" in read and not bl.scan(converted).refused
    assert not any("cumsum" in node.name or "diff" in node.name for node in converted.graph.nodes)
    lifted = bl.lift(converted)
    assert bl.verify(converted, lifted).passed
    for size in (1, 2):
        staged = bl.partition(bl.context_parallel(lifted, size=size), num_stages=2)
        assert bl.verify(converted, staged).passed


def test_sliding_window_layers_stay() -> None:
    """Of a Hugging Face model with both kinds of layers the full one alone is converted."""
    torch.set_default_dtype(torch.float32)
    entry = entries()["hf_gemma3"]
    program = export_cell(entry, export_of(entry, "sdpa"), "dynamic")
    converted = bl.causal_flags(program, documents=False)
    assert sorted(flags(program)) == [(False, True)] * 2 and sorted(flags(converted)) == [(False, True), (True, False)]


@pytest.mark.parametrize("name", ["llama_masked", "hf_llama_mask"])
def test_masks_with_padding_stay(name: str) -> None:
    """Whatever is said of documents."""
    torch.set_default_dtype(torch.float32)
    program = export_case(name, dynamic=True, batch=3, seq=12)[1]
    found: list[Any] = []
    assert bl.causal_flags(program, documents=False, report=found.append) is program
    assert {"it depends on the input 'attention_mask'"} == {proof.why for proof in found} and len(found) == 2


def test_a_converted_mask_is_lifted_and_sharded() -> None:
    """A mask of this file's model: the flag follows the slots in both sizes."""
    torch.set_default_dtype(torch.float32)
    program = bl.causal_flags(program_of(Attends(CAUSAL["compared"], torch.float32), length=12))
    lifted = bl.lift(program)
    for size in (1, 2):
        assert bl.verify(program, bl.context_parallel(lifted, size=size)).passed
