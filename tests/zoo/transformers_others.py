"""Entries from transformers: encoders with a masked-language-model head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .catalog import Entry, Export, Inputs
from .tiny import DIM, HEADS, LAYERS, STD, TABLE, VOCAB, padding, tokens, widen

LIBRARY = "transformers"


# Inputs -------------------------------------------------------------------------------------------------


def named_ids(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Token ids by name."""
    return (), {"input_ids": tokens(batch, seq, generator)}


def named_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Token ids and a padding mask by name."""
    return (), {"input_ids": tokens(batch, seq, generator), "attention_mask": padding(batch, seq).long()}


def _positions(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    positions = torch.arange(seq).expand(batch, seq).contiguous()
    return (), {"input_ids": tokens(batch, seq, generator), "position_ids": positions}


def _labels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    labels = tokens(batch, seq, generator)
    labels[torch.rand(batch, seq, generator=generator) < 0.2] = -100
    return (), {"input_ids": tokens(batch, seq, generator), "labels": labels}


# Builders -----------------------------------------------------------------------------------------------


def tiny_model(config: str, model: str, sizes: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    """``transformers.<model>`` of a tiny ``transformers.<config>``; ``sizes`` come on top of the common ones.

    ``None`` in ``sizes`` takes a common one away.
    """
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": TABLE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": STD,
    }
    made = getattr(transformers, config)(**{k: v for k, v in {**common, **sizes}.items() if v is not None})
    made.use_cache = False
    built = getattr(transformers, model)._from_config(made, attn_implementation=attention)
    for module in built.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return widen(built)


# Entries ------------------------------------------------------------------------------------------------

SDPA = Export("sdpa", named_ids)
EAGER = Export("eager", named_ids, {"attention": "eager"})
SDPA_DYNAMIC = Export("sdpa", named_ids, shapes=("dynamic",))
EAGER_DYNAMIC = Export("eager", named_ids, {"attention": "eager"}, shapes=("dynamic",))


def encoder(
    name: str,
    family: str,
    exports: tuple[Export, ...],
    patterns: tuple[str, ...],
    split: str,
    quick: bool = False,
    model: str = "",
    **sizes: Any,
) -> Entry:
    """An encoder with a masked-language-model head."""
    build = partial(tiny_model, f"{family}Config", model or f"{family}ForMaskedLM", sizes)
    return Entry(f"hf_{name}", LIBRARY, build, exports, patterns, (split,) if split else (), quick)


_BERT_EXPORTS = (
    SDPA,
    EAGER_DYNAMIC,
    Export("mask", named_mask),
    Export("labels", _labels, shapes=("dynamic",)),
    Export("full", named_ids, seq=TABLE),
)
_DEBERTA_SIZES: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
}

_ENCODERS = (
    encoder(
        "bert",
        "Bert",
        _BERT_EXPORTS,
        ("slice", "full", "learned", "position_ids_buffer", "mask_padding", "distractor"),
        "bert.encoder.layer.1",
        quick=True,
    ),
    encoder(
        "roberta",
        "Roberta",
        (SDPA_DYNAMIC, Export("mask", named_mask, shapes=("static",))),
        ("learned", "cumsum_data", "mask_padding", "distractor"),
        "roberta.encoder.layer.1",
        quick=True,
    ),
    encoder(
        "distilbert",
        "DistilBert",
        (Export("full", named_ids, shapes=("static",), seq=TABLE),),
        ("full", "learned", "position_ids_buffer", "distractor"),
        "distilbert.transformer.layer.1",
        dim=DIM,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=2 * DIM,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    encoder(
        "electra",
        "Electra",
        (Export("mask", named_mask, shapes=("static",)),),
        ("slice", "learned", "position_ids_buffer", "distractor", "mask_padding"),
        "electra.encoder.layer.1",
        embedding_size=DIM,
    ),
    encoder(
        "albert",
        "Albert",
        (SDPA_DYNAMIC,),
        ("slice", "learned", "position_ids_buffer", "distractor"),
        "albert.encoder.albert_layer_groups.1",
        embedding_size=DIM // 2,
        num_hidden_groups=LAYERS,
    ),
    encoder(
        "megatron_bert",
        "MegatronBert",
        (EAGER_DYNAMIC,),
        ("slice", "learned", "position_ids_buffer", "distractor"),
        "bert.encoder.layer.1",
    ),
    encoder(
        "modernbert",
        "ModernBert",
        (SDPA, Export("positions", _positions, shapes=("dynamic",))),
        ("computed", "hop", "mask_window", "distractor", "user_positions"),
        "model.layers.1",
        local_attention=4,
        global_attn_every_n_layers=2,
        attention_dropout=0.0,
        cls_token_id=1,
        sep_token_id=2,
    ),
    encoder(
        "mpnet",
        "MPNet",
        (EAGER,),
        ("relative", "learned", "cumsum_data", "written", "distractor"),
        "mpnet.encoder.layer.1",
    ),
    encoder(
        "esm",
        "Esm",
        (SDPA_DYNAMIC, Export("mask", named_mask, shapes=("static",))),
        ("computed", "mask_padding", "hop", "distractor"),
        "esm.encoder.layer.1",
        position_embedding_type="rotary",
        mask_token_id=3,
    ),
    encoder(
        "deberta",
        "Deberta",
        (EAGER,),
        ("relative", "slice", "learned", "position_ids_buffer", "length", "distractor", "written"),
        "deberta.encoder.layer.1",
        **_DEBERTA_SIZES,
    ),
    encoder(
        "deberta_v2",
        "DebertaV2",
        (EAGER,),
        ("relative", "slice", "learned", "position_ids_buffer", "distractor"),
        "deberta.encoder.layer.1",
        position_buckets=8,
        **_DEBERTA_SIZES,
    ),
    encoder(
        "roformer",
        "RoFormer",
        (EAGER,),
        ("learned", "distractor", "hop"),
        "roformer.encoder.layer.1",
        embedding_size=DIM,
    ),
    encoder(
        "xlm",
        "XLM",
        (
            EAGER_DYNAMIC,
            Export("mask", named_mask, {"attention": "eager"}, ("static",)),
        ),
        ("slice", "learned", "position_ids_buffer", "mask_padding", "offset"),
        "transformer.attentions.1",
        model="XLMWithLMHeadModel",
        emb_dim=DIM,
        n_layers=LAYERS,
        n_heads=HEADS,
        dropout=0.0,
        attention_dropout=0.0,
        pad_index=0,
    ),
    encoder(
        "xlnet",
        "XLNet",
        (EAGER_DYNAMIC,),
        ("computed", "mixing"),
        "transformer.layer.1",
        model="XLNetLMHeadModel",
        max_position_embeddings=None,
        d_model=DIM,
        n_layer=LAYERS,
        n_head=HEADS,
        d_inner=2 * DIM,
        dropout=0.0,
    ),
    encoder(
        "nystromformer",
        "Nystromformer",
        (EAGER_DYNAMIC,),
        ("mixing", "slice", "learned", "position_ids_buffer", "distractor"),
        "nystromformer.encoder.layer.1",
        num_landmarks=4,
        segment_means_seq_len=4,
        conv_kernel_size=3,
    ),
    encoder(
        "convbert",
        "ConvBert",
        (EAGER_DYNAMIC,),
        ("mixing", "slice", "learned", "position_ids_buffer", "distractor"),
        "convbert.encoder.layer.1",
        embedding_size=DIM,
    ),
)


ENTRIES = _ENCODERS
