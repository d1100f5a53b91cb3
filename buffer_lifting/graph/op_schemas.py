"""The arguments of aten ops without torch: names, kinds and default values, from the generated table.

A record of the table is parsed when its op is first asked for. An op that is not in the table is unknown: it is
named, never resolved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from buffer_lifting.graph.record import Arg

_NUMBERS = frozenset({"as_int", "as_float", "as_bool", "as_complex", "as_sym_int", "as_sym_float", "as_sym_bool"})
_INTS = frozenset({"as_int", "as_bool", "as_sym_int", "as_sym_bool"})
_LISTS = frozenset({"as_ints", "as_floats", "as_bools", "as_sym_ints", "as_sym_floats", "as_sym_bools"})
_EMPTY = frozenset({"as_tensors"})  # how an empty list of unknown type is written
#: Kind of an argument -> the ways in which a value of it is written.
_WRITTEN = {
    "T": frozenset({"as_tensor", "as_optional_tensor"}) | _NUMBERS,
    "i": _INTS,
    "f": _NUMBERS,
    "b": _INTS,
    "n": _NUMBERS,
    "s": frozenset({"as_string"}),
    "d": frozenset({"as_scalar_type", "as_int"}),
    "v": frozenset({"as_device"}),
    "l": frozenset({"as_layout"}),
    "m": frozenset({"as_memory_format"}),
    "T[]": frozenset({"as_tensors", "as_optional_tensors"}),
    "T?[]": frozenset({"as_tensors", "as_optional_tensors"}),
    "i[]": frozenset({"as_ints", "as_sym_ints"}) | _INTS | _EMPTY,
    "f[]": _LISTS | _NUMBERS | _EMPTY,
    "b[]": frozenset({"as_bools", "as_sym_bools"}) | _INTS | _EMPTY,
    "n[]": _LISTS | _NUMBERS | _EMPTY,
    "s[]": frozenset({"as_strings"}) | _EMPTY,
}
_NONE = frozenset({"as_none"})


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an op."""

    name: str
    written: frozenset[str] | None  # the union fields that a serialized value of it can have; None for any
    has_default: bool
    default: Arg


@lru_cache(maxsize=1)
def _table() -> str:
    from buffer_lifting.ops_schemas import SCHEMAS

    return SCHEMAS.replace("\n", " ")


def arguments_of(op: str) -> tuple[Argument, ...] | None:
    """The arguments of ``"slice.Tensor"`` (an aten op) in the order of its schema; ``None`` for an unknown op.

    An op whose arguments differ between the versions of torch (``~`` in the table) is unknown too.
    """
    words = _record(op)
    if words is None or "~" in words:
        return None
    return tuple(_argument(word) for word in words if not word.startswith("!"))


@lru_cache(maxsize=4096)
def write_of(op: str) -> str | None:
    """Whether ``"aten.add_.Tensor"`` writes to an operand: the op that returns what it writes (``"add.Tensor"``).

    Empty if there is none, ``None`` if the op writes nothing or is not in the table.
    """
    words = _record(op.removeprefix("aten.")) if op.startswith("aten.") else None
    return next((word[1:] for word in words or () if word.startswith("!")), None)


@lru_cache(maxsize=4096)
def _record(op: str) -> tuple[str, ...] | None:
    table = _table()
    key = f" @{op} "
    start = table.find(key)
    if start < 0:
        return None
    end = table.find(" @", start + len(key) - 1)
    return tuple(table[start + len(key) : end if end >= 0 else None].split())


def _argument(text: str) -> Argument:
    text, has_default, default = text.partition("=")
    name, _, kind = text.partition(":")
    base = kind.removesuffix("?")
    written = _WRITTEN.get(base)
    if written is not None and (kind.endswith("?") or default == "null"):
        written = written | _NONE
    value = json.loads(default) if has_default else None
    return Argument(name, written, bool(has_default), tuple(value) if isinstance(value, list) else value)
