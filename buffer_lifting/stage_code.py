"""The Python code of a stage: what its graph computes, with torch's own bindings of the ops.

A call of ``torch.ops.aten.view.default(x, [2, 3])`` looks the op up and boxes its arguments; ``x.view([2, 3])`` calls
the same kernel, and costs a microsecond or two less: with small microbatches, several percent of a step. The graph of a
stage stays a graph of aten ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.torch_compat import GELU, SILU

_aten = torch.ops.aten

#: Aten ops whose positional arguments a method of their first operand takes, in the same order.
_METHODS: dict[Any, str] = {
    _aten.view.default: "view",
    _aten.reshape.default: "reshape",
    _aten.transpose.int: "transpose",
    _aten.permute.default: "permute",
    _aten.expand.default: "expand",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.squeeze.dim: "squeeze",
    _aten.flatten.using_ints: "flatten",
    _aten.select.int: "select",
    _aten.type_as.default: "type_as",
    _aten.to.dtype: "to",
    _aten.contiguous.default: "contiguous",
    _aten.sym_size.int: "size",
}

#: Aten ops whose arguments a function of torch takes, in the same order.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: operator.add,
    _aten.sub.Tensor: operator.sub,
    _aten.mul.Tensor: operator.mul,
    _aten.div.Tensor: operator.truediv,
    _aten.neg.default: operator.neg,
    _aten.linear.default: torch.nn.functional.linear,
    _aten.silu.default: SILU,
    _aten.gelu.default: GELU,
    _aten.rms_norm.default: torch.rms_norm,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.embedding.default: torch.embedding,
    _aten.scaled_dot_product_attention.default: torch.nn.functional.scaled_dot_product_attention,
    _aten.view_as_complex.default: torch.view_as_complex,
    _aten.view_as_real.default: torch.view_as_real,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.cos.default: torch.cos,
    _aten.sin.default: torch.sin,
    _aten.matmul.default: torch.matmul,
    _aten.cat.default: torch.cat,
    _aten.stack.default: torch.stack,
}

#: How many positional arguments of an op are taken; with more, or with keywords, the call stays as it is.
_MOST: dict[Any, int] = {_aten.to.dtype: 2}


def spelled(graph: Graph) -> Graph:
    """A copy of ``graph`` in which ops are called by torch's own bindings, where both take the same arguments."""
    copied, env = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        target, most = node.target, _MOST.get(node.target, len(node.args))
        env[node] = new = copied.node_copy(node, env.__getitem__)
        if node.op != "call_function" or node.kwargs or len(node.args) > most:
            continue
        if target in _METHODS:
            new.op, new.target = "call_method", _METHODS[target]
        elif target in _FUNCTIONS:
            new.target = _FUNCTIONS[target]
    return copied
