"""Decoder-only models of transformers: tiny random configurations, with nothing of the library edited.

Layers 2, hidden 32, heads 4, key heads 2, vocabulary 61, table length 53; no dropout, no cache. Weights are drawn wider
than the library's default, so that a mistake in the positions shows in the logits. Models without an sdpa path are
exported with ``"eager"`` attention only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .catalog import SEQ, Entry, Export, Inputs

LIBRARY = "transformers"
VOCAB, TABLE = 61, 53
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TABLE,
}
_DROPOUT = (
    "dropout attention_dropout activation_dropout hidden_dropout layerdrop resid_pdrop embd_pdrop attn_pdrop "
    "resid_dropout embed_dropout residual_dropout embedding_dropout hidden_dropout_prob attention_probs_dropout_prob"
)


def build_model(
    model: str,
    config: str,
    *,
    attention: str = "sdpa",
    experts: str | None = None,
    **fields: Any,
) -> nn.Module:
    """A ``model`` with a ``config`` (class names); ``fields`` go to the config."""
    import transformers

    shared: dict[str, Any] = {**_SIZES, **dict.fromkeys(_DROPOUT.split(), 0.0)}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, config)(
        **{**shared, **ids, "initializer_range": 0.2, "init_std": 0.2, "use_cache": False, **fields}
    )
    made._attn_implementation = attention
    made._experts_implementation = experts
    built = getattr(transformers, model)(made)
    assert isinstance(built, nn.Module)
    return built


# Inputs -------------------------------------------------------------------------------------------------


def _tokens(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)  # 0, 1 and 2 are special


def packed_positions(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    """Position ids ``[batch, seq]`` of two documents in each row."""
    first = torch.randint(1, seq, (batch, 1), generator=generator)
    positions = torch.arange(seq)[None, :]
    return torch.where(positions < first, positions, positions - first)


def inputs_plain(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Tokens ``[batch, seq]``."""
    return (), {"input_ids": _tokens(batch, seq, generator)}


def inputs_positions(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Tokens and the position ids of packed documents."""
    ids = _tokens(batch, seq, generator)
    return (), {"input_ids": ids, "position_ids": packed_positions(batch, seq, generator)}


def inputs_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Tokens and a padding mask (1: real), padded on the right."""
    ids = _tokens(batch, seq, generator)
    lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
    lengths[0] = seq - seq // 3
    return (), {"input_ids": ids, "attention_mask": (torch.arange(seq)[None, :] < lengths).long()}


def inputs_labels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Tokens and labels, some of them ignored: the loss is in the graph."""
    ids, labels = _tokens(batch, seq, generator), _tokens(batch, seq, generator)
    labels[torch.rand(batch, seq, generator=generator) < 0.2] = -100
    labels[0, -1] = 3
    return (), {"input_ids": ids, "labels": labels}


def _inputs_mrope(batch: int, seq: int, generator: torch.Generator, sections: int) -> Inputs:
    ids = _tokens(batch, seq, generator)
    rows = [packed_positions(batch, seq, generator) for _ in range(sections)]
    return (), {"input_ids": ids, "position_ids": torch.stack(rows)}


# Exports ------------------------------------------------------------------------------------------------

_ONE_BATCH = {0: Dim("batch", min=2), 1: Dim.AUTO}
_EXPORTS = {
    "sdpa": Export("sdpa", inputs_plain),
    "eager": Export("eager", inputs_plain, {"attention": "eager"}),
    "positions": Export("positions", inputs_positions),
    "mask": Export("mask", inputs_mask),
    # Dim.AUTO gives the two inputs batch symbols of their own, and alibi's reshape divides one by the other
    "mask_one_batch": Export("mask", inputs_mask, dims={"input_ids": _ONE_BATCH, "attention_mask": _ONE_BATCH}),
    "labels": Export("labels", inputs_labels),
    "full": Export("full", inputs_plain, shapes=("static",), seq=TABLE),  # a dynamic export would fix S at the length
    "long": Export("long", inputs_plain, seq=2 * SEQ),
    "batched": Export("batched", inputs_plain, {"experts": "batched_mm"}),
    "aux": Export("aux", inputs_plain, {"output_router_logits": True}),
    "eval": Export("eval", inputs_plain, train=False),
    "eval_batched": Export("eval_batched", inputs_plain, {"experts": "batched_mm"}, train=False),
}
ALL = "sdpa eager positions mask labels"
_MROPE = {"position_ids": {1: Dim.AUTO, 2: Dim.AUTO}, "input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
_MROPE_AXES = {"position_ids": {1: "batch", 2: "seq"}, "input_ids": {0: "batch", 1: "seq"}}


def _entry(
    name: str,
    model: str,
    config: str,
    exports: str,
    patterns: str,
    *,
    quick: bool = False,
    more: tuple[Export, ...] = (),
    **fields: Any,
) -> Entry:
    build: Callable[..., nn.Module] = partial(build_model, model, config, **fields)
    chosen = (*(_EXPORTS[export] for export in exports.split()), *more)
    return Entry(f"hf_{name}", LIBRARY, build, chosen, tuple(patterns.split()), quick=quick)


def lm(name: str, stem: str, exports: str, patterns: str, *, config: str = "", **fields: Any) -> Entry:
    """The entry of ``{stem}ForCausalLM``; ``exports`` and ``patterns`` are names, separated by blanks."""
    return _entry(name, f"{stem}ForCausalLM", config or f"{stem}Config", exports, patterns, **fields)


#: What every model with a causal mask from the shared mask functions has.
ROPE = "computed hop mask_causal mask_documents"
HEAD8: dict[str, Any] = {"head_dim": 8}
_WINDOW: dict[str, Any] = {"sliding_window": 4}
_MIXED: dict[str, Any] = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}

_ROTARY = (
    lm("llama", "Llama", ALL, f"{ROPE} user_positions mask_padding labels"),
    lm("qwen2", "Qwen2", "sdpa labels", f"{ROPE} labels"),
    lm(
        "qwen2_window",
        "Qwen2",
        ALL,
        f"{ROPE} mask_window user_positions mask_padding labels",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    lm("qwen3", "Qwen3", "sdpa mask", f"{ROPE} mask_padding", **HEAD8),
    lm("mistral", "Mistral", "sdpa eager positions", f"{ROPE} mask_window user_positions", **_WINDOW),
    lm("phi", "Phi", "sdpa", ROPE),
    lm("phi3", "Phi3", "sdpa eager", ROPE, sliding_window=None),
    lm(
        "phi3_longrope",
        "Phi3",
        f"{ALL} long",
        f"{ROPE} written user_positions mask_padding labels length",
        quick=True,
        original_max_position_embeddings=16,
        rope_parameters=_LONGROPE,
        sliding_window=None,
    ),
    lm("gemma", "Gemma", "sdpa positions", f"{ROPE} user_positions", **HEAD8),
    lm("gemma2", "Gemma2", "eager mask", f"{ROPE} mask_window mask_padding", attention="eager", **HEAD8, **_MIXED),
    lm(
        "gemma3",
        "Gemma3",
        ALL,
        f"{ROPE} mask_window user_positions mask_padding labels",
        config="Gemma3TextConfig",
        **HEAD8,
        **_MIXED,
    ),
    lm("olmo2", "Olmo2", "sdpa", ROPE),
    lm("gpt_neox", "GPTNeoX", "sdpa eager", ROPE),
    lm("stablelm", "StableLm", "sdpa", ROPE),
    lm("starcoder2", "Starcoder2", "sdpa mask", f"{ROPE} mask_window mask_padding", **_WINDOW),
    lm("cohere", "Cohere", "sdpa positions", f"{ROPE} user_positions"),
    lm("cohere2", "Cohere2", "sdpa positions", f"{ROPE} mask_window user_positions", **HEAD8, **_MIXED),
    lm("granite", "Granite", "sdpa", ROPE),
    lm("glm", "Glm", "sdpa positions", f"{ROPE} user_positions", **HEAD8),
    lm("glm4", "Glm4", "sdpa", ROPE, **HEAD8),
    lm("smollm3", "SmolLM3", "sdpa", ROPE, no_rope_layers=[1, 0]),
    lm("exaone4", "Exaone4", "sdpa eager", f"{ROPE} mask_window", **_MIXED),
    lm("nemotron", "Nemotron", "sdpa", ROPE),
    lm("persimmon", "Persimmon", "sdpa", ROPE),
    _entry(
        "qwen2_5_vl_text",
        "Qwen2_5_VLTextModel",
        "Qwen2_5_VLTextConfig",
        "sdpa mask",
        "computed hop mask_causal user_positions mask_padding mask_documents",
        quick=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        more=tuple(
            Export(name, partial(_inputs_mrope, sections=sections), dims=_MROPE, axes=_MROPE_AXES)
            for name, sections in (("positions", 3), ("positions_text", 4))
        ),
    ),
)

_TABLES = (
    _entry(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        f"{ALL} full",
        "learned mask_causal mask_documents user_positions mask_padding labels",
    ),
    lm("gpt_bigcode", "GPTBigCode", "sdpa eager positions", "learned mask_causal mask_documents user_positions"),
    lm(
        "gptj",
        "GPTJ",
        "eager positions mask labels full",
        "index equal_buffers mask_causal mask_documents user_positions mask_padding labels",
        attention="eager",
        rotary_dim=4,
    ),
    lm(
        "codegen",
        "CodeGen",
        "eager positions full",
        "index equal_buffers mask_causal mask_documents user_positions",
        attention="eager",
        rotary_dim=4,
    ),
    lm(
        "gpt_neo",
        "GPTNeo",
        "eager positions mask full",
        "learned mask_table slice full mask_causal mask_documents user_positions mask_padding",
        quick=True,
        attention="eager",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    lm(
        "opt",
        "OPT",
        f"{ALL} full",
        "learned cumsum_ones cumsum_data mask_causal user_positions mask_padding labels",
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    lm("biogpt", "BioGpt", "sdpa positions mask full", "learned mask_causal user_positions mask_padding"),
    lm(
        "xglm",
        "XGLM",
        "eager positions mask full",
        "index hop mask_causal user_positions mask_padding layout",
        attention="eager",
        attention_heads=4,
        num_layers=2,
        d_model=32,
        ffn_dim=64,
    ),
    _entry(
        "ctrl",
        "CTRLLMHeadModel",
        "CTRLConfig",
        "sdpa eager positions full",
        "index mask_causal mask_documents user_positions",
        dff=64,
    ),
    _entry(
        "openai_gpt",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        "eager positions mask labels full",
        "position_ids_buffer learned mask_table slice full equal_buffers user_positions mask_padding labels",
        attention="eager",
    ),
)

_ALIBI = (
    lm(
        "bloom",
        "Bloom",
        "eager mask labels",
        "alibi layout mask_causal mask_padding cumsum_data labels",
        quick=True,
        attention="eager",
    ),
    lm("falcon", "Falcon", ALL, "computed hop mask_causal user_positions mask_padding labels", alibi=False),
    lm(
        "falcon_alibi",
        "Falcon",
        "sdpa eager mask_one_batch labels",
        "alibi layout cumsum_ones cumsum_data mask_causal mask_padding labels",
        alibi=True,
    ),
    lm(
        "mpt",
        "Mpt",
        "eager mask labels full",
        "alibi offset mask_causal mask_padding labels",
        attention="eager",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=TABLE,
    ),
)

ENTRIES = (*_ROTARY, *_TABLES, *_ALIBI)
