"""Position values that a stage computes once, though each layer of the model computes them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Node

from buffer_lifting.graph.record import GraphRecord, NodeKind, StateKind
from buffer_lifting.torch_compat import OpOverload, is_mutable

_SIZE = torch.ops.aten.sym_size.int


class SharedNodes:
    """Finds nodes of a stage that compute what an earlier one has computed already.

    Shared are position values, and sizes: what is made of lifted inputs, tables and sizes by ops that neither write nor
    draw. Values with a parameter above them are not, whose gradients would be summed in another order; nor are data.
    """

    def __init__(
        self,
        record: GraphRecord,
        nodes: Mapping[str, Node],
        data: Collection[str],
        needed: Collection[str],
        apart: Collection[str],
    ) -> None:
        """Of one stage.

        Args:
            record, nodes: the whole program.
            data: names of the nodes that compute data.
            needed: names of the nodes that the stage has.
            apart: names of values that must stay tensors of their own (what the stage returns).
        """
        self.record, self.nodes, self.data, self.apart = record, nodes, data, frozenset(apart)
        self._seen: dict[Any, Node] = {}
        self._asked: Any = None
        self._plain: set[str] = set()
        # A tensor that is made to be written to (zeros that experts add to) is none to share.
        self._off = any(
            _writes(nodes[name]) and any(n.name not in data for n in nodes[name].all_input_nodes) for name in needed
        )

    def size(self, source: Node, dim: int) -> Node | None:
        """The node that reads a size off ``source``, if there is one."""
        return self._seen.get((_SIZE, (source, ("int", dim)), ()))

    def note_size(self, node: Node, source: Node, dim: int) -> None:
        """Notes that ``node`` reads a size off ``source``."""
        self._seen[(_SIZE, (source, ("int", dim)), ())] = node

    def known(self, name: str, env: Mapping[str, Node]) -> Node | None:
        """The node of the stage that computes the same as the program's node ``name``, if there is one."""
        self._asked = None if name in self.data else self._key(name, env)
        return None if self._asked is None else self._seen.get(self._asked)

    def note(self, made: Node) -> None:
        """Notes that ``made`` computes the node of the program that was asked for last."""
        if self._asked is not None:
            self._seen[self._asked] = made

    def _key(self, name: str, env: Mapping[str, Node]) -> Any:
        node = self.nodes[name]
        if self._off or name in self.data or name in self.apart or not isinstance(node.target, OpOverload):
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags or any(
            not self._ready(n) for n in node.all_input_nodes
        ):
            return None
        self._plain.add(name)
        return (node.target, _frozen(node.args, env), _frozen(node.kwargs, env))

    def _ready(self, operand: Node) -> bool:
        """Whether an operand is an input, a table, or a position value without a parameter above it."""
        own = self.record.nodes[operand.name]
        if own.kind is NodeKind.STATE:
            return own.state_kind is not StateKind.PARAMETER
        return own.kind is NodeKind.INPUT or operand.name in self._plain or operand.name in self.data


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and is_mutable(node.target)


def _frozen(value: Any, env: Mapping[str, Node]) -> Any:
    """Arguments as a key; nodes by what stands for them in the stage."""
    if isinstance(value, Node):
        return env[value.name]
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, env) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, env)) for key, item in value.items())
    return (type(value).__name__, value) if isinstance(value, bool | int | float | str | complex) else repr(value)


__all__ = ["SharedNodes"]
