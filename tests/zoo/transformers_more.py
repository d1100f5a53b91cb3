"""Further architectures of transformers, chosen after the library was written: nothing was made for them."""

from __future__ import annotations

from typing import Any

from .catalog import Entry
from .transformers_decoders import HEAD8, ROPE, lm
from .transformers_others import EAGER, SDPA, encoder
from .transformers_pairs import BART_SIZES, pair_exports

_MIXED: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

_DECODERS = (
    lm("olmo3", "Olmo3", "sdpa positions", f"{ROPE} mask_window user_positions equal_buffers", **_MIXED),
    lm("nanochat", "NanoChat", "sdpa mask labels", f"{ROPE} mask_padding labels"),
    lm("diffllama", "DiffLlama", "sdpa eager", ROPE),
    lm("helium", "Helium", "sdpa mask", f"{ROPE} mask_padding", **HEAD8),
    lm(
        "modernbert_decoder",
        "ModernBertDecoder",
        "sdpa positions",
        f"{ROPE} mask_window user_positions",
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    lm("lfm2", "Lfm2", "sdpa", f"{ROPE} mixing", layer_types=["conv", "full_attention"]),
)

_ENCODERS = (
    encoder(
        "xlm_roberta",
        "XLMRoberta",
        (SDPA, EAGER),
        ("learned", "cumsum_data", "distractor"),
        "roberta.encoder.layer.1",
    ),
    encoder(
        "squeezebert",
        "SqueezeBert",
        (EAGER,),
        ("learned", "position_ids_buffer", "slice", "distractor"),
        "transformer.encoder.layers.1.attention",
        embedding_size=32,
    ),
    encoder(
        "rembert",
        "RemBert",
        (EAGER,),
        ("learned", "position_ids_buffer", "slice", "distractor"),
        "rembert.encoder.layer.1",
    ),
    encoder(
        "fnet",
        "FNet",
        (EAGER,),
        ("mixing", "slice", "learned", "position_ids_buffer", "distractor"),
        "fnet.encoder.layer.1",
    ),
)

_PAIRS: tuple[Entry, ...] = (
    encoder(
        "mbart",
        "MBart",
        (pair_exports(),),
        ("learned", "two_axes", "mask_causal", "distractor"),
        "model.decoder.layers.0",
        model="MBartForConditionalGeneration",
        **BART_SIZES,
    ),
    encoder(
        "pegasus",
        "Pegasus",
        (pair_exports(),),
        ("learned", "two_axes", "mask_causal", "hop", "distractor"),
        "model.decoder.layers.0",
        model="PegasusForConditionalGeneration",
        **BART_SIZES,
    ),
)

ENTRIES = (*_DECODERS, *_ENCODERS, *_PAIRS)
