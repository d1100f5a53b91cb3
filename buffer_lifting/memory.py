"""An estimate of the memory that stages and ranks need in training, under a schedule of torch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from buffer_lifting.errors import PartitionError
from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.layer_graphs import require_whole
from buffer_lifting.placement import Placement, in_flight, placement_of
from buffer_lifting.saved_values import SavedValues

#: Bytes of an optimizer's state for each element of a parameter: ``adam`` has two float32 moments, ``master`` a float32
#: copy of the parameter besides them.
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 4, "adam": 8, "adamw": 8, "adam+master": 12}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage.

    Attributes:
        stage: its index; ``rank``: the rank that it lies on.
        parameters: of its parameters; ``gradients``: of those that are trained; ``optimizer``: of its state.
        buffers: of its buffers and constants.
        activations: what one microbatch leaves behind between forward and backward, at the sizes of the example inputs.
        in_flight: how many microbatches do so at once, at most.
    """

    stage: int
    rank: int
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    in_flight: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> int:
        """At its peak."""
        return self.state + self.activations * self.in_flight


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: ``state`` is there all the time, ``activations`` when its stages together hold the most."""

    rank: int
    stages: tuple[int, ...]
    state: int
    activations: int

    @property
    def total(self) -> int:
        """At its peak."""
        return self.state + self.activations


@dataclass(frozen=True)
class MemoryEstimate:
    """What stages and ranks need, and what for.

    Attributes:
        stages, ranks: the estimates.
        schedule: the name of the schedule; ``pp``: its ranks; ``n_microbatches``: of a step.
        optimizer: bytes of the optimizer's state for each element of a parameter.
    """

    stages: tuple[StageMemory, ...]
    ranks: tuple[RankMemory, ...]
    schedule: str
    pp: int
    n_microbatches: int
    optimizer: float


def estimate(
    stages: Iterable[tuple[GraphModule, tuple[str, ...]]],
    sizes: Mapping[str, int],
    placement: Placement | None,
    n_microbatches: int | None,
    optimizer: str | float,
) -> MemoryEstimate:
    """See :meth:`StagedProgram.memory`. A stage is its module and the names of the activations that it receives."""
    each = list(stages)
    chosen = placement or placement_of("1F1B", len(each))
    per_element = _per_element(optimizer)
    count = max(2 * chosen.pp, len(each)) if n_microbatches is None else n_microbatches
    flights = in_flight(chosen.schedule, len(each), chosen.pp, count)
    walk = SavedValues(dict(sizes))
    found = []
    for index, (module, received) in enumerate(each):
        require_whole(module, index)
        parameters = list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        found.append(
            StageMemory(
                stage=index,
                rank=chosen.ranks[index],
                parameters=_bytes(parameters),
                gradients=_bytes(trained),
                optimizer=round(per_element * sum(p.numel() for p in trained)),
                buffers=_bytes(_constants(module)),
                activations=walk.stage(module, received),
                in_flight=flights.stages[index],
            )
        )
    ranks = []
    for rank in range(chosen.pp):
        own = chosen.stages_of(rank)
        held = flights.most(rank, [found[stage].activations for stage in own])
        ranks.append(RankMemory(rank, own, sum(found[stage].state for stage in own), round(held)))
    return MemoryEstimate(tuple(found), tuple(ranks), chosen.schedule, chosen.pp, count, per_element)


def _per_element(optimizer: str | float) -> float:
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise PartitionError(
                f"the optimizer {optimizer!r} is not known: give one of {', '.join(OPTIMIZERS)}, or the bytes of its "
                "state for each element of a parameter"
            )
        return OPTIMIZERS[optimizer]
    if isinstance(optimizer, bool) or not isinstance(optimizer, int | float) or not 0 <= optimizer < float("inf"):
        raise PartitionError(f"optimizer must be a name or bytes for each element, not {optimizer!r}")
    return optimizer


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _constants(module: GraphModule) -> list[Tensor]:
    """The buffers and constants that a stage reads, each once."""
    own = {id(p) for p in module.parameters()}
    values: dict[int, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attribute_of(node, module)
            if isinstance(value, Tensor) and id(value) not in own:
                values[id(value)] = value
    return list(values.values())
