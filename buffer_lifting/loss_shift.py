"""A loss of the next token whose shift is made by slicing, as the same loss over all positions.

``loss(data[:, :-k], target[:, k:])`` equals ``loss(data, pad(target, k, ignore_index)[:, k:])``: the targets of the
last ``k`` positions are ignored, so that a sum has the same terms and a mean the same number of them, whatever the
value of ``ignore_index`` and of those positions. In that form the sequence keeps its length, and the shifted target is
hoisted as that of a loss that pads its labels.

Requires, and proves on the graph record: every use of the sliced data leads through ops that are local along the
sequence to one loss; the loss ignores a target and reduces without class weights; its target is the slice from ``k``
of integer user inputs, and row ``s`` of the data meets target ``s``. What looks like a shift and is none stays as it
is, with the reason (:attr:`ShiftSearch.reasons`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from buffer_lifting.axes import InputLabels
from buffer_lifting.dataflow import Dep, analyse
from buffer_lifting.graph.record import Arg, GraphRecord, Node, NodeKind, Ref, TensorMeta
from buffer_lifting.graph.sizes import Size, add, multiply, product, rename
from buffer_lifting.labels import Labels, has_seq
from buffer_lifting.loss_chain import AXIS, LAST, LOSSES, MOVES, NO_SHIFT, SHORTER, SIZED, Chains, NoShift
from buffer_lifting.plan import LiftPlan

_MEAN, _SUM = 1, 2
_INTEGERS = ("int64", "int32")  # of targets; every target that a loss ignores is one of both


@dataclass(frozen=True)
class LossShift:
    """A shift that can be undone: everything that has to be changed, by node name.

    Attributes:
        loss: the loss.
        cut: the slice of the data, whose uses read ``data`` instead.
        target_cut: the slice of the target, which reads ``pad``, a new node: ``padded`` with ``amount`` elements
            ``ignore_index`` behind dim ``dim``.
        shapes: the longer shape of each node between the slices and the loss, in topological order.
        sizes: the size argument of each reshape among them: its name, and the sizes.
    """

    loss: str
    cut: str
    data: str
    target_cut: str
    pad: str
    padded: str
    dim: int
    rank: int
    amount: int
    ignore_index: int
    shapes: dict[str, tuple[Size, ...]]
    sizes: dict[str, tuple[str, tuple[Arg, ...]]]

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths to pad by, as ``constant_pad_nd`` takes them: last dim first, before and behind."""
        return (*(0, 0) * (self.rank - 1 - self.dim), 0, self.amount)


@dataclass
class ShiftSearch:
    """The shifts of a record, and why each slice that leads to a loss is none."""

    shifts: list[LossShift] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def told(self, plan: LiftPlan) -> LiftPlan:
        """The plan of the changed record, with the shifts and the reasons in it."""
        why = {name: f"; {NO_SHIFT}: {reason}" for name, reason in self.reasons.items()}
        mixing = tuple(replace(mix, reason=mix.reason + why.get(mix.node, "")) for mix in plan.report.mixing)
        return replace(plan, shifts=self.shifts, report=replace(plan.report, mixing=mixing))


def undo_shifts(record: GraphRecord, inputs: InputLabels) -> ShiftSearch:
    """Finds the shifted losses of a record, and changes it to losses over all positions."""
    result = ShiftSearch()
    if not any(node.base_op in LOSSES for node in record.nodes.values()):
        return result
    deps = analyse(record, inputs.labels)
    users, lengths = record.users(), set(inputs.lengths.values())
    order = {name: index for index, name in enumerate(record.nodes)}
    live = record.live()
    losses = [name for name, node in record.nodes.items() if node.base_op in LOSSES and name in live]
    for node in list(record.nodes.values()):
        if node.name not in live or not deps[node.name] & Dep.DATA or _cut(record, node, lengths) is None:
            continue
        search = _Search(record, users, order, lengths, deps, losses)
        try:
            shift = search.shift(node)
        except NoShift as no:
            if search.loss is not None:
                result.reasons[node.name] = str(no)
            continue
        if any(shift.target_cut == other.target_cut or shift.loss == other.loss for other in result.shifts):
            result.reasons[node.name] = "another loss reads the same slice of the targets"
            continue
        result.shifts.append(shift)
    for shift in result.shifts:
        _apply(record, shift)
    return result


def _cut(record: GraphRecord, node: Node, lengths: set[Size]) -> tuple[int, Size, Size, Size] | None:
    """Of a slice of a whole sequence: its dim, where it begins, how many rows it has, and how many there are."""
    source = node.args.get("self")
    if node.base_op not in ("aten.slice", "aten.narrow") or not isinstance(source, Ref) or node.tensor is None:
        return None
    meta, dim, start = record.nodes[source.name].tensor, node.args.get("dim", 0), node.args.get("start", 0)
    if meta is None or not isinstance(dim, int) or node.args.get("step", 1) not in (1, None):
        return None
    dim %= len(meta.shape)
    whole, rows = meta.shape[dim], node.tensor.shape[dim]
    if whole not in lengths or whole == rows or not isinstance(start, int | None):
        return None
    if start is not None and start < 0:
        return None
    return dim, start or 0, rows, whole


class _Search(Chains):
    """One slice of data, followed to its loss."""

    def __init__(
        self,
        record: GraphRecord,
        users: dict[str, list[str]],
        order: dict[str, int],
        lengths: set[Size],
        deps: dict[str, Dep],
        losses: list[str],
    ) -> None:
        super().__init__(record, users, order)
        self.lengths, self.deps, self.losses = lengths, deps, losses
        self.loss: Node | None = None

    def shift(self, cut: Node) -> LossShift:
        """The shift that begins with a slice of data.

        Raises:
            NoShift: it is none.
        """
        found = _cut(self.record, cut, self.lengths)
        assert found is not None
        dim, start, rows, self.whole = found
        below = self.below(cut.name)
        losses = [name for name in below if self.record.nodes[name].base_op in LOSSES]
        if len(losses) == 1:
            self.loss = self.record.nodes[losses[0]]
        if not losses:
            raise NoShift("it leads to no loss")
        amount = add(self.whole, multiply(-1, rows))
        if start != 0 or not isinstance(amount, int) or amount < 1:
            raise NoShift("only a slice that drops the last positions, [:, :-k], can be undone")
        if len(losses) != 1 or self.loss is None:
            raise NoShift("it leads to several losses")
        self.amount = amount
        if rows == 1:
            raise NoShift("one position is left of the sequence; export with a longer example")
        data = self.follow(cut, dim, self.loss, "self")
        ignored = self._check_loss(self.loss)
        target_cut, target_dim = self._target(self.loss)
        targets = self.follow(target_cut, target_dim, self.loss, "target")
        rest = data[self._operand("self")]
        if len(rest) < 2 or has_seq(rest[1]) or (rest[0], *rest[2:]) != targets[self._operand("target")]:
            raise NoShift("its rows and the targets are not laid out alike where the loss reads them")
        if any(has_seq(dim) and dim[-1].axis != AXIS for dim in rest):
            raise NoShift("the batch is folded behind the sequence where its loss reads it; transpose it first")
        source, padded = cut.args["self"], target_cut.args["self"]
        assert isinstance(source, Ref) and isinstance(padded, Ref) and target_cut.tensor is not None
        labels = {name: own for name, own in {**data, **targets}.items() if name != cut.name}
        names = sorted(labels, key=self.order.__getitem__)
        return LossShift(
            loss=self.loss.name,
            cut=cut.name,
            data=source.name,
            target_cut=target_cut.name,
            pad=self._fresh(f"{target_cut.name}_padded"),
            padded=padded.name,
            dim=target_dim,
            rank=len(target_cut.tensor.shape),
            amount=amount,
            ignore_index=ignored,
            shapes={name: self._longer(name, labels[name]) for name in names},
            sizes={
                name: self._sizes(self.record.nodes[name], labels[name])
                for name in names
                if self.record.nodes[name].base_op in SIZED
            },
        )

    def _operand(self, path: str) -> str:
        assert self.loss is not None
        value = self.loss.args.get(path)
        return value.name if isinstance(value, Ref) else ""

    def _fresh(self, name: str) -> str:
        while name in self.record.nodes:
            name += "_"
        return name

    # -- the loss and its target ------------------------------------------------------------------------------

    def _check_loss(self, loss: Node) -> int:
        """The target that the loss ignores."""
        ignored = loss.args.get("ignore_index")
        if not isinstance(ignored, int) or abs(ignored) >= 2**31:
            raise NoShift("the target that its loss ignores is not known")
        reduction = loss.args.get("reduction")
        if reduction not in (_MEAN, _SUM):
            raise NoShift("its loss is not reduced (reduction='none'): write reduction='sum' or 'mean' in the model")
        if reduction == _MEAN and loss.args.get("weight") is not None:
            raise NoShift("its loss is a mean with class weights: ranks would not know each other's sum of weights")
        return ignored

    def _target(self, loss: Node) -> tuple[Node, int]:
        """The slice that makes the loss's target, and its dim."""
        name = self._operand("target")
        while name:
            node = self.record.nodes[name]
            if node.kind is not NodeKind.OP or node.tensor is None or node.tensor.dtype not in _INTEGERS:
                break
            found = _cut(self.record, node, self.lengths)
            if found is not None:
                return self._paired(node, found)
            source = node.args.get("self")
            if node.base_op not in MOVES or not isinstance(source, Ref):
                break
            name = source.name
        raise NoShift("the target of its loss is no slice of integers")

    def _paired(self, node: Node, found: tuple[int, Size, Size, Size]) -> tuple[Node, int]:
        dim, start, rows, whole = found
        source = node.args.get("self")
        assert isinstance(source, Ref)
        origin, dep = self.record.nodes[source.name], self.deps[source.name]
        if Dep.USER not in dep or dep & (Dep.DATA | Dep.PARAM | Dep.RANDOM | Dep.WRITTEN):
            raise NoShift("the target of its loss is not made of user inputs alone")
        if node.base_op != "aten.slice" or origin.tensor is None or origin.tensor.dtype not in _INTEGERS:
            raise NoShift("the target of its loss is no slice of integers")
        if whole != self.whole or start != self.amount or add(rows, start) != whole:
            raise NoShift(
                f"[:, :-{self.amount}] of the data goes with [:, {self.amount}:] of the targets, which this is not"
            )
        return node, dim

    # -- the longer form --------------------------------------------------------------------------------------

    def _longer(self, name: str, labels: Labels) -> tuple[Size, ...]:
        meta = self.record.nodes[name].tensor
        assert meta is not None
        back = {SHORTER: add(self.whole, -self.amount)}
        return tuple(
            product(self.whole if f.axis == AXIS else rename(f.size, back) for f in own) if has_seq(own) else size
            for own, size in zip(labels, meta.shape, strict=True)
        )

    def _sizes(self, node: Node, labels: Labels) -> tuple[str, tuple[Arg, ...]]:
        """The sizes that a reshape takes, its longer dim inferred."""
        key = SIZED[node.base_op]
        given = node.args.get(key)
        if not isinstance(given, tuple) or len(given) != len(labels) or node.tensor is None:
            raise NoShift(f"the sizes of {node.name!r} are not known")
        result: list[Arg] = []
        for arg, own, size in zip(given, labels, node.tensor.shape, strict=True):
            if has_seq(own):
                result.append(-1)
            elif arg != -1:
                result.append(arg)
            elif isinstance(size, int):
                result.append(size)
            else:
                raise NoShift(f"{node.name!r} infers a dim that is not the sequence; write its size in the model")
        return key, tuple(result)


def _apply(record: GraphRecord, shift: LossShift) -> None:
    """Changes a record as :func:`buffer_lifting.passes.undo_shift.undo_shifts_in` changes the graph."""
    nodes: dict[str, Node] = {}
    for name, node in record.nodes.items():
        if name == shift.cut:
            continue
        if name == shift.target_cut:
            nodes[shift.pad] = _padding(record, shift, node)
            node = replace(node, args={**node.args, "self": Ref(shift.pad), "end": LAST}, _refs=None, _by_path=None)
        elif shift.cut in node.refs():
            args = {key: _redirected(arg, shift.cut, shift.data) for key, arg in node.args.items()}
            node = replace(node, args=args, _refs=None, _by_path=None)
        if name in shift.shapes and isinstance(node.meta, TensorMeta):
            node = replace(node, meta=TensorMeta(shift.shapes[name], node.meta.dtype))
        if name in shift.sizes:
            key, sizes = shift.sizes[name]
            node = replace(node, args={**node.args, key: sizes}, _refs=None, _by_path=None)
        nodes[name] = node
    record.nodes = nodes


def _padding(record: GraphRecord, shift: LossShift, cut: Node) -> Node:
    meta = record.nodes[shift.padded].tensor
    assert meta is not None
    shape = list(meta.shape)
    shape[shift.dim] = add(shape[shift.dim], shift.amount)
    return Node(
        shift.pad,
        NodeKind.OP,
        "aten.constant_pad_nd.default",
        {"self": Ref(shift.padded), "pad": shift.widths, "value": shift.ignore_index},
        TensorMeta(tuple(shape), meta.dtype),
        cut.modules,
        cut.location,
    )


def _redirected(arg: Arg, old: str, new: str) -> Arg:
    if isinstance(arg, Ref):
        return Ref(new) if arg.name == old else arg
    return tuple(_redirected(item, old, new) for item in arg) if isinstance(arg, tuple) else arg
