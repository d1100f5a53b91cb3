"""Which stages lie on which rank, how many microbatches they hold, and what that needs in memory."""

from __future__ import annotations

import operator
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stage_programs import EXPORTS, lifted, program
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.export import Dim
from torch.fx import Graph, GraphModule

import buffer_lifting as bl
from buffer_lifting.flops import FlopCounter
from buffer_lifting.memory import OPTIMIZERS
from buffer_lifting.placement import in_flight
from buffer_lifting.saved_values import SavedValues

SINGLE, LOOPED, V_SHAPED = (
    ("GPipe", "1F1B"),
    ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble"),
    ("ZBVZeroBubble", "DualPipeV"),
)


def stages_of(name: str, pp: int) -> int:
    return pp if name in SINGLE else 2 * pp


# Ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("name", [*LOOPED, *V_SHAPED])
def test_the_ranks_of_stages_are_those_of_torchs_own_schedule(name: str, pp: int) -> None:
    """torch's schedule says it itself, once it is made with stages."""
    count = 2 * pp
    own = [
        SimpleNamespace(num_stages=count, group_size=pp, group_rank=0, stage_index=index, submod=None, is_last=False)
        for index in range(2)
    ]
    made = schedules.get_schedule_class(name)(own, count)
    assert bl.stage_ranks(name, count, pp) == made.stage_index_to_group_rank
    assert bl.stage_ranks(f"Schedule{name}", count, pp) == bl.stage_ranks(type(made), count, pp)


def test_ranks_by_hand() -> None:
    assert list(bl.stage_ranks("1F1B", 3).values()) == [0, 1, 2]
    assert list(bl.stage_ranks("Interleaved1F1B", 6, pp=2).values()) == [0, 1, 0, 1, 0, 1]
    assert list(bl.stage_ranks("ZBVZeroBubble", 6).values()) == [0, 1, 2, 2, 1, 0]

    class Own(schedules.ScheduleDualPipeV):
        pass

    assert list(bl.stage_ranks(Own, 4).values()) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("2F2B", 4), "is no schedule of torch.distributed.pipelining; it has GPipe"),
        ((nn.Linear, 4), "is no schedule"),
        ((3, 4), "is no schedule"),
        (("1F1B", 4, 2), "one stage on each rank: 4 stages do not lie on 2 ranks; make 2 stages"),
        (("DualPipeV", 6, 4), "two stages on each rank: 6 stages do not lie on 4 ranks; make 8 stages"),
        (("ZBVZeroBubble", 5), "two stages on each rank"),
        (("LoopedBFS", 4), "give pp"),
        (("Interleaved1F1B", 5, 2), "a multiple of 2 stages"),
        (("GPipe", 0), "num_stages must be a positive integer"),
        (("Interleaved1F1B", 4, True), "pp must be a positive integer"),
    ],
)
def test_stages_that_do_not_lie_on_ranks(arguments: Any, message: str) -> None:
    with pytest.raises(bl.PartitionError, match=message):
        bl.stage_ranks(*arguments)


# In flight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pp", [2, 3, 8])
def test_microbatches_in_flight(pp: int) -> None:
    """What is counted in torch's schedules is what is said of them."""
    n = 4 * pp
    assert in_flight("GPipe", pp, None, n).stages == (n,) * pp
    assert in_flight("1F1B", pp, None, n).stages == tuple(pp - rank for rank in range(pp))
    assert in_flight("LoopedBFS", 2 * pp, pp, n).stages == (n,) * (2 * pp)
    interleaved = in_flight("Interleaved1F1B", 2 * pp, pp, n)
    assert [interleaved.most(rank, (1, 1)) for rank in range(pp)] == [3 * pp - 2 * rank - 1 for rank in range(pp)]
    for name in V_SHAPED:
        both = in_flight(name, 2 * pp, pp, n)
        assert all(both.most(rank, (1, 1)) == 2 * pp + (name == "DualPipeV") for rank in range(pp)), name
    zero = in_flight("InterleavedZeroBubble", 2 * pp, pp, n)
    assert all(2 * pp <= zero.most(rank, (1, 1)) <= 3 * pp for rank in range(pp))


def test_stages_of_a_rank_do_not_peak_together() -> None:
    both = in_flight("Interleaved1F1B", 8, 4, 16)
    assert both.most(0, (1, 1)) < sum(both.stages[stage] for stage in (0, 4))


def test_microbatches_that_a_schedule_refuses() -> None:
    for bad in (0, True, 1.5):
        with pytest.raises(bl.PartitionError, match="n_microbatches must be a positive integer"):
            in_flight("1F1B", 2, None, bad)  # type: ignore[arg-type]
    with pytest.raises(bl.PartitionError, match="Schedule1F1B on 4 ranks: Number of microbatches"):
        in_flight("1F1B", 4, None, 2)
    with pytest.raises(bl.PartitionError, match="DualPipeV"):
        in_flight("DualPipeV", 8, 4, 4)


# Memory ---------------------------------------------------------------------------------------------------


def kept_by_autograd(staged: bl.StagedProgram, args: Any, kwargs: dict[str, Tensor]) -> list[int]:
    """Bytes that each stage's forward leaves behind: of storages, without parameters, buffers and inputs."""
    named = {**dict(zip(staged.positional, args, strict=False)), **kwargs}
    values, found = list(args), []
    for stage in staged.stages:
        if stage.index:
            values = [value.detach().requires_grad_(value.is_floating_point()) for value in values]
        there = [*stage.module.parameters(), *stage.module.buffers(), *named.values()]
        outside = {value.untyped_storage().data_ptr() for value in there}
        kept: dict[int, Tensor] = {}

        def keep(value: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            out = stage.module(*values, **(named if stage.index else kwargs))
        results = list(out) if isinstance(out, tuple) else [out]
        for value in [*results, *(values if stage.index else [])]:
            keep(value)
        found.append(sum(v.untyped_storage().nbytes() for key, v in kept.items() if key not in outside))
        values = results
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_activations_are_those_that_autograd_keeps(name: str) -> None:
    """Within 1%: equal on all three, when this was written."""
    staged = bl.partition(lifted(name), num_stages=2)
    args, kwargs = program(name).example_inputs or ((), {})
    named = {**dict(zip(staged.positional, args, strict=False)), **kwargs}
    batch, length = next(iter(named.values())).shape
    lengths = {"seq": length, "decoder": named["decoder_input_ids"].shape[1]} if name == "hf_t5" else length
    feed = staged.feed(batch, lengths, inputs=named)
    measured = kept_by_autograd(staged, args, {**kwargs, **feed})
    estimated = [stage.activations for stage in staged.memory().stages]
    assert all(size > 10_000 for size in measured)
    assert estimated == pytest.approx(measured, rel=0.01)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("table", torch.randn(32, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.table[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@cache
def layers(count: int, schedule: str | None = None, pp: int | None = None) -> bl.StagedProgram:
    tokens = torch.randint(0, 8, (3, 7))
    program = torch.export.export(Layers(), (tokens,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    return bl.partition(bl.lift(program), num_stages=count, schedule=schedule, pp=pp)


def test_memory_by_hand() -> None:
    """A linear keeps its input, tanh its result: what one hands the other counts once."""
    staged = layers(4)
    middle = staged.memory(n_microbatches=8, optimizer="adam").stages[1]
    numbers = 16 * 16 + 16
    assert (middle.parameters, middle.gradients, middle.optimizer, middle.buffers) == (
        4 * numbers,
        4 * numbers,
        8 * numbers,
        0,
    )
    assert middle.activations == 2 * 4 * 3 * 7 * 16  # what it receives, and what tanh hands on
    assert middle.in_flight == 3 and middle.rank == 1
    assert middle.total == 16 * numbers + 3 * middle.activations
    for name, per_element in OPTIMIZERS.items():
        assert staged.memory(optimizer=name).stages[1].optimizer == per_element * numbers
    assert staged.memory(optimizer=0.5).stages[1].optimizer == numbers // 2
    frozen = staged.stages[2].module
    try:
        frozen.requires_grad_(False)
        memory = staged.memory().stages[2]
        assert (memory.gradients, memory.optimizer, memory.parameters) == (0, 0, 4 * numbers)
    finally:
        frozen.requires_grad_(True)
    for bad in ("adagrad", -1, True, float("nan"), None):
        with pytest.raises(bl.PartitionError, match="optimizer"):
            staged.memory(optimizer=bad)  # type: ignore[arg-type]


def test_memory_of_ranks() -> None:
    staged = layers(4, "ZBVZeroBubble")
    assert staged.stage_ranks() == {0: 0, 1: 1, 2: 1, 3: 0}
    assert staged.stages_of_rank(0) == (0, 3) and staged.stages_of_rank(1) == (1, 2)
    memory = staged.memory(n_microbatches=6)
    assert memory.schedule == "ScheduleZBVZeroBubble" and memory.pp == 2
    for rank in memory.ranks:
        own = [memory.stages[stage] for stage in rank.stages]
        assert rank.state == sum(stage.state for stage in own)
        sizes = [stage.activations for stage in own]
        assert max(sizes) < rank.activations <= sum(s.activations * s.in_flight for s in own)
    assert staged.memory("GPipe", n_microbatches=6).stages[3].in_flight == 6
    with pytest.raises(bl.PartitionError, match="there is no rank 2"):
        staged.stages_of_rank(2)
    with pytest.raises(bl.PartitionError, match="made for 2 ranks, not 4"):
        staged.memory(pp=4)


def test_partition_for_a_schedule() -> None:
    """Two stages of each rank together are balanced, and run as any stages."""
    staged = layers(4, "Interleaved1F1B", 2)
    assert staged.stages_of_rank(1) == (1, 3) and staged.placement is not None
    tokens = torch.randint(0, 8, (2, 9))
    feed = staged.feed(2, 9)
    assert torch.equal(staged(tokens, **feed), staged.lifted.program.module()(tokens, **feed))
    with pytest.raises(bl.PartitionError, match="3 stages do not lie on 2 ranks"):
        layers(3, "Interleaved1F1B", 2)
    with pytest.raises(bl.PartitionError, match="give pp"):
        layers(4, "LoopedBFS")


def region(name: str) -> GraphModule:
    """``tanh(x @ w).sin()`` inside of a higher-order op."""
    x, w = torch.randn(6, 8), nn.Parameter(torch.randn(8, 8))
    inner, aten = Graph(), torch.ops.aten
    left, right = inner.placeholder("x"), inner.placeholder("w")
    product = inner.call_function(aten.mm.default, (left, right))
    tanh = inner.call_function(aten.tanh.default, (product,))
    sin = inner.call_function(aten.sin.default, (tanh,))
    inner.output((sin,))
    root = nn.Module()
    root.w = w
    root.body = GraphModule(nn.Module(), inner)
    graph = Graph()
    given, weight, body = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("body")
    call = graph.call_function(getattr(torch.ops.higher_order, name), (body, given, weight))
    out = graph.call_function(operator.getitem, (call, 0))
    graph.output(out)
    for node in (left, right, product, tanh, sin, given, out):
        node.meta["val"] = w if node is right else x
    call.meta["val"] = (x,)
    return GraphModule(root, graph)


def test_regions_keep_what_is_inside_and_checkpointed_ones_their_operands() -> None:
    size = 4 * 6 * 8
    walk = SavedValues({})
    assert walk.stage(region("tag_activation_checkpoint"), ("x",)) == 2 * size, "x, and what is returned"
    assert walk.stage(region("invoke_subgraph"), ("x",)) == 3 * size, "x, tanh (for itself and for sin), the result"
    assert FlopCounter({}).nodes(region("invoke_subgraph").graph.nodes) == 2 * 6 * 8 * 8
    assert not walk.unknown


def test_flex_attention_counts_as_a_fused_kernel() -> None:
    batch, heads, rows, width = 2, 4, 6, 8
    graph = Graph()
    query, key, value = (graph.placeholder(name) for name in "qkv")
    body = graph.get_attr("score")
    call = graph.call_function(
        torch.ops.higher_order.flex_attention, (query, key, value, body, (rows, rows), 1.0, {}, (), ())
    )
    out = graph.call_function(operator.getitem, (call, 0))
    graph.output(out)
    root = nn.Module()
    root.score = GraphModule(nn.Module(), Graph())
    q, kv = torch.randn(batch, heads, rows, width), torch.randn(batch, heads // 2, rows, width)
    lse = torch.randn(batch, heads, rows)
    query.meta["val"], key.meta["val"], value.meta["val"], call.meta["val"] = q, kv, kv, (q, lse)
    module = GraphModule(root, graph)
    counter = FlopCounter({})
    assert counter.nodes(module.graph.nodes) == 2 * 2 * batch * heads * rows * rows * width and not counter.unknown
    assert SavedValues({}).stage(module, ("q", "k", "v")) == 2 * q.nbytes + 2 * kv.nbytes + lse.nbytes
    key.meta["val"] = torch.randn(batch, heads // 2, rows, width + 1)  # no product
    assert counter.nodes(module.graph.nodes) == 0 and counter.unknown == [call.name]


# The table ------------------------------------------------------------------------------------------------


def test_the_table_of_stages() -> None:
    lines = layers(2).summary().splitlines()
    assert re.split(r"\s{2,}", lines[0]) == [
        "stage",
        "modules",
        "parameters",
        "FLOPs",
        "memory",
        "sends",
        "receives",
        "keyword inputs",
    ]
    first, second = (re.split(r"\s{2,}", line.strip()) for line in lines[1:3])
    assert first[:3] == ["0", "emb, layers.0-1", "672"] and first[5] == "1.31 KiB"
    assert second[:3] == ["1", "layers.2-3", "544"] and second[3] == "50.0%" and second[5] == "-"
    assert first[3] == "50.0%" and second[6] == "tanh_1" and "lifted_table" in first[7]
    assert lines[3:] == ["memory: 1F1B on 2 ranks, 4 microbatches of the example's size, optimizer 8 bytes a parameter"]


def test_the_table_of_ranks() -> None:
    lines = layers(4, "DualPipeV").summary(n_microbatches=8, optimizer="sgd").splitlines()
    assert lines[0].split()[:3] == ["stage", "rank", "modules"] and [line.split()[1] for line in lines[1:5]] == [
        *"0110"
    ]
    assert lines[5].startswith("rank 0: stages 0, 3, 50.0% of the FLOPs, memory ")
    assert lines[-1].startswith("memory: DualPipeV on 2 ranks, 8 microbatches") and "optimizer 0 bytes" in lines[-1]
