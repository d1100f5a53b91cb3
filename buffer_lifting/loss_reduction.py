"""How the losses that ranks and microbatches compute add up to the loss of the whole batch.

:func:`buffer_lifting.context_parallel` finds it for every loss that a program computes itself
(:attr:`LiftedProgram.losses`); :class:`buffer_lifting.TokenLoss` and :func:`buffer_lifting.verify` both go by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Reduction = Literal["sum", "mean", "mean_all", "mean_samples", "total"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
#: Reductions that count the valid targets of the whole batch.
COUNTED = ("sum", "mean")


@dataclass(frozen=True)
class LossReduction:
    """A loss among the outputs of a program.

    Attributes:
        output: which of the program's flattened outputs it is.
        node: the name of that output.
        reduction: of :class:`buffer_lifting.TokenLoss`: ``"mean"`` over the valid targets, ``"mean_all"`` over all
            tokens, ``"mean_samples"`` (a sum divided by the batch size) or ``"total"`` (a sum, or a constant times it).
        target: of a ``"mean"``: the input, a user's or a lifted one, that has its targets.
        ignore_index: of a ``"mean"``: the target of tokens that do not count.
    """

    output: int
    node: str
    reduction: Reduction
    target: str | None = None
    ignore_index: int = -100


def loss_weight(
    reduction: str, n_microbatches: int = 1, ranks: int = 1, cp_ranks: int = 1, count: Any = 0, whole: Any = 1
) -> tuple[Any, Any]:
    """What the loss of a microbatch on a rank is multiplied with and divided by: the whole loss is then the sum.

    Args:
        reduction: one of :data:`REDUCTIONS`.
        n_microbatches: of each rank.
        ranks: that share the batch.
        cp_ranks: how many of them share a sample.
        count: valid targets of the microbatch on the rank.
        whole: valid targets of all of them.
    """
    if reduction == "mean":
        return count, whole
    if reduction == "sum":
        return 1, whole
    if reduction == "mean_all":
        return 1, ranks * n_microbatches
    return (cp_ranks, ranks * n_microbatches) if reduction == "mean_samples" else (1, 1)
