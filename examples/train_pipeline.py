"""Trains an unedited Hugging Face Llama in two pipeline stages, another token order for every sample.

``torchrun --nproc-per-node 2 examples/train_pipeline.py``
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from transformers import LlamaConfig, LlamaForCausalLM

import buffer_lifting as bl

BATCH, LENGTH, MICROBATCHES, STEPS = 8, 32, 4, 3


def export() -> torch.export.ExportedProgram:
    """The same program on every rank: the seed fixes the weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    tokens = torch.randint(0, 256, (4, 16))
    return torch.export.export(LlamaForCausalLM(config), (), {"input_ids": tokens}, dynamic_shapes=shapes)


def loss_fn(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy; logits and targets are in the same order, whatever it is."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def main() -> None:
    """One rank."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))

    lifted = bl.context_parallel(bl.lift(export()), size=1)
    staged = bl.partition(lifted, num_stages=2)
    stage = staged.build_stage(rank, "cpu", mesh=mesh)
    optimizer = torch.optim.AdamW(stage.submod.parameters(), lr=1e-3)

    schedule = None
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 256, (BATCH, LENGTH + 1), generator=generator)
    for step in range(STEPS):
        order = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(BATCH)])
        feed = staged.feed(BATCH, LENGTH, order=order, n_microbatches=MICROBATCHES)
        tokens = staged.shard_inputs(order=order, input_ids=text[:, :-1])
        target = text[:, 1:].gather(1, order)
        kwargs = {**tokens, **feed}
        if schedule is None:
            spec = staged.kwargs_chunk_spec(kwargs)
            schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn, kwargs_chunk_spec=spec)
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        schedule.step(**kwargs, target=target if rank == 1 else None, losses=losses)
        optimizer.step()
        if rank == 1:
            print(f"step {step}: loss {torch.stack(losses).mean():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
