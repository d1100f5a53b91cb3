"""What to emit in place of a position value: plans, as plain data, without torch.

A rebuilt value of rank ``r`` has either rank ``r`` (*no lane*: the same for all samples) or rank ``r + 1`` with a
leading *lane*, the batch, and size 1 wherever the original had its own batch dim. Its sequence dims have the
size of this shard (role ``row``) or of all shards (role ``col``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.graph.record import Node
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import Labels, has_batch
from buffer_lifting.program import FeedOutput, InputAxes, PositionRead, ScanReport

if TYPE_CHECKING:
    from buffer_lifting.flex_plan import FlexPlan
    from buffer_lifting.loss_shift import LossShift


class Refuse(Exception):
    """A chain that cannot be rebuilt; the message is a reason for a person. ``node`` is where it failed."""

    def __init__(self, reason: str, node: str, code: str = "BL105", hint: str = "") -> None:
        super().__init__(reason)
        self.node, self.code, self.hint = node, code, hint


DRAWN = "it draws random numbers for the tokens: in another order, or on a shard, they get others"
DRAW_ELSEWHERE = (
    "draw them outside the model and give them as an input; dropout of the data is taken as it is: every rank draws "
    "its own"
)


def drawn(node: str, labels: Labels) -> Refuse:
    """Why random numbers do not follow their tokens."""
    if any(has_batch(dim) for dim in labels):
        return Refuse(DRAWN, node, hint=DRAW_ELSEWHERE)
    return Refuse("it draws random numbers, once for all samples", node, hint="draw them on data instead")


@dataclass(frozen=True, eq=False)
class Existing:
    """A value of the original graph, as it is."""

    node: str


@dataclass(frozen=True, eq=False)
class Lifted:
    """The batch-broadcast value ``[batch, seq, *row]`` of a lifted input (by its key)."""

    key: CutKey


@dataclass(frozen=True, eq=False)
class AxisSize:
    """The run-time size of an axis in a role; ``fixed`` when the program is static there, ``of`` the input to ask."""

    axis: str
    role: str
    fixed: int | None
    of: CutKey | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """A new call of an aten op. ``args`` may hold plans, ints, ``None`` and tuples of them."""

    op: str
    args: tuple[object, ...]
    anchor: str


@dataclass(frozen=True, eq=False)
class Reapply:
    """The op of node ``anchor`` once more, with some of its operands replaced (by argument path)."""

    anchor: str
    replace: tuple[tuple[str, object], ...]


Plan = Existing | Lifted | AxisSize | Call | Reapply


@dataclass(frozen=True)
class CutKey:
    """What makes two lifted inputs the same: content, axis, role and stream."""

    content: str
    axis: str
    role: str
    stream: str
    layout: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A rebuilt value: its plan, whether it has a lane, and the rank of the original."""

    plan: Plan
    lane: bool
    rank: int

    @property
    def changed(self) -> bool:
        """Whether anything has to be emitted."""
        return not isinstance(self.plan, Existing)


@dataclass(frozen=True)
class Context:
    """Fixed for one read: the stream its indices follow, and the form that was asked for."""

    stream: str
    form: str
    hoist: bool = True
    rounded: bool = False  # floating sums over user inputs may be taken in the order of the tokens


@dataclass
class Cut:
    """A lifted input before it has a name."""

    key: CutKey
    node: Node | None  # None: the index itself
    ancestors: frozenset[str] = frozenset()
    dtype: str = "int64"
    row_shape: tuple[int, ...] = ()
    seq_dim: int = 0
    batch_dim: int | None = None
    drop_dims: tuple[int, ...] = ()
    one_axis_read: bool = False
    hoisted: bool = False
    mixes: bool = False  # an op between the index that it is computed from and the cut mixes the sequence
    read_form: str = "values"


@dataclass(frozen=True)
class Replacement:
    """At operand ``path`` of node ``consumer``, which now reads ``value``, put ``plan`` instead."""

    consumer: str
    path: str
    value: str
    plan: Plan
    alignment: Alignment


@dataclass(frozen=True)
class GradientPlan:
    """The gradient of a table that is read by position: ``plan`` in the place of ``node``.

    ``returned``: only where the graph returns it. ``keys``: the cuts that the plan reads.
    """

    node: str
    plan: Plan
    keys: tuple[CutKey, ...]
    returned: bool = False


@dataclass
class Trace:
    """What the planner did and tried, kept as it is for ``explain.py``."""

    #: (node, its labels, context) -> the rebuilt value and the cuts it reads, or why there is none.
    rebuilt: dict[tuple[str, Labels, Context], tuple[Value, tuple[CutKey, ...]] | Refuse] = field(default_factory=dict)
    #: (node, its labels, context, attempt: ``"_local"`` or ``"cut"``) -> why the attempt failed.
    tried: dict[tuple[str, Labels, Context, str], Refuse] = field(default_factory=dict)
    #: (consumer, operand) of a refused read -> the labels of the operand (``()``: not known), and why.
    refused: dict[tuple[str, str], tuple[Labels, Refuse]] = field(default_factory=dict)


@dataclass
class LiftPlan:
    """The result of a scan: the report, and everything that lifting has to emit."""

    report: ScanReport
    replacements: list[Replacement]
    cuts: dict[CutKey, Cut]
    outputs: dict[CutKey, FeedOutput]
    frontier: list[FrontierEdge]
    data_labels: dict[str, tuple[Labels, ...] | None]
    input_axes: dict[str, InputAxes]
    substituted: dict[str, str] = field(default_factory=dict)  # the iota nodes that stand for position ids: their axis
    routed: frozenset[str] = frozenset()  # the values inside routing regions: no stage may begin there
    flex: list[FlexPlan] = field(default_factory=list)
    trace: Trace = field(default_factory=lambda: Trace())
    #: How the operands of each op on data line up with it, by path.
    alignments: dict[str, dict[str, Alignment]] = field(default_factory=dict)
    #: For each dim of a value without user contents, by its name: whether its elements can differ along it.
    varies: Callable[[str], Sequence[bool]] = field(default=lambda name: ())
    lengths: dict[str, Size] = field(default_factory=dict)  # of each sequence axis
    gradients: list[GradientPlan] = field(default_factory=list)  # of tables that are read by position
    #: Operands (node, path) that follow the positions in a value that follows the slots: a bias for each key.
    biases: dict[tuple[str, str], Labels] = field(default_factory=dict)
    shifts: list[LossShift] = field(default_factory=list)  # shifted losses that the record has in their longer form

    def labels_of_original(self) -> dict[str, tuple[Labels, ...] | None]:
        """``data_labels`` of the values that have the same shape in the program itself."""
        longer = {name for shift in self.shifts for name in shift.shapes}
        return {name: labels for name, labels in self.data_labels.items() if name not in longer}


@dataclass(frozen=True)
class FrontierEdge:
    """A position value where it meets data, for verification: which operand, and how its dims run."""

    consumer: str
    path: str
    value: str
    labels: Labels
    batch_from_right: int | None
    read: PositionRead
    keys: tuple[CutKey, ...] = ()  # the cuts that its replacement reads
    stream: str = "slots"  # that of the whole value; a part of it, a bias beside a mask, may follow the positions
