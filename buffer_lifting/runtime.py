"""Stages on torch's own pipeline runtime."""

from __future__ import annotations

from typing import Any

import torch

from buffer_lifting.errors import PartitionError
from buffer_lifting.stages import StagedProgram


def build_stage(staged: StagedProgram, index: int, device: torch.device | str, group: Any, mesh: Any) -> Any:
    """See :meth:`StagedProgram.build_stage`."""
    from torch.distributed.pipelining import PipelineStage

    count = len(staged.stages)
    if not isinstance(index, int) or not 0 <= index < count:
        raise PartitionError(f"there is no stage {index!r}; the program has {count} stages")
    place = torch.device(device)
    return PipelineStage(
        staged.stages[index].module.to(place), index, count, place, group=pp_group(staged.lifted.cp_size, group, mesh)
    )


def pp_group(cp_size: int | None, group: Any, mesh: Any) -> Any:
    """The pipeline process group of ``group`` or ``mesh``."""
    if mesh is None:
        return group
    if group is not None:
        raise PartitionError("give either group or mesh")
    names = mesh.mesh_dim_names or ()
    if "pp" not in names:
        raise PartitionError(f"the mesh has no 'pp' dim (it has {', '.join(names) or 'unnamed dims'})")
    return mesh["pp"].get_group()
