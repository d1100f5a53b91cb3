"""What the scan makes of values of user inputs alone, of returned values, and of a program without a sequence axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from buffer_lifting.axis_rules import OVER_KEYS, AxisResult
from buffer_lifting.dataflow import Dep
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, TensorMeta
from buffer_lifting.graph.sizes import product
from buffer_lifting.labels import BATCH, Labels, feature, has_seq, is_labelled
from buffer_lifting.local_rules.core import at_full_length
from buffer_lifting.ops import ATTENTION, content_operands, is_pointwise, is_view
from buffer_lifting.plan import Refuse, Value
from buffer_lifting.planner import Planner
from buffer_lifting.program import Finding

if TYPE_CHECKING:
    from buffer_lifting.frontier import Frontier


#: What ``context_parallel`` has gathered from all ranks (a mask, for attention that exchanges heads) follows the slots.
GATHERED = "_c10d_functional.wait_tensor.default"


def label_user_value(scan: Frontier, node: Node, result: AxisResult | None) -> None:
    """A value of user inputs alone. One that mixed the sequence is only right if it is hoisted: it is marked."""
    operands = content_operands(node)
    if node.op == GATHERED or any(name in scan.distributed for name in operands):
        scan.distributed.add(node.name)
        scan.labels[node.name] = scan.completion.complete(node, None)
        return
    if scan.planner.variation.looks_up_equals(node):
        operands = [name for path, name in node.named_refs() if path == "self"]  # the index tells nothing
    labelled = scan._carries(node)
    lost = result is None or result.outputs is None
    mixes = result is not None and bool(result.mixing) and not result.handled
    if any(name in scan.mixed for name in operands) or (labelled and (lost or mixes)):
        scan.mixed.add(node.name)
    elif any(name in scan.counts for name in operands) or (labelled and result is not None and _of_a_part(result)):
        scan.counts.add(node.name)
    elif labelled and result is not None and result.outputs is not None and _of_all_samples(scan, operands, result):
        # a number of samples may divide a loss, as a number of tokens may
        (scan.counts if node.base_op in ("aten.sum", "aten.count_nonzero") else scan.mixed).add(node.name)
    outputs = result.outputs if result else None
    labels = scan.completion.complete(node, outputs) or _same_shape(scan, node)
    if not any(has_seq(dim) for own in labels or () for dim in own):
        labels = _resized(scan, node) or labels
    scan.labels[node.name] = labels


def _of_a_part(result: AxisResult) -> bool:
    """Whether a reduction is over tokens of which a rank has a part: keys are whole on every rank."""
    return bool(result.mixing) and result.mixing != OVER_KEYS


def _of_all_samples(scan: Frontier, operands: Sequence[str], result: AxisResult) -> bool:
    """Whether a value of samples becomes one of all of them, of which a microbatch has a part."""
    own = [labels for name in operands for labels in scan.labels.get(name) or ()]
    return _along_batch(own) and not _along_batch(result.outputs or ())


def _along_batch(values: Iterable[Labels]) -> bool:
    return any(factor.axis == BATCH for labels in values for dim in labels for factor in dim)


def _same_shape(scan: Frontier, node: Node) -> tuple[Labels, ...] | None:
    """Labels of an op that keeps an operand's shape (roll, cumsum): slot i of the result is still slot i."""
    for name in node.refs():
        known, source = scan.labels.get(name), scan.record.nodes[name].tensor
        metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
        shapes = [meta.shape for meta in metas if isinstance(meta, TensorMeta)]
        if known and source is not None and shapes and all(shape == source.shape for shape in shapes):
            return (known[0],) * len(shapes)
    return None


_RESIZES = frozenset(
    f"aten.{name}" for name in ["slice", "narrow", "cat", "concat", "pad", "constant_pad_nd", "slice_scatter"]
)


def _resized(scan: Frontier, node: Node) -> tuple[Labels, ...] | None:
    """Labels of a part of a static sequence, and of what is as long as the sequence again (ids shifted by one)."""
    meta = node.tensor
    if meta is None or not (node.base_op in _RESIZES or is_pointwise(node) or is_view(node)):
        return None
    for name in node.refs():
        source, known = scan.record.nodes[name].tensor, scan.labels.get(name)
        whole = scan.parts.get(name) or (known[0] if known else None)
        if whole is None or source is None or len(whole) != len(meta.shape):
            continue
        if node.base_op not in _RESIZES and source.shape != meta.shape:
            continue
        if not any(has_seq(dim) for dim in whole):
            continue
        scan.parts[node.name] = whole
        sizes = zip(whole, meta.shape, strict=True)
        return (tuple(dim if product([f.size for f in dim]) == size else feature(size) for dim, size in sizes),)
    return None


#: Why a value that lifting makes one of each sample has no reader.
NO_BATCH = "the data that is computed from it has no batch dim, so that there is no place for values per sample"


def lacks_batch(result: tuple[Labels, ...] | None) -> bool:
    """Whether data runs along the sequence and not along the batch: one value for all samples."""
    axes = {f.axis for own in result or () for dim in own for f in dim}
    return any(has_seq(dim) for own in result or () for dim in own) and BATCH not in axes


def is_number(result: tuple[Labels, ...] | None) -> bool:
    """Whether data has no dim that runs along batch or sequence: a loss has no place for values per sample."""
    return result is not None and not any(is_labelled(dim) for own in result for dim in own)


def number_of_whole(planner: Planner, value: Node) -> Value:
    """A value without sequence dims that meets a loss: made from the whole sequences, once for all samples.

    Raises:
        Refuse: it is made from user inputs, of which every sample has its own.
    """
    if Dep.USER in planner.deps[value.name]:
        raise Refuse(NO_BATCH, value.name, hint="reduce it over the batch too, or the loss for each sample")
    ancestors = [planner.record.nodes[name].tensor for name in sorted(planner.ancestors(value.name))]
    planner.trail.clear()
    return at_full_length(planner, value, [size for meta in ancestors if meta is not None for size in meta.shape])


def report_returned(scan: Frontier, node: Node) -> None:
    """A position value that the program returns stays in natural order."""
    lengths = set(scan.inputs.lengths.values())
    for path, name in node.named_refs():
        value, dep = scan.record.nodes[name], scan.deps[name]
        shape = value.tensor.shape if value.tensor else ()
        known = scan.labels.get(name)
        routed = scan.routing.returned(name, known[0] if known else None)
        if routed:
            scan.reports.mix(value, routed, False, "BL201")
        if name in scan.mixed and Dep.DATA not in dep:
            why = "it is returned, and computed from user inputs by an op that mixes the sequence"
            scan.reports.refused(node, path, value, (), Refuse(why, name, hint="compute it outside the model"))
            continue
        of_length = Dep.LENGTH in dep and not lengths & set(shape)
        if dep & (Dep.USER | Dep.DATA) or value.kind is NodeKind.STATE or not (of_length or lengths & set(shape)):
            continue
        if of_length:
            why = "it is returned, and made from the sequence length: a shard's is another"
            refusal = Refuse(why, name, "BL104", "do not return it from the model's forward")
            scan.reports.refused(node, path, value, (), refusal)
            continue
        why = "it is returned: the caller gets it in natural order, whatever the order of the tokens"
        scan.reports.refused(node, path, value, (), Refuse(why, name, hint="do not return it from the model's forward"))


def under_vmap(scan: Frontier, value: Node) -> Refuse | None:
    """Why a value that is computed under ``torch.vmap`` is refused: its ops stand between calls that hold the level."""
    if not scan.vmapped or scan.vmapped.isdisjoint(scan.planner.ancestors(value.name)):
        return None
    why = "it is computed under torch.vmap, whose hidden dims the export keeps: no part of it runs on its own"
    hint = (
        "write it with broadcasting in the model (queries [:, None] against keys [None, :]), or export and then call "
        "run_decompositions({}), which writes vmap out"
    )
    return Refuse(why, value.name, hint=hint)


def no_axis(record: GraphRecord) -> Finding:
    """The finding of a program whose user inputs have no sequence axis."""
    born = next((node for node in record.nodes.values() if node.base_op == ATTENTION), None)
    names = ", ".join(node.fqn for node in record.inputs()) or "none"
    if born is not None:
        return Finding(
            "BL107",
            f"no user input has a sequence axis (inputs: {names}), yet {born.name!r} attends: the sequence "
            "axis is born inside the graph (image patches, a projection of a flat input)",
            "export the part of the model behind the embedding, whose input is [batch, seq, features]",
            born.location,
        )
    return Finding(
        "BL106",
        f"no user input has a sequence axis (inputs: {names})",
        'pass axes={"input name": {0: "batch", 1: "seq"}}',
    )
