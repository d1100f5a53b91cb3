"""How what holds for every layer is said once: the numbers of layers in names become ``*``, or a range."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_QUOTED = re.compile(r"(?<=')[^\s']+(?=')")
_AT_NODE = re.compile(r" \(at \w+\)$")


def layers(name: str) -> str:
    """A dotted name with every number that stands alone as ``*``: ``"layers.*.attn"``."""
    return _NUMBER.sub("*", name)


def pattern(message: str) -> str:
    """A message without what differs between layers: the numbers in quoted FQNs, and the node named last."""
    return _QUOTED.sub(lambda found: layers(found[0]), _AT_NODE.sub("", message))


def common(messages: Sequence[str]) -> str:
    """What messages of one pattern say together: the message if all are equal, else the pattern."""
    return messages[0] if len(set(messages)) == 1 else pattern(messages[0])


def spread(modules: Sequence[str]) -> str:
    """Distinct modules in words: ``"layers: layers.*.attn"``, or ``"modules"`` when they have no common pattern."""
    patterns = {layers(module) for module in modules}
    return f"layers: {patterns.pop()}" if len(patterns) == 1 else "modules"


def spans(fqns: Iterable[str]) -> tuple[str, ...]:
    """The modules of parameters, up to their first number, with runs of numbers: ``"layers.0-3"``, ``"norm"``."""
    runs: dict[str, list[int]] = {}
    for fqn in fqns:
        module = fqn.rpartition(".")[0] or fqn
        match = re.match(r"(.*?)\.?(?<![^.])(\d+)(?![^.])", module)
        numbers = runs.setdefault(match[1] if match else module, [])
        if match and int(match[2]) not in numbers:
            numbers.append(int(match[2]))
    return tuple(f"{name}.{_ranges(numbers)}".lstrip(".") if numbers else name for name, numbers in runs.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][-1:] = [parts[-1][-1], number] if len(parts[-1]) == 1 else [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
