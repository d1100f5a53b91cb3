"""Which operands of a program are keys: data that runs along the sequence as rows where a reader wants columns.

Under context parallelism a rank has its own rows of every value and, of keys, all columns. A dim changes from the
one to the other where queries meet keys (a product, attention) and where keys are summed over; there, and nowhere
else, a rank needs what the other ranks hold.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from buffer_lifting.errors import UnsupportedReadError
from buffer_lifting.graph.record import GraphRecord, Location, Node, NodeKind, Ref, ScalarMeta
from buffer_lifting.graph.sizes import divide, product
from buffer_lifting.labels import COL, KEYS, ROW, DimLabel, Labels, has_seq, with_role
from buffer_lifting.ops import ATTENTION, FLEX_ATTENTION, MATRIX_OPERANDS, is_pointwise, is_random
from buffer_lifting.partial_losses import partial_losses
from buffer_lifting.plan import LiftPlan

CODE = "BL203"
#: Views and copies along which a gather can move up, to where there are fewer elements to send.
_MOVABLE = frozenset(
    f"aten.{name}"
    for line in [
        "transpose permute unsqueeze squeeze expand clone contiguous reshape view _unsafe_view repeat_interleave",
        "t swapaxes movedim alias",
    ]
    for name in line.split()
)


@dataclass(frozen=True)
class Gather:
    """A value that is gathered along one dim: every rank's rows become the columns of all ranks.

    ``below`` are the values between it and its readers, which run along the columns then; ``readers`` are pairs of
    node and operand path.
    """

    value: str
    dim: int
    axis: str
    below: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyPlan:
    """All gathers of a program, and the labels of its values once they are made."""

    gathers: tuple[Gather, ...]
    exchanges: frozenset[str]  # the attention that exchanges heads for rows, or whose keys go round a ring
    labels: dict[str, tuple[Labels, ...] | None]


def plan_keys(record: GraphRecord, plan: LiftPlan, size: int, strategy: str = "allgather") -> KeyPlan:
    """What makes every attention of a program whole on ``size`` ranks. Linear in the nodes.

    With the strategy ``"alltoall"`` attention exchanges heads for rows, with ``"ring"`` keys go round, and nothing is
    gathered.

    Raises:
        UnsupportedReadError: something that mixes the sequence in a way that a gather of keys does not make whole;
            the message names every such node, its source line and what to do.
    """
    problems = [*_unsupported(record, plan)]
    exchanges = set()
    users = _users(record)
    wanted: dict[tuple[str, int, str], list[tuple[str, str]]] = defaultdict(list)
    for node in record.nodes.values():
        if node.kind is not NodeKind.OP or plan.data_labels.get(node.name) is None:
            continue
        operands = _key_operands(node, plan.data_labels)
        if strategy in _NOT_POSSIBLE and operands:
            problems.extend(_NOT_POSSIBLE[strategy](record, plan, node, size))
            exchanges.add(node.name)
            continue
        for path, dim, axis in operands:
            wanted[(dict(node.named_refs())[path], dim, axis)].append((node.name, path))
    labels = dict(plan.data_labels)
    gathers = []
    for (name, dim, axis), readers in wanted.items():
        own = labels[name]
        assert own is not None
        if len(own[0][dim]) != 1:
            problems.append(_line(record.nodes[name], "its keys are folded with another dim", "unfold them first"))
            continue
        top, top_dim, below = _climb(record, plan.data_labels, users, name, dim, axis, {node for node, _ in readers})
        gathers.append(Gather(top, top_dim, axis, below, tuple(readers)))
        for value in below:
            of_value = labels[value]
            assert of_value is not None
            labels[value] = tuple(tuple(_as_keys(d, axis) for d in each) for each in of_value)
    if problems:
        head = f"{len(problems)} op(s) cannot run on {size} context-parallel ranks:"
        raise UnsupportedReadError("\n".join([head, *problems[:20], *(["..."] if len(problems) > 20 else [])]))
    return KeyPlan(tuple(gathers), frozenset(exchanges), labels)


def _as_keys(dim: DimLabel, axis: str) -> DimLabel:
    return tuple(f._replace(role=COL) if f.axis == axis and f.role == ROW else f for f in dim)


def _key_operands(node: Node, labels: dict[str, tuple[Labels, ...] | None]) -> list[tuple[str, int, str]]:
    """``(operand path, dim, axis)`` of each operand that has rows where ``node`` wants columns."""
    refs = dict(node.named_refs())

    def of(path: str) -> Labels | None:
        known = labels.get(refs.get(path, ""))
        return known[0] if known else None

    found: list[tuple[str, int, str]] = []

    def want(path: str, own: Labels | None, dim: int) -> None:
        if own is not None:
            found.extend((path, dim % len(own), f.axis) for f in own[dim] if f.is_seq and f.role == ROW)

    if node.base_op == ATTENTION:
        want("key", of("key"), -2)
        want("value", of("value"), -2)
        want("attn_mask", of("attn_mask") or None, -1)  # data of the keys, [batch, heads, 1, rows]
    elif node.base_op in MATRIX_OPERANDS:
        left_path, right_path = MATRIX_OPERANDS[node.base_op]
        left, right = of(left_path), of(right_path)
        if left and right and len(left) > 1 and len(right) > 1:
            out = labels[node.name]
            if has_seq(left[-2]) and has_seq(right[-1]):
                keys_first = bool(out) and any(f.role == COL for f in out[0][-2])  # type: ignore[index]
                want(left_path if keys_first else right_path, left if keys_first else right, -2 if keys_first else -1)
            if has_seq(left[-1]) and has_seq(right[-2]):
                want(left_path, left, -1)
                want(right_path, right, -2)
    elif node.base_op == "aten.einsum":
        found.extend(_einsum_keys(node, labels))
    elif is_pointwise(node):
        out = labels[node.name]
        assert out is not None
        for path in refs:
            own = of(path) or ()
            for offset in range(1, min(len(own), len(out[0])) + 1):  # data of the keys that meets the scores
                mine, wanted = own[-offset], out[0][-offset]
                if mine != wanted and has_seq(mine) and mine == with_role(wanted, ROW):
                    want(path, own, -offset)
    return found


def _einsum_keys(node: Node, labels: dict[str, tuple[Labels, ...] | None]) -> list[tuple[str, int, str]]:
    equation, out = node.args.get("equation"), labels.get(node.name)
    if not isinstance(equation, str) or "->" not in equation or not out:
        return []
    left, target = equation.replace(" ", "").split("->")
    of_target = dict(zip(target, out[0], strict=True))
    operands: list[tuple[str, str, Labels]] = []
    for (path, name), letters in zip(node.named_refs(), left.split(","), strict=True):
        own = labels.get(name)
        operands.append((path, letters, own[0] if own else ()))
    roles: dict[str, set[str]] = defaultdict(set)
    for _, letters, dims in operands:
        for letter, dim in zip(letters, dims, strict=False):
            roles[letter] |= {f.role for f in dim if f.is_seq}
    found = []
    for path, letters, dims in operands:
        for place, (letter, dim) in enumerate(zip(letters, dims, strict=False)):
            as_out = {f.role for f in of_target.get(letter, ()) if f.is_seq}
            columns = as_out & set(KEYS) if letter in of_target else roles[letter]
            for factor in dim:
                if factor.is_seq and factor.role == ROW and columns:
                    found.append((path, place, factor.axis))
    return found


def _climb(
    record: GraphRecord,
    labels: dict[str, tuple[Labels, ...] | None],
    users: dict[str, set[str]],
    name: str,
    dim: int,
    axis: str,
    readers: set[str],
) -> tuple[str, int, tuple[str, ...]]:
    """The value above ``name`` with the fewest elements that only ``name`` is made from; its dim; what lies between.

    Grouped-query attention repeats its keys for the heads: they are gathered before that.
    """
    best: tuple[str, int, tuple[str, ...]] = (name, dim, ())
    if not users[name] <= readers:
        return best
    below: list[str] = []
    current = name
    while True:
        node = record.nodes[current]
        if node.kind is not NodeKind.OP or node.base_op not in _MOVABLE:
            return best
        parents = [arg.name for arg in node.args.values() if isinstance(arg, Ref)]
        sizes = [ref for ref in node.refs() if ref != parents[0]] if parents else []
        if not parents or any(not isinstance(record.nodes[ref].meta, ScalarMeta) for ref in sizes):
            return best
        parent = record.nodes[parents[0]]
        known = labels.get(parent.name)
        if not known or parent.tensor is None or users[parent.name] != {current}:
            return best
        places = [d for d, label in enumerate(known[0]) if any(f.axis == axis and f.role == ROW for f in label)]
        if len(places) != 1 or len(known[0][places[0]]) != 1:
            return best
        below.append(current)
        current = parent.name
        top = record.nodes[best[0]].tensor
        assert top is not None
        quotient = divide(product(top.shape), product(parent.tensor.shape))
        if isinstance(quotient, int) and quotient > 1:
            best = (current, places[0], tuple(below))


def _users(record: GraphRecord) -> dict[str, set[str]]:
    users: dict[str, set[str]] = defaultdict(set)
    for node in record.nodes.values():
        for name in node.refs():
            if not isinstance(node.meta, ScalarMeta) and "_assert" not in node.op:
                users[name].add(node.name)
    return users


def _not_exchangeable(record: GraphRecord, plan: LiftPlan, node: Node, size: int) -> list[str]:
    """Why heads cannot be exchanged for rows at ``node``; nothing if they can."""
    other = "strategy='allgather' can do it"
    if node.base_op != ATTENTION:
        why = "heads are exchanged at scaled_dot_product_attention only, and this attention is written out"
        return [_line(node, why, f"{other}, or export with it")]
    refs = dict(node.named_refs())
    for path in ("query", "key", "value"):
        value, known = record.nodes[refs[path]].tensor, plan.data_labels.get(refs[path])
        own = known[0] if known else ()
        if value is None or len(own) != 4 or has_seq(own[1]) or [f.role for f in own[2]] != [ROW]:
            return [_line(node, f"its {path} is not [batch, heads, rows, head dim]", other)]
        heads = value.shape[1]
        if not isinstance(heads, int) or heads % size:
            return [_line(node, f"{heads} heads of its {path} do not divide by {size} ranks", other)]
    known = plan.data_labels.get(refs.get("attn_mask", ""))
    if known and known[0] and any(f.role == ROW for f in known[0][-1]):
        return [_line(node, "its mask is data of the keys", other)]
    return []


def _not_a_ring(record: GraphRecord, plan: LiftPlan, node: Node, size: int) -> list[str]:
    """Why torch's ring attention cannot take the place of ``node``; nothing if it can."""
    other = "strategy='allgather' and 'alltoall' can do it"
    if node.base_op != ATTENTION:
        why = "torch's ring takes scaled_dot_product_attention only, and this attention is written out"
        return [_line(node, why, "strategy='allgather' can do it, or export with it")]
    if isinstance(node.args.get("attn_mask"), Ref):
        why = "torch's ring takes full attention and is_causal=True only, and this one has a mask"
        hint = "buffer_lifting.causal_flags(program), before lift, turns masks that are proven plain causal into flags"
        return [_line(node, why, f"{other}; {hint}")]
    refs, shapes, axes = dict(node.named_refs()), [], []
    for path in ("query", "key", "value"):
        value, known = record.nodes[refs[path]].tensor, plan.data_labels.get(refs[path])
        own = known[0] if known else ()
        if value is None or len(own) != 4 or has_seq(own[1]) or [f.role for f in own[2]] != [ROW]:
            return [_line(node, f"its {path} is not [batch, heads, rows, head dim]", other)]
        shapes.append(value.shape)
        axes.append(own[2][0].axis)
    (batch, heads, _, features), (_, key_heads, _, _), _ = shapes
    if any(shape[0] != batch or shape[3] != features for shape in shapes) or shapes[2][1] != key_heads:
        return [_line(node, "its query, key and value have other batches, heads or head dims", other)]
    grouped = isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads == 0
    if heads != key_heads and not (grouped and node.args.get("enable_gqa") is True):
        return [_line(node, f"it has {heads} heads and {key_heads} key heads", other)]
    if node.args.get("is_causal") is True and axes[0] != axes[1]:
        return [_line(node, "it is causal between two sequences", "'allgather' and 'alltoall' refuse it as well")]
    return []


#: Why a strategy cannot make an attention whole, by strategy.
_NOT_POSSIBLE = {"alltoall": _not_exchangeable, "ring": _not_a_ring}


def _unsupported(record: GraphRecord, plan: LiftPlan) -> list[str]:
    from buffer_lifting.axis_rules.core import TRANSPOSED

    lines = [_line(*found) for found in partial_losses(record, plan).problems]
    for mix in plan.report.mixing:
        node = record.nodes[mix.node]
        if mix.reason == TRANSPOSED:
            hint = "no rank has all queries; export with another attention implementation"
            lines.append(_line(node, "scores of keys with queries are transposed", hint))
        elif not mix.handled:
            lines.append(_line(node, mix.reason, mix.hint or "see buffer-lifting scan --explain"))
    for node in record.nodes.values():
        known = plan.data_labels.get(node.name)
        if node.base_op == FLEX_ATTENTION:
            hint = "export with scaled_dot_product_attention"
            lines.append(_line(node, "flex_attention is not transformed for more than one rank", hint))
        elif node.base_op == ATTENTION:
            query = plan.data_labels.get(dict(node.named_refs()).get("query", ""))
            key = plan.data_labels.get(dict(node.named_refs()).get("key", ""))
            if is_random(node):
                lines.append(_line(node, "attention dropout draws other numbers on every rank", "set it to 0"))
            if query and key and has_seq(key[0][-2]) and not has_seq(query[0][-2]):
                lines.append(_line(node, "its queries do not run along a sequence", "run it on one rank"))
        elif known and is_random(node) and _has_keys(known[0]):
            lines.append(_line(node, "attention dropout draws other numbers on every rank", "set it to 0"))
    return lines


def _has_keys(labels: Labels) -> bool:
    return any(f.role in KEYS for dim in labels for f in dim if f.is_seq)


def _line(node: Node, why: str, hint: str) -> str:
    place: Location | None = node.location
    where = f" [{place}]" if place else ""
    return f"  {CODE} node {node.name!r} ({node.op}): {why}{where} -> {hint}"
