"""What each value depends on: user contents, parameters, state, randomness, storage that is written to."""

from __future__ import annotations

from enum import Flag, auto

from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.graph.sizes import atoms
from buffer_lifting.labels import Labels, has_seq, is_labelled
from buffer_lifting.ops import INDICES, content_operands, is_mutating, is_random, is_view, length_operands


class Dep(Flag):
    """What a value's contents depend on."""

    NONE = 0
    USER = auto()  # the contents of a user input
    PARAM = auto()  # a parameter
    STATE = auto()  # a buffer or constant
    IOTA = auto()  # an in-graph arange, or a size
    DATA = auto()  # user contents together with parameters, or differentiable user input: an activation
    RANDOM = auto()
    WRITTEN = auto()  # storage that the graph writes to in place
    LENGTH = auto()  # contents made from the length of a sequence, as a number or by a reduction over it


def analyse(
    record: GraphRecord, input_labels: dict[str, Labels], positional: frozenset[str] = frozenset()
) -> dict[str, Dep]:
    """The dependence of every node, in one pass. ``positional`` inputs are lifted ones: state, not user contents."""
    written = written_storage(record)
    lengths = frozenset(
        atom for labels in input_labels.values() for dim in labels for f in dim if f.is_seq for atom in atoms(f.size)
    )
    deps: dict[str, Dep] = {}
    for node in record.nodes.values():
        dep = Dep.NONE
        if node.kind is NodeKind.STATE:
            dep = Dep.PARAM if node.state_kind is StateKind.PARAMETER else Dep.STATE
            if node.mutated:
                dep |= Dep.WRITTEN
        elif node.kind is NodeKind.INPUT:
            dep = Dep.STATE if node.name in positional else Dep.USER
            if Dep.USER in dep and _differentiable(node, input_labels.get(node.name)):
                dep |= Dep.DATA
        else:
            for name in content_operands(node):
                dep |= deps[name] & ~Dep.LENGTH if isinstance(record.nodes[name].meta, ScalarMeta) else deps[name]
            dep |= _length(record, node, deps, lengths)
            if node.base_op == "aten.sym_size" or node.base_op in INDICES:
                dep |= Dep.IOTA
            if is_random(node):
                dep |= Dep.RANDOM
            if Dep.USER in dep and Dep.PARAM in dep:
                dep |= Dep.DATA
        if node.name in written and Dep.DATA not in dep:
            dep |= Dep.WRITTEN
        deps[node.name] = dep
    return deps


def _length(record: GraphRecord, node: Node, deps: dict[str, Dep], lengths: frozenset[str]) -> Dep:
    """Whether a number, or a value without a sequence dim of its own, is made from the length of a sequence."""
    if isinstance(node.meta, ScalarMeta):
        own = node.meta.size is not None and bool(atoms(node.meta.size) & lengths)
        return Dep.LENGTH if own or any(Dep.LENGTH in deps[name] for name in node.refs()) else Dep.NONE
    numbers = (name for _, name in length_operands(node) if isinstance(record.nodes[name].meta, ScalarMeta))
    if any(Dep.LENGTH in deps[name] for name in numbers):
        return Dep.LENGTH
    results = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    if any(_runs_along(meta, lengths) for meta in results):
        return Dep.NONE
    reduced = any(_runs_along(record.nodes[name].meta, lengths) for name in content_operands(node))
    return Dep.LENGTH if reduced else Dep.NONE


def _runs_along(meta: object, lengths: frozenset[str]) -> bool:
    return isinstance(meta, TensorMeta) and any(atoms(size) & lengths for size in meta.shape)


def _differentiable(node: Node, labels: Labels | None) -> bool:
    """A floating input with a feature dim: hidden states. Masks (``[B, S]``, ``[B, 1, S, S]``) have none."""
    meta = node.tensor
    if meta is None or not meta.is_floating or labels is None:
        return False
    if sum(has_seq(dim) for dim in labels) > 1:
        return False
    return any(not is_labelled(dim) and size != 1 for dim, size in zip(labels, meta.shape, strict=True))


def written_storage(record: GraphRecord) -> set[str]:
    """The nodes whose storage some op of the graph writes to: the base of each written view, and all its views."""
    base: dict[str, str] = {}
    written: set[str] = set()
    for node in record.nodes.values():
        first = next((arg for arg in node.args.values() if isinstance(arg, Ref)), None)
        if first is None or not isinstance(node.meta, TensorMeta | tuple):
            continue
        if is_mutating(node):
            base[node.name] = base.get(first.name, first.name)
            written.add(base[node.name])
        elif is_view(node) or node.op == "getitem":
            base[node.name] = base.get(first.name, first.name)
    return {name for name in record.nodes if base.get(name, name) in written} if written else written


def is_length(node: Node) -> bool:
    """Whether a node is a symbolic number rather than a tensor."""
    return isinstance(node.meta, ScalarMeta)
