"""``context_parallel(strategy="ring")``: torch's ring attention in the graph, its orders, and what it refuses.

The ring itself runs on four gloo processes in ``test_parity.py`` (whole models under schedules) and here (the op);
in one process, ``verify`` computes what it has to give.
"""

from __future__ import annotations

import operator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
    _HeadTailLoadBalancer,
    _PerDocumentHeadTailLoadBalancer,
)
from torch.export import Dim, ExportedProgram, export
from torch.utils.flop_counter import FlopCounterMode
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.passes.collectives import collectives
from buffer_lifting.ring import RING, check_ring_device
from buffer_lifting.ring_order import is_head_tail

HEAD_TAIL = _HeadTailLoadBalancer(16, 2, "cpu")


class Attends(nn.Module):
    """Grouped heads, learned positions, and attention with whatever settings."""

    def __init__(self, heads: int = 4, key_heads: int = 2, value_dim: int = 4, **settings: Any) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(32, 16), nn.Embedding(64, 16)
        self.query, self.key = nn.Linear(16, heads * 4), nn.Linear(16, key_heads * 4)
        self.value, self.output = nn.Linear(16, key_heads * value_dim), nn.Linear(heads * value_dim, 16)
        self.heads, self.key_heads, self.settings = heads, key_heads, settings

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places(torch.arange(tokens.shape[1]))
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (layer(x).unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for layer in (self.key, self.value))
        return self.output(self.attend(query, key, value).transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **self.settings)


class Windowed(Attends):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        row = torch.arange(query.shape[2])
        mask = (row[None] <= row[:, None]) & (row[:, None] - row[None] < 4)
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


class Compared(Attends):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        row = torch.arange(query.shape[2])
        return F.scaled_dot_product_attention(query, key, value, row[None] <= row[:, None], enable_gqa=True)


class WrittenOut(Attends):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value


def program_of(module: nn.Module) -> ExportedProgram:
    torch.manual_seed(0)
    return export(module, (torch.randint(0, 32, (3, 12)),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))


@cache
def ring_of(name: str) -> tuple[ExportedProgram, bl.LiftedProgram]:
    """A program, and what it is on two ranks; nothing below changes them."""
    modules = {"causal": Attends(is_causal=True), "full": Attends(), "scaled": Attends(is_causal=True, scale=0.3)}
    program = program_of(modules[name]) if name in modules else export_case(name, dynamic=True, batch=3, seq=12)[1]
    return program, bl.context_parallel(bl.lift(program), size=2, strategy="ring")


def rings(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.target is RING]


@pytest.mark.parametrize("name", ["llama_pr1797", "causal", "full", "scaled"])
def test_the_ranks_are_the_original(name: str) -> None:
    """In both orders where causal; the report says that the ring itself did not run."""
    program, parallel = ring_of(name)
    staged = bl.partition(parallel, num_stages=2 if name == "llama_pr1797" else 1)
    report = bl.verify(program, staged)
    assert report["shards"].worst < 1e-11 and report["composition"].worst == 0.0
    assert "the ring itself did not run" in report["shards"].detail
    assert ("contiguous and head-tail" in report["shards"].detail) == (name != "full")
    assert not bl.check(parallel) and not bl.check(staged)


def test_the_graph_has_rings_and_no_masks() -> None:
    """One op an attention, which names its group by the mesh dim; slots of the rows alone, and nothing is gathered."""
    program, parallel = ring_of("llama_pr1797")
    own = rings(parallel.program.graph)
    assert own == list(collectives(parallel.program.graph)) and len(own) == 2
    assert {node.args[-1] for node in own} == {"cp"} and len({node.args[3] for node in own}) == 1
    assert [(i.name, i.role, i.stream) for i in parallel.inputs][1:] == [("lifted_slots", "row", "slots")]
    assert parallel.ring_axes == ("seq",)
    assert not any("scaled_dot_product" in str(node.target) for node in parallel.program.graph.nodes)
    assert ring_of("full")[1].ring_axes == () and len(ring_of("full")[1].inputs) == 1
    same = bl.context_parallel(bl.lift(program), size=1, strategy="ring")  # no ring of one
    assert not rings(same.program.graph) and same.ring_axes == ()


def test_grouped_heads_are_sent_as_they_are() -> None:
    """Repeated for the query's behind the ring."""
    (node,) = rings(ring_of("causal")[1].program.graph)
    assert [operand.meta["val"].shape[1] for operand in node.args[:3]] == [4, 2, 2]


def test_flops_are_those_of_attention_over_all_keys() -> None:
    """As many as the allgather's, forward."""
    query, key = (torch.empty(2, heads, 6, 8, device="meta") for heads in (4, 2))
    whole = torch.empty(2, 4, 18, 8, device="meta")
    with FlopCounterMode(display=False) as ring:
        RING(query, key, key, None, None, 3, "none")
    with FlopCounterMode(display=False) as gathered:
        F.scaled_dot_product_attention(query, whole, whole)
    assert ring.get_total_flops() == gathered.get_total_flops() > 0


# -- orders ------------------------------------------------------------------------------------------------------


ALLOWED: dict[str, Any] = {
    "none": None,
    "contiguous": torch.arange(16),
    "balancer": HEAD_TAIL,
    "rows": HEAD_TAIL._generate_indices().repeat(3, 1),
}
REFUSED: dict[str, Any] = {
    "reversed": torch.arange(16).flip(0),
    "head-tail of four ranks": _HeadTailLoadBalancer(16, 4, "cpu")._generate_indices(),
    "per sample": torch.stack([torch.arange(16), HEAD_TAIL._generate_indices()[0], torch.arange(16)]),
    "per document": _PerDocumentHeadTailLoadBalancer([[8, 8]], 2, "cpu"),
}


@pytest.mark.parametrize("order", ALLOWED)
def test_the_two_orders_are_taken(order: str) -> None:
    """In any form."""
    staged = bl.partition(ring_of("causal")[1], num_stages=1)
    slots = staged.feed(3, 16, order=ALLOWED[order], shard=(1, 2))["lifted_slots"]
    tokens = staged.shard_inputs(order=ALLOWED[order], shard=(1, 2), tokens=torch.arange(16).expand(3, 16))["tokens"]
    assert torch.equal(slots, tokens)
    assert is_head_tail(slots, 1, 2) == (order not in ("none", "contiguous"))


@pytest.mark.parametrize("order", REFUSED)
def test_any_other_order_is_refused_at_once(order: str) -> None:
    """By feed and by shard_inputs, with the rank and what to do; an attention that is not causal takes it."""
    parallel, given = ring_of("causal")[1], REFUSED[order]
    tokens = {"tokens": torch.zeros(3, 16, dtype=torch.long)}
    words = r"order: torch's ring.*contiguous.*head-tail.*'allgather' or 'alltoall'.*rank 1 of 2"
    with pytest.raises(bl.FeedError, match=words):
        parallel.feed(3, 16, order=given, shard=(1, 2))
    with pytest.raises(bl.FeedError, match=words):
        parallel.shard_inputs(order=given, shard=(1, 2), **tokens)
    ring_of("full")[1].feed(3, 16, order=given, shard=(1, 2))
    ring_of("full")[1].shard_inputs(order=given, shard=(1, 2), **tokens)


def test_packages_keep_the_orders(tmp_path: Path) -> None:
    """A loaded program and a loaded stage refuse what the saved ones refused."""
    parallel = ring_of("causal")[1]
    parallel.save(tmp_path / "one.lifted")
    bl.partition(parallel, num_stages=1).save(tmp_path / "stages")
    stage = bl.load_stage(tmp_path / "stages", 0)
    assert len(rings(stage.stage.module.graph)) == 1
    for loaded in (bl.load(tmp_path / "one.lifted"), stage):
        with pytest.raises(bl.FeedError, match="torch's ring"):
            loaded.feed(3, 16, order=REFUSED["reversed"], shard=(0, 2))


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            Windowed(),
            r"1 op.*BL203 node 'scaled_dot_product_attention'.*has a mask.*test_ring.*'allgather' and 'alltoall'",
        ),
        (Compared(), r"has a mask.*causal_flags\(program\), before lift"),
        (WrittenOut(4, 4), r"BL203 node 'matmul'.*written out.*'allgather' can do it"),
        (Attends(is_causal=True, dropout_p=0.1), r"attention dropout"),
        (Attends(value_dim=8), r"other batches, heads or head dims.*'allgather' and 'alltoall' can do it"),
    ],
    ids=["window", "causal mask", "written out", "dropout", "head dims"],
)
def test_what_a_ring_cannot_do_is_refused(module: nn.Module, words: str) -> None:
    """With the node, its line and what to do."""
    lifted = bl.lift(program_of(module))
    with pytest.raises(bl.UnsupportedReadError, match=f"(?s){words}"):
        bl.context_parallel(lifted, size=2, strategy="ring")


def test_a_mask_that_is_proven_causal_becomes_a_ring() -> None:
    """By way of the flag."""
    program = bl.causal_flags(program_of(Compared()))
    parallel = bl.context_parallel(bl.lift(program), size=2, strategy="ring")
    assert parallel.ring_axes == ("seq",) and bl.verify(program, parallel).passed


def test_a_device_without_a_kernel_is_refused() -> None:
    """When a stage is built, before anything else."""
    staged = bl.partition(ring_of("causal")[1], num_stages=1)
    for device in ("mps", "xpu:1"):
        with pytest.raises(bl.PartitionError, match=rf"no kernel for the device '{device}'.*'allgather' or 'alltoall'"):
            staged.build_stage(0, device)
    with pytest.raises(bl.PartitionError, match="give build_stage a mesh"):
        staged.build_stage(0, "cpu")
    for device in ("cpu", "cuda", "meta"):
        check_ring_device(torch.device(device))


# -- the oracle sees faults --------------------------------------------------------------------------------------


def _full(node: torch.fx.Node) -> None:
    node.args = (*node.args[:3], None, *node.args[4:])


def _scaled(node: torch.fx.Node) -> None:
    node.args = (*node.args[:4], 1.5, *node.args[5:])


def _swapped(node: torch.fx.Node) -> None:
    node.args = (node.args[0], node.args[2], node.args[1], *node.args[3:])


def _local(node: torch.fx.Node) -> None:
    (result,) = node.users
    with node.graph.inserting_after(result):
        local = node.graph.call_function(
            torch.ops.aten.scaled_dot_product_attention.default, node.args[:3], {"is_causal": True, "enable_gqa": True}
        )
    local.meta = dict(result.meta)
    result.replace_all_uses_with(local)


@pytest.mark.parametrize("fault", [_full, _scaled, _swapped, _local])
def test_the_shards_oracle_sees_a_fault(fault: Any) -> None:
    """Slots that are not read, another scale, keys for values, keys of one rank."""
    program = ring_of("causal")[0]
    parallel = bl.context_parallel(bl.lift(program), size=2, strategy="ring")
    fault(rings(parallel.program.graph)[0])
    parallel.program.graph_module.recompile()
    with pytest.raises(bl.VerificationError, match="shards does not hold"):
        bl.verify(program, parallel, checks=("shards",))


def test_the_oracle_refuses_ranks_in_different_orders() -> None:
    """What a real ring would not notice."""
    from buffer_lifting.oracles.ring import ring_of_ranks

    query = torch.randn(1, 2, 4, 8)
    slots = [HEAD_TAIL._generate_indices()[:, :8], torch.arange(8, 16)[None]]
    with pytest.raises(RuntimeError, match="different orders"):
        ring_of_ranks([(query, query, query, own, None, 2, "cp") for own in slots])
    with pytest.raises(bl.FeedError, match="rank 1 of 2"):
        ring_of_ranks([(query, query, query, own, None, 2, "cp") for own in (slots[1] - 8, slots[1].flip(1))])


# -- the op ------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, ranks: int, port: int, directory: str) -> None:
    """Each case against attention in one process, outputs and gradients; then what is refused."""
    import torch.distributed as dist
    from pipeline_worker import process_group
    from torch.distributed.tensor.experimental._context_parallel import _attention

    errors: dict[str, float] = {}
    with process_group(rank, ranks, port):
        group = dist.group.WORLD.group_name
        before = str(_attention._cp_options)
        for order in ("full", "contiguous", "head-tail"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                name = f"{order} {dtype}"
                errors[name] = _compared(rank, ranks, group, order, dtype)
            _attention.set_rotate_method("alltoall")
            errors[f"rotated {name}"] = _compared(rank, ranks, group, order, torch.bfloat16)
            _attention.set_rotate_method("allgather")
        assert str(_attention._cp_options) == before
        query = torch.zeros(2, 4, 4, 8)
        for slots, ranks_said, error in [
            (torch.arange(4).flip(0)[None], ranks, bl.FeedError),
            (torch.stack([torch.arange(4), torch.arange(4) + 4]), ranks, bl.FeedError),
            (torch.arange(rank * 8, rank * 8 + 8)[None], ranks, bl.FeedError),
            (None, ranks + 1, bl.PartitionError),
        ]:
            with pytest.raises(error):
                RING(query, query, query, slots, None, ranks_said, group)
        with pytest.raises(bl.PartitionError, match="cast them alike"):
            RING(query, query.double(), query, None, None, ranks, group)
    torch.save(errors, Path(directory) / f"{rank}.pt")


def _compared(rank: int, ranks: int, group: str, order: str, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    length = 8 * ranks
    leaves = [torch.randn(2, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(2, 4, length, 8, dtype=dtype)
    whole = F.scaled_dot_product_attention(*leaves, is_causal=order != "full", scale=0.4, enable_gqa=True)
    expected = torch.autograd.grad(whole, leaves, weights)
    places = torch.arange(length)
    if order == "head-tail":
        places = _HeadTailLoadBalancer(length, ranks, "cpu")._generate_indices()[0].long()
    mine = places[rank * 8 : (rank + 1) * 8]
    own = [leaf.detach()[:, :, mine].requires_grad_() for leaf in leaves]
    out = operator.getitem(RING(*own, None if order == "full" else mine.expand(2, -1), 0.4, ranks, group), 0)
    assert out.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(out, own, weights[:, :, mine])
    pairs = zip((out, *gradients), (whole, *expected), strict=True)
    return max(float((a - b[:, :, mine]).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_op_on_gloo(tmp_path: Path) -> None:
    """Three ranks: causal in both orders and full, grouped heads, each dtype that the CPU's kernel takes."""
    from pipeline_worker import free_port

    torch.multiprocessing.spawn(_on_rank, (3, free_port(), str(tmp_path)), 3)
    bounds = {"torch.float64": 1e-14, "torch.float32": 2e-6, "torch.bfloat16": 2e-2}
    for rank in range(3):
        errors = torch.load(tmp_path / f"{rank}.pt")
        assert len(errors) == 12
        for name, error in errors.items():
            assert error < bounds[name.split()[-1]], (rank, name, error)
