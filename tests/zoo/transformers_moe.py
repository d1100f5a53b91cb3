"""Mixture-of-experts and state-space decoders of transformers; see ``transformers_decoders`` for the sizes.

The expert loops of transformers have three forms: ``grouped_mm`` (its default: sort by expert, ``index_put_``),
``batched_mm`` (a weight for each token and expert) and ``eager`` (a loop over ``nonzero``, which torch.export cannot
trace: there is no such export, and dbrx, which has no other form, is not here). The recurrences of state-space models
are loops over the time steps, which fix the length: they are exported with static shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .catalog import Entry
from .transformers_decoders import ALL, HEAD8, ROPE, lm

_TOP2: dict[str, Any] = {"num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    **_TOP2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = f"{ROPE} routing distractor"

_MOE = (
    lm("mixtral", "Mixtral", "sdpa batched labels aux", f"{_ROUTED} labels length mixing", num_local_experts=4),
    lm("olmoe", "Olmoe", f"{ALL} batched", f"{_ROUTED} user_positions mask_padding labels", num_experts=4, **_TOP2),
    lm(
        "qwen2_moe",
        "Qwen2Moe",
        "sdpa batched",
        _ROUTED,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **_TOP2,
    ),
    lm("qwen3_moe", "Qwen3Moe", "sdpa batched", _ROUTED, num_experts=4, moe_intermediate_size=16, **_TOP2, **HEAD8),
    lm(
        "gpt_oss",
        "GptOss",
        "eager positions mask labels batched",
        "computed hop mask_causal routing distractor mask_window user_positions mask_padding labels",
        attention="eager",
        num_local_experts=4,
        sliding_window=4,
        **_TOP2,
        **HEAD8,
    ),
    lm(
        "llama4",
        "Llama4",
        ALL,
        f"{ROPE} distractor mask_window scale cumsum_data user_positions mask_padding labels",
        config="Llama4TextConfig",
        quick=True,
        num_local_experts=4,
        intermediate_size_mlp=64,
        attention_chunk_size=4,
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        floor_scale=4,
        **HEAD8,
    ),
    lm("deepseek_v2", "DeepseekV2", "sdpa positions batched", f"{_ROUTED} user_positions", **_LATENT),
    lm("deepseek_v3", "DeepseekV3", f"{ALL} batched", f"{_ROUTED} user_positions mask_padding labels", **_LATENT),
    lm("granitemoe", "GraniteMoe", "sdpa batched", _ROUTED, num_local_experts=4, **_TOP2),
    lm("jetmoe", "JetMoe", "sdpa", _ROUTED, kv_channels=8, num_local_experts=4, **_TOP2),
    lm("phimoe", "Phimoe", "eval eval_batched", _ROUTED, num_local_experts=4, **_TOP2),
)

_RECURRENT = (
    lm("mamba", "Mamba", "eager", "mixing", attention="eager", state_size=8, time_step_rank=4),
    lm("falcon_mamba", "FalconMamba", "eager", "mixing", attention="eager", state_size=8, time_step_rank=4),
    lm(
        "mamba2",
        "Mamba2",
        "eager",
        "mixing",
        attention="eager",
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=4,
    ),
    lm("rwkv", "Rwkv", "eager", "distractor mixing", attention="eager", attention_hidden_size=32, context_length=53),
    lm(
        "recurrent_gemma",
        "RecurrentGemma",
        "sdpa",
        f"{ROPE} mask_window distractor mixing",
        lru_width=32,
        attention_window_size=4,
        block_types=["recurrent", "attention"],
        **HEAD8,
    ),
    lm(
        "minimax",
        "MiniMax",
        "sdpa",
        f"{ROPE} routing mixing",
        num_local_experts=4,
        block_size=4,
        layer_types=["linear_attention", "full_attention"],
        **_TOP2,
        **HEAD8,
    ),
)


def _static(entry: Entry) -> Entry:
    return replace(entry, exports=tuple(replace(export, shapes=("static",)) for export in entry.exports))


ENTRIES: tuple[Entry, ...] = (*_MOE, *(_static(entry) for entry in _RECURRENT))
