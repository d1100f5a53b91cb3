"""``context_parallel(size > 1)``: all ranks together are the original, and what cannot be is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export
from zoo import CASES, export_case

import buffer_lifting as bl
from buffer_lifting.passes.collectives import collectives
from buffer_lifting.torch_compat import ALL_GATHER, ALL_TO_ALL, WAIT

DYNAMIC = [name for name, case in CASES.items() if case.dynamic]
FUSED = ["llama_pr1797", "llama_masked", "hf_llama", "hf_gpt2"]


@cache
def lifted_of(name: str) -> tuple[Any, bl.LiftedProgram]:
    """A dynamic export of two layers, and what lifting makes of it; nothing below changes them."""
    program = export_case(name, dynamic=True, batch=3, seq=12)[1]
    return program, bl.lift(program)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DYNAMIC)
def test_the_ranks_are_the_original(name: str, size: int) -> None:
    """Values, all ranks in lockstep in float64 with every gradient, and the stages, rank by rank."""
    program, lifted = lifted_of(name)
    parallel = bl.context_parallel(lifted, size=size)
    report = bl.verify(program, bl.partition(parallel, num_stages=2))
    assert [check.name for check in report.checks] == ["values", "shards", "composition"]
    assert report["shards"].worst < 1e-11 and report["shards"].compared > 20
    assert report["composition"].worst == 0.0


@pytest.mark.parametrize("name", FUSED)
def test_heads_exchanged_for_rows(name: str) -> None:
    """The strategy ``alltoall``, with causal, padding and documents masks."""
    program, lifted = lifted_of(name)
    parallel = bl.context_parallel(lifted, size=2, strategy="alltoall")
    sent = [node.target for node in collectives(parallel.program.graph)]
    assert sent.count(ALL_TO_ALL) == 2 * 4 and sent.count(ALL_GATHER) <= 2  # q, k, v and back; a mask
    report = bl.verify(program, bl.partition(parallel, num_stages=2))
    assert report["shards"].worst < 1e-11 and report["composition"].worst == 0.0


def test_nothing_but_keys_and_values_is_gathered() -> None:
    """Two gathers a layer, of the key heads and not of what is repeated for the query heads; the input is unchanged."""
    _, lifted = lifted_of("llama_pr1797")
    before = [node.format_node() for node in lifted.program.graph.nodes]
    parallel = bl.context_parallel(lifted, size=2)
    assert before == [node.format_node() for node in lifted.program.graph.nodes]
    sent = list(collectives(parallel.program.graph))
    assert [node.target for node in sent] == [ALL_GATHER] * 4
    queries = {
        str(n.args[0].meta["val"].numel()) for n in parallel.program.graph.nodes if "scaled_dot" in str(n.target)
    }
    assert {str(2 * node.args[0].meta["val"].numel()) for node in sent} == queries
    for node in sent:
        assert [user.target for user in node.users] == [WAIT]
    assert parallel.cp_size == 2 and lifted.cp_size is None


# -- the oracle sees faults --------------------------------------------------------------------------------------


def _local_keys(graph: torch.fx.Graph) -> None:
    """One value is read where it is, on one rank, as often as there are ranks."""
    node = list(collectives(graph))[1]
    node.target, node.args = torch.ops.aten.repeat.default, (node.args[0], [2] + [1] * (node.meta["val"].ndim - 1))


def _swapped(graph: torch.fx.Graph) -> None:
    """The ranks' parts in another order than the lifted keys."""
    node = next(iter(collectives(graph)))
    (wait,) = node.users
    with graph.inserting_after(wait):
        flipped = graph.call_function(torch.ops.aten.roll.default, (wait, 4, 0))
    flipped.meta = dict(wait.meta)
    wait.replace_all_uses_with(flipped, lambda user: user is not flipped)


def _detached(graph: torch.fx.Graph) -> None:
    """A gather without its backward: outputs are right, gradients are not."""
    node = next(iter(collectives(graph)))
    with graph.inserting_before(node):
        cut = graph.call_function(torch.ops.aten.detach.default, (node.args[0],))
    cut.meta = dict(node.args[0].meta)
    node.args = (cut, *node.args[1:])


@pytest.mark.parametrize("fault", [_local_keys, _swapped, _detached])
@pytest.mark.parametrize("name", ["llama_pr1797", "hf_gpt2", "sinusoid"])
def test_the_shards_oracle_sees_a_fault(name: str, fault: Any) -> None:
    """It alone: values and stages are as they should be."""
    program, lifted = lifted_of(name)
    parallel = bl.context_parallel(lifted, size=2)
    fault(parallel.program.graph)
    parallel.program.graph_module.recompile()
    with pytest.raises(bl.VerificationError, match="shards does not hold") as raised:
        bl.verify(program, parallel, checks=("shards",))
    assert raised.value.report is not None and raised.value.report["shards"].worst > 1e-6


def test_unlifted_positions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed of rank 0 on every rank: tables and slots of a sequence that begins there."""
    program, lifted = lifted_of("llama_pr1797")
    parallel = bl.context_parallel(lifted, size=2)
    own = bl.LiftedProgram._feed

    def of_first_rank(
        self: Any, batch: Any, lengths: Any, inputs: Any, order: Any, ids: Any, shard: Any, *rest: Any
    ) -> Any:
        return own(self, batch, lengths, inputs, order, ids, (0, shard[1]), *rest)

    monkeypatch.setattr(bl.LiftedProgram, "_feed", of_first_rank)
    with pytest.raises(bl.VerificationError, match="shards does not hold"):
        bl.verify(program, parallel, checks=("shards",))


# -- packages ----------------------------------------------------------------------------------------------------


def test_packages_keep_the_collectives(tmp_path: Path) -> None:
    """A lifted package and a directory of stages; groups are named by the mesh dim until a mesh binds them."""
    program, lifted = lifted_of("llama_masked")
    parallel = bl.context_parallel(lifted, size=2, mesh_dim="context")
    parallel.save(tmp_path / "llama.lifted")
    loaded = bl.load(tmp_path / "llama.lifted")
    assert (loaded.cp_size, loaded.mesh_dim) == (2, "context")
    assert bl.verify(program, loaded, checks=("shards",)).passed
    staged = bl.partition(parallel, num_stages=2)
    staged.save(tmp_path / "stages")
    for index in (0, 1):
        stage = bl.load_stage(tmp_path / "stages", index)
        sent = list(collectives(stage.stage.module.graph))
        assert len(sent) == 2 and {node.args[-1] for node in sent} == {"context"}
        with pytest.raises(bl.PartitionError, match="give build_stage a mesh with the dims 'pp' and 'context'"):
            stage.build_stage("cpu")


# -- refusals ----------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Attention over ``[batch, seq, 16]`` with something else on the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(32, 16)
        self.qkv = nn.Linear(16, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.kind == "dropout":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        elif self.kind == "written dropout":
            out = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1) @ v
        elif self.kind == "one head":
            out = F.scaled_dot_product_attention(q[:, :3], k[:, :3], v[:, :3], is_causal=True).repeat(1, 2, 1, 1)[:, :4]
        elif self.kind == "zeros":
            bias = torch.zeros(tokens.shape[1], tokens.shape[1])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


def exported(kind: str, dynamic: bool = True) -> Any:
    """The mixer, in training mode."""
    torch.manual_seed(0)
    shapes = ({0: Dim("batch"), 1: Dim("seq", max=64)},) if dynamic else None
    return export(Mixer(kind).train(), (torch.randint(32, (3, 12)),), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dropout", "attention dropout draws other numbers on every rank"),
        ("written dropout", "attention dropout draws other numbers on every rank"),
    ],
)
def test_dropout_of_attention_is_refused(kind: str, why: str) -> None:
    """With the node, its line, and on more than one rank only."""
    lifted = bl.lift(exported(kind))
    bl.context_parallel(lifted, size=1)
    with pytest.raises(bl.UnsupportedReadError, match=why) as raised:
        bl.context_parallel(lifted, size=2)
    assert "test_context_parallel.py:" in str(raised.value) and "BL203" in str(raised.value)


def test_a_static_sequence_is_refused() -> None:
    """It has the length of one rank in its graph."""
    with pytest.raises(
        bl.UnsupportedReadError, match=r"static sequence \(axis 'seq', 12 tokens\).*export with a dynamic"
    ):
        bl.context_parallel(bl.lift(exported("plain", dynamic=False)), size=2)


def test_heads_that_do_not_divide_are_refused() -> None:
    """By ``alltoall`` only: a gather has no use for heads."""
    program = exported("one head")
    lifted = bl.lift(program)
    with pytest.raises(bl.UnsupportedReadError, match="3 heads of its query do not divide by 2 ranks"):
        bl.context_parallel(lifted, size=2, strategy="alltoall")
    assert bl.verify(program, bl.context_parallel(lifted, size=2), checks=("shards",)).passed


def test_written_out_attention_exchanges_no_heads() -> None:
    """The message says where, and what can."""
    _, lifted = lifted_of("hf_llama_eager")
    with pytest.raises(bl.UnsupportedReadError, match=r"this attention is written out.*strategy='allgather' can do it"):
        bl.context_parallel(lifted, size=2, strategy="alltoall")


@pytest.mark.parametrize("size", [2, 4])
def test_a_mask_that_is_the_same_everywhere(size: int) -> None:
    """It is no read, and was made for the rows of one rank: it gets the keys of all."""
    program = exported("zeros")
    assert bl.verify(program, bl.context_parallel(bl.lift(program), size=size), checks=("shards",)).passed


def test_refused_arguments() -> None:
    """Size, strategy, a second transformation, and reads that strict=False has left."""
    _, lifted = lifted_of("llama_pr1797")
    for size in (0, -1, True, 2.0):
        with pytest.raises(bl.LiftingError, match="size is a positive integer"):
            bl.context_parallel(lifted, size=size)  # type: ignore[arg-type]
    with pytest.raises(bl.LiftingError, match="strategy is one of 'auto', 'allgather', 'alltoall'"):
        bl.context_parallel(lifted, size=2, strategy="ringg")
    with pytest.raises(bl.LiftingError, match=r"already made context-parallel \(size 2\)"):
        bl.context_parallel(bl.context_parallel(lifted, size=2), size=2)


def test_feeds_of_another_size_and_stages_in_one_process() -> None:
    """Each is an error at once, and says what to call."""
    _, lifted = lifted_of("llama_pr1797")
    parallel = bl.context_parallel(lifted, size=2)
    with pytest.raises(bl.FeedError, match=r"shard has size 1, but the program was made for.* 2"):
        parallel.feed(3, 12)
    with pytest.raises(bl.FeedError, match="13 does not divide into 2 shards"):
        parallel.feed(3, 13, shard=(0, 2))
    staged = bl.partition(parallel, num_stages=2)
    with pytest.raises(bl.PartitionError, match="run on 2 context-parallel ranks, not in one process"):
        staged(torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(bl.PartitionError, match="give build_stage a mesh"):
        staged.build_stage(0, "cpu")


@pytest.mark.parametrize("strategy", ["allgather", "alltoall"])
@pytest.mark.parametrize("name", FUSED)
def test_a_check_of_the_result_has_no_findings(name: str, strategy: str) -> None:
    """What was gathered is known to follow the slots: in the program and in its stages."""
    parallel = bl.context_parallel(lifted_of(name)[1], size=2, strategy=strategy)
    assert bl.check(parallel) == ()
    assert bl.check(bl.partition(parallel, num_stages=2)) == ()
