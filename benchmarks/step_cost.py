"""The measurements of :mod:`benchmarks.step_time`.

A step is the forward and the backward of one microbatch: gradients of all parameters and of the activation that the
stage gets. A round runs a step of each variant, in random order; a sample is ``calls`` steps in a row. Ratios are those
of the samples of one round, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.export import Dim

import buffer_lifting as bl
from benchmarks.memory import peak_bytes
from benchmarks.step_models import ByHand, Form, Layers, Llama, Size, Unlifted

FORMS: tuple[Form, ...] = ("values", "positions")
#: The clocks: CPU seconds of the process, which other jobs disturb little, and seconds on the wall.
CLOCKS = ("CPU", "wall")
OTHERS = ("by hand", "unlifted")
RESAMPLES = 10_000


class StepError(Exception):
    """The variants do not compute the same."""


@dataclass
class Cell:
    """One size and form.

    Attributes:
        size, form: what was measured.
        samples: variant -> clock -> seconds of a step, one entry a round.
        inputs: bytes of storage of the lifted inputs that the stage reads: of an order that all samples share, and of
            another order for each sample.
        peak: the most bytes that making the lifted inputs and a step hold at once, for an order per sample.
    """

    size: str
    form: Form
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    inputs: tuple[int, int] = (0, 0)
    peak: int = 0

    def ratio(self, other: str, clock: str = "CPU") -> tuple[float, float, float]:
        """Lifted ÷ ``other``: the median over the rounds, and its 95% confidence interval."""
        pairs = zip(self.samples["lifted"][clock], self.samples[other][clock], strict=True)
        return interval([lifted / beside for lifted, beside in pairs])

    def seconds(self, variant: str, clock: str = "CPU") -> float:
        """The median time of a step."""
        return median(self.samples[variant][clock])


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median of paired ratios and its 95% percentile bootstrap interval (:data:`RESAMPLES` resamples of rounds)."""
    values = torch.tensor(ratios, dtype=torch.float64)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    medians = values[draws].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return median(ratios), low, high


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of memory behind the tensors: an expanded batch counts once."""
    seen = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(
        min(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()) for tensor in seen.values()
    )


def load(module: nn.Module, model: Llama) -> None:
    """Gives ``module`` the parameters of the model, as copies."""
    state = model.state_dict()
    module.load_state_dict({name: state[name].clone() for name in module.state_dict()}, strict=False)


@dataclass
class Variants:
    """What is timed: variant -> step, each of which returns the output and all gradients."""

    steps: dict[str, Callable[[], list[Tensor]]]
    staged: bl.StagedProgram
    stage_inputs: tuple[str, ...]


def make_step(
    module: Callable[..., Tensor], parameters: Sequence[nn.Parameter], h: Tensor, *args: Tensor, **kwargs: Tensor
) -> Callable[[], list[Tensor]]:
    """A step of a module on the activation ``h``, as a schedule of torch runs it."""

    def step() -> list[Tensor]:
        hidden = h.detach().requires_grad_()
        output = module(hidden, *args, **kwargs)
        output.backward(torch.ones_like(output))
        assert hidden.grad is not None
        found = [output.detach(), hidden.grad, *(p.grad for p in parameters if p.grad is not None)]
        for parameter in parameters:
            parameter.grad = None
        return found

    return step


def variants(size: Size, form: Form) -> Variants:
    """The stage, the same layers by hand, and the same layers exported and not lifted, with equal weights."""
    torch.manual_seed(0)
    model = Llama(size)
    tokens = torch.randint(0, size.vocab, (size.batch, size.seq))
    hidden = torch.randn(size.batch, size.seq, size.dim)
    dynamic = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": dynamic})
    staged = bl.partition(bl.lift(program, form=form), split_points=[f"layers.{size.layers}"])
    stage = staged.stages[1]
    feed = {name: value for name, value in staged.feed(size.batch, size.seq).items() if name in stage.kwargs}
    by_hand, unlifted = ByHand(size, form), Unlifted(size)
    for module in (by_hand, unlifted):
        load(module, model)
    plain = torch.export.export(unlifted, (hidden,), dynamic_shapes={"h": dynamic}).module()
    (lifted,) = feed.values()
    steps = {
        "lifted": make_step(stage.module, _in_order(stage.module), hidden, **feed),
        "by hand": make_step(by_hand, _in_order(by_hand), hidden, lifted),
        "unlifted": make_step(plain, _in_order(plain), hidden),
    }
    return Variants(steps, staged, stage.kwargs)


def _in_order(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in sorted(module.named_parameters())]


def check(steps: dict[str, Callable[[], list[Tensor]]]) -> None:
    """All variants give the same output and gradients, bit for bit.

    Raises:
        StepError: they do not.
    """
    wanted = steps["by hand"]()
    for name, step in steps.items():
        found = step()
        if len(found) != len(wanted) or not all(map(torch.equal, found, wanted)):
            raise StepError(f"{name} computes something else than the layers by hand")


def measure(size: Size, form: Form, rounds: int, calls: int) -> Cell:
    """Times ``rounds`` rounds of ``calls`` steps of each variant, in random order.

    Raises:
        StepError: the variants do not compute the same.
    """
    made = variants(size, form)
    check(made.steps)
    cell = Cell(size.name, form, {name: {clock: [] for clock in CLOCKS} for name in made.steps})
    cell.inputs, cell.peak = memory(made, size)
    names, draw = list(made.steps), random.Random(0)
    for name in names:  # what is cached on first use
        for _ in range(calls):
            made.steps[name]()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            draw.shuffle(names)
            for name in names:
                step = made.steps[name]
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    step()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                cell.samples[name]["CPU"].append(cpu / calls)
                cell.samples[name]["wall"].append(wall / calls)
    finally:
        gc.enable()
    return cell


def memory(made: Variants, size: Size) -> tuple[tuple[int, int], int]:
    """``inputs`` and ``peak`` of a cell."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(size.seq, generator=generator) for _ in range(size.batch)])
    module = made.staged.stages[1].module
    hidden = torch.randn(size.batch, size.seq, size.dim)

    def feed(own: Tensor) -> dict[str, Tensor]:
        made_now = made.staged.feed(size.batch, size.seq, order=own)
        return {name: made_now[name] for name in made.stage_inputs}

    def step() -> list[Tensor]:
        return make_step(module, _in_order(module), hidden, **feed(order))()

    step()  # what is kept from the first call on
    return (storage_bytes([*feed(order[:1]).values()]), storage_bytes([*feed(order).values()])), peak_bytes(step)


__all__ = ["CLOCKS", "FORMS", "OTHERS", "Cell", "Layers", "StepError", "check", "interval", "measure", "variants"]
