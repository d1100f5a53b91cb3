"""The context-parallel contract of losses and gradients, in one place.

Under context parallelism a rank has a part of the tokens. Its parameter gradients are partial: they are summed over
the context-parallel ranks (under FSDP over a dp x cp mesh, its reduction does it after
``module.set_gradient_divide_factor(1.0)``: by default it takes the mean). And a loss that ignores tokens
is the sum over a rank's valid tokens, divided by the valid tokens *of the whole batch*: ranks have different numbers
of them, so that a mean per rank, averaged over ranks, is another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from buffer_lifting.errors import FeedError
from buffer_lifting.loss_reduction import COUNTED, REDUCTIONS, Reduction, loss_weight
from buffer_lifting.torch_compat import tree_flatten


def cross_entropy_sum(output: Any, target: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """The cross entropy of logits ``[..., seq, vocabulary]`` with ``target`` ``[..., seq]``, summed over the tokens.

    It is computed in float32 at least.
    """
    logits = output if isinstance(output, torch.Tensor) else output[0]
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target.flatten(), ignore_index=ignore_index, reduction="sum")


class _Output:
    """One of the flattened outputs of a model."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, output: Any, target: Any) -> torch.Tensor:
        value: torch.Tensor = tree_flatten(output)[0][self.index]
        return value


class TokenLoss:
    """The ``loss_fn`` of a schedule: a mean over the valid tokens of the whole batch, on whatever part a rank has.

    A training step on every rank::

        loss_fn.begin(target)                      # counts; on the ranks of the last stage
        schedule.step(..., target=target, losses=losses)
        loss_fn.reduce_gradients(parameters)       # on every rank; not under FSDP, which does it itself
        loss = loss_fn.total(losses)               # on the ranks of the last stage

    Args:
        group: the ranks that share the batch: a process group, or a DeviceMesh of one dim (``mesh["cp"]``, or dp and
            cp flattened); ``None`` for one rank.
        n_microbatches: of the schedule, which divides gradients by it.
        loss: ``(output, target) -> scalar`` of a microbatch on a rank; default: :func:`cross_entropy_sum`.
        reduction: what ``loss`` is of its microbatch, and what is made of it:

            - ``"sum"``: the sum over its valid tokens; the whole is divided by the valid tokens of the batch;
            - ``"mean"``: the mean over its valid tokens; the whole is the mean over those of the batch;
            - ``"mean_all"``: the mean over all its tokens; the whole is the mean over all tokens of the batch;
            - ``"mean_samples"``: a sum divided by its number of samples; the whole, by that of the batch;
            - ``"total"``: a sum, or a constant times it; the whole is the plain sum, divided by nothing.

            The last three count no targets: what they are given as ``target`` does not matter. :meth:`of` knows which
            one a loss that the model computes itself is.
        ignore_index: the target of tokens that do not count.
        cp_ranks: how many ranks of ``group`` share a sample (``"mean_samples"`` only); default: all of them.
    """

    def __init__(
        self,
        group: Any = None,
        n_microbatches: int = 1,
        loss: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        reduction: Reduction = "sum",
        ignore_index: int = -100,
        cp_ranks: int | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}")
        self.group = group.get_group() if hasattr(group, "mesh_dim_names") else group
        self.n_microbatches, self.reduction, self.ignore_index = n_microbatches, reduction, ignore_index
        self._loss = loss or (lambda output, target: cross_entropy_sum(output, target, ignore_index))
        self._ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        self._cp_ranks = cp_ranks or self._ranks
        self._whole: torch.Tensor | None = None
        self.target: str | None = None

    @classmethod
    def of(cls, program: Any, group: Any = None, n_microbatches: int = 1, output: int | None = None) -> TokenLoss:
        """The loss function of a loss that the program computes itself.

        Its attribute ``target`` is the name of the input, a user's or a lifted one, that :meth:`begin` and the
        schedule's ``target`` have to be; ``None`` if no targets are counted.

        Args:
            program: a StagedProgram, LiftedProgram or LoadedStage behind :func:`buffer_lifting.context_parallel`.
            group, n_microbatches: as for the constructor.
            output: which of the flattened outputs of the program, if several are losses.

        Raises:
            FeedError: no output, or not the one that is asked for, is a loss; or several are.
        """
        lifted = getattr(program, "lifted", program)
        found = [loss for loss in lifted.losses if output is None or loss.output == output]
        if len(found) != 1:
            has = ", ".join(f"{loss.output} ({loss.node!r})" for loss in lifted.losses) or "none"
            raise FeedError(
                f"the outputs of the program that are known losses: {has}; give output= where there are several, and "
                "call buffer_lifting.context_parallel(lifted, size=...) first, which finds them"
            )
        loss = found[0]
        result = cls(group, n_microbatches, _Output(loss.output), loss.reduction, loss.ignore_index, lifted.cp_size)
        result.target = loss.target
        return result

    def begin(self, target: torch.Tensor | None = None) -> None:
        """Counts the valid tokens of the step's whole batch: one all-reduce of one number.

        Does nothing for a reduction that counts none.

        Args:
            target: this rank's targets of all microbatches, as the loss gets them (with a loss that shifts its
                labels, the shifted ones), integer.

        Raises:
            FeedError: no rank has a valid token, or there is no ``target``.
        """
        if self.reduction not in COUNTED:
            return
        if target is None:
            raise FeedError(f"reduction={self.reduction!r} counts the valid tokens of a step: give begin() its targets")
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
        if self._whole is None and self.reduction in COUNTED:
            raise FeedError("TokenLoss.begin(target) counts the valid tokens of a step; call it before the step")
        value = self._loss(output, target)
        count: Any = 0
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            if not int(count):
                raise FeedError(
                    "a microbatch has no valid token on this rank, and the mean over none is not a number; give "
                    "TokenLoss a loss with reduction='sum'"
                )
        sizes = self.n_microbatches, self._ranks, self._cp_ranks
        part, whole = loss_weight(self.reduction, *sizes, count, self._whole)
        return value * part * self.n_microbatches / whole

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
