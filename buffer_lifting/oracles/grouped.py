"""The grouped product in double precision, which torch's kernel does not take."""

from __future__ import annotations

import torch


def grouped_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``aten._grouped_mm`` of rows ``[rows, in]`` and weights ``[groups, in, out]``; rows behind the last are 0.

    Raises:
        RuntimeError: operands of other ranks.
    """
    if rows.ndim != 2 or weight.ndim != 3 or offs is None:
        raise RuntimeError("a grouped product is checked for rows of one matrix and one weight a group only")
    parts, start = [], 0
    for group, end in enumerate(int(offset) for offset in offs):
        parts.append(rows[start:end] @ weight[group])
        start = end
    parts.append(rows.new_zeros(rows.shape[0] - start, weight.shape[2]))
    result = torch.cat(parts)
    return result if bias is None else result + bias
