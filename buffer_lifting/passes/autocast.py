"""Writes out the casts of an autocast region, so that its body can be inlined.

Export keeps ``with torch.autocast(...)`` as one higher-order op. Its body states the dtypes that autocast produces, but
not the casts. For each op of the body whose result would have another dtype without autocast, its floating operands
are cast to the dtype of the result, as autocast does (https://docs.pytorch.org/docs/stable/amp.html, op-specific
behavior).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.torch_compat import OpOverload, fake_mode_of, quiet_fakes, tree_flatten

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def with_casts(graph: Graph, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The operands of a body node, cast where autocast would (once for each use: an exported region has no cache)."""
    expected = _dtype(node.meta.get("val"))
    if expected is None or not isinstance(node.target, OpOverload) or "dtype" in node.kwargs:
        return args, kwargs
    if _is_cast(node) or _result_dtype(node.target, node, args, kwargs) == expected:
        return args, kwargs
    target = _REAL.get(expected, expected)
    return torch.fx.map_arg((args, kwargs), lambda n: _cast(graph, n, target, node))


def _cast(graph: Graph, node: Node, dtype: torch.dtype, reader: Node) -> Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return node
    made = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    with fake_mode_of(value), torch.no_grad():
        made.meta = {**reader.meta, "val": value.to(dtype)}  # a parameter has no module stack
    return made


def _is_cast(node: Node) -> bool:
    return str(node.target).split(".")[1] in ("to", "_to_copy", "type_as")


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := _dtype(item)) is not None), None)
    if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.dtype
    return None


def _result_dtype(target: OpOverload, node: Node, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype of the result without autocast; ``None`` if the operands' dtypes do not go together."""
    values, named = torch.fx.map_arg((args, kwargs), lambda n: n.meta.get("val"))
    first = next((v for v in tree_flatten((values, named))[0] if isinstance(v, torch.Tensor)), None)
    if first is None:
        return _dtype(node.meta.get("val"))
    try:
        with quiet_fakes(), fake_mode_of(first), torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return _dtype(target(*values, **named))
    except RuntimeError:
        return None
