"""The demo's model: transformers' Llama, unedited, with small random weights."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from buffer_lifting.demo.data import VOCAB

#: Plain SGD: its steps are as exact as the gradients. Adam divides a gradient that is zero but for rounding
#: by its own size, and the two runs would drift apart by that.
LEARNING_RATE = 0.1


def build_model(layers: int, seed: int) -> nn.Module:
    """The model; the same arguments give the same weights.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        attention_dropout=0.0,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def export_model(model: nn.Module, tokens: Tensor) -> ExportedProgram:
    """The exported program, with dynamic batch and sequence."""
    shapes: dict[str, Any] = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (), {"input_ids": tokens}, dynamic_shapes=shapes)


def loss_fn(logits: Any, labels: Tensor) -> Tensor:
    """Mean cross entropy. A last stage returns its output alone or in a tuple."""
    values = logits if isinstance(logits, Tensor) else logits[0]
    return F.cross_entropy(values.flatten(0, 1).float(), labels.flatten())


def make_stages(program: ExportedProgram) -> Any:
    """The program lifted, its masks made to follow the slots, and split in two."""
    import buffer_lifting as bl

    return bl.partition(bl.context_parallel(bl.lift(program), size=1), num_stages=2)
