"""How what holds for every layer is said once: the numbers of layers in names and messages become ``*``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_AT_NODE = re.compile(r" \(at \w+\)$")


def layers(name: str) -> str:
    """A dotted name with every number that stands alone as ``*``: ``"layers.*.attn"``."""
    return _NUMBER.sub("*", name)


def pattern(message: str, source: str) -> str:
    """A message about a source (its FQN), without what differs between layers: its numbers, and the node named last."""
    message = _AT_NODE.sub("", message)
    return message.replace(repr(source), repr(layers(source))) if source else message


def common(messages: Sequence[str], sources: Sequence[str]) -> str:
    """What messages of one pattern say together: the message if all are equal, else the pattern."""
    if len(set(messages)) == 1:
        return messages[0]
    return pattern(messages[0], sources[0])


def spread(modules: Sequence[str]) -> str:
    """Distinct modules in words: ``"layers: layers.*.attn"``, or ``"modules"`` when they have no common pattern."""
    patterns = {layers(module) for module in modules}
    return f"layers: {patterns.pop()}" if len(patterns) == 1 else "modules"
