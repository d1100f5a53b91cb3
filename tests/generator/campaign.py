"""Many random programs: drawn, judged in worker processes, and counted by class."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import hypothesis
import torch
from hypothesis import HealthCheck, Phase

from .judge import FAILED, NOT_EXPORTED, REFUSED, VERIFIED, Outcome, judge
from .spec import Spec, classes
from .strategies import specs


def draw_specs(seed: int, count: int) -> list[Spec]:
    """``count`` different specs, always the same for a seed.

    More are drawn than are used, and shuffled: hypothesis varies what it has drawn, so neighbours are alike.
    """
    drawn: dict[Spec, None] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=3 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(specs())
    def collect(spec: Spec) -> None:
        drawn[spec] = None

    collect()
    chosen = list(drawn)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def judge_all(chosen: Sequence[Spec]) -> list[Outcome]:
    """The outcomes, one after the other, on one core."""
    torch.set_num_threads(1)
    return [judge(spec) for spec in chosen]


def campaign(seed: int, count: int, workers: int, chunk: int = 20) -> list[Outcome]:
    """Outcomes of ``count`` different programs, judged by several processes."""
    chosen = draw_specs(seed, count)
    parts = [chosen[i : i + chunk] for i in range(0, len(chosen), chunk)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [outcome for part in pool.map(judge_all, parts) for outcome in part]


def lifted_share(outcomes: Sequence[Outcome]) -> float:
    """Verified programs among those that could be exported."""
    exported = [outcome for outcome in outcomes if outcome.status != NOT_EXPORTED]
    return sum(outcome.status == VERIFIED for outcome in exported) / max(1, len(exported))


def unproven_share(outcomes: Sequence[Outcome]) -> float:
    """Verified programs with a check whose controls moved nothing, among all verified ones."""
    verified = [outcome for outcome in outcomes if outcome.status == VERIFIED]
    return sum(bool(outcome.unproven) for outcome in verified) / max(1, len(verified))


def summary(outcomes: Sequence[Outcome]) -> str:
    """How often each class is lifted, the worst first, and what refusals say."""
    total: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.status == REFUSED:
            reasons[f"{outcome.code}: {outcome.detail[:150]}"] += 1
        for name in ["all", *classes(outcome.spec)]:
            total[name] += 1
            counts[name, outcome.status] += 1
    lines = [f"{'class':28} programs lifted refused failed  not exported"]

    def share(name: str) -> float:
        return counts[name, VERIFIED] / max(1, total[name] - counts[name, NOT_EXPORTED])

    for name in sorted(total, key=lambda n: (n != "all", share(n), n)):
        cells = [counts[name, status] for status in (VERIFIED, REFUSED, FAILED, NOT_EXPORTED)]
        lines.append(f"{name:28} {total[name]:8} {cells[0]:6} {cells[1]:7} {cells[2]:6} {cells[3]:13}")
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines.append(f"{seconds / max(1, len(outcomes)):.2f} s of one core per program")
    ranks = Counter(outcome.ranks for outcome in outcomes if outcome.ranks)
    lines.append(f"on two ranks: {ranks[VERIFIED]} verified, {ranks[REFUSED]} refused (BL203)")
    unproven = Counter(name for outcome in outcomes for name in outcome.unproven)
    lines.append(f"checks that prove nothing: {dict(unproven)}, {unproven_share(outcomes):.1%} of the programs")
    lines += [f"{count:5} x {reason}" for reason, count in reasons.most_common(30)]
    return "\n".join(lines)
