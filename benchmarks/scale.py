"""Measures scan, lift and partition of large models on the meta device, beside the export that they follow.

    python benchmarks/scale.py              # all models and sizes: about a quarter of an hour
    python benchmarks/scale.py --quick      # a few layers of each
    python benchmarks/scale.py --docs       # and the tables in docs/SCALE.md

Each model and size is measured in a process of its own. Exit codes: 0 every bar reached, 1 a bar missed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import buffer_lifting as bl
from benchmarks import models, scale_models
from benchmarks.measure import timed
from benchmarks.report import environment, markdown, missed, plain, write_block
from buffer_lifting.analysis import forget

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "scale"
STAGES = 16
STEPS = ("scan", "lift", "context_parallel", "partition")
OURS = ("scan", "lift", "partition")
MAX_SHARE, MAX_MEGABYTES, MAX_GROWTH = 0.05, 1024, 1.1
GROWTH_LAYERS = (16, 64, 250, 1000)
QUICK_LAYERS = (16, 32)
#: name -> layers -> the model
MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "HF Llama, 405B": (126, scale_models.llama_405b),
    "HF DeepSeek-V3": (61, lambda layers: scale_models.deepseek_v3(layers, dense=min(3, layers - 1))),
    "Llama of PR #1797": (126, models.Llama),
}
T = TypeVar("T")


def resident_megabytes() -> float:
    """What the process has in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most megabytes that the process came to have above those at the start, sampled."""
    start, peak, stop = resident_megabytes(), [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident_megabytes() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak[0] = max(peak[0], resident_megabytes() - start)


def ours(program: ExportedProgram, stages: int) -> dict[str, float]:
    """CPU seconds of each step on a program that was not analysed before. ``partition`` is that of the lifted one."""
    forget()
    seconds: dict[str, float] = {}
    _, seconds["scan"] = timed(lambda: bl.scan(program))
    lifted, seconds["lift"] = timed(lambda: bl.lift(program))
    staged, seconds["partition"] = timed(lambda: bl.partition(lifted, num_stages=stages))
    assert lifted.inputs and len(staged.stages) == stages
    del staged
    parallel, seconds["context_parallel"] = timed(lambda: bl.context_parallel(lifted, size=1))
    assert parallel.cp_size == 1
    return seconds


def measure(model: nn.Module, layers: int, stages: int, repeats: int) -> dict[str, Any]:
    """One model: export once, ours ``repeats`` times; the memory is that of the first time."""
    program, export = timed(lambda: scale_models.export(model))
    gc.collect()
    with peak_memory() as peak:
        samples = [ours(program, stages)]
    samples += [ours(program, stages) for _ in range(repeats - 1)]
    return {
        "layers": layers,
        "stages": stages,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nodes": len(program.graph.nodes),
        "export": export,
        **{name: median(sample[name] for sample in samples) for name in STEPS},
        "ours": median(sum(sample[name] for name in OURS) for sample in samples),
        "megabytes": peak[0],
    }


def _warm_up() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = scale_models.Deep(4)
    ours(scale_models.export(model), 2)


def measure_model(name: str, layers: int, stages: int, repeats: int) -> dict[str, Any]:
    """A model of :data:`MODELS`, in this process."""
    _warm_up()
    with torch.device("meta"):
        model = MODELS[name][1](layers)
    return {"model": name, **measure(model, layers, stages, repeats)}


def measure_growth(layers: int, stages: int, repeats: int) -> dict[str, Any]:
    """So many small layers, in this process."""
    _warm_up()
    with torch.device("meta"):
        model = scale_models.Deep(layers)
    return measure(model, layers, stages, repeats)


def measure_beside(layers: int, stages: int) -> dict[str, Any]:
    """torch's ``pipeline()`` on the Llama of PR #1797 with static shapes, ours on the same, in this process."""
    from benchmarks.measure import measure as beside

    _warm_up()
    found = beside(layers, stages, repeats=1, others=1)
    seconds = found.seconds()
    outside = seconds.get("pipeline_outside_export")
    return {
        "layers": layers,
        "stages": stages,
        "export": seconds["export"],
        "ours": seconds["total"],
        "pipeline_outside_export": outside,
        "failure": found.pipeline_failure,
    }


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def exponent(entries: Sequence[dict[str, Any]], name: str) -> float | None:
    """The least-squares slope of log time over log nodes; ``None`` for fewer than two sizes."""
    points = [(math.log(entry["nodes"]), math.log(entry[name])) for entry in entries]
    if len({x for x, _ in points}) < 2:
        return None
    x_mean, y_mean = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    above = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return above / sum((x - x_mean) ** 2 for x, _ in points)


def record(
    found: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]], beside: dict[str, Any] | None, command: str
) -> dict[str, Any]:
    """Everything that was measured, as the JSON has it."""
    exponents = {name: exponent(growth, name) for name in STEPS}
    bars = []
    for entry in found:
        name = f"{entry['model']}, {entry['layers']} layers"
        bars.append(_bar(f"ours ÷ export, {name}", entry["ours"] / entry["export"], MAX_SHARE))
        bars.append(_bar(f"more memory than export left, MB, {name}", entry["megabytes"], MAX_MEGABYTES))
    bars += [_bar(f"growth exponent of {name}", value, MAX_GROWTH) for name, value in exponents.items()]
    return {
        "command": command,
        "environment": environment(),
        "clock": "CPU seconds of the process",
        "models": list(found),
        "growth": list(growth),
        "exponents": exponents,
        "beside": beside,
        "bars": bars,
    }


def _bar(name: str, value: float | None, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": None if value is None else value <= limit}


def rows(entries: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table of models or sizes, as text by title."""
    table = []
    for entry in entries:
        row = {"model": entry["model"]} if "model" in entry else {}
        row |= {"layers": str(entry["layers"]), "parameters": f"{entry['parameters'] / 1e9:.3g} B"}
        row |= {"nodes": str(entry["nodes"]), "ours ÷ export": f"{entry['ours'] / entry['export']:.3f}"}
        row |= {f"{name.replace('_', ' ')}, s": f"{entry[name]:.3g}" for name in ("export", *STEPS)}
        table.append({**row, "more memory, MB": f"{max(entry['megabytes'], 0):.0f}"})
    return table


def _sentences(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{'pass' if bar['passed'] else 'FAIL'}: {bar['name']}: {bar['value']:.3g}, at most {bar['limit']}"
        for bar in results["bars"]
        if bar["value"] is not None
    ]
    beside = results["beside"]
    if beside is not None:
        own = f"beside it, static shapes, Llama of PR #1797, {beside['layers']} layers, {beside['stages']} stages: "
        added = beside["pipeline_outside_export"]
        theirs = f"fails: {beside['failure']}" if added is None else f"adds {added / beside['export']:.2f} of export"
        lines.append(f"{own}`pipeline()` {theirs}, ours {beside['ours'] / beside['export']:.2f}")
    return lines


def _conditions(results: dict[str, Any]) -> str:
    found = results["environment"]
    return (
        f"torch {found['torch']}, Python {found['python']}, one core; {STAGES} stages; CPU seconds; *ours* is scan + "
        "lift + partition, medians, on a program that was not analysed before; memory is what the process comes to "
        "have above what it has after export, context_parallel included"
    )


def text(results: dict[str, Any]) -> str:
    """The whole report for a terminal."""
    tables = [plain(rows(results[kind])) for kind in ("models", "growth") if results[kind]]
    return "\n\n".join([_conditions(results), *tables, "\n".join(_sentences(results))])


def block(results: dict[str, Any]) -> str:
    """The Markdown for docs/SCALE.md."""
    strong = ("ours ÷ export",)
    parts = [
        f"`{results['command']}` wrote this block ({_conditions(results)}).",
        f"Exported on the meta device, dynamic batch and sequence:\n\n{markdown(rows(results['models']), strong)}",
        f"Small layers, for growth:\n\n{markdown(rows(results['growth']), ())}",
        "\n".join(f"- {line}" for line in _sentences(results)),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python benchmarks/scale.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "scale_results.json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a few layers of each model")
    parser.add_argument("--docs", action="store_true", help="rewrite the results in docs/SCALE.md")
    parser.add_argument("--repeats", type=int, default=3, help="how often ours is measured (default: %(default)s)")
    options = parser.parse_args(arguments)
    found, growth = [], []
    for name, (layers, _) in MODELS.items():
        count, stages = (4, 2) if options.quick else (layers, STAGES)
        print(f"... {name}, {count} layers", file=sys.stderr, flush=True)
        found.append(alone(measure_model, name, count, stages, options.repeats))
    for layers in QUICK_LAYERS if options.quick else GROWTH_LAYERS:
        print(f"... {layers} small layers", file=sys.stderr, flush=True)
        growth.append(alone(measure_growth, layers, STAGES, options.repeats))
    print("... pipeline()", file=sys.stderr, flush=True)
    beside = alone(measure_beside, 4 if options.quick else 126, 4 if options.quick else STAGES)
    results = record(found, growth, beside, " ".join(["python benchmarks/scale.py", *arguments]))
    print(text(results))
    options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs:
        write_block(ROOT / "docs" / "SCALE.md", TOPIC, block(results))
    return 1 if missed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
