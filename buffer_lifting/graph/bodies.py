"""The bodies of higher-order ops: what a ``get_attr`` node names, and its record."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from buffer_lifting.graph.record import Arg, Ref
from buffer_lifting.torch_compat import FLEX_HOP

#: How eager ``buffer[i, j]`` in a mod of flex_attention stands in its body (an autograd function, traced whole).
_MOD_INDEX = "ModIndex"
#: The operands of ``flex_attention`` that are bodies: ``score_mod``, and ``mask_mod``, the last of its block mask.
SCORE_MOD, MASK_MOD = "score_mod", "mask_mod"


def attribute_of(node: Node, root: GraphModule | None = None) -> Any:
    """What a ``get_attr`` node names, or ``None``.

    Normalising notes it in ``meta["body"]``; else it is looked up in ``root`` or in the module that owns the graph.
    """
    if "body" in node.meta:
        return node.meta["body"]
    return named(root if root is not None else node.graph.owning_module, str(node.target))


def named(root: Any, path: str) -> Any:
    """What a dotted path names below ``root``, or ``None``."""
    for part in path.split("."):
        root = getattr(root, part, None)
    return root


def body_nodes(node: Node) -> dict[str, Node]:
    """The ``get_attr`` nodes of the bodies of a ``flex_attention`` call, by :data:`SCORE_MOD` and :data:`MASK_MOD`."""
    score, mask = node.args[3], node.args[4][-1]  # type: ignore[index]
    found = {SCORE_MOD: score, MASK_MOD: mask}
    return {name: value for name, value in found.items() if isinstance(value, Node) and value.op == "get_attr"}


def flex_nodes(graph: Graph) -> list[Node]:
    """The ``flex_attention`` calls of a graph, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is FLEX_HOP]


def is_mod_index(node: Node) -> bool:
    """Whether a node of a body is ``buffer[i, j]`` as eager flex_attention is traced."""
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "flat_apply"
        and len(node.args) > 4
        and str(node.args[2]).endswith(_MOD_INDEX)
    )


def mod_index_args(node: Node) -> dict[str, Arg]:
    """The arguments of such a node as those of ``aten.index.Tensor``."""

    def arg(value: Any) -> Arg:
        return Ref(value.name) if isinstance(value, Node) else value

    return {"self": arg(node.args[3]), "indices": tuple(arg(value) for value in node.args[4:])}
