"""Comparisons: bitwise, and by the measure for gradients."""

from __future__ import annotations

import torch


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and values; NaN equals NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(((left == right) | ((left != left) & (right != right))).all())


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or only one side is NaN."""
    if left.shape != right.shape:
        return float("inf")
    if not left.numel():
        return 0.0
    wide = torch.complex128 if left.is_complex() or right.is_complex() else torch.float64
    a, b = left.detach().to(wide), right.detach().to(wide)
    gap = torch.where((a == b) | ((a != a) & (b != b)), torch.zeros((), dtype=torch.float64), (a - b).abs())
    worst = float(gap.max())
    return float("inf") if worst != worst else worst


def gradient_error(
    expected: dict[str, torch.Tensor | None], actual: dict[str, torch.Tensor | None], largest: float | None = None
) -> tuple[float, str]:
    """Worst ``max|diff| / max(max|g|, 1e-4 * largest gradient in the model)`` and the FQN that has it.

    ``largest`` is that of the whole model, where ``expected`` is a part of it.

    A gradient that only one side has is an infinite error: some true gradients are zero, none are missing.
    """
    if largest is None:
        largest = max((float(g.abs().max()) for g in expected.values() if g is not None and g.numel()), default=0.0)
    worst, where = 0.0, ""
    for name in expected.keys() | actual.keys():
        left, right = expected.get(name), actual.get(name)
        if left is None and right is None:
            continue
        if left is None or right is None:
            present = left if left is not None else right
            assert present is not None
            error = 0.0 if not bool(present.any()) else float("inf")
        else:
            gap = difference(left, right)
            scale = max(float(left.abs().max()) if left.numel() else 0.0, 1e-4 * largest)
            error = 0.0 if gap == 0.0 else gap / scale if scale else float("inf")
        if error > worst:
            worst, where = error, name
    return worst, where


def gradients(
    outputs: list[torch.Tensor], weights: list[torch.Tensor], parameters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """Gradients of ``sum(output * weight)`` by parameter FQN."""
    terms = []
    for output, weight in zip(outputs, weights, strict=True):
        if output.requires_grad:
            product = output * weight
            terms.append((product.real if product.is_complex() else product).sum())
    if not terms:
        return dict.fromkeys(parameters)
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    total = torch.stack([term.double() for term in terms]).sum()
    found = torch.autograd.grad(total, [parameters[name] for name in names], allow_unused=True)
    return {**dict.fromkeys(parameters), **dict(zip(names, found, strict=True))}


def loss_weights(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Fixed random weights, one tensor an output: a loss in which every output element counts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(
            output.real.dtype if output.is_floating_point() or output.is_complex() else torch.float32
        )
        for output in outputs
    ]
