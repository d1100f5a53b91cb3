"""Every pattern class by itself: one program that differs from the simplest one in a single respect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .chains import COMPLEX, REAL
from .spec import (
    ATTENTIONS,
    DATA_CONSUMERS,
    DISTRACTORS,
    DTYPES,
    FEATURES,
    HEAD_CONSUMERS,
    INDEXES,
    LAYOUTS,
    LENGTHS,
    LOSSES,
    MASKS,
    OFFSETS,
    REGIONS,
    SITES,
    SLICES,
    SQUARE_READS,
    TABLES,
    Mask,
    Row,
    Spec,
)

#: What may be refused, and the codes of it; everything else must lift.
REFUSALS = {
    "* at cumsum_ones*, batch = seq": "BL202",
    "computed from cumsum_ones, batch = seq": "BL202",
    "chain normalise of a parameter, width = seq": "BL105",
    "input sample_features, width = seq": "BL103",
    "input global_features, width = seq": "BL103",
}
PLAIN = Row()
GATHERED = Row(read="index", index="arange")
COMPUTED = Row(table="computed", read="", index="arange")


def single_rows() -> Iterator[tuple[str, Row]]:
    """One read along one axis a class."""
    for table in TABLES[:-1]:
        yield f"table {table}", replace(PLAIN, table=table)
    for read in SLICES:
        yield f"read {read}", replace(PLAIN, read=read)
    for read in ("index", "index_select", "gather", "embedding"):
        yield f"read {read}", replace(GATHERED, read=read)
        yield f"read {read} of a parameter", replace(GATHERED, read=read, table="parameter")
    for index in INDEXES:
        yield f"computed from {index}", replace(COMPUTED, index=index)
        yield f"embedding at {index}", replace(GATHERED, read="embedding", index=index, table="parameter")
        yield f"index at {index}", replace(GATHERED, index=index)
        yield f"gather at {index}", replace(GATHERED, read="gather", index=index)
    for offset in OFFSETS[1:]:
        for read in ("slice", "narrow", "select_slice"):
            yield f"{read} with offset {offset}", replace(PLAIN, read=read, offset=offset)
        for index in INDEXES:
            yield f"index at {index} with offset {offset}", replace(GATHERED, index=index, offset=offset)
        yield f"computed with offset {offset}", replace(COMPUTED, offset=offset)
    for layout in LAYOUTS[1:]:
        for base in (PLAIN, replace(PLAIN, read="narrow"), replace(PLAIN, read="full"), GATHERED):
            yield f"layout {layout}, {base.read}", replace(base, layout=layout)
        for read in ("index_select", "gather"):
            yield f"layout {layout}, {read}", replace(GATHERED, read=read, layout=layout)
        yield f"layout {layout} of heads", replace(PLAIN, layout=layout, consumer="rope")
    for dtype in DTYPES[:-1]:
        yield f"dtype {dtype}", replace(PLAIN, dtype=dtype)
        yield f"dtype {dtype}, index", replace(GATHERED, dtype=dtype)
    for consumer in (*DATA_CONSUMERS, *HEAD_CONSUMERS):
        dtype = "complex64" if consumer == "complex_rope" else "float32"
        yield f"consumer {consumer}", replace(PLAIN, consumer=consumer, dtype=dtype)
        yield f"consumer {consumer} of computed", replace(COMPUTED, consumer=consumer, dtype=dtype)
        yield f"consumer {consumer} of a parameter", replace(PLAIN, consumer=consumer, dtype=dtype, table="parameter")
    for site in SITES:
        yield f"site {site}", replace(PLAIN, site=site)
    for region in REGIONS:
        yield f"region {region}", replace(PLAIN, region=region)
        yield f"region {region} at the root", replace(PLAIN, region=region, site="root")
        yield f"region {region} of computed heads", replace(COMPUTED, region=region, consumer="rope")
        yield f"region {region} of a parameter", replace(PLAIN, region=region, table="parameter", consumer="concat")
    for step in REAL:
        yield f"chain {step}", replace(PLAIN, chain=(step,))
        yield f"chain {step} of computed", replace(COMPUTED, chain=(step,))
        yield f"chain {step} of a parameter", replace(PLAIN, chain=(step,), table="parameter")
    for step in COMPLEX:
        row = replace(PLAIN, dtype="complex64", consumer="complex_rope", chain=(step,))
        yield f"complex chain {step}", row
        yield f"complex chain {step} of a parameter", replace(row, table="parameter")


def single_masks() -> Iterator[tuple[str, Mask]]:
    """One kind of mask a class."""
    for pattern in MASKS:
        if pattern == "square":
            continue
        for index in (
            ("arange", "cumsum_ones", "ids_buffer") if pattern in ("causal", "bucket", "alibi") else ("arange",)
        ):
            yield f"mask {pattern} of {index}", Mask(pattern, index)
        yield f"mask {pattern} in the layer", Mask(pattern, site="layer")
        yield f"mask {pattern} expanded", Mask(pattern, expand=True)
    for attention in ATTENTIONS[1:]:
        for pattern in ("causal", "padding", "triu_inf"):
            yield f"attention {attention}, {pattern}", Mask(pattern, attention=attention)
    for read in SQUARE_READS:
        for table in TABLES[:-1]:
            yield f"square {read} of {table}", Mask("square", table=table, read=read)
        yield f"square {read}, wide", Mask("square", read=read, wide=True)
        yield f"square {read}, wide, masked_fill", Mask("square", read=read, wide=True, attention="masked_fill")


def singles() -> Iterator[tuple[str, Spec]]:
    """Name and spec of every class by itself, with dynamic and with static shapes."""
    bare = [(name, Spec(rows=(row,))) for name, row in single_rows()]
    bare += [(name, Spec(mask=mask)) for name, mask in single_masks()]
    bare += [(f"length {how}", Spec(length=how)) for how in LENGTHS]
    bare += [(f"distractor {name}", Spec(distractors=(name,), mask=Mask())) for name in DISTRACTORS]
    bare += [(f"loss {kind}", Spec(rows=(PLAIN,), loss=kind)) for kind in LOSSES]
    bare += [(f"loss {kind} alone", Spec(loss=kind)) for kind in LOSSES]
    bare += [(f"input {name}", Spec(rows=(PLAIN,), mask=Mask("causal"), features=(name,))) for name in FEATURES]
    for name, spec in bare:
        whole = any(row.read == "full" for row in spec.rows) or (spec.mask is not None and spec.mask.read == "full")
        if not whole:
            yield f"{name}, dynamic", spec
        yield f"{name}, static", replace(spec, dynamic=False)
        yield f"{name}, width = seq", replace(spec, dynamic=False, seq=8)
        yield f"{name}, batch = seq", replace(spec, dynamic=False, batch=5, seq=5)
