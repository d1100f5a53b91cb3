"""What a page shows of a target, as plain data: reads in groups with their pictures, lifted inputs, stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from buffer_lifting.graph.record import Location
from buffer_lifting.program import InputAxes, LiftedInput

#: What a box of a picture stands for: ``"feed"`` is computed outside the stages, ``"input"`` is a lifted input,
#: ``"kept"`` stays as it is, ``"more"`` stands for several boxes.
BoxKind = Literal["source", "feed", "input", "op", "kept", "consumer", "refused", "more"]
Status = Literal["lifted", "natural", "causal", "refused", "handled"]


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a picture: a title, a second line, and the column that its chain stands in; ``link`` is a fragment."""

    id: str
    kind: BoxKind
    title: str
    text: str = ""
    column: int = 0
    link: str = ""


@dataclass(frozen=True, slots=True)
class Arrow:
    """From a box to a box; a ``dashed`` one is a value that is fed, and not computed in the stage."""

    start: str
    end: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A directed acyclic graph of boxes. ``about`` is its description for who does not see it."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    about: str


@dataclass(frozen=True, slots=True)
class Member:
    """One of the equal reads of a group."""

    node: str
    operand: str
    module: str
    source: str


@dataclass(frozen=True, slots=True)
class Row:
    """A step of a chain as text; ``chain`` counts the chains of a read from 0, ``mark`` is what lifting does there."""

    chain: int
    mark: str
    node: str
    op: str
    shape: str
    detail: str
    location: Location | None


@dataclass(frozen=True, slots=True)
class ReadGroup:
    """Reads (or ops that mix the sequence) that say the same of one line, in one layer or in many.

    Attributes:
        id: unique in its target.
        code, title, hint: what is said of each.
        status: what lifting does: ``"lifted"``, ``"natural"`` (kept in natural order, and gathered), ``"causal"`` (a
            flag that ``context_parallel`` replaces), ``"refused"`` or ``"handled"`` (an op that needs no lift).
        source: its FQN or op; the numbers of layers are ``*``. ``consumer`` is the op that reads it.
        also: the other sources of its value.
        location: of the read in the model's source.
        members: the reads themselves, at least one; the pictures and rows are those of the first.
        inputs: names of the lifted inputs that it reads after lifting.
        before, after: the chain from the source to the consumer; ``after`` is ``None`` when nothing is lifted.
        nearest: for a refused one (title, what it needs, what fails here) of the nearest patterns.
    """

    id: str
    code: str
    title: str
    hint: str
    status: Status
    source: str
    source_kind: str
    consumer: str
    location: Location | None
    members: tuple[Member, ...]
    inputs: tuple[str, ...]
    before: Picture
    after: Picture | None
    rows: tuple[Row, ...] = ()
    nearest: tuple[tuple[str, str, str], ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageInput:
    """What a stage receives.

    Attributes:
        name: its name in the stage.
        kind: ``"activation"`` (from the stage before), ``"lifted"`` (fed) or ``"user"``.
        size: bytes per microbatch at the sizes of the example inputs, or ``None``: not recorded.
        per_token: bytes of one token of one sample; ``None`` for what is no lifted input.
    """

    name: str
    kind: Literal["activation", "lifted", "user"]
    size: int | None = None
    per_token: int | None = None


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage: what it receives and hands on, the elements of its parameters, and where these are in the model."""

    index: int
    inputs: tuple[StageInput, ...]
    outputs: tuple[str, ...]
    elements: int
    modules: tuple[str, ...]
    sends: int


@dataclass(frozen=True, slots=True)
class ProgramView:
    """What a page shows of one target.

    Attributes:
        kind: ``"program"``, ``"lifted program"`` or ``"stages"``; ``"not shown"`` when ``problem`` says why.
        nodes: of its graph (all stages together).
        inputs, lifted: the user's inputs, and those that lifting adds or has added.
        groups: the reads and the ops that mix the sequence.
        stages, tied: of a partition; FQN -> the stages that hold a copy.
        notes: what to know about the view.
        problem, unsplit: why the view, or the stages that were asked for, could not be made.
    """

    target: str
    kind: str
    nodes: int = 0
    inputs: tuple[InputAxes, ...] = ()
    lifted: tuple[LiftedInput, ...] = ()
    groups: tuple[ReadGroup, ...] = ()
    stages: tuple[StageView, ...] = ()
    tied: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problem: str = ""
    unsplit: str = ""
