"""Where a graph may be cut into stages, and which cuts a user asked for."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence

from buffer_lifting.cost import balance, flops, tensor_bytes
from buffer_lifting.errors import PartitionError
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, StateKind


def first_in_module(record: GraphRecord, activations: Sequence[str]) -> dict[str, int]:
    """Module FQN -> index of the first activation that was traced in it."""
    first: dict[str, int] = {}
    for index, name in enumerate(activations):
        for fqn, _ in record.nodes[name].modules:
            first.setdefault(fqn.split("@")[0], index)
    return first


def cuts_at(record: GraphRecord, activations: Sequence[str], split_points: Sequence[str]) -> list[int]:
    """Indices into ``activations`` at which stages 1, 2, ... start.

    Raises:
        PartitionError: a module that does not exist, computes position values only, or is out of order.
    """
    if isinstance(split_points, str) or not all(isinstance(point, str) for point in split_points):
        raise PartitionError("split_points is a sequence of module FQNs, the first module of each next stage")
    first = first_in_module(record, activations)
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


def layer_starts(record: GraphRecord, activations: Sequence[str], wanted: int = 1) -> list[tuple[str, int]]:
    """The legal cut points of ``num_stages``: the entries of the longest module list, in order of execution.

    Lists of the same name elsewhere in the model (``decoder.layers`` beside ``encoder.layers``) belong to it. A list
    inside an entry of another one (the experts of a layer) is taken only if no other has ``wanted`` entries.
    """
    first = first_in_module(record, activations)
    lists: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for fqn, index in first.items():
        parent, _, last = fqn.rpartition(".")
        if last.isdigit():
            lists[parent].append((fqn, index))
    if not lists:
        return []
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for parent, entries in lists.items():
        *path, last = parent.split(".")
        groups[parent if any(part.isdigit() for part in path) else last].extend(entries)
    nested = {parent for parent in groups if any(_inside(parent, other) for other in lists)}
    outer = {name: entries for name, entries in groups.items() if name not in nested and len(entries) >= max(wanted, 2)}
    chosen = outer or groups
    longest = max(chosen.values(), key=lambda entries: (len(entries), -min(index for _, index in entries)))
    return sorted(longest, key=lambda entry: entry[1])


def _inside(fqn: str, parent: str) -> bool:
    """Whether a module lies inside a numbered entry of the list ``parent``."""
    prefix = f"{parent}." if parent else ""
    return fqn.startswith(prefix) and fqn != parent and fqn[len(prefix) :].split(".")[0].isdigit()


def balanced_cuts(record: GraphRecord, activations: Sequence[str], num_stages: int) -> list[int]:
    """Cuts at layers so that the most expensive stage costs as little as possible.

    The cost of a stage is its share of the forward FLOPs plus its share of the parameter bytes.

    Raises:
        PartitionError: ``num_stages`` is not a positive integer, or there are fewer layers than stages.
    """
    if not isinstance(num_stages, int) or isinstance(num_stages, bool) or num_stages < 1:
        raise PartitionError(f"num_stages must be a positive integer, not {num_stages!r}")
    layers = layer_starts(record, activations, num_stages)
    if num_stages > max(len(layers), 1):
        raise PartitionError(
            f"num_stages={num_stages}, but the program has {len(layers)} layers to cut between "
            f"({', '.join(fqn for fqn, _ in layers[:4])}{', ...' if len(layers) > 4 else ''}); "
            "use fewer stages or give split_points"
        )
    if num_stages == 1:
        return []
    starts = [0, *(index for _, index in layers[1:])]
    costs = segment_costs(record, activations, starts)
    return [starts[index] for index in balance(costs, num_stages)]


def segment_costs(record: GraphRecord, activations: Sequence[str], starts: Sequence[int]) -> list[float]:
    """Cost of each run of activations: FLOPs and parameter bytes, each as a share of the whole."""
    work = [0.0] * len(starts)
    weight = [0.0] * len(starts)
    seen: set[str] = set()
    segment = 0
    for index, name in enumerate(activations):
        while segment + 1 < len(starts) and index >= starts[segment + 1]:
            segment += 1
        node = record.nodes[name]
        work[segment] += flops(record, node, record.hints)
        for ref in node.refs():
            state: Node = record.nodes[ref]
            if state.kind is NodeKind.STATE and state.state_kind is StateKind.PARAMETER and ref not in seen:
                seen.add(ref)
                if state.tensor is not None:
                    weight[segment] += tensor_bytes(state.tensor, record.hints)
    whole_work, whole_weight = sum(work) or 1.0, sum(weight) or 1.0
    return [a / whole_work + b / whole_weight for a, b in zip(work, weight, strict=True)]
