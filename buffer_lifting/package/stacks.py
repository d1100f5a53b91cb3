"""In which modules of the original model the nodes of a stage were traced: what ``split_layers`` goes by."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Graph

from buffer_lifting.errors import LiftingError

_FQN = re.compile(r"[\w.@]*")


def encode_stacks(graph: Graph) -> dict[str, Any]:
    """``{"stacks": [["model", "model.layers.0"], ...], "nodes": {"add_1": 0, ...}}``: FQNs, outermost first.

    A module that is called again has the number of the call behind an ``@``.
    """
    stacks: dict[tuple[str, ...], int] = {}
    nodes = {}
    for node in graph.nodes:
        found = node.meta.get("nn_module_stack") or {}
        stack = tuple(_call(str(key), str(fqn)) for key, (fqn, _) in found.items() if fqn)
        if stack:
            nodes[node.name] = stacks.setdefault(stack, len(stacks))
    return {"stacks": [list(stack) for stack in stacks], "nodes": nodes}


def decode_stacks(document: dict[str, Any], graph: Graph) -> None:
    """Puts back what :func:`encode_stacks` says; the classes of the modules are not known.

    Raises:
        LiftingError: names that are none.
    """
    stacks = [[str(fqn) for fqn in stack] for stack in document["stacks"]]
    for stack in stacks:
        for fqn in stack:
            if not _FQN.fullmatch(fqn):
                raise LiftingError(f"a stage was traced in a module {fqn!r}")
    for node in graph.nodes:
        place = document["nodes"].get(node.name)
        if place is not None:
            node.meta["nn_module_stack"] = {fqn: (fqn.partition("@")[0], "") for fqn in stacks[place]}


def _call(key: str, fqn: str) -> str:
    """``"layers.0"``, ``"layers.0@1"`` in its second call: torch.export has the number in the key."""
    name, number = fqn.partition("@")[0], key.partition("@")[2]
    return f"{name}@{number}" if number else name
