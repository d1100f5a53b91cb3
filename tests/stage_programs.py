"""Real models that the tests of costs and of memory share: exported once a process."""

from __future__ import annotations

from functools import cache

from torch.export import ExportedProgram
from zoo.catalog import entries, export_cell, export_of

import buffer_lifting as bl

#: Entry of the catalog -> which export.
EXPORTS = {"hf_llama": "sdpa", "hf_t5": "sdpa", "hf_deepseek_v3": "batched"}


@cache
def program(name: str) -> ExportedProgram:
    """Exported with dynamic shapes."""
    entry = entries()[name]
    return export_cell(entry, export_of(entry, EXPORTS[name]), "dynamic")


@cache
def lifted(name: str) -> bl.LiftedProgram:
    """Lifted, in its context-parallel form for one rank."""
    return bl.context_parallel(bl.lift(program(name)))
