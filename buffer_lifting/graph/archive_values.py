"""Sizes, tensor metas and arguments of an archive's graph, from their JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from buffer_lifting.graph.archive_schema import (
    LAYOUTS,
    MAX_DIMS,
    MEMORY_FORMATS,
    SchemaError,
    as_bool,
    as_count,
    as_dict,
    as_float,
    as_identifier,
    as_int,
    as_list,
    as_name,
    as_text,
    as_union,
    device_name,
    dtype_name,
    enum_name,
    field,
    shown,
)
from buffer_lifting.graph.record import Arg, Opaque, Ref, ScalarMeta, TensorMeta
from buffer_lifting.graph.shape_grammar import MAX_TEXT, GrammarError, parse_condition, parse_size
from buffer_lifting.graph.sizes import Expr, Ranges, Size, is_symbol

MAX_SHAPE_TERMS = 4096  # of the product of a shape's sizes, which analysis may compute
_SYMBOL = re.compile(r"Symbol\('(\w+)'")


class Sizes:
    """Symbolic sizes by their text; each is parsed once. ``ranges`` are those of the size symbols."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.symbols: set[str] = set()
        self._sizes: dict[str, Size] = {}
        self._checked: set[str] = set()

    def size(self, value: Any, what: str) -> Size:
        """A serialized SymInt."""
        tag, item = as_union(value, what)
        if tag == "as_int":
            return as_int(item, what)
        if tag != "as_expr":
            raise SchemaError(f"{what} is neither an integer nor an expression")
        text = self.text_of(item, what)
        size = self._sizes.get(text)
        if size is None:
            try:
                size = self._sizes[text] = parse_size(text, self.ranges)
            except GrammarError as error:
                raise SchemaError(f"{what}: {error}") from None
            self.symbols.update(_SYMBOL.findall(text))
        return size

    def hint(self, value: Any, what: str) -> int | None:
        """The example size of a serialized SymInt that is exactly one symbol."""
        tag, item = as_union(value, what)
        hint = item.get("hint") if tag == "as_expr" else None
        if hint is None or not is_symbol(self.size(value, what)):
            return None
        tag, number = as_union(hint, what)
        return as_count(number, what) if tag == "as_int" else None

    def check(self, value: Any, plain: str, what: str) -> None:
        """A serialized SymBool or SymFloat, whose value is not needed."""
        tag, item = as_union(value, what)
        if tag == plain:
            (as_bool if plain == "as_bool" else as_float)(item, what)
            return
        if tag != "as_expr":
            raise SchemaError(f"{what} is neither a value nor an expression")
        text = self.text_of(item, what)
        if text not in self._checked:
            try:
                parse_condition(text)
            except GrammarError as error:
                raise SchemaError(f"{what}: {error}") from None
            self.symbols.update(_SYMBOL.findall(text))
            self._checked.add(text)

    def text_of(self, item: Any, what: str) -> str:
        """The text of a serialized expression."""
        return as_text(field(as_dict(item, what), "expr_str", what), what, MAX_TEXT)

    def tensor(self, value: Any, what: str) -> TensorMeta:
        """A serialized tensor meta; strides and offset are checked and dropped."""
        meta = as_dict(value, what)
        sizes = as_list(field(meta, "sizes", what), what)
        strides = as_list(field(meta, "strides", what), what)
        if len(sizes) > MAX_DIMS or len(sizes) != len(strides):
            raise SchemaError(f"{what} has {len(sizes)} sizes and {len(strides)} strides, the limit is {MAX_DIMS}")
        shape = tuple([self.size(size, what) for size in sizes])
        for stride in (*strides, field(meta, "storage_offset", what)):
            self.size(stride, what)
        terms = 1
        for size in shape:
            if isinstance(size, Expr):
                terms *= len(size.terms)
            elif size < 0:
                raise SchemaError(f"{what} has a negative size")
        if terms > MAX_SHAPE_TERMS:
            raise SchemaError(f"{what} has sizes whose product is too large an expression")
        device_name(field(meta, "device", what), what)
        enum_name(field(meta, "layout", what), LAYOUTS, what)
        as_bool(field(meta, "requires_grad", what), what)
        return TensorMeta(shape, dtype_name(field(meta, "dtype", what), what))

    def scalar(self, value: Any, what: str) -> ScalarMeta:
        """A serialized SymInt as the meta of a node."""
        return ScalarMeta(self.size(value, what))


Resolve = Callable[[Any, str], Ref]


def read_argument(tag: str, value: Any, resolve: Resolve, what: str, depth: int = 0) -> Arg:
    """One argument of a call, but for graphs. ``resolve`` returns the reference to a value that is already computed."""
    if tag == "as_tensor":
        return resolve(_tensor_name(value, what), what)
    if tag == "as_none":
        as_bool(value, what)
        return None
    if tag in _SCALARS:
        return _SCALARS[tag](value, what)
    if tag in _SYMBOLIC:
        return _symbolic(value, _SYMBOLIC[tag], resolve, what)
    if tag == "as_optional_tensor":
        return _optional_tensor(value, resolve, what)
    if tag == "as_custom_obj":
        name = as_name(field(as_dict(value, what), "name", what), what)
        try:
            return resolve(name, what)
        except SchemaError:  # a constant of the archive: a pickle, which is not opened
            return Opaque(f"<custom object {name}>")
    if tag == "as_string_to_argument":
        if depth > 4:
            raise SchemaError(f"{what} is nested too deeply")
        for key, item in as_dict(value, what).items():
            as_name(key, what)
            read_argument(*as_union(item, what), resolve, what, depth + 1)
        return Opaque("<mapping>")
    return _list(tag, value, resolve, what)


def _list(tag: str, value: Any, resolve: Resolve, what: str) -> Arg:
    items = as_list(value, what)
    if tag == "as_tensors":
        return tuple([resolve(_tensor_name(item, what), what) for item in items])
    if tag in _SCALAR_LISTS:
        read = _SCALARS[_SCALAR_LISTS[tag]]
        return tuple([read(item, what) for item in items])
    if tag in _SYMBOLIC_LISTS:
        plain = _SYMBOLIC[_SYMBOLIC_LISTS[tag]]
        return tuple([_symbolic(item, plain, resolve, what) for item in items])
    if tag == "as_optional_tensors":
        return tuple([_optional_tensor(item, resolve, what) for item in items])
    if tag == "as_nested_tensors":
        return tuple([tuple([resolve(_tensor_name(t, what), what) for t in as_list(i, what)]) for i in items])
    if tag == "as_int_lists":
        return tuple([tuple([as_int(number, what) for number in as_list(item, what)]) for item in items])
    if tag == "as_float_lists":
        return tuple([tuple([as_float(number, what) for number in as_list(item, what)]) for item in items])
    raise SchemaError(f"{what} has the unknown kind {shown(tag)[:40]!r}")


def _tensor_name(value: Any, what: str) -> str:
    return as_identifier(field(as_dict(value, what), "name", what), what)


def _symbolic(value: Any, plain: str, resolve: Resolve, what: str) -> Arg:
    tag, item = as_union(value, what)
    if tag == "as_name":
        return resolve(as_identifier(item, what), what)
    if tag != plain:
        raise SchemaError(f"{what} has the unknown kind {shown(tag)[:40]!r}")
    return _SCALARS[plain](item, what)


def _optional_tensor(value: Any, resolve: Resolve, what: str) -> Arg:
    tag, item = as_union(value, what)
    if tag == "as_none":
        return None
    if tag != "as_tensor":
        raise SchemaError(f"{what} has the unknown kind {shown(tag)[:40]!r}")
    return resolve(_tensor_name(item, what), what)


def _string(value: Any, what: str) -> Arg:
    return shown(as_text(value, what))


def _dtype(value: Any, what: str) -> Arg:
    return Opaque(f"torch.{dtype_name(value, what)}")


def _device(value: Any, what: str) -> Arg:
    return Opaque(device_name(value, what))


def _layout(value: Any, what: str) -> Arg:
    return Opaque(enum_name(value, LAYOUTS, what))


def _memory_format(value: Any, what: str) -> Arg:
    return Opaque(enum_name(value, MEMORY_FORMATS, what))


def _complex(value: Any, what: str) -> Arg:
    item = as_dict(value, what)
    return Opaque(str(complex(as_float(field(item, "real", what), what), as_float(field(item, "imag", what), what))))


def _operator(value: Any, what: str) -> Arg:
    return Opaque(as_name(value, what))


_SCALARS: dict[str, Callable[[Any, str], Arg]] = {
    "as_int": as_int,
    "as_float": as_float,
    "as_bool": as_bool,
    "as_string": _string,
    "as_scalar_type": _dtype,
    "as_device": _device,
    "as_layout": _layout,
    "as_memory_format": _memory_format,
    "as_complex": _complex,
    "as_operator": _operator,
}
_SYMBOLIC = {"as_sym_int": "as_int", "as_sym_float": "as_float", "as_sym_bool": "as_bool"}
_SCALAR_LISTS = {"as_ints": "as_int", "as_floats": "as_float", "as_bools": "as_bool", "as_strings": "as_string"}
_SYMBOLIC_LISTS = {"as_sym_ints": "as_sym_int", "as_sym_floats": "as_sym_float", "as_sym_bools": "as_sym_bool"}
