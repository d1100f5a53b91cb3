"""What analysis must know of ops. The generated table holds what torch's registry states; the sets here hold
what it does not (no tag says that ``aten.to`` is elementwise)."""

from __future__ import annotations

from collections.abc import Sequence

from buffer_lifting.graph.record import Node
from buffer_lifting.ops_table import MUTATING, POINTWISE, RANDOM, VIEWS

_ELEMENTWISE_UNTAGGED = frozenset(
    f"aten.{name}"
    for name in [
        "__and__",
        "__or__",
        "__xor__",
        "to",
        "_to_copy",
        "type_as",
        "contiguous",
        "dropout",
        "polar",
        "complex",
        "real",
        "imag",
        "conj",
        "_conj",
        "conj_physical",
        "resolve_conj",
        "resolve_neg",
        "abs",
        "positive",
        "square",
        "feature_alpha_dropout",
        "alpha_dropout",
        "lift_fresh_copy",
        "detach_",
        "alias",
        "detach",
        "relu6",
        "selu",
        "softplus",
        "log_sigmoid",
        "hardtanh",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "native_dropout",
        "_fused_rms_norm_none",
        "isin",
        "rad2deg",
        "deg2rad",
        "true_divide",
        "floor_divide",
        "nan_to_num",
        "clip",
        "silu",
        "mish",
        "celu",
        "lift_fresh",
        "__iand__",
        "__ior__",
        "where",
        "masked_fill",
        "prelu",
        "lerp",
        "subtract",
        "multiply",
        "divide",
        "negative",
        "absolute",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "not_equal",
        "fix",
    ]
)
#: Ops whose tensor operands other than the first give only a dtype, device or shape.
_SHAPE_ONLY = frozenset(
    f"aten.{name}"
    for name in [
        "new_ones",
        "new_zeros",
        "new_full",
        "new_empty",
        "new_empty_strided",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "size",
        "numel",
        "is_same_size",
    ]
)
_RECURRENT = ("aten.gru", "aten.lstm", "aten.rnn_relu", "aten.rnn_tanh")
_LIKE_OTHER = ("aten.expand_as", "aten.view_as", "aten.reshape_as")
#: Fills: the same value at every index.
FILLS = frozenset(
    f"aten.{name}"
    for line in [
        "full zeros ones new_ones new_zeros new_full zeros_like ones_like full_like",
        "empty new_empty empty_like",  # no value at all: a write follows, or nothing reads it
    ]
    for name in line.split()
)
#: The two operands of each matrix product.
MATRIX_OPERANDS = {
    "aten.matmul": ("self", "other"),
    "aten.bmm": ("self", "mat2"),
    "aten.mm": ("self", "mat2"),
    "aten.addmm": ("mat1", "mat2"),
    "aten.baddbmm": ("batch1", "batch2"),
}
MATRIX_PRODUCTS = frozenset(MATRIX_OPERANDS)
#: Ops that make an index.
INDICES = frozenset(["aten.arange", "aten.range", "aten.linspace", "aten.tril_indices", "aten.triu_indices"])
ATTENTION = "aten.scaled_dot_product_attention"
#: What fused attention is in graphs of forward and backward, where a flag of its own says that it is causal.
FUSED_ATTENTION = ("aten._scaled_dot_product_flash_attention_for_cpu",)
FUSED_ATTENTION_BACKWARD = tuple(f"{name}_backward" for name in FUSED_ATTENTION)
ATTENTIONS = (ATTENTION, *FUSED_ATTENTION, *FUSED_ATTENTION_BACKWARD)
FLEX_ATTENTION = "hop.flex_attention"
#: Checks without a value; analysis passes over them.
ASSERTIONS = frozenset(
    [
        "aten._assert_tensor_metadata",
        "aten._assert_scalar",
        "aten.sym_constrain_range_for_size",
        "aten._assert_async",
    ]
)


_ELEMENTWISE = frozenset(POINTWISE) | _ELEMENTWISE_UNTAGGED
_LOOKS = frozenset(VIEWS) | {"aten.clone", "aten.to", "aten._to_copy", "aten.detach_"}
_WRITES = frozenset(MUTATING) - {"aten.detach_"}
_DROPOUT = ("aten.dropout", "aten.feature_dropout")
_DRAWS = frozenset([*RANDOM, *_DROPOUT, *ATTENTIONS, *_RECURRENT])
_NOT_ALL_CONTENTS = _SHAPE_ONLY | frozenset(_LIKE_OTHER) | {"aten.type_as", "aten.to"}


def is_pointwise(node: Node) -> bool:
    """Whether each output element depends on the elements of the operands at the same (broadcast) index only."""
    return node.base_op in _ELEMENTWISE and not node.op.startswith("sym.")


def is_view(node: Node) -> bool:
    """Whether the op only looks at the same storage in another way (or copies it unchanged: reshape, clone)."""
    return node.base_op in _LOOKS


def is_mutating(node: Node) -> bool:
    """Whether the op writes to an operand. ``detach_`` (of ``torch.tensor([...])`` in a forward) writes no element."""
    return node.base_op in _WRITES


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers; dropout with probability 0 or outside training draws none."""
    base = node.base_op
    if base not in _DRAWS:
        return False
    if base in _DROPOUT:
        return bool(node.args.get("p")) and bool(node.args.get("train"))
    if base in ATTENTIONS:
        return bool(node.args.get("dropout_p"))
    if base in _RECURRENT:
        return bool(node.args.get("dropout")) and bool(node.args.get("train"))
    return True


def content_operands(node: Node) -> Sequence[str]:
    """The operands whose *contents* the result depends on (not only their shape, dtype or device)."""
    base = node.base_op
    if base not in _NOT_ALL_CONTENTS:
        return node.refs()
    if base in _SHAPE_ONLY:
        return [name for key, name in node.named_refs() if key == "fill_value"]
    if node.op in ("aten.type_as.default", "aten.to.other") or base in _LIKE_OTHER:
        return [name for key, name in node.named_refs() if key == "self"]
    return node.refs()


_SHAPE_ARGUMENTS = frozenset(
    [
        "size",
        "sizes",
        "shape",
        "end",
        "length",
        "repeats",
        "dim",
        "dim0",
        "dim1",
        "dims",
        "start",
        "step",
        "split_size",
        "split_sizes",
        "chunks",
        "sections",
        "target",
        "output_size",
        "input_sizes",
        "k",
        "steps",
        "implicit",
        "normalized_shape",
        "stride",
        "storage_offset",
        "pad",
        "padding",
        "diagonal",
        "offset",
    ]
)


def length_operands(node: Node) -> list[tuple[str, str]]:
    """Path and name of the symbolic numbers that enter a result's contents rather than its shape."""
    if node.base_op in ("aten.select", "aten.slice", "aten.narrow", "aten.select_backward", "aten.slice_backward"):
        return [(path, name) for path, name in node.named_refs() if path in ("index", "start")]
    return [(path, name) for path, name in node.named_refs() if path.partition(".")[0] not in _SHAPE_ARGUMENTS]


#: Reductions that give the same bits in any order.
ORDER_FREE = frozenset(f"aten.{name}" for name in ["max", "min", "amax", "amin", "any", "all"])
