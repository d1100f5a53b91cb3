"""The catalog of real models: records, and how one entry is built and exported.

Each module beside this one adds a tuple ``ENTRIES``. What every export must give (reads by kind, or the one refusal
that is permitted) stands in ``expected.txt``, written before the code runs; ``tests/test_catalog.py`` compares.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Shape = Literal["dynamic", "static"]
MODULES = (
    "transformers_decoders",
    "transformers_moe",
    "transformers_others",
    "transformers_pairs",
    "torch_libraries",
    "x_transformers_models",
    "handwritten",
)
BATCH, SEQ = 3, 11


@dataclass(frozen=True)
class Export:
    """One way to export a model: the options it is built with, and the inputs it is given."""

    name: str  # "sdpa", "eager", "positions", "mask", "labels", "train", "full": unique within the entry
    inputs: Callable[[int, int, torch.Generator], Inputs]  # (batch, seq, generator) -> args, kwargs
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the entry's ``build``
    shapes: tuple[Shape, ...] = ("dynamic", "static")
    seq: int = SEQ
    dims: Mapping[str, Mapping[int, Any]] | None = None  # dynamic dims by input; default: AUTO for dims 0 and 1
    axes: Mapping[str, Mapping[int, str]] | None = None  # what ``lift`` is told
    train: bool = True


@dataclass(frozen=True)
class Entry:
    """One architecture. ``build(**options)`` makes a tiny random model; it draws from the global generator."""

    name: str
    library: str  # distribution name, or "tests/zoo/handwritten.py"
    build: Callable[..., nn.Module]
    exports: tuple[Export, ...]
    patterns: tuple[str, ...]  # the pattern classes that occur, names of PATTERNS
    split_points: tuple[str, ...] = ()  # FQN that starts stage 2; () for num_stages=2
    quick: bool = False  # its exports are in the quick subset


#: The pattern classes of position reads; each occurs in at least three entries.
PATTERNS = {
    "slice": "rows of a buffer or constant read by slice or narrow",
    "index": "rows of a buffer read by index, index_select, gather or embedding",
    "full": "a table read at full length, with no op left",
    "computed": "a table computed in the graph: arange x inv_freq",
    "learned": "a learned table (parameter) read by position",
    "relative": "relative bias or relative embedding by distance of row and column",
    "alibi": "ALiBi",
    "cumsum_ones": "positions from a cumsum of ones",
    "cumsum_data": "positions from a cumsum over user data (hoisted)",
    "length": "a scalar made from the sequence length, or a scale made from positions",
    "position_ids_buffer": "an integer buffer of position ids",
    "user_positions": "positions passed by the user",
    "hop": "a chain inside a wrap_* higher-order op",
    "mask_causal": "a causal mask computed in the graph",
    "mask_window": "a sliding-window or chunked mask",
    "mask_documents": "packed-document detection from position ids",
    "mask_padding": "a padding mask of the user, read by keys",
    "mask_table": "rows and columns of a mask buffer",
    "is_causal": "sdpa(is_causal=True)",
    "written": "a table or mask written in place",
    "layout": "sequence-first, [B*H, 1, S] or flat [T] layout",
    "equal_buffers": "aliased FQNs, or buffers of equal content in every layer",
    "labels": "the label shift in front of a loss in the graph",
    "routing": "mixture-of-experts routing over flattened tokens",
    "two_axes": "two sequence axes (encoder-decoder)",
    "distractor": "sequence-sized values that are not positions",
    "mixing": "an op that mixes the sequence: a finding",
}


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All entries by name."""
    found: dict[str, Entry] = {}
    here = Path(__file__).parent
    for module in MODULES:
        if not (here / f"{module}.py").exists():
            continue
        for entry in importlib.import_module(f"{__package__}.{module}").ENTRIES:
            assert entry.name not in found, f"two entries are named {entry.name!r}"
            assert set(entry.patterns) <= set(PATTERNS), f"{entry.name}: unknown pattern"
            found[entry.name] = entry
    return found


def cells() -> list[tuple[str, str, Shape]]:
    """(entry, export, shape) of everything that is exported."""
    return [(e.name, x.name, shape) for e in entries().values() for x in e.exports for shape in x.shapes]


def export_of(entry: Entry, name: str) -> Export:
    """The export of that name."""
    return next(export for export in entry.exports if export.name == name)


def export_cell(
    entry: Entry, export: Export, shape: Shape, batch: int = BATCH, seq: int | None = None, seed: int = 0
) -> ExportedProgram:
    """Builds the model with seeded weights and exports it (non-strict)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = entry.build(**export.options)
        module.train(export.train)
        args, kwargs = export.inputs(batch, seq or export.seq, torch.Generator().manual_seed(seed))
        dims = dynamic_dims(module, export, args, kwargs) if shape == "dynamic" else None
        return torch.export.export(module, args, kwargs, dynamic_shapes=dims, strict=False)


def dynamic_dims(module: nn.Module, export: Export, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` for the inputs: ``export.dims``, else batch and sequence are dims 0 and 1."""
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    values = {**dict(zip(names, args, strict=True)), **kwargs}
    given = export.dims or {}
    default = {0: Dim.AUTO, 1: Dim.AUTO}
    return {
        name: dict(given.get(name, {d: default[d] for d in range(min(value.ndim, 2))}))
        if isinstance(value, torch.Tensor)
        else None
        for name, value in values.items()
    }


@dataclass(frozen=True)
class Expected:
    """What an export must give: reads by code, or the code of the refusal that is permitted."""

    reads: Mapping[str, int]
    refusal: str = ""


def expected() -> dict[tuple[str, str, str], Expected]:
    """The table: ``entry export shape  CODE=count ...`` or ``entry export shape  refused CODE  # why``."""
    table: dict[tuple[str, str, str], Expected] = {}
    for path in sorted(Path(__file__).parent.glob("expected*.txt")):
        for line in path.read_text().splitlines():
            words = line.split("#")[0].split()
            if not words:
                continue
            name, export, shape, *rest = words
            shapes = ("dynamic", "static") if shape == "both" else (shape,)
            refusal = rest[1] if rest and rest[0] == "refused" else ""
            reads = {} if refusal else {code: int(n) for code, _, n in (word.partition("=") for word in rest)}
            for one in shapes:
                assert (name, export, one) not in table, f"{path.name}: {name} {export} {one} stands twice"
                table[name, export, one] = Expected(reads, refusal)
    return table
