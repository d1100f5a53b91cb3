"""What must hold for a random program: it is refused with a reason, or it is lifted and every oracle agrees."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import buffer_lifting as bl

from .build import Net, axes_of, export_spec, make_inputs
from .reads import Inputs
from .spec import FEATURES, Spec

VERIFIED, REFUSED, FAILED, NOT_EXPORTED = "verified", "refused", "failed", "not exported"
SQUARE = "square_mask"
RANKS = 2
ROUNDED = 3e-2  # where a matmul is in bfloat16
TOLERANCE = 1e-4  # float32; a wrong row is off by far more


@dataclass(frozen=True)
class Outcome:
    """What came of one spec: its status, the codes of a refusal, the reason, and how long it took.

    ``inputs``: how many were lifted. ``ranks``: what came of two context-parallel ranks, ``verified``, ``refused``
    (BL203) or ``""`` (a static program, which has none). ``unproven``: checks whose controls moved nothing at all.
    """

    spec: Spec
    status: str
    code: str = ""
    detail: str = ""
    seconds: float = 0.0
    inputs: int = 0
    ranks: str = ""
    unproven: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.status} {self.code} {self.detail}\n  {self.spec!r}"


def judge(spec: Spec, by_hand: bool = True) -> Outcome:
    """Exports, lifts, splits and verifies one module; never raises.

    Args:
        spec: the module.
        by_hand: also compare with the module itself, run eagerly: the oracle that shares no code with the library.
    """
    began = time.process_time()
    try:
        module, program = export_spec(spec)
    except Exception as error:  # whatever torch.export cannot do is no concern of the library
        return Outcome(spec, NOT_EXPORTED, type(error).__name__, _line(error), time.process_time() - began)
    outcome = _judged(spec, module, program, by_hand)
    return replace(outcome, seconds=time.process_time() - began)


def _judged(spec: Spec, module: Net, program: torch.export.ExportedProgram, by_hand: bool) -> Outcome:
    stage, ranks, unproven = "lift", "", ()
    try:
        lifted = bl.lift(program, axes=axes_of(spec))
        stage = "context_parallel"
        follows = bl.context_parallel(lifted, size=1)
        stage = "partition"
        staged = bl.partition(follows, num_stages=2)
        stage = "verify"
        unproven = verify(program, staged)
        stage = "by hand"
        count = len(lifted.inputs)
        if count and not spec.positional:
            return Outcome(spec, FAILED, "false lift", ", ".join(item.name for item in lifted.inputs), inputs=count)
        for oracle, made in ((equivariance_error, staged), (shard_error, lifted)) if by_hand else ():
            error = oracle(spec, module, made)
            if error > tolerance(spec):
                detail = f"off by {error:.2e} although verify passed: a silent error"
                return Outcome(spec, FAILED, oracle.__name__, detail, inputs=count)
        if spec.dynamic:
            stage = "two ranks"
            ranks, silent = verify_ranks(spec, program, lifted)
            unproven += silent
        return Outcome(spec, VERIFIED, inputs=count, ranks=ranks, unproven=unproven)
    except bl.LiftingError as error:
        if stage in ("verify", "by hand", "two ranks"):
            return Outcome(spec, FAILED, f"{stage}: {type(error).__name__}", _line(error))
        return Outcome(spec, REFUSED, _codes(program, spec, stage, error), _line(error))
    except Exception as error:  # any other error is a bug: it is counted, not raised, so that a campaign goes on
        return Outcome(spec, FAILED, f"{stage}: {type(error).__name__}", _line(error))


def verify(
    program: torch.export.ExportedProgram, made: bl.StagedProgram | bl.LiftedProgram, **options: Any
) -> tuple[str, ...]:
    """``bl.verify``; a control that moves nothing is no error of the lift (a mask that is true at every position).

    Returns:
        The checks that failed for that reason alone.
    """
    try:
        bl.verify(program, made, **options)
    except bl.VerificationError as error:
        failed = [check for check in error.report.checks if not check.passed] if error.report else []
        if not failed or any("proves nothing" not in check.detail for check in failed):
            raise
        return tuple(check.name for check in failed)
    return ()


def verify_ranks(
    spec: Spec, program: torch.export.ExportedProgram, lifted: bl.LiftedProgram
) -> tuple[str, tuple[str, ...]]:
    """Two context-parallel ranks in lockstep, outputs and gradients, on one small case.

    Returns:
        ``verified`` or, where an op is right on one rank only (BL203), ``refused``; and the unproven checks.
    """
    try:
        parallel = bl.context_parallel(lifted, size=RANKS)
    except bl.UnsupportedReadError as error:
        if "BL203" not in str(error):
            raise
        return REFUSED, ()
    inputs = make_inputs(spec, 2, 3 * RANKS)
    case = ((inputs.pop("ids"),), inputs)
    return VERIFIED, verify(program, parallel, inputs=[case], checks=("shards",))


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines[:3])[:400]


def _codes(program: torch.export.ExportedProgram, spec: Spec, stage: str, error: Exception) -> str:
    if stage != "lift":
        return f"{stage}: {type(error).__name__}"
    report = bl.scan(program, axes=axes_of(spec))
    return ", ".join(sorted({item.code for item in report.refused})) or type(error).__name__


def permuted(inputs: Inputs, order: Tensor) -> Inputs:
    """Whole inputs with the tokens of each sample in its own order."""
    result = {}
    for name, value in inputs.items():
        if name in FEATURES:
            result[name] = value
            continue
        index = order
        if name == SQUARE:
            value = value.gather(2, order[:, None, :].expand_as(value))
            index = order[:, :, None].expand_as(value)
        result[name] = value.gather(1, index)
    return result


def equivariance_error(spec: Spec, module: Net, staged: bl.StagedProgram, seed: int = 7) -> float:
    """The module itself in natural order against the stages on permuted tokens; relative to the largest output.

    At a batch and length that are not those of the export, where the program is dynamic.
    """
    batch, seq = (3, spec.seq + 2) if spec.dynamic else (spec.batch, spec.seq)
    whole = make_inputs(spec, batch, seq, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(seq, generator=generator) for _ in range(batch)])
    feed = staged.feed(batch_size=batch, seq_len=seq, order=order, inputs=whole)
    with torch.no_grad():
        expected = _parts(module(**whole))
        actual = _parts(staged(**permuted(whole, order), **feed))
    expected[0] = expected[0].gather(1, order[..., None].expand_as(expected[0]))
    return max(_relative(mine, wanted) for mine, wanted in zip(actual, expected, strict=True))


def tolerance(spec: Spec) -> float:
    """By how much eager results may differ, relative to the largest."""
    return ROUNDED if any(row.region == "autocast" for row in spec.rows) else TOLERANCE


def _parts(output: Any) -> list[Tensor]:
    """The logits, and the loss if there is one."""
    return list(output) if isinstance(output, tuple | list) else [output]


def _relative(mine: Tensor, wanted: Tensor) -> float:
    return float((mine - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))


def shard_error(spec: Spec, module: Net, lifted: bl.LiftedProgram, ranks: int = RANKS) -> float:
    """The module itself on whole sequences against the lifted program on each shard of them.

    With dynamic shapes and without attention, whose keys it does not exchange: ``verify_ranks`` does. It sees what
    permutations cannot: the length of a shard in the place of that of the sequence.
    """
    if spec.attends or not spec.dynamic:
        return 0.0
    batch, part = 3, 4
    whole = make_inputs(spec, batch, part * ranks)
    program = lifted.program.module(check_guards=False)
    worst = 0.0
    with torch.no_grad():
        expected = _parts(module(**whole))[0]  # a loss of several ranks is a sum: left to verify_ranks
        for rank in range(ranks):
            own = slice(part * rank, part * (rank + 1))
            try:
                feed = lifted.feed(batch, part * ranks, inputs=whole, shard=(rank, ranks))
            except bl.FeedError as error:
                if "keys of the whole sequence" in str(error):
                    return 0.0  # context_parallel gives the program its keys: left to verify_ranks
                raise
            given = {name: value if name in FEATURES else value[:, own] for name, value in whole.items()}
            ids = given.pop("ids")
            logits = _parts(program(ids, **given, **feed))[0]
            worst = max(worst, float((logits - expected[:, own]).abs().max()))
    return worst / float(expected.abs().max().clamp_min(1e-3))
