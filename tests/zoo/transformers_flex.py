"""Decoders of transformers with ``attn_implementation="flex_attention"``: mask_mods that read positions.

``flex_attention`` on CPU takes no parameters that require gradients, so the models are frozen while they are exported;
with dynamic shapes transformers' block masks cannot be exported (``docs/FLEX_ATTENTION.md``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .catalog import Entry, Export
from .transformers_decoders import HEAD8, inputs_plain, inputs_positions, lm

_FLEX: dict[str, Any] = {"attention": "flex_attention"}
_EXPORTS = (
    Export("flex", inputs_plain, _FLEX, ("static",), frozen=True),
    Export("positions", inputs_positions, _FLEX, ("static",), frozen=True),
)
_PATTERNS = "flex computed hop user_positions mask_causal mask_documents distractor"


def _flex(name: str, stem: str, patterns: str = _PATTERNS, **fields: Any) -> Entry:
    return replace(lm(f"{name}_flex", stem, "", patterns, **fields), exports=_EXPORTS)


ENTRIES = (
    _flex("llama", "Llama", quick=True),
    _flex("mistral", "Mistral", f"{_PATTERNS} mask_window", sliding_window=4),
    _flex(
        "gemma2",
        "Gemma2",
        f"{_PATTERNS} mask_window",
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **HEAD8,
    ),
    _flex("qwen3", "Qwen3", **HEAD8),
)
