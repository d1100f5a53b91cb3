"""Context-parallel ranks beyond parity: what one token reaches with and without them, and misuse that fails at once.

What a token reaches is where other tools fail silently: a hook that makes every layer fully causal lets tokens see
beyond their window, and keys of other documents. Run in lockstep in one process, and on four gloo processes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cp_worker
import pytest
import torch
from cp_probes import PERTURBED, SIZES, moved, probe_inputs, sized_step
from cp_worker import ORDERS, WORLD, Cell, cp_program, order_of, slots_of, unlifted_feed
from parity_cells import TOLERANCE
from parity_models import (
    BATCH,
    DOCUMENTS,
    IGNORED,
    MODELS,
    PROBED,
    SEQ,
    WINDOW,
    Reference,
    build,
    cross_entropy_sum,
)
from pipeline_worker import run_cells
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.oracles.lockstep import run_ranks
from buffer_lifting.oracles.running import runnable
from buffer_lifting.stage_inputs import check_inputs_of

#: Seconds for the processes of one test.
BUDGET = 200.0

Slots = list[list[int]]
PACKED, WINDOWED = PROBED


@cache
def eager(model: str) -> Slots:
    """The slots that the perturbed token moves in the eager model, on one process."""
    module = build(PROBED[model])
    with torch.no_grad():
        before, after = (module(**inputs).logits for inputs in probe_inputs(PROBED[model]))
    return moved(before, after, torch.arange(SEQ).expand(BATCH, SEQ))


def lockstep(model: str, cp: int, order: str, lifted: bool = True) -> Slots:
    """The same on ``cp`` context-parallel ranks; with the lift disabled if not ``lifted``."""
    program = cp_program(model, cp)
    ready = runnable(program.program)
    runs = []
    for inputs in probe_inputs(PROBED[model]):
        values = []
        for rank in range(cp):
            shard = (rank, cp)
            own = program.shard_inputs(order=order_of(order, cp), shard=shard, **inputs)
            if lifted:
                feed = program.feed(BATCH, SEQ, inputs=inputs, order=order_of(order, cp), shard=shard)
            else:
                feed = unlifted_feed(program, inputs, own)
            values.append({**own, **feed})
        with torch.no_grad():
            runs.append(torch.cat([outputs[0] for outputs in run_ranks(ready, values)[0]], 1))
    return moved(*runs, torch.cat([slots_of(order, cp, rank) for rank in range(cp)], 1))


def documents() -> Slots:
    """The slots of the perturbed token's document that are not before it."""
    return [list(range(PERTURBED, sample[0])) for sample in DOCUMENTS]


def window() -> Slots:
    """The slots whose window has the perturbed token."""
    return [list(range(PERTURBED, PERTURBED + WINDOW))] * BATCH


def test_without_context_parallelism_a_token_reaches_its_document_and_its_window() -> None:
    """The probe itself, on the eager models."""
    assert eager(PACKED) == documents()
    assert eager(WINDOWED) == window()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [2, 4])
def test_a_token_of_the_first_document_reaches_no_other_document(cp: int, order: str) -> None:
    """Packed documents: as many positions change as without context parallelism, none of them in other documents."""
    assert lockstep(PACKED, cp, order) == documents()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cp", [2, 4])
def test_a_token_reaches_its_window_only(cp: int, order: str) -> None:
    """One sliding-window layer: only positions within the window change."""
    assert lockstep(WINDOWED, cp, order) == window()


@pytest.mark.parametrize("model", PROBED)
def test_with_the_lift_disabled_a_token_reaches_others(model: str) -> None:
    """A control: the probes see masks that do not follow the slots."""
    assert lockstep(model, 2, "head-tail", lifted=False) != eager(model)
    assert lockstep(model, 4, "random", lifted=False) != eager(model)


PROBES = tuple(Cell(model, "probe", 1, 4, order) for model in PROBED for order in ("head-tail", "per-document"))
FAILURES = Cell("llama_pr1797", "failures", 1, 4)
ONE_WRONG = Cell("llama_pr1797", "one wrong feed", 1, 4)
LENGTHS = Cell("llama_pr1797", "lengths", 2, 2)


@pytest.fixture(scope="module")
def on_gloo(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Any]:
    """What the ranks recorded, all in one set of four processes."""
    directory = tmp_path_factory.mktemp("ranks")
    return run_cells((*PROBES, FAILURES, LENGTHS), directory, BUDGET, cp_worker.launch, WORLD)


def ranks_of(cell: Cell, results: dict[Cell, Any]) -> list[dict[str, Any]]:
    """The records of a cell; without them its test fails."""
    result = results.get(cell, f"no result within {BUDGET} seconds")
    if isinstance(result, str):
        pytest.fail(result, pytrace=False)
    return result


@pytest.mark.multiprocess
@pytest.mark.timeout(BUDGET + 60)
@pytest.mark.parametrize("cell", PROBES, ids=lambda cell: cell.name)
def test_a_token_reaches_the_same_on_gloo(cell: Cell, on_gloo: dict[Cell, Any]) -> None:
    """The probes on four processes."""
    ranks = ranks_of(cell, on_gloo)
    together = [sorted(slot for rank in ranks for slot in rank["moved"][sample]) for sample in range(BATCH)]
    assert together == eager(cell.model)


#: What is attempted on every rank -> the error's type, and words of its message; ``{rank}`` is the rank.
MISUSE = {
    "one process": ("PartitionError", ("4 context-parallel ranks, not in one process",)),
    "no mesh": ("PartitionError", ("4 context-parallel ranks", "give build_stage a mesh")),
    "group alone": ("PartitionError", ("4 context-parallel ranks", "give build_stage a mesh")),
    "mesh without cp": ("PartitionError", ("rank {rank}", "no 'cp' dim", "it has pp")),
    "mesh without pp": ("PartitionError", ("no 'pp' dim",)),
    "mesh of another size": ("PartitionError", ("rank {rank}", "2 ranks along 'cp'", "made for 4")),
    "no such stage": ("PartitionError", ("no stage 7",)),
    "feed: length does not divide": ("FeedError", ("sequence of 30", "4 shards")),
    "inputs: length does not divide": ("FeedError", ("sequence of 30", "4 shards")),
    "feed: shard of another size": ("FeedError", ("shard has size 2", "size of 4")),
    "feed: no shard": ("FeedError", ("shard has size 1", "size of 4")),
    "feed: mesh of another size": ("FeedError", ("size 2", "size of 4")),
    "feed: rank outside": ("FeedError", ("outside 0..3",)),
    "feed: order of another length": ("FeedError", ("(16,)", "(32,)")),
    "step: feed of another length": ("FeedError", ("rank {rank}", "lifted_freqs_cis")),
    "step: a feed is missing": ("FeedError", ("rank {rank}", "lifted_freqs_cis")),
}


@pytest.mark.multiprocess
@pytest.mark.timeout(BUDGET + 60)
@pytest.mark.parametrize("attempt", MISUSE)
def test_misuse_is_an_error_at_once_on_every_rank(attempt: str, on_gloo: dict[Cell, Any]) -> None:
    """It names the rank and the tensor where it can, and nobody waits for a message."""
    kind, words = MISUSE[attempt]
    ranks = ranks_of(FAILURES, on_gloo)
    assert set(ranks[0]["raised"]) == set(MISUSE)
    for rank, record in enumerate(ranks):
        raised = record["raised"][attempt]
        assert raised["type"] == kind, raised
        for word in words:
            assert word.format(rank=rank) in raised["message"], raised
        assert raised["seconds"] < 10


@pytest.mark.multiprocess
@pytest.mark.timeout(BUDGET + 60)
def test_a_runner_that_compares_ranks_refuses_the_step_on_all(on_gloo: dict[Cell, Any]) -> None:
    """One rank has a wrong feed. The others, whose pipeline it is not in, wait for its keys: they are told."""
    for rank, record in enumerate(ranks_of(FAILURES, on_gloo)):
        raised = record["runner"]
        assert raised["type"] == "FeedError", raised
        why = "'lifted_freqs_cis'" if rank == WORLD - 1 else f"rank {WORLD - 1} refused the step"
        assert why in raised["message"] and f"rank {rank}: " in raised["message"], raised
        assert raised["seconds"] < 10


@pytest.mark.multiprocess
@pytest.mark.timeout(BUDGET + 60)
def test_steps_of_other_sizes_on_a_mesh(on_gloo: dict[Cell, Any]) -> None:
    """A runner on pp 2 x cp 2: each step has the loss and every gradient of the eager model in one process."""
    ranks = ranks_of(LENGTHS, on_gloo)
    module = build(MODELS[LENGTHS.model])
    for number in range(len(SIZES)):
        tokens, target, _ = sized_step(number)
        module.zero_grad()
        loss = cross_entropy_sum(module(tokens), target) / (target != IGNORED).sum()
        loss.backward()
        expected = Reference(float(loss.detach()), {fqn: p.grad for fqn, p in module.named_parameters()})
        seen = set()
        for record in ranks:
            step = record["steps"][number]
            seen |= step["gradients"].keys()
            for fqn, gradient in step["gradients"].items():
                assert expected.error(fqn, gradient) <= TOLERANCE["float32"], (number, fqn)
        assert seen == expected.gradients.keys()
        losses = [record["steps"][number]["loss"] for record in ranks]
        assert losses[:2] == [None, None]
        assert losses[2:] == pytest.approx([expected.loss] * 2, rel=1e-6)


def test_a_stage_refuses_inputs_that_disagree() -> None:
    """Before it computes: missing inputs, and sizes of inputs or activations that do not fit each other."""
    _, program = export_case("llama_pr1797")
    staged = bl.partition(bl.context_parallel(bl.lift(program), size=1), num_stages=2)
    first, second = staged.stages
    for stage in (first, second, second):
        check_inputs_of(staged.lifted, stage)
    assert len(second.module._forward_pre_hooks) == 1
    tokens = torch.arange(22).view(2, 11)
    feed, longer, more = staged.feed(2, 11), staged.feed(2, 12), staged.feed(3, 11)
    hidden = first.module(tokens, **feed)
    assert torch.equal(second.module(hidden, **feed), staged(tokens, **feed))
    with pytest.raises(bl.FeedError, match=r"stage 0 is not given 'lifted_freqs_cis'"):
        first.module(tokens)
    with pytest.raises(bl.FeedError, match=r"'lifted_\w+' \(2, 12.*but 'tokens' \(2, 11\) has 11.*axis 'seq'"):
        first.module(tokens, **longer)
    with pytest.raises(bl.FeedError, match=r"'lifted_\w+' \(3, 11.*disagree about the batch"):
        first.module(tokens, **more)
    with pytest.raises(bl.FeedError, match=r"stage 1 gets '\w+' \(2, 11, 32\).*makes it \(2, 12, 32\)"):
        second.module(hidden, **longer)
    with pytest.raises(bl.FeedError, match=r"stage 1 gets '\w+' \(2, 11, 32\).*makes it \(3, 11, 32\)"):
        second.module(hidden, **more)


@pytest.mark.multiprocess
@pytest.mark.timeout(BUDGET + 60)
def test_one_rank_with_a_wrong_feed_stops_all(tmp_path: Path) -> None:
    """The rank that sees it says so; its peers, which wait for its keys, end with it and do not hang."""
    result = run_cells([ONE_WRONG], tmp_path, BUDGET, cp_worker.launch, WORLD)[ONE_WRONG]
    assert isinstance(result, str)
    assert "FeedError: rank 3: 'lifted_freqs_cis'" in result
