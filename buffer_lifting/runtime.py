"""Stages on torch's own pipeline runtime."""

from __future__ import annotations

from typing import Any

import torch

from buffer_lifting.errors import PartitionError
from buffer_lifting.stages import Stage, StagedProgram

#: A stage's positional inputs, and its outputs, on the meta device.
Shapes = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def build_stage(
    staged: StagedProgram, index: int, device: torch.device | str, group: Any, mesh: Any, shapes: Shapes | None
) -> Any:
    """See :meth:`StagedProgram.build_stage`."""
    untie(staged, index)
    return make_stage(staged.stages[index], len(staged.stages), device, group, mesh, shapes)


def make_stage(
    stage: Stage, count: int, device: torch.device | str, group: Any, mesh: Any, shapes: Shapes | None
) -> Any:
    """torch's ``PipelineStage`` of one of ``count`` stages; ``shapes`` are its inputs and outputs."""
    from torch.distributed.pipelining import PipelineStage

    place = torch.device(device)
    inputs, outputs = shapes or (None, None)
    return PipelineStage(
        stage.module.to(place),
        stage.index,
        count,
        place,
        input_args=inputs,
        output_args=outputs,
        group=pp_group(group, mesh),
    )


def untie(staged: StagedProgram, index: int) -> None:
    """Gives a stage its own copy of each parameter that an earlier stage holds as well.

    Two stages of one rank would otherwise share the Parameter, and torch scales the gradients of each stage's
    parameters by the number of microbatches on its own: a shared one twice. The gradients of the copies are to be
    summed by the trainer (``staged.tied`` lists them), as between ranks.
    """
    module = staged.stages[index].module
    for fqn, holders in staged.tied.items():
        if index not in holders[1:]:
            continue
        first = staged.stages[holders[0]].module.get_parameter(fqn)
        for name, parameter in list(module.named_parameters()):
            if parameter is first:
                path, _, leaf = name.rpartition(".")
                copy = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module.get_submodule(path), leaf, copy)


def pp_group(group: Any, mesh: Any) -> Any:
    """The pipeline process group of ``group`` or ``mesh``."""
    if mesh is None:
        return group
    if group is not None:
        raise PartitionError("give either group or mesh")
    names = mesh.mesh_dim_names or ()
    if "pp" not in names:
        raise PartitionError(f"the mesh has no 'pp' dim (it has {', '.join(names) or 'unnamed dims'})")
    return mesh["pp"].get_group()
