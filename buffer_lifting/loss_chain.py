"""Follows slices of data and of targets to their loss: which dims of each value on the way have the slice's rows.

Every op on the way has to be local along the sequence, and must stay so when the slice has more rows, without an
effect of the added rows on the others or on a gradient.
"""

from __future__ import annotations

from dataclasses import replace

from buffer_lifting.axis_rules import OpView, apply_rule
from buffer_lifting.graph.record import GraphRecord, Node, renamed_meta
from buffer_lifting.graph.sizes import Size, add, is_symbol, symbol
from buffer_lifting.labels import ROW, DimLabel, Factor, Labels, features, has_seq
from buffer_lifting.ops import ASSERTIONS, MATRIX_PRODUCTS, is_pointwise

LAST = 2**63 - 1  # the end of a slice that has none
NO_SHIFT = "no shifted loss"  # in a reason: a slice that leads to a loss, and could not be undone
AXIS = "shifted"
SHORTER = "the shorter sequence of a shifted loss"  # no name of a size symbol
LOSSES = frozenset({"aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss", "aten.nll_loss2d"})
SIZED = {"aten.view": "size", "aten.reshape": "shape", "aten._unsafe_view": "size"}
_CASTS = frozenset({"aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.to", "aten._to_copy"})
_PERMUTES = frozenset({"aten.permute", "aten.transpose", "aten.t", "aten.mT", "aten.numpy_T", "aten.movedim"})
MOVES = _CASTS | _PERMUTES | frozenset({"aten.flatten", "aten.unsqueeze", "aten.slice", *SIZED})
#: Ops on data, and the operand that it may be. At a position that the loss ignores, their gradient is zero: there is
#: no pole that it could meet.
_COMPUTE = {
    **dict.fromkeys(("aten.linear", "aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm"), "input"),
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.log_softmax", "aten.softmax"), "self"),
    "aten.addmm": "mat1",
}
_BINARY = frozenset({"aten.add", "aten.sub", "aten.mul"})
_POINTWISE = _BINARY | {"aten.neg", "aten.tanh", "aten.sigmoid", "aten.relu", "aten.gelu", "aten.silu", "aten.clamp"}


_PASSED = MOVES | _COMPUTE.keys()


class NoShift(Exception):
    """Why a slice is no shift; the message is for a person."""


class Chains:
    """The chains below one slice of data of a sequence of length ``whole``, ``amount`` rows shorter than it."""

    def __init__(self, record: GraphRecord, users: dict[str, list[str]], order: dict[str, int]) -> None:
        self.record, self.users, self.order = record, users, order
        self.whole: Size = 0
        self.amount = 0
        self.shadow: dict[str, Node] = {}

    def below(self, name: str) -> list[str]:
        """All nodes computed from a value, up to the losses and to ops that end every chain, in order."""
        seen: set[str] = set()
        stack = [name]
        while stack:
            for user in self.users[stack.pop()]:
                if user not in seen:
                    seen.add(user)
                    if self.record.nodes[user].base_op in _PASSED or is_pointwise(self.record.nodes[user]):
                        stack.append(user)
        return sorted(seen, key=self.order.__getitem__)

    def follow(self, cut: Node, dim: int, loss: Node, side: str) -> dict[str, Labels]:
        """The labels of a slice along ``dim`` and of all that is computed from it: which dims have its rows.

        Raises:
            NoShift: something else than operand ``side`` of ``loss`` reads it, or not row by row.
        """
        meta = self._shadowed(cut.name).tensor
        assert meta is not None
        row: DimLabel = (Factor(AXIS, ROW, meta.shape[dim]),)
        labels: dict[str, Labels] = {cut.name: (*features(meta.shape[:dim]), row, *features(meta.shape[dim + 1 :]))}
        for name in self.below(cut.name):
            node = self.record.nodes[name]
            inside = [(path, ref) for path, ref in node.named_refs() if ref in labels]
            if node.base_op in ASSERTIONS:
                if node.args.get("size") is not None or node.args.get("stride") is not None:
                    raise NoShift(f"the graph asserts its size ({name!r})")
            elif node is loss:
                if [path for path, _ in inside] != [side]:
                    raise NoShift("its loss reads it as another operand too")
            elif inside:
                labels[name] = self._through(node, inside, labels)
        return labels

    def _through(self, node: Node, inside: list[tuple[str, str]], labels: dict[str, Labels]) -> Labels:
        op = node.base_op
        known: dict[str, tuple[Labels, ...] | None] = {name: (own,) for name, own in labels.items()}
        local = op in MOVES or op in _POINTWISE or [path for path, _ in inside] == [_COMPUTE.get(op)]
        if op == "aten.div" and isinstance(other := node.args.get("other"), int | float):
            local = other != 0
        if not local or node.tensor is None:
            raise NoShift(f"it is read elsewhere than by its loss: by {node.name!r} ({node.op})")
        if op == "aten.slice" and self._cuts(node, labels[inside[0][1]]):
            raise NoShift(f"another part of it is cut out by {node.name!r}")
        shadow = {name: self._shadowed(name) for name in (node.name, *node.refs())}
        view = OpView(GraphRecord(shadow), shadow[node.name], known, data=lambda name: name in labels)
        result = apply_rule(view)
        if result is None or result.mixing or not result.outputs:
            raise NoShift(f"{node.name!r} ({node.op}) is not known to be local along the sequence")
        out = result.outputs[0]
        if sum(factor.axis == AXIS for own in out for factor in own) != 1:
            raise NoShift(f"how {node.name!r} ({node.op}) follows the sequence is not known")
        if any(self._meets(node, path, shadow[name], out) for path, name in node.named_refs() if name not in labels):
            raise NoShift(f"another value meets its rows in {node.name!r} ({node.op})")
        return out

    @staticmethod
    def _meets(node: Node, path: str, value: Node, out: Labels) -> bool:
        """Whether another operand could have rows of its own for those of the slice."""
        if value.tensor is None:
            return False
        if node.base_op in MATRIX_PRODUCTS:  # a matrix of weights, a vector of biases
            return len(value.tensor.shape) > (1 if path == "self" else 2)
        sizes = value.tensor.shape[::-1] if node.base_op in _POINTWISE else ()
        return any(size != 1 and has_seq(out[-offset]) for offset, size in enumerate(sizes, 1))

    def _cuts(self, node: Node, own: Labels) -> bool:
        """Whether a slice could cut rows out, once there are more of them."""
        dim = node.args.get("dim", 0)
        whole = node.args.get("start", 0) in (0, None) and node.args.get("end") in (None, LAST)
        return not whole and (not isinstance(dim, int) or has_seq(own[dim % len(own)]))

    def _shadowed(self, name: str) -> Node:
        """A node with the number of rows as a symbol, so that sizes are products of sizes of dims."""
        if name not in self.shadow:
            node = self.record.nodes[name]
            if is_symbol(self.whole):
                node = replace(node, meta=renamed_meta(node.meta, {str(self.whole): add(symbol(SHORTER), self.amount)}))
            self.shadow[name] = node
        return self.shadow[name]
