"""The patterns of ``local_rules`` in words, and which of them came nearest to a value that was refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from buffer_lifting.axis_rules import ruled_ops
from buffer_lifting.graph.record import Arg, GraphRecord, Node, NodeKind, Opaque, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.labels import ROW, Labels, seq_axes
from buffer_lifting.local_rules import rule_docs
from buffer_lifting.loss_chain import NO_SHIFT
from buffer_lifting.ops import FILLS, content_operands, is_mutating, is_pointwise, is_random
from buffer_lifting.ops_table import VIEWS
from buffer_lifting.plan import Refuse
from buffer_lifting.program import PositionRead


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pattern that did not match.

    Attributes:
        title: what it reads; ``needs`` is what it asks for, and ``failed`` which of it does not hold.
        here: the call that it was tried on, as text.
    """

    title: str
    needs: str
    failed: str
    here: str = ""


#: Op -> what its rule reads, and what it needs.
PATTERNS: dict[str, tuple[str, str]] = {}


def _pattern(ops: str, title: str, needs: str) -> None:
    PATTERNS.update({f"aten.{op}" if op != "getitem" else op: (title, needs) for op in ops.split()})


_TABLE = "a source made of state alone"
_pattern(
    "slice narrow",
    "rows of a table read by slice",
    f"a start that is constant or made from the length, step 1, {_TABLE}",
)
_pattern(
    "mean prod var std norm linalg_vector_norm logsumexp argmax argmin",
    "a reduction over features",
    "constant dims, none of the sequence's size",
)
_pattern("detach_", "a copy without a gradient", "nothing")
_pattern("select", "one element picked along a dim", "a constant index")
_pattern(
    "embedding",
    "rows of a table read by an index (embedding)",
    "a weight that is the same for every position, an index that can be rebuilt",
)
_pattern("index", "rows of a table read by an index", f"integer indices of dims side by side, {_TABLE}")
_pattern("index_select gather", "rows of a table read by an index", f"an index that follows the sequence, {_TABLE}")
_pattern("bucketize searchsorted", "buckets of distances", "borders in one dim, made of state alone")
_pattern("cat concat concatenate stack", "values joined along features", "a dim that is not the sequence or batch")
_pattern("tril triu", "a triangle of queries and keys", "sequence dims (row, col) at the end, a constant diagonal")
_pattern("eye diag diag_embed", "a diagonal of queries and keys", "two sequence dims (row, col), the main diagonal")
_pattern(
    "view reshape _unsafe_view flatten unflatten squeeze view_as reshape_as",
    "a reshape",
    "batch and sequence dims that are not split, dims of known size",
)
_pattern("repeat", "copies along features or the batch", "no copies along the sequence, a constant number of copies")
_pattern(
    "repeat_interleave",
    "copies of elements of features or for the batch",
    "a dim that is not the sequence, a constant number",
)
_pattern("getitem", "a part of a value that was split", "a split along another dim than the sequence, constant sizes")
_pattern(
    "max min amax amin any all sum",
    "a reduction over the keys",
    "exactly one sequence dim that is reduced, and an op that is exact in any order",
)
_pattern("linear", "a projection of each row", "features that do not run along the sequence")
_pattern("layer_norm rms_norm", "a norm of each row", "normalized dims that do not run along the sequence")
_pattern("matmul bmm mm", "a product of rows and columns", "two matrices, summed over features")
_pattern("einsum", "an einsum over features", "an equation with an output, tensors")
_pattern("pad constant_pad_nd", "a padding of features", "constant widths, no padding along the sequence")
_pattern("permute transpose t numpy_T mT movedim swapaxes", "a permutation", "constant dims")
_pattern("flip roll", "features in another order", "dims that run along neither batch nor sequence")
_pattern("softmax log_softmax", "a softmax over features", "a dim that runs along neither batch nor sequence")
_pattern("slice_scatter select_scatter", "a part of features replaced", "a part of another dim, constant bounds")
_pattern(
    "unsqueeze expand expand_as broadcast_to alias contiguous clone detach view_as_complex view_as_real scalar_tensor",
    "the same value in another layout",
    "an operand that can be rebuilt, dims of known size",
)

#: Kinds of ops, by name. The first that fits counts.
_FAMILIES: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (family, frozenset(f"aten.{op}" for op in ops.split()))
    for family, ops in (
        ("scans", "cumsum cumprod cummax cummin logcumsumexp cumulative_trapezoid diff"),
        ("sorting", "sort argsort topk kthvalue msort unique unique2 _unique2 searchsorted"),
        ("rolls and flips", "roll flip fliplr flipud rot90"),
        (
            "reductions",
            "max min amax amin any all sum mean prod std var std_mean var_mean median nanmedian mode logsumexp norm "
            "linalg_vector_norm argmax argmin aminmax count_nonzero nansum nanmean softmax log_softmax _softmax",
        ),
        (
            "scatter and gather",
            "gather index_select index embedding take take_along_dim masked_select nonzero scatter scatter_add "
            "scatter_reduce index_put index_add index_copy index_fill masked_scatter slice_scatter select_scatter "
            "diagonal_scatter as_strided_scatter one_hot bincount embedding_bag",
        ),
        (
            "joins and repeats",
            "cat concat concatenate stack repeat repeat_interleave tile pad constant_pad_nd tril triu tril_indices "
            "triu_indices block_diag meshgrid cartesian_prod combinations diag diag_embed",
        ),
        (
            "products",
            "matmul mm bmm addmm baddbmm einsum linear dot mv outer tensordot kron cdist chain_matmul "
            "scaled_dot_product_attention bilinear",
        ),
        (
            "convolutions and pooling",
            "conv1d conv2d conv3d conv_transpose1d convolution avg_pool1d avg_pool2d max_pool1d max_pool2d unfold "
            "im2col adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d_with_indices interpolate upsample_nearest1d",
        ),
        ("recurrences", "gru lstm rnn_tanh rnn_relu"),
        ("norms", "layer_norm rms_norm group_norm batch_norm instance_norm native_layer_norm native_group_norm"),
        (
            "views",
            "slice narrow select permute transpose t view reshape flatten unflatten squeeze unsqueeze expand "
            "expand_as broadcast_to movedim swapaxes split chunk split_with_sizes tensor_split unbind view_as "
            "reshape_as alias clone contiguous detach numpy_T mT _unsafe_view",
        ),
    )
)


def family_of(op: str) -> str:
    """The kind of an op by its name without overload; ``""`` for an op of none."""
    base = op if op.endswith("_") is False or op.startswith("aten.__") else op[:-1]
    for family, names in _FAMILIES:
        if base in names:
            return family
    if base.startswith(("aten.fft_", "aten._fft")):
        return "Fourier transforms"
    return "views" if base in VIEWS else ""


def no_rule(base: str, known: Collection[str]) -> str:
    """What an op without a rule needs: the ops of its kind (or of like names) that have one."""
    family = family_of(base)
    names = next((members for name, members in _FAMILIES if name == family), frozenset())
    like = sorted(names & set(known))
    if not like and not family:
        like = difflib.get_close_matches(base, sorted(known), n=3, cutoff=0.8)
    if not like:
        return f"an op with a rule; none of the {family} has one" if family else "an op with a rule"
    shown = ", ".join(name.removeprefix("aten.") for name in like[:8]) + (", ..." if len(like) > 8 else "")
    return f"an op with a rule, {f'as these {family} have' if family else 'as'}: {shown}"


def call_text(record: GraphRecord, node: Node) -> str:
    """A call with its arguments: ``"slice(self=table, dim=0, start=item)"``; defaults that say nothing are left out."""
    parts = [
        f"{key}={_arg(record, arg)}"
        for key, arg in node.args.items()
        if not (arg is None or arg is False or isinstance(arg, Opaque))
    ]
    return f"{node.base_op.removeprefix('aten.') or node.kind.value}({', '.join(parts)})"


def _arg(record: GraphRecord, arg: Arg) -> str:
    if isinstance(arg, Ref):
        node = record.nodes[arg.name]
        if isinstance(node.meta, ScalarMeta):
            size = node.meta.size
            return arg.name if size is None else f"{arg.name} ({size})"
        if isinstance(node.meta, TensorMeta):
            return f"{arg.name}[{', '.join(map(str, node.meta.shape))}]"
        return arg.name
    if isinstance(arg, tuple):
        return f"[{', '.join(_arg(record, item) for item in arg)}]"
    if isinstance(arg, int) and not isinstance(arg, bool) and arg >= 2**62:
        return "end"
    return arg.text if isinstance(arg, Opaque) else repr(arg)


def at_node(
    record: GraphRecord,
    node: Node,
    labels: Labels,
    refusal: Refuse,
    tried: Mapping[str, Refuse],
    above: Collection[str],
) -> tuple[Candidate, ...]:
    """The patterns for a value at which the planner stopped, the nearest first.

    Args:
        record, node, labels: the value, and the labels that it had to be rebuilt with.
        refusal: why it was refused; its node may be a number that the value reads.
        tried: attempt (``"_local"``, ``"cut"``) -> why it failed.
        above: all values that it is computed from.
    """
    local, cut = tried.get("_local"), tried.get("cut")
    first = local or refusal
    failed = str(first) if first.node == node.name else f"{first} (at {first.node})"
    second = str(cut) if cut else str(refusal) if local not in (None, refusal) else ""
    return (_rule(record, node, failed), *_cut(record, node, labels, second, above))


def _rule(record: GraphRecord, node: Node, failed: str) -> Candidate:
    docs, here = rule_docs(), call_text(record, node) if node.kind is NodeKind.OP else ""
    if node.kind is NodeKind.INPUT:
        return Candidate("an input of the user, read as it is", "dims read along the axes that it has", failed)
    if node.kind is NodeKind.STATE:
        return Candidate("a table read at full length", "rows that are not folded, and not written", failed)
    if is_mutating(node):
        return Candidate("the same op out of place", "a value that no op writes to", failed, here)
    if is_random(node):
        return Candidate("a value that is the same in each run", "no random numbers", failed, here)
    known = docs.get(node.base_op)
    if known is None and node.base_op in FILLS:
        return Candidate("a fill", "a constant value, or a number made from the length", failed, here)
    if known is None and is_pointwise(node):
        return Candidate("an elementwise op", "operands that can be rebuilt", failed, here)
    if known is None:
        return Candidate(f"no rule for {node.op}", no_rule(node.base_op, docs), failed, here)
    title, needs = PATTERNS.get(node.base_op, (f"the rule for {node.base_op}", known or "operands that can be rebuilt"))
    return Candidate(title, needs, failed, here)


def _cut(
    record: GraphRecord, node: Node, labels: Labels, refusal: str, above: Collection[str]
) -> tuple[Candidate, ...]:
    axes = sorted(seq_axes(labels), key=lambda pair: (pair[0], pair[1] != ROW))
    failed = [] if axes else ["it does not run along a sequence"]
    if len(axes) > 1:
        failed.append(f"it runs along {' and '.join(f'{axis}:{role}' for axis, role in axes)}")
    nodes = [record.nodes[name] for name in sorted(above)]
    parameter = next((n for n in nodes if n.state_kind is StateKind.PARAMETER), None)
    if parameter is not None:
        failed.append(f"parameter {parameter.fqn!r} is above it and needs its gradient")
    drawn = next((n for n in nodes if n.kind is NodeKind.OP and is_random(n)), None)
    if drawn is not None:
        failed.append(f"{drawn.name!r} draws random numbers")
    if refusal:
        failed.append(refusal)
    if not failed:
        return ()
    needs = "one sequence dim, whole and not folded; no parameter and no random numbers above it"
    return (Candidate("the value itself as a lifted input", needs, "; ".join(failed)),)


def at_frontier(
    record: GraphRecord, consumer: Node, read: PositionRead, reason: str, data: str
) -> tuple[Candidate, ...]:
    """The pattern for a read that was refused where it meets data, before any rule was asked."""
    value = record.nodes[read.value]
    if consumer.kind is NodeKind.OUTPUT:
        return (Candidate("a value that the graph reads", "a consumer that is not the output", reason),)
    here = call_text(record, consumer)
    if isinstance(value.meta, ScalarMeta):
        needs = "an elementwise op or attention that reads it; arithmetic on lengths of sequences above it"
        return (Candidate("a number made from the sequence length", needs, reason, here),)
    known = ruled_ops()
    if consumer.base_op not in known and consumer.op not in known and not is_pointwise(consumer):
        needs = no_rule(consumer.base_op, known)
        return (Candidate(f"no rule for {consumer.op} on data", needs, reason, here),)
    if any(record.nodes[name].kind is NodeKind.INPUT for name in content_operands(value)):
        needs = "one sequence dim that it can be gathered along, no parameter above it"
        return (Candidate("a value of user inputs as a lifted input", needs, reason, here),)
    needs = f"dims that line up with the batch and sequence dims of {data}"
    return (Candidate(f"an operand of {consumer.base_op} that lines up with data", needs, reason, here),)


def at_mixing(record: GraphRecord, node: Node, reason: str, features: Collection[int]) -> tuple[Candidate, ...]:
    """The pattern for an op on data that mixes the sequence, or of which nothing is known.

    ``features`` are the dims of its first operand that run along neither batch nor sequence.
    """
    known = ruled_ops()
    here = call_text(record, node)
    if NO_SHIFT in reason:
        needs = (
            "logits[:, :-k] that one loss alone reads, row by row, with labels[:, k:] of the user's as its targets; "
            "reduction 'sum', or 'mean' without class weights"
        )
        failed = reason.partition(f"{NO_SHIFT}: ")[2]
        return (Candidate("a loss of the next token, shifted by slices", needs, failed, here),)
    if node.base_op not in known and node.op not in known and not is_pointwise(node):
        return (Candidate(f"no rule for {node.op} on data", no_rule(node.base_op, known), reason, here),)
    if features and not {"dim", "dims"}.isdisjoint(node.args):
        needs = f"a dim that runs along features: {' or '.join(map(str, features))}"
    else:
        needs = "batch and sequence dims that the result and its operands have in common"
    return (Candidate(f"{node.base_op} along features", needs, reason, here),)
