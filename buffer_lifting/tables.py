"""Tensors without values, those on the meta device and fake ones, and where the values of tables come from.

A program that was exported ahead of time has no values. Its parameters and persistent buffers get theirs from a
checkpoint; its tables (buffers and constants that are in no checkpoint) from whatever computes them in the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from buffer_lifting.errors import FeedError
from buffer_lifting.graph.bodies import named
from buffer_lifting.layer_graphs import graphs_of
from buffer_lifting.torch_compat import is_fake, rewrite_code

#: A module that has the tables by FQN, or a mapping from FQN to tensor or from the FQN of a module to that module.
TableSource = torch.nn.Module | Mapping[str, torch.Tensor | torch.nn.Module]


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements to read: it is neither on the meta device nor fake."""
    return tensor.device.type != "meta" and not is_fake(tensor)


def lack_values(state: Mapping[str, Any]) -> list[str]:
    """The names of the tensors without values, in their order."""
    return [name for name, value in state.items() if isinstance(value, torch.Tensor) and not has_values(value)]


def on_meta(value: Any, made: dict[int, torch.Tensor]) -> Any:
    """A fake tensor as one on the meta device, which outlives its fake mode and can be saved; all else as it is.

    ``made`` keeps one for one: what is tied stays tied.
    """
    if not isinstance(value, torch.Tensor) or not is_fake(value):
        return value
    if id(value) not in made:
        plain = torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
        parameter = isinstance(value, torch.nn.Parameter)
        made[id(value)] = torch.nn.Parameter(plain, value.requires_grad) if parameter else plain
    return made[id(value)]


def use_device(graph: Graph, device: torch.device, only: str = "") -> bool:
    """Makes every op that names a device (of type ``only``, if given) name ``device``; whether there was one."""
    changed = False
    for node in graph.nodes:
        named = [key for key, value in node.kwargs.items() if _elsewhere(value, device, only)]
        if named:
            node.kwargs = {**node.kwargs, **dict.fromkeys(named, device)}
        places = [place for place, value in enumerate(node.args) if _elsewhere(value, device, only)]
        for place in places:
            node.update_arg(place, device)
        changed |= bool(named or places)
    return changed


def _elsewhere(value: Any, device: torch.device, only: str) -> bool:
    return isinstance(value, torch.device) and value != device and only in ("", value.type)


def find_values(
    source: TableSource, wanted: Mapping[str, torch.Tensor], required: Collection[str]
) -> dict[str, torch.Tensor]:
    """The values that ``source`` has for ``wanted`` tables.

    Raises:
        FeedError: ``required`` tables that it does not have, or one of another shape or dtype.
    """
    found: dict[str, torch.Tensor] = {}
    missing = []
    for fqn, current in wanted.items():
        value = _lookup(source, fqn)
        if value is None or not has_values(value):
            if fqn in required:
                missing.append(fqn)
            continue
        if value.shape != current.shape or value.dtype != current.dtype:
            raise FeedError(
                f"bind_tables: {fqn!r} is {value.dtype} {tuple(value.shape)}, the program has {current.dtype} "
                f"{tuple(current.shape)}"
            )
        found[fqn] = value.detach()
    if missing:
        raise FeedError(f"bind_tables: no values are given for {', '.join(map(repr, missing))}")
    return found


def _lookup(source: TableSource, fqn: str) -> torch.Tensor | None:
    if not isinstance(source, Mapping):
        return _attribute(source, fqn)
    value = source.get(fqn)
    if isinstance(value, torch.Tensor):
        return value
    for prefix, module in source.items():
        if isinstance(module, torch.nn.Module) and fqn.startswith(f"{prefix}."):
            return _attribute(module, fqn.removeprefix(f"{prefix}."))
    return None


def _attribute(module: torch.nn.Module, path: str) -> torch.Tensor | None:
    value = named(module, path)
    return value if isinstance(value, torch.Tensor) else None


def put(module: torch.nn.Module, fqn: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of the one that has the FQN."""
    path, _, leaf = fqn.rpartition(".")
    setattr(module.get_submodule(path), leaf, value)


def stage_tables(module: GraphModule) -> dict[str, torch.Tensor]:
    """The buffers and constants of a stage that are in no checkpoint, by FQN."""
    kept = set(module.state_dict())
    tables = {}
    for prefix, part in graphs_of(module):
        for node in part.graph.nodes:
            if node.op == "get_attr" and f"{prefix}{node.target}" not in kept:
                value = _attribute(part, str(node.target))
                if value is not None:
                    tables[f"{prefix}{node.target}"] = value
    return tables


def keep_transient(root: torch.nn.Module, module: GraphModule) -> None:
    """Keeps out of ``module``'s checkpoints what is in none of ``root``, of which it was made.

    ``GraphModule`` makes a persistent buffer of every tensor that is no parameter.
    """
    kept = set(root.state_dict())
    for fqn, value in list(module.named_buffers(remove_duplicate=False)):
        if fqn not in kept:
            path, _, leaf = fqn.rpartition(".")
            module.get_submodule(path).register_buffer(leaf, value, persistent=False)


def set_tables(module: GraphModule, values: Mapping[str, torch.Tensor]) -> None:
    """Puts values into a stage's tables; ops that were traced on the meta device work where its state is."""
    for fqn, value in values.items():
        put(module, fqn, value)
    state = [*module.parameters(), *module.buffers()]
    place = next((value.device for value in state if has_values(value)), torch.device("cpu"))
    _name_device(module, place, "meta")


def move_to(module: GraphModule, device: torch.device) -> None:
    """Makes a stage's ops and constants, which ``Module.to`` does not know of, those of another device."""
    for fqn, value in stage_tables(module).items():
        if value.device != device and has_values(value):
            put(module, fqn, value.to(device))
    _name_device(module, device)


def _name_device(module: GraphModule, device: torch.device, only: str = "") -> None:
    for _, part in graphs_of(module):
        if use_device(part.graph, device, only):
            rewrite_code(part)
