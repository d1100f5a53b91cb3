"""Which operands a node of an exported autocast region has cast, from dtypes alone. Nothing here imports torch.

Export keeps ``with torch.autocast(...)`` as one higher-order op. Its body states the dtypes that autocast produces, but
not the casts. Where the result of an op has another dtype than its operands give it without autocast, its floating
operands are cast to the dtype of the result, as autocast does (https://docs.pytorch.org/docs/stable/amp.html,
op-specific behavior). ``passes/autocast.py`` writes these casts into an fx graph, ``archive_inline.py`` into the record
of an archive; both ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from buffer_lifting.ops_table import POINTWISE

_REAL = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
_WIDTH = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
_CASTS = frozenset({"to", "_to_copy", "type_as"})
#: Ops that promote as pointwise ones do, or take operands of one dtype only: mixed ones are cast.
_PROMOTE = frozenset(f"aten.{name}" for name in ("cat", "stack", "concat", "concatenate", "hstack", "vstack"))
_SAME = frozenset(
    f"aten.{name}"
    for name in """
matmul mm bmm mv dot vdot linear addmm addmv addbmm baddbmm addr einsum chain_matmul linalg_multi_dot linalg_vecdot
conv1d conv2d conv3d convolution _convolution conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d bilinear
scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _native_multi_head_attention kron tensordot
inner outer ger prelu lstm gru lstm_cell gru_cell rnn_tanh rnn_relu rnn_tanh_cell rnn_relu_cell grid_sampler
cosine_similarity cross cdist index_copy scatter_add index_put mse_loss
""".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor operand: its dtype (``"bfloat16"``) and its number of dims."""

    dtype: str
    rank: int


def is_floating(dtype: str) -> bool:
    """Whether autocast casts tensors of this dtype (complex ones it does not)."""
    return dtype in _WIDTH


def cast_dtype(op: str, results: Iterable[str], operands: Sequence[Operand], dtype_given: bool) -> str | None:
    """The dtype that the floating operands of a node in an autocast region are cast to; ``None`` if they are not.

    Args:
        op: with namespace and overload (``"aten.linear.default"``); a higher-order op is never cast.
        results: the dtypes of the node's results, as export recorded them.
        operands: the tensor operands in order, those in lists included.
        dtype_given: whether the call names the dtype of its result.
    """
    expected = next((_REAL.get(dtype, dtype) for dtype in results if dtype in _WIDTH or dtype in _REAL), None)
    parts = op.split(".")
    if expected is None or dtype_given or len(parts) != 3 or parts[1] in _CASTS:
        return None
    values = [Operand(_REAL.get(item.dtype, item.dtype), item.rank) for item in operands]
    values = [item for item in values if item.dtype in _WIDTH]
    return expected if values and _without_autocast(f"{parts[0]}.{parts[1]}", values) != expected else None


def _without_autocast(op: str, values: list[Operand]) -> str | None:
    """The dtype of the result without autocast; ``None`` if the operands' dtypes do not go together."""
    if op in _SAME:
        return values[0].dtype if len({item.dtype for item in values}) == 1 else None
    if op.endswith("_") or not (op in POINTWISE or op in _PROMOTE):
        return values[0].dtype  # a write in place, and most reductions, views and norms
    wide = [item.dtype for item in values if item.rank] or [item.dtype for item in values]
    result = wide[0]
    for dtype in wide[1:]:
        if dtype != result:
            result = "float32" if _WIDTH[dtype] == _WIDTH[result] else max(dtype, result, key=_WIDTH.__getitem__)
    return result
