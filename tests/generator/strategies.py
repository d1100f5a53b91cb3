"""Draws specs. Every draw is a module that runs: what excludes what is decided here, nothing is filtered."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from .chains import COMPLEX, REAL
from .spec import (
    DATA_CONSUMERS,
    DISTRACTORS,
    FEATURES,
    GATHERS,
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


def weighted(*pairs: tuple[int, object]) -> st.SearchStrategy:
    """One of several values, as often as their weights say."""
    return st.sampled_from([value for weight, value in pairs for _ in range(weight)])


def chains(complex_rows: bool) -> st.SearchStrategy[tuple[str, ...]]:
    """None to three steps."""
    return st.lists(st.sampled_from(sorted(COMPLEX if complex_rows else REAL)), max_size=3).map(tuple)


@st.composite
def rows(draw: st.DrawFn, dynamic: bool) -> Row:
    """One read along one axis."""
    table = draw(st.sampled_from(TABLES))
    consumer = draw(st.sampled_from((*DATA_CONSUMERS, *HEAD_CONSUMERS)))
    dtype = "complex64" if consumer == "complex_rope" else draw(weighted((6, "float32"), (1, "bfloat16"), (1, "int64")))
    if table == "parameter" and dtype == "int64":
        dtype = "float32"
    if table == "computed" and dtype != "complex64":
        dtype = "float32"
    read, index, layout = draw(_reads(table, dtype, dynamic))
    offset = "none"
    if read != "full":
        offset = draw(weighted((6, "none"), (2, "constant"), (1, "length"), (1, "right")))
    assert offset in OFFSETS
    chain = draw(chains(dtype == "complex64"))
    layers = draw(st.sampled_from([(0, 1), (0,), (1,)]))
    site = draw(st.sampled_from(SITES))
    region = draw(st.sampled_from(REGIONS)) if draw(weighted((4, False), (1, True))) else ""
    return Row(table, read, index, offset, layout, dtype, chain, consumer, site, layers, region)


@st.composite
def _reads(draw: st.DrawFn, table: str, dtype: str, dynamic: bool) -> tuple[str, str, str]:
    """How rows are taken, the source of an index, and the layout: what fits together."""
    if table == "computed":
        return "", draw(st.sampled_from(INDEXES)), "rows"
    slices = [read for read in SLICES if read != "full" or not dynamic]
    gathers = [read for read in GATHERS if read != "embedding" or dtype != "complex64"]
    read = draw(st.sampled_from([*slices, *gathers]))
    if read in ("slice", "narrow", "full"):
        return read, "", draw(st.sampled_from(LAYOUTS))
    if read == "select_slice":
        return read, "", "rows"
    if read == "index_select":
        return read, "arange", draw(st.sampled_from(LAYOUTS))
    index = draw(st.sampled_from(INDEXES))
    anywhere = index == "arange" and read != "embedding"
    return read, index, draw(st.sampled_from(LAYOUTS)) if anywhere else "rows"


@st.composite
def masks(draw: st.DrawFn, dynamic: bool) -> Mask:
    """What attention may see."""
    pattern = draw(st.sampled_from(MASKS))
    site = draw(st.sampled_from(["root", "layer"]))
    attention = draw(st.sampled_from(["sdpa", "sdpa", "masked_fill", "where", "add"]))
    index = draw(weighted((3, "arange"), (1, "cumsum_ones"), (1, "ids_buffer")))
    expand = draw(weighted((3, False), (1, True)))
    if pattern == "is_causal":
        return Mask(pattern, site=site)
    if pattern != "square":
        return Mask(pattern, index, expand=expand, attention=attention, site=site)
    table = draw(st.sampled_from([t for t in TABLES if t != "computed"]))
    reads: Sequence[str] = [read for read in SQUARE_READS if read != "full" or not dynamic]
    read = draw(st.sampled_from(reads))
    return Mask(pattern, "arange", table, read, draw(st.booleans()), expand, attention, site)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """One module and how it is exported. Shrinks towards no reads, and a dynamic export."""
    dynamic = draw(weighted((2, True), (1, False)))
    reads = tuple(draw(st.lists(rows(dynamic), min_size=0, max_size=2)))
    mask = draw(weighted((1, "none"), (1, "some")))
    chosen = draw(masks(dynamic)) if mask == "some" else None
    length = draw(weighted((19, ""), (1, "some")))
    distractors = tuple(draw(st.lists(st.sampled_from(DISTRACTORS), max_size=2, unique=True)))
    loss = draw(st.sampled_from(LOSSES)) if draw(weighted((4, False), (1, True))) else ""
    features: tuple[str, ...] = ()
    if draw(weighted((4, False), (1, True))):
        features = tuple(draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=2, unique=True)))
    return Spec(
        reads,
        chosen,
        draw(st.sampled_from(LENGTHS)) if length else "",
        distractors,
        draw(st.sampled_from([2, 3] if dynamic else [2, 3, 5])),
        draw(st.sampled_from([6, 5, 7, 8, 9])),
        8,
        dynamic,
        loss,
        features,
    )
