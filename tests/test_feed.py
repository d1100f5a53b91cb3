"""The feed, against brute force: ``values[b, i] == table[positions[b, order[b, i]]]``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _load_balancer
from zoo import export_case, make_inputs

import buffer_lifting as bl

BATCH, SEQ = 3, 16
SHARDS = [(0, 1), (0, 2), (1, 2), (3, 4)]


@pytest.fixture(scope="module")
def rope() -> tuple[Any, Any]:
    module, ep = export_case("llama_pr1797")
    return module, bl.lift(ep)


@pytest.fixture(scope="module")
def masked() -> Any:
    return bl.lift(export_case("nanogpt")[1])


def orders(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(rows)])


def whole(value: Tensor | None) -> Tensor:
    """An order or positions of every sample."""
    if value is None:
        return torch.arange(SEQ).expand(BATCH, -1)
    value = value.long()
    return (value if value.ndim == 2 else value[None]).expand(BATCH, -1)


def brute(table: Tensor, order: Tensor | None, positions: Tensor | None, shard: tuple[int, int] = (0, 1)) -> Tensor:
    rank, size = shard
    part = SEQ // size
    rows = []
    for b in range(BATCH):
        slots = [int(whole(order)[b, i]) for i in range(rank * part, (rank + 1) * part)]
        rows.append(torch.stack([table[int(whole(positions)[b, slot])] for slot in slots]))
    return torch.stack(rows)


ORDERS = {
    "none": None,
    "shared": orders(1)[0],
    "shared_row": orders(1),
    "each": orders(BATCH),
    "int32": orders(BATCH).int(),
}
POSITIONS = {
    "none": None,
    "shared": torch.arange(SEQ) % 5,
    "each": torch.arange(SEQ) % torch.tensor([[3], [5], [16]]),
}


@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_values(rope: Any, order: str, positions: str, shard: tuple[int, int]) -> None:
    module, lifted = rope
    feed = lifted.feed(BATCH, SEQ, order=ORDERS[order], positions=POSITIONS[positions], shard=shard)
    expected = brute(module.freqs_cis, ORDERS[order], POSITIONS[positions], shard)
    assert feed.keys() == {"lifted_freqs_cis"}
    assert torch.equal(feed["lifted_freqs_cis"], expected)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_indices(masked: Any, order: str, positions: str) -> None:
    """Positions follow the position ids, slots do not."""
    feed = masked.feed(BATCH, SEQ, order=ORDERS[order], positions=POSITIONS[positions])
    iota = torch.arange(SEQ)
    assert torch.equal(feed["lifted_positions"], brute(iota, ORDERS[order], POSITIONS[positions]))
    for name in ("lifted_slots", "lifted_slots_keys"):
        assert torch.equal(feed[name], brute(iota, ORDERS[order], None))
        assert feed[name].dtype == torch.int64


@pytest.mark.parametrize("order", ["none", "shared", "shared_row"])
def test_shared_order_costs_no_copies(rope: Any, masked: Any, order: str) -> None:
    for lifted in (rope[1], masked):
        for value in lifted.feed(BATCH, SEQ, order=ORDERS[order]).values():
            assert value.stride(0) == 0 and value.shape[0] == BATCH
    assert all(v.stride(0) != 0 for v in masked.feed(BATCH, SEQ, order=ORDERS["each"]).values())


def test_form_positions() -> None:
    module, ep = export_case("llama_pr1797")
    lifted = bl.lift(ep, form={"freqs_*": "positions"})
    assert [(item.form, item.name) for item in lifted.inputs] == [("positions", "lifted_positions")]
    feed = lifted.feed(BATCH, SEQ, order=ORDERS["each"])
    assert torch.equal(feed["lifted_positions"], ORDERS["each"])
    args, _ = make_inputs("llama_pr1797", BATCH, SEQ)
    assert torch.equal(lifted.program.module()(*args, **lifted.feed(BATCH, SEQ)), module(*args))


def test_natural_tables_are_cached(rope: Any) -> None:
    lifted = rope[1]
    lifted.feed_program.clear_tables()
    first, second = lifted.feed(BATCH, SEQ), lifted.feed(BATCH + 2, SEQ)
    assert first["lifted_freqs_cis"].data_ptr() == second["lifted_freqs_cis"].data_ptr()
    lifted.feed(BATCH, SEQ // 2)
    assert len(lifted.feed_program._tables) == 2


# What is handed out is kept: who writes to it


def test_rows_that_were_written_to_are_made_again() -> None:
    """Those of an order for all samples, and tables that are computed in natural order."""
    rope, masked = (bl.lift(export_case(name)[1]) for name in ("hf_llama", "nanogpt"))
    computed = next(item.name for item in rope.inputs if item.dtype == "float32")
    cases = [(rope, computed, None), (rope, computed, ORDERS["shared"]), (masked, "lifted_slots", ORDERS["shared"])]
    for lifted, name, order in cases:
        feed = lifted.feed(1, SEQ, order=order)
        (before, kept) = (feed[name].clone(), feed[name].data_ptr())
        assert lifted.feed(1, SEQ, order=order)[name].data_ptr() == kept, "a control: it is kept"
        feed[name].mul_(5)
        again = lifted.feed(1, SEQ, order=order)[name]
        assert torch.equal(again, before) and not torch.equal(feed[name], before)
        assert lifted.feed(1, SEQ, order=order)[name].data_ptr() == again.data_ptr(), "and is kept again"


def test_a_table_of_the_program_that_was_written_to_is_refused() -> None:
    """In natural order a feed is a view of the model's own buffer; whatever length is fed next."""
    lifted = bl.lift(export_case("llama_pr1797")[1])
    feed = lifted.feed(1, SEQ)["lifted_freqs_cis"]
    right = feed.clone()
    feed[:, 2:].mul_(5)
    for length, order in ((SEQ, None), (SEQ // 2, None), (SEQ, ORDERS["shared"])):
        with pytest.raises(bl.FeedError, match=r"'freqs_cis', a table of the program, was written to .* clone\(\)"):
            lifted.feed(2, length, order=order)
    with pytest.raises(bl.FeedError):
        copy.copy(lifted).feed(1, SEQ)
    table = lifted.feed_program.state["freqs_cis"].clone()
    table[:SEQ] = right[0]
    lifted.bind_tables({"freqs_cis": table})
    assert torch.equal(lifted.feed(1, SEQ)["lifted_freqs_cis"], right)


@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_table_that_its_owner_changes_is_read_again(how: str) -> None:
    """Also what was kept of it: a checkpoint may be loaded between two steps."""
    lifted = bl.lift(export_case("llama_pr1797")[1])
    state = lifted.feed_program.state["freqs_cis"]
    before = [lifted.feed(1, SEQ, order=order)["lifted_freqs_cis"].clone() for order in (None, ORDERS["shared"])]
    if how == "in place":
        state.mul_(2)
    else:
        state.data = state * 2
    for order, old in zip((None, ORDERS["shared"]), before, strict=True):
        assert torch.equal(lifted.feed(1, SEQ, order=order)["lifted_freqs_cis"], old * 2)
    twin = copy.deepcopy(lifted.feed_program)
    assert twin._originals is not lifted.feed_program._originals
    with torch.inference_mode():
        assert torch.equal(bl.lift(export_case("llama_pr1797")[1]).feed(1, SEQ)["lifted_freqs_cis"], before[0])


def test_head_tail_balancer(rope: Any) -> None:
    module, lifted = rope
    size = 2
    balancer = _load_balancer._HeadTailLoadBalancer(SEQ, size, torch.device("cpu"))
    quarter = SEQ // (2 * size)
    chunks = torch.arange(SEQ).view(2 * size, quarter)
    for rank in range(size):
        slots = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        feed = lifted.feed(BATCH, SEQ, order=balancer, shard=(rank, size))
        assert torch.equal(feed["lifted_freqs_cis"], module.freqs_cis[slots].expand(BATCH, -1, -1))


def test_per_document_balancer(rope: Any) -> None:
    module, lifted = rope
    lengths = [[8, 8], [4, 12], [16]]
    balancer = _load_balancer._PerDocumentHeadTailLoadBalancer(lengths, 2, torch.device("cpu"))
    order = balancer._generate_indices(restore=False)
    assert order.shape == (BATCH, SEQ) and not torch.equal(order[0], order[1])
    for rank in range(2):
        feed = lifted.feed(BATCH, SEQ, order=balancer, shard=(rank, 2))
        assert torch.equal(feed["lifted_freqs_cis"], brute(module.freqs_cis, order, None, (rank, 2)))


def test_packed_documents_equal_position_ids() -> None:
    """HF finds documents in its position ids; the lifted program takes both from ``positions=``."""
    module, ep = export_case("hf_llama")
    lifted = bl.context_parallel(bl.lift(ep))
    _, kwargs = make_inputs("hf_llama", BATCH, SEQ, seed=4)
    ids = kwargs["input_ids"]
    positions = torch.stack([torch.cat([torch.arange(n) for n in lens]) for lens in ([5, 11], [16], [4, 4, 8])])
    want = module(input_ids=ids, position_ids=positions, use_cache=False).logits
    other = module(input_ids=ids, use_cache=False).logits
    assert (want - other).abs().max() > 1e-3
    program = lifted.program.module()
    got = program(input_ids=ids, **lifted.feed(BATCH, SEQ, positions=positions))
    got = got if isinstance(got, Tensor) else got.logits if hasattr(got, "logits") else got[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    order = orders(BATCH, 8)
    moved = program(input_ids=ids.gather(1, order), **lifted.feed(BATCH, SEQ, positions=positions, order=order))
    moved = moved if isinstance(moved, Tensor) else moved.logits if hasattr(moved, "logits") else moved[0]
    expected = want.gather(1, order[..., None].expand(-1, -1, want.shape[-1]))
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)


def test_shard_inputs() -> None:
    lifted = bl.lift(export_case("llama_masked")[1])
    (ids, mask), _ = make_inputs("llama_masked", BATCH, SEQ)
    order = orders(BATCH)
    for rank in range(2):
        got = lifted.shard_inputs(order=order, shard=(rank, 2), tokens=ids, attention_mask=mask)
        half = order[:, rank * 8 : rank * 8 + 8]
        assert torch.equal(got["tokens"], ids.gather(1, half))
        assert torch.equal(got["attention_mask"], mask.gather(1, order))  # keys want the whole sequence


def test_targets_are_sharded_like_the_tokens() -> None:
    """``target`` is no input of the program: its rows are those of the tokens, with or without further dims."""
    lifted, order = bl.lift(export_case("llama_masked")[1]), orders(BATCH)
    (ids, mask), _ = make_inputs("llama_masked", BATCH, SEQ)
    soft = torch.rand(BATCH, SEQ, 5)
    for rank in range(2):
        half = order[:, rank * 8 : rank * 8 + 8]
        got = lifted.shard_inputs(order=order, shard=(rank, 2), tokens=ids, target=ids + 1)
        assert torch.equal(got["target"], got["tokens"] + 1)
        alone = lifted.shard_inputs(order=order, shard=(rank, 2), target=soft)["target"]
        assert torch.equal(alone, soft.gather(1, half[..., None].expand(-1, -1, 5)))
    for target, words in ((ids[:, :-1], "a length of axis 'seq'"), (ids[0], "no sequence dim 1")):
        with pytest.raises(bl.FeedError, match=words):
            lifted.shard_inputs(order=order, shard=(0, 2), tokens=ids, attention_mask=mask, target=target)
