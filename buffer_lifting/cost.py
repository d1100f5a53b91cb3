"""Sizes at the example inputs, and the bytes of tensors."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from math import prod

from buffer_lifting.graph.record import GraphRecord, TensorMeta
from buffer_lifting.graph.sizes import Size

ITEM_BYTES = {
    "complex128": 16,
    "float64": 8,
    "complex64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
}
#: Where hints have the size of what the example does not tell (the rows that a router counts), and what it is without.
UNKNOWN, DEFAULT_SIZE = "", 128

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


def evaluate(size: Size, hints: dict[str, int]) -> int:
    """A size with its symbols at their example values."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, coefficient in size.terms:
        term = coefficient
        for atom, power in monomial:
            term *= _atom(atom, hints) ** power
        total += term
    return total


def _atom(atom: str, hints: dict[str, int]) -> int:
    if atom in hints:
        return hints[atom]
    if atom.isidentifier():
        return hints.get(UNKNOWN, DEFAULT_SIZE)
    try:
        return _value(_parsed(atom), hints)
    except (SyntaxError, ValueError, ArithmeticError):
        return hints.get(UNKNOWN, DEFAULT_SIZE)


@cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: ast.expr, hints: dict[str, int]) -> int:
    """The value of a subexpression such as ``Max(0, 53 - s70)`` or ``s70//2``; nothing else is evaluated."""
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return hints.get(name, hints.get(UNKNOWN, DEFAULT_SIZE))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, hints)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, hints), _value(right, hints))
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(arg, hints) for arg in args))
    raise ValueError(ast.dump(node))


def example_sizes(record: GraphRecord) -> dict[str, int]:
    """The example's size of each symbol; what it does not tell counts as the tokens of the example.

    Those are the elements of the largest input of integers.
    """
    metas = [node.tensor for node in record.inputs()]
    tokens = [prod(shape_of(meta, record.hints)) for meta in metas if meta is not None and "int" in meta.dtype]
    return {**record.hints, UNKNOWN: max(tokens, default=DEFAULT_SIZE)}


def shape_of(meta: TensorMeta, hints: dict[str, int]) -> tuple[int, ...]:
    """A shape at example sizes."""
    return tuple(evaluate(size, hints) for size in meta.shape)


def tensor_bytes(meta: TensorMeta, hints: dict[str, int]) -> int:
    """Bytes of a tensor at example sizes."""
    return prod(shape_of(meta, hints)) * ITEM_BYTES.get(meta.dtype, 1)


class Bytes:
    """:func:`tensor_bytes` of many tensors, which have few symbolic sizes between them."""

    def __init__(self, hints: dict[str, int]) -> None:
        self.hints = hints
        self._known: dict[int, tuple[int, Size]] = {}  # by identity, of sizes that are kept

    def of(self, meta: TensorMeta) -> int:
        """Bytes of a tensor at example sizes."""
        total = ITEM_BYTES.get(meta.dtype, 1)
        for size in meta.shape:
            if type(size) is int:
                total *= size
                continue
            known = self._known.get(id(size))
            if known is None:
                known = self._known[id(size)] = (evaluate(size, self.hints), size)
            total *= known[0]
        return total
