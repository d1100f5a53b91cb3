"""How evenly models are split into stages: the largest stage over the mean, for cuts by cost and by equal layers.

The models have the layers, and the proportions of width, vocabulary and experts, of those that they are named after, at
a thirtieth of the width or less.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import buffer_lifting as bl
from buffer_lifting.cuts import layers_of
from buffer_lifting.flops import FlopCounter
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import NodeKind

BATCH, SEQ = 1, 200


@dataclass(frozen=True)
class Cell:
    """A model in so many stages: largest ÷ mean of the stages, or of the sums of ranks under a V-shaped schedule.

    ``flops`` and ``parameters`` are the largest share ÷ mean of each alone.
    """

    model: str
    stages: int
    schedule: str
    split: str
    cost: float
    flops: float
    parameters: float


def stage_shares(staged: bl.StagedProgram) -> tuple[list[float], list[float]]:
    """The share of each stage in FLOPs and in parameter bytes. What several stages recompute counts in none."""
    counter = FlopCounter(dict(staged.sizes))
    places = Counter(node.name for stage in staged.stages for node in stage.module.graph.nodes)
    flops, size = [], []
    for stage in staged.stages:
        flops.append(counter.nodes(node for node in stage.module.graph.nodes if places[node.name] == 1))
        size.append(sum(p.numel() * p.element_size() for p in stage.module.parameters()))
    return [f / (sum(flops) or 1) for f in flops], [s / (sum(size) or 1) for s in size]


def ratios(staged: bl.StagedProgram) -> list[float]:
    """The cost of each stage over the mean: FLOPs and parameter bytes count alike."""
    flops, size = stage_shares(staged)
    return [(f + s) * len(flops) / 2 for f, s in zip(flops, size, strict=True)]


def equal_points(lifted: bl.LiftedProgram, count: int) -> list[str]:
    """Split points with as many layers in each stage, the embedding with the first and the head with the last."""
    record = build_record(lifted.program)
    calls = [node.name for node in record.nodes.values() if node.kind is NodeKind.OP]
    layers = layers_of(record, calls, count)
    return [layers[len(layers) * stage // count].fqn for stage in range(1, count)]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4008,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=8000,
        hidden_size=72,
        intermediate_size=288,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def _deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=1156,
        hidden_size=64,
        intermediate_size=164,
        moe_intermediate_size=18,
        num_hidden_layers=15,
        first_k_dense_replace=3,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=14,
        kv_lora_rank=10,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        use_cache=False,
    )
    return DeepseekV3ForCausalLM(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=2008, d_model=48, d_ff=192, d_kv=4, num_layers=12, num_heads=12, dropout_rate=0.0, use_cache=False
    )
    return T5ForConditionalGeneration(config)


#: Name -> the model, and the names of its inputs of tokens.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "Llama 3.2 1B: 16 layers, vocabulary 63 widths": (_llama, ("input_ids",)),
    "Gemma 2 2B: 26 layers, tied vocabulary 111 widths": (_gemma, ("input_ids",)),
    "DeepSeek-V3: 3 dense layers, 12 of experts": (_deepseek, ("input_ids",)),
    "T5 base: encoder 12, decoder 12": (_t5, ("input_ids", "decoder_input_ids")),
}


def lifted_model(name: str) -> bl.LiftedProgram:
    """Exported with static sizes and lifted."""
    build, names = MODELS[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = build().eval()
        lengths = {"input_ids": SEQ, "decoder_input_ids": SEQ - 90}
        kwargs: dict[str, Any] = {name: torch.randint(0, 1000, (BATCH, lengths[name])) for name in names}
        program = torch.export.export(model, (), kwargs, strict=False)
    return bl.lift(program, strict=False)


def measure(name: str, counts: tuple[int, ...]) -> Iterator[Cell]:
    """The cells of one model: a stage on each rank, then the two stages of each rank of a V."""
    lifted = lifted_model(name)
    for count in counts:
        for schedule in ("1F1B", "ZBVZeroBubble"):
            equal = bl.partition(lifted, split_points=equal_points(lifted, count), schedule=schedule)
            ours = bl.partition(lifted, num_stages=count, schedule=schedule)
            for split, staged in (("equal layers", equal), ("cost", ours)):
                flops, size = (_by_rank(staged, shares) for shares in stage_shares(staged))
                cost = [(f + s) / 2 for f, s in zip(flops, size, strict=True)]
                yield Cell(name, count, schedule, split, *(max(x) * len(x) for x in (cost, flops, size)))


def _by_rank(staged: bl.StagedProgram, shares: list[float]) -> list[float]:
    ranks = staged.stage_ranks()
    sums = [0.0] * (max(ranks.values()) + 1)
    for stage, share in enumerate(shares):
        sums[ranks[stage]] += share
    return sums
