"""Tiny torchtitan models: the configs that its own registries make, with small sizes and causal SDPA.

The registries only offer attention that needs block masks (flex, varlen); torchtitan's own
``ScaledDotProductAttention`` takes their place, so that the models run and export on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import nn

from .tiny import DIM, HEADS, LAYERS, TABLE, VOCAB

HEAD_DIM = DIM // HEADS
_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


class _Kernels(ModuleType):
    """Stands for the GPU kernels of an expert-parallel backend, which need triton at import and are not run here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _without_triton() -> None:
    """Lets torchtitan's models be imported where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_KERNELS, _Kernels(_KERNELS))


def build(family: str) -> nn.Module:
    """The model of a family: ``"llama3"``, ``"qwen3"``, ``"qwen3_moe"`` or ``"deepseek_v3"``."""
    model: Any = config_of(family).build()
    model.init_states()
    built: nn.Module = model
    return built


def config_of(family: str) -> Any:
    """The same as a config."""
    _without_triton()
    made = {"llama3": _llama3, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3}[family]()
    from torchtitan.models.common.attention import ScaledDotProductAttention

    for layer in made.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return made


def _ends(family: Any, norm: Any) -> dict[str, Any]:
    """Embedding, norm and output of a decoder config, with the family's own initialisers."""
    from torchtitan.models.common import Embedding, Linear

    normal = {"weight": nn.init.normal_}
    return {
        "dim": DIM,
        "vocab_size": VOCAB,
        "tok_embeddings": Embedding.Config(num_embeddings=VOCAB, embedding_dim=DIM, param_init=normal),
        "norm": norm,
        "lm_head": Linear.Config(in_features=DIM, out_features=VOCAB, param_init=family._LINEAR_INIT),
    }


def _llama3() -> Any:
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, RMSNorm

    layers = llama3._build_llama3_layers(
        n_layers=LAYERS,
        dim=DIM,
        n_heads=HEADS,
        n_kv_heads=HEADS // 2,
        hidden_dim=2 * DIM,
        rope=ComplexRoPE.Config(dim=HEAD_DIM, max_seq_len=TABLE, scaling="llama"),
        attn_backend="flex",
    )
    norm = RMSNorm.Config(normalized_shape=DIM, param_init=llama3._NORM_INIT)
    return llama3.Llama3Model.Config(**_ends(llama3, norm), layers=layers)


def _qwen3() -> Any:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    layers = qwen3._build_qwen3_layers(
        n_layers=LAYERS,
        dim=DIM,
        n_heads=HEADS,
        n_kv_heads=HEADS // 2,
        head_dim=HEAD_DIM,
        hidden_dim=2 * DIM,
        attn_backend="flex",
        rope=CosSinRoPE.Config(dim=HEAD_DIM, max_seq_len=TABLE),
    )
    return qwen3.Qwen3Model.Config(**_ends(qwen3, qwen3._qwen3_norm(DIM)), layers=layers)


def _qwen3_moe() -> Any:
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    layers = qwen3._build_qwen3_moe_layers(
        n_layers=LAYERS,
        dim=DIM,
        n_heads=HEADS,
        n_kv_heads=HEADS // 2,
        head_dim=HEAD_DIM,
        moe_hidden_dim=DIM,
        num_experts=4,
        top_k=2,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=HEAD_DIM, max_seq_len=TABLE),
    )
    return qwen3.Qwen3Model.Config(**_ends(qwen3, qwen3._qwen3_norm(DIM)), layers=layers)


def _deepseek_v3() -> Any:
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, RMSNorm

    layers = deepseek_v3._build_dsv3_layers(
        n_layers=LAYERS,
        n_dense_layers=1,
        dim=DIM,
        n_heads=HEADS,
        q_lora_rank=0,
        kv_lora_rank=16,
        qk_nope_head_dim=HEAD_DIM,
        qk_rope_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        mscale=0.7,
        dense_hidden_dim=2 * DIM,
        moe_hidden_dim=DIM,
        num_experts=4,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="softmax",
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(
            dim=HEAD_DIM, max_seq_len=TABLE, scaling="yarn", rope_factor=4.0, original_seq_len=TABLE // 2
        ),
    )
    norm = RMSNorm.Config(normalized_shape=DIM, param_init=deepseek_v3._NORM_INIT)
    return deepseek_v3.DeepSeekV3Model.Config(**_ends(deepseek_v3, norm), layers=layers, mtp_layers=[])
