"""The JSON of an archive against an explicit schema: typed access with limits, and the enumerations as text.

Every function raises :class:`SchemaError` with one line for what is not as torch.export writes it.
"""

from __future__ import annotations

import json
from typing import Any

from buffer_lifting.graph.shape_grammar import short

MAX_JSON = 256 * 2**20  # bytes of one file
MAX_VALUES = 16_000_000  # commas and brackets in it, an upper bound for the number of values
MAX_NAME = 512
MAX_TEXT = 1 << 16  # characters of a stack trace or a module stack
MAX_DIMS = 64
MAX_DEPTH = 16  # graphs in graphs

#: torch.export's numbers for dtypes -> torch's name and the bytes of an element.
DTYPES = {
    **{1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 6: ("float16", 2)},
    **{7: ("float32", 4), 8: ("float64", 8), 9: ("complex32", 4), 10: ("complex64", 8), 11: ("complex128", 16)},
    **{12: ("bool", 1), 13: ("bfloat16", 2), 28: ("uint16", 2), 29: ("float8_e4m3fn", 1), 30: ("float8_e5m2", 1)},
    **{31: ("float8_e4m3fnuz", 1), 32: ("float8_e5m2fnuz", 1), 33: ("float8_e8m0fnu", 1), 34: ("uint32", 4)},
    35: ("uint64", 8),
}
LAYOUTS = {
    **{1: "torch.sparse_coo", 2: "torch.sparse_csr", 3: "torch.sparse_csc", 4: "torch.sparse_bsr"},
    **{5: "torch.sparse_bsc", 6: "torch._mkldnn", 7: "torch.strided"},
}
STRIDED = 7
MEMORY_FORMATS = {
    **{1: "torch.contiguous_format", 2: "torch.channels_last", 3: "torch.channels_last_3d"},
    4: "torch.preserve_format",
}
_SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


class SchemaError(ValueError):
    """A part of the JSON that is not as the schema has it; one line says which and why."""


def load_json(data: bytes) -> Any:
    """Parses JSON of at most ``MAX_JSON`` bytes and ``MAX_VALUES`` values."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_VALUES:
        raise SchemaError(f"up to {values} values, the limit is {MAX_VALUES}")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise SchemaError("nested too deeply") from None
    except ValueError as error:  # of the decoder, of JSON, or a number with too many digits
        raise SchemaError(f"not valid JSON: {' '.join(str(error).split())[:120]}") from None


def as_dict(value: Any, what: str) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is not dict:
        raise SchemaError(f"{what} is {_kind(value)}, not an object")
    return value


def as_list(value: Any, what: str) -> list[Any]:
    """A JSON array."""
    if type(value) is not list:
        raise SchemaError(f"{what} is {_kind(value)}, not a list")
    return value


def as_dims(value: Any, what: str) -> list[Any]:
    """An array of as many entries as a tensor may have dims."""
    if len(as_list(value, what)) > MAX_DIMS:
        raise SchemaError(f"{what} has {len(value)} dims, the limit is {MAX_DIMS}")
    return list(value)


def as_dim(value: Any, what: str) -> int:
    """The number of a dim, or how many there are."""
    if as_count(value, what) > MAX_DIMS:
        raise SchemaError(f"{what} is {value}, the limit is {MAX_DIMS}")
    return int(value)


def as_int(value: Any, what: str) -> int:
    """An integer of at most 64 bits."""
    if type(value) is not int:
        raise SchemaError(f"{what} is {_kind(value)}, not an integer")
    if not -(2**63) <= value < 2**64:
        raise SchemaError(f"{what} does not fit 64 bits")
    return value


def as_count(value: Any, what: str) -> int:
    """A non-negative integer."""
    if as_int(value, what) < 0:
        raise SchemaError(f"{what} is negative")
    return int(value)


def as_float(value: Any, what: str) -> float:
    """A float; infinities and NaN are written as strings."""
    if type(value) is str and value in _SPECIAL_FLOATS:
        return _SPECIAL_FLOATS[value]
    if type(value) is int:
        return float(as_int(value, what))
    if type(value) is not float:
        raise SchemaError(f"{what} is {_kind(value)}, not a float")
    return value


def as_bool(value: Any, what: str) -> bool:
    """A truth value."""
    if type(value) is not bool:
        raise SchemaError(f"{what} is {_kind(value)}, not true or false")
    return value


def as_text(value: Any, what: str, limit: int = MAX_TEXT) -> str:
    """A string of at most ``limit`` characters, with any characters."""
    if type(value) is not str:
        raise SchemaError(f"{what} is {_kind(value)}, not a string")
    if len(value) > limit:
        raise SchemaError(f"{what} has {len(value)} characters, the limit is {limit}")
    return value


def as_name(value: Any, what: str) -> str:
    """A name that may be shown: a string of printable characters."""
    text = as_text(value, what, MAX_NAME)
    if not text or not text.isprintable():
        raise SchemaError(f"{what} {short(text)} is not a name")
    return text


def as_identifier(value: Any, what: str) -> str:
    """The name of a node."""
    text = as_text(value, what, MAX_NAME)
    if not text.isidentifier():
        raise SchemaError(f"{what} {short(text)} is not an identifier")
    return text


def as_union(value: Any, what: str) -> tuple[str, Any]:
    """A tagged union: an object with one key, which says what its value is."""
    if type(value) is not dict or len(value) != 1:
        raise SchemaError(f"{what} is not an object with one field")
    ((tag, item),) = value.items()
    return tag, item


def field(value: dict[str, Any], key: str, what: str) -> Any:
    """A required field."""
    if key not in value:
        raise SchemaError(f"{what} has no {key!r}")
    return value[key]


def shown(text: str) -> str:
    """Text from the file for a terminal: what is not printable (escapes, bidirectional marks) becomes ``?``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def dtype_name(value: Any, what: str) -> str:
    """The name of a dtype (``"float32"``) by torch.export's number."""
    number = as_int(value, what)
    if number not in DTYPES:
        raise SchemaError(f"{what} is the unknown dtype {number}")
    return DTYPES[number][0]


def device_name(value: Any, what: str) -> str:
    """A device as torch writes it: ``"cuda:0"``."""
    device = as_dict(value, what)
    kind = as_identifier(field(device, "type", what), what)
    index = device.get("index")
    return kind if index is None else f"{kind}:{as_count(index, what)}"


def enum_name(value: Any, names: dict[int, str], what: str) -> str:
    """The name of an enumeration's number."""
    number = as_int(value, what)
    if number not in names:
        raise SchemaError(f"{what} is unknown: {number}")
    return names[number]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
