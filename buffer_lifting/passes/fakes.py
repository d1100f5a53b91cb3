"""Fake values of new and changed nodes, without fixing a dynamic size of the program."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.torch_compat import fake_mode_of, replacements


class Fakes:
    """Computes fake values. Layers repeat the same calls, so equal calls on the same fakes are computed once."""

    def __init__(self, graph: Graph) -> None:
        metas = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
        self._any_fake = next(value for value in metas if isinstance(value, torch.Tensor))
        self._known: dict[Any, Any] = {}

    def of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of a call whose operands are nodes with fake values.

        Raises:
            UnsupportedReadError: torch's fake of the op would fix a dynamic size.
        """
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        key = (target, _identity(values))
        if key not in self._known:
            fakes = [n.meta["val"] for n in operands(args, kwargs) if isinstance(n.meta["val"], torch.Tensor)]
            sizes: list[Any] = [size for fake in fakes for size in fake.shape]
            symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
            before = replacements(symbols[0]) if symbols else 0
            if target is torch.ops.aten.sym_size.int:  # the op itself would fix a symbolic size to its example
                return values[0][0].shape[values[0][1]]
            if target is torch.ops.aten.polar.default:  # its fake compares sizes, and fixes them
                target = torch.ops.aten.complex.default
            with fake_mode_of(fakes[0] if fakes else self._any_fake), torch.no_grad():
                result = target(*values[0], **values[1])
            if symbols and replacements(symbols[0]) != before:
                raise UnsupportedReadError(
                    f"emitting {target} would fix a dynamic size of the program; please report this model"
                )
            self._known[key] = (result, values)
        return self._known[key][0]


def operands(args: Any, kwargs: Any) -> list[Node]:
    """The nodes among the arguments of a call."""
    found: list[Node] = []
    torch.fx.map_arg((args, kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_identity(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, torch.Tensor | torch.SymInt):
        return id(value)
    return (type(value).__name__, str(value))
