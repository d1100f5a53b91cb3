"""A transformers Llama that computes its own loss, on 2 stages x 2 context-parallel ranks, under torchrun.

Each rank prints how far its gradients are from one process's, and those of the last stage the loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from transformers import LlamaConfig, LlamaForCausalLM

import buffer_lifting as bl

BATCH, SEQ, MICROBATCHES = 4, 16, 2


def main() -> None:
    """One rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 64, (BATCH, SEQ))
    labels = tokens.clone()
    labels[0, :13], labels[2, 4:8] = -100, -100
    order = torch.stack([torch.randperm(SEQ) for _ in range(BATCH)])
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    whole = {"input_ids": tokens, "labels": labels}
    program = torch.export.export(model, (), whole, dynamic_shapes=dict.fromkeys(whole, dynamic))
    staged = bl.partition(bl.context_parallel(bl.lift(program), size=2), num_stages=2)

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "cp"))
    last = mesh["pp"].get_local_rank() == 1
    stage = staged.build_stage(mesh["pp"].get_local_rank(), "cpu", mesh=mesh)
    feed = staged.feed(BATCH, SEQ, whole, order=order, shard=mesh["cp"])
    kwargs = {**staged.shard_inputs(order=order, shard=mesh["cp"], **whole), **feed}
    loss_fn = bl.TokenLoss.of(staged, mesh["cp"], MICROBATCHES)
    target = kwargs[loss_fn.target or ""]  # shifted by the model
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn, kwargs_chunk_spec=staged.kwargs_chunk_spec(kwargs))
    losses: list[torch.Tensor] = []
    if last:
        loss_fn.begin(target)
    schedule.step(**kwargs, target=target if last else None, losses=losses, return_outputs=False)
    loss_fn.reduce_gradients(stage.submod.parameters())

    got = {name: p.grad.clone() for name, p in stage.submod.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(**whole).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    worst = max(float((grad - expected[name]).abs().max() / expected[name].abs().max()) for name, grad in got.items())
    line = f"rank {dist.get_rank()}: {len(got)} gradients off by {worst:.2e}"
    if last:
        line += f", loss off by {abs(float(loss_fn.total(losses) - loss)) / float(loss):.2e}"
    print(f"{line}\n", end="", flush=True)  # one write: ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
