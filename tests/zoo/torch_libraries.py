"""Entries from torchtune, litgpt and torchtitan: decoders with rotary tables in buffers."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from . import titan
from .catalog import BATCH, Entry, Export, Inputs
from .tiny import DIM, HEADS, LAYERS, TABLE, VOCAB, ids, packed, padding, tokens, widen

HEAD_DIM = DIM // HEADS
WINDOW = 4


# Inputs -------------------------------------------------------------------------------------------------


def _positions(name: str, batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (tokens(batch, seq, generator),), {name: packed(batch, seq)}


def _square_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """A bool mask ``[B, S, S]`` of the caller: causal, and padded."""
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    mask = causal & (padding(batch, seq)[:, None, :] | torch.eye(seq, dtype=torch.bool))
    return (tokens(batch, seq, generator),), {"mask": mask}


def _cache_positions(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (tokens(batch, seq, generator),), {"input_pos": torch.arange(seq)}


_SDPA = Export("sdpa", ids)
_SDPA_DYNAMIC = Export("sdpa", ids, shapes=("dynamic",))
_SDPA_STATIC = Export("sdpa", ids, shapes=("static",))
_FULL = Export("full", ids, shapes=("static",), seq=TABLE)
_MASK_DIMS = {"mask": {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}}
_MASK_AXES = {"tokens": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq:row", 2: "seq:col"}}


# torchtune ----------------------------------------------------------------------------------------------


def _torchtune(family: str, **sizes: Any) -> nn.Module:
    """The component builder ``torchtune.models.<family>.<family>`` with tiny sizes."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": HEADS // 2,
        "embed_dim": DIM,
        "max_seq_len": TABLE,
        "intermediate_dim": 2 * DIM,
    }
    module = importlib.import_module(f"torchtune.models.{family}")
    build = getattr(module, family, None)
    if build is None:
        build = getattr(importlib.import_module(f"torchtune.models.{family}._component_builders"), family)
    return widen(build(**{**common, **sizes}))


def _torchtune_t5() -> nn.Module:
    from torchtune.models.t5._component_builders import t5_encoder

    model = t5_encoder(
        embed_dim=DIM,
        mlp_dim=2 * DIM,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_layers=LAYERS,
        rel_pos_num_buckets=8,
        rel_pos_max_dist=16,
        vocab_size=VOCAB,
        norm_eps=1e-6,
        max_seq_len=TABLE,
    )
    return widen(model)


def _tune(
    family: str, exports: tuple[Export, ...], patterns: tuple[str, ...], quick: bool = False, **sizes: Any
) -> Entry:
    build = partial(_torchtune, family, **sizes)
    return Entry(f"tune_{family}", "torchtune", build, exports, patterns, ("layers.1",), quick)


_TUNE_POSITIONS = Export("positions", partial(_positions, "input_pos"))
_TUNE_POSITIONS_DYNAMIC = Export("positions", partial(_positions, "input_pos"), shapes=("dynamic",))
_TUNE_POSITIONS_STATIC = Export("positions", partial(_positions, "input_pos"), shapes=("static",))

_TORCHTUNE = (
    _tune("llama2", (_SDPA_DYNAMIC,), ("slice", "is_causal", "equal_buffers")),
    _tune(
        "llama3",
        (
            _SDPA,
            _TUNE_POSITIONS,
            Export("mask", _square_mask, shapes=("dynamic",), dims=_MASK_DIMS, axes=_MASK_AXES),
            Export("full", ids, seq=TABLE),
        ),
        ("slice", "index", "user_positions", "is_causal", "equal_buffers"),
        quick=True,
    ),
    _tune("llama3_1", (_FULL,), ("slice", "is_causal", "equal_buffers")),
    _tune("gemma", (_SDPA_STATIC,), ("slice", "is_causal", "equal_buffers"), head_dim=HEAD_DIM),
    _tune(
        "gemma2",
        (Export("eager", ids), _TUNE_POSITIONS_DYNAMIC),
        ("slice", "mask_causal", "mask_window", "equal_buffers", "index", "user_positions"),
        head_dim=HEAD_DIM,
        sliding_window_size=WINDOW,
    ),
    _tune("mistral", (_SDPA_STATIC,), ("slice", "is_causal", "equal_buffers")),
    _tune(
        "phi3",
        (_SDPA_DYNAMIC, _TUNE_POSITIONS_STATIC),
        ("slice", "index", "is_causal", "equal_buffers", "user_positions"),
    ),
    _tune("qwen2", (_SDPA_DYNAMIC,), ("slice", "is_causal", "equal_buffers")),
    Entry("tune_t5_encoder", "torchtune", _torchtune_t5, (_FULL,), ("full", "relative"), ("layers.1",)),
)


# litgpt -------------------------------------------------------------------------------------------------


def _litgpt(cache: bool = False, **config: Any) -> nn.Module:
    """litgpt's ``GPT`` of a hand-made ``Config``; ``cache`` adds its key and value cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from litgpt.config import Config
        from litgpt.model import GPT

    common: dict[str, Any] = {
        "block_size": TABLE,
        "n_layer": LAYERS,
        "n_embd": DIM,
        "n_head": HEADS,
        "vocab_size": VOCAB,
        "padded_vocab_size": VOCAB,
    }
    model = GPT(Config(**{**common, **config}))
    if cache:
        model.set_kv_cache(batch_size=BATCH)
    return widen(model)


_LLAMA: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 2 * DIM,
    "n_query_groups": 2,
}
_LLAMA3_ROPE: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 32,
}
_GEMMA2: dict[str, Any] = {
    **_LLAMA,
    "name": "Gemma-2-tiny",
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "scale_embeddings": True,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "sliding_window_size": WINDOW,
    "sliding_window_indices": [1, 0],
    "attention_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: dict[str, Any] = {
    **_LLAMA,
    "name": "Gemma-3-tiny",
    "mlp_class_name": "GemmaMLP",
    "norm_qk": True,
    "rope_local_base_freq": 100.0,
    "rope_indices": [1, 0],
}
_MIXTRAL: dict[str, Any] = {
    **_LLAMA,
    "mlp_class_name": "LLaMAMoE",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "moe_intermediate_size": DIM,
}
_MLA: dict[str, Any] = {
    **_LLAMA,
    "n_query_groups": HEADS,
    "latent_attention": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
_FALCON: dict[str, Any] = {"rotary_percentage": 1.0, "n_query_groups": 1, "bias": False, "shared_attention_norm": True}
_PHI2: dict[str, Any] = {
    "rotary_percentage": 0.5,
    "shared_attention_norm": True,
    "lm_head_bias": True,
    "gelu_approximate": "tanh",
}


def _lit(
    name: str, exports: tuple[Export, ...], patterns: tuple[str, ...], /, quick: bool = False, **config: Any
) -> Entry:
    return Entry(f"lit_{name}", "litgpt", partial(_litgpt, **config), exports, patterns, ("transformer.h.1",), quick)


_LITGPT = (
    _lit(
        "pythia",
        (
            _SDPA,
            Export("full", ids, shapes=("dynamic",), seq=TABLE),
            Export("cache", _cache_positions, {"cache": True}, ("static",)),
        ),
        ("slice", "is_causal", "index", "user_positions", "mixing"),
        quick=True,
    ),
    _lit("llama3", (_SDPA,), ("slice", "is_causal"), rope_adjustments=_LLAMA3_ROPE, **_LLAMA),
    _lit(
        "gemma2",
        (Export("eager", ids, shapes=("static",)),),
        ("slice", "mask_causal", "mask_window", "written"),
        **_GEMMA2,
    ),
    _lit("gemma3", (_SDPA_DYNAMIC,), ("slice", "is_causal"), **_GEMMA3),
    _lit("phi2", (_SDPA_DYNAMIC,), ("slice", "is_causal"), **_PHI2),
    _lit("falcon", (_SDPA_STATIC,), ("slice", "is_causal"), **_FALCON),
    _lit("mixtral", (_SDPA,), ("slice", "is_causal", "routing", "distractor"), **_MIXTRAL),
    _lit("mla", (_SDPA_DYNAMIC,), ("slice", "is_causal"), **_MLA),
)


# torchtitan ---------------------------------------------------------------------------------------------


def _torchtitan(family: str) -> nn.Module:
    """torchtitan's model of a tiny config; see :mod:`titan`."""
    return widen(titan.build(family))


def _titan(name: str, exports: tuple[Export, ...], patterns: tuple[str, ...], quick: bool = False) -> Entry:
    return Entry(f"titan_{name}", "torchtitan", partial(_torchtitan, name), exports, patterns, ("layers.1",), quick)


_TITAN_POSITIONS = Export("positions", partial(_positions, "positions"), shapes=("dynamic",))

_EVAL = Export("sdpa", ids, train=False)  # a training forward counts the tokens of each expert in a buffer
_EVAL_STATIC = Export("sdpa", ids, shapes=("static",), train=False)
_TRAIN = Export("train", ids, shapes=("dynamic",))

_TORCHTITAN = (
    _titan(
        "llama3",
        (_SDPA, _TITAN_POSITIONS),
        ("slice", "index", "user_positions", "is_causal", "equal_buffers"),
        quick=True,
    ),
    _titan("qwen3", (_SDPA_STATIC,), ("slice", "is_causal", "equal_buffers")),
    _titan("qwen3_moe", (_EVAL,), ("slice", "is_causal", "routing", "equal_buffers", "distractor")),
    _titan(
        "deepseek_v3",
        (_EVAL_STATIC, _TRAIN),
        ("slice", "is_causal", "routing", "equal_buffers", "distractor", "mixing"),
    ),
)


ENTRIES = (*_TORCHTUNE, *_LITGPT, *_TORCHTITAN)
