"""Random programs: none may be wrong, most must lift, and seeded faults of every pattern class are caught."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import routing_models
import torch
from generator.build import export_spec
from generator.campaign import campaign, lifted_share, summary, unproven_share
from generator.handmade import AXES
from generator.judge import FAILED, NOT_EXPORTED, REFUSED, VERIFIED, Outcome, judge
from generator.mutations import CAUSAL, mutations, off_by_one_label, own_keys, programs
from generator.singles import REFUSALS, singles
from generator.spec import LENGTHS, LOSSES, Mask, Row, Spec
from routing_faults import CapacityByRank, RunningSumOfRows, ShiftedRows, UnsortedByOrder
from routing_models import Experts
from torch.export import ExportedProgram

import buffer_lifting as bl

PROGRAMS = 2000
QUICK = 60
UNPROVEN = (
    0.05  # of the programs may have a check whose controls move nothing: a length alone, a mask that hides nothing
)
ROUTING = [CapacityByRank, RunningSumOfRows, ShiftedRows, UnsortedByOrder]


def worst(outcomes: list[Outcome]) -> str:
    """The failures with the shortest specs first: ``judge(spec)`` repeats one."""
    failed = sorted((o for o in outcomes if o.status == FAILED), key=lambda outcome: len(repr(outcome.spec)))
    return "\n".join([f"{len(failed)} of {len(outcomes)} programs failed:", *map(str, failed[:5])]) if failed else ""


def test_random_programs_are_refused_or_right() -> None:
    """The same few programs each time."""
    outcomes = campaign(seed=1, count=QUICK, workers=2)
    assert len(outcomes) == QUICK
    assert not worst(outcomes), worst(outcomes)
    assert unproven_share(outcomes) <= UNPROVEN
    assert sum(outcome.ranks == VERIFIED for outcome in outcomes) > QUICK // 3


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_thousand_random_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """On two processes. No silent error, no crash, and nine of ten are lifted; prints the share of each class."""
    outcomes = campaign(seed=20, count=PROGRAMS, workers=2)
    with capsys.disabled():
        print("\n" + summary(outcomes))
    assert len({outcome.spec for outcome in outcomes}) >= PROGRAMS
    assert not worst(outcomes), worst(outcomes)
    assert sum(outcome.status == NOT_EXPORTED for outcome in outcomes) < 0.02 * PROGRAMS
    assert lifted_share(outcomes) >= 0.9
    assert unproven_share(outcomes) <= UNPROVEN
    assert sum(outcome.ranks == VERIFIED for outcome in outcomes) > PROGRAMS // 3


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "spec"), [pytest.param(n, s, id=n) for n, s in singles()])
def test_every_class_by_itself(name: str, spec: Spec) -> None:
    """Lifted, each feature alone, but for the refusals written down: the shortest repros."""
    outcome = judge(spec)
    codes = next((codes for pattern, codes in REFUSALS.items() if fnmatch(name, pattern)), "")
    assert (outcome.status, outcome.code) == ((REFUSED, codes) if codes else (VERIFIED, "")), outcome
    assert outcome.ranks in ("", VERIFIED), outcome


@pytest.mark.parametrize("name", programs())
def test_seeded_faults_are_caught(name: str) -> None:
    """At least four faults of each pattern class, at the feed or in the graph."""
    program = programs()[name]()
    lifted = bl.lift(program, axes=AXES.get(name))
    assert bl.verify(program, lifted, checks=("values", "equivariance")).passed
    survived, count = [], 0
    for fault, mutate in mutations(lifted):
        count += 1
        mutant = mutate(bl.lift(program, axes=AXES.get(name)))
        try:
            bl.verify(program, mutant, checks=("values",))
        except bl.VerificationError:
            continue
        survived.append(fault)
    assert count >= 4
    assert not survived


def caught(program: ExportedProgram, made: bl.LiftedProgram, check: str) -> None:
    """One oracle objects, and not because it proves nothing or cannot run."""
    with pytest.raises(bl.VerificationError, match=f"{check} does not hold") as raised:
        bl.verify(program, made, checks=(check,))
    assert "is off by" in str(raised.value), raised.value


@pytest.mark.parametrize("fault", CAUSAL)
def test_faults_of_a_causal_flag_are_caught(fault: str) -> None:
    """No tensor is read by position: the mask that takes the place of the flag is what can be wrong."""
    _, program = export_spec(Spec(mask=Mask("is_causal")))
    assert bl.verify(program, bl.context_parallel(bl.lift(program), size=1), checks=("equivariance",)).passed
    wrong = bl.context_parallel(bl.lift(program), size=1)
    caught(program, CAUSAL[fault](wrong), "equivariance")


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_of_a_shard_is_caught(length: str) -> None:
    """``log S`` and the like: right in every order on one rank, seen on two."""
    _, program = export_spec(Spec(rows=(Row(),), length=length))
    lifted = bl.context_parallel(bl.lift(program), size=2)
    assert bl.verify(program, lifted, checks=("shards",)).passed
    caught(program, own_keys(lifted), "shards")


@pytest.mark.parametrize("kind", LOSSES)
def test_labels_of_other_tokens_are_caught(kind: str) -> None:
    """Off by one in the program: shifted twice, or shifted where they must not be."""
    _, program = export_spec(Spec(rows=(Row(),), loss=kind))
    lifted = bl.context_parallel(bl.lift(program), size=1)
    assert bl.verify(program, lifted, checks=("equivariance",)).passed
    caught(program, off_by_one_label(lifted), "equivariance")


@pytest.mark.parametrize("fault", ROUTING, ids=lambda fault: fault.__name__)
def test_faults_of_routing_are_refused(fault: type[Experts]) -> None:
    """Tokens that other tokens change: the scan objects, and where it is overruled the equivariance oracle does."""
    program = routing_models.export(fault, dynamic=True, layers=1)
    with pytest.raises(bl.UnsupportedReadError):
        bl.lift(program)
    caught(program, bl.context_parallel(bl.lift(program, strict=False), size=1), "equivariance")


def test_the_judge_sees_a_silent_error() -> None:
    """The oracle that shares no code with the library, on a program whose feed is in natural order."""
    import mutants as m
    from generator.judge import TOLERANCE, equivariance_error, shard_error
    from generator.singles import PLAIN

    spec = Spec(rows=(PLAIN,))
    module, program = export_spec(spec)
    lifted = bl.lift(program)
    follows = bl.context_parallel(lifted, size=1)
    wrong = m.with_feed(follows, m.order_fault(lambda order: None))
    right, bad = (bl.partition(made, num_stages=2) for made in (follows, wrong))
    assert equivariance_error(spec, module, right) < TOLERANCE < equivariance_error(spec, module, bad)
    first = m.with_feed(lifted, lambda streams: m.MutantStreams(streams, streams.order, rank=0))
    assert shard_error(spec, module, lifted) < TOLERANCE < shard_error(spec, module, first)
    assert judge(spec).status == VERIFIED
    assert torch.is_grad_enabled()
