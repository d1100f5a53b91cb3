"""How each op on complex numbers is written with pairs of real ones: ``[..., 2]``, the real part first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.passes.fakes import Fakes
from buffer_lifting.torch_compat import schema_args

_aten = torch.ops.aten
_COPIED = ("stack_trace", "nn_module_stack", "torch_fn", "custom", "source_fn_stack")


class NoPairs(Exception):
    """An op, or a use of it, that has no rule."""


class PairEmitter:
    """Emits in front of ``anchor``, with its metadata; ``pairs`` maps complex nodes to their pairs."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.fakes = graph, Fakes(graph)
        self.pairs: dict[Node, Node] = {}
        self._parts: dict[Node, tuple[Node, Node]] = {}
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.anchor = self.inputs[-1]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node, in front of the anchor."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: self.anchor.meta[key] for key in _COPIED if key in self.anchor.meta}
        node.meta["val"] = self.fakes.of(target, args, kwargs)
        return node

    def pair(self, node: Any) -> Node:
        """The pairs of a complex node; those of an input are read off it at the top of the graph."""
        if not isinstance(node, Node):
            raise NoPairs("it has a complex number as an argument")
        if node not in self.pairs:
            if node.op != "placeholder":
                raise NoPairs(f"{node.name!r} is no tensor of its own")
            behind = self.inputs[-1].next
            anchor, self.anchor = self.anchor, behind
            self.pairs[node] = made = self.call(_aten.view_as_real.default, node)
            self.anchor = anchor
            made.meta.pop("stack_trace", None)
        return self.pairs[node]

    def parts(self, node: Node) -> tuple[Node, Node]:
        """The real and the imaginary part."""
        pair = self.pair(node)
        if pair not in self._parts:
            anchor = self.anchor
            self.anchor = self.inputs[-1].next if pair.op == "placeholder" else pair.next
            self._parts[pair] = (self.call(_aten.select.int, pair, -1, 0), self.call(_aten.select.int, pair, -1, 1))
            self.anchor = anchor
        return self._parts[pair]

    def stacked(self, real: Node, imag: Node) -> Node:
        """The pairs of two parts."""
        return self.call(_aten.stack.default, [real, imag], -1)


def is_complex(value: Any) -> bool:
    """Whether an argument is complex: a node, or a number."""
    if isinstance(value, Node):
        meta = value.meta.get("val")
        return isinstance(meta, torch.Tensor) and meta.is_complex()
    return isinstance(value, complex)


def lower(emitter: PairEmitter, node: Node) -> Node | None:
    """What stands for a node that reads or computes complex numbers: its pairs if it is complex.

    ``None`` for an assertion, which goes.

    Raises:
        NoPairs: there is no rule for it.
    """
    if "_assert_tensor_metadata" in str(node.target):
        return None
    rule = _RULES.get(node.target)
    if rule is None:
        raise NoPairs("there is no rule for the op")
    result = rule(emitter, node, schema_args(node))
    before, after = node.meta["val"], result.meta["val"]
    if isinstance(before, torch.Tensor):
        wanted = before.dtype.to_real() if before.dtype.is_complex else before.dtype
        if after.dtype != wanted:
            raise NoPairs(f"its result would have dtype {after.dtype}, not {wanted}")
    return result


Rule = Callable[[PairEmitter, Node, dict[str, Any]], Node]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)


def _dim(dim: int, rank: int) -> int:
    """A dim of a complex tensor, counted from the left: its pairs have one more on the right."""
    return dim if dim >= 0 else dim + rank


def _factor(emitter: PairEmitter, value: Any) -> Any:
    """A real factor of pairs."""
    if isinstance(value, Node) and isinstance(value.meta["val"], torch.Tensor):
        return emitter.call(_aten.unsqueeze.default, value, -1) if _rank(value) else value
    return value


@_rule(_aten.view_as_complex.default)
def _view_as_complex(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    made: Node = given["self"]
    return made


@_rule(_aten.view_as_real.default)
def _view_as_real(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.pair(given["self"])


@_rule(_aten.real.default)
def _real(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.parts(given["self"])[0] if is_complex(given["self"]) else given["self"]


@_rule(_aten.imag.default)
def _imag(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.parts(given["self"])[1]


@_rule(_aten.conj.default, torch.ops.aten._conj.default, _aten.conj_physical.default)
def _conj(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    real, imag = emitter.parts(given["self"])
    return emitter.stacked(real, emitter.call(_aten.neg.default, imag))


@_rule(_aten.polar.default)
def _polar(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    size, angle = given["abs"], given["angle"]
    real = emitter.call(_aten.mul.Tensor, size, emitter.call(_aten.cos.default, angle))
    return emitter.stacked(real, emitter.call(_aten.mul.Tensor, size, emitter.call(_aten.sin.default, angle)))


@_rule(_aten.complex.default)
def _complex(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    real, imag = given["real"], given["imag"]
    if list(map(str, real.meta["val"].shape)) != list(map(str, imag.meta["val"].shape)):
        raise NoPairs("its parts have different shapes")
    return emitter.stacked(real, imag)


@_rule(_aten.mul.Tensor)
def _mul(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    one, other = given["self"], given["other"]
    if not is_complex(one):
        one, other = other, one
    if not is_complex(other):
        return emitter.call(_aten.mul.Tensor, emitter.pair(one), _factor(emitter, other))
    emitter.pair(other)  # a number is refused before anything is emitted
    (a, b), (c, d) = emitter.parts(one), emitter.parts(other)

    def product(x: Node, y: Node) -> Node:
        return emitter.call(_aten.mul.Tensor, x, y)

    real = emitter.call(_aten.sub.Tensor, product(a, c), product(b, d))
    return emitter.stacked(real, emitter.call(_aten.add.Tensor, product(a, d), product(b, c)))


@_rule(_aten.div.Tensor)
def _div(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    if is_complex(given["other"]):
        raise NoPairs("the divisor is complex")
    return emitter.call(_aten.div.Tensor, emitter.pair(given["self"]), _factor(emitter, given["other"]))


@_rule(_aten.add.Tensor, _aten.sub.Tensor)
def _sum(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    if not is_complex(given["self"]) or not is_complex(given["other"]):
        raise NoPairs("one operand is real")
    return emitter.call(node.target, emitter.pair(given["self"]), emitter.pair(given["other"]), **node.kwargs)


@_rule(_aten.view.default, _aten.reshape.default, torch.ops.aten._unsafe_view.default)
def _view(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    sizes = given.get("size", given.get("shape"))
    assert sizes is not None
    return emitter.call(_aten.reshape.default, emitter.pair(given["self"]), [*sizes, 2])


@_rule(_aten.expand.default)
def _expand(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.call(_aten.expand.default, emitter.pair(given["self"]), [*given["size"], 2])


@_rule(_aten.repeat.default)
def _repeat(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.call(_aten.repeat.default, emitter.pair(given["self"]), [*given["repeats"], 1])


@_rule(_aten.permute.default)
def _permute(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    rank = _rank(given["self"])
    dims = [_dim(dim, rank) for dim in given["dims"]]
    return emitter.call(_aten.permute.default, emitter.pair(given["self"]), [*dims, rank])


@_rule(
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.flatten.using_ints,
    _aten.index_select.default,
    _aten.unflatten.int,
)
def _by_dims(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    rank = _rank(given["self"]) + (node.target is _aten.unsqueeze.default)
    arguments = dict(given, self=emitter.pair(given["self"]))
    for name in ("dim", "dim0", "dim1", "start_dim", "end_dim"):
        if name in arguments:
            arguments[name] = _dim(arguments[name], rank)
    return emitter.call(node.target, *arguments.values())


@_rule(_aten.index.Tensor)
def _index(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.call(_aten.index.Tensor, emitter.pair(given["self"]), given["indices"])


@_rule(_aten.embedding.default)
def _embedding(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.call(_aten.index.Tensor, emitter.pair(given["weight"]), [given["indices"]])


@_rule(_aten.cat.default, _aten.stack.default)
def _joined(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    if not all(map(is_complex, given["tensors"])):
        raise NoPairs("some of its operands are real")
    rank = _rank(given["tensors"][0]) + (node.target is _aten.stack.default)
    return emitter.call(node.target, [emitter.pair(item) for item in given["tensors"]], _dim(given["dim"], rank))


@_rule(
    _aten.neg.default,
    _aten.clone.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.detach_.default,
    _aten.contiguous.default,
    _aten.lift_fresh_copy.default,
)
def _elements(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    target = _aten.detach.default if node.target is _aten.detach_.default else node.target
    return emitter.call(target, emitter.pair(given["self"]))


@_rule(_aten.resolve_conj.default)
def _resolved(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    return emitter.pair(given["self"])


@_rule(_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, torch.ops.aten._to_copy.default, _aten.type_as.default)
def _cast(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    value = node.meta["val"]
    if not is_complex(given["self"]) or not value.is_complex():
        raise NoPairs("it casts between real and complex numbers")
    pair = emitter.pair(given["self"])
    if value.device != pair.meta["val"].device:
        pair = emitter.call(_aten.to.device, pair, value.device, pair.meta["val"].dtype)
    return emitter.call(_aten.to.dtype, pair, value.dtype.to_real())


@_rule(_aten.sym_size.int)
def _size(emitter: PairEmitter, node: Node, given: dict[str, Any]) -> Node:
    rank = _rank(given["self"])
    return emitter.call(_aten.sym_size.int, emitter.pair(given["self"]), _dim(given["dim"], rank))
