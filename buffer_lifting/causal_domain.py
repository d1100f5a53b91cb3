"""What is known of every element of a tensor: the values that :mod:`buffer_lifting.causal_proof` calculates with.

A dim is numbered from the right (``-1`` is the last), so that broadcasting moves none. ``distance`` is the index along
one dim less that along a dim right of it: row less column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from buffer_lifting.graph.sizes import Ranges, Size, add, bounds, multiply

Number = bool | int | float
_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing is known; ``why`` names the op or the source that stands in the way."""

    why: str


@dataclass(frozen=True, slots=True)
class Affine:
    """An integer ``const + sum(coefficient * index along dim)``; ``coefs`` are pairs of dim and coefficient."""

    const: Size
    coefs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Steps:
    """A number that depends on the distance alone: ``values[k]`` from ``breaks[k - 1]`` up to below ``breaks[k]``.

    ``pair`` are the two dims of the distance; a value without breaks is the same everywhere and has no pair.
    """

    values: tuple[Number, ...]
    breaks: tuple[int, ...] = ()
    pair: tuple[int, int] = (0, 0)

    def at(self, distance: int) -> Number:
        """The value at one distance."""
        return self.values[sum(start <= distance for start in self.breaks)]


Value = Unknown | Affine | Steps


def uniform(number: Number) -> Steps:
    """The same number everywhere."""
    return Steps((number,))


def affine(const: Size, coefs: Mapping[int, int]) -> Value:
    """A linear function of indices, in its simplest form; large numbers, which could overflow, are not followed."""
    kept = tuple(sorted((dim, coefficient) for dim, coefficient in coefs.items() if coefficient))
    numbers = [abs(coefficient) for _, coefficient in kept]
    numbers += [abs(const)] if isinstance(const, int) else [abs(coefficient) for _, coefficient in const.terms]
    if any(number >= _LIMIT for number in numbers):
        return Unknown("its indices have large factors")
    return Affine(const, kept) if kept or not isinstance(const, int) else uniform(const)


def as_affine(value: Value) -> Affine | None:
    """A value as a linear function of indices, if it is one."""
    if isinstance(value, Affine):
        return value
    if isinstance(value, Steps) and not value.breaks and type(value.values[0]) is int:
        return Affine(value.values[0])
    return None


def combined(left: Affine, right: Affine, factor: int) -> Value:
    """``left + factor * right``."""
    coefs = dict(left.coefs)
    for dim, coefficient in right.coefs:
        coefs[dim] = coefs.get(dim, 0) + factor * coefficient
    return affine(add(left.const, multiply(factor, right.const)), coefs)


def steps(values: Iterable[Number], breaks: Iterable[int], pair: tuple[int, int]) -> Steps:
    """Steps in their simplest form: neighbours of equal value are one."""
    first, *rest = values
    kept, starts = [first], []
    for start, value in zip(breaks, rest, strict=True):
        if value != kept[-1] or type(value) is not type(kept[-1]):
            kept.append(value)
            starts.append(start)
    return Steps(tuple(kept), tuple(starts), pair if starts else (0, 0))


# -- numbers of a dtype ------------------------------------------------------------------------------------------

_EXPONENT_AND_BITS = {"float16": (15, 10), "bfloat16": (127, 7), "float32": (127, 23), "float64": (1023, 52)}
_LARGEST_INTEGER = {"int8": 127, "uint8": 127, "int16": 2**15 - 1, "int32": 2**31 - 1, "int64": 2**53}


def lowest(dtype: str) -> float:
    """``torch.finfo(dtype).min``."""
    exponent, bits = _EXPONENT_AND_BITS[dtype]
    return -(2.0 - 2.0**-bits) * 2.0**exponent


def as_dtype(value: Number, dtype: str) -> Number | None:
    """A number as a dtype holds it; ``None`` where it would be rounded, or might be."""
    if value != value:  # nan
        return None
    if dtype == "bool":
        return bool(value)
    if dtype in _LARGEST_INTEGER:
        whole = isinstance(value, int) or value.is_integer()
        fits = whole and (0 if dtype == "uint8" else -_LARGEST_INTEGER[dtype]) <= value <= _LARGEST_INTEGER[dtype]
        return int(value) if fits else None
    if dtype not in _EXPONENT_AND_BITS:
        return None
    number = float(value)
    if number in (float("inf"), -float("inf")) or abs(number) == -lowest(dtype):
        return number
    if number.is_integer() and abs(number) <= 256:
        return number
    exponent, bits = _EXPONENT_AND_BITS[dtype]
    if exponent < 1023 and abs(number) >= (2.0 - 2.0 ** -(bits + 1)) * 2.0**exponent:  # rounds to infinity
        return float("inf") if number > 0 else -float("inf")
    return None


def blocks(value: Number, dtype: str) -> bool:
    """Whether this, added to the score of a key, leaves it the weight 0 beside a key to which 0 is added.

    ``-inf`` does. The lowest number of a dtype with the range of float32 does as long as two scores of one row are less
    than 3e38 apart, and no score is a number beyond that. That of float16 does not: scores can be 65504 apart.
    """
    if value == -float("inf"):
        return True
    return dtype in ("float32", "bfloat16", "float64") and value <= lowest(dtype)


# -- operations ----------------------------------------------------------------------------------------------------


def pointwise(function: Callable[..., Number], dtype: str, *operands: Steps) -> Value:
    """``function`` of the operands' elements, as ``dtype`` holds it."""
    pairs = {operand.pair for operand in operands if operand.breaks}
    if len(pairs) > 1:
        return Unknown("it combines masks over other dims")
    breaks = sorted({start for operand in operands for start in operand.breaks})
    places = [breaks[0] - 1, *breaks] if breaks else [0]
    values = []
    for place in places:
        try:
            value = as_dtype(function(*(operand.at(place) for operand in operands)), dtype)
        except (TypeError, OverflowError):
            value = None
        if value is None:
            return Unknown("it has numbers other than 0, 1, -inf and the lowest of its dtype")
        values.append(value)
    return steps(values, breaks, pairs.pop() if pairs else (0, 0))


def at_least_zero(value: Affine, sizes: Mapping[int, Size], ranges: Ranges) -> Value:
    """Whether ``value >= 0`` at each index; ``sizes`` are those of the dims.

    A function of the distance becomes steps, whatever the sizes: a window stays a window where the sequence happens to
    be shorter.
    """
    pair = tuple(dim for dim, _ in value.coefs)
    if len(pair) == 2 and isinstance(value.const, int) and sum(c for _, c in value.coefs) == 0:
        factor = value.coefs[0][1]
        if factor > 0:
            return Steps((False, True), (-(value.const // factor),), (pair[0], pair[1]))
        return Steps((True, False), (value.const // -factor + 1,), (pair[0], pair[1]))
    least, most = extremes(value, sizes)
    low, high = bounds(least, ranges)[0], bounds(most, ranges)[1]
    if low is not None and low >= 0:
        return uniform(True)
    if high is not None and high < 0:
        return uniform(False)
    return Unknown("it compares positions with something else than positions")


def extremes(value: Affine, sizes: Mapping[int, Size]) -> tuple[Size, Size]:
    """The least and the greatest value over all indices, as sizes."""
    least: Size = value.const
    most: Size = value.const
    for dim, coefficient in value.coefs:
        end = multiply(coefficient, add(sizes[dim], -1))
        if coefficient < 0:
            least = add(least, end)
        else:
            most = add(most, end)
    return least, most


def moved(value: Value, dims: Mapping[int, int]) -> Value:
    """A value whose dims have new numbers; those that it does not depend on need none."""
    if isinstance(value, Affine):
        if any(dim not in dims for dim, _ in value.coefs):
            return Unknown("a view of it folds positions")
        return affine(value.const, {dims[dim]: coefficient for dim, coefficient in value.coefs})
    if not isinstance(value, Steps) or not value.breaks:
        return value
    if any(dim not in dims for dim in value.pair):
        return Unknown("a view of it folds positions")
    left, right = dims[value.pair[0]], dims[value.pair[1]]
    if left < right:
        return Steps(value.values, value.breaks, (left, right))
    return Steps(value.values[::-1], tuple(1 - start for start in value.breaks[::-1]), (right, left))


def substituted(value: Value, indices: Mapping[int, Affine]) -> Value:
    """A value read at other indices: ``indices`` has the index along each of its dims; others stay as they are."""
    if isinstance(value, Affine):
        result: Value = Affine(value.const, tuple((d, c) for d, c in value.coefs if d not in indices))
        for dim, coefficient in value.coefs:
            if dim in indices and isinstance(result, Affine | Steps):
                whole = as_affine(result)
                result = combined(whole, indices[dim], coefficient) if whole else Unknown("its indices are not linear")
        return affine(result.const, dict(result.coefs)) if isinstance(result, Affine) else result
    if not isinstance(value, Steps) or not value.breaks:
        return value
    left, right = (indices.get(dim, Affine(0, ((dim, 1),))) for dim in value.pair)
    distance = combined(left, right, -1)
    if not isinstance(distance, Affine) or not isinstance(distance.const, int) or len(distance.coefs) != 2:
        return Unknown("it is read at indices that are not plain positions")
    (row, factor), (col, other) = distance.coefs
    shift = distance.const
    if (factor, other) == (1, -1):
        return Steps(value.values, tuple(start - shift for start in value.breaks), (row, col))
    if (factor, other) == (-1, 1):
        flipped = tuple(shift + 1 - start for start in value.breaks[::-1])
        return Steps(value.values[::-1], flipped, (row, col))
    return Unknown("it is read at indices that are not plain positions")
