"""Gives the parameters and persistent buffers of a stage the values of a checkpoint, by FQN."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.fx import GraphModule

from buffer_lifting.errors import LiftingError
from buffer_lifting.package.checkpoints import WeightSource, open_source
from buffer_lifting.tables import move_to, put

_SHOWN = 8


def load_stage_weights(
    module: GraphModule,
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    *,
    tied: Sequence[Sequence[str]],
    known: Iterable[str],
    device: torch.device,
    prefix: str = "",
    strict: bool = True,
    cast: bool = False,
) -> None:
    """See :meth:`LoadedStage.load_weights`. ``tied`` are groups of FQNs that are one tensor; ``known`` those of the
    whole model."""
    checkpoint = open_source(source)
    present = {name.removeprefix(prefix) for name in checkpoint.names() if name.startswith(prefix)}
    wanted = weights_of(module)
    aliases = _aliases(tied, wanted)
    if strict:
        _check_unexpected(checkpoint, present, {*known, *wanted, *(name for group in tied for name in group)}, prefix)
    found = {fqn: [name for name in (fqn, *aliases[fqn]) if name in present] for fqn in wanted}
    missing = [fqn for fqn, names in found.items() if not names]
    if missing:
        hint = f" behind the prefix {prefix!r}" if prefix else ""
        raise LiftingError(
            f"{checkpoint.what} has no {_listed(missing)}{hint}; FQNs are those of the exported model"
            + _prefix_hint(checkpoint, missing[0], prefix)
        )
    _check_tensors(checkpoint, wanted, found, prefix, cast)
    groups: dict[int, list[str]] = {}  # names of one tensor of the stage, which is read once
    for fqn, value in wanted.items():
        groups.setdefault(id(value), []).append(fqn)
    sources = {names[0]: [prefix + name for name in found[names[0]]] for names in groups.values()}
    values = checkpoint.read(dict.fromkeys(name for names in sources.values() for name in names), device)
    for names in sources.values():
        if any(not _same(values[names[0]], values[other]) for other in names[1:]):
            raise LiftingError(
                f"{_listed(names)} are one parameter in the program, but {checkpoint.what} has different values for "
                "them: the checkpoint is of a model without tied weights"
            )
    with torch.no_grad():
        for names in groups.values():
            first = names[0]
            _assign(module, names, wanted[first], values[sources[first][0]].to(wanted[first].dtype))
    move_to(module, device)


def weights_of(module: GraphModule) -> dict[str, torch.Tensor]:
    """FQN -> what a checkpoint of the model has of a stage: parameters and persistent buffers, under all names."""
    return dict(module.state_dict(keep_vars=True))


def _aliases(tied: Sequence[Sequence[str]], wanted: Iterable[str]) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {fqn: [] for fqn in wanted}
    for group in tied:
        for fqn in group:
            if fqn in aliases:
                aliases[fqn] += [name for name in group if name != fqn and name not in aliases[fqn]]
    return aliases


def _check_unexpected(checkpoint: WeightSource, present: set[str], known: set[str], prefix: str) -> None:
    unexpected = sorted(present - known)
    if unexpected:
        raise LiftingError(
            f"{checkpoint.what} has {_listed([prefix + name for name in unexpected])}, which the program does not "
            "have; strict=False ignores what it does not have"
        )


def _check_tensors(
    checkpoint: WeightSource,
    wanted: Mapping[str, torch.Tensor],
    found: Mapping[str, list[str]],
    prefix: str,
    cast: bool,
) -> None:
    wrong = []
    for fqn, names in found.items():
        for name in names:
            info, value = checkpoint.info(prefix + name), wanted[fqn]
            if info.shape != tuple(value.shape):
                wrong.append(f"{prefix + name} has shape {info.shape}, the program has {tuple(value.shape)}")
            elif info.dtype != value.dtype and not (cast and _castable(info.dtype, value.dtype)):
                wrong.append(f"{prefix + name} is {_name(info.dtype)}, the program has {_name(value.dtype)}")
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
        hint = "; cast=True converts between floating dtypes" if any(" is " in text for text in wrong) else ""
        raise LiftingError(f"{checkpoint.what} does not fit the program: {shown}{hint}")


def _castable(source: torch.dtype | str, target: torch.dtype) -> bool:
    return isinstance(source, torch.dtype) and source.is_floating_point and target.is_floating_point


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _assign(module: GraphModule, names: Sequence[str], old: torch.Tensor, value: torch.Tensor) -> None:
    """Puts a value at all the names of one tensor of a stage; one that has values on the same device is written to."""
    if old.device == value.device:
        old.copy_(value)
        return
    new = torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value
    for name in names:
        put(module, name, new)


def _prefix_hint(checkpoint: WeightSource, fqn: str, prefix: str) -> str:
    """Says so if the tensor is there under a prefix."""
    ending = "." + fqn
    other = next((name for name in checkpoint.names() if name.endswith(ending)), None)
    if other is not None and not prefix:
        return f"; it has {other!r}: is prefix={other.removesuffix(fqn)!r} missing?"
    shorter: Callable[[str], bool] = lambda name: fqn.endswith("." + name)  # noqa: E731
    other = next((name for name in checkpoint.names() if shorter(name)), None)
    return f"; it has {other!r}: it is of an inner module, give a mapping with the FQNs changed" if other else ""


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(map(repr, names[:_SHOWN]))
    return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
