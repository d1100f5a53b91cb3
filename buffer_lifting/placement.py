"""Which stages lie on which rank under a schedule of torch's, and how many microbatches each holds at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buffer_lifting.errors import PartitionError
from buffer_lifting.torch_compat import is_single, schedule_class, schedule_order, stage_to_rank


def stage_ranks(schedule: Any, num_stages: int, pp: int | None = None) -> dict[int, int]:
    """The rank of each stage: what torch has as ``stage_index_to_group_rank``.

    One stage a rank (GPipe, 1F1B); in rounds, ``r, r + pp, ...`` (Interleaved1F1B, LoopedBFS, InterleavedZeroBubble);
    or down and up again, ``r`` and ``2 * pp - 1 - r`` (ZBVZeroBubble, DualPipeV).

    Args:
        schedule: a schedule of ``torch.distributed.pipelining``: its name, with or without ``Schedule``, or its class.
        num_stages: how many stages the program has, on all ranks together.
        pp: pipeline ranks; may be left out where ``num_stages`` decides it: one stage a rank, or V-shaped.

    Raises:
        PartitionError: an unknown schedule, or a number of stages that does not lie on ``pp`` ranks.
    """
    kind, name = _class(schedule)
    style = "v" if name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV") else "loop"
    for what, value in (("num_stages", num_stages), ("pp", pp)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise PartitionError(f"{what} must be a positive integer, not {value!r}")
    if is_single(kind):
        pp = num_stages if pp is None else pp
        if pp != num_stages:
            raise PartitionError(
                f"{name} has one stage on each rank: {num_stages} stages do not lie on {pp} ranks; make {pp} stages, "
                "or take a schedule with several stages on a rank"
            )
    elif style == "v":
        pp = num_stages // 2 if pp is None else pp
        if 2 * pp != num_stages:
            raise PartitionError(
                f"{name} has two stages on each rank: {num_stages} stages do not lie on {pp} ranks; make "
                f"{2 * max(pp, 1)} stages"
            )
    elif pp is None:
        raise PartitionError(f"{name} has several stages on each rank: give pp, the number of pipeline ranks")
    elif num_stages % pp:
        raise PartitionError(
            f"{name} has as many stages on each rank: {num_stages} stages do not lie on {pp} ranks; make a multiple of "
            f"{pp} stages"
        )
    return stage_to_rank(pp, num_stages, style)


def _class(schedule: Any) -> tuple[Any, str]:
    """A schedule's class and the name of the class of torch's that it is."""
    try:
        kind = schedule_class(schedule)
    except (ValueError, TypeError) as error:
        raise PartitionError(
            f"{schedule!r} is no schedule of torch.distributed.pipelining; it has GPipe, 1F1B, Interleaved1F1B, "
            "LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble and DualPipeV"
        ) from error
    known = (base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.distributed.pipelining"))
    return kind, next(known, kind.__name__)


@dataclass(frozen=True)
class Placement:
    """Stages on ranks.

    Attributes:
        schedule: the name of the schedule's class.
        ranks: the rank of each stage.
    """

    schedule: str
    ranks: tuple[int, ...]

    @property
    def pp(self) -> int:
        """The number of ranks."""
        return max(self.ranks) + 1

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        return tuple(stage for stage, place in enumerate(self.ranks) if place == rank)

    def check(self, index: int, schedule: Any, rank: int | None = None, size: int | None = None) -> None:
        """Refuses to build a stage for another layout.

        Args:
            index: the stage.
            schedule: the one that it is built for, if that is said.
            rank: that of the process in its pipeline group of ``size`` ranks, if that is known.

        Raises:
            PartitionError: the schedule puts stages on other ranks; the group has another size; the stage is another
                rank's.
        """
        made = f"partition was called for {self.schedule} on {self.pp} ranks, with the stages on ranks {self.ranks}"
        if schedule is not None:
            try:
                other = placement_of(schedule, len(self.ranks), self.pp)
            except PartitionError as error:
                raise PartitionError(f"{made}: {error}") from error
            if other.ranks != self.ranks:
                raise PartitionError(
                    f"{made}; {other.schedule} has them on ranks {other.ranks}: take a schedule of the first layout, "
                    "or call partition again with this one"
                )
        if size is not None and size != self.pp:
            raise PartitionError(
                f"{made}; the pipeline group has {size}: run on {self.pp}, or call partition again for {size}"
            )
        if rank is not None and rank != self.ranks[index]:
            raise PartitionError(
                f"{made}; stage {index} belongs to rank {self.ranks[index]}, and this is rank {rank}, which builds the "
                f"stages {self.stages_of(rank)}"
            )


def placement_of(schedule: Any, num_stages: int, pp: int | None = None) -> Placement:
    """:func:`stage_ranks` as a record."""
    ranks = stage_ranks(schedule, num_stages, pp)
    return Placement(_class(schedule)[0].__name__, tuple(ranks[stage] for stage in range(num_stages)))


@dataclass(frozen=True)
class InFlight:
    """How many microbatches lie between forward and backward at once.

    Attributes:
        stages: the most for each stage.
        moments: for each rank every state that it goes through, as the numbers of its stages.
    """

    stages: tuple[int, ...]
    moments: Mapping[int, tuple[tuple[int, ...], ...]]

    def most(self, rank: int, sizes: Sequence[float]) -> float:
        """The most that a rank holds at once, when its stages hold ``sizes`` a microbatch."""
        return max(sum(n * s for n, s in zip(m, sizes, strict=True)) for m in self.moments[rank])


def in_flight(schedule: Any, num_stages: int, pp: int | None, n_microbatches: int) -> InFlight:
    """Counts forwards less backwards in the actions of torch's own schedule (its ``pipeline_order``).

    A backward in two parts gives its values free with the second one, that of the weights. No process is needed.

    Raises:
        PartitionError: as :func:`stage_ranks`, and a number of microbatches that the schedule refuses.
    """
    if not isinstance(n_microbatches, int) or isinstance(n_microbatches, bool) or n_microbatches < 1:
        raise PartitionError(f"n_microbatches must be a positive integer, not {n_microbatches!r}")
    placement = placement_of(schedule, num_stages, pp)
    try:
        order = schedule_order(_class(schedule)[0], placement.ranks, n_microbatches)
    except ValueError as error:
        raise PartitionError(f"{placement.schedule} on {placement.pp} ranks: {error}") from error
    most = [0] * num_stages
    moments: dict[int, tuple[tuple[int, ...], ...]] = {}
    for rank, actions in order.items():
        own = placement.stages_of(rank)
        held = dict.fromkeys(own, 0)
        seen = {tuple(held.values()): None}
        for stage, kind in actions:
            held[stage] += {"F": 1, "B": -1, "W": -1}.get(kind, 0)
            most[stage] = max(most[stage], held[stage])
            seen[tuple(held.values())] = None
        moments[rank] = tuple(seen)
    return InFlight(tuple(most), moments)
