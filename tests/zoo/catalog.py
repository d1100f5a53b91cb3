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

from .patterns import PATTERNS

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Shape = Literal["dynamic", "static"]
MODULES = (
    "transformers_decoders",
    "transformers_moe",
    "transformers_others",
    "transformers_pairs",
    "torch_libraries",
    "x_transformers_models",
    "transformers_more",
    "transformers_flex",
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
    frozen: bool = False  # export without gradients (flex_attention on CPU); they are asked for again afterwards


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
        if export.frozen:
            module.requires_grad_(False)
        args, kwargs = export.inputs(batch, seq or export.seq, torch.Generator().manual_seed(seed))
        dims = dynamic_dims(module, export, args, kwargs) if shape == "dynamic" else None
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dims, strict=False)
        for parameter in program.parameters() if export.frozen else ():
            parameter.requires_grad_(True)
        return program


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
    """What an export must give: reads by code, or the one refusal that is permitted.

    ``refusal`` is the code of the finding that decides: what the model does that cannot be lifted. ``consequences`` are
    the codes of what only follows from it (where the labels are lost, everything further down is unknown); they are
    written down for each export, and exactly these must occur.
    """

    reads: Mapping[str, int]
    refusal: str = ""
    consequences: frozenset[str] = frozenset()


def expected() -> dict[tuple[str, str, str], Expected]:
    """The table, from ``expected_*.txt``.

    A line is ``entry export shape  CODE=count ...`` or ``entry export shape  refused CODE [then CODE ...]  # why``.
    """
    table: dict[tuple[str, str, str], Expected] = {}
    for path in sorted(Path(__file__).parent.glob("expected*.txt")):
        for line in path.read_text().splitlines():
            words = line.split("#")[0].split()
            if not words:
                continue
            name, export, shape, *rest = words
            shapes = ("dynamic", "static") if shape == "both" else (shape,)
            for one in shapes:
                assert (name, export, one) not in table, f"{path.name}: {name} {export} {one} stands twice"
                table[name, export, one] = _outcome(rest)
    return table


def _outcome(words: list[str]) -> Expected:
    if words[:1] != ["refused"]:
        return Expected({code: int(count) for code, _, count in (word.partition("=") for word in words)})
    code, *more = words[1:]
    assert not more or (more[0] == "then" and len(more) > 1), f"refused {code} {more[0]}: what comes behind the code?"
    return Expected({}, code, frozenset(more[1:]))
