"""What ``cp_worker``'s ranks do besides training: probes of what a token reaches, and steps that must fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from cp_worker import Cell, mesh_of, order_of, slots_of
from parity_models import BATCH, IGNORED, MICROBATCHES, PROBED, SEQ, VOCAB, Model, cross_entropy_sum, step_data
from pipeline_worker import make_schedule
from torch import Tensor

#: The token that the probes perturb, in every sample.
PERTURBED = 2


def probe_inputs(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs, and the same with another token in slot ``PERTURBED``."""
    inputs, _ = step_data(model)
    tokens = inputs["input_ids"].clone()
    tokens[:, PERTURBED] = (tokens[:, PERTURBED] - 3 + 1) % (VOCAB - 3) + 3
    return inputs, {**inputs, "input_ids": tokens}


def moved(before: Tensor, after: Tensor, slots: Tensor) -> list[list[int]]:
    """The slots whose logits ``[B, s, V]`` changed, by sample; ``slots`` is int64 ``[B, s]``."""
    changed = (before != after).any(-1)
    return [sorted(own[where].tolist()) for own, where in zip(slots, changed, strict=True)]


def probe(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """The slots of this rank that one perturbed token moves, through the stage that has the whole model."""
    stage = staged.build_stage(0, "cpu", mesh=mesh_of(cell.pp, cell.cp))
    order, shard = order_of(cell.order, cell.cp), (rank % cell.cp, cell.cp)
    logits = []
    for inputs in probe_inputs(PROBED[cell.model]):
        own = staged.shard_inputs(order=order, shard=shard, **inputs)
        feed = staged.feed(BATCH, SEQ, inputs=inputs, order=order, shard=shard)
        with torch.no_grad():
            logits.append(stage.submod(**own, **feed))
    return {"moved": moved(*logits, slots_of(cell.order, cell.cp, rank % cell.cp))}


def failures(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """What each misuse raises on this rank, and after how many seconds.

    No attempt communicates but the last one: a runner that compares the ranks, of which the last has a wrong feed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import Schedule1F1B

    import buffer_lifting as bl

    mesh = mesh_of(cell.pp, cell.cp)
    only_pp = init_device_mesh("cpu", (4,), mesh_dim_names=("pp",))
    only_cp = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    other = mesh_of(2, 2)
    inputs, target = step_data(_model(cell))
    own = staged.shard_inputs(shard=(rank, cell.cp), **inputs)
    right = staged.feed(BATCH, SEQ, inputs=inputs, shard=(rank, cell.cp))
    longer = staged.feed(BATCH, 2 * SEQ, shard=(rank, cell.cp))

    def step(feed: dict[str, Tensor]) -> None:
        stage = staged.build_stage(0, "cpu", mesh=mesh)
        spec = staged.kwargs_chunk_spec({**own, **feed})
        schedule = make_schedule("Schedule1F1B", [stage], MICROBATCHES, cross_entropy_sum, spec)
        schedule.step(target=target, **own, **feed)

    attempts: dict[str, Callable[[], Any]] = {
        "one process": lambda: staged(**inputs, **right),
        "no mesh": lambda: staged.build_stage(0, "cpu"),
        "group alone": lambda: staged.build_stage(0, "cpu", group=torch.distributed.group.WORLD),
        "mesh without cp": lambda: staged.build_stage(0, "cpu", mesh=only_pp),
        "mesh without pp": lambda: staged.build_stage(0, "cpu", mesh=only_cp),
        "mesh of another size": lambda: staged.build_stage(0, "cpu", mesh=other),
        "no such stage": lambda: staged.build_stage(7, "cpu", mesh=mesh),
        "feed: length does not divide": lambda: staged.feed(BATCH, SEQ - 2, shard=(rank, cell.cp)),
        "inputs: length does not divide": lambda: staged.shard_inputs(
            shard=(rank, cell.cp), **{name: value[:, :-2] for name, value in inputs.items()}
        ),
        "feed: shard of another size": lambda: staged.feed(BATCH, SEQ, shard=(rank % 2, 2)),
        "feed: no shard": lambda: staged.feed(BATCH, SEQ),
        "feed: mesh of another size": lambda: staged.feed(BATCH, SEQ, shard=other["cp"]),
        "feed: rank outside": lambda: staged.feed(BATCH, SEQ, shard=(cell.cp, cell.cp)),
        "feed: order of another length": lambda: staged.feed(
            BATCH, SEQ, order=torch.arange(SEQ // 2), shard=(rank, cell.cp)
        ),
        "step: feed of another length": lambda: step(longer),
        "step: a feed is missing": lambda: step({name: right[name] for name in list(right)[1:]}),
    }
    found = {name: _raised(attempt) for name, attempt in attempts.items()}
    runner = bl.StepRunner(
        staged,
        Schedule1F1B,
        "cpu",
        n_microbatches=MICROBATCHES,
        loss_fn=cross_entropy_sum,
        mesh=mesh,
        compare_ranks=True,
    )
    feed = longer if rank == cell.cp - 1 else right
    return {"raised": found, "runner": _raised(lambda: runner.step(target=target, **own, **feed))}


def one_wrong_feed(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """A step in which the last rank has the feed of another length: it fails there, and its peers may not hang."""
    inputs, target = step_data(_model(cell))
    shard = (rank, cell.cp)
    own = staged.shard_inputs(shard=shard, **inputs)
    feed = staged.feed(BATCH, SEQ * (2 if rank == cell.cp - 1 else 1), shard=shard)
    stage = staged.build_stage(0, "cpu", mesh=mesh_of(cell.pp, cell.cp))
    spec = staged.kwargs_chunk_spec({**own, **feed})
    schedule = make_schedule("Schedule1F1B", [stage], MICROBATCHES, cross_entropy_sum, spec)
    schedule.step(target=target[:, : SEQ // cell.cp], **own, **feed)
    return {}


#: Batch and length of each step of :func:`lengths`: they grow, shrink and come back.
SIZES = ((4, 16), (8, 32), (4, 32), (4, 16))


def sized_step(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(tokens, target, order)`` of a step, ``[B, S]`` each: another order and other ignored targets a sample."""
    (batch, seq), generator = SIZES[number], torch.Generator().manual_seed(400 + number)
    tokens = torch.randint(3, VOCAB, (batch, seq), generator=generator)
    target = torch.randint(3, VOCAB, (batch, seq), generator=generator)
    target[torch.rand(batch, seq, generator=generator) < 0.3] = IGNORED
    return tokens, target, torch.stack([torch.randperm(seq, generator=generator) for _ in range(batch)])


def lengths(cell: Cell, staged: Any, rank: int) -> dict[str, Any]:
    """Steps of other sizes on one runner: the loss of each, and this rank's gradients by the eager model's names."""
    from torch.distributed.pipelining import Schedule1F1B

    import buffer_lifting as bl

    mesh = mesh_of(cell.pp, cell.cp)
    shard = mesh["cp"]
    loss_fn = bl.TokenLoss(shard, MICROBATCHES, loss=cross_entropy_sum)
    runner = bl.StepRunner(staged, Schedule1F1B, "cpu", n_microbatches=MICROBATCHES, loss_fn=loss_fn, mesh=mesh, keep=2)
    steps = []
    for number, (batch, seq) in enumerate(SIZES):
        tokens, target, order = sized_step(number)
        own = staged.shard_inputs(order=order, shard=shard, tokens=tokens, target=target)
        feed = staged.feed(batch, seq, order=order, shard=shard)
        if runner.has_last:
            loss_fn.begin(own["target"])
        losses: list[Tensor] = []
        runner.step(**own, **feed, losses=losses, seq_len=seq)
        loss_fn.reduce_gradients(runner.parameters())
        modules = runner.modules.values()
        steps.append(
            {
                "loss": float(loss_fn.total(losses)) if runner.has_last else None,
                "gradients": {fqn: p.grad for module in modules for fqn, p in module.named_parameters()},
            }
        )
        for parameter in runner.parameters():
            parameter.grad = None
    return {"steps": steps}


def _model(cell: Cell) -> Model:
    from parity_models import MODELS

    return MODELS[cell.model]


def _raised(attempt: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        attempt()
        what, message = "nothing", ""
    except Exception as error:
        what, message = type(error).__name__, str(error)
    return {"type": what, "message": message, "seconds": time.monotonic() - began}
