"""The records that the passes hand on to each other. No logic lives here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from buffer_lifting.graph.record import Location

Form = Literal["values", "positions", "natural"]
Stream = Literal["positions", "slots", "inputs"]
#: ``axes=`` of the public API: input name -> dim -> axis. An axis is ``"batch"``, the name of a sequence axis
#: (``"seq"``), or ``"seq:row"`` / ``"seq:col"`` to give the role as well.
Axes = dict[str, dict[int, str]]


@dataclass(frozen=True, slots=True)
class InputAxes:
    """Which dims of a user input run over the batch and over a sequence axis.

    Attributes:
        name: the input's name, as in the program's signature.
        batch_dim: its batch dim, or ``None``.
        seq_dims: ``(dim, axis name, role)`` for every sequence dim. Role ``"row"``: sharded with the queries;
            ``"col"``: read by keys, needed for the whole sequence (in the order of the shards).
        rank: number of dims.
    """

    name: str
    batch_dim: int | None
    seq_dims: tuple[tuple[int, str, str], ...]
    rank: int


@dataclass(frozen=True, slots=True)
class PositionRead:
    """One read by sequence position: a value that follows the positions, where it meets data.

    Attributes:
        source_kind: ``"buffer"``, ``"constant"``, ``"parameter"``, ``"iota"``, ``"input"``, ``"length"`` or
            ``"is_causal"``.
        source: FQN of the source, or the op that makes it (``"aten.arange"``); ``aliases`` are its other FQNs.
        sources: everything that the value is made from, sorted: the FQNs of state with more than one element and the
            names of inputs, or ``source`` alone.
        expression: how it is made from them, as a text without node names; a long one is cut and ends with a digest.
        value: name of the node whose value is read; ``node`` is the node that reads it, ``op`` its op and
            ``operand`` the argument.
        seq_dims: ``(dim of the value, axis name, role)``.
        batch_dim: the value's own batch dim, or ``None``.
        stream: the index stream that the lifted inputs follow.
        form: how it is lifted; ``None`` when it is refused, and then ``refusal`` says why.
        location: where the model's source reads it; ``modules`` are the FQNs of the consumer's modules, and
            ``module_class`` is the class of the innermost.
        code: the rule code (BL0xx liftable, BL1xx not).
        hint: what the user can do.
    """

    source_kind: str
    source: str
    aliases: tuple[str, ...]
    value: str
    node: str
    op: str
    operand: str
    seq_dims: tuple[tuple[int, str, str], ...]
    batch_dim: int | None
    stream: Stream
    form: Form | None
    refusal: str | None
    location: Location | None
    modules: tuple[str, ...]
    code: str
    hint: str = ""
    sources: tuple[str, ...] = ()
    expression: str = ""
    module_class: str = ""


@dataclass(frozen=True, slots=True)
class SequenceMixing:
    """An op on data that moves information along a sequence axis, or whose behaviour there is not known."""

    node: str
    op: str
    reason: str
    location: Location | None
    modules: tuple[str, ...]
    handled: bool
    code: str
    hint: str = ""
    module_class: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the whole program that stands in the way (ambiguous axes, for one).

    ``source`` is the FQN of the state, or the name of the input, that it is about; empty where there is none.
    """

    code: str
    message: str
    hint: str
    location: Location | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What :func:`buffer_lifting.scan` finds. See the fields' types."""

    reads: tuple[PositionRead, ...]
    mixing: tuple[SequenceMixing, ...]
    inputs: tuple[InputAxes, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def refused(self) -> tuple[PositionRead | SequenceMixing | Finding, ...]:
        """Everything that a strict lift refuses on."""
        reads = [read for read in self.reads if read.refusal]
        return (*reads, *(mix for mix in self.mixing if not mix.handled), *self.findings)


@dataclass(frozen=True, slots=True)
class LiftedInput:
    """A placeholder that lifting added.

    Attributes:
        name: the placeholder and the keyword to feed it by.
        form: ``"values"`` (rows of a table) or ``"positions"`` (an int64 index).
        stream: ``"positions"``, ``"slots"`` or ``"inputs"`` (hoisted from user inputs, gathered by slot).
        role: ``"row"`` (this shard's slots) or ``"col"`` (all slots, for keys).
        source: FQN of the source or the op that makes it.
        dtype: ``"float32"``, ...
        row_shape: shape behind the batch dim (0) and the sequence dim (1); flat tokens have sequence dim 0.
        axis: name of the sequence axis.
        batched: whether there is a batch dim.
    """

    name: str
    form: Form
    stream: Stream
    role: str
    source: str
    dtype: str
    row_shape: tuple[int, ...]
    axis: str
    batched: bool = True


@dataclass(frozen=True, slots=True)
class FeedOutput:
    """How one lifted input is made: a node of the feed program, canonical layout ``[batch, seq, *row]``.

    Attributes:
        input: the lifted input.
        program: ``"iota"`` (no graph: the index itself), ``"natural"``, ``"substituted"`` or ``"hoisted"``.
        node: name of the feed program's node.
        seq_dim, batch_dim: where they are in the node's value (``batch_dim`` may be ``None``).
        drop_dims: size-1 dims to drop.
    """

    input: LiftedInput
    program: Literal["iota", "natural", "substituted", "hoisted"]
    node: str
    seq_dim: int
    batch_dim: int | None
    drop_dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AxesInfo:
    """The axes of a program: sizes are ints when static, ``None`` when dynamic."""

    batch: int | None
    lengths: dict[str, int | None]
    has_batch: bool = True


@dataclass(frozen=True, slots=True)
class Check:
    """One oracle of :func:`buffer_lifting.verify`: what it compared, and the first node that differs if any."""

    name: str
    passed: bool
    compared: int
    worst: float
    node: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All checks of a verification."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of a name (``"identity"``, ``"values"``, ``"equivariance"``, ``"composition"``)."""
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            mark = "ok  " if check.passed else "FAIL"
            where = f" at {check.node}" if check.node else ""
            lines.append(
                f"{mark} {check.name}: {check.compared} tensors, worst {check.worst:.2e}{where}"
                f"{', ' * bool(check.detail)}{check.detail}"
            )
        return "\n".join([*lines, *self.notes])


AnyTensorDict = dict[str, Any]
