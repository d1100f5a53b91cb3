"""What a rank has of a saved partition: its own stage, and what feeds it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from buffer_lifting.feed import Lengths
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.package.weights import load_stage_weights
from buffer_lifting.placement import Placement
from buffer_lifting.runtime import Shapes, check_placement, make_stage
from buffer_lifting.stages import Stage, StagedProgram, bind_tables, boundary_tensors
from buffer_lifting.tables import TableSource


@dataclass(frozen=True)
class LoadedStage:
    """One stage, read from a directory: see :func:`load_stage`.

    Attributes:
        index: 0 for the first.
        stage: the stage; its module is on the CPU, or on the meta device if it was saved from there.
        num_stages: how many stages the program has.
        tied: FQN -> the stages that hold a copy of that parameter.
        state_dict_of: FQN -> the stages that have it, for every parameter and persistent buffer of the whole model.
    """

    index: int
    stage: Stage
    num_stages: int
    tied: Mapping[str, tuple[int, ...]]
    state_dict_of: Mapping[str, tuple[int, ...]]
    _feeder: StagedProgram  # has the feed program and the names of the inputs, but no stages and no program

    @property
    def placement(self) -> Placement | None:
        """The schedule that ``partition`` was called for, and the rank of each stage; ``None`` if it was for none."""
        return self._feeder.placement

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

    def bind_tables(self, source: TableSource) -> None:
        """Gives values to the tables that the stage is fed from and keeps: see :meth:`StagedProgram.bind_tables`."""
        bind_tables(self.lifted, [self.stage], source)

    def load_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        prefix: str = "",
        strict: bool = True,
        cast: bool = False,
    ) -> None:
        """Gives the stage's parameters and persistent buffers the values of a checkpoint, by FQN.

        Only this stage's tensors are read, each once, and put on ``device``; tables that have values move there too.
        A tied weight is looked for under all its names. Nothing is changed if anything does not fit.

        Args:
            source: a directory with the safetensors of a Hugging Face model (``save_pretrained``), one file or sharded
                with an index; a ``.safetensors`` file; a directory of ``torch.distributed.checkpoint`` (each rank reads
                on its own, without a process group); or a mapping from FQN to tensor, which is copied.
            device: where the stage will run.
            prefix: what the checkpoint has before every FQN, as in ``"model."`` of ``dcp.save({"model": state_dict})``;
                what does not begin with it is ignored.
            strict: refuse a checkpoint with tensors that no stage of the program has.
            cast: convert floating tensors of another floating dtype.

        Raises:
            LiftingError: no such checkpoint, or a damaged one; missing or unexpected tensors, another shape or dtype,
                two values for a tied weight. The error names the FQNs.
        """
        load_stage_weights(
            self.stage.module,
            source,
            tied=self.stage.tied,
            known=self.state_dict_of,
            device=torch.device(device),
            prefix=prefix,
            strict=strict,
            cast=cast,
        )

    def build_stage(
        self,
        device: torch.device | str,
        group: Any = None,
        mesh: Any = None,
        *,
        microbatch_size: int | None = None,
        seq_len: Lengths | None = None,
        activation_dtype: torch.dtype | None = None,
        schedule: Any = None,
    ) -> Any:
        """torch's ``PipelineStage`` of this stage: see :meth:`StagedProgram.build_stage`."""
        shapes = None
        check_placement(self.placement, self.index, schedule, group, mesh)
        if microbatch_size is not None or seq_len is not None:
            shapes = self.boundary(microbatch_size, seq_len, activation_dtype)
        return make_stage(self._feeder.lifted, self.stage, self.num_stages, device, group, mesh, shapes)

    def boundary(
        self, microbatch_size: int | None, seq_len: Lengths | None, activation_dtype: torch.dtype | None = None
    ) -> Shapes:
        """What the stage gets by position and what it hands on: see :meth:`StagedProgram.boundary`."""
        return boundary_tensors(self._feeder.lifted, self.stage, microbatch_size, seq_len, activation_dtype)
