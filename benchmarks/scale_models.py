"""Models at the size at which they are compiled ahead of time; make them on the meta device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

LENGTHS = {"batch": 2, "seq": 32}


def llama_405b(layers: int = 126, **sizes: Any) -> nn.Module:
    """Hugging Face's Llama with the widths of the model of 405 billion parameters (or others, by ``sizes``)."""
    import transformers

    widths: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, use_cache=False, rope_parameters=rope, **{**widths, **sizes}
    )
    return cast(nn.Module, transformers.LlamaForCausalLM(config))


def deepseek_v3(layers: int = 61, dense: int = 3, experts: int = 256) -> nn.Module:
    """Hugging Face's DeepSeek-V3: latent attention, and routed experts behind the first ``dense`` layers."""
    import transformers

    config = transformers.DeepseekV3Config(
        num_hidden_layers=layers, first_k_dense_replace=dense, n_routed_experts=experts, use_cache=False
    )
    return cast(nn.Module, transformers.DeepseekV3ForCausalLM(config))


def export(model: nn.Module) -> ExportedProgram:
    """``torch.export.export`` with dynamic batch and sequence; the example input is on the meta device."""
    tokens = torch.zeros(LENGTHS["batch"], LENGTHS["seq"], dtype=torch.long, device="meta")
    return torch.export.export(model, (tokens,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))


class Layer(nn.Module):
    """A small decoder layer with a read by position: some 15 nodes, so that 1,000 layers can be exported."""

    WIDTH = 8

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = (nn.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        query = (self.query(x) + table[: x.shape[1]]).unsqueeze(1)
        keys = x.unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(query, keys, keys, is_causal=True)
        return x + self.out(mixed.squeeze(1))


class Deep(nn.Module):
    """Many such layers over ``[batch, seq]`` tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, Layer.WIDTH)
        self.register_buffer("table", torch.zeros(256, Layer.WIDTH), persistent=False)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.table)
        return x
