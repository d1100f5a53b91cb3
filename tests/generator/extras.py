"""What surrounds the reads: regions with another mode, a loss at the end, inputs that have no sequence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .spec import CLASSES, IGNORED

Result = TypeVar("Result")
_CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_off": lambda: torch.autocast("cpu", enabled=False),
}


def within(region: str, function: Callable[..., Result], *operands: Any) -> Result:
    """``function(*operands)`` in a region of ``REGIONS``, or plainly if it is ``""``; most become a ``wrap_*`` op."""
    if not region:
        return function(*operands)
    if region == "checkpoint":
        result: Result = checkpoint(function, *operands, use_reentrant=False)
        return result
    with _CONTEXTS[region]():
        return function(*operands)


def loss_of(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``[B, S, classes]`` with ``[B, S]``, of which -100 does not count; shifted as the Hub does."""
    if kind.startswith("shifted"):
        labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    reduction = "mean" if kind.endswith("mean") else "sum"
    return F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), ignore_index=IGNORED, reduction=reduction)


def join_features(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Data ``[B, S, W]`` that has met ``[B, W]`` of each sample and ``[W]`` of all."""
    if "sample_features" in inputs:
        x = x + inputs["sample_features"][:, None]
    if "global_features" in inputs:
        x = x * inputs["global_features"]
    return x


def extra_inputs(batch: int, seq: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Labels ``[B, S]``, one of each sample ignored, and features without a sequence."""
    labels = torch.randint(0, CLASSES, (batch, seq), generator=generator)
    ignored = torch.randint(0, seq, (batch, 1), generator=generator)
    return {
        "labels": labels.scatter(1, ignored, IGNORED),
        "sample_features": torch.randn(batch, width, generator=generator),
        "global_features": torch.randn(width, generator=generator),
    }
