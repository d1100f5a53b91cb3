"""Every model of the catalog on two context-parallel ranks: the shards oracle holds, or the one refusal that may be."""

from __future__ import annotations

import pytest
from zoo.catalog import entries, expected, export_cell, export_of

import buffer_lifting as bl

#: Models whose dynamic export cannot run on several ranks, and why; written from their sources.
REFUSED = {
    "hf_deberta_v2": "scores of keys with queries are transposed",
}
#: The export fixes the sequence, whatever it was asked for: a Python integer of it enters the model.
STATIC = "exported with a static sequence"


def _first_dynamic() -> dict[str, str]:
    """Each entry that can be lifted, and its first dynamic export that is."""
    table = expected()
    found: dict[str, str] = {}
    for (name, export, shape), want in table.items():
        if shape == "dynamic" and not want.refusal:
            found.setdefault(name, export)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "export"), sorted(_first_dynamic().items()))
def test_two_ranks_are_the_original(name: str, export: str) -> None:
    """Outputs and every gradient, in float64, on a random order per sample."""
    entry = entries()[name]
    own = export_of(entry, export)
    program = export_cell(entry, own, "dynamic")
    lifted = bl.lift(program, own.axes)
    fixed = any(length is not None for length in lifted.axes.lengths.values())
    if name in REFUSED or fixed:
        with pytest.raises(bl.UnsupportedReadError, match=STATIC if fixed else REFUSED[name]):
            bl.context_parallel(lifted, size=2)
        return
    parallel = bl.context_parallel(lifted, size=2)
    assert program.example_inputs is not None
    report = bl.verify(program, parallel, inputs=[program.example_inputs], checks=("shards",))
    assert report["shards"].worst < 1e-9 and report["shards"].compared > 5
    assert not bl.check(parallel)


def test_most_models_run_on_two_ranks() -> None:
    """The exceptions are few and written down."""
    assert set(REFUSED) <= set(entries()) and len(REFUSED) < 5 < 80 < len(_first_dynamic())
