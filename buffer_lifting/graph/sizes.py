"""Symbolic sizes without torch or sympy.

A size is an ``int`` or an :class:`Expr`, a polynomial with integer coefficients whose atoms are symbols
(``"s70"``) or opaque subexpressions (``"Max(0, 53 - s70)"``), which compare by their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_WORD = re.compile(r"[A-Za-z_]\w*")
Monomial = tuple[tuple[str, int], ...]  # ((atom, power), ...), sorted by atom; () is the constant term


@dataclass(frozen=True, slots=True)
class Expr:
    """A polynomial over named atoms. ``terms`` is sorted, has no zero coefficient, and is never constant."""

    terms: tuple[tuple[Monomial, int], ...]
    _atoms: frozenset[str] | None = field(default=None, compare=False, repr=False)  # once they are asked for

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Expr and self.terms == other.terms)

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


#: Integer division, as torch names it in a size.
QUOTIENTS = frozenset({"FloorDiv", "CleanDiv"})


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


_NO_ATOMS: frozenset[str] = frozenset()


def atoms(size: Size) -> frozenset[str]:
    """The names of the symbols and opaque subexpressions in a size."""
    if isinstance(size, int):
        return _NO_ATOMS
    found = size._atoms
    if found is None:
        found = frozenset([atom for monomial, _ in size.terms for atom, _ in monomial])
        object.__setattr__(size, "_atoms", found)
    return found


def symbols(size: Size) -> frozenset[str]:
    """The names of all symbols in a size, those inside opaque subexpressions (``"(s70//4)"``) as well."""
    found = atoms(size)
    if all(atom.isidentifier() for atom in found):
        return found
    return found.union(*(_WORD.findall(atom) for atom in found))


def is_symbol(size: Size) -> bool:
    """Whether a size is exactly one symbol, with coefficient and power 1."""
    return isinstance(size, Expr) and len(size.terms) == 1 and size == symbol(next(iter(atoms(size)), ""))


def rename(size: Size, names: Mapping[str, str] | Mapping[str, Size]) -> Size:
    """The size with atoms renamed, or replaced by sizes."""
    if isinstance(size, int) or not any(atom in names or atom[0] == "(" for atom in atoms(size)):
        return size
    result: Size = 0
    for monomial, coefficient in size.terms:
        term: Size = coefficient
        for atom, power in monomial:
            term = product([term, *[_renamed(atom, names)] * power])
        result = add(result, term)
    return result


_QUOTIENT = re.compile(r"\(\((\d+)\*(\w+)\)//(\w+)\)")


def _renamed(atom: str, names: Mapping[str, str] | Mapping[str, Size]) -> Size:
    """What an atom becomes; ``((4*a)//b)`` is 4 once ``a`` and ``b`` are one size."""
    quotient = _QUOTIENT.fullmatch(atom)
    if quotient is not None:
        factor, left, right = quotient.groups()
        if names.get(left, left) == names.get(right, right):
            return int(factor)
    new = names.get(atom, atom)
    return symbol(new) if isinstance(new, str) else new


def is_choice(atom: str) -> bool:
    """Whether an atom is a ``Max`` or ``Min`` that the ranges did not decide."""
    return atom.startswith(("Max(", "Min("))


def solve(left: Size, right: Size) -> tuple[str, Size] | None:
    """From ``left == right`` the value of an undecided choice that occurs in ``left`` once, with factor 1 or -1."""
    if not isinstance(left, Expr):
        return None
    for monomial, coefficient in left.terms:
        if len(monomial) == 1 and monomial[0][1] == 1 and is_choice(monomial[0][0]) and coefficient in (1, -1):
            atom = monomial[0][0]
            rest = add(left, multiply(-coefficient, symbol(atom)))
            if atom not in atoms(rest):
                return atom, multiply(coefficient, add(right, multiply(-1, rest)))
    return None


Ranges = Mapping[str, tuple[int, int | None]]


def bounds(size: Size, ranges: Ranges) -> tuple[int | None, int | None]:
    """The least and the greatest value of a size, ``None`` where unbounded. Atoms without a range are at least 0."""
    if isinstance(size, int):
        return size, size
    low: int | None = 0
    high: int | None = 0
    for monomial, coefficient in size.terms:
        least, most = coefficient, coefficient
        unbounded = False
        for atom, power in monomial:
            lower, upper = ranges.get(atom, (0, None))
            least *= max(lower, 0) ** power
            unbounded |= upper is None
            most *= (upper or 0) ** power
        if coefficient < 0:
            low = None if unbounded or low is None else low + most
            high = None if high is None else high + least
        else:
            low = None if low is None else low + least
            high = None if unbounded or high is None else high + most
    return low, high


def larger(left: Size, right: Size, ranges: Ranges) -> Size | None:
    """``max(left, right)`` where one is known to be the larger over the whole range, else ``None``."""
    low, high = bounds(add(left, multiply(-1, right)), ranges)
    if low is not None and low >= 0:
        return left
    return right if high is not None and high <= 0 else None
