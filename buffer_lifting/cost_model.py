"""What stages cost, and the cuts that balance them.

A graph is cut where layers (entries of a module list) begin, and where the last one of a list ends: an embedding and an
output head may be stages of their own. What lies between two such places is a segment.
A segment costs its share of the forward FLOPs plus its share of the parameter bytes. FLOPs stand for the time of a
stage, bytes for its memory (parameters, gradients, optimizer): an embedding has bytes and no FLOPs, an output head
much of both. :class:`CostWeights` says how much each counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import isfinite

from torch.fx import Node as FxNode

from buffer_lifting.balance import balance, balance_ranks
from buffer_lifting.cost import Bytes, example_sizes
from buffer_lifting.cuts import Layer, layers_of
from buffer_lifting.errors import PartitionError
from buffer_lifting.flops import FlopCounter
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.ops import is_mutating, is_view

#: The operand in which each lookup has its table, of rows: the weights of experts have a dim more.
_LOOKUPS = {
    "aten.embedding": "weight",
    "aten.embedding_bag": "weight",
    "aten.index": "self",
    "aten.index_select": "self",
    "aten.gather": "self",
}
#: Costs are integers: shares of the whole in units of this.
_UNIT = 10**15


@dataclass(frozen=True)
class CostWeights:
    """How much counts what in the cost of a stage.

    ``flops * (share of FLOPs) + parameters * (share of parameter bytes)``, where the bytes of tables that are only
    looked up count ``embedding`` times, and everything behind the last layer (the last norm, the output head, a loss)
    counts ``head`` times. ``parameters=0`` balances time alone; ``flops=0`` memory of parameters alone;
    ``embedding=0`` leaves embeddings out, whose lookup takes no time, where memory is no concern.
    """

    flops: float = 1.0
    parameters: float = 1.0
    embedding: float = 1.0
    head: float = 1.0

    def __post_init__(self) -> None:
        """Refuses weights that are no finite numbers of at least 0."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise PartitionError(f"the weight {item.name} must be a number of at least 0, not {value!r}")
        if not self.flops and not self.parameters:
            raise PartitionError("the weights of flops and parameters are both 0: nothing is left to balance")


@dataclass(frozen=True)
class Segment:
    """A run of activations that no cut divides.

    Attributes:
        start: index of its first activation.
        flops: forward FLOPs of a microbatch.
        parameter_bytes: bytes of the parameters that it computes with.
        table_bytes: bytes of the parameters that it only looks up rows of.
        crossing: bytes that a cut at its start sends; 0 for the first.
        head: whether it comes after the last layer.
    """

    start: int
    flops: int
    parameter_bytes: int
    table_bytes: int
    crossing: int
    head: bool


def costs(segments: Sequence[Segment], weights: CostWeights) -> list[int]:
    """The cost of each segment, in units of a share of the whole."""
    flops = sum(s.flops for s in segments) or 1
    size = sum(s.parameter_bytes + s.table_bytes for s in segments) or 1
    found = []
    for s in segments:
        held = s.parameter_bytes + weights.embedding * s.table_bytes
        share = weights.flops * s.flops / flops + weights.parameters * held / size
        found.append(round(_UNIT * share * (weights.head if s.head else 1)))
    return found


def balanced_cuts(
    record: GraphRecord,
    nodes: Mapping[str, FxNode],
    activations: Sequence[str],
    num_stages: int,
    routed: frozenset[str] = frozenset(),
    weights: CostWeights | None = None,
    ranks: Sequence[int] | None = None,
) -> list[int]:
    """Cuts where layers begin, or a list of them ends: the most expensive stage, or rank, costs as little as possible.

    Args:
        record: the graph; ``nodes`` are its fx nodes by name, and ``activations`` the values that stages compute.
        num_stages: how many stages.
        routed: activations that no cut may cross: tokens while they lie by expert.
        weights: what counts how much.
        ranks: the rank of each stage, where several stages lie on one.

    Raises:
        PartitionError: ``num_stages`` is not a positive integer, or there are fewer segments than stages.
    """
    if not isinstance(num_stages, int) or isinstance(num_stages, bool) or num_stages < 1:
        raise PartitionError(f"num_stages must be a positive integer, not {num_stages!r}")
    if num_stages == 1:
        return []
    crossing = crossing_bytes(record, activations, routed)
    layers: list[Layer] = []
    starts: list[int] = []
    for wanted in (num_stages - 2, num_stages):  # what comes before and after the layers may be stages too
        layers = layers_of(record, activations, wanted)
        ends = {layer.fqn.rpartition(".")[0]: layer.end for layer in layers}
        places = sorted({0, *(layer.start for layer in layers), *ends.values()})
        starts = [place for place in places if place == 0 or (place < len(activations) and crossing[place] > 0)]
        if len(starts) >= num_stages:
            break
    else:
        raise PartitionError(
            f"num_stages={num_stages}, but the program has {len(layers)} layers to cut between "
            f"({', '.join(layer.fqn for layer in layers[:4])}{', ...' if len(layers) > 4 else ''}), which makes at "
            f"most {len(starts)} stages; use fewer stages or give split_points"
        )
    last = max((layer.end for layer in layers), default=len(activations))
    found = segments(record, nodes, activations, starts, [crossing[start] for start in starts], last)
    each, sent = costs(found, weights or CostWeights()), [segment.crossing for segment in found]
    shared = ranks is not None and len(set(ranks)) < num_stages
    chosen = balance_ranks(each, ranks or (), sent) if shared else balance(each, num_stages, sent)
    return [starts[index] for index in chosen]


def segments(
    record: GraphRecord,
    nodes: Mapping[str, FxNode],
    activations: Sequence[str],
    starts: Sequence[int],
    crossing: Sequence[int],
    head: int,
) -> list[Segment]:
    """The segments that begin at ``starts``; those from the activation ``head`` on come after the last layer."""
    hints = example_sizes(record)
    counter, in_bytes = FlopCounter(hints), Bytes(hints)
    parameters = _parameters_read(record, activations)
    found = []
    for (start, end), sent in zip(pairwise([*starts, len(activations)]), crossing, strict=True):
        held: dict[str, bool] = {}
        for name in activations[start:end]:
            for state, looked_up in parameters.get(name, ()):
                held[state] = held.get(state, True) and looked_up
        sizes = {state: in_bytes.of(meta) for state in held if (meta := record.nodes[state].tensor)}
        tables = sum(size for state, size in sizes.items() if held[state])
        work = counter.nodes(nodes[name] for name in activations[start:end])
        whole = sum(sizes.values())
        found.append(Segment(start, work, whole - tables, tables, sent if start else 0, start >= head))
    return found


_States = frozenset[tuple[str, bool]]


def _parameters_read(record: GraphRecord, activations: Sequence[str]) -> dict[str, _States]:
    """The parameters that each activation reads, also through values that are recomputed; whether by lookup only."""
    owned = set(activations)
    first: dict[str, str] = {}
    reads: dict[str, _States] = {}
    found: dict[str, _States] = {}
    for node in record.nodes.values():
        if node.kind is NodeKind.STATE:
            if node.state_kind is StateKind.PARAMETER:
                same = first.setdefault(min((node.fqn, *node.aliases)), node.name)
                reads[node.name] = frozenset([(same, False)])
            continue
        if node.kind is not NodeKind.OP or isinstance(node.meta, ScalarMeta):
            continue
        table = _LOOKUPS.get(node.base_op)
        states: set[tuple[str, bool]] = set()
        for path, name in node.named_refs():
            if name in reads:
                meta = record.nodes[name].tensor
                lookup = path == table and meta is not None and len(meta.shape) == 2
                states |= {(state, True) for state, _ in reads[name]} if lookup else reads[name]
        if states:
            (found if node.name in owned else reads)[node.name] = frozenset(states)
    return found


def crossing_bytes(record: GraphRecord, activations: Sequence[str], routed: frozenset[str]) -> list[int]:
    """For a cut before each activation the bytes that are sent; -1 where a cut is not possible.

    Not possible is a cut that a value without a tensor form would cross (several tensors, a number), one inside the
    routing of tokens to experts, and one between a storage and a write to it.
    """
    sizes = Bytes(example_sizes(record))
    place = {name: index for index, name in enumerate(activations)}
    until = _last_reads(record, place)
    sent, blocked = [0] * (len(activations) + 1), [0] * (len(activations) + 1)
    for name, start in place.items():
        node, end = record.nodes[name], until.get(name, 0)
        if end > start:
            size = sizes.of(node.meta) if isinstance(node.meta, TensorMeta) else 0
            sent[start + 1] += size
            if not isinstance(node.meta, TensorMeta) or name in routed:
                blocked[start + 1] += 1
            if end < len(activations):
                sent[end + 1] -= size
                if not isinstance(node.meta, TensorMeta) or name in routed:
                    blocked[end + 1] -= 1
    for start, end in _writes(record, place):
        blocked[start + 1] += 1
        blocked[end + 1] -= 1
    found, size, count = [], 0, 0
    for index in range(len(activations)):
        size, count = size + sent[index], count + blocked[index]
        found.append(-1 if count else size)
    return found


def _last_reads(record: GraphRecord, place: Mapping[str, int]) -> dict[str, int]:
    """The index of the last activation that reads each value, itself or through what is recomputed there."""
    until: dict[str, int] = {}
    for node in reversed(record.nodes.values()):
        if node.kind is NodeKind.OUTPUT:
            last = len(place)  # what the program returns travels to the last stage
        elif node.name in place:
            last = place[node.name]
        elif isinstance(node.meta, ScalarMeta):
            continue  # a size is read off any value that has it
        else:
            last = until.get(node.name, 0)
        for name in node.refs():
            until[name] = max(until.get(name, 0), last)
    return until


def _writes(record: GraphRecord, place: Mapping[str, int]) -> list[tuple[int, int]]:
    """For each write in place where the storage that it writes to is made, and where the write is."""
    base: dict[str, str] = {}
    found: list[tuple[int, int]] = []
    if not any(is_mutating(record.nodes[name]) for name in place):
        return found
    for name, index in place.items():
        node: Node = record.nodes[name]
        first = next((arg.name for arg in node.args.values() if isinstance(arg, Ref)), None)
        if first is None:
            continue
        writes = is_mutating(node)
        if writes or is_view(node) or node.op == "getitem":
            base[name] = base.get(first, first)
        if writes and base[name] in place:
            found.append((place[base[name]], index))
    return found
