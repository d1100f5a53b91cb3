"""What may be computed from a loss under context parallelism: a rank has its tokens' part of it, and parts are summed.

The parts of ranks and microbatches are weighed and added up (:class:`buffer_lifting.TokenLoss`), so the result has to
be a multiple of one reduction over all tokens. The root of a loss, its exponential, or the sum of two reductions that
count other tokens is something else on every rank. The sum of reductions that count the same is weighed as each is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from buffer_lifting.graph.record import Arg, GraphRecord, Node, NodeKind, Ref, ScalarMeta
from buffer_lifting.graph.sizes import Size, atoms, divide
from buffer_lifting.loss_chain import LOSSES
from buffer_lifting.loss_reduction import LossReduction, Reduction
from buffer_lifting.ops import ASSERTIONS, content_operands
from buffer_lifting.plan import LiftPlan

_SAME = frozenset(
    f"aten.{name}"
    for line in [
        "neg to _to_copy type_as clone alias detach detach_ view reshape squeeze unsqueeze expand contiguous",
        "lift_fresh lift_fresh_copy",
    ]
    for name in line.split()
)
_LAYOUT = _SAME - {"aten.neg", "aten.type_as"} | {
    f"aten.{name}" for name in ["flatten", "permute", "transpose", "t", "movedim", "_unsafe_view"]
}
_PRODUCTS = frozenset({"aten.mul", "aten.multiply"})
_QUOTIENTS = frozenset({"aten.div", "aten.divide", "aten.true_divide"})
_MEAN, _SUM = 1, 2
_OUTSIDE = "return the logits, or each loss by itself, and do this outside the model"
_EACH = (
    "return each loss by itself, with a TokenLoss.of(program, output=...) for each, or let all of them count alike: "
    "means over the same labels, means over all tokens, or sums"
)
_COUNTS = "divide by (labels != ignore_index).sum() of an input of labels, or return reduction='sum' undivided"
_TARGETS = "compute the labels outside the model and give them as an input"


@dataclass(frozen=True)
class _Loss:
    """A multiple of a reduction; ``problem`` is why it is none that a trainer can add up, with the node and a hint."""

    reduction: Reduction
    target: str | None = None
    ignore_index: int = -100
    problem: tuple[Node, str, str] | None = None


@dataclass
class PartialLosses:
    """The losses among the outputs of a program, and ``(node, why, hint)`` of what ranks do not add up to."""

    found: list[LossReduction] = field(default_factory=list)
    problems: list[tuple[Node, str, str]] = field(default_factory=list)


def partial_losses(record: GraphRecord, plan: LiftPlan) -> PartialLosses:
    """How the parts of the ranks of each loss add up, and everything made of a loss to which they do not."""
    search = _Search(record, plan)
    result = PartialLosses(problems=list(search.run()))
    output = next(node for node in record.nodes.values() if node.kind is NodeKind.OUTPUT)
    for index, arg in enumerate(_flat(output.args["results"])):
        loss = search.losses.get(arg.name) if isinstance(arg, Ref) else None
        if loss is None or not isinstance(arg, Ref):
            continue
        if loss.problem is None:
            result.found.append(LossReduction(index, arg.name, loss.reduction, loss.target, loss.ignore_index))
        elif loss.problem not in result.problems:
            result.problems.append(loss.problem)
    return result


class _Search:
    """One walk over the nodes of a record, in order."""

    def __init__(self, record: GraphRecord, plan: LiftPlan) -> None:
        self.record = record
        self.names = {mix.node for mix in plan.report.mixing if mix.handled and mix.reason.startswith("a loss")}
        self.losses: dict[str, _Loss] = {}
        self.batch: set[Size] = set()
        self.inputs: dict[str, bool] = {}  # whether an input differs between ranks or microbatches
        for node in record.inputs():
            own = plan.input_axes.get(node.name)
            shape = node.tensor.shape if node.tensor is not None else ()
            if own is not None and own.batch_dim is not None and not isinstance(shape[own.batch_dim], int):
                self.batch.add(shape[own.batch_dim])
            self.inputs[node.name] = own is None or own.batch_dim is not None or bool(own.seq_dims)
            if not shape:
                self.inputs[node.name] = False

    def run(self) -> Iterator[tuple[Node, str, str]]:
        roots: dict[str, frozenset[str]] = {}
        for node in self.record.nodes.values():
            if node.kind is not NodeKind.OP or node.base_op in ASSERTIONS:
                continue
            parts = [name for name in content_operands(node) if name in roots]
            if not parts:
                if node.name in self.names:
                    roots[node.name] = frozenset([node.name])
                    self.losses[node.name] = self._root(node)
                    if node.base_op in LOSSES and node.args.get("weight") is not None and _reduces(node, _MEAN):
                        why = "its mean divides by the class weights of a rank's tokens"
                        yield node, why, "use reduction='sum'"
                continue
            multiple = _is_multiple(node, roots)
            divided = node.name in self.names and multiple  # by a number of tokens of its own
            below = frozenset().union(*(roots[name] for name in parts))
            roots[node.name] = frozenset([node.name]) if divided else below
            sums = all(_is_sum(self.record.nodes[name]) for name in roots[node.name])
            if len(roots[node.name]) > 1 and not sums and not self._count_alike(parts):
                yield node, "it adds up losses that count tokens of their own", _EACH
            elif not multiple:
                yield node, "it is computed from a loss, of which a rank has a part", _OUTSIDE
            self.losses[node.name] = self._multiple(node, [self.losses[name] for name in parts], divided)

    def _count_alike(self, parts: list[str]) -> bool:
        """Whether the parts of several losses are weighed alike, so that the sum of the losses is too."""
        losses = [self.losses[name] for name in parts]
        return all(loss.problem is None and loss == losses[0] for loss in losses)

    def _root(self, node: Node) -> _Loss:
        if _is_sum(node):
            return _Loss("total")
        if node.base_op == "aten.mean" or (_reduces(node, _MEAN) and node.base_op not in LOSSES):
            return _Loss("mean_all")
        if not _reduces(node, _MEAN):
            return _Loss("total", problem=(node, "how the parts of the ranks add up is not known", _OUTSIDE))
        target, ignored = self.record.nodes.get(node.ref("target") or ""), node.args.get("ignore_index", -100)
        if target is not None and target.tensor is not None and target.tensor.is_floating:
            return _Loss("mean_all")  # probabilities: none is ignored
        source = self._input(target)
        if source is None or not isinstance(ignored, int):
            why = "it is a mean over the valid ones of targets that the model computes, which a trainer cannot count"
            return _Loss("mean", problem=(node, why, _TARGETS))
        return _Loss("mean", source, ignored)

    def _multiple(self, node: Node, parts: list[_Loss], divided: bool) -> _Loss:
        first = parts[0]
        problem = next((part.problem for part in parts if part.problem is not None), None)
        if problem is not None:
            return replace(first, problem=problem)
        if any(part != first for part in parts):
            return replace(first, problem=(node, "it adds up losses that count other things", _EACH))
        if divided:
            return self._divided(node, first)
        if node.base_op not in _PRODUCTS | _QUOTIENTS:
            return first
        factors = [name for name in content_operands(node) if name not in self.losses]
        for name in factors:
            factor = self.record.nodes[name]
            size = factor.meta.size if isinstance(factor.meta, ScalarMeta) else None
            power = next((batch for batch in self.batch if size is not None and _is_linear(size, batch)), None)
            if power is not None and node.base_op in _QUOTIENTS and first.reduction == "total":
                return replace(first, reduction="mean_samples")
            if self._varies(name):
                why = "the number that the loss is multiplied with differs between ranks or microbatches"
                return replace(first, problem=(node, why, "multiply the result outside the model"))
        return first

    def _divided(self, node: Node, loss: _Loss) -> _Loss:
        """A sum divided by a number of tokens."""
        counted = self._count(self.record.nodes.get(node.ref("other") or ""))
        if counted is None or loss.reduction != "total":
            why = "it divides a loss by a number of tokens that a trainer cannot count"
            return replace(loss, problem=(node, why, _COUNTS))
        return _Loss("mean", *counted)

    def _count(self, node: Node | None) -> tuple[str, int] | None:
        """The input whose elements are counted, and the value that does not count."""
        while node is not None and node.kind is NodeKind.OP and node.base_op not in ("aten.sum", "aten.count_nonzero"):
            least = node.args.get("min", 1)
            clamped = node.base_op in ("aten.clamp", "aten.clamp_min") and node.args.get("max") is None
            if node.base_op not in _SAME - {"aten.neg"} and not (
                clamped and isinstance(least, int | float) and least <= 1
            ):
                return None
            node = self.record.nodes.get(node.ref("self") or "")
        mask = self._moved(None if node is None else self.record.nodes.get(node.ref("self") or ""))
        if mask is None or mask.tensor is None:
            return None
        if mask.kind is NodeKind.INPUT and mask.tensor.dtype == "bool":
            return mask.fqn or mask.name, 0
        other = mask.args.get("other")
        if mask.base_op != "aten.ne" or not isinstance(other, int) or isinstance(other, bool):
            return None
        source = self._input(self.record.nodes.get(mask.ref("self") or ""))
        return None if source is None else (source, other)

    def _moved(self, node: Node | None) -> Node | None:
        """The value above layout changes and casts."""
        while node is not None and node.kind is NodeKind.OP and node.base_op in _LAYOUT:
            node = self.record.nodes.get(node.ref("self") or "")
        return node

    def _input(self, node: Node | None) -> str | None:
        """The input that a value is, in another layout."""
        top = self._moved(node)
        if top is None or top.kind is not NodeKind.INPUT or top.tensor is None or top.tensor.is_floating:
            return None
        return top.fqn or top.name

    def _varies(self, name: str) -> bool:
        """Whether a factor is computed from what differs between ranks or microbatches."""
        seen, stack = {name}, [name]
        while stack:
            node = self.record.nodes[stack.pop()]
            if self.inputs.get(node.name, False):
                return True
            if isinstance(node.meta, ScalarMeta):
                size = node.meta.size
                if size is not None and any(atoms(size) & atoms(batch) for batch in self.batch):
                    return True
                if size is not None:
                    continue  # a length of the whole sequence
            new = [ref for ref in content_operands(node) if ref not in seen]
            seen.update(new)
            stack.extend(new)
        return False


def _flat(arg: Arg) -> Iterator[Arg]:
    if isinstance(arg, tuple):
        for item in arg:
            yield from _flat(item)
    else:
        yield arg


def _is_linear(size: Size, batch: Size) -> bool:
    """Whether a size is the batch size times something."""
    rest = divide(size, batch)
    return rest is not None and not atoms(rest) & atoms(batch)


def _reduces(node: Node, reduction: int) -> bool:
    return node.args.get("reduction", _MEAN if node.base_op in LOSSES else None) == reduction


def _is_sum(node: Node) -> bool:
    """Whether a loss is a plain sum over tokens: the sums of the ranks add up, and so do several of them."""
    return node.base_op in ("aten.sum", "aten.nansum") or node.args.get("reduction") == _SUM


def _is_multiple(node: Node, roots: dict[str, frozenset[str]]) -> bool:
    """Whether the result is a multiple of the one loss among the operands."""
    refs = dict(node.named_refs())
    of_loss = [path for path, name in refs.items() if name in roots]
    if node.base_op in _SAME or node.op == "getitem":
        return True
    if node.base_op in _PRODUCTS:
        return len(of_loss) == 1
    if node.base_op in _QUOTIENTS:
        return of_loss == ["self"] and node.args.get("rounding_mode") is None
    if node.base_op in ("aten.add", "aten.sub", "aten.subtract"):
        return len(of_loss) == 2 or node.args.get("other") in (0, 0.0)
    return False
