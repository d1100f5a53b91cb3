"""Tiny random models of real libraries for the test zoo, built from their own classes with nothing edited.

The libraries are imported inside the builders, so the zoo itself imports without them.  Every dropout is
zero and caches are off.  Weights are drawn wider than the libraries' default, so that a mistake in the
positions shows clearly in the logits.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

Attention = Literal["sdpa", "eager"]

VOCAB = 61
DIM = 32
HEADS = 4
KV_HEADS = 2
TABLE = 64
INIT_STD = 0.2


def hf_llama(layers: int = 2, attention: Attention = "sdpa") -> nn.Module:
    """transformers ``LlamaForCausalLM``: cos/sin computed once from ``inv_freq`` and shared by the layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=TABLE,
        initializer_range=INIT_STD,
        attention_dropout=0.0,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def hf_gpt2(layers: int = 2, attention: Attention = "sdpa") -> nn.Module:
    """transformers ``GPT2LMHeadModel``: learned positions, ``lm_head`` tied to ``wte`` (its default)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=TABLE,
        n_embd=DIM,
        n_layer=layers,
        n_head=HEADS,
        initializer_range=INIT_STD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config)


def tune_llama3(layers: int = 2) -> nn.Module:
    """torchtune ``llama3``: one rotary module, with one real-valued ``cache``, shared by the layers."""
    from torchtune.models.llama3 import llama3

    return llama3(
        vocab_size=VOCAB,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        embed_dim=DIM,
        max_seq_len=TABLE,
        attn_dropout=0.0,
        intermediate_dim=2 * DIM,
    )
