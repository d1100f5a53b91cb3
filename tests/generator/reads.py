"""Rows by position: tables in every layout, indices from every source, and every way to take the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import CONSTANT_OFFSET, HEAD_CONSUMERS, HEADS, TABLE_LENGTH, Row, Spec

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Value:
    """Rows on their way to the data: features last, the sequence at ``seq``, maybe a batch dim (then dim 0)."""

    tensor: Tensor
    seq: int
    batched: bool = False

    def but(self, tensor: Tensor) -> Value:
        """The same dims, other contents."""
        return replace(self, tensor=tensor)

    def rows(self) -> Tensor:
        """``[S, F]``, or ``[B, S, F]`` if it has a batch dim."""
        value, seq = self.tensor, self.seq
        if self.batched:
            return value
        for dim in reversed(range(value.ndim - 1)):
            if dim != seq:
                value = value.select(dim, 0) if dim > seq else value.squeeze(dim)
        return value


def row_width(row: Row, spec: Spec) -> int:
    """Features of a row's table: of the model or of one head; half as many for complex numbers."""
    width = spec.width // HEADS if row.consumer in HEAD_CONSUMERS else spec.width
    return width // 2 if row.dtype == "complex64" else width


def table_length(row: Row, spec: Spec) -> int:
    """Rows of a table; one that is read whole has as many as there are tokens."""
    return spec.seq if row.read == "full" else TABLE_LENGTH


def make_table(row: Row, spec: Spec, seed: int) -> Tensor:
    """Random contents, so that no two rows are alike."""
    generator = torch.Generator().manual_seed(seed)
    shape = (table_length(row, spec), row_width(row, spec))
    if row.dtype == "int64":
        rows = torch.randint(-9, 9, shape, generator=generator)
    elif row.dtype == "complex64":
        rows = torch.polar(torch.ones(shape), 3 * torch.randn(shape, generator=generator))
    else:
        rows = torch.randn(shape, generator=generator).to(getattr(torch, row.dtype))
    if row.read == "select_slice":
        return torch.stack([rows, rows.flip(0)])
    layouts = {
        "rows": rows,
        "lead": rows[None],
        "seq_first": rows[:, None],
        "heads_first": rows[None, None],
        "seq_heads": rows[None, :, None],
    }
    return layouts[row.layout].contiguous()


SEQ_DIM = {"rows": 0, "lead": 1, "seq_first": 0, "heads_first": 2, "seq_heads": 1}


def attach(module: nn.Module, name: str, kind: str, table: Tensor) -> None:
    """A table as a buffer, plain attribute or parameter of a module."""
    if kind == "parameter":
        module.register_parameter(name, nn.Parameter(table))
    elif kind in ("buffer", "persistent"):
        module.register_buffer(name, table, persistent=kind == "persistent")
    else:
        setattr(module, name, table)


def index_of(source: str, module: Any, inputs: Inputs) -> Tensor:
    """An int64 index: ``[S]``, ``[1, S]`` or ``[B, S]``; ``module`` has the ``position_ids`` buffer."""
    ids = inputs["ids"]
    length = ids.shape[1]
    if source == "arange":
        return torch.arange(length)
    if source == "arange_row":
        return torch.arange(length, device=ids.device).unsqueeze(0)
    if source == "cumsum_ones":
        return torch.ones_like(ids).cumsum(1) - 1
    if source == "ids_buffer":
        stored: Tensor = module.position_ids
        return stored[:, :length]
    if source == "user":
        return inputs["position_ids"]
    real = (ids != 0).long()
    return torch.cumsum(real, dim=1) * real


def read_rows(row: Row, table: Tensor | None, module: Any, inputs: Inputs, width: int) -> Value:
    """The rows of one read, before its chain."""
    length = inputs["ids"].shape[1]
    if table is None:
        return _computed(row, index_of(row.index, module, inputs), length, width)
    if row.read == "select_slice":
        table, dim = table[0], 0
    else:
        dim = SEQ_DIM[row.layout]
    total = table.shape[dim]
    start = {"none": 0, "constant": CONSTANT_OFFSET, "length": length, "right": total - length}[row.offset]
    if row.read == "full":
        return Value(table, dim)
    if row.read in ("slice", "select_slice"):
        if row.offset == "right":
            part = slice(-length, None)
        else:
            part = slice(None if row.offset == "none" else start, start + length)
        return Value(table[(slice(None),) * dim + (part,)], dim)
    if row.read == "narrow":
        return Value(table.narrow(dim, start, length), dim)
    index = index_of(row.index, module, inputs)
    if row.offset != "none":
        index = index + (start - 1 if row.offset == "right" and row.index == "padded" else start)  # it counts from 1
    return _gathered(row.read, table, dim, index)


def _gathered(read: str, table: Tensor, dim: int, index: Tensor) -> Value:
    if index.ndim == 2:  # of a table [T, F]
        batched = True
        if read == "embedding":
            return Value(F.embedding(index, table), 1, batched)
        if read == "gather":
            source = table[None].expand(index.shape[0], -1, -1)
            return Value(source.gather(1, index[..., None].expand(-1, -1, table.shape[1])), 1, batched)
        return Value(table[index], 1, batched)
    if read == "embedding":
        return Value(F.embedding(index, table), 0)
    if read == "index_select":
        return Value(table.index_select(dim, index), dim)
    if read == "gather":
        shape = [index.shape[0] if d == dim else size for d, size in enumerate(table.shape)]
        view = index.view(*[-1 if d == dim else 1 for d in range(table.ndim)])
        return Value(table.gather(dim, view.expand(shape)), dim)
    return Value(table[(slice(None),) * dim + (index,)], dim)


def _computed(row: Row, index: Tensor, length: Any, width: int) -> Value:
    if row.offset == "constant":
        index = index + CONSTANT_OFFSET
    elif row.offset == "length":
        index = index + length
    elif row.offset == "right":
        index = (TABLE_LENGTH - length) + index
    pairs = width if row.dtype == "complex64" else width // 2
    frequencies = 1.0 / 100.0 ** (torch.arange(pairs).float() / pairs)
    angles = index[..., None].float() * frequencies
    if row.dtype == "complex64":
        rows = torch.polar(torch.ones_like(angles), angles)
    else:
        rows = torch.cat([angles, angles], -1)
    return Value(rows, index.ndim - 1, index.ndim == 2)
