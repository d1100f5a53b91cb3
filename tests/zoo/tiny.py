"""Sizes, inputs and weights that the catalog's tiny models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalog import Inputs

VOCAB = 61
DIM = 32
HEADS = 4
LAYERS = 2
TABLE = 53
STD = 0.2


def tokens(batch: int, seq: int, generator: torch.Generator) -> Tensor:
    """int64 ``[batch, seq]``; ids 0 to 2 (padding, begin, end) do not occur."""
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)


def padding(batch: int, seq: int) -> Tensor:
    """bool ``[batch, seq]``, true for real tokens: another length for each sample, the first one whole."""
    return torch.arange(seq)[None, :] < (seq - 2 * torch.arange(batch).clamp(max=seq // 2 - 1))[:, None]


def packed(batch: int, seq: int) -> Tensor:
    """int64 ``[batch, seq]`` position ids of two packed documents, cut at another place in each sample."""
    slots, cut = torch.arange(seq)[None, :], (seq // 2 - torch.arange(batch).clamp(max=seq // 2 - 1))[:, None]
    return torch.where(slots < cut, slots, slots - cut)


def ids(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    """One positional input: token ids."""
    return (tokens(batch, seq, generator),), {}


def widen(module: nn.Module, std: float = STD) -> nn.Module:
    """Draws trainable matrices anew, and vectors that are almost zero, so that no branch is switched off."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.requires_grad or not parameter.is_floating_point():
                continue
            scale = float(parameter.abs().max())
            if parameter.ndim > 1 or scale < 0.05:
                parameter.normal_(0.0, std)
    return module
