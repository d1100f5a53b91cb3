"""Reads a ``.pt2`` file into a record without torch, and without running anything from the file.

``torch.export.load`` unpickles the example inputs, and hands size expressions to sympy, which evaluates them: either
runs code of whoever wrote the file. This reader takes the graph's JSON against an explicit schema, sizes by a grammar
of its own, and the raw bytes of buffers. Pickles are not opened, and ops are names. A file that is not as torch.export
writes it is an error of one line.

``archive_zip.py`` reads members, ``archive_schema.py`` and ``archive_values.py`` their JSON; ``archive_graph.py`` makes
nodes, ``archive_inline.py`` inlines bodies, ``archive_state.py`` compares buffers.
"""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

from buffer_lifting.dataflow import written_storage
from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.archive_functional import functionalize
from buffer_lifting.graph.archive_graph import RawGraph, Reader
from buffer_lifting.graph.archive_inline import inline
from buffer_lifting.graph.archive_schema import (
    MAX_JSON,
    SchemaError,
    as_bool,
    as_count,
    as_dict,
    as_identifier,
    as_int,
    as_list,
    as_name,
    as_text,
    as_union,
    field,
    load_json,
)
from buffer_lifting.graph.archive_state import States
from buffer_lifting.graph.archive_zip import ZipArchive
from buffer_lifting.graph.choices import resolve_choices
from buffer_lifting.graph.inconsistent import inconsistent
from buffer_lifting.graph.record import Arg, GraphRecord, Meta, Node, NodeKind, Ref, ScalarMeta, StateKind, TensorMeta
from buffer_lifting.graph.shape_grammar import short
from buffer_lifting.graph.sizes import is_symbol

ARCHIVE_VERSION = "0"
SCHEMA_VERSION = (8, 20)  # of torch 2.13
MODEL = "models/model.json"
_STATES = {
    "parameter": (StateKind.PARAMETER, "parameter_name"),
    "buffer": (StateKind.BUFFER, "buffer_name"),
    "tensor_constant": (StateKind.CONSTANT, "tensor_constant_name"),
}


def read_archive(path: str | os.PathLike[str], window: tuple[int, int] | None = None) -> GraphRecord:
    """The record of the program in a ``.pt2`` file, equal to that of the loaded program with its bodies inlined.

    Reads JSON and, of buffers that could be equal to another, raw bytes. Linear in the size of the graph. ``window`` is
    the offset and length of the archive in the file, if it is not all of it.

    Raises:
        ArchiveError: the file is no archive of one program, damaged, of another version, or beyond the limits.
    """
    path = Path(path)
    collect = gc.isenabled()
    gc.disable()  # millions of small containers, none of them garbage
    try:
        with ZipArchive(path, window) as archive:
            return _read(archive)
    except (ArchiveError, SchemaError) as error:
        raise ArchiveError(f"{path}: {' '.join(str(error).split())}") from None
    except (MemoryError, RecursionError):
        raise ArchiveError(f"{path}: too large or too deeply nested") from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:
        raise inconsistent(path, error) from error
    finally:
        if collect:
            gc.enable()


def _read(archive: ZipArchive) -> GraphRecord:
    _check_versions(archive)
    try:
        program = as_dict(load_json(archive.read(MODEL, MAX_JSON)), "the program")
        _check_schema_version(program)
        record, states = _Program(program).record()
    except SchemaError as error:
        raise SchemaError(f"{MODEL}: {error}") from None
    States(archive).fill(states)
    return record


def _check_versions(archive: ZipArchive) -> None:
    if archive.read("archive_format", 64) != b"pt2":
        raise ArchiveError("its archive_format is not pt2")
    version = archive.read("archive_version", 64)
    if version != ARCHIVE_VERSION.encode():
        raise ArchiveError(f"its archive version is {short(version.decode('ascii', 'replace'))}, not {ARCHIVE_VERSION}")
    models = [name for name in archive.members if name.startswith("models/")]
    if models != [MODEL]:
        raise ArchiveError(f"it has {len(models)} files under models/: exactly {MODEL} can be read")
    if "byteorder" in archive.members and archive.read("byteorder", 64) != b"little":
        raise ArchiveError("its byte order is not little-endian")


def _check_schema_version(program: dict[str, Any]) -> None:
    version = as_dict(field(program, "schema_version", "it"), "schema_version")
    major, minor = (as_int(field(version, key, "schema_version"), key) for key in ("major", "minor"))
    if major != SCHEMA_VERSION[0] or not 0 <= minor <= SCHEMA_VERSION[1]:
        known = ".".join(map(str, SCHEMA_VERSION))
        raise SchemaError(f"schema version {major}.{minor}, this reader knows {SCHEMA_VERSION[0]}.0 to {known}")


class _Program:
    """The JSON of one exported program."""

    def __init__(self, program: dict[str, Any]) -> None:
        module = as_dict(field(program, "graph_module", "the program"), "graph_module")
        signature = as_dict(field(module, "signature", "graph_module"), "signature")
        self.graph = field(module, "graph", "graph_module")
        self.inputs = as_list(field(signature, "input_specs", "signature"), "input_specs")
        self.outputs = as_list(field(signature, "output_specs", "signature"), "output_specs")
        self.ranges = _ranges(as_dict(field(program, "range_constraints", "the program"), "range_constraints"))
        as_list(field(module, "module_call_graph", "graph_module"), "module_call_graph")
        for key in ("verifiers", "guards_code"):
            for item in as_list(program.get(key, []), key):
                as_text(item, key)
        for item in as_dict(field(program, "opset_version", "the program"), "opset_version").values():
            as_count(item, "an opset version")
        self.reader = Reader(self.ranges)

    def record(self) -> tuple[GraphRecord, list[Node]]:
        """The record, and its state nodes, which have no content yet."""
        names: list[str] = []
        states: dict[str, tuple[StateKind, str, bool]] = {}
        for index, item in enumerate(self.inputs):
            name, state = _input_spec(item, f"input spec {index}")
            names.append(name)
            if state is not None:
                states[name] = state
        mutated = self._mutated()
        raw = self.reader.graph(self.graph, names)
        for name, (kind, fqn, persistent) in states.items():
            node = raw.nodes[name]
            if not isinstance(node.meta, TensorMeta):
                raise SchemaError(f"the state {short(fqn)} is not a tensor")
            node.kind, node.state_kind, node.fqn, node.persistent = NodeKind.STATE, kind, fqn, persistent
            node.mutated = fqn in mutated
        hints = self._hints(raw, states)
        nodes, results = inline(raw)
        if not isinstance(results, tuple):
            raise SchemaError("the graph returns no tuple")
        output = Node(_free("output", nodes), NodeKind.OUTPUT, args={"results": results})
        output.meta = tuple(_meta_of(result, nodes) for result in results)
        nodes[output.name] = output
        nodes = functionalize(nodes, _in_no_checkpoint(nodes))
        symbols = self.reader.sizes.symbols
        record = GraphRecord(nodes, {name: pair for name, pair in self.ranges.items() if name in symbols}, hints)
        resolve_choices(record)
        for name in written_storage(record):
            if nodes[name].kind is NodeKind.STATE:
                nodes[name].mutated = True
        return record, [node for node in nodes.values() if node.kind is NodeKind.STATE]

    def _mutated(self) -> set[str]:
        """The FQNs of the buffers that the program writes to, by its signature."""
        mutated = set()
        for index, item in enumerate(self.outputs):
            tag, spec = as_union(item, f"output spec {index}")
            if tag == "buffer_mutation":
                what = f"output spec {index}"
                mutated.add(as_name(field(as_dict(spec, what), "buffer_name", what), what))
        return mutated

    def _hints(self, raw: RawGraph, states: dict[str, tuple[StateKind, str, bool]]) -> dict[str, int]:
        """The size of each symbol in the example inputs, which the JSON repeats."""
        hints: dict[str, int] = {}
        for name, value in raw.input_metas:
            if name in states:
                continue
            for size in value["sizes"]:
                hint = self.reader.sizes.hint(size, f"the tensor {short(name)}")
                if hint is not None:
                    symbol = self.reader.sizes.size(size, name)
                    if is_symbol(symbol):
                        hints.setdefault(str(symbol), hint)
        return hints


def _ranges(values: dict[str, Any]) -> dict[str, tuple[int, int | None]]:
    """The bounds of each size symbol; a size without a lower bound is at least 0."""
    ranges: dict[str, tuple[int, int | None]] = {}
    for name, value in values.items():
        what = f"the range of {short(name)}"
        bounds = as_dict(value, what)
        lower, upper = field(bounds, "min_val", what), field(bounds, "max_val", what)
        low = 0 if lower is None else as_int(lower, what)
        high = None if upper is None else as_int(upper, what)
        if high is not None and high < low:
            raise SchemaError(f"{what} is empty")
        ranges[_measured(name, what)] = (low, high)
    return ranges


#: A size by its text, ``2*s39 + 1``: a name that nothing looks into.
_DERIVED = re.compile(r"[A-Za-z0-9_+*/(), -]{1,200}")


def _measured(name: str, what: str) -> str:
    """What bounds are of: a size symbol, or a size made of some (a derived ``Dim``)."""
    return name if _DERIVED.fullmatch(name) else as_identifier(name, what)


def _in_no_checkpoint(nodes: dict[str, Node]) -> frozenset[str]:
    """The states that no checkpoint holds: constants and buffers that are not persistent."""
    return frozenset(
        node.name
        for node in nodes.values()
        if node.state_kind is StateKind.CONSTANT or (node.state_kind is StateKind.BUFFER and not node.persistent)
    )


def _input_spec(value: Any, what: str) -> tuple[str, tuple[StateKind, str, bool] | None]:
    """The placeholder's name (empty for a constant without one), and what state it is."""
    tag, spec = as_union(value, what)
    spec = as_dict(spec, what)
    if tag in _STATES:
        kind, key = _STATES[tag]
        name = as_identifier(field(as_dict(field(spec, "arg", what), what), "name", what), what)
        persistent = as_bool(field(spec, "persistent", what), what) if tag == "buffer" else True
        return name, (kind, as_name(field(spec, key, what), what), persistent)
    if tag == "constant_input":
        return as_identifier(field(spec, "name", what), what), None
    if tag in ("custom_obj", "token"):
        return as_identifier(field(as_dict(field(spec, "arg", what), what), "name", what), what), None
    if tag != "user_input":
        raise SchemaError(f"{what} has the unknown kind {short(tag)}")
    kind_of, item = as_union(field(spec, "arg", what), what)
    if kind_of in ("as_tensor", "as_custom_obj"):
        return as_identifier(field(as_dict(item, what), "name", what), what), None
    if kind_of in ("as_sym_int", "as_sym_float"):
        inner, name = as_union(item, what)
        if inner == "as_name":
            return as_identifier(name, what), None
    return "", None


def _meta_of(arg: Arg, nodes: dict[str, Node]) -> Meta:
    if isinstance(arg, Ref):
        return nodes[arg.name].meta
    return ScalarMeta(arg) if type(arg) is int else None


def _free(name: str, nodes: dict[str, Node]) -> str:
    candidate, count = name, 0
    while candidate in nodes:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
