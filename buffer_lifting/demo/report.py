"""What the demo prints, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer_lifting.demo.compare import Row

if TYPE_CHECKING:
    from buffer_lifting.program import LiftedInput, PositionRead, ScanReport

WIDTH = 80
HEADER = """\
                   one process    pp x cp, not lifted        pp x cp, lifted
step  order               loss       loss   gradients       loss   gradients"""


def title(text: str) -> str:
    """A heading."""
    return f"\n{text}\n{'-' * len(text)}"


def reads(report: ScanReport, inputs: Iterable[LiftedInput]) -> str:
    """The places of a model that read by position, and the inputs that they become."""
    places: dict[tuple[str, str], list[PositionRead]] = {}
    for read in report.reads:
        where = f"{Path(read.location.file).name}:{read.location.line}" if read.location else "no location"
        places.setdefault((where, read.source), []).append(read)
    lines = []
    for (where, source), found in places.items():
        lines.append(_cut(f"{where}: {source}, {len(found)} read{'s' * (len(found) > 1)}"))
        code = found[0].location.code if found[0].location else ""
        lines += [_cut(f"    {code.strip()}")] if code else []
    lines.append("become inputs, of the rows of a rank or of the keys of all ranks:")
    for item in inputs:
        length = "all keys" if item.role == "col" else "rows"
        shape = ", ".join(["batch", length, *map(str, item.row_shape)])
        lines.append(_cut(f"    {item.name:36}{item.dtype:9}[{shape}]"))
    return "\n".join(lines)


def stages(staged: Any) -> str:
    """The stages: their parameters, and what they send to the next."""
    lines = []
    for stage in staged.stages:
        count = sum(parameter.numel() for parameter in stage.module.parameters())
        sends = f"sends {stage.boundary_bytes:,} bytes of activations" if stage.boundary_bytes else "gives the logits"
        lines.append(f"stage {stage.index}: {count:,} parameters, {sends}")
    return "\n".join(lines)


def row(of: Row) -> str:
    """A line of the table."""
    start = f"{of.step:4d}  {of.order:10}  {of.single:12.6f}"
    if of.measured is None:
        return f"{start}{'':24}{of.lifted:11.6f}"
    control = f"{of.measured.control:11.6f}  {of.measured.control_error:10.1e}"
    return f"{start}{control} {of.lifted:10.6f}  {of.measured.error:10.1e}"


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 4]} ..."
