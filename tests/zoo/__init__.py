"""A small typed model zoo for the tests.

``CASES`` maps a name to a ``Case``: how to build the model, how to make its inputs, and what a test needs to
know about it (table length, where it may be split, which inputs carry the sequence).  ``export_case`` builds
one and exports it with ``torch.export``; ``make_inputs`` draws inputs for it::

    module, ep = export_case("llama_pr1797")                # dynamic batch and sequence
    args, kwargs = make_inputs("llama_pr1797", 2, 17, seed=1)
    ep.module()(*args, **kwargs)

Same name, same arguments: same weights and same inputs.  The global random state is left alone.

Two things to know when writing tests: the dynamic exports of ``nanogpt`` and ``nanogpt_tied`` refuse a
sequence of exactly ``table_len`` (torch.export guards on the contiguity of the cropped mask), and rotary
models only see differences of positions, so reading a rotary table shifted by a constant hardly changes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from . import libraries
from .reference import (
    EncoderConfig,
    GPTConfig,
    LossLlama,
    MaskedLlama,
    NanoGPT,
    Read,
    RopeConfig,
    RopeLlama,
    SinusoidEncoder,
    Table,
)

__all__ = ["CASES", "Case", "export_case", "make_inputs"]

VOCAB = 61
TABLE = 64
FULL_TABLE = 16

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Builder(Protocol):
    """Builds a model with the given number of layers."""

    def __call__(self, layers: int = 2) -> nn.Module: ...


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    ``split_points`` are the FQNs of the submodules that start stage 2 and later; ``seq_inputs`` the names of
    the inputs with a sequence dim (always dim 1, after the batch).  ``table_len`` is the longest sequence the
    model is meant for; the transformers Llamas keep no table, and run beyond it.  A case with
    ``dynamic=False`` only runs at a sequence of ``table_len``, and is always exported and fed at that length.
    """

    name: str
    build: Builder
    args: Callable[[int, int, torch.Generator], Inputs]
    table_len: int
    split_points: tuple[str, ...]
    seq_inputs: tuple[str, ...]
    dynamic: bool = True


# Inputs -------------------------------------------------------------------------------------------------


def _tokens(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=generator)


def _padding(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    """True for real tokens.  Padded on the right, so no query is left with nothing to attend to."""
    lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
    lengths[0] = seq - seq // 3
    return torch.arange(seq)[None, :] < lengths


def _labels(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    """Labels with some ignored positions."""
    labels = _tokens(batch, seq, generator)
    labels[torch.rand(batch, seq, generator=generator) < 0.2] = -100
    labels[0, -1] = 1
    return labels


def _args_tokens(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (_tokens(batch, seq, generator),), {}


def _args_tokens_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (_tokens(batch, seq, generator), _padding(batch, seq, generator)), {}


def _args_tokens_labels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (_tokens(batch, seq, generator), _labels(batch, seq, generator)), {}


def _args_hf(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (), {"input_ids": _tokens(batch, seq, generator)}


def _args_hf_mask(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    ids = _tokens(batch, seq, generator)
    return (), {"input_ids": ids, "attention_mask": _padding(batch, seq, generator).long()}


def _args_hf_labels(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (), {"input_ids": _tokens(batch, seq, generator), "labels": _labels(batch, seq, generator)}


# Builders -----------------------------------------------------------------------------------------------


def _rope(
    layers: int = 2,
    *,
    cls: type[RopeLlama] = RopeLlama,
    table: Table = "buffer",
    read: Read = "slice",
    max_seq_len: int = TABLE,
) -> nn.Module:
    return cls(RopeConfig(vocab_size=VOCAB, n_layers=layers, max_seq_len=max_seq_len, table=table, read=read))


def _nanogpt(layers: int = 2, *, tie: bool = False) -> nn.Module:
    return NanoGPT(GPTConfig(vocab_size=VOCAB, block_size=TABLE, n_layer=layers, tie_weights=tie))


def _sinusoid(layers: int = 2) -> nn.Module:
    return SinusoidEncoder(EncoderConfig(vocab_size=VOCAB, nlayers=layers, max_len=TABLE))


# Registry -----------------------------------------------------------------------------------------------

_LAYERS = ("layers.1",)
_HF_LLAMA = ("model.layers.1",)
_GPT = ("transformer.h.1",)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("llama_pr1797", _rope, _args_tokens, TABLE, _LAYERS, ("tokens",)),
        Case("llama_attribute", partial(_rope, table="attribute"), _args_tokens, TABLE, _LAYERS, ("tokens",)),
        Case(
            "llama_full_table",
            partial(_rope, max_seq_len=FULL_TABLE, read="whole"),
            _args_tokens,
            FULL_TABLE,
            _LAYERS,
            ("tokens",),
            dynamic=False,
        ),
        Case(
            "llama_masked",
            partial(_rope, cls=MaskedLlama),
            _args_tokens_mask,
            TABLE,
            _LAYERS,
            ("tokens", "attention_mask"),
        ),
        Case(
            "llama_loss",
            partial(_rope, cls=LossLlama),
            _args_tokens_labels,
            TABLE,
            _LAYERS,
            ("tokens", "labels"),
        ),
        Case("nanogpt", _nanogpt, _args_tokens, TABLE, _GPT, ("idx",)),
        Case("nanogpt_tied", partial(_nanogpt, tie=True), _args_tokens, TABLE, _GPT, ("idx",)),
        Case("sinusoid", _sinusoid, _args_tokens, TABLE, _LAYERS, ("tokens",)),
        Case("hf_llama", libraries.hf_llama, _args_hf, TABLE, _HF_LLAMA, ("input_ids",)),
        Case(
            "hf_llama_eager",
            partial(libraries.hf_llama, attention="eager"),
            _args_hf,
            TABLE,
            _HF_LLAMA,
            ("input_ids",),
        ),
        Case(
            "hf_llama_mask",
            libraries.hf_llama,
            _args_hf_mask,
            TABLE,
            _HF_LLAMA,
            ("input_ids", "attention_mask"),
        ),
        Case(
            "hf_llama_labels",
            libraries.hf_llama,
            _args_hf_labels,
            TABLE,
            _HF_LLAMA,
            ("input_ids", "labels"),
        ),
        Case("hf_gpt2", libraries.hf_gpt2, _args_hf, TABLE, _GPT, ("input_ids",)),
        Case("tune_llama3", libraries.tune_llama3, _args_tokens, TABLE, _LAYERS, ("tokens",)),
    )
}


# Entry points -------------------------------------------------------------------------------------------


def make_inputs(name: str, batch: int, seq: int, seed: int = 0) -> Inputs:
    """``(args, kwargs)`` for the case.  ``seq`` is replaced by ``table_len`` for a static-only case."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    return case.args(batch, seq if case.dynamic else case.table_len, generator)


def _dynamic_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    return {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in (*names, *kwargs)}


def export_case(
    name: str, *, dynamic: bool = True, batch: int = 3, seq: int = 11, layers: int = 2, seed: int = 0
) -> tuple[nn.Module, ExportedProgram]:
    """Build the case with seeded weights, in ``train()`` mode, and export it (non-strict).

    With ``dynamic`` the batch and sequence dims of every input are ``Dim.AUTO``.  A static-only case is
    exported statically, at ``table_len``, whatever ``dynamic`` and ``seq`` say.
    """
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = case.build(layers=layers).train()
    args, kwargs = make_inputs(name, batch, seq, seed)
    shapes = _dynamic_shapes(module, args, kwargs) if dynamic and case.dynamic else None
    ep = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    return module, ep
