"""How batch and sequence labels pass through each kind of op, forward, for values that carry data.

A rule also says how the op's other operands line up with the data (that is where position values are read), and
whether the op mixes the sequence. An op without a rule is unknown, never assumed to be local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from buffer_lifting.graph.record import GraphRecord, Node, TensorMeta
from buffer_lifting.graph.sizes import Size, symbols
from buffer_lifting.labels import (
    BATCH,
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

#: What a sum, maximum, ... over keys is reported as.
OVER_KEYS = "attention: a reduction over keys"


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
    hint: str = ""  # what to do about the mixing, if there is more to say than of any


class OpView:
    """One node with what is known of its operands."""

    def __init__(
        self,
        record: GraphRecord,
        node: Node,
        known: dict[str, tuple[Labels, ...] | None],
        positional: Callable[..., Labels | None] = lambda name, of_users=False, new=False: None,
        lengths: Mapping[str, Size] | None = None,
        data: Callable[[str], bool] = lambda name: True,
        varies: Callable[[str], tuple[bool, ...]] | None = None,
        softmaxes: Mapping[str, int] | None = None,
    ) -> None:
        """``positional``: the labels of a value without user contents, as far as its sizes tell.

        ``varies``: for each dim of a value whether two elements along it can differ (default: they can).
        ``softmaxes``: the dim of each product that a softmax runs over further down, as far as that is known.
        """
        self._softmaxes = softmaxes or {}
        self._data, self._varies = data, varies
        self.record, self.node, self.known, self._positional = record, node, known, positional
        self._lengths = lengths or {}
        self._tensors: list[tuple[str, tuple[Size, ...]]] | None = None

    def softmax_dim(self) -> int | None:
        """The dim of the result that a softmax runs over further down."""
        return self._softmaxes.get(self.node.name)

    def length(self, axis: str) -> Size | None:
        """The length of a sequence axis."""
        return self._lengths.get(axis)

    def is_length(self, size: Size) -> bool:
        """Whether a size is made from the dynamic length of a sequence axis."""
        return any(not symbols(size).isdisjoint(symbols(length)) for length in self._lengths.values())

    def positional(self, path: str) -> Labels | None:
        """The labels of an operand without user contents, by its sizes; ``None`` for anything else."""
        name = self.node.ref(path)
        return self._positional(name) if name and self.known.get(name) is None else None

    def brings(self, path: str) -> Labels | None:
        """The same, of a value that has sequence dims of its own: a weight that is as wide as a sequence has none."""
        name = self.node.ref(path)
        return self._positional(name, False, True) if name and self.known.get(name) is None else None

    def by_sizes(self, path: str) -> Labels | None:
        """The same, of a value of user contents as well: what it is made of has to bear it out."""
        name = self.node.ref(path)
        return self._positional(name, True) if name and not self._data(name) else None

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
        name = self.node.ref(path)
        return self.record.nodes[name].meta if name else None

    def labels(self, path: str) -> Labels | None:
        """The labels of a data operand; ``None`` for anything else."""
        name = self.node.ref(path)
        known = self.known.get(name) if name else None
        return known[0] if known else None

    def is_data(self, path: str) -> bool:
        """Whether an operand carries activations, rather than positions or user contents alone."""
        name = self.node.ref(path)
        return name is not None and self._data(name)

    def varies(self, path: str) -> tuple[bool, ...]:
        """For each dim of a tensor operand, whether two elements along it can differ."""
        if self._varies is None:
            return tuple(size != 1 for size in self.shape(path) or ())
        return self._varies(self.node.ref(path) or path)

    def is_lost(self, path: str) -> bool:
        """Whether an operand is data whose labels an earlier op has lost."""
        name = self.node.ref(path)
        return name in self.known and not self.known[name]

    def dim(self, key: str, rank: int, default: int = 0) -> int:
        """A dim argument, made non-negative."""
        value = self.node.args.get(key, default)
        return (value if isinstance(value, int) else default) % max(rank, 1)

    def tensors(self) -> list[tuple[str, tuple[Size, ...]]]:
        """Path and shape of every tensor operand."""
        if self._tensors is None:
            nodes = self.record.nodes
            metas = [(path, nodes[name].meta) for path, name in self.node.named_refs()]
            self._tensors = [(path, meta.shape) for path, meta in metas if isinstance(meta, TensorMeta)]
        return self._tensors


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
    if len(shape) == len(out) and 1 not in shape:
        return Alignment(out, len(out) - batch if batch is not None else None)
    labels: list[DimLabel] = []
    for offset in range(len(shape), 0, -1):
        dim = out[-offset] if offset <= len(out) else ()
        labels.append(() if shape[-offset] == 1 else dim)
    return Alignment(tuple(labels), None if batch is None else len(out) - batch)


def pointwise(view: OpView) -> AxisResult:
    shape = view.shape("out")
    if shape is None:
        return AxisResult(None)
    tensors, contents = view.tensors(), content_operands(view.node)
    if contents is not view.node.refs():
        refs = dict(view.node.named_refs())
        tensors = [(path, own) for path, own in tensors if refs[path] in contents]  # type_as takes only a dtype
    paths = [path for path, _ in tensors if view.is_data(path)] or [path for path, _ in tensors]
    known, bent = _spread_data(view, paths)
    if not known and any(view.is_lost(path) for path in paths):
        return AxisResult(None)  # reported where the labels were lost
    indices = any([view.labels(path) is None for path, _ in view.tensors()])  # only then can one be positional
    if indices:
        known = _read_by_keys(view, known)
    out = broadcast(known, shape)
    if out is None and not any([view.is_data(path) for path in paths]):
        out = _outer(known, shape)
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
    if indices or len(paths) != len(tensors):
        out = _born(view, out)
    operands = {}
    aligned: tuple[tuple[Size, ...], Alignment] | None = None
    for path, s in tensors:
        if aligned is None or s != aligned[0]:
            aligned = (s, align(out, s))
        operands[path] = aligned[1]
    for path in bent:
        operands[path] = Alignment(view.labels(path) or (), operands[path].batch_from_right)
    mixing = OF_KEYS if any(bent.values()) else ""
    return AxisResult((out,) * len(view.shapes_out()), operands, mixing, bool(mixing))


def _outer(known: list[Labels], shape: tuple[Size, ...]) -> Labels | None:
    """Labels of ``p[:, :, None] - p[:, None, :]`` of the user's: the first of the two dims is that of the queries."""
    places: dict[DimLabel, set[int]] = {}
    for labels in known:
        for dim, own in enumerate(labels, len(shape) - len(labels)):
            if has_seq(own):
                places.setdefault(own, set()).add(dim)
    by_place = dict[int, DimLabel]()
    for own, dims in places.items():
        if len(dims) == 2 and with_role(own, COL) not in places:
            by_place[max(dims)] = with_role(own, COL)
    result = []
    for labels in known:
        first = len(shape) - len(labels)
        result.append(tuple(by_place.get(dim, own) if has_seq(own) else own for dim, own in enumerate(labels, first)))
    return broadcast(result, shape) if by_place else None


def _spread_data(view: OpView, paths: list[str]) -> tuple[list[Labels], dict[str, bool]]:
    """The labels of the operands that count, and the data operands among them whose own labels differ from these.

    Data that is the same all along a dim (a norm expanded to the scores, ``[B, H, 1, S]`` expanded to
    ``[B, H, S, S]``) broadcasts there. For each such operand: whether it is read by the keys (:func:`by_keys`).
    """
    squares: list[Labels | None] = []
    if len(view.tensors()) > 1:  # a square does not line up with itself
        squares = [own for path, _ in view.tensors() if _is_square(own := view.labels(path) or view.by_sizes(path))]
    known: list[Labels] = []
    bent: dict[str, bool] = {}
    for path in paths:
        labels = view.labels(path)
        if labels is None:
            continue
        if view.is_data(path):
            plain = where_it_varies(view, path, labels)
            square = next((own for own in squares if own and by_keys(plain, own)), None)
            if square is not None or plain != labels:
                bent[path] = square is not None
            labels = plain
            if square is not None:
                labels = by_keys(plain, square) or plain
                known.append(tuple(dim if has_seq(dim) else () for dim in square))
        known.append(labels)
    return known, bent


def where_it_varies(view: OpView, path: str, labels: Labels) -> Labels:
    """Data labels without dims along which all elements are equal: features, and one of two dims of one role."""
    flags = view.varies(path)
    if len(flags) != len(labels):
        return labels
    if all([flag or not dim for flag, dim in zip(flags, labels, strict=True)]):
        return labels
    kinds = [tuple((f.axis, f.role) for f in dim) for dim in labels]  # gathered keys are longer than rows
    twice = [dim for dim, kind in zip(labels, kinds, strict=True) if has_seq(dim) and kinds.count(kind) > 1]
    equal = [not flag and (not is_labelled(dim) or dim in twice) for flag, dim in zip(flags, labels, strict=True)]
    return tuple(() if same else dim for same, dim in zip(equal, labels, strict=True))


_SQUARE = {ROW, COL}


def _is_square(labels: Labels | None) -> bool:
    """Whether a value has queries and keys."""
    return labels is not None and {f.role for dim in labels for f in dim if f.axis and f.axis != BATCH} == _SQUARE


def by_keys(labels: Labels, scores: Labels) -> Labels | None:
    """Labels of data ``[B, H, 1, S]`` where it meets scores ``[B, H, S, S]``: it runs along their keys.

    ``None`` unless its only sequence dim stands where the scores have the keys of the same sequence, and it has
    nothing (size 1, or no dim) where they have the queries.
    """
    seq = [d for d, dim in enumerate(labels) if has_seq(dim)]
    if len(seq) != 1:
        return None
    keys = seq[0] - len(labels)
    if -keys > len(scores) or with_role(labels[keys], COL) != scores[keys] or labels[keys] == scores[keys]:
        return None
    queries = next((d - len(scores) for d, dim in enumerate(scores) if dim == labels[keys]), None)
    if queries is None or (-queries <= len(labels) and labels[queries]):
        return None
    return (*labels[: seq[0]], scores[keys], *labels[seq[0] + 1 :])


def _where_it_has(view: OpView, path: str, shape: tuple[Size, ...]) -> list[bool]:
    """For each dim of a data operand whether it brings elements of its own, and no copies of one."""
    labels = view.labels(path)
    plain = where_it_varies(view, path, labels) if labels is not None else None
    return [size != 1 and (plain is None or plain[dim] != ()) for dim, size in enumerate(shape)]


def _roles(dim: DimLabel) -> set[tuple[str, str]]:
    return {(factor.axis, factor.role) for factor in dim}


def _brought(view: OpView, path: str) -> Labels | None:
    return view.positional(path) or (None if view.is_data(path) else view.labels(path))


def _born(view: OpView, out: Labels) -> Labels:
    """An axis that data does not bring: ``arange(S) < lengths[:, None]``, a user's mask where a bias is read.

    An index brings it, or the user's contents where they meet data: a mask of queries and keys, with data of the keys.
    """
    pairs = [(path, _brought(view, path)) for path, _ in view.tensors()]
    indices = [(path, labels) for path, labels in pairs if labels]
    if not indices:
        return out
    present = set[tuple[str, str]]().union(*map(_roles, out))
    data = [_where_it_has(view, path, shape) for path, shape in view.tensors() if view.is_data(path)]
    result = list(out)
    for _, labels in indices:
        for offset, dim in enumerate(reversed(labels), 1):
            if not has_seq(dim) or is_labelled(result[-offset]):
                continue
            if any(offset <= len(own) and own[-offset] for own in data):
                continue
            dim = next((own for own in (dim, with_role(dim, COL)) if not _roles(own) & present), dim)
            if not _roles(dim) & present:
                result[-offset] = dim
                present |= _roles(dim)
    return tuple(result)


#: A handled mixing that holds while every rank has all queries: it is refused where the sequence is sharded.
TRANSPOSED = "attention: scores of keys with queries, transposed"


#: A handled mixing: data of each key, where it meets scores. Where the sequence is sharded, keys have to bring it.
OF_KEYS = "attention: data of the keys meets the scores"


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
        for offset in range(1, 0 if _is_square(labels) else min(len(labels), len(square)) + 1):
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
