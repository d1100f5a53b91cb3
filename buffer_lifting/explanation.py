"""The records of an explanation: chains of steps from a source to a consumer, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from buffer_lifting.graph.record import Location
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import BATCH, DimLabel
from buffer_lifting.patterns import Candidate
from buffer_lifting.program import LiftedInput, PositionRead, SequenceMixing

Mark = Literal["source", "feed", "cut", "gathered", "rebuilt", "kept", "", "refused", "operand", "mixes", "consumer"]


#: What is said of a source that the stage keeps: a learned table, a value in natural order.
STAYS = "stays in the stage"


@dataclass(frozen=True, slots=True)
class Step:
    """One value on a chain.

    Attributes:
        node, op: the node and its op; for a source the kind (``"buffer"``) and ``fqn`` its name.
        shape, dtype: of its (first) result; ``None`` and ``""`` for a number or several outputs.
        roles: for every dim ``"batch"``, an axis with its role (``"seq:row"``), ``"batch*seq:row"`` or ``""``.
        mark: ``"source"``, ``"feed"`` (computed by the feed, outside the stages), ``"cut"`` (made an input),
            ``"gathered"`` (its rows are picked by a lifted index), ``"rebuilt"`` (computed again in the stage),
            ``"kept"`` (stays in the stage as it is), ``"refused"``, ``"operand"``, ``"mixes"``, ``"consumer"``, or
            ``""`` on a chain that is refused.
        detail: the lifted inputs of a cut or gather, the operand of a consumer, a reason.
    """

    node: str
    op: str
    fqn: str
    shape: tuple[Size, ...] | None
    dtype: str
    roles: tuple[str, ...]
    location: Location | None
    mark: Mark
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FedBy:
    """A lifted input that the rebuilt value reads, and the node that it stands for or is used at."""

    input: LiftedInput
    node: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an item of a report is as it is.

    Attributes:
        item: the read or the op that mixes the sequence.
        steps: from the source to the consumer; each is an operand of the next.
        branches: further chains (an index, a mask's columns); the last step of each is on a chain before it.
        fed_by: the lifted inputs of a read that is lifted.
        stopped: the node where lifting stops (``""``: it does not), and ``reason`` says why.
        nearest: the patterns that were tried there, the nearest first.
    """

    item: PositionRead | SequenceMixing
    steps: tuple[Step, ...]
    branches: tuple[tuple[Step, ...], ...] = ()
    fed_by: tuple[FedBy, ...] = ()
    stopped: str = ""
    reason: str = ""
    nearest: tuple[Candidate, ...] = ()


def role_text(dim: DimLabel) -> str:
    """``"seq:row"``, ``"batch"``, ``"batch*seq:row"`` or ``""``."""
    parts = ["batch" if f.axis == BATCH else f"{f.axis}:{f.role}" for f in dim if f.axis]
    if parts and any(not f.axis and f.size != 1 for f in dim):
        parts.append("features")
    return "*".join(parts)


def shape_text(step: Step) -> str:
    """``"float32[1, s70=seq:row, 8]"``; ``"a number"`` for what is no tensor."""
    if step.shape is None:
        return "" if step.op == "output" else "a number"
    dims = (f"{size}={role}" if role else str(size) for size, role in zip(step.shape, step.roles, strict=True))
    return f"{step.dtype}[{', '.join(dims)}]"
