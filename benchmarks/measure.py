"""The measurements.

Times are CPU seconds of this process, which runs on one thread: other jobs disturb them little.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import torch
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import ExportedProgram

from benchmarks import models
from buffer_lifting.analysis import forget
from buffer_lifting.lifting import lift, scan
from buffer_lifting.partitioner import partition
from buffer_lifting.stages import StagedProgram

OURS = ("scan", "lift", "partition")
T = TypeVar("T")


class BenchmarkError(Exception):
    """What was measured is not what was meant to be measured."""


@dataclass
class Measurement:
    """One model.

    ``samples`` has CPU seconds, one entry a run, of what ran: ``export``, ``scan``, ``lift``, ``partition``,
    ``pipeline`` and ``pipeline_outside_export``. ``collecting`` has, of each of ours, those that
    Python's garbage collector took: it walks every object of the process, and when it does is a matter of
    thresholds.
    """

    layers: int
    nodes: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict)
    collecting: dict[str, list[float]] = field(default_factory=dict)
    pipeline_failure: str | None = None

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def seconds(self) -> dict[str, float]:
        """The median of each, and ``total``: the median over the runs of scan + lift + partition.

        ``total_without_gc`` is the same without what the garbage collector took.
        """
        result = {name: median(values) for name, values in self.samples.items()}
        totals = [sum(run) for run in zip(*(self.samples[name] for name in OURS), strict=True)]
        collecting = [sum(run) for run in zip(*(self.collecting[name] for name in OURS), strict=True)]
        result["total"] = median(totals)
        result["total_without_gc"] = median(a - b for a, b in zip(totals, collecting, strict=True))
        return result

    def ratios(self) -> dict[str, float]:
        """``total`` over what ran beside it; a ratio to something that failed is left out."""
        seconds = self.seconds()
        others = ("export", "pipeline_outside_export")
        return {name: seconds["total"] / seconds[name] for name in others if seconds.get(name)}


def timed(function: Callable[[], T], collections: list[float] | None = None) -> tuple[T, float]:
    """The result and the CPU seconds, after a garbage collection that is not counted."""
    gc.collect()
    if collections is not None:
        collections.clear()
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


@contextmanager
def gc_clock() -> Iterator[list[float]]:
    """Collects the CPU seconds of each garbage collection."""
    runs: list[float] = []
    started = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal started
        if phase == "start":
            started = time.process_time()
        else:
            runs.append(time.process_time() - started)

    gc.callbacks.append(note)
    try:
        yield runs
    finally:
        gc.callbacks.remove(note)


@contextmanager
def export_clock() -> Iterator[list[float]]:
    """Collects the CPU seconds of each call of ``torch.export.export``, the name that pipeline() calls."""
    calls: list[float] = []
    original = torch.export.export

    def export(*args: Any, **kwargs: Any) -> ExportedProgram:
        start = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            calls.append(time.process_time() - start)

    torch.export.export = export
    try:
        yield calls
    finally:
        torch.export.export = original


def run_export(result: Measurement, dynamic: bool) -> ExportedProgram:
    """torch.export.export of the model."""
    model, tokens = models.build(result.layers), models.tokens()
    shapes = models.dynamic_shapes() if dynamic else None
    program, seconds = timed(lambda: torch.export.export(model, (tokens,), dynamic_shapes=shapes))
    result.add("export", seconds)
    result.nodes = len(program.graph.nodes)
    return program


def run_ours(result: Measurement, program: ExportedProgram, stages: int) -> StagedProgram:
    """scan, lift (which takes the analysis of the scan) and partition."""

    def ours(name: str, function: Callable[[], T]) -> T:
        with gc_clock() as collections:
            value, seconds = timed(function, collections)
        result.add(name, seconds)
        result.collecting.setdefault(name, []).append(sum(collections))
        return value

    forget()  # an earlier repetition analysed the same program
    report = ours("scan", lambda: scan(program))
    lifted = ours("lift", lambda: lift(program))
    staged = ours("partition", lambda: partition(lifted, num_stages=stages))
    if not report.reads or not lifted.inputs or len(staged.stages) != stages:
        raise BenchmarkError(
            f"{result.layers} layers: {len(report.reads)} reads, {len(lifted.inputs)} lifted inputs and "
            f"{len(staged.stages)} stages: there is nothing to compare"
        )
    return staged


def run_pipeline(result: Measurement, stages: int) -> None:
    """torch's pipeline() on the same model; what it raises becomes the measurement's ``pipeline_failure``."""
    model, tokens = models.build(result.layers), models.tokens()  # its own model: pipeline() writes to it
    spec = {name: SplitPoint.BEGINNING for name in models.split_points(result.layers, stages)}
    try:
        with export_clock() as exports:
            pipe, seconds = timed(lambda: pipeline(model, (tokens,), split_spec=spec))
        if len(exports) != 1:
            raise BenchmarkError(f"pipeline() called torch.export.export {len(exports)} times, not once")
        if pipe.num_stages != stages:
            raise BenchmarkError(f"pipeline() made {pipe.num_stages} stages, not {stages}")
        output = pipe(tokens)
        output = output[0] if isinstance(output, tuple) else output
        if not torch.equal(output, models.build(result.layers)(tokens)):
            raise BenchmarkError("the output of its stages differs from the model's")
    except BenchmarkError as error:
        result.pipeline_failure = str(error)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        result.pipeline_failure = f"{type(error).__name__}: {lines[0]}"
    else:
        result.add("pipeline", seconds)
        result.add("pipeline_outside_export", seconds - exports[0])


def check_output(layers: int, staged: StagedProgram) -> None:
    """The stages compute what the model computes.

    Raises:
        BenchmarkError: they don't.
    """
    tokens = models.tokens()
    with torch.no_grad():
        output = staged(tokens, **staged.feed(*tokens.shape))
        expected = models.build(layers)(tokens)
    if not torch.equal(output, expected):
        raise BenchmarkError(f"{layers} layers: the output of our stages differs from the model's")


def measure(
    layers: int, stages: int, *, dynamic: bool = False, repeats: int = 3, others: int = 2, beside: bool = True
) -> Measurement:
    """Measures one model: ours ``repeats`` times, and in turn with it export and pipeline() ``others`` times.

    Args:
        dynamic: export with dynamic batch and sequence.
        beside: run pipeline() too, which takes static shapes only.

    Raises:
        BenchmarkError: our result is wrong or empty.
    """
    result = Measurement(layers)
    program: ExportedProgram | None = None
    staged: StagedProgram | None = None
    for index in range(max(repeats, others)):
        if program is None or index < others:
            program = staged = None  # freed before the next is made
            program = run_export(result, dynamic)
        staged = None
        staged = run_ours(result, program, stages)
        if beside and index < others and result.pipeline_failure is None:
            run_pipeline(result, stages)
    assert staged is not None
    check_output(layers, staged)
    if result.pipeline_failure is not None:  # it failed once: no time of it is to be trusted
        for name in ("pipeline", "pipeline_outside_export"):
            result.samples.pop(name, None)
    return result


def growth(results: Sequence[Measurement], at_least: int, name: str = "total") -> float | None:
    """The exponent of growth over the number of nodes: the least-squares slope of log time over log nodes.

    ``None`` if fewer than two results have ``at_least`` so many layers.
    """
    points = [(r.nodes, r.seconds()[name]) for r in results if r.layers >= at_least]
    if len({nodes for nodes, _ in points}) < 2:
        return None
    xs = [math.log(nodes) for nodes, _ in points]
    ys = [math.log(seconds) for _, seconds in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - x_mean) ** 2 for x in xs)
