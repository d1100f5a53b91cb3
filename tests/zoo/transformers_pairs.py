"""Entries from transformers: encoder-decoders with two sequence axes, text towers and refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .catalog import Entry, Export, Inputs
from .tiny import DIM, HEADS, LAYERS, STD, TABLE, padding, tokens
from .transformers_others import EAGER, EAGER_DYNAMIC, LIBRARY, SDPA, encoder, named_ids, named_mask, tiny_model

ENC_DEC_AXES = {"input_ids": {0: "batch", 1: "enc"}, "decoder_input_ids": {0: "batch", 1: "dec"}}


# Inputs -------------------------------------------------------------------------------------------------


def _pairs(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Encoder and decoder ids; the decoder's sequence is shorter."""
    ids = tokens(batch, seq, generator)
    return (), {"input_ids": ids, "decoder_input_ids": tokens(batch, seq - 4, generator)}


def _pairs_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    args, kwargs = _pairs(batch, seq, generator)
    return args, {**kwargs, "attention_mask": padding(batch, seq).long()}


def _pairs_labels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """Encoder ids and labels; the model makes the decoder's ids by a shift of the labels."""
    return (), {"input_ids": tokens(batch, seq, generator), "labels": tokens(batch, seq - 4, generator)}


def _pixels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}


# Builders -----------------------------------------------------------------------------------------------


class _HiddenOnly(nn.Module):
    """A CLIP text tower without its pooled output, which reads one token of each sequence."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states ``[B, S, D]`` of ids ``[B, S]``."""
        hidden: Tensor = self.tower(input_ids=input_ids).last_hidden_state
        return hidden


def _clip_text(pooled: bool = True, attention: str = "sdpa") -> nn.Module:
    sizes = {"projection_dim": DIM, "attention_dropout": 0.0}
    tower = tiny_model("CLIPTextConfig", "CLIPTextModel", sizes, attention)
    return tower if pooled else _HiddenOnly(tower)


def _vit(attention: str = "sdpa") -> nn.Module:
    sizes = {"vocab_size": None, "image_size": 16, "patch_size": 4, "num_labels": 5}
    return tiny_model("ViTConfig", "ViTForImageClassification", sizes, attention)


# Entries ------------------------------------------------------------------------------------------------


def pair_exports(attention: str = "sdpa", shapes: Any = ("dynamic", "static")) -> Export:
    return Export(attention, _pairs, {"attention": attention}, shapes, axes=ENC_DEC_AXES)


_T5_SIZES: dict[str, Any] = {
    "max_position_embeddings": None,
    "d_model": DIM,
    "d_kv": DIM // HEADS,
    "d_ff": 2 * DIM,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
BART_SIZES: dict[str, Any] = {
    "d_model": DIM,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * DIM,
    "decoder_ffn_dim": 2 * DIM,
    "init_std": STD,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 2,
}
_MASK_AXES = {**ENC_DEC_AXES, "attention_mask": {0: "batch", 1: "enc"}}
_LABEL_AXES = {"input_ids": {0: "batch", 1: "enc"}, "labels": {0: "batch", 1: "dec"}}

_ENCODER_DECODERS = (
    encoder(
        "t5",
        "T5",
        (
            pair_exports(),
            pair_exports("eager", ("dynamic",)),
            Export("mask", _pairs_mask, shapes=("dynamic",), axes=_MASK_AXES),
            Export("labels", _pairs_labels, shapes=("dynamic",), axes=_LABEL_AXES),
        ),
        ("relative", "two_axes", "mask_causal", "mask_padding", "labels", "written", "distractor"),
        "decoder.block.0",
        model="T5ForConditionalGeneration",
        **_T5_SIZES,
    ),
    encoder(
        "umt5",
        "UMT5",
        (pair_exports(shapes=("dynamic",)),),
        ("relative", "two_axes", "mask_causal", "written", "distractor"),
        "decoder.block.0",
        model="UMT5ForConditionalGeneration",
        **_T5_SIZES,
    ),
    encoder(
        "bart",
        "Bart",
        (
            pair_exports(),
            Export("mask", _pairs_mask, shapes=("dynamic",), axes=_MASK_AXES),
        ),
        ("learned", "two_axes", "mask_causal", "mask_padding", "distractor"),
        "model.decoder.layers.0",
        model="BartForConditionalGeneration",
        **BART_SIZES,
    ),
    encoder(
        "marian",
        "Marian",
        (pair_exports(shapes=("static",)),),
        ("learned", "two_axes", "mask_causal", "hop", "distractor"),
        "model.decoder.layers.0",
        model="MarianMTModel",
        **BART_SIZES,
    ),
)

_TOWERS = (
    encoder(
        "t5_encoder",
        "T5",
        (SDPA, EAGER_DYNAMIC, Export("mask", named_mask, shapes=("dynamic",))),
        ("relative", "mask_padding", "written", "distractor"),
        "encoder.block.1",
        quick=True,
        model="T5EncoderModel",
        **_T5_SIZES,
    ),
    encoder(
        "prophetnet_encoder",
        "ProphetNet",
        (EAGER,),
        ("learned", "cumsum_ones"),
        "layers.1",
        model="ProphetNetEncoder",
        num_hidden_layers=None,
        num_encoder_layers=LAYERS,
        encoder_ffn_dim=2 * DIM,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=STD,
    ),
    Entry(
        "hf_clip_text",
        LIBRARY,
        _clip_text,
        (
            Export("sdpa", named_ids, {"pooled": False}, ("dynamic",)),
            Export("pooled", named_ids, shapes=("dynamic",)),
        ),
        ("slice", "learned", "position_ids_buffer", "mask_causal", "mixing"),
        ("tower.encoder.layers.1",),
    ),
    encoder(
        "whisper_decoder",
        "Whisper",
        (SDPA,),
        ("learned", "mask_causal", "mask_documents"),
        "model.decoder.layers.1",
        model="WhisperForCausalLM",
        max_position_embeddings=None,
        max_target_positions=TABLE,
        max_source_positions=TABLE,
        num_mel_bins=8,
        begin_suppress_tokens=[],
        **{k: v for k, v in BART_SIZES.items() if k != "decoder_start_token_id"},
        decoder_start_token_id=1,
    ),
    Entry("hf_vit", LIBRARY, _vit, (Export("sdpa", _pixels, shapes=("dynamic",)),), ()),
)

ENTRIES = (*_ENCODER_DECODERS, *_TOWERS)
