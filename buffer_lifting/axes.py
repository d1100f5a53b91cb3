"""Which dims of the user inputs are the batch axis and which are sequence axes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from buffer_lifting.errors import AxesError
from buffer_lifting.graph.record import GraphRecord, Node, StateKind, TensorMeta
from buffer_lifting.graph.sizes import Size, divide, is_symbol, rename
from buffer_lifting.labels import BATCH, COL, ROW, Factor, Labels, feature
from buffer_lifting.ops import FLEX_ATTENTION
from buffer_lifting.program import Axes, AxesInfo, Finding, InputAxes, LiftedInput

SEQ = "seq"
_SUFFIX = re.compile(r"_?(input_ids|inputs?_embeds|hidden_states|token_ids|outputs|tokens|embeds|ids|inputs?)(_\d+)?$")
_SIDES = frozenset({"encoder", "enc", "src", "source", "decoder", "dec", "tgt"})


@dataclass(slots=True)
class InputLabels:
    """The labels of every user input, the size of each axis, and what stood in the way."""

    labels: dict[str, Labels] = field(default_factory=dict)
    batch: Size | None = None
    lengths: dict[str, Size] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)
    opened: dict[str, str] = field(default_factory=dict)  # input that an axis was inferred from -> the axis
    features: frozenset[Size] = frozenset()  # sizes of the parameters' last dims

    def info(self) -> AxesInfo:
        """The axes as the public record."""
        batch = self.batch if isinstance(self.batch, int) else None
        lengths = {name: size if isinstance(size, int) else None for name, size in self.lengths.items()}
        return AxesInfo(batch, lengths, self.batch is not None)


def axes_argument(input_axes: Mapping[str, InputAxes], inputs: Sequence[LiftedInput]) -> Axes:
    """The axes of a lifted program's inputs, user's and lifted, as ``axes=`` takes them."""
    axes: Axes = {}
    for name, own in input_axes.items():
        axes[name] = {dim: f"{axis}:{role}" for dim, axis, role in own.seq_dims}
        if own.batch_dim is not None:
            axes[name][own.batch_dim] = BATCH
    for item in inputs:
        along = f"{item.axis}:{item.role}"
        axes[item.name] = {0: BATCH, 1: along} if item.batched else {0: along}
    return axes


def label_inputs(record: GraphRecord, axes: Axes | None = None) -> InputLabels:
    """Labels from ``axes`` where given, else from the sizes.

    The main input decides: the first integer input of 2 dims (``[batch, seq]``), else the first floating input of
    3 dims (``[batch, seq, feature]``), else the first integer input of 1 dim (flat tokens, ``[seq]``). Its sequence
    axis is ``"seq"``.

    A further integer input ``[batch, n]`` or floating input ``[batch, n, feature]`` whose ``n`` is the length of no
    axis yet has an axis of its own (a mask has none), named after the input without what says that it holds tokens:
    ``"decoder"`` for ``decoder_input_ids``, ``"encoder"`` for ``encoder_hidden_states``, ``"tgt"`` for ``tgt``. An
    input that is named as the other side of an encoder-decoder, but has the length of an axis in the example, is a
    finding: only ``axes=`` can say whether it is the same sequence.

    Every dim of another input that has the size of an axis runs along it; where two axes have one size, it is a
    finding, except that of batch and sequence the leftmost is the batch.

    Raises:
        AxesError: ``axes`` names an input or dim that does not exist, or two sizes for one axis.
    """
    result = InputLabels(hints=record.hints)
    inputs = [node for node in record.inputs() if isinstance(node.meta, TensorMeta)]
    if axes is not None:
        _check_axes(axes, inputs)
    main = _main_input(inputs)
    if axes is None and main is None:
        return result
    given = axes or {}
    names: dict[str, str] = {}
    named = [(name, dim, axis) for name, dims in given.items() for dim, axis in dims.items()]
    for name, dim, axis in sorted(named, key=lambda claim: claim[2].endswith(f":{COL}")):  # rows have the length
        node = next(n for n in inputs if n.fqn == name)
        assert node.tensor is not None
        size = rename(node.tensor.shape[dim % len(node.tensor.shape)], names)
        base, _, role = axis.partition(":")
        if role != COL or not _of_all_ranks(size, result.lengths.get(base)):
            _claim(result, base, size, name, names)
    if main is not None and main.fqn not in given and main.tensor is not None and len(main.tensor.shape) > 1:
        for axis, size in zip((BATCH, SEQ), main.tensor.shape, strict=False):  # of a size that axes= has given
            known = result.batch if axis == BATCH else result.lengths.get(axis)
            if known is not None and is_symbol(known) and is_symbol(size) and _same(size, known, record.hints):
                names.setdefault(str(size), str(known))
    names = {old: new for old, new in names.items() if old != new}
    if names:
        record.rename_symbols(names)
    if main is not None and main.fqn not in given and main.tensor is not None:
        shape = main.tensor.shape
        if len(shape) > 1 and result.batch is None:
            result.batch = shape[0]
        _open_axis(main, shape[1] if len(shape) > 1 else shape[0], given, result, SEQ)
    for node in inputs:
        if node is not main and node.fqn not in given and _has_own_axis(node, result):
            _open_axis(node, node.tensor.shape[1], given, result)  # type: ignore[union-attr]
    _unify_symbols(record, inputs, given, result)
    blocks = _block_inputs(record)
    result.features = _features(record)
    for node in inputs:
        assert node.tensor is not None
        if node.fqn in given:
            result.labels[node.name] = _given_labels(node, given[node.fqn])
        elif node.name in blocks:
            result.labels[node.name] = _block_labels(node, result)
        else:
            result.labels[node.name] = _inferred(node, result)
    return result


def _has_own_axis(node: Node, result: InputLabels) -> bool:
    """Whether an input looks like tokens ``[batch, n]`` or hidden states ``[batch, n, feature]``."""
    meta = node.tensor
    if meta is None or meta.dtype == "bool" or node.fqn.endswith("mask") or result.batch is None:
        return False
    shape = meta.shape
    if len(shape) != (3 if meta.is_floating else 2) or not _same(shape[0], result.batch, result.hints):
        return False
    if meta.is_floating and (not isinstance(shape[2], int) or shape[2] in (1, *result.lengths.values())):
        return False
    return shape[1] not in (1, result.batch)


def _open_axis(node: Node, length: Size, given: Axes, result: InputLabels, wanted: str = "") -> None:
    """Opens an axis for an input (called ``wanted``, if that is free), unless an axis has its length."""
    same = [axis for axis, known in result.lengths.items() if _same(length, known, result.hints)]
    if not same:
        free = bool(wanted) and wanted not in result.lengths
        axis = wanted if free else _axis_name(node.fqn, result.lengths)
        result.lengths[axis] = length
        result.opened[node.name] = axis
        return
    first = next((name for name, axis in result.opened.items() if axis in same), "")
    first = first or next(n for n, dims in given.items() if same[0] in {a.split(":")[0] for a in dims.values()})
    side, declared = node.fqn.split("_")[0], is_symbol(length) and length in result.lengths.values()
    if side in _SIDES and side != first.split("_")[0] and not declared:
        size, name = result.hints.get(str(length), length), _axis_name(node.fqn, result.lengths)
        result.findings.append(
            Finding(
                "BL103",
                f"input {node.fqn!r} has the length of {first!r}, {size}: whether they are one sequence is not known",
                f'pass axes={{"{first}": {{0: "batch", 1: "seq"}}, "{node.fqn}": {{0: "batch", 1: "{name}"}}}} (or '
                '"seq" for both), or export with distinct lengths',
                source=node.fqn,
            )
        )


def _axis_name(name: str, taken: dict[str, Size]) -> str:
    """A stable name for the axis of an input."""
    base = _SUFFIX.sub("", name) or name
    if base in taken or base == BATCH:
        base = name
    return base if base not in taken and base != BATCH else f"{base}_{len(taken)}"


def _features(record: GraphRecord) -> frozenset[Size]:
    """The sizes that the program's features have: those of the last dim of each parameter."""
    parameters = (node.tensor for node in record.nodes.values() if node.state_kind is StateKind.PARAMETER)
    return frozenset(meta.shape[-1] for meta in parameters if meta is not None and meta.shape)


def _is_mask(node: Node) -> bool:
    return "mask" in node.fqn or "bias" in node.fqn


def _may_be_features(node: Node, dims: list[int], result: InputLabels) -> bool:
    """Whether the one dim of a floating input that has the length of a static sequence may as well hold features."""
    meta = node.tensor
    if meta is None or not meta.is_floating or len(dims) != 1 or _is_mask(node):
        return False
    size = meta.shape[dims[0]]
    return isinstance(size, int) and dims[0] == len(meta.shape) - 1 and size in result.features


def _of_all_ranks(size: Size, rows: Size | None) -> bool:
    """Whether keys are as many as the rows of several context-parallel ranks."""
    ranks = None if rows is None or isinstance(rows, int) else divide(size, rows)
    return isinstance(ranks, int) and ranks > 1


def _same(one: Size, other: Size, hints: dict[str, int]) -> bool:
    """Whether two sizes are one, as far as the example inputs tell."""
    if one == other or not (is_symbol(one) and is_symbol(other)):
        return one == other
    sizes = hints.get(str(one)), hints.get(str(other))
    return None in sizes or sizes[0] == sizes[1]


def _block_inputs(record: GraphRecord) -> set[str]:
    """The inputs that only block masks of ``flex_attention`` read: leaves of a BlockMask that the user gives."""
    if not any(node.base_op == FLEX_ATTENTION for node in record.nodes.values()):
        return set()
    inside: set[str] = set()
    elsewhere: set[str] = set()
    for node in record.nodes.values():
        for path, name in node.named_refs():
            own = node.base_op == FLEX_ATTENTION and path.startswith("block_mask.")
            (inside if own else elsewhere).add(name)
    return {node.name for node in record.inputs() if node.name in inside - elsewhere}


def _block_labels(node: Node, result: InputLabels) -> Labels:
    """Numbers and indices of blocks: ``[batch or 1, heads or 1, ...]``, no dim of which runs along the sequence."""
    assert node.tensor is not None
    shape = node.tensor.shape
    labels = [feature(size) for size in shape]
    if result.batch is not None and shape[0] == result.batch and shape[0] != 1:
        labels[0] = (Factor(BATCH, "", shape[0]),)
    return tuple(labels)


def _unify_symbols(record: GraphRecord, inputs: list[Node], given: Axes, result: InputLabels) -> None:
    """Export gives inputs that must agree in size (labels and tokens) symbols of their own: the example tells.

    A symbol stands for an axis if it had that axis's size in the example inputs, and no other axis had it.
    """
    by_size: dict[int, Size] = {}
    clash: dict[int, list[str]] = {}
    own = [(BATCH, result.batch), *result.lengths.items()]
    for axis, size in own:
        hint = record.hints.get(str(size)) if is_symbol(size or 0) else None
        if hint is not None and size is not None and by_size.setdefault(hint, size) != size:
            clash.setdefault(hint, [n for n, s in own if s == by_size[hint]]).append(axis)
    names: dict[str, str] = {}
    for node in inputs:
        shape = node.tensor.shape if node.tensor else ()
        for dim, size in enumerate(shape):
            hint = record.hints.get(str(size))
            if result.batch in shape and size != result.batch and is_symbol(size):
                batch_hint = record.hints.get(str(result.batch))
                if hint == batch_hint and hint not in clash:
                    continue  # export tells this dim from the batch, which the input has: [3, batch, seq]
            if node.fqn in given and dim not in {d % len(node.tensor.shape) for d in given[node.fqn]}:  # type: ignore[union-attr]
                continue
            target = by_size.get(hint) if hint is not None and hint not in clash else None
            if target is not None and size != target and is_symbol(size):
                names[str(size)] = str(target)
            elif hint in clash and is_symbol(size) and all(size != known for _, known in own):
                result.findings.append(
                    Finding(
                        "BL103",
                        f"dim {dim} of input {node.fqn!r} has size {hint} in the example inputs, which is "
                        f"{_both(clash[hint])}",
                        f'pass axes={{"{node.fqn}": {{0: "batch", 1: "{clash[hint][-1]}"}}}}, or export with distinct '
                        "sizes",
                        source=node.fqn,
                    )
                )
    if names:
        record.rename_symbols(names)


def _both(names: list[str]) -> str:
    """Several axes of one size, for a message."""
    if names[0] == BATCH and len(names) == 2:
        return "both the batch size and the sequence length"
    return "the size of the axes " + " and ".join(repr(name) for name in names)


def _check_axes(axes: Axes, inputs: list[Node]) -> None:
    known = {node.fqn: node for node in inputs}
    for name, dims in axes.items():
        node = known.get(name)
        if not isinstance(dims, dict):
            raise AxesError(f'axes= of {name!r} is a mapping from dim to axis, {{0: "batch", 1: "seq"}}, not {dims!r}')
        for axis in dims.values():
            base, _, role = axis.partition(":") if isinstance(axis, str) else ("", "", "")
            if not base or role not in ("", ROW, COL) or (base == BATCH and role):
                raise AxesError(f'axes= of {name!r}: an axis is "batch", "seq", "seq:row" or "seq:col", not {axis!r}')
        if node is None or node.tensor is None:
            raise AxesError(f"axes= names {name!r}, which is not a tensor input; the inputs are {sorted(known)}")
        rank = len(node.tensor.shape)
        for dim in dims:
            if not -rank <= dim < rank:
                raise AxesError(f"axes= gives dim {dim} of {name!r}, which has {rank} dims")


def _claim(result: InputLabels, axis: str, size: Size, name: str, names: dict[str, str]) -> None:
    """Gives an axis its size; a second symbol for the same axis is renamed to the first."""
    known = result.batch if axis == BATCH else result.lengths.get(axis)
    if known is not None and known != size:
        hints = result.hints.get(str(known)), result.hints.get(str(size))
        if is_symbol(known) and is_symbol(size) and (None in hints or hints[0] == hints[1]):
            names[str(size)] = str(known)
            size = known
        elif known == 1 or size == 1:
            size = size if known == 1 else known
        else:
            raise AxesError(f"axes= gives axis {axis!r} of {name!r} the size {size}, but elsewhere it is {known}")
    if axis == BATCH:
        result.batch = size
    else:
        result.lengths[axis] = size


def _given_labels(node: Node, dims: dict[int, str]) -> Labels:
    assert node.tensor is not None
    shape = node.tensor.shape
    by_dim = {dim % len(shape): axis for dim, axis in dims.items()}
    labels = []
    seen: set[str] = set()
    for index, size in enumerate(shape):
        axis, _, role = by_dim.get(index, "").partition(":")
        if not axis:
            labels.append(feature(size))
            continue
        role = "" if axis == BATCH else role or (COL if seen else ROW)
        seen.update({axis} - {BATCH})
        labels.append((Factor(axis, role, size),))
    return tuple(labels)


def _main_input(inputs: list[Node]) -> Node | None:
    def first(floating: bool, rank: int) -> Node | None:
        for node in inputs:
            meta = node.tensor
            if meta and meta.is_floating == floating and len(meta.shape) == rank and meta.dtype != "bool":
                return node
        return None

    return first(False, 2) or first(True, 3) or first(False, 1)


def _inferred(node: Node, result: InputLabels) -> Labels:
    assert node.tensor is not None
    shape = node.tensor.shape
    labels: list[tuple[Factor, ...]] = [feature(size) for size in shape]
    opened = result.opened.get(node.name)
    if opened is not None:
        if len(shape) == 1:
            return ((Factor(opened, ROW, shape[0]),),)
        head = ((Factor(BATCH, "", shape[0]),), (Factor(opened, ROW, shape[1]),))
        return (*head, *labels[2:])
    axes_of = [[axis for axis, length in result.lengths.items() if size == length != 1] for size in shape]
    candidates = [d for d, axes in enumerate(axes_of) if axes]
    batches = [d for d, size in enumerate(shape) if size == result.batch and size != 1]
    if set(batches) & set(candidates):
        if len(shape) == 1 or len(batches) != 2:
            _clash(node, f"dims of size {result.batch}, which is both the batch size and the sequence length", result)
    elif len(batches) > 1:
        result.findings.append(
            Finding(
                "BL103",
                f"input {node.fqn!r} has {len(batches)} dims of the size of the batch, {result.batch}",
                f'pass axes={{"{node.fqn}": {{{batches[-1]}: "batch", ...}}}}, or export with distinct sizes',
                source=node.fqn,
            )
        )
    if batches:
        labels[batches[0]] = (Factor(BATCH, "", shape[batches[0]]),)
        candidates = [d for d in candidates if d != batches[0]]
    if _may_be_features(node, candidates, result):
        what = f"a last dim of {shape[candidates[0]]}, which is the length of the sequence and a number of features"
        _clash(node, what, result)
    # a last dim of a static size may be features; of a dynamic one, or named so, it is the sequence again
    twice = node.tensor.is_floating and len(shape) == 3 and len(candidates) > 1 and type(shape[-1]) is int
    floating_features = twice and shape[-1] in result.features and not _is_mask(node)
    if floating_features:
        _clash(node, f"a last dim of {shape[-1]}, which is the length of the sequence and a number of features", result)
    for index, dim in enumerate(candidates[-2:] if not floating_features else candidates[:1]):
        if len(axes_of[dim]) > 1:
            _clash(node, f"a dim of size {shape[dim]}, which is {_both(axes_of[dim])}", result)
        else:
            labels[dim] = (Factor(axes_of[dim][0], ROW if index == 0 else COL, shape[dim]),)
    return tuple(labels)


def _clash(node: Node, what: str, result: InputLabels) -> None:
    axes = ", ".join(f'{dim}: "{axis}"' for dim, axis in enumerate([BATCH, *list(result.lengths)[:1]]))
    result.findings.append(
        Finding(
            "BL103",
            f"input {node.fqn!r} has {what}",
            f'pass axes={{"{node.fqn}": {{{axes}}}}}, or export with distinct sizes or dynamic dims',
            source=node.fqn,
        )
    )


def as_input_axes(node: Node, labels: Labels, col_only: bool) -> InputAxes:
    """The public record of one input's labels; ``col_only`` when only keys read it."""
    return axes_of(node.fqn, labels, col_only)


def axes_of(name: str, labels: Labels, col_only: bool = False) -> InputAxes:
    """The public record of an input's labels, by the name that it has for a user."""
    batch = None
    seq = []
    for dim, label in enumerate(labels):
        for factor in label:
            if factor.axis == BATCH:
                batch = dim
            elif factor.is_seq:
                seq.append((dim, factor.axis, COL if col_only else factor.role))
    return InputAxes(name, batch, tuple(seq), len(labels))
