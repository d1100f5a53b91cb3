"""Where a graph may be cut into stages, and which cuts a user asked for."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from buffer_lifting.errors import PartitionError
from buffer_lifting.graph.record import GraphRecord


def module_spans(record: GraphRecord, activations: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module FQN -> index of the first activation that was traced in it, and the index behind the last one."""
    spans: dict[str, tuple[int, int]] = {}
    modules, fqns = None, list[str]()
    for index, name in enumerate(activations):
        inside = record.nodes[name].modules
        if inside is not modules:
            modules, fqns = inside, [fqn.split("@")[0] for fqn, _ in inside]
        for fqn in fqns:
            spans[fqn] = (spans[fqn][0] if fqn in spans else index, index + 1)
    return spans


def cuts_at(record: GraphRecord, activations: Sequence[str], split_points: Sequence[str]) -> list[int]:
    """Indices into ``activations`` at which stages 1, 2, ... start.

    Raises:
        PartitionError: a module that does not exist, computes position values only, or is out of order.
    """
    if isinstance(split_points, str) or not all(isinstance(point, str) for point in split_points):
        raise PartitionError("split_points is a sequence of module FQNs, the first module of each next stage")
    first = {fqn: start for fqn, (start, _) in module_spans(record, activations).items()}
    every = {fqn.split("@")[0] for node in record.nodes.values() for fqn, _ in node.modules}
    cuts: list[int] = []
    for point in split_points:
        if point not in first:
            if point in every:
                raise PartitionError(
                    f"split point {point!r} lies inside a lifted chain: only position values are computed there; "
                    "name a module that the activations pass through"
                )
            near = difflib.get_close_matches(point, sorted(first), n=3)
            hint = f"; did you mean {', '.join(repr(name) for name in near)}?" if near else ""
            raise PartitionError(f"split point {point!r} is no module of the program{hint}")
        cut = first[point]
        if cut == 0:
            raise PartitionError(f"split point {point!r} is where the program begins: stage 0 would be empty")
        if cuts and cut <= cuts[-1]:
            raise PartitionError(
                f"split point {point!r} does not come after {split_points[len(cuts) - 1]!r} in the program; give "
                "split points in the order the activations pass through them, each once"
            )
        cuts.append(cut)
    return cuts


@dataclass(frozen=True)
class Layer:
    """An entry of a module list: its FQN, and where its activations begin and end (the index behind the last)."""

    fqn: str
    start: int
    end: int


def layers_of(record: GraphRecord, activations: Sequence[str], wanted: int = 1) -> list[Layer]:
    """The entries of the longest module list, in order of execution.

    Lists of the same name elsewhere in the model (``decoder.layers`` beside ``encoder.layers``) belong to it. A list
    inside an entry of another one (the experts of a layer) is taken only if no other has ``wanted`` entries.
    """
    spans = module_spans(record, activations)
    lists: dict[str, list[Layer]] = defaultdict(list)
    for fqn, (start, end) in spans.items():
        parent, _, last = fqn.rpartition(".")
        if last.isdigit():
            lists[parent].append(Layer(fqn, start, end))
    if not lists:
        return []
    groups: dict[str, list[Layer]] = defaultdict(list)
    for parent, entries in lists.items():
        *path, last = parent.split(".")
        groups[parent if any(part.isdigit() for part in path) else last].extend(entries)
    nested = {parent for parent in groups if any(_inside(parent, other) for other in lists)}
    outer = {name: entries for name, entries in groups.items() if name not in nested and len(entries) >= max(wanted, 2)}
    chosen = outer or groups
    longest = max(chosen.values(), key=lambda entries: (len(entries), -min(layer.start for layer in entries)))
    return sorted(longest, key=lambda layer: layer.start)


def _inside(fqn: str, parent: str) -> bool:
    """Whether a module lies inside a numbered entry of the list ``parent``."""
    prefix = f"{parent}." if parent else ""
    return fqn.startswith(prefix) and fqn != parent and fqn[len(prefix) :].split(".")[0].isdigit()
