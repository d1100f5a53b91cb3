"""Which dim of a view's result is which dim of its operand, for views that move, add or drop whole dims."""

from __future__ import annotations

from buffer_lifting.graph.record import Arg, Node
from buffer_lifting.graph.sizes import Size

_SHAPED = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"])
_BROADCAST = frozenset(["expand", "expand_as", "repeat", "broadcast_to"])


def sources_of_dims(node: Node, own: tuple[Size, ...], out: tuple[Size, ...]) -> dict[int, int] | None:
    """Dim of the operand -> dim of the result, both from the right; ``None`` for another op, or dims that are folded.

    Dims of one element are left out: nothing depends on the index along them.
    """
    name = node.base_op.removeprefix("aten.")
    if name in _BROADCAST:
        dims = range(-1, -min(len(own), len(out)) - 1, -1)
        return {dim: dim for dim in dims if own[dim] == out[dim]}
    if name in _SHAPED:
        mine = [dim for dim in range(-len(own), 0) if own[dim] != 1]
        its = [dim for dim in range(-len(out), 0) if out[dim] != 1]
        if [own[dim] for dim in mine] != [out[dim] for dim in its]:
            return None
        return dict(zip(mine, its, strict=True))
    order = _order(name, node.args, len(own))
    return None if order is None else {source - len(own): place - len(own) for place, source in enumerate(order)}


def _order(name: str, args: dict[str, Arg], rank: int) -> list[int] | None:
    """The operand's dim at each place of the result."""
    order = list(range(rank))
    if name == "permute":
        dims = args.get("dims")
        return [int(dim) % rank for dim in dims] if isinstance(dims, tuple) and _whole(*dims) else None  # type: ignore[arg-type]
    if name in ("t", "numpy_T"):
        return order[::-1]
    pairs = {"transpose": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1"), "swapdims": ("dim0", "dim1")}
    if name == "mT":
        one, two = rank - 2, rank - 1
    elif name in pairs:
        first, second = (args.get(key) for key in pairs[name])
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        one, two = first % rank, second % rank
    else:
        return None
    order[one], order[two] = order[two], order[one]
    return order


def _whole(*dims: Arg) -> bool:
    return all(isinstance(dim, int) for dim in dims)
