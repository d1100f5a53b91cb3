"""How what is known of a value follows from what is known of its operands: a rule for each kind of op."""

from __future__ import annotations

import operator
from collections.abc import Callable

from buffer_lifting.causal_domain import (
    Affine,
    Number,
    Steps,
    Unknown,
    Value,
    affine,
    as_affine,
    at_least_zero,
    combined,
    extremes,
    moved,
    pointwise,
    substituted,
    uniform,
)
from buffer_lifting.causal_numbers import COMPARISONS, FILLS, POINTWISE
from buffer_lifting.causal_views import sources_of_dims
from buffer_lifting.dataflow import written_storage
from buffer_lifting.graph.record import Arg, GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind
from buffer_lifting.graph.sizes import Size, add, bounds
from buffer_lifting.ops import is_view

#: The values of a buffer or constant by its FQN.
Tables = Callable[[str], Value]
_DOCUMENTS = "it depends on the documents of packed sequences (documents=False takes those of the export)"
_COPIES = frozenset(
    f"aten.{name}"
    for line in ["to _to_copy type_as clone contiguous detach alias lift_fresh_copy lift_fresh detach_ constant_pad_nd"]
    for name in line.split()
)


class Prover:
    """What is known of each value of a record, computed once."""

    def __init__(self, record: GraphRecord, tables: Tables, documents: bool) -> None:
        self.record, self.tables, self.documents = record, tables, documents
        self.known: dict[str, Value] = {}
        self.written = written_storage(record)

    def value(self, name: str) -> Value:
        """What is known of a node's value; its operands first, without recursion."""
        stack = [name]
        while stack:
            node = self.record.nodes[stack[-1]]
            missing = [ref for ref in node.refs() if ref not in self.known] if node.kind is NodeKind.OP else []
            if node.name not in self.known and missing and node.tensor is not None:
                stack.extend(missing)
                continue
            stack.pop()
            if node.name not in self.known:
                self.known[node.name] = self._settled(node, self._made(node))
        return self.known[name]

    def _settled(self, node: Node, value: Value) -> Value:
        """Along a dim of one element there is one index, 0."""
        if node.tensor is None or isinstance(value, Unknown):
            return value
        single = {d - len(node.tensor.shape): Affine(0) for d, size in enumerate(node.tensor.shape) if size == 1}
        return substituted(value, single)

    def _made(self, node: Node) -> Value:
        if node.name in self.written:
            return Unknown(f"{node.name!r} is written in place")
        if node.kind is NodeKind.STATE and node.state_kind is not StateKind.PARAMETER and not node.mutated:
            return self.tables(node.fqn)
        if node.kind is NodeKind.STATE:
            return Unknown(f"it reads {node.fqn!r}, which can change")
        if node.kind is NodeKind.INPUT:
            return Unknown(f"it depends on the input {node.fqn!r}")
        if isinstance(node.meta, ScalarMeta):
            return Unknown(f"it depends on {node.name!r}") if node.meta.size is None else affine(node.meta.size, {})
        if node.tensor is None:
            return Unknown(f"{node.op} is not followed")
        name = node.base_op.removeprefix("aten.")
        rule = _RULES.get(name)
        try:
            if name in FILLS:
                return pointwise(lambda: FILLS[name], node.tensor.dtype)
            if name in POINTWISE:
                return self._pointwise(node, POINTWISE[name])
            if name in COMPARISONS:
                return self._compare(node, name)
            if node.base_op in _COPIES:
                return self._copy(node)
            if rule is not None:
                return rule(self, node)
            return self._view(node)
        except _Stop as stop:
            return stop.value

    # -- operands ---------------------------------------------------------------------------------------------

    def arg(self, node: Node, *names: str) -> Value:
        """An operand as it is read element by element; raises :class:`_Stop` if nothing is known of it."""
        found: Arg = next((node.args[name] for name in names if node.args.get(name) is not None), None)
        value: Value = Unknown(f"{node.op} is not followed")
        if isinstance(found, Ref):
            value = self.known[found.name]
            own = self.record.nodes[found.name].tensor
            if own is not None and node.tensor is not None and not isinstance(value, Unknown):
                self._check_broadcast(own.shape, node.tensor.shape, value, node)
        elif isinstance(found, bool | int | float):
            value = uniform(found)
        if isinstance(value, Unknown):
            raise _Stop(value)
        return value

    def _check_broadcast(self, own: tuple[Size, ...], out: tuple[Size, ...], value: Value, node: Node) -> None:
        used = [d for d, _ in value.coefs] if isinstance(value, Affine) else [*getattr(value, "pair", ())]
        for dim in used:
            if dim and (len(out) < -dim or own[dim] != out[dim]):
                raise _Stop(Unknown(f"{node.op} has operands of other sizes"))

    def steps(self, node: Node, *names: str) -> Steps:
        """An operand that is a number or depends on the distance alone."""
        value = self.arg(node, *names)
        if not isinstance(value, Steps):
            raise _Stop(Unknown(f"{node.op} of positions is not followed"))
        return value

    def number(self, node: Node, name: str, default: int | None = None) -> int:
        """An integer argument."""
        value = node.args.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Stop(Unknown(f"{node.op} with {name}={value} is not followed"))
        return value

    def shape(self, node: Node, name: str = "self") -> tuple[Size, ...]:
        """The shape of a tensor operand."""
        ref = node.args.get(name)
        meta = self.record.nodes[ref.name].tensor if isinstance(ref, Ref) else None
        if meta is None:
            raise _Stop(Unknown(f"{node.op} is not followed"))
        return meta.shape

    # -- rules ------------------------------------------------------------------------------------------------

    def _pointwise(self, node: Node, function: Callable[..., Number]) -> Value:
        assert node.tensor is not None
        left = self.arg(node, "self")
        if "other" not in node.args:
            return pointwise(function, node.tensor.dtype, self.steps(node, "self"))
        right = self.arg(node, "other")
        if isinstance(left, Steps) and isinstance(right, Steps):
            return pointwise(function, node.tensor.dtype, left, right)
        one, two = as_affine(left), as_affine(right)
        if function is operator.mul and one is not None and two is not None:
            for factor, linear in ((one, two), (two, one)):
                if isinstance(factor.const, int) and not factor.coefs:
                    return self._integers(node, combined(Affine(0), linear, factor.const))
        return Unknown(f"{node.op} of positions is not followed")

    def _integers(self, node: Node, value: Value) -> Value:
        """A linear function that its dtype holds."""
        assert node.tensor is not None
        if isinstance(value, Affine) and node.tensor.dtype not in ("int64", "int32"):
            return Unknown(f"it computes with positions in {node.tensor.dtype}")
        return value

    def _sum(self, node: Node) -> Value:
        assert node.tensor is not None
        left, right = self.arg(node, "self"), self.arg(node, "other")
        factor = node.args.get("alpha", 1)
        if not isinstance(factor, int | float):
            return Unknown(f"{node.op} is not followed")
        name = node.base_op.removeprefix("aten.")
        if name == "rsub":
            left, right = right, left
        factor = factor if name == "add" else -factor
        if isinstance(left, Steps) and isinstance(right, Steps):
            return pointwise(lambda a, b: a + factor * b, node.tensor.dtype, left, right)
        one, two = as_affine(left), as_affine(right)
        if one is None or two is None or not isinstance(factor, int):
            return Unknown(f"{node.op} of positions is not followed")
        return self._integers(node, combined(one, two, factor))

    def _compare(self, node: Node, name: str) -> Value:
        left, right = self.arg(node, "self"), self.arg(node, "other")
        if isinstance(left, Steps) and isinstance(right, Steps):
            return pointwise(COMPARISONS[name], "bool", left, right)
        one, two = as_affine(left), as_affine(right)
        if one is None or two is None:
            return Unknown(f"{node.op} of positions with other numbers is not followed")
        assert node.tensor is not None
        sizes = {d - len(node.tensor.shape): size for d, size in enumerate(node.tensor.shape)}
        results = []
        for first, second in ((one, two), (two, one)):  # first >= second
            difference = as_affine(combined(first, second, -1))
            if difference is None:
                return Unknown(f"{node.op} compares large numbers")
            result = at_least_zero(difference, sizes, self.record.ranges)
            results.append(result)
        needed = {"ge": (0,), "lt": (0,), "le": (1,), "gt": (1,), "eq": (0, 1), "ne": (0, 1)}[name]
        parts = [results[place] for place in needed]
        unknown = next((part for part in parts if isinstance(part, Unknown)), None)
        if unknown is not None:
            return unknown
        negated = name in ("lt", "gt", "ne")
        both = [part for part in parts if isinstance(part, Steps)]
        return pointwise(lambda *each: all(each) != negated, "bool", *both)

    def _copy(self, node: Node) -> Value:
        assert node.tensor is not None
        if node.base_op == "aten.constant_pad_nd" and any(pad != 0 for pad in _items(node.args.get("pad"))):
            return Unknown("it is padded")
        value = self.arg(node, "self")
        return (
            pointwise(lambda a: a, node.tensor.dtype, value)
            if isinstance(value, Steps)
            else self._integers(node, value)
        )

    def _not(self, node: Node) -> Value:
        assert node.tensor is not None
        if node.tensor.dtype != "bool":
            return Unknown(f"{node.op} of integers is not followed")
        return pointwise(operator.not_, "bool", self.steps(node, "self"))

    def _full(self, node: Node) -> Value:
        assert node.tensor is not None
        return pointwise(lambda a: a, node.tensor.dtype, self.steps(node, "fill_value", "value", "s"))

    def _where(self, node: Node) -> Value:
        assert node.tensor is not None
        if node.base_op == "aten.where":
            parts = (self.steps(node, "condition"), self.steps(node, "self"), self.steps(node, "other"))
        else:
            parts = (self.steps(node, "mask"), self.steps(node, "value"), self.steps(node, "self"))
        return pointwise(lambda c, a, b: a if c else b, node.tensor.dtype, *parts)

    def _triangle(self, node: Node) -> Value:
        assert node.tensor is not None
        value, diagonal = self.steps(node, "self"), self.number(node, "diagonal", 0)
        if any(size == 1 for size in node.tensor.shape[-2:]):
            return Unknown(f"{node.op} of a row is not followed")
        if node.base_op == "aten.tril":  # column - row <= diagonal
            inside = Steps((False, True), (-diagonal,), (-2, -1))
        else:
            inside = Steps((True, False), (1 - diagonal,), (-2, -1))
        return pointwise(lambda a, c: a if c else 0, node.tensor.dtype, value, inside)

    def _arange(self, node: Node) -> Value:
        start = as_affine(self.arg(node, "start")) if node.args.get("start") is not None else Affine(0)
        if start is None:
            return Unknown("aten.arange of fractions is not followed")
        return self._integers(node, affine(start.const, {-1: self.number(node, "step", 1)}))

    def _slice(self, node: Node) -> Value:
        shape = self.shape(node)
        dim = self.number(node, "dim", 0) % len(shape) - len(shape)
        start = as_affine(self.arg(node, "start")) if node.args.get("start") is not None else Affine(0)
        step = self.number(node, "step", 1)
        if start is None or start.coefs:
            return Unknown(f"{node.op} is not followed")
        return self._read(node, dim, self._from_front(node, start.const, shape[dim]), step)

    def _from_front(self, node: Node, place: Size, size: Size) -> Size:
        """A place that may count from the end; raises where that is not known, or where it is cut off at the front."""
        low, high = bounds(place, self.record.ranges)
        if high is not None and high < 0:
            place = add(place, size)
            low = bounds(place, self.record.ranges)[0]
        if low is None or low < 0:
            raise _Stop(Unknown(f"{node.op} starts at a place that is not known"))
        return place

    def _read(self, node: Node, dim: int, start: Size, step: int) -> Value:
        """The operand at ``start + step * index`` along one dim."""
        value = self.known[node.refs()[0]]
        return value if isinstance(value, Unknown) else substituted(value, {dim: Affine(start, ((dim, step),))})

    def _select(self, node: Node) -> Value:
        shape = self.shape(node)
        dim = self.number(node, "dim", 0) % len(shape) - len(shape)
        place = as_affine(self.arg(node, "index"))
        if place is None or place.coefs:
            return Unknown(f"{node.op} is not followed")
        value = self.known[node.refs()[0]]
        value = substituted(value, {dim: Affine(self._from_front(node, place.const, shape[dim]))})
        rank = len(shape)
        return moved(value, {d: (d if d > dim else d + 1) for d in range(-rank, 0) if d != dim})

    def _index(self, node: Node) -> Value:
        shape, indices = self.shape(node), _items(node.args.get("indices"))
        value = self.known[node.refs()[0]]
        if isinstance(value, Unknown) or (isinstance(value, Steps) and not value.breaks):
            return value
        assert node.tensor is not None
        if len(indices) != len(shape):
            return Unknown(f"{node.op} of some dims is not followed")
        sizes = {d - len(node.tensor.shape): size for d, size in enumerate(node.tensor.shape)}
        used = [d for d, _ in value.coefs] if isinstance(value, Affine) else list(value.pair)
        found: dict[int, Affine] = {}
        for dim in used:
            ref = indices[dim]
            index = as_affine(self.known[ref.name]) if isinstance(ref, Ref) else None
            own = self.record.nodes[ref.name].tensor if isinstance(ref, Ref) else None
            if index is None or own is None or own.dtype not in ("int64", "int32"):
                return Unknown(f"{node.op} at indices that are not positions")
            self._check_broadcast(own.shape, node.tensor.shape, index, node)
            low = bounds(extremes(index, sizes)[0], self.record.ranges)[0]
            if low is None or low < 0:  # counted from the end
                return Unknown(f"{node.op} at indices that may be negative")
            found[dim] = index
        return substituted(value, found)

    def _difference(self, node: Node) -> Value:
        """Of positions that go up by the same everywhere: with the element in front, if there is one."""
        value = self.arg(node, "self")
        if self.documents:
            return Unknown(_DOCUMENTS)
        shape = self.shape(node)
        dim = self.number(node, "dim", -1) % len(shape) - len(shape)
        if self.number(node, "n", 1) != 1 or node.args.get("append") is not None or as_affine(value) is None:
            return Unknown(f"{node.op} is not followed")
        step = substituted(value, {dim: Affine(1)}), substituted(value, {dim: Affine(0)})
        one, two = as_affine(step[0]), as_affine(step[1])
        assert one is not None and two is not None
        change = combined(one, two, -1)
        if node.args.get("prepend") is not None:
            before = as_affine(self.known[node.refs()[1]])
            if self.shape(node, "prepend")[dim] != 1 or before is None or combined(two, before, -1) != change:
                return Unknown(f"{node.op} is not followed")
        return change

    def _cumsum(self, node: Node) -> Value:
        """Of zeros."""
        value = self.arg(node, "self")
        if self.documents:
            return Unknown(_DOCUMENTS)
        zero = isinstance(value, Steps) and not value.breaks and value.values[0] == 0
        return uniform(0) if zero else Unknown(f"{node.op} is not followed")

    def _view(self, node: Node) -> Value:
        """A view that moves whole dims: the operand's dims by the result's."""
        refs = node.refs()
        own = self.record.nodes[refs[0]].tensor if refs else None
        if own is None or node.tensor is None or not isinstance(node.args.get("self"), Ref):
            return Unknown(f"{node.op} is not followed")
        value = self.known[refs[0]]
        if isinstance(value, Steps) and not value.breaks and is_view(node):
            return value
        dims = sources_of_dims(node, own.shape, node.tensor.shape)
        if isinstance(value, Unknown) or dims is None:
            return value if isinstance(value, Unknown) else Unknown(f"{node.op} is not followed")
        return moved(value, dims)


class _Stop(Exception):
    def __init__(self, value: Value) -> None:
        super().__init__(value)
        self.value = value


def _items(arg: Arg) -> tuple[Arg, ...]:
    return arg if isinstance(arg, tuple) else ()


_RULES: dict[str, Callable[[Prover, Node], Value]] = {
    "add": Prover._sum,
    "sub": Prover._sum,
    "rsub": Prover._sum,
    "bitwise_not": Prover._not,
    "full": Prover._full,
    "new_full": Prover._full,
    "full_like": Prover._full,
    "fill": Prover._full,
    "scalar_tensor": Prover._full,
    "where": Prover._where,
    "masked_fill": Prover._where,
    "tril": Prover._triangle,
    "triu": Prover._triangle,
    "arange": Prover._arange,
    "slice": Prover._slice,
    "select": Prover._select,
    "index": Prover._index,
    "diff": Prover._difference,
    "cumsum": Prover._cumsum,
}
