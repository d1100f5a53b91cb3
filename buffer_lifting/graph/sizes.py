"""Symbolic sizes without torch or sympy.

A size is an ``int`` or an :class:`Expr`, a polynomial with integer coefficients whose atoms are symbols
(``"s70"``) or opaque subexpressions (``"Max(0, 53 - s70)"``), which compare by their text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Monomial = tuple[tuple[str, int], ...]  # ((atom, power), ...), sorted by atom; () is the constant term


@dataclass(frozen=True, slots=True)
class Expr:
    """A polynomial over named atoms. ``terms`` is sorted, has no zero coefficient, and is never constant."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in self.terms:
            factors = [atom if power == 1 else f"{atom}**{power}" for atom, power in monomial]
            if coefficient != 1 or not factors:
                factors.insert(0, str(coefficient))
            parts.append("*".join(factors))
        return " + ".join(parts)


Size = int | Expr


def symbol(name: str) -> Expr:
    """The size that is exactly one atom."""
    return Expr(((((name, 1),), 1),))


def _terms(size: Size) -> dict[Monomial, int]:
    if isinstance(size, Expr):
        return dict(size.terms)
    return {(): size} if size else {}


def _make(terms: dict[Monomial, int]) -> Size:
    kept = {monomial: c for monomial, c in terms.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Expr(tuple(sorted(kept.items())))


def add(left: Size, right: Size) -> Size:
    """``left + right``."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    terms = _terms(left)
    for monomial, coefficient in _terms(right).items():
        terms[monomial] = terms.get(monomial, 0) + coefficient
    return _make(terms)


def multiply(left: Size, right: Size) -> Size:
    """``left * right``."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    terms: dict[Monomial, int] = {}
    for a, ca in _terms(left).items():
        for b, cb in _terms(right).items():
            powers = dict(a)
            for atom, power in b:
                powers[atom] = powers.get(atom, 0) + power
            monomial = tuple(sorted(powers.items()))
            terms[monomial] = terms.get(monomial, 0) + ca * cb
    return _make(terms)


def product(sizes: Iterable[Size]) -> Size:
    """The product of all sizes; 1 for none."""
    result: Size = 1
    for size in sizes:
        result = multiply(result, size)
    return result


def divide(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` if it is exact and the divisor is a single term, else ``None``."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    terms = _terms(divisor)
    if len(terms) != 1:
        return 1 if size == divisor else None
    ((by, by_coefficient),) = terms.items()
    result: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(size).items():
        powers = dict(monomial)
        for atom, power in by:
            powers[atom] = powers.get(atom, 0) - power
            if powers[atom] < 0:
                return None
            if not powers[atom]:
                del powers[atom]
        if coefficient % by_coefficient:
            return None
        result[tuple(sorted(powers.items()))] = coefficient // by_coefficient
    return _make(result)


def atoms(size: Size) -> frozenset[str]:
    """The names of the symbols and opaque subexpressions in a size."""
    if isinstance(size, int):
        return frozenset()
    return frozenset(atom for monomial, _ in size.terms for atom, _ in monomial)


def is_symbol(size: Size) -> bool:
    """Whether a size is exactly one symbol, with coefficient and power 1."""
    return isinstance(size, Expr) and len(size.terms) == 1 and size == symbol(next(iter(atoms(size)), ""))


def rename(size: Size, names: dict[str, str]) -> Size:
    """The size with symbols renamed."""
    if isinstance(size, int) or not any(atom in names for atom in atoms(size)):
        return size
    result: Size = 0
    for monomial, coefficient in size.terms:
        term: Size = coefficient
        for atom, power in monomial:
            term = product([term, *[symbol(names.get(atom, atom))] * power])
        result = add(result, term)
    return result
