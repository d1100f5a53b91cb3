"""What a lifted ``flex_attention`` reads: slots in the order of the arrangement, and blocks that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from buffer_lifting.flex_plan import FlexPlan
from buffer_lifting.torch_compat import schema_args

if TYPE_CHECKING:
    from buffer_lifting.oracles.running import Case
    from buffer_lifting.oracles.values import Arrangement

_BUFFERS = {"score_mod": "score_buffers", "mask_mod": "mask_buffers"}


def flex_error(
    plan: FlexPlan,
    node: Node | None,
    case: Case,
    arrangement: Arrangement,
    value: Callable[[str], torch.Tensor],
) -> str:
    """Why a lifted ``flex_attention`` is wrong under an arrangement, or an empty string.

    Args:
        plan: what the scan of the original planned.
        node: the lifted program's node of that name.
        case: the inputs.
        arrangement: the order and the shard.
        value: evaluates a node of the lifted program.
    """
    if node is None:
        return "the op is gone"
    named = schema_args(node)
    for body in plan.bodies:
        operands = named[_BUFFERS[body.name]]
        for label, number in body.slots.items():
            factor = plan.axes[0] if label == "q" else plan.axes[1]
            place = len(body.kept) + number
            if factor is None or place >= len(operands):
                return f"{body.name} does not read slots for its index {label!r}"
            found = value(operands[place].name)
            expected = [
                arrangement.slots(factor.axis, b, case.lengths[factor.axis], factor.role) for b in range(len(found))
            ]
            if not torch.equal(found, torch.stack(expected)):
                return f"{body.name} reads other slots for its index {label!r} [{arrangement.name}]"
    rows, cols = (case.lengths[f.axis] if f is not None else 1 for f in plan.axes)
    return _block_error(named["block_mask"], rows, cols, value)


def _block_error(block_mask: Any, rows: int, cols: int, value: Callable[[str], torch.Tensor]) -> str:
    """Whether a block mask lets ``mask_mod`` decide everywhere: all blocks listed, none of them as full."""
    count, indices, full = value(block_mask[2].name), value(block_mask[3].name), block_mask[4]
    if full is not None and bool(value(full.name).any()):
        return "its block mask lists full blocks, in which mask_mod is not asked"
    block_rows, block_cols = block_mask[-3], block_mask[-2]
    height, width = -(-rows // block_rows), -(-cols // block_cols)
    if count.shape[-1] < height or not bool((count[..., :height] == width).all()):
        return "its block mask skips blocks"
    listed = indices[..., :height, :width].sort(-1).values
    return "" if bool((listed == torch.arange(width)).all()) else "its block mask lists other blocks"
