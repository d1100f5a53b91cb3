"""What a rank has of a saved partition: its own stage, and what feeds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from buffer_lifting.feed import Lengths
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.runtime import Shapes, make_stage
from buffer_lifting.stages import Stage, StagedProgram, boundary_tensors


@dataclass(frozen=True)
class LoadedStage:
    """One stage, read from a directory: see :func:`load_stage`.

    Attributes:
        index: 0 for the first.
        stage: the stage; its module is on the CPU, or on the meta device if it was saved from there.
        num_stages: how many stages the program has.
        tied: FQN -> the stages that hold a copy of that parameter.
    """

    index: int
    stage: Stage
    num_stages: int
    tied: Mapping[str, tuple[int, ...]]
    _feeder: StagedProgram  # has the feed program and the names of the inputs, but no stages and no program

    @property
    def lifted(self) -> LiftedProgram:
        """The lifted program without its graph: it has its inputs and can feed them."""
        return self._feeder.lifted

    def feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None = None,
        order: Any = None,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        shard: Any = (0, 1),
        device: torch.device | str | None = None,
        n_microbatches: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The lifted inputs of one step: see :meth:`StagedProgram.feed`."""
        return self._feeder.feed(batch_size, seq_len, inputs, order, positions, shard, device, n_microbatches)

    def shard_inputs(
        self, *, order: Any = None, shard: Any = (0, 1), **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """User inputs in the order of the shards: see :meth:`LiftedProgram.shard_inputs`."""
        return self._feeder.shard_inputs(order=order, shard=shard, **inputs)

    def kwargs_chunk_spec(self, kwargs: Iterable[str] | None = None) -> dict[str, Any]:
        """Along which dim a schedule cuts each keyword: see :meth:`StagedProgram.kwargs_chunk_spec`."""
        return self._feeder.kwargs_chunk_spec(kwargs)

    def build_stage(
        self,
        device: torch.device | str,
        group: Any = None,
        mesh: Any = None,
        *,
        microbatch_size: int | None = None,
        seq_len: Lengths | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> Any:
        """torch's ``PipelineStage`` of this stage: see :meth:`StagedProgram.build_stage`."""
        shapes = None
        if microbatch_size is not None or seq_len is not None:
            shapes = self.boundary(microbatch_size, seq_len, activation_dtype)
        return make_stage(self._feeder.lifted, self.stage, self.num_stages, device, group, mesh, shapes)

    def boundary(
        self, microbatch_size: int | None, seq_len: Lengths | None, activation_dtype: torch.dtype | None = None
    ) -> Shapes:
        """What the stage gets by position and what it hands on: see :meth:`StagedProgram.boundary`."""
        return boundary_tensors(self._feeder.lifted, self.stage, microbatch_size, seq_len, activation_dtype)
