"""FLOPs of the calls of a graph, by torch.utils.flop_counter's own formulas on the sizes of the example inputs.

torch's registry has a formula for each kernel (``mm``, ``addmm``, ``bmm``, ``baddbmm``, ``convolution``, the attention
kernels, ``flex_attention``). Ops that are made of those (``linear``, ``matmul``, ``einsum``, ``conv1d``,
``scaled_dot_product_attention``) are decomposed by torch, on meta tensors. The bodies of higher-order ops are counted
inside. As in torch, a causal mask saves nothing, and what is no product (norms, activations, lookups) counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.ops_table import POINTWISE, VIEWS
from buffer_lifting.stand_ins import Shaped, operand_values, signature
from buffer_lifting.torch_compat import HigherOrderOperator, OpOverload, is_composite, tree_map

#: Composite ops without a product in them: torch need not decompose them to see that.
_NO_PRODUCT = frozenset(
    f"aten.{name}"
    for line in [
        "to type_as dropout contiguous embedding pad one_hot arange where size numel item",
        "layer_norm rms_norm group_norm batch_norm instance_norm softmax log_softmax cross_entropy_loss",
        "zeros_like ones_like full_like sum mean var std cumsum",
    ]
    for name in line.split()
)


class FlopCounter:
    """Counts FLOPs; calls of equal op, sizes and numbers are counted once.

    Attributes:
        unknown: names of calls that torch could not decompose at the example's sizes; they count 0.
    """

    def __init__(self, hints: dict[str, int]) -> None:
        self.hints = hints
        self.unknown: list[str] = []
        self._counted: dict[Any, int | None] = {}
        self._free: dict[Any, bool] = {}

    def nodes(self, nodes: Iterable[Node]) -> int:
        """FLOPs of calls in a row, one forward."""
        return sum(self.node(node) for node in nodes)

    def node(self, node: Node) -> int:
        """Forward FLOPs of one call."""
        target = node.target
        if node.op != "call_function":
            return 0
        if isinstance(target, HigherOrderOperator):
            return self._higher_order(node)
        if not isinstance(target, OpOverload) or self._is_free(target):
            return 0
        args, kwargs = operand_values(node, self.hints)
        key = (target, signature(args), signature(kwargs))
        if key not in self._counted:
            self._counted[key] = _count(target, args, kwargs)
        count = self._counted[key]
        if count is None:
            self.unknown.append(node.name)
        return count or 0

    def _is_free(self, target: Any) -> bool:
        if target not in self._free:
            base = str(target.overloadpacket)
            named = base in POINTWISE or base in VIEWS or base in _NO_PRODUCT
            counts = target.overloadpacket in flop_registry or _is_grouped(target) or is_composite(target)
            self._free[target] = named or not counts
        return self._free[target]

    def _higher_order(self, node: Node) -> int:
        if node.target in flop_registry:
            args, _ = operand_values(node, self.hints)
            count = _count(node.target, args[:3], {})
            if count is None:
                self.unknown.append(node.name)
            return count or 0
        bodies = [attribute_of(arg) for arg in node.all_input_nodes if arg.op == "get_attr"]
        counts = [self.nodes(body.graph.nodes) for body in bodies if isinstance(body, GraphModule)]
        name = str(node.target)
        if name == "cond":
            return max(counts, default=0)
        return sum(counts) * (self._steps(node) if name in ("scan", "map_impl", "map") else 1)

    def _steps(self, node: Node) -> int:
        """How often the body of a scan or map runs: the length of what it goes over."""
        operands, _ = operand_values(node, self.hints)
        lists = [arg for arg in operands if isinstance(arg, list | tuple) and any(isinstance(i, Shaped) for i in arg)]
        over = lists[1] if str(node.target) == "scan" and len(lists) > 1 else lists[0] if lists else ()
        return next((item.shape[0] for item in over if isinstance(item, Shaped) and item.shape), 1)


def _is_grouped(target: Any) -> bool:
    return "grouped_mm" in str(target)


def _count(target: Any, args: Any, kwargs: Any) -> int | None:
    """``None`` if torch cannot make the call at these sizes: an estimate must not keep a program from its stages."""
    if _is_grouped(target):
        return _grouped(args)
    try:
        if getattr(target, "overloadpacket", target) in flop_registry:
            return _formula(target, args, kwargs)
        with FlopCounterMode(display=False) as counter:
            target(*tree_map(_tensor, args), **tree_map(_tensor, kwargs))
        return int(counter.get_total_flops())
    except Exception:
        return None


def _formula(target: Any, args: Any, kwargs: Any) -> int:
    formula = flop_registry[getattr(target, "overloadpacket", target)]
    made_args, made = tree_map(_tensor, args), tree_map(_tensor, kwargs)
    out = target(*made_args, **made) if isinstance(target, OpOverload) else None
    return int(formula(*made_args, **made, out_val=out))


def _grouped(args: Any) -> int:
    """A product for each group of rows: torch has no formula for it.

    One of the operands may have a dim of groups, over which the other's rows (or columns) are shared out.
    """
    left, right = (item for item in args[:2])
    rows = prod(left.shape[:-1])
    if len(left.shape) == len(right.shape) == 2:  # the inner dim is shared out: a product of the whole for each part
        return int(2 * rows * left.shape[-1] * right.shape[-1])
    if len(left.shape) == 3 and len(right.shape) == 2:
        return int(2 * left.shape[1] * left.shape[2] * right.shape[-1])
    return int(2 * rows * left.shape[-1] * right.shape[-1])


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Shaped) else value
