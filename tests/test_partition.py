"""Stages: the names in them, what they send, and that they compose to the lifted program."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import CASES, export_case, make_inputs
from zoo.catalog import entries, export_cell, export_of

import buffer_lifting as bl

VOCAB, DIM, TABLE = 17, 8, 32


class Skips(nn.Module):
    """A U-Net over layers: the first layers' results are read by the last ones, and an early one is returned."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))
        self.register_buffer("table", torch.randn(TABLE, DIM))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.emb(tokens)
        early = x * 2
        saved: list[Tensor] = []
        half = len(self.layers) // 2
        for index, layer in enumerate(self.layers):
            if index >= half:
                x = x + saved.pop()
            x = layer(x * self.table[: tokens.shape[1]]).view(tokens.shape[0], tokens.shape[1], -1).tanh()
            if index < half:
                saved.append(x)
            if index == 0:
                early = x * 2
        return x, early


def export(model: nn.Module, *args: Tensor, dynamic: bool = True) -> ExportedProgram:
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in args) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


def tokens(batch: int = 3, seq: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(1))


def flat(out: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def gradients(out: Any, named: dict[str, Tensor]) -> dict[str, Tensor | None]:
    total = sum((leaf.float() * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in flat(out))
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def check_composition(lifted: Any, staged: Any, args: Any, kwargs: Any) -> None:
    """Outputs and gradients of the stages in a row are bitwise those of the lifted program."""
    program = lifted.program.module()
    want, got = program(*args, **kwargs), staged(*args, **kwargs)
    assert flat(want) and len(flat(want)) == len(flat(got))
    assert all(torch.equal(a, b) for a, b in zip(flat(want), flat(got), strict=True))
    before = gradients(want, dict(program.named_parameters()))
    named = {fqn: stage.module.get_parameter(fqn) for stage in staged.stages for fqn in stage.parameters}
    after = gradients(got, named)
    compared = 0
    for fqn, gradient in after.items():
        if gradient is not None and before.get(fqn) is not None:
            assert torch.equal(gradient, before[fqn]), fqn  # type: ignore[arg-type]
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_composition(name: str, dynamic: bool) -> None:
    module, ep = export_case(name, dynamic=dynamic)
    lifted = bl.context_parallel(bl.lift(ep))
    case = CASES[name]
    staged = bl.partition(lifted, split_points=case.split_points)
    batch, seq = (2, 9) if dynamic and case.dynamic else (3, 11 if case.dynamic else case.table_len)
    args, kwargs = make_inputs(name, batch, seq, seed=2)
    named = dict(zip(staged.positional, args, strict=False)) | kwargs
    feed = lifted.feed(batch, seq, inputs=named)
    check_composition(lifted, staged, args, {**kwargs, **feed})
    originals = dict(module.named_parameters(remove_duplicate=False))
    states = [fqn for stage in staged.stages for fqn in stage.parameters]
    assert set(states) <= originals.keys()
    assert {id(p) for p in module.parameters()} == {id(originals[fqn]) for fqn in states}
    lifted_names = {item.name for item in lifted.inputs}
    for stage in staged.stages:
        assert not lifted_names & set(stage.outputs) and set(stage.kwargs) <= lifted_names | set(named)
        if stage.index:  # the boundary carries the hidden states and nothing made of positions
            assert len(stage.activations) == 1 and stage.activations == staged.stages[stage.index - 1].outputs


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_skips_are_carried(count: int, dynamic: bool) -> None:
    lifted = bl.lift(export(Skips(), tokens(), dynamic=dynamic))
    staged = bl.partition(lifted, num_stages=count)
    assert len(staged.stages) == count
    batch, seq = (2, 9) if dynamic else (3, 7)
    x = tokens(batch, seq)
    check_composition(lifted, staged, (x,), lifted.feed(batch, seq))
    if count == 6:
        assert [len(stage.outputs) for stage in staged.stages] == [3, 4, 4, 3, 2, 2]
        for before, after in zip(staged.stages, staged.stages[1:], strict=False):
            assert len(before.outputs) == len(after.activations)
            assert before.boundary_bytes == 4 * 3 * 7 * DIM * len(before.outputs)  # at the example's sizes
        assert staged.stages[-1].boundary_bytes == 0


def test_num_stages_and_split_points_agree() -> None:
    lifted = bl.lift(export(Skips(), tokens()))
    by_number = bl.partition(lifted, num_stages=6)
    by_name = bl.partition(lifted, split_points=[f"layers.{i}" for i in range(1, 6)])
    for one, other in zip(by_number.stages, by_name.stages, strict=True):
        assert one.parameters == other.parameters
    assert by_name.stages[2].parameters == ("layers.2.weight", "layers.2.bias")
    assert "emb.weight" in by_name.stages[0].parameters


def test_sizes_are_read_again_in_each_stage() -> None:
    """No stage knows the sizes of the example: one partition runs at several."""
    lifted = bl.lift(export(Skips(), tokens()))
    staged = bl.partition(lifted, num_stages=3)
    for batch, seq in ((1, 2), (2, 9), (5, TABLE)):
        x = tokens(batch, seq)
        want = lifted.program.module()(x, **lifted.feed(batch, seq))
        assert all(torch.equal(a, b) for a, b in zip(want, staged(x, **staged.feed(batch, seq)), strict=True))


@pytest.mark.parametrize("name", ["nanogpt_tied", "hf_gpt2"])
def test_tied_weights_are_reported(name: str) -> None:
    module, ep = export_case(name)
    staged = bl.partition(bl.lift(ep), split_points=CASES[name].split_points)
    (fqn,) = staged.tied
    assert fqn in ("transformer.wte.weight", "lm_head.weight") and staged.tied[fqn] == (0, 1)
    for stage in staged.stages:
        assert any(module.get_parameter(own) is module.get_parameter(fqn) for own in stage.parameters)
    assert not bl.partition(bl.lift(export_case("nanogpt")[1]), split_points=["transformer.h.1"]).tied


def test_the_program_is_left_alone() -> None:
    lifted = bl.lift(export(Skips(), tokens()))
    before = str(lifted.program.graph)
    bl.partition(lifted, num_stages=4)
    assert str(lifted.program.graph) == before


def test_summary_names_every_stage() -> None:
    staged = bl.partition(bl.lift(export(Skips(), tokens())), num_stages=2)
    lines = staged.summary().splitlines()
    assert len(lines) == 4 and "lifted_table" in lines[1] and "lifted_table" in lines[2]


def test_a_relative_bias_is_a_tied_weight_of_the_stages_that_read_it() -> None:
    """T5 computes the bias in one layer and hands it on; stages compute it from a copy of the parameter instead."""
    entry = entries()["hf_t5"]
    program = export_cell(entry, export_of(entry, "eager"), "dynamic")
    staged = bl.partition(bl.context_parallel(bl.lift(program)), num_stages=4)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert staged.tied[f"encoder.{bias}"] == (0, 1) and staged.tied[f"decoder.{bias}"] == (2, 3)
    hidden = 4 * 32  # bytes of one row: float32, width 32
    # nothing of [S, S] is sent; the decoder's embedding is in the stage of its layers
    sizes = [3 * 11 * hidden, 3 * 11 * hidden, 3 * (11 + 7) * hidden, 0]
    assert [stage.boundary_bytes for stage in staged.stages] == sizes
    assert bl.verify(program, staged, checks=("composition",)).passed
