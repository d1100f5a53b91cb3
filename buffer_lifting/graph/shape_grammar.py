"""Symbolic sizes from the text that torch.export writes for them: ``Mul(Integer(2), Symbol('s70', integer=True))``.

torch hands that text to sympy, which evaluates it as Python. Here it is parsed by a grammar of its own, with limits on
length, depth and size; nothing is evaluated or looked up by name::

    expression = name "(" item { "," item } ")" | integer | string | "true" | "false"
    item       = expression | name "=" ( "True" | "False" | integer )
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from buffer_lifting.graph.sizes import QUOTIENTS, Expr, Ranges, Size, add, divide, larger, multiply, symbol

MAX_TEXT = 4096
MAX_DEPTH = 32
MAX_TERMS = 64
MAX_POWER = 16
MAX_INT = 2**63

_TOKEN = re.compile(
    r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|(-?[0-9]{1,40}(?![0-9A-Za-z_.]))|'([A-Za-z0-9_.+\-]{1,64})'|([(),=]))"
)
_ARITHMETIC = {"Add", "Mul", "Pow"}
_SIZES = {
    *("FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "Min", "Max", "Abs"),
    *("CeilToInt", "FloorToInt", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv"),
    *("IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat"),
    *("Identity", "Piecewise", "ITE", "floor", "ceiling", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or"),
    *(f"OpaqueUnaryFn_{name}" for name in ("sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos")),
    *(f"OpaqueUnaryFn_{name}" for name in ("atan", "exp", "log", "log2", "asinh")),
}
_CONDITIONS = {
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Xor", "ExprCondPair"),
}
_FUNCTIONS = _SIZES | _CONDITIONS
_ASSUMPTIONS = {
    *(
        "integer",
        "positive",
        "negative",
        "nonnegative",
        "nonpositive",
        "zero",
        "nonzero",
        "real",
        "finite",
        "extended_real",
    ),
    *("rational", "commutative", "even", "odd", "infinite"),
}


class GrammarError(ValueError):
    """A text that is no size of the grammar; one line says why."""


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    items: tuple[_Tree, ...]


@dataclass(frozen=True, slots=True)
class _Text:
    """A string, or a number that is no integer: only an argument of Symbol and Float."""

    text: str


_Tree = _Call | _Text | int | bool


def parse_size(text: str, ranges: Ranges | None = None) -> Size:
    """The size that an expression stands for; what is no polynomial becomes an atom.

    ``Max`` and ``Min`` are resolved where the ranges of their symbols tell which side it is.

    Raises:
        GrammarError: the text is not of the grammar, or larger than the limits.
    """
    size = _size(_Parser(text).whole(), ranges or {})
    terms = size.terms if isinstance(size, Expr) else (((), size),)
    if any(abs(coefficient) > MAX_INT for _, coefficient in terms):
        raise GrammarError(f"a number in a size is larger than 64 bits: {short(text)}")
    return size


def parse_condition(text: str) -> None:
    """Checks the text of a symbolic bool or float, whose value no analysis needs.

    Raises:
        GrammarError: as :func:`parse_size`.
    """
    _Parser(text).whole()


def short(text: str, limit: int = 60) -> str:
    """Text from a file as it can be shown on one line of a terminal."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > MAX_TEXT:
            raise GrammarError(f"a size of {len(text)} characters, the limit is {MAX_TEXT}")
        self.text, self.at = text, 0

    def whole(self) -> _Tree:
        tree = self._expression(0)
        if self.text[self.at :].strip():
            raise self._error()
        return tree

    def _error(self) -> GrammarError:
        return GrammarError(f"{short(self.text)} is no size expression (at character {self.at})")

    def _token(self) -> tuple[str, str]:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            raise self._error()
        self.at = match.end()
        name, number, string, mark = match.groups()
        if name is not None:
            return "name", name
        if number is not None:
            return "number", number
        return ("string", string) if string is not None else (mark, mark)

    def _expect(self, *marks: str) -> str:
        kind, value = self._token()
        if kind not in marks:
            raise self._error()
        return value

    def _expression(self, depth: int) -> _Tree:
        if depth > MAX_DEPTH:
            raise GrammarError(f"a size expression is nested deeper than {MAX_DEPTH}")
        kind, value = self._token()
        if kind == "number":
            return int(value)
        if kind == "string":
            return _Text(value)
        if kind != "name":
            raise self._error()
        if value in ("true", "false"):
            return value == "true"
        if value in ("Symbol", "Integer", "Rational", "Float"):
            return self._leaf(value)
        if value not in _FUNCTIONS and value not in _ARITHMETIC:
            raise GrammarError(f"{short(value)} is no function of size expressions")
        self._expect("(")
        items = []
        while True:
            items.append(self._expression(depth + 1))
            if self._expect(",", ")") == ")":
                return _Call(value, tuple(items))

    def _leaf(self, kind: str) -> _Tree:
        """The rest of ``Symbol('s0', integer=True)``, ``Integer(3)``, ``Rational(1, 2)`` or ``Float('0.5', ...)``."""
        self._expect("(")
        if kind in ("Integer", "Rational"):
            number = int(self._expect("number"))
            if kind == "Integer":
                self._expect(")")
                return number
            self._expect(",")
            text = f"{number}/{int(self._expect('number'))}"
            self._expect(")")
            return _Call("Number", (_Text(text),))
        name = self._expect("string")
        while self._expect(",", ")") == ",":
            key = self._expect("name")
            self._expect("=")
            value = self._expect("name", "number")
            known = value in ("True", "False") and key in _ASSUMPTIONS if kind == "Symbol" else key == "precision"
            if not known:
                raise self._error()
        if kind == "Symbol" and not name.isidentifier():
            raise self._error()
        return _Call("Symbol" if kind == "Symbol" else "Number", (_Text(name),))


# -- sizes ----------------------------------------------------------------------------------------------------


def _size(tree: _Tree, ranges: Ranges | None) -> Size:
    """The size of a tree; without ``ranges`` no choice is resolved."""
    if isinstance(tree, bool | _Text):
        raise GrammarError("a size that is a truth value or a string")
    if isinstance(tree, int):
        return tree
    if tree.name == "Symbol":
        return symbol(_show(tree))
    if tree.name == "Add":
        total: Size = 0
        for item in tree.items:
            total = _limited(add(total, _size(item, ranges)))
        return total
    if tree.name == "Mul":
        return _product([_size(item, ranges) for item in tree.items])
    if tree.name == "Pow" and (exponent := _natural_power(tree)) is not None:
        if exponent > MAX_POWER:
            raise GrammarError(f"a power of {exponent} in a size, the limit is {MAX_POWER}")
        return _product([_size(tree.items[0], ranges)] * exponent)
    if tree.name in ("Max", "Min") and len(tree.items) == 2 and ranges is not None:
        left, right = (_size(item, ranges) for item in tree.items)
        chosen = larger(left, right, ranges)
        if chosen is not None:
            return chosen if tree.name == "Max" else right if chosen == left else left
    if tree.name in QUOTIENTS and len(tree.items) == 2 and ranges is not None:
        exact = divide(*(_size(item, ranges) for item in tree.items))
        if exact is not None:
            return exact
    if tree.name in _CONDITIONS:
        raise GrammarError(f"a size that is a condition ({tree.name})")
    return symbol(_show(tree))


def _natural_power(tree: _Call) -> int | None:
    """The exponent of a power with a positive integer exponent."""
    if len(tree.items) != 2:
        raise GrammarError(f"a power of {len(tree.items)} operands in a size")
    exponent = tree.items[1]
    return exponent if isinstance(exponent, int) and not isinstance(exponent, bool) and exponent > 0 else None


def _product(factors: list[Size]) -> Size:
    result: Size = 1
    for factor in factors:
        result = _limited(multiply(result, factor))
    return result


def _limited(size: Size) -> Size:
    if isinstance(size, Expr) and len(size.terms) > MAX_TERMS:
        raise GrammarError(f"a size with more than {MAX_TERMS} terms")
    return size


# -- the text of an atom, as sympy writes it -----------------------------------------------------------------------


def _show(tree: _Tree) -> str:
    if isinstance(tree, _Text):
        return tree.text
    if isinstance(tree, int):
        return str(tree)
    if tree.name in ("Symbol", "Number"):
        return _show(tree.items[0])
    if tree.name == "Pow" and _natural_power(tree) is None:
        base, exponent = tree.items
        if exponent == -1:
            return f"1/{_operand(base)}"
        return f"{_operand(base)}**{_operand(exponent)}"
    if tree.name in _ARITHMETIC:
        return _polynomial(_size(tree, None))
    if tree.name in QUOTIENTS and len(tree.items) == 2:
        return f"({'//'.join(_operand(item) for item in tree.items)})"
    return f"{tree.name}({', '.join(_show(item) for item in tree.items)})"


def _operand(tree: _Tree) -> str:
    text = _show(tree)
    return text if re.fullmatch(r"\w+(\(.*\))?", text) else f"({text})"


def _factor(atom: str) -> str:
    """A quotient is parenthesized once more in a sum or product."""
    return f"({atom})" if atom.startswith("(") else atom


def _polynomial(size: Size) -> str:
    if isinstance(size, int):
        return str(size)
    atoms = {atom for monomial, _ in size.terms for atom, _ in monomial}
    names = sorted(atoms, key=lambda name: (not name.isidentifier(), name))

    def degrees(term: tuple[tuple[tuple[str, int], ...], int]) -> tuple[int, ...]:
        powers = dict(term[0])
        return tuple(-powers.get(name, 0) for name in names)

    terms = sorted(size.terms, key=degrees)
    if len(terms) == 2 and not terms[1][0] and terms[0][1] < 0 < terms[1][1]:
        terms.reverse()
    text = ""
    for monomial, coefficient in terms:
        factors = [_factor(atom) if power == 1 else f"{_factor(atom)}**{power}" for atom, power in monomial]
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        sign = "-" if coefficient < 0 else "+"
        lead = f" {sign} " if text else ("-" if coefficient < 0 else "")
        text += lead + "*".join(factors)
    return text
