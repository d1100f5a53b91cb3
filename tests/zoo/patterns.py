"""The pattern classes of position reads, and which of them occur in a program: derived from the graph and the scan.

An entry's ``patterns`` are written by hand, from the model's source. ``occurring`` derives the same from what the scan
found, without looking at the entry: a class is a condition on the chain above a read (the ops between its source and
the op on data that reads it) or on the scan's report. ``tests/test_catalog.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import NodeKind, ScalarMeta
from buffer_lifting.graph.sizes import atoms, multiply
from buffer_lifting.labels import BATCH
from buffer_lifting.ops import FLEX_ATTENTION, is_view, length_operands

from .facts import (
    CUTS,
    Facts,
    is_float,
    is_positions,
)
from .mask_patterns import alibi, causal, cumsum_data, cumsum_ones, documents, mask_table, padding, relative, window
from .table_patterns import computed, equal_buffers, full, indexed, learned, offset, position_ids, sliced


def _length(facts: Facts) -> bool:
    """A number made from the length enters a chain or data, or the largest position of a sequence does."""
    numbers = {name for name, node in facts.record.nodes.items() if isinstance(node.meta, ScalarMeta)}
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    for node in facts.live:
        reads = node.name in chains or Dep.DATA in facts.deps[node.name]
        if node.tensor is None or not reads or node.base_op in CUTS:
            continue
        if any(name in numbers and Dep.LENGTH in facts.deps[name] for _, name in length_operands(node)):
            return True
        largest = node.base_op in ("aten.max", "aten.amax") and not facts.spans(node)
        if largest and node.name in chains and facts.from_index(node.name):
            return True
    return False


def _scale(facts: Facts) -> bool:
    """A factor for each token: a logarithm or a power of its position."""
    for trail in facts.trails:
        logs = [node for node in trail.nodes if node.base_op in ("aten.log", "aten.log1p", "aten.pow")]
        if trail.two_axes or not is_float(trail.value) or "mul" not in trail.read.op:
            continue
        if any(facts.from_index(node.name) and facts.spans(node) for node in logs):
            return True
    return False


def _hop(facts: Facts) -> bool:
    prefixes = tuple(f"{name}_" for name in facts.inlined)
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    return any(name.startswith(prefixes) for name in chains) if prefixes else False


def _hop_consumer(facts: Facts) -> bool:
    prefixes = tuple(f"{name}_" for name in facts.inlined)
    return any(trail.read.node.startswith(prefixes) for trail in facts.trails) if prefixes else False


def _written(facts: Facts) -> bool:
    """A write in place to a value of a chain, or of one, with nothing of data in it."""
    chains = {node.name for trail in facts.trails for node in trail.nodes}
    for operands in facts.written:
        known = [names & facts.record.nodes.keys() for names in operands]
        data = any(Dep.DATA in facts.deps[name] for names in known for name in names)
        if not data and any(names & chains for names in known):
            return True
    return False


def _layout(facts: Facts) -> bool:
    """Positions with a dim that folds the batch with another, a sequence in front of the batch, or no batch at all."""
    batches = {f.size for labels in facts.inputs.values() for dim in labels for f in dim if f.axis == BATCH}
    if not batches:
        return bool(facts.axes)
    for node in facts.live:
        above = facts.operand(node, "self")
        if not is_view(node) or Dep.DATA in facts.deps[node.name] or not node.tensor or not above or not above.tensor:
            continue
        pairs = zip(above.tensor.shape, above.tensor.shape[1:], strict=False)
        folded = {multiply(left, right) for left, right in pairs if left in batches and right != 1}
        if folded & set(node.tensor.shape) - set(above.tensor.shape) and facts.from_index(node.name):
            return True
    for edge in facts.plan.frontier:
        batch = [d for d, dim in enumerate(edge.labels) if any(f.axis == BATCH for f in dim)]
        seq = [d for d, dim in enumerate(edge.labels) if any(f.is_seq for f in dim)]
        if batch and seq and seq[0] < batch[0]:
            return True
    return False


def _labels(facts: Facts) -> bool:
    return any(
        node.kind is NodeKind.INPUT and node.fqn == "labels"
        for trail in facts.trails
        if trail.read.code == "BL005"
        for node in trail.nodes
    )


def _distractor(facts: Facts) -> bool:
    """A value of the sequence's length meets data and is no read."""
    read = {(trail.read.node, trail.read.operand) for trail in facts.trails}
    symbols = {atom for length in facts.lengths for atom in atoms(length)}
    for node in facts.live:
        if Dep.DATA not in facts.deps[node.name]:
            continue
        for path, name in node.named_refs():
            value = facts.record.nodes[name]
            if facts.deps[name] & (Dep.USER | Dep.DATA) or (node.name, path) in read or value.tensor is None:
                continue
            if any(size in facts.lengths or atoms(size) & symbols for size in value.tensor.shape):
                return True
    return False


def _user_positions(facts: Facts) -> bool:
    return any(is_positions(node) for node in facts.record.inputs() if node.name in facts.record.live())


@dataclass(frozen=True)
class Pattern:
    """A class of position reads: what it is, and the condition that it occurs."""

    meaning: str
    occurs: Callable[[Facts], bool]


#: The pattern classes of position reads; each occurs in at least three entries.
PATTERNS = {
    "slice": Pattern("rows of a buffer or constant read by slice or narrow", sliced),
    "offset": Pattern("a slice that starts elsewhere than at row 0 (right-aligned, an expression)", offset),
    "index": Pattern("rows of a buffer read by index, index_select, gather or embedding", indexed),
    "full": Pattern("a table read at full length, with no op left", full),
    "computed": Pattern("a table computed in the graph: arange x inv_freq", computed),
    "learned": Pattern("a learned table (parameter) read by position", learned),
    "relative": Pattern("relative bias or relative embedding by distance of row and column", relative),
    "alibi": Pattern("ALiBi", alibi),
    "cumsum_ones": Pattern("positions from a cumsum of ones", cumsum_ones),
    "cumsum_data": Pattern("positions from a cumsum over user data (hoisted)", cumsum_data),
    "length": Pattern("a number made from the sequence length in a value", _length),
    "scale": Pattern("a scale made from positions", _scale),
    "position_ids_buffer": Pattern("an integer buffer of position ids", position_ids),
    "user_positions": Pattern("positions passed by the user", _user_positions),
    "hop": Pattern("a chain inside a wrap_* higher-order op", _hop),
    "hop_consumer": Pattern("a chain inside a wrap_* higher-order op, and its consumer too", _hop_consumer),
    "mask_causal": Pattern("a causal mask computed in the graph", causal),
    "mask_window": Pattern("a sliding-window or chunked mask", window),
    "mask_documents": Pattern("packed-document detection from position ids", documents),
    "mask_padding": Pattern("a padding mask of the user, read by keys", padding),
    "mask_table": Pattern("rows and columns of a mask buffer", mask_table),
    "is_causal": Pattern(
        "sdpa(is_causal=True)", lambda facts: any(r.source_kind == "is_causal" for r in facts.plan.report.reads)
    ),
    "flex": Pattern(
        "flex_attention whose mask_mod or score_mod reads positions",
        lambda facts: any(node.base_op == FLEX_ATTENTION for node in facts.live),
    ),
    "written": Pattern("a table or mask written in place", _written),
    "layout": Pattern("sequence-first, [B*H, 1, S] or flat [T] layout", _layout),
    "equal_buffers": Pattern("aliased FQNs, or buffers of equal content in every layer", equal_buffers),
    "labels": Pattern("the label shift in front of a loss in the graph", _labels),
    "routing": Pattern(
        "mixture-of-experts routing over flattened tokens",
        lambda facts: any("routed to experts" in mix.reason for mix in facts.plan.report.mixing),
    ),
    "two_axes": Pattern("two sequence axes (encoder-decoder)", lambda facts: len(facts.axes) > 1),
    "distractor": Pattern("sequence-sized values that are not positions", _distractor),
    "mixing": Pattern(
        "an op that mixes the sequence: a finding",
        lambda facts: any(not mix.handled for mix in facts.plan.report.mixing),
    ),
}


def occurring(facts: Facts) -> tuple[str, ...]:
    """The names of the classes that occur in a program."""
    return tuple(name for name, pattern in PATTERNS.items() if pattern.occurs(facts))
