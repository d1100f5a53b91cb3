"""Ops that work element by element on numbers, as functions of numbers; by name, without ``aten.``."""

from __future__ import annotations

import operator
from collections.abc import Callable

from buffer_lifting.causal_domain import Number

POINTWISE: dict[str, Callable[..., Number]] = {
    "__and__": operator.and_,
    "bitwise_and": operator.and_,
    "__or__": operator.or_,
    "bitwise_or": operator.or_,
    "__xor__": operator.xor,
    "bitwise_xor": operator.xor,
    "logical_and": lambda a, b: bool(a) and bool(b),
    "logical_or": lambda a, b: bool(a) or bool(b),
    "logical_xor": lambda a, b: bool(a) != bool(b),
    "logical_not": lambda a: not a,
    "neg": operator.neg,
    "mul": operator.mul,
}
COMPARISONS: dict[str, Callable[[Number, Number], bool]] = {
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "ne": operator.ne,
}
FILLS: dict[str, Number] = {"ones": 1, "new_ones": 1, "ones_like": 1, "zeros": 0, "new_zeros": 0, "zeros_like": 0}
