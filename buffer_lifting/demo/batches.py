"""The batches of a run: each is made once, before the training, and kept in a file that one process and all ranks read.

Models, pipelines and load balancers have their own ideas of which sizes they take: they are asked before a process is
started.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from buffer_lifting.demo import data
from buffer_lifting.demo.model import RANKS, batch_of
from buffer_lifting.demo.ranks import DemoError
from buffer_lifting.errors import LiftingError
from buffer_lifting.step_sizes import step_sizes

if TYPE_CHECKING:
    from buffer_lifting.demo.model import Subject
    from buffer_lifting.stages import StagedProgram

#: How many steps compare gradients and run the control, if there are many.
MEASURED = 10


@dataclass(frozen=True)
class Step:
    """A step's batch, whole and in natural order. ``measure``: give the gradients too, and run the control."""

    inputs: dict[str, Tensor]
    labels: Tensor
    order: Tensor
    measure: bool


def step_path(directory: Path, step: int) -> Path:
    """Where a step's batch is put."""
    return directory / f"step{step}.pt"


def load_step(directory: Path, step: int) -> Step:
    """The batch of a step."""
    return Step(**torch.load(step_path(directory, step), weights_only=True))


def put(value: Any, path: Path) -> None:
    """Writes a file that is whole as soon as it is there."""
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


@dataclass
class Batches:
    """The batches of all steps, in ``directory``.

    Attributes:
        sizes: samples and tokens of each step.
        shapes: the shapes of all tensors of a step -> the first step that has them.
    """

    directory: Path
    sizes: list[tuple[int, int]] = field(default_factory=list)
    shapes: dict[tuple[Any, ...], int] = field(default_factory=dict)

    @property
    def microbatches(self) -> int:
        """Into how many microbatches every step is cut."""
        return next(count for count in (4, 2) if all(samples % count == 0 for samples, _ in self.sizes))

    def __str__(self) -> str:
        samples, tokens = zip(*self.sizes, strict=True)
        return " x ".join(str(min(n)) if min(n) == max(n) else f"({min(n)} to {max(n)})" for n in (samples, tokens))

    def check(self, staged: StagedProgram) -> None:
        """Refuses what the stages cannot be trained on.

        Raises:
            DemoError: it names the first step that has such a batch, and its sizes.
        """
        for number in self.shapes.values():
            step, (samples, tokens) = load_step(self.directory, number), self.sizes[number]
            parts, shard = self.microbatches, (0, RANKS)
            try:
                inputs = staged.shard_inputs(order=step.order, shard=shard, **step.inputs, target=step.labels)
                del inputs["target"]
                feed = staged.feed(samples, tokens, step.inputs, step.order, None, shard, n_microbatches=parts)
                step_sizes(staged.lifted, {**inputs, **feed}, None, None, parts, None)
            except LiftingError as error:
                raise DemoError(f"batch({number}), {samples} samples of {tokens} tokens: {error}") from error


def make_batches(subject: Subject, steps: int, seed: int, directory: Path) -> Batches:
    """Makes the batches of all steps, with their orders, and writes them to ``directory``.

    Raises:
        DemoError: a step's batch is none, or does not suit two stages and two context-parallel ranks.
    """
    measured = set(torch.linspace(0, steps - 1, min(steps, MEASURED)).round().int().tolist())
    made = Batches(directory)
    names: set[str] = set()
    for step in range(steps):
        inputs, labels = batch_of(subject, step)
        names = names or set(inputs)
        if set(inputs) != names:
            raise DemoError(f"batch({step}) gives the inputs {sorted(inputs)}, batch(0) gave {sorted(names)}")
        size = (int(labels.shape[0]), int(labels.shape[1]))
        # compact copies: a file would hold all that a tensor is a view of
        own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
        order = data.order(data.ORDERS[step % 2], size, RANKS, step, seed)
        labels = labels.clone(memory_format=torch.contiguous_format)
        put(vars(Step(own, labels, order, step in measured)), step_path(directory, step))
        made.sizes.append(size)
        made.shapes.setdefault((size, *((name, tuple(own[name].shape)) for name in sorted(own))), step)
    return made
