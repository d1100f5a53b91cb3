"""What each value depends on: user contents, parameters, state, randomness, storage that is written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Flag, auto

from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.graph.sizes import atoms, symbols
from buffer_lifting.labels import COL, Labels, has_seq, is_labelled
from buffer_lifting.ops import INDICES, content_operands, is_mutating, is_random, is_view, length_operands
from buffer_lifting.variation import Variation


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


_DEPS = [Dep(value) for value in range(2 * Dep.LENGTH.value)]
_USER, _PARAM, _STATE, _IOTA, _DATA = (flag.value for flag in (Dep.USER, Dep.PARAM, Dep.STATE, Dep.IOTA, Dep.DATA))
_RANDOM, _WRITTEN, _LENGTH = Dep.RANDOM.value, Dep.WRITTEN.value, Dep.LENGTH.value
#: The contents of a user input that has dims: a number of the user's (where a slice starts) makes no activations.
_TOKENS = 2 * _LENGTH
_NOT_BY_NUMBERS = ~(_LENGTH | _TOKENS)


def analyse(
    record: GraphRecord, input_labels: dict[str, Labels], positional: frozenset[str] = frozenset()
) -> dict[str, Dep]:
    """The dependence of every node, in one pass. ``positional`` inputs are lifted ones: state, not user contents."""
    written = written_storage(record)
    lengths = frozenset(
        atom for labels in input_labels.values() for dim in labels for f in dim if f.is_seq for atom in atoms(f.size)
    )
    nodes, variation = record.nodes, Variation(record)
    sized = {name for name, node in nodes.items() if _has_length(node, lengths)} if lengths else set()
    whole = {name for name, labels in input_labels.items() if _is_whole(labels)}  # and all whose lengths are theirs
    deps: dict[str, int] = {}  # flags as numbers: arithmetic on the flags themselves is most of the work otherwise
    for node in nodes.values():
        dep = 0
        if node.kind is NodeKind.STATE:
            dep = _PARAM if node.state_kind is StateKind.PARAMETER else _STATE
            if node.mutated:
                dep |= _WRITTEN
        elif node.kind is NodeKind.INPUT:
            dep = _input(record, node, input_labels, positional)
        else:
            contents = content_operands(node)
            for name in contents:
                dep |= deps[name] & _NOT_BY_NUMBERS if isinstance(nodes[name].meta, ScalarMeta) else deps[name]
            if whole and _follows(node, whole, sized, deps):
                whole.add(node.name)
            elif _counts(node, record, contents, deps, sized, variation):
                dep |= _LENGTH
            if node.base_op == "aten.sym_size" or node.base_op in INDICES:
                dep |= _IOTA
            if is_random(node):
                dep |= _RANDOM
            if dep & _TOKENS and dep & _PARAM:
                dep |= _DATA
        if node.name in written and not dep & _DATA:
            dep |= _WRITTEN
        deps[node.name] = dep
    return {name: _DEPS[dep & ~_TOKENS] for name, dep in deps.items()}


def nodes_with(deps: Mapping[str, Dep], flag: Dep) -> frozenset[str]:
    """The nodes whose dependence has a flag (identity costs a fifth of a test of a flag; each value is one object)."""
    having = {id(dep) for dep in _DEPS if flag in dep}
    return frozenset([name for name, dep in deps.items() if id(dep) in having])


def activations_of(
    record: GraphRecord, input_labels: dict[str, Labels], positional: frozenset[str] = frozenset()
) -> set[str]:
    """The nodes that :func:`analyse` finds to be ``DATA`` or ``RANDOM``, in less time: nothing else is asked."""
    nodes = record.nodes
    deps: dict[str, int] = {}
    found = set()
    for name, node in nodes.items():
        dep = 0
        if node.kind is NodeKind.STATE:
            dep = _PARAM if node.state_kind is StateKind.PARAMETER else 0
        elif node.kind is NodeKind.INPUT:
            dep = _input(record, node, input_labels, positional) & (_TOKENS | _DATA)
        else:
            for operand in content_operands(node):
                dep |= deps[operand] & ~_TOKENS if isinstance(nodes[operand].meta, ScalarMeta) else deps[operand]
            if is_random(node):
                dep |= _RANDOM
            if dep & _TOKENS and dep & _PARAM:
                dep |= _DATA
        deps[name] = dep
        if dep & (_DATA | _RANDOM):
            found.add(name)
    return found


def _input(record: GraphRecord, node: Node, input_labels: dict[str, Labels], positional: frozenset[str]) -> int:
    """What an input stands for."""
    if node.name in positional:
        return _STATE
    tangent = record.joint is not None and node.name in record.joint.tangents
    has_dims = node.tensor is None or bool(node.tensor.shape)
    own = _USER | _TOKENS if has_dims and not isinstance(node.meta, ScalarMeta) else _USER
    return own | _DATA if tangent or _differentiable(node, input_labels.get(node.name)) else own


def _has_length(node: Node, lengths: frozenset[str]) -> bool:
    """Whether a dim of a tensor (of one of several results), or a number, is made from the length of a sequence."""
    if isinstance(node.meta, ScalarMeta):
        return node.meta.size is not None and not lengths.isdisjoint(symbols(node.meta.size))
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    for meta in metas:
        if type(meta) is TensorMeta:
            for size in meta.shape:
                if type(size) is not int and not lengths.isdisjoint(symbols(size)):
                    return True
    return False


def _is_whole(labels: Labels) -> bool:
    """Whether an input runs along the keys alone (``axes=`` says so): it is as long as the sequence on every rank."""
    roles = {factor.role for dim in labels for factor in dim if factor.is_seq}
    return roles == {COL}


def _follows(node: Node, whole: set[str], sized: set[str], deps: dict[str, int]) -> bool:
    """Whether every length that a value is made from, and some is, is that of whole sequences."""
    refs = node.refs()
    if not any([name in whole for name in refs]):
        return False
    return all([name in whole for name in refs if name in sized or deps[name] & _LENGTH])


def _counts(
    node: Node,
    record: GraphRecord,
    contents: Sequence[str],
    deps: dict[str, int],
    sized: set[str],
    variation: Variation,
) -> bool:
    """Whether a number, or a value without a sequence dim of its own, is made from the length of a sequence."""
    nodes = record.nodes
    if isinstance(node.meta, ScalarMeta):
        return node.name in sized or any([deps[name] & _LENGTH for name in node.refs()])
    numbers = {name for name in node.refs() if deps[name] & _LENGTH and isinstance(nodes[name].meta, ScalarMeta)}
    if numbers and not numbers.isdisjoint([name for _, name in length_operands(node)]):
        return True
    if node.name in sized:
        return False
    whole = [name for name in contents if name in sized and nodes[name].tensor is not None]
    if not whole:
        return False
    picks = is_view(node)  # an element of a value whose elements are all equal says nothing of how many there were
    return any([not picks or not variation.is_uniform(name) for name in whole])


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
    if not any(is_mutating(node) for node in record.nodes.values()):
        return written
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
