"""Every order, balancer and shard that ``feed`` and ``shard_inputs`` take: values, memory, strides, errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.distributed.tensor.experimental._context_parallel import _load_balancer
from torch.nn.attention.flex_attention import create_block_mask
from zoo import export_case, make_inputs

import buffer_lifting as bl
from buffer_lifting.program import InputAxes
from buffer_lifting.sharding import shard_inputs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.feed_cost import ROW, Rotary, build
from benchmarks.memory import peak_bytes

BATCH, SEQ = 2, 512
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def rotary() -> tuple[Tensor, bl.LiftedProgram]:
    """A table of 8192 rows of 64 complex numbers."""
    return build(8192)


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    """Eight ranks, of which this process is the fourth."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


def random_orders(rows: int, seq: int = SEQ, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(seq, generator=generator) for _ in range(rows)])


def ptrr(batch: int, size: int) -> Any:
    def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        length = 128 + 64 * b  # other documents in each sample
        return (q >= k) & (q // length == k // length)

    mask = create_block_mask(documents, batch, 1, SEQ, SEQ, device="cpu", BLOCK_SIZE=64)
    return _load_balancer._PTRRLoadBalancer(mask, size)


def head_tail(size: int) -> Any:
    return _load_balancer._HeadTailLoadBalancer(SEQ, size, torch.device("cpu"))


def per_document(lengths: list[list[int]], size: int) -> Any:
    return _load_balancer._PerDocumentHeadTailLoadBalancer(lengths, size, torch.device("cpu"))


#: name -> (what ``order=`` gets for a CP size, rows of its order)
BALANCERS: dict[str, tuple[Any, int]] = {
    "head_tail": (head_tail, 1),
    "per_document": (lambda size: per_document([[128, 384]], size), 1),
    "per_document_each": (lambda size: per_document([[128, 384], [256, 64, 192]], size), BATCH),
    "ptrr": (lambda size: ptrr(1, size), 1),
    "ptrr_each": (lambda size: ptrr(BATCH, size), BATCH),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", BALANCERS)
def test_balancers(rotary: tuple[Tensor, bl.LiftedProgram], name: str, size: int) -> None:
    table, lifted = rotary
    make, rows = BALANCERS[name]
    balancer = make(size)
    order = balancer._generate_indices(restore=False)
    assert order.shape == (rows, SEQ)
    assert rows == 1 or not torch.equal(order[0], order[1])
    part = SEQ // size
    for rank in range(size):
        slots = order[:, rank * part : (rank + 1) * part].expand(BATCH, -1)
        got = lifted.feed(BATCH, SEQ, order=balancer, shard=(rank, size))["lifted_freqs_cis"]
        assert torch.equal(got, torch.stack([table[row.long()] for row in slots]))
        assert (got.stride(0) == 0) == (rows == 1)
        tokens = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
        sharded = lifted.shard_inputs(order=balancer, shard=(rank, size), tokens=tokens)["tokens"]
        assert torch.equal(sharded, tokens.gather(1, slots.long()))


SHARED = {
    "none": None,
    "flat": random_orders(1)[0],
    "row": random_orders(1),
    "expanded": random_orders(1).expand(8, -1),
    "int32": random_orders(1).int(),
    "uint8": torch.randperm(SEQ // 4).to(torch.uint8),
    "head_tail": head_tail(2),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_order_stays_stride_0_through_a_schedule(rotary: tuple[Tensor, bl.LiftedProgram], name: str) -> None:
    lifted = rotary[1]
    order, batch, seq = SHARED[name], 8, SEQ // 4 if name == "uint8" else SEQ
    feed = lifted.feed(batch, seq, order=order, shard=(1, 2))
    _, chunks = split_args_kwargs_into_chunks((), feed, 4, (), None)
    assert len(chunks) == 4
    first = feed["lifted_freqs_cis"]
    for chunk in chunks:
        value = chunk["lifted_freqs_cis"]
        assert value.shape == (2, seq // 2, ROW) and value.stride(0) == 0
        assert value.data_ptr() == first.data_ptr()
        assert torch.equal(value, first[:2])


def whole_bytes(table: Tensor, batch: int, seq: int) -> int:
    return batch * seq * ROW * table.element_size()


def test_only_the_rows_of_the_rank_are_made(rotary: tuple[Tensor, bl.LiftedProgram]) -> None:
    table, lifted = rotary
    batch, seq, size = 4, 8192, 8
    lifted.feed(batch, seq)  # the table of this length
    shared, each = random_orders(1, seq), random_orders(batch, seq)
    positions = torch.arange(seq) % torch.tensor([[100], [200], [300], [400]])
    wanted = whole_bytes(table, batch, seq) // size
    assert peak_bytes(lambda: lifted.feed(batch, seq, order=each, shard=(1, size))) < 1.2 * wanted
    assert peak_bytes(lambda: lifted.feed(batch, seq, order=each, positions=positions, shard=(1, size))) < 1.3 * wanted
    assert peak_bytes(lambda: lifted.feed(batch, seq, order=shared, shard=(1, size))) < 1.2 * wanted / batch
    assert peak_bytes(lambda: lifted.feed(batch, seq, order=shared, shard=(1, size))) < 2**14  # it came before
    assert peak_bytes(lambda: lifted.feed(batch, seq, shard=(1, size))) < 2**14


def test_values_of_position_ids_are_made_a_sample_at_a_time() -> None:
    """HF computes cos and sin from the ids in its graph: of the batch, only this rank's rows are ever there."""
    lifted = bl.lift(export_case("hf_llama")[1])
    batch, seq, size = 8, 4096, 8
    names = frozenset(item.name for item in lifted.inputs if item.form == "values" and item.role == "row")
    assert names
    rows = {item.name: item for item in lifted.inputs if item.name in names}
    row_bytes = sum(
        torch.empty(0, dtype=getattr(torch, item.dtype)).element_size() * torch.Size(item.row_shape).numel()
        for item in rows.values()
    )
    positions = torch.arange(seq) % torch.arange(100, 100 + batch)[:, None]
    each = random_orders(batch, seq)

    def feed() -> dict[str, Tensor]:
        return lifted._feed(batch, {"seq": seq}, None, each, positions, (1, size), None, names=names)

    whole = lifted._feed(batch, {"seq": seq}, None, each, positions, (0, 1), None, names=names)
    for name, value in feed().items():
        assert torch.equal(value, whole[name][:, seq // size : 2 * seq // size])
    assert peak_bytes(feed) < 0.8 * row_bytes * batch * seq


def test_rows_of_an_order_are_kept_by_its_content(rotary: tuple[Tensor, bl.LiftedProgram]) -> None:
    table, lifted = rotary
    memory = bytearray(random_orders(1).numpy().tobytes())
    order = torch.frombuffer(memory, dtype=torch.int64)  # a buffer that changes behind torch's back

    def fed(rank: int = 0, size: int = 2) -> Tensor:
        return lifted.feed(BATCH, SEQ, order=order, shard=(rank, size))["lifted_freqs_cis"]

    first = fed()
    assert fed().data_ptr() == first.data_ptr()
    assert torch.equal(fed(1)[0], table[order[SEQ // 2 :]])
    assert torch.equal(fed(1, 4)[0], table[order[SEQ // 4 : SEQ // 2]])
    version = order._version
    memory[: 8 * SEQ] = random_orders(1, seed=1).numpy().tobytes()
    assert order._version == version
    assert torch.equal(fed()[0], table[order[: SEQ // 2]])
    memory[:8] = memory[8:16]
    with pytest.raises(bl.FeedError, match="twice"):
        fed()
    lifted.feed(BATCH, SEQ, order=random_orders(1))
    lifted.feed_program.clear_tables()
    assert torch.equal(
        lifted.feed(BATCH, SEQ, order=random_orders(1))["lifted_freqs_cis"][1], table[random_orders(1)[0]]
    )


def test_index_inputs_share_no_memory_with_the_kept_order() -> None:
    lifted = bl.lift(export_case("nanogpt")[1])
    order = random_orders(1, 32)
    feed = lifted.feed(1, 32, order=order)
    for value in feed.values():
        value.zero_()
    with pytest.raises(bl.FeedError, match="twice"):
        lifted.feed(1, 32, order=torch.zeros(32, dtype=torch.int64))


@pytest.mark.parametrize("each", [False, True])
def test_balancer_over_static_microbatches(each: bool) -> None:
    """A per-document balancer of the whole batch, a program that was exported with a batch of two."""
    module, batch, seq = Rotary(16), 4, 16
    lifted = bl.lift(torch.export.export(module, (torch.zeros(2, seq, dtype=torch.int64),)))
    assert lifted.axes.batch == 2
    staged = bl.partition(lifted, num_stages=1)
    documents = [[8, 8], [16], [4, 12], [8, 4, 4]]
    balancer = per_document(documents if each else documents[:1], 2)
    order = balancer._generate_indices(restore=False)
    feed = staged.feed(batch, seq, order=balancer, n_microbatches=2)["lifted_freqs_cis"]
    assert torch.equal(feed, module.freqs_cis[order].expand(batch, -1, -1))
    assert (feed.stride(0) == 0) == (not each)
    with pytest.raises(bl.FeedError, match="divide into microbatches"):
        staged.feed(batch + 1, seq)


def test_hoisted_values_over_static_microbatches() -> None:
    ep = export_case("hf_llama_labels", dynamic=False)[1]
    lifted = bl.lift(ep)
    micro, seq = lifted.axes.batch, lifted.axes.lengths["seq"]
    assert micro is not None and seq is not None
    staged = bl.partition(lifted, num_stages=2)
    _, inputs = make_inputs("hf_llama_labels", 2 * micro, seq)
    needed = {"labels": inputs["labels"]}
    order = random_orders(2 * micro, seq)
    feed = staged.feed(2 * micro, seq, inputs=needed, order=order)
    for start in (0, micro):
        rows = slice(start, start + micro)
        part = lifted.feed(micro, seq, inputs={"labels": inputs["labels"][rows]}, order=order[rows])
        for name, value in part.items():
            assert torch.equal(feed[name][rows], value)


# shard_inputs -------------------------------------------------------------------------------------------

AXES = {
    "tokens": InputAxes("tokens", 0, ((1, "seq", "row"),), 2),
    "labels": InputAxes("labels", 0, ((1, "seq", "row"),), 2),
    "embeds": InputAxes("embeds", 0, ((1, "seq", "row"),), 3),
    "padding": InputAxes("padding", 0, ((1, "seq", "col"),), 2),
    "mask": InputAxes("mask", 0, ((2, "seq", "row"), (3, "seq", "col")), 4),
    "mrope": InputAxes("mrope", 1, ((2, "seq", "row"),), 3),
    "first": InputAxes("first", 1, ((0, "seq", "row"),), 3),
    "table": InputAxes("table", None, ((0, "seq", "row"),), 2),
    "scale": InputAxes("scale", None, (), 0),
}


def user_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "tokens": (batch, seq),
        "labels": (batch, seq),
        "embeds": (batch, seq, 24),
        "padding": (batch, seq),
        "mask": (batch, 1, seq, seq),
        "mrope": (3, batch, seq),
        "first": (seq, batch, 5),
        "table": (seq, 7),
        "scale": (),
    }
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_each_input_along_its_own_dims(kind: str, rank: int, size: int) -> None:
    batch, seq = 3, 16
    order = {"none": None, "shared": random_orders(1, seq)[0], "each": random_orders(batch, seq).int()}[kind]
    inputs = user_inputs(batch, seq)
    if kind == "each":
        with pytest.raises(bl.FeedError, match=r"'table'.*no batch dim"):
            shard_inputs(AXES, inputs, order, (rank, size))
        inputs = {name: value for name, value in inputs.items() if name != "table"}
    whole = torch.arange(seq).expand(batch, -1) if order is None else order.long().expand(batch, -1)
    part = whole[:, rank * seq // size : (rank + 1) * seq // size]
    got = shard_inputs(AXES, inputs, order, (rank, size))
    assert got.keys() == inputs.keys()
    for b in range(batch):
        rows, cols = part[b], whole[b]
        for name in ("tokens", "labels", "embeds"):
            assert torch.equal(got[name][b], inputs[name][b][rows])
        assert torch.equal(got["padding"][b], inputs["padding"][b][cols])
        assert torch.equal(got["mask"][b, 0], inputs["mask"][b, 0][rows][:, cols])
        assert torch.equal(got["mrope"][:, b], inputs["mrope"][:, b][:, rows])
        assert torch.equal(got["first"][:, b], inputs["first"][rows, b])
    if "table" in inputs:
        assert torch.equal(got["table"], inputs["table"][part[0]])
    assert torch.equal(got["scale"], inputs["scale"])
    assert all(value.is_contiguous() for value in got.values())


@pytest.mark.parametrize("order", [random_orders(1, 2048), random_orders(4, 2048)], ids=["shared", "each"])
def test_only_the_rows_of_the_shard_are_gathered(order: Tensor) -> None:
    embeds = torch.rand(4, 2048, 64)
    inputs = {"embeds": embeds}
    shard_inputs(AXES, inputs, order, (1, 8))
    assert peak_bytes(lambda: shard_inputs(AXES, inputs, order, (1, 8))) < 1.3 * embeds.nbytes / 8
    mask = torch.rand(4, 1, 512, 512)
    order = order[:, :512].argsort(1)
    peak = peak_bytes(lambda: shard_inputs(AXES, {"mask": mask}, order, (1, 8)))
    assert peak < 3.5 * mask.nbytes / 8  # rows, then columns of these rows, and their index


# errors -------------------------------------------------------------------------------------------------


class NoIndices:
    """A load balancer that has nothing to say."""

    def _generate_indices(self, restore: bool = False) -> Tensor | None:
        return None


class ListIndices:
    """A load balancer of another kind."""

    def _generate_indices(self, restore: bool = False) -> list[int]:
        return list(range(SEQ))


LAST_TWICE = torch.cat([torch.arange(SEQ - 1), torch.tensor([SEQ - 2])])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no_indices": ({"order": NoIndices()}, r"order: the load balancer NoIndices has no indices \(None\)"),
    "list_indices": ({"order": ListIndices()}, "order: the load balancer ListIndices has indices of type list"),
    "refusing": ({"order": per_document([[SEQ - 3, 3]], 2)}, "order: .*_PerDocument.*world_size=2.* makes no indices"),
    "short": ({"order": per_document([[128, 128]], 2)}, r"order has shape \(1, 256\).*rank 1 of 2"),
    "twice": ({"order": LAST_TWICE}, "order of sample 0 .*twice.*rank 1 of 2"),
    "twice_elsewhere": (
        {"order": torch.cat([random_orders(3), LAST_TWICE[None]]), "batch_size": 4},
        "order of sample 3 .*twice",
    ),
    "beyond": ({"order": random_orders(1) + 1}, rf"order holds {SEQ}, outside 0..{SEQ - 1}.*rank 1 of 2"),
    "far_beyond": ({"order": random_orders(1) * 2**50}, "order holds .* outside"),
    "negative": ({"order": random_orders(1) - 1}, "order holds -1"),
    "positions": ({"positions": torch.arange(SEQ) - 1}, "positions holds -1.*rank 1 of 2"),
    "rows": ({"order": random_orders(3)}, "order has 3 rows for a batch of 2"),
    "size": ({"shard": (1, 3)}, f"a sequence of {SEQ} does not divide into 3 shards.*rank 1 of 3"),
    "step": ({"order": random_orders(1), "seq_len": SEQ // 2}, rf"order has shape \(1, {SEQ}\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_at_once(rotary: tuple[Tensor, bl.LiftedProgram], name: str) -> None:
    kwargs, message = WRONG[name]
    for _ in range(2):  # a refusal is not remembered as an order that passed
        with pytest.raises(bl.FeedError, match=message):
            rotary[1].feed(**{"batch_size": BATCH, "seq_len": SEQ, "shard": (1, 2), **kwargs})


def test_inputs_of_different_steps() -> None:
    inputs = user_inputs(2, 16)
    wrong = {
        r"'labels' \(2, 14\) has a length of axis 'seq' of 14 \(its dim 1\), but 'tokens' of 16": user_inputs(2, 14),
        r"'labels' \(3, 16\) has a batch of 3 \(its dim 0\), but 'tokens' of 2": user_inputs(3, 16),
    }
    for message, others in wrong.items():
        with pytest.raises(bl.FeedError, match=message):
            shard_inputs(AXES, {"tokens": inputs["tokens"], "labels": others["labels"]}, None, (0, 2))
    with pytest.raises(bl.FeedError, match=r"order has shape \(14,\)"):
        shard_inputs(AXES, inputs, random_orders(1, 14)[0], (0, 2))


@pytest.mark.usefixtures("ranks")
def test_meshes(rotary: tuple[Tensor, bl.LiftedProgram]) -> None:
    table, lifted = rotary
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("pp", "cp"))
    order = random_orders(BATCH)
    got = lifted.feed(BATCH, SEQ, order=order, shard=mesh["cp"])["lifted_freqs_cis"]
    assert torch.equal(got, table[order[:, 3 * SEQ // 4 :]])
    tokens = torch.arange(SEQ).expand(BATCH, -1)
    assert torch.equal(lifted.shard_inputs(shard=mesh["cp"], tokens=tokens)["tokens"], tokens[:, 3 * SEQ // 4 :])
    with pytest.raises(bl.FeedError, match=r"2-D DeviceMesh \(pp, cp\); give shard=mesh\['cp'\]"):
        lifted.feed(BATCH, SEQ, order=order, shard=mesh)
    with pytest.raises(bl.FeedError, match=r"2-D DeviceMesh \(pp, cp\)"):
        lifted.shard_inputs(shard=mesh, tokens=tokens)
    other = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    with pytest.raises(bl.FeedError, match=r"2-D DeviceMesh \(dp, tp\); give its context-parallel dim alone"):
        lifted.feed(BATCH, SEQ, order=order, shard=other)
    named = bl.context_parallel(lifted)
    with pytest.raises(bl.FeedError, match=r"mesh dim 'pp'.*context-parallel dim 'cp'"):
        named.feed(BATCH, SEQ, order=order, shard=mesh["pp"])
    outside = DeviceMesh("cpu", [0, 1], mesh_dim_names=("cp",))
    with pytest.raises(bl.FeedError, match="rank 3 is not in the mesh"):
        lifted.feed(BATCH, SEQ, order=order, shard=outside)


@pytest.mark.parametrize("name", ["tokens", "target"])
def test_a_list_is_no_input(rotary: tuple[Tensor, bl.LiftedProgram], name: str) -> None:
    program = rotary[1]
    own = next(iter(program.input_axes))
    inputs: dict[str, Any] = {own: torch.zeros(2, SEQ, dtype=torch.int64)}
    inputs["target" if name == "target" else own] = [[0] * SEQ] * 2
    with pytest.raises(bl.FeedError, match=r"is a list; shard_inputs takes tensors"):
        program.shard_inputs(shard=(0, 2), **inputs)


def test_a_balancer_for_another_number_of_ranks(rotary: tuple[Tensor, bl.LiftedProgram]) -> None:
    with pytest.raises(bl.FeedError, match=r"_HeadTailLoadBalancer was made for 2 ranks, but the shard is one of 4"):
        rotary[1].feed(2, SEQ, order=head_tail(2), shard=(0, 4))
