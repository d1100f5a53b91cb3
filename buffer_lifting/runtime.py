"""Stages on torch's own pipeline runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from buffer_lifting.errors import PartitionError
from buffer_lifting.layer_graphs import graphs_of
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.passes.collectives import bind_group
from buffer_lifting.placement import Placement
from buffer_lifting.ring import RING, check_ring_device
from buffer_lifting.stage_inputs import check_inputs_of
from buffer_lifting.stages import Stage, StagedProgram
from buffer_lifting.tables import lack_values, move_to, put, stage_tables
from buffer_lifting.torch_compat import generate_code, rewrite_code

#: A stage's positional inputs, and its outputs, on the meta device.
Shapes = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]


def build_stage(
    staged: StagedProgram, index: int, device: torch.device | str, group: Any, mesh: Any, shapes: Shapes | None
) -> Any:
    """See :meth:`StagedProgram.build_stage`."""
    untie(staged, index)
    return make_stage(staged.lifted, staged.stages[index], len(staged.stages), device, group, mesh, shapes)


def make_stage(
    lifted: LiftedProgram,
    stage: Stage,
    count: int,
    device: torch.device | str,
    group: Any,
    mesh: Any,
    shapes: Shapes | None,
) -> Any:
    """torch's ``PipelineStage`` of one of ``count`` stages; ``shapes`` are its inputs and outputs."""
    from torch.distributed.pipelining import PipelineStage

    place = torch.device(device)
    if any(node.target is RING for node in stage.module.graph.nodes):
        check_ring_device(place)
    bind_ranks(lifted, stage.module, mesh)
    check_inputs_of(lifted, stage)
    _check_values(stage, place)
    move_to(stage.module, place)
    for _, part in graphs_of(stage.module):
        generate_code(part)
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


def check_placement(placement: Placement | None, index: int, schedule: Any, group: Any, mesh: Any) -> None:
    """Refuses a stage that is built for another layout than it was made for, as far as that is known.

    A pipeline group of one rank is that of a process that runs everything, whatever the layout.

    Raises:
        PartitionError: as :meth:`Placement.check`, or ``schedule`` without a layout to compare with.
    """
    if placement is None:
        if schedule is not None:
            raise PartitionError("the stages were made for no schedule: call partition with schedule= to compare")
        return
    rank = size = None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        own = pp_group(group, mesh)
        size = torch.distributed.get_world_size(own)
        rank = torch.distributed.get_rank(own)
    placement.check(index, schedule, *((rank, size) if size != 1 else ()))


def _check_values(stage: Stage, place: torch.device) -> None:
    """Refuses a stage that has no values to move to ``place``."""
    state = dict([*stage.module.named_parameters(), *stage.module.named_buffers()])
    tables = lack_values(stage_tables(stage.module))
    weights = [fqn for fqn in lack_values(state) if fqn not in tables]
    if place.type == "meta" or not (weights or tables):
        return
    raise PartitionError(
        f"stage {stage.index} has no values for {', '.join(map(repr, [*tables, *weights][:4]))}"
        f"{', ...' if len(tables) + len(weights) > 4 else ''}: the program was exported on the meta device or with "
        "fake tensors, or saved without weights; a stage of buffer_lifting.load_stage gets its weights by "
        "load_weights(checkpoint), any other by stage.module.load_state_dict(weights, assign=True), and tables by "
        "bind_tables(module_or_mapping)"
    )


def bind_ranks(lifted: LiftedProgram, module: GraphModule, mesh: Any) -> None:
    """Gives the collectives of a stage the context-parallel group of ``mesh``.

    Raises:
        PartitionError: there is no mesh, or it has no such dim, or that has another size.
    """
    size, name = lifted.cp_size or 1, lifted.mesh_dim
    if size == 1:
        return
    if mesh is None:
        raise PartitionError(
            f"the program runs on {size} context-parallel ranks: give build_stage a mesh with the dims "
            f"'pp' and {name!r}"
        )
    names = mesh.mesh_dim_names or ()
    if name not in names:
        raise PartitionError(
            f"rank {mesh.get_rank()}: the mesh has no {name!r} dim (it has {', '.join(names) or 'unnamed dims'}), "
            "which the program was made context-parallel over"
        )
    if mesh[name].size() != size:
        raise PartitionError(
            f"rank {mesh.get_rank()}: the mesh has {mesh[name].size()} ranks along {name!r}, the program was made for "
            f"{size}; call buffer_lifting.context_parallel(lifted, size={mesh[name].size()}) instead"
        )
    for _, part in graphs_of(module):
        if bind_group(part.graph, mesh[name].get_group().group_name):
            rewrite_code(part)


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
                put(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


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
