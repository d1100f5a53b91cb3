"""Checks what a stage is given in a step, before it computes or waits for another rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from buffer_lifting.errors import FeedError, PartitionError
from buffer_lifting.labels import BATCH, COL
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.stages import Stage

_HANDLE = "_buffer_lifting_input_check"


def check_inputs_of(lifted: LiftedProgram, stage: Stage) -> None:
    """Makes a stage's module refuse inputs that are missing or disagree about the batch or a sequence.

    Without it the rank that was fed wrongly fails in some op, which names neither; or its size reaches a collective.
    A module that is checked already is checked once.
    """
    module = stage.module
    earlier = module.__dict__.pop(_HANDLE, None)
    if earlier is not None:
        earlier.remove()

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**(dict(zip(stage.activations, args, strict=False)) if stage.index == 0 else {}), **kwargs}
        wanted = (*(stage.activations if stage.index == 0 else ()), *stage.kwargs)
        lifted_names = {item.name for item in lifted.inputs}
        missing = [name for name in wanted if name in lifted_names and name not in given]
        if missing:
            raise FeedError(f"{_rank()}stage {stage.index} is not given {', '.join(map(repr, missing))}; see feed()")
        _check_dtypes(lifted, stage, given)
        sizes = _check_sizes(
            lifted, {name: given[name] for name in wanted if isinstance(given.get(name), torch.Tensor)}
        )
        if stage.index:
            _check_activations(stage, args, sizes)

    module.__dict__[_HANDLE] = module.register_forward_pre_hook(check, with_kwargs=True)


def _check_dtypes(lifted: LiftedProgram, stage: Stage, given: dict[str, Any]) -> None:
    """No lifted input has lost precision: rows of positions in bfloat16 are those of other positions."""
    for item in lifted.inputs:
        value, wanted = given.get(item.name), getattr(torch, item.dtype)
        if not isinstance(value, torch.Tensor) or item.name not in stage.kwargs or value.dtype == wanted:
            continue
        if value.is_floating_point() and wanted.is_floating_point and value.itemsize < wanted.itemsize:
            raise FeedError(
                f"{_rank()}stage {stage.index} is given {item.name!r} in {value.dtype}, the program has {wanted}: feed "
                "it as it is, and under FSDP give MixedPrecisionPolicy cast_forward_inputs=False"
            )


def _check_sizes(lifted: LiftedProgram, given: dict[str, torch.Tensor]) -> dict[str, int]:
    """Every input tells the same batch, and the same length of each sequence: a rank's own part, by axis."""
    told: dict[str, tuple[int, str, str]] = {}
    ranks = lifted.cp_size or 1
    for name, value in given.items():
        for dim, axis, role in _dims(lifted, name):
            if dim >= value.ndim:
                raise FeedError(f"{_rank()}{name!r} has shape {tuple(value.shape)}, without a dim {dim}")
            size = value.shape[dim]
            whole = size if axis == BATCH or role == COL else size * ranks
            text = f"{name!r} {tuple(value.shape)} has {size} along dim {dim}"
            first, _, other = told.setdefault(axis, (whole, role, text))
            if first != whole:
                what = "the batch" if axis == BATCH else f"axis {axis!r} on {ranks} context-parallel rank(s)"
                raise FeedError(f"{_rank()}{text}, but {other}: they disagree about {what}")
    return {axis: whole if axis == BATCH else whole // ranks for axis, (whole, _, _) in told.items()}


def _check_activations(stage: Stage, args: tuple[Any, ...], sizes: dict[str, int]) -> None:
    """What the stage before has sent has the sizes of what this one was fed."""
    for wanted, value in zip(stage.activation_shapes, args, strict=False):
        try:
            shape = wanted.concrete(sizes)
        except PartitionError:  # no expression of what this stage's inputs tell
            continue
        if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
            told = ", ".join(f"{size} for {axis!r}" for axis, size in sizes.items())
            raise FeedError(
                f"{_rank()}stage {stage.index} gets {wanted.name!r} {tuple(value.shape)} from the stage before, but "
                f"its other inputs have {told}, which makes it {shape}"
            )


def _dims(lifted: LiftedProgram, name: str) -> Iterator[tuple[int, str, str]]:
    """``(dim, axis, role)`` of the batch and sequence dims of an input."""
    for item in lifted.inputs:
        if item.name == name:
            if item.batched:
                yield 0, BATCH, ""
            yield int(item.batched), item.axis, item.role
            return
    axes = lifted.input_axes.get(name)
    if axes is not None:
        if axes.batch_dim is not None:
            yield axes.batch_dim, BATCH, ""
        yield from axes.seq_dims


def _rank() -> str:
    """Who says it: of several ranks the first error may be that of a peer."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return f"rank {torch.distributed.get_rank()}: "
    return ""
