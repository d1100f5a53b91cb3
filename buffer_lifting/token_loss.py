"""The context-parallel contract of losses and gradients, in one place.

Under context parallelism a rank has a part of the tokens. Its parameter gradients are partial: they are summed over
the context-parallel ranks (under FSDP the mesh is dp x cp, and its reduction does it). And a loss that ignores tokens
is the sum over a rank's valid tokens, divided by the valid tokens *of the whole batch*: ranks have different numbers
of them, so that a mean per rank, averaged over ranks, is another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from buffer_lifting.errors import FeedError


def cross_entropy_sum(output: Any, target: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """The cross entropy of logits ``[..., seq, vocabulary]`` with ``target`` ``[..., seq]``, summed over the tokens."""
    logits = output if isinstance(output, torch.Tensor) else output[0]
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), ignore_index=ignore_index, reduction="sum")


class TokenLoss:
    """The ``loss_fn`` of a schedule: a mean over the valid tokens of the whole batch, on whatever part a rank has.

    A training step on every rank::

        loss_fn.begin(target)                      # counts; on the ranks of the last stage
        schedule.step(..., target=target, losses=losses)
        loss_fn.reduce_gradients(parameters)       # on every rank; not with FSDP over a dp x cp mesh
        loss = loss_fn.total(losses)               # on the ranks of the last stage

    Args:
        group: the ranks that share the batch: a process group, or a DeviceMesh of one dim (``mesh["cp"]``, or dp and
            cp flattened); ``None`` for one rank.
        n_microbatches: of the schedule, which divides gradients by it.
        loss: ``(output, target) -> scalar`` of a microbatch on a rank; default: :func:`cross_entropy_sum`.
        reduction: what ``loss`` does over the valid tokens of its microbatch: ``"sum"``, or ``"mean"`` (a loss that
            the model computes itself).
        ignore_index: the target of tokens that do not count.
    """

    def __init__(
        self,
        group: Any = None,
        n_microbatches: int = 1,
        loss: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        ignore_index: int = -100,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is 'sum' or 'mean', not {reduction!r}")
        self.group = group.get_group() if hasattr(group, "mesh_dim_names") else group
        self.n_microbatches, self.reduction, self.ignore_index = n_microbatches, reduction, ignore_index
        self._loss = loss or (lambda output, target: cross_entropy_sum(output, target, ignore_index))
        self._whole: torch.Tensor | None = None

    def begin(self, target: torch.Tensor) -> None:
        """Counts the valid tokens of the step's whole batch: one all-reduce of one number.

        Args:
            target: this rank's targets of all microbatches, as the loss gets them (with a loss that shifts its
                labels, the shifted ones), integer.

        Raises:
            FeedError: no rank has a valid token.
        """
        count = (target != self.ignore_index).sum()
        if self.group is not None:
            torch.distributed.all_reduce(count, group=self.group)
        if not int(count):
            raise FeedError(f"no target of the batch counts: all of them are {self.ignore_index}")
        self._whole = count

    def __call__(self, output: Any, target: torch.Tensor) -> torch.Tensor:
        """The part of a microbatch in the loss of the whole batch, times the number of microbatches.

        Raises:
            FeedError: :meth:`begin` was not called, or a loss that is a mean has no valid token on this rank.
        """
        if self._whole is None:
            raise FeedError("TokenLoss.begin(target) counts the valid tokens of a step; call it before the step")
        value = self._loss(output, target)
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            if not int(count):
                raise FeedError(
                    "a microbatch has no valid token on this rank, and the mean over none is not a number; give "
                    "TokenLoss a loss with reduction='sum'"
                )
            value = value * count
        return value * self.n_microbatches / self._whole

    def total(self, losses: Iterable[torch.Tensor]) -> torch.Tensor:
        """The loss of the whole batch, from the microbatch losses that a schedule has collected on each rank."""
        value = torch.stack([loss.detach() for loss in losses]).sum() / self.n_microbatches
        if self.group is not None:
            torch.distributed.all_reduce(value, group=self.group)
        return value

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the ranks of the group.

        A parameter that only other ranks used gets their gradient; one that no rank used keeps none.
        """
        if self.group is None:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        used = torch.tensor([int(p.grad is not None) for p in trained], device=trained[0].device)
        torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX, group=self.group)
        for parameter, flag in zip(trained, used.tolist(), strict=True):
            if not flag:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad, group=self.group)
