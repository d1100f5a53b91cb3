"""``flex_attention``: mods that read positions or tables, block masks from the graph and from the user.

What torch 2.13 cannot export, save or differentiate, with its error; ``test_what_torch_cannot`` holds these:

- parameters that require gradients, on CPU: ``NotImplementedError: FlexAttention does not support backward on CPU``
  (strict: ``Unsupported: Observed exception``). Programs here are exported with frozen parameters. The exported op has
  an eager backward none the less: parameters that are unfrozen after export get gradients, which the tests compare.
- ``torch.export.save``: ``SerializeError: Failed serializing node flex_attention``.
- document ids ``[batch, seq]`` that a mod of an in-graph block mask reads, with dynamic shapes: ``TypeError: mul
  expected 2 arguments, got 3``. Hugging Face models with dynamic shapes are that case. torch 2.15 exports it.
- Hugging Face models with an ``attention_mask``: ``GuardOnDataDependentSymNode: Could not guard on data-dependent
  expression Eq(u0, 1)``.
- a table that an in-graph ``mask_mod`` indexes as a module's buffer, strict: ``RuntimeError: You are attempting to call
  Tensor.requires_grad_()``.
- a BlockMask as an input: only once it is registered as a pytree node (``ValueError: Unsupported input type``). A
  tensor in the closure of its ``mask_mod`` cannot be exported (strict: ``IndexError``; else ``RuntimeError: We found a
  fake tensor in the exported program constant's list``). Without ``strict=True`` the program's module refuses the
  BlockMask it was exported with (``ValueError: Trying to flatten user inputs``).
- ``torch.compile`` of an exported program with ``flex_attention``: ``ValueError: too many values to unpack``. Eager
  attention asks ``mask_mod`` alone, and never looks at the block mask: the tests check its tensors. (AOTInductor does
  compile such a program, with kernels that read the block mask: ``test_compiled``.)
- torchtitan 0.3: its flex models compile attention inside their forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils import _pytree as pytree

import buffer_lifting as bl
from buffer_lifting.passes.vmap import vmap_regions

BATCH, SEQ, HEADS, DIM, VOCAB, TABLE = 3, 16, 2, 8, 23, 64
pytestmark = pytest.mark.filterwarnings("ignore")

Attend = Callable[..., Tensor]


class Net(nn.Module):
    """Tokens to logits through one attention, which a test is about."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.emb = nn.Embedding(VOCAB, HEADS * DIM)
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, VOCAB)
        self.relative = nn.Parameter(torch.randn(2 * TABLE, HEADS))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.register_buffer("docs", torch.arange(TABLE) // 5)

    def forward(self, tokens: Tensor, extra: Any = None) -> Tensor:
        b, s = tokens.shape
        q, k, v = self.qkv(self.emb(tokens)).view(b, s, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        y = self.attend(self, q, k, v, tokens, extra)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


def masked(q: Tensor, k: Tensor, v: Tensor, mod: Any, batch: int | None = None) -> Tensor:
    """Attention with a block mask that is built in the graph."""
    mask = create_block_mask(mod, batch, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask)


def scored(q: Tensor, k: Tensor, v: Tensor, mod: Any) -> Tensor:
    return flex_attention(q, k, v, score_mod=mod)


def only(allowed: Tensor, score: Tensor) -> Tensor:
    return torch.where(allowed, score, -float("inf"))


def _causal(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return masked(q, k, v, lambda b, h, i, j: i >= j)


def _window(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return masked(q, k, v, lambda b, h, i, j: (i >= j) & (i - j < 4))


def _two(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return _causal(n, q, k, v, t, x) + _window(n, q, k, v, t, x)


def _under_no_grad(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    outside = _window(n, q, k, v, t, x)
    with torch.no_grad():  # its bodies have the names of those outside
        return outside + _causal(n, q, k, v, t, x)


def _doc_buffer(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return masked(q, k, v, lambda b, h, i, j: (i >= j) & (n.docs[i] == n.docs[j]))


def _doc_slice(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    docs = n.docs[: q.shape[2]]
    return scored(q, k, v, lambda s, b, h, i, j: s + (docs[i] == docs[j]))


def _doc_computed(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    docs = torch.arange(t.shape[1]) // 5
    return scored(q, k, v, lambda s, b, h, i, j: only((i >= j) & (docs[i] == docs[j]), s))


def _doc_user(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    return masked(q, k, v, lambda b, h, i, j: (i >= j) & (docs[b, i] == docs[b, j]), q.shape[0])


def _doc_chained(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: only((i >= j) & (docs[b][i] == docs[b][j]), s))


def _doc_tokens(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    docs = (t == 0).cumsum(1)
    return masked(q, k, v, lambda b, h, i, j: (i >= j) & (docs[b, i] == docs[b, j]), q.shape[0])


def _prefix(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, lengths: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: only((i >= j) | (j < lengths[b]), s))


def _alibi(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s - n.slopes[h] * (i - j).abs())


def _relative(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s + n.relative[i - j + TABLE, h])


def _natural(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    waves = torch.arange(2 * TABLE).cos()
    return scored(q, k, v, lambda s, b, h, i, j: s + waves[i - j + TABLE])


def _softcap(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: 5 * torch.tanh(s / 5))


def _gate(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    gate = q.mean(-1).sigmoid()
    return scored(q, k, v, lambda s, b, h, i, j: s * gate[b, h, i] + gate[b, h, j] * (i - j))


def _lse(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
    out, lse = flex_attention(q, k[:, :1], v[:, :1], block_mask=mask, enable_gqa=True, return_lse=True)
    return out * lse[..., None].sigmoid()


def _given(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, mask: Any) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask)


SLOTS = ("lifted_slots", "lifted_slots_keys")


@dataclass(frozen=True)
class Case:
    """A way to read positions: its attention, what it lifts, and the sources and codes of its reads in order."""

    attend: Attend
    lifted: tuple[str, ...]
    reads: tuple[tuple[str, str], ...]
    extra: str = ""  # "docs" or "lengths"
    ways: tuple[str, ...] = ("static", "dynamic")


MASK, SCORE = ("mask_mod", "BL007"), ("score_mod", "BL007")
CASES = {
    "causal": Case(_causal, SLOTS, (MASK,), ways=("static",)),
    "window": Case(_window, SLOTS, (MASK,), ways=("static", "dynamic", "strict")),
    "two": Case(_two, SLOTS, (MASK, MASK)),
    "under_no_grad": Case(_under_no_grad, SLOTS, (MASK, MASK), ways=("static",)),
    "doc_buffer": Case(_doc_buffer, SLOTS, (("docs", "BL001"),) * 2 + (MASK,)),
    "doc_computed": Case(
        _doc_computed,
        (SLOTS[0], "lifted_floor_divide", SLOTS[1], "lifted_floor_divide_keys"),
        (("aten.arange", "BL003"),) * 2 + (SCORE,),
    ),
    "doc_user": Case(
        _doc_user,
        ("lifted_extra_keys", *SLOTS),
        (("extra", "BL005"), MASK),
        "docs",
        ("static", "strict"),
    ),
    "doc_chained": Case(_doc_chained, ("lifted_extra_keys", *SLOTS), (("extra", "BL005"), SCORE), "docs", ("static",)),
    "doc_tokens": Case(
        _doc_tokens,
        ("lifted_tokens", "lifted_tokens_keys", *SLOTS),
        (("tokens", "BL005"),) * 2 + (MASK,),
        ways=("static",),
    ),
    "prefix": Case(_prefix, SLOTS, (SCORE,), "lengths", ("static",)),
    "alibi": Case(_alibi, SLOTS, (SCORE,), ways=("dynamic",)),
    "relative": Case(_relative, SLOTS, (("relative", "BL002"), SCORE), ways=("dynamic", "strict")),
    "natural": Case(_natural, SLOTS, (("aten.arange", "BL006"), SCORE), ways=("static",)),
    "gate": Case(_gate, SLOTS, (SCORE,), ways=("dynamic",)),
    "lse": Case(_lse, SLOTS, (MASK,), ways=("dynamic",)),
}
WAYS = [(name, way) for name, case in CASES.items() for way in case.ways]


def make(attend: Attend) -> Net:
    torch.manual_seed(0)
    return Net(attend).requires_grad_(False)


def inputs(extra: str = "") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 5, (BATCH, SEQ), generator=generator)
    if extra == "docs":
        return tokens, torch.randint(0, 2, (BATCH, SEQ), generator=generator).cumsum(1)
    return (tokens, torch.tensor([3, 7, 9])) if extra == "lengths" else (tokens,)


def exported(attend: Attend, extra: str = "", way: str = "static") -> ExportedProgram:
    args = inputs(extra)
    shapes = tuple({dim: Dim.AUTO for dim in range(arg.ndim)} for arg in args)
    if way == "dynamic" and len(args) == 1:
        shapes = (*shapes, None)  # type: ignore[assignment]
        return torch.export.export(make(attend), (*args, None), dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            make(attend), args, dynamic_shapes=shapes if way == "dynamic" else None, strict=way == "strict"
        )


def followed(program: ExportedProgram) -> bl.LiftedProgram:
    return bl.context_parallel(bl.lift(program), size=1)


def order() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])


def named(program: ExportedProgram, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip([str(n) for n in program.graph_signature.user_inputs], args, strict=False))


def permuted_run(lifted: bl.LiftedProgram, args: tuple[Tensor, ...], **changed: Tensor) -> Tensor:
    """The lifted program on permuted inputs, with some of its feed replaced."""
    whole = named(lifted.program, args)
    shard = lifted.shard_inputs(order=order(), **whole)
    feed = {**lifted.feed(BATCH, SEQ, inputs=whole, order=order()), **changed}
    result: Tensor = lifted.program.module()(*[shard[name] for name in whole], **feed)
    return result


def expected_run(program: ExportedProgram, args: tuple[Tensor, ...]) -> Tensor:
    result: Tensor = program.module()(*args)
    return result.gather(1, order()[..., None].expand_as(result))


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_mods_follow_the_order(name: str, way: str) -> None:
    case = CASES[name]
    program = exported(case.attend, case.extra, way)
    before = program.graph_module.code
    lifted = followed(program)
    assert tuple(item.name for item in lifted.inputs) == case.lifted
    reads = [read for read in lifted.report.reads if read.op == "hop.flex_attention"]
    assert [(read.source, read.code) for read in reads] == list(case.reads)
    report = bl.verify(program, lifted)
    assert "forward only: no parameter requires a gradient" in report["identity"].detail
    assert report["equivariance"].compared > 1 and "forward only" not in report["equivariance"].detail
    assert program.graph_module.code == before
    assert not vmap_regions(lifted.program.graph)


@pytest.mark.parametrize("name", list(CASES))
def test_natural_feed_and_moved_inputs_show(name: str) -> None:
    """Controls: the order matters to each case, and every lifted input is read."""
    case = CASES[name]
    program, args = exported(case.attend, case.extra), inputs(case.extra)
    lifted = followed(program)
    expected = expected_run(program, args)
    assert torch.allclose(permuted_run(lifted, args), expected, atol=1e-5)
    natural = lifted.feed(BATCH, SEQ, inputs=named(program, args))
    assert (permuted_run(lifted, args, **natural) - expected).abs().max() > 1e-3
    feed = lifted.feed(BATCH, SEQ, inputs=named(program, args), order=order())
    for key, value in feed.items():
        moved = permuted_run(lifted, args, **{key: value.flip(1)})
        assert (moved - expected).abs().max() > 1e-4, key


def test_nothing_to_lift() -> None:
    """A mod that reads no position has no lifted inputs; document ids alone need no slots."""
    program = exported(_softcap)
    lifted = followed(program)
    assert not lifted.inputs and not lifted.report.reads
    assert bl.verify(program, lifted).passed
    sliced = followed(exported(_doc_slice, way="dynamic"))
    assert [item.name for item in sliced.inputs] == ["lifted_docs", "lifted_docs_keys"]


@pytest.mark.parametrize("name", ["window", "doc_buffer", "relative", "two", "doc_computed"])
def test_gradients_of_unfrozen_parameters(name: str) -> None:
    """The exported op has an eager backward: gradients are compared once parameters are unfrozen after export."""
    program = exported(CASES[name].attend)
    for parameter in program.parameters():
        parameter.requires_grad_(True)
    lifted = followed(program)
    report = bl.verify(program, lifted)
    assert "forward only" not in report["identity"].detail
    staged = bl.partition(lifted, split_points=["out"])
    assert bl.verify(program, staged)["composition"].passed


def test_what_the_scan_says() -> None:
    report = bl.scan(exported(_window))
    (mixing,) = report.mixing
    assert (mixing.code, mixing.handled, mixing.op) == ("BL200", True, "hop.flex_attention")
    (read,) = report.reads
    assert (read.source_kind, read.operand, read.stream, read.form) == ("flex", "mask_mod", "slots", "positions")
    assert read.seq_dims == ((2, "seq", "row"), (3, "seq", "col"))
    assert read.location is not None and Path(read.location.file).name == Path(__file__).name
    assert not report.refused


# Block masks ---------------------------------------------------------------------------------------------


def flex_node(lifted: bl.LiftedProgram) -> Any:
    return next(n for n in lifted.program.graph.nodes if n.target is torch.ops.higher_order.flex_attention)


def test_block_mask_hides_nothing() -> None:
    """One block, larger than any sequence, none of them full: mask_mod decides in every order."""
    lifted = followed(exported(_window))
    mask = flex_node(lifted).args[4]
    assert mask[:2] == (1, 1) and mask[4:6] == (None, None) and mask[-3:-1] == (1 << 30, 1 << 30)
    assert "argsort" not in lifted.program.graph_module.code


@pytest.mark.parametrize("fault", ["skipped", "full", "natural bodies", "slots of another order"])
def test_faults_are_found(fault: str) -> None:
    program = exported(_window)
    lifted = followed(program)
    node = flex_node(lifted)
    graph = lifted.program.graph
    count = node.args[4][2]
    with graph.inserting_before(node):
        other = graph.call_function(torch.ops.aten.zeros_like.default, (count,))
        listed = graph.call_function(torch.ops.aten.ones_like.default, (count,))
    for new in (other, listed):
        new.meta = dict(count.meta)
    mask = list(node.args[4])
    if fault == "skipped":
        mask[2] = other
    elif fault == "full":
        mask[4] = listed
    elif fault == "natural bodies":
        body = getattr(lifted.program.graph_module, str(mask[-1].target))
        index = {n.args[1][1]: n for n in body.graph.nodes if n.target is torch.ops.aten.index.Tensor}
        for placeholder, looked_up in index.items():
            looked_up.replace_all_uses_with(placeholder)
        body.recompile()
    else:
        rows, cols = node.args[8]
        with graph.inserting_before(node):
            flipped = graph.call_function(torch.ops.aten.flip.default, (rows, [1]))
        flipped.meta = dict(rows.meta)
        node.args = (*node.args[:8], (flipped, cols))
    node.args = (*node.args[:4], tuple(mask), *node.args[5:])
    lifted.program.graph_module.recompile()
    with pytest.raises(bl.VerificationError) as error:
        bl.verify(program, lifted, checks=("values", "equivariance"))
    if fault == "natural bodies":
        assert "equivariance does not hold" in str(error.value)
    else:
        assert str(error.value).startswith("values does not hold at node 'flex_attention'")


def _compiled(program: ExportedProgram, path: Path) -> Any:
    """The program compiled by AOTInductor, whose CPU kernels skip the blocks that a block mask does not list."""
    inductor: Any = torch._inductor
    with torch.no_grad():
        return inductor.aoti_load_package(inductor.aoti_compile_and_package(program, package_path=str(path)))


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """Kernels that skip blocks: right with the one block of the lifted program, wrong with the natural order's."""
    length = 384
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))

    def attend(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
        return masked(q, k, v, _near)

    program = torch.export.export(make(attend), (tokens,))
    lifted = followed(program)
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    feed = {name: value.contiguous() for name, value in lifted.feed(2, length, order=orders).items()}
    expected = program.module()(tokens).gather(1, orders[..., None].expand(-1, -1, VOCAB))
    permuted = tokens.gather(1, orders)
    result = _compiled(lifted.program, tmp_path / "lifted.pt2")(permuted, **feed)
    assert torch.allclose(result, expected, atol=1e-5)
    node, graph = flex_node(lifted), lifted.program.graph

    def call(op: Any, *args: Any) -> Any:
        new = graph.call_function(op, args)
        new.meta["val"] = op(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        return new

    aten = torch.ops.aten
    with graph.inserting_before(node), node.args[0].meta["val"].fake_mode:  # row i of blocks reads blocks i and i - 1
        rows = call(aten.to.dtype, call(aten.arange.default, 3), torch.int32)
        count = call(aten.clamp.default, call(aten.add.Tensor, rows, 1), None, 2)
        places = call(aten.sub.Tensor, call(aten.unsqueeze.default, rows, 1), rows)
        listed = call(aten.clamp.default, places, 0)
        count, listed = call(aten.view.default, count, [1, 1, 3]), call(aten.view.default, listed, [1, 1, 3, 3])
    rest = (*node.args[4][4:-3], 128, 128, node.args[4][-1])
    node.args = (*node.args[:4], (length, length, count, listed, *rest), *node.args[5:])
    lifted.program.graph_module.recompile()
    skipping = _compiled(lifted.program, tmp_path / "skipping.pt2")
    natural = {name: value.contiguous() for name, value in lifted.feed(2, length).items()}
    assert torch.allclose(skipping(tokens, **natural), program.module()(tokens), atol=1e-5)
    assert (skipping(permuted, **feed) - expected).abs().max() > 1e-3


@pytest.fixture
def registered() -> None:
    if BlockMask not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            BlockMask,
            lambda mask: mask._flatten(),
            BlockMask._unflatten,
            flatten_with_keys_fn=lambda mask: mask._flatten_with_keys(),
            serialized_type_name="BlockMask",
        )


def _near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 40)


def test_block_mask_of_the_user(registered: None) -> None:
    """Its blocks are of the natural order: lifted, nothing reads them. Their number may be that of the batch."""
    length = 128 * BATCH
    tokens = torch.randint(0, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(0))
    mask = create_block_mask(_near, None, None, length, length, device="cpu")
    program = torch.export.export(make(_given), (tokens, mask), strict=True)
    report = bl.scan(program)
    assert not report.findings and all(not axes.seq_dims for axes in report.inputs[1:])
    lifted = followed(program)
    assert bl.verify(program, lifted)["equivariance"].worst < 1e-12
    unread = [n for n in lifted.program.graph.nodes if n.op == "placeholder" and n.name.startswith("extra")]
    assert len(unread) == 8 and not any(node.users for node in unread)
    with pytest.raises(bl.PartitionError, match="BlockMask"):
        bl.partition(lifted, split_points=["out"])


# Refusals ------------------------------------------------------------------------------------------------


def _previous(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s + (docs[b, i] == docs[b, (j - 1).clamp(min=0)]))


def _whole(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s + docs[b].sum())


def _padded(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    wide = nn.functional.pad(docs, (0, 3))
    return scored(q, k, v, lambda s, b, h, i, j: s + (wide[b, i] == wide[b, j]))


def _summed(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, docs: Any) -> Tensor:
    lengths = docs.sum(1)
    return scored(q, k, v, lambda s, b, h, i, j: only((i >= j) | (j < lengths[b]), s))


def _sample(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s + b * j)


def _table_of_samples(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    return scored(q, k, v, lambda s, b, h, i, j: s + n.docs[b] * j)


def _length(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    length = q.shape[2]
    return scored(q, k, v, lambda s, b, h, i, j: s + (j < length // 2))


def _folded(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
    q, k, v = (part.transpose(1, 2).reshape(-1, 1, HEADS, DIM) for part in (q, k, v))  # over heads, a token each
    y = scored(q, k, v, lambda s, b, h, i, j: s + n.docs[b])
    return y.view(t.shape[0], t.shape[1], HEADS, DIM).transpose(1, 2)


@pytest.mark.parametrize(
    ("attend", "extra", "way", "why"),
    [
        (_folded, "", "static", "BL105 .*its batch or its heads run along the sequence"),
        (_previous, "docs", "static", "BL105 .*'extra', which runs along the sequence, at another index"),
        (_whole, "docs", "static", "BL105 .*'extra', which runs along the sequence, whole"),
        (_padded, "docs", "static", "BL105 .*'extra' runs along the sequence, and what is made of it here does not"),
        (_summed, "docs", "static", "BL105 .*mixes the sequence"),
        (_sample, "", "static", "BL105 .*the sample's index enters it"),
        (_table_of_samples, "", "static", "BL105 .*'docs' varies along the batch"),
        (_length, "", "dynamic", "BL104 .*the sequence length itself enters it"),
    ],
)
def test_refusals(attend: Attend, extra: str, way: str, why: str) -> None:
    program = exported(attend, extra, way)
    with pytest.raises(bl.UnsupportedReadError, match=why) as error:
        bl.lift(program)
    assert f"[{__file__}:" in str(error.value)
    assert bl.lift(program, strict=False).report.refused


def test_refused_block_mask_stays_and_cannot_be_split() -> None:
    """With strict=False a refused node keeps its blocks, and what vmap left in the graph is no stage's own."""

    def attend(n: Net, q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Any) -> Tensor:
        return masked(q, k, v, lambda b, h, i, j: (i >= j) & (b >= 0), q.shape[0])

    program = exported(attend)
    lifted = bl.lift(program, strict=False)
    assert torch.equal(lifted.program.module()(*inputs()), program.module()(*inputs()))
    with pytest.raises(bl.PartitionError, match="vmap"):
        bl.partition(lifted, split_points=["out"])


# Whole models, and what torch lacks ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_hugging_face(kind: str) -> None:
    """Document ids from packed positions, causal and sliding masks, two layers, two stages."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        use_cache=False,
        attn_implementation="flex_attention",
        **({"sliding_window": 5} if kind == "Gemma2" else {}),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    tokens = torch.randint(0, 64, (BATCH, SEQ))
    program = torch.export.export(model, (), {"input_ids": tokens})
    staged = bl.partition(followed(program), num_stages=2)
    report = bl.verify(program, staged)
    assert report["values"].compared and report["composition"].passed
    used = {item.name for item in staged.lifted.inputs}
    assert {"lifted_slots", "lifted_slots_keys"} < used and sum("cumsum" in name for name in used) == 2
    assert all(set(SLOTS) <= set(stage.kwargs) for stage in staged.stages)


def test_save_says_that_torch_cannot(tmp_path: Path) -> None:
    lifted = followed(exported(_window))
    with pytest.raises(bl.LiftingError, match="flex_attention, which torch cannot save"):
        lifted.save(tmp_path / "x.lifted")
    with pytest.raises(bl.LiftingError, match="flex_attention, which torch cannot save"):
        bl.partition(lifted, split_points=["out"]).save(tmp_path / "stages")
    assert not list(tmp_path.iterdir())


def test_what_torch_cannot(tmp_path: Path, registered: None) -> None:
    """The limits in this module's docstring. Where one of these fails, torch can do more, and so may we."""
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        torch.export.export(Net(_causal), inputs())
    with pytest.raises(Exception, match="Failed serializing node flex_attention"):
        torch.export.save(exported(_causal), tmp_path / "x.pt2")
    try:
        program = exported(_doc_user, "docs", "dynamic")
    except TypeError as error:
        assert "mul expected 2 arguments" in str(error)
    else:  # torch 2.15
        assert bl.verify(program, followed(program)).passed
    with pytest.raises(RuntimeError, match="requires_grad_"):
        exported(_doc_buffer, way="strict")

    def closure(docs: Tensor) -> Any:
        return lambda b, h, i, j: (i >= j) & (docs[b, i] == docs[b, j])

    tokens, docs = inputs("docs")
    mask = create_block_mask(closure(docs), BATCH, None, SEQ, SEQ, device="cpu")
    for strict, error in ((True, IndexError), (False, RuntimeError)):
        with pytest.raises(error):
            torch.export.export(make(_given), (tokens, mask), strict=strict)


def test_a_program_without_its_vmap_and_a_graph_module() -> None:
    """``run_decompositions({})`` writes vmap out; a GraphModule has bodies and specs as attributes."""
    program = exported(_doc_buffer)
    decomposed = program.run_decompositions({})
    assert bl.verify(decomposed, followed(decomposed)).passed
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    lifted = bl.context_parallel(bl.lift(module), size=1)
    assert bl.verify(module, lifted, inputs=[(inputs(), {})]).passed
