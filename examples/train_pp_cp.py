"""Trains an unedited Hugging Face Llama on a mesh of pipeline stages x context-parallel ranks, on packed documents.

``torchrun --nproc-per-node 4 examples/train_pp_cp.py`` has 2 stages x 2 halves of every sequence; with 2 processes it
is a pipeline alone. ``--checkpoint DIR --save-at 3`` writes a checkpoint before step 3, under the names of the model
that was exported; ``--checkpoint DIR --resume 3`` goes on from there, with the losses of a run that never stopped.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _PerDocumentHeadTailLoadBalancer
from transformers import LlamaConfig, LlamaForCausalLM

import buffer_lifting as bl

STAGES, BATCH, LENGTH, MICROBATCHES, VOCAB = 2, 8, 64, 4, 64
#: What the load balancer asks of the length of a document: two chunks for each of two context-parallel ranks.
MULTIPLE = 4
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build_model() -> LlamaForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def packed_documents(step: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """A step's batch, whole and as written: other documents of other lengths in every sample.

    Returns:
        Tokens, labels and position ids, ``[BATCH, LENGTH]``, and the lengths of each sample's documents. A document
        counts up by a stride of its own and is padded to a multiple of ``MULTIPLE``; its last token and its padding
        have the label -100; its positions start at 0.
    """
    generator = torch.Generator().manual_seed(step)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    labels, positions = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    lengths: list[list[int]] = [[] for _ in range(BATCH)]
    for sample in range(BATCH):
        while (start := sum(lengths[sample])) < LENGTH:
            length = min(MULTIPLE * draw(1, 9), LENGTH - start)
            written = length - draw(0, MULTIPLE - 1)
            text = (draw(0, VOCAB) + draw(1, 4) * torch.arange(written)) % VOCAB
            tokens[sample, start : start + written] = text
            labels[sample, start : start + written - 1] = text[1:]
            positions[sample, start : start + length] = torch.arange(length)
            lengths[sample].append(length)
    return tokens, labels, positions, lengths


def state_of(stage: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A stage's part of a checkpoint: parameters and the optimizer's state by the FQNs of the original model.

    Stages have different names; context-parallel ranks have the same values, of which one copy is written.
    """
    return {
        "model": stage.submod.state_dict(),
        "optimizer": get_optimizer_state_dict(stage.submod, optimizer, options=FLAT),
    }


def resume(stage: Any, optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    """Loads a stage's part of a checkpoint."""
    state = state_of(stage, optimizer)  # the tensors to load into
    dcp.load(state, checkpoint_id=checkpoint)
    stage.submod.load_state_dict(state["model"])
    set_optimizer_state_dict(stage.submod, optimizer, state["optimizer"], options=FLAT)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """One rank."""
    mesh = init_device_mesh(device.type, (STAGES, dist.get_world_size() // STAGES), mesh_dim_names=("pp", "cp"))
    pp, cp = mesh["pp"], mesh["cp"]
    last = pp.get_local_rank() == STAGES - 1

    tokens = torch.randint(0, VOCAB, (4, 16))
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(build_model(), (), {"input_ids": tokens}, dynamic_shapes=shapes)
    lifted = bl.context_parallel(bl.lift(program), size=cp.size())
    staged = bl.partition(lifted, num_stages=STAGES)
    stage = staged.build_stage(pp.get_local_rank(), device, mesh=mesh)
    optimizer = torch.optim.AdamW(stage.submod.parameters(), lr=3e-3)
    if args.resume:
        resume(stage, optimizer, args.checkpoint)

    loss_fn = bl.TokenLoss(cp, MICROBATCHES)
    schedule = None
    for step in range(args.resume, args.steps):
        if step == args.save_at:
            dcp.save(state_of(stage, optimizer), checkpoint_id=args.checkpoint)
        tokens, labels, positions, lengths = packed_documents(step)
        order = _PerDocumentHeadTailLoadBalancer(lengths, cp.size(), "cpu")
        inputs = staged.shard_inputs(order=order, shard=cp, input_ids=tokens, target=labels)
        target = inputs.pop("target").to(device)
        feed = staged.feed(
            BATCH, LENGTH, order=order, positions=positions, shard=cp, device=device, n_microbatches=MICROBATCHES
        )
        kwargs = {**{name: value.to(device) for name, value in inputs.items()}, **feed}
        if schedule is None:
            spec = staged.kwargs_chunk_spec(kwargs)
            schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn, kwargs_chunk_spec=spec)

        optimizer.zero_grad()
        losses: list[Tensor] = []
        if last:
            loss_fn.begin(target)  # the valid tokens of the whole batch, on all context-parallel ranks
        schedule.step(**kwargs, target=target if last else None, losses=losses)
        loss_fn.reduce_gradients(stage.submod.parameters())  # a rank has seen its own tokens only
        optimizer.step()
        if last:
            loss = loss_fn.total(losses)
            if cp.get_local_rank() == 0:
                print(f"step {step}: loss {loss:.9f}", flush=True)


def main() -> None:
    """Starts and ends a rank: on a GPU each with nccl if there are enough of them, else with gloo."""
    parser = argparse.ArgumentParser(description="Train on pipeline stages x context-parallel ranks.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint", metavar="DIR", help="the directory of the checkpoint")
    parser.add_argument("--save-at", type=int, metavar="STEP", help="save before this step")
    parser.add_argument("--resume", type=int, default=0, metavar="STEP", help="go on with this step")
    args = parser.parse_args()
    if (args.resume or args.save_at is not None) and not args.checkpoint:
        parser.error("give --checkpoint DIR")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    train(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
