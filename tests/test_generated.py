"""Random programs: none may be wrong, most must lift, and seeded faults of every pattern class are caught."""

from __future__ import annotations

import pytest
import torch
from generator.build import export_spec
from generator.campaign import campaign, lifted_share, summary
from generator.judge import FAILED, NOT_EXPORTED, VERIFIED, Outcome, judge
from generator.mutations import CLASSES, mutations
from generator.singles import singles
from generator.spec import Spec

import buffer_lifting as bl

PROGRAMS = 2000
QUICK = 60


def worst(outcomes: list[Outcome]) -> str:
    """The failures with the shortest specs first: ``judge(spec)`` repeats one."""
    failed = sorted((o for o in outcomes if o.status == FAILED), key=lambda outcome: len(repr(outcome.spec)))
    return "\n".join([f"{len(failed)} of {len(outcomes)} programs failed:", *map(str, failed[:5])]) if failed else ""


def test_random_programs_are_refused_or_right() -> None:
    """The same few programs each time."""
    outcomes = campaign(seed=1, count=QUICK, workers=2)
    assert len(outcomes) == QUICK
    assert not worst(outcomes), worst(outcomes)


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


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "spec"), [pytest.param(n, s, id=n) for n, s in singles()])
def test_every_class_by_itself(name: str, spec: Spec) -> None:
    """Refused or right, each feature alone: the shortest repros."""
    outcome = judge(spec)
    assert outcome.status != FAILED, outcome


@pytest.mark.parametrize("name", CLASSES)
def test_seeded_faults_are_caught(name: str) -> None:
    """At least four faults of each pattern class, at the feed or in the graph."""
    spec = CLASSES[name]
    _, program = export_spec(spec)
    lifted = bl.lift(program)
    assert bl.verify(program, lifted, checks=("values", "equivariance")).passed
    survived, count = [], 0
    for fault, mutate in mutations(lifted, spec):
        count += 1
        mutant = mutate(bl.lift(program))
        try:
            bl.verify(program, mutant, checks=("values",))
        except bl.VerificationError:
            continue
        survived.append(fault)
    assert count >= 4
    assert not survived


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
