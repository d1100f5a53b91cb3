"""How batch and sequence labels pass through each kind of op, forward, for values that carry data.

A rule also says how the op's other operands line up with the data (that is where position values are read), and
whether the op mixes the sequence. An op without a rule is unknown, never assumed to be local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from buffer_lifting.graph.record import GraphRecord, Node, TensorMeta
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import (
    COL,
    ROW,
    DimLabel,
    Labels,
    batch_dim,
    broadcast,
    has_seq,
    is_labelled,
    transposed,
    with_role,
)
from buffer_lifting.ops import ASSERTIONS, content_operands, is_pointwise


@dataclass(frozen=True, slots=True)
class Alignment:
    """How an operand lines up with the data at one op.

    ``labels`` are those of the operand's own dims. ``batch_from_right`` is the data's batch dim counted from the
    right, to which a broadcasting operand is aligned; ``None`` when the operand does not broadcast.
    """

    labels: Labels
    batch_from_right: int | None


@dataclass(slots=True)
class AxisResult:
    """What a rule finds. ``outputs`` is ``None`` where the labels are lost."""

    outputs: tuple[Labels, ...] | None
    operands: dict[str, Alignment] = field(default_factory=dict)
    mixing: str = ""  # why the op moves information along the sequence; "" if it does not
    handled: bool = False  # the context-parallel pass takes care of it
    consumed: frozenset[str] = frozenset()  # operands without data that are no reads by position (accumulators)


class OpView:
    """One node with what is known of its operands."""

    def __init__(
        self,
        record: GraphRecord,
        node: Node,
        known: dict[str, tuple[Labels, ...] | None],
        positional: Callable[[str], Labels | None] = lambda name: None,
        lengths: Mapping[str, Size] | None = None,
        data: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """``positional``: the labels of a value without user contents, as far as its sizes tell."""
        self._data = data
        self.record, self.node, self.known, self._positional = record, node, known, positional
        self._lengths = lengths or {}

    def length(self, axis: str) -> Size | None:
        """The length of a sequence axis."""
        return self._lengths.get(axis)

    def positional(self, path: str) -> Labels | None:
        """The labels of an operand without user contents, by its sizes; ``None`` for anything else."""
        name = dict(self.node.named_refs()).get(path)
        return self._positional(name) if name and self.known.get(name) is None else None

    def shape(self, path: str) -> tuple[Size, ...] | None:
        """The shape of a tensor operand (or of ``"out"``, the first output)."""
        meta = self.node.meta if path == "out" else self._meta(path)
        if isinstance(meta, tuple):
            meta = meta[0]
        return meta.shape if isinstance(meta, TensorMeta) else None

    def shapes_out(self) -> list[tuple[Size, ...]]:
        """The shapes of all tensor outputs."""
        metas = self.node.meta if isinstance(self.node.meta, tuple) else (self.node.meta,)
        return [meta.shape for meta in metas if isinstance(meta, TensorMeta)]

    def _meta(self, path: str) -> object:
        name = dict(self.node.named_refs()).get(path)
        return self.record.nodes[name].meta if name else None

    def labels(self, path: str) -> Labels | None:
        """The labels of a data operand; ``None`` for anything else."""
        name = dict(self.node.named_refs()).get(path)
        known = self.known.get(name) if name else None
        return known[0] if known else None

    def is_data(self, path: str) -> bool:
        """Whether an operand carries activations, rather than positions or user contents alone."""
        name = dict(self.node.named_refs()).get(path)
        return name is not None and self._data(name)

    def is_lost(self, path: str) -> bool:
        """Whether an operand is data whose labels an earlier op has lost."""
        name = dict(self.node.named_refs()).get(path)
        return name in self.known and not self.known[name]

    def dim(self, key: str, rank: int, default: int = 0) -> int:
        """A dim argument, made non-negative."""
        value = self.node.args.get(key, default)
        return (value if isinstance(value, int) else default) % max(rank, 1)

    def tensors(self) -> list[tuple[str, tuple[Size, ...]]]:
        """Path and shape of every tensor operand."""
        pairs = []
        for path, name in self.node.named_refs():
            meta = self.record.nodes[name].meta
            if isinstance(meta, TensorMeta):
                pairs.append((path, meta.shape))
        return pairs


Rule = Callable[[OpView], AxisResult | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ops, by their name without overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name if "." in name or name == "getitem" else f"aten.{name}"] = function
        return function

    return register


def ruled_ops() -> frozenset[str]:
    """The ops that have a rule of their own."""
    return frozenset(_RULES)


def apply_rule(view: OpView) -> AxisResult | None:
    """The axis result of an op, or ``None`` if no rule knows the op."""
    node = view.node
    if node.base_op in ASSERTIONS:
        return AxisResult(())
    known = _RULES.get(node.base_op) or _RULES.get(node.op)
    if known is None and is_pointwise(node):
        known = pointwise
    return known(view) if known else None


def align(out: Labels, shape: tuple[Size, ...]) -> Alignment:
    """How an operand of ``shape`` broadcasts against a result with labels ``out``."""
    batch = batch_dim(out)
    labels: list[DimLabel] = []
    for offset in range(len(shape), 0, -1):
        dim = out[-offset] if offset <= len(out) else ()
        labels.append(() if shape[-offset] == 1 else dim)
    return Alignment(tuple(labels), None if batch is None else len(out) - batch)


def pointwise(view: OpView) -> AxisResult:
    shape = view.shape("out")
    if shape is None:
        return AxisResult(None)
    contents = set(content_operands(view.node))
    refs = dict(view.node.named_refs())
    tensors = [(path, own) for path, own in view.tensors() if refs[path] in contents]  # type_as takes only a dtype
    paths = [path for path, _ in tensors if view.is_data(path)] or [path for path, _ in tensors]
    known = [labels for path in paths if (labels := view.labels(path)) is not None]
    if not known and any(view.is_lost(path) for path in paths):
        return AxisResult(None)  # reported where the labels were lost
    known = _read_by_keys(view, known)
    out = broadcast(known, shape)
    if out is None:
        if not known or any({f.role for dim in own for f in dim if f.is_seq} != {ROW, COL} for own in known):
            return AxisResult(None, mixing="elements at different sequence positions meet")
        swapped = broadcast([known[0], *(transposed(labels) for labels in known[1:])], shape)
        if swapped is None:
            return AxisResult(None, mixing="elements at different sequence positions meet")
        operands = {path: align(swapped, s) for path, s in tensors}
        for path in paths:  # data keeps its own roles: that they are exchanged is what is reported
            operands[path] = Alignment(view.labels(path) or (), operands[path].batch_from_right)
        return AxisResult((swapped,) * len(view.shapes_out()), operands, TRANSPOSED, True)
    out = _born(view, out)
    operands = {path: align(out, s) for path, s in tensors}
    return AxisResult((out,) * len(view.shapes_out()), operands)


def _born(view: OpView, out: Labels) -> Labels:
    """An axis that only an index brings: ``arange(S) < lengths[:, None]``, a user's mask where a bias is read."""
    present = {(f.axis, f.role) for dim in out for f in dim}
    data = [shape for path, shape in view.tensors() if view.is_data(path)]
    result = list(out)
    for path, _ in view.tensors():
        for offset, dim in enumerate(reversed(view.positional(path) or ()), 1):
            of_data = any(offset <= len(shape) and shape[-offset] != 1 for shape in data)
            free = not is_labelled(result[-offset]) and not present & {(f.axis, f.role) for f in dim}
            if has_seq(dim) and free and not of_data:
                result[-offset] = dim
    return tuple(result)


#: A handled mixing that holds while every rank has all queries: it is refused where the sequence is sharded.
TRANSPOSED = "attention: scores of keys with queries, transposed"


def _read_by_keys(view: OpView, known: list[Labels]) -> list[Labels]:
    """A padding mask ``[B, 1, 1, S]`` that meets a relative bias ``[1, H, S, S]`` runs along its columns."""
    pairs = [view.positional(path) for path, _ in view.tensors()]
    square = next(
        (own for own in pairs if own and {f.role for dim in own for f in dim if f.is_seq} == {ROW, COL}), None
    )
    if square is None:
        return known
    result = []
    for labels in known:
        dims = list(labels)
        for offset in range(1, min(len(labels), len(square)) + 1):
            mine, other = labels[-offset], square[-offset]
            if mine and other and mine == with_role(other, ROW) and has_seq(other) and mine != other:
                dims[-offset] = other
        result.append(tuple(dims))
    return result


def as_it_is(labels: Labels) -> Alignment:
    """An operand whose dims are the result's, up to the last: user contents without parameters reach it too."""
    batch = batch_dim(labels)
    return Alignment(labels, None if batch is None else len(labels) - batch)


def _same(view: OpView, path: str = "self") -> AxisResult:
    labels = view.labels(path)
    return AxisResult(None if labels is None else (labels,))
