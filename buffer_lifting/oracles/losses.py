"""How the losses of the ranks of a context-parallel program add up: as :class:`buffer_lifting.TokenLoss` adds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from buffer_lifting.loss_reduction import LossReduction, loss_weight


def loss_shares(loss: LossReduction, ranks: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the loss of each rank counts for.

    Args:
        loss: how it is reduced.
        ranks: the inputs of each rank by name.
    """
    count, size = [0] * len(ranks), len(ranks)
    if loss.target is not None:
        count = [int((own[loss.target] != loss.ignore_index).sum()) for own in ranks]
    pairs = [loss_weight(loss.reduction, 1, size, size, own, max(sum(count), 1)) for own in count]
    return [part / whole for part, whole in pairs]
