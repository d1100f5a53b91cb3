"""What a program's example inputs say: names, sizes, and further inputs made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.graph_json import dtype_of
from buffer_lifting.program import InputAxes, LiftedInput
from buffer_lifting.tables import has_values
from buffer_lifting.torch_compat import tree_flatten, tree_map


def named_inputs(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a call by placeholder name, in the order of the signature."""
    leaves = tree_flatten((args, kwargs))[0]
    return dict(zip([str(name) for name in program.graph_signature.user_inputs], leaves, strict=False))


def example_sizes(
    program: ExportedProgram, axes: dict[str, InputAxes]
) -> tuple[int, dict[str, int], dict[str, torch.Tensor]] | None:
    """Batch size, sequence lengths and tensors of the example inputs; ``None`` if the program has none."""
    if program.example_inputs is None:
        return None
    named = named_inputs(program, *program.example_inputs)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if any(type(value) is not torch.Tensor or not has_values(value) for value in tensors.values()):
        return None
    batch, lengths = sizes_of(tensors, axes)
    return batch, lengths, tensors


def examples_without_values(
    program: ExportedProgram, axes: dict[str, InputAxes], inputs: Sequence[LiftedInput]
) -> dict[str, torch.Tensor] | None:
    """Lifted inputs on the meta device, ``[batch, seq, *row]``, of the sizes of the example inputs, if any."""
    if program.example_inputs is None:
        return None
    named = named_inputs(program, *program.example_inputs)
    batch, lengths = sizes_of({n: value for n, value in named.items() if isinstance(value, torch.Tensor)}, axes)
    made = {}
    for item in inputs:
        if item.axis not in lengths or not all(isinstance(size, int) for size in item.row_shape):
            return None
        shape = (*([batch] if item.batched else []), lengths[item.axis], *item.row_shape)
        made[item.name] = torch.empty(shape, dtype=dtype_of(item.dtype), device="meta")
    return made


def widen_examples(program: ExportedProgram, dims: dict[str, int], ranks: int) -> None:
    """Gives the example inputs of a rank the keys of all ranks: ``dims`` has the key dim of each input that has one."""
    if program.example_inputs is None or ranks == 1:
        return
    args, kwargs = program.example_inputs
    named = named_inputs(program, args, kwargs)
    for name, dim in dims.items():
        if isinstance(named.get(name), torch.Tensor):
            named[name] = torch.cat([named[name]] * ranks, dim)
    leaves = iter(named.values())
    program.example_inputs = tree_map(lambda _: next(leaves), (args, kwargs))


def sizes_of(tensors: dict[str, torch.Tensor], axes: dict[str, InputAxes]) -> tuple[int, dict[str, int]]:
    """Batch size (1 without a batch axis) and sequence lengths of a call's tensors."""
    batch = 1
    lengths: dict[str, int] = {}
    for name, value in tensors.items():
        own = axes.get(name)
        if own is None:
            continue
        if own.batch_dim is not None:
            batch = int(value.shape[own.batch_dim])
        for dim, axis, _ in own.seq_dims:
            lengths.setdefault(axis, int(value.shape[dim]))
    return batch, lengths
