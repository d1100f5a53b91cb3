"""torchtitan's trainer on stages of an exported model: what goes into its ``pipelining_fn``, and into its data.

In torchtitan (0.3.0) a ``ModelSpec`` names the function that makes schedule and model parts; give it
:func:`pipeline_by_export`, and train with a ``Trainer`` whose ``post_dataloading_process`` calls :func:`stage_inputs`.
The rest of the trainer stays: optimizers, clipping, checkpoints, the loss of the whole batch's tokens.

Pipeline, FSDP and context parallelism, activation checkpointing of each layer. Not tensor or expert parallelism, which
replace modules of the model; and torchtitan itself refuses tied embeddings under pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining.schedules import get_schedule_class

import buffer_lifting as bl


def pipeline_by_export(
    model: nn.Module,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    ac_config: Any,
    device: torch.device,
    model_config: Any,
    loss_fn: Callable[..., Any],
    **_: Any,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """A ``pipelining_fn``: schedule, model parts, and whether this rank has the first and the last stage.

    ``model`` is on the meta device, as the trainer makes it; the parts get values when the trainer calls their
    ``init_weights``, and whatever its checkpointer loads.
    """
    pp, cp = parallel_dims.get_mesh("pp"), parallel_dims.cp
    tokens = torch.zeros(2, 16 * cp, dtype=torch.long, device="meta")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": sizes}, strict=False)
    lifted = bl.context_parallel(bl.lift(program), size=cp)
    schedule = parallelism.pipeline_parallel_schedule
    single = schedule in ("1F1B", "GPipe")
    staged = bl.partition(lifted, num_stages=pp.size() * (1 if single else 2), schedule=schedule, pp=pp.size())

    if parallel_dims.tp * parallel_dims.ep * parallel_dims.dp_replicate > 1:
        raise ValueError("stages of an exported model go with pipeline, FSDP and context parallelism only")
    sharded = parallel_dims.get_mesh("loss")  # dp_shard x cp: who shares the tokens of the batch
    mesh = init_device_mesh(device.type, (pp.size(), parallel_dims.dp_shard, cp), mesh_dim_names=("pp", "dp", "cp"))
    mine = staged.stages_of_rank(pp.get_local_rank())
    parts: list[Any] = [staged.stages[index].module for index in mine]
    for part in parts:
        layers = bl.split_layers(part)
        for fqn, layer in layers.items() if ac_config is not None else ():
            path, _, name = fqn.rpartition(".")
            layers[fqn] = checkpoint_wrapper(layer)
            part.get_submodule(path).register_module(name, layers[fqn])
        for module in [*layers.values(), part]:
            fully_shard(module, mesh=sharded, reshard_after_forward=False)  # as torchtitan does under a pipeline
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of the whole batch
            module.set_force_sum_reduction_for_comms(True)
        part.init_weights = _initialiser(part, staged, model_config)
        part.to_empty(device=device)
        part.init_weights()

    stages = [staged.build_stage(index, device, mesh=mesh) for index in mine]
    made = get_schedule_class(schedule)(
        stages[0] if single else stages,
        n_microbatches=training.local_batch_size // parallelism.pipeline_parallel_microbatch_size,
        loss_fn=lambda *args, **kwargs: loss_fn(*args, **kwargs)[0],  # torchtitan's losses return metrics as well
        scale_grads=False,
    )
    made.staged = staged
    return made, parts, 0 in mine, len(staged.stages) - 1 in mine


def stage_inputs(staged: Any, input_dict: dict[str, Tensor], labels: Tensor, cp: Any, order: Any = None) -> Any:
    """What ``post_dataloading_process`` returns for a microbatch: tokens, labels, and the keywords of every stage.

    Args:
        staged: ``trainer.pp_schedule.staged``.
        input_dict, labels: whole sequences, as the data loader gives them.
        cp: ``trainer.parallel_dims.get_optional_mesh("cp")``.
        order: as ``feed`` takes it; torch's load balancers too.
    """
    shard = (0, 1) if cp is None else (cp.get_local_rank(), cp.size())
    own = staged.shard_inputs(order=order, shard=shard, tokens=input_dict["input"], target=labels)
    feed = staged.feed(*labels.shape, order=order, positions=input_dict.get("positions"), shard=shard)
    return own["tokens"], own["target"], {name: value.to(labels.device) for name, value in feed.items()}


def _initialiser(part: nn.Module, staged: Any, model_config: Any) -> Callable[..., None]:
    def init_weights(buffer_device: torch.device | None = None) -> None:
        """Weights and tables of the model's own initialiser, by FQN; a large model loads a checkpoint instead."""
        torch.manual_seed(0)
        whole = model_config.build()
        whole.init_weights(buffer_device=buffer_device)
        values = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}  # state_dict() splits a fused qkv
        set_model_state_dict(part, values, options=StateDictOptions(full_state_dict=True, strict=False))
        staged.bind_tables(whole)

    return init_weights
