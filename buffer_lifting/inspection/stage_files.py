"""Checks a saved partition from its JSON, without torch: what its report refused, and the shape of its stages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.archive_schema import (
    MAX_JSON,
    SchemaError,
    as_bool,
    as_dict,
    as_int,
    as_list,
    as_text,
    field,
    load_json,
)
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import Diagnostic, numbered, report_diagnostics
from buffer_lifting.inspection.lifted_checks import PlainNode, PlainStage, lengths, shape_of_stages
from buffer_lifting.inspection.rules import RULES
from buffer_lifting.program import AxesInfo, Finding, LiftedInput, PositionRead, ScanReport, SequenceMixing

MANIFEST, FEED, FORMAT, VERSION = "manifest.json", "feed.json", "buffer_lifting.staged", 1
MAX_STAGES = 10_000


def is_stage_directory(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).is_file()


def check_stages(directory: Path) -> tuple[Diagnostic, ...]:
    """The findings of a saved partition. Nothing but JSON is read.

    Raises:
        ArchiveError: not a saved partition, a damaged one, or one of another version.
    """
    try:
        return _check(directory)
    except (SchemaError, ArchiveError) as error:
        raise ArchiveError(f"{directory}: {' '.join(str(error).split())}") from None
    except (MemoryError, RecursionError):
        raise ArchiveError(f"{directory}: too large or too deeply nested") from None
    except OSError as error:
        raise ArchiveError(f"{directory}: cannot be read: {error.strerror}") from None


def _check(directory: Path) -> tuple[Diagnostic, ...]:
    manifest = as_dict(load_json(_bytes(directory / MANIFEST)), MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ArchiveError(f"{MANIFEST} is not of a saved partition, version {VERSION}")
    checksums = as_dict(field(manifest, "sha256", MANIFEST), "sha256")
    count = as_int(field(manifest, "num_stages", MANIFEST), "num_stages")
    if not 1 <= count <= MAX_STAGES:
        raise ArchiveError(f"{count} stages, from 1 to {MAX_STAGES} can be read")
    feed = as_dict(_json(directory, FEED, checksums), FEED)
    report = _report(as_dict(field(feed, "report", FEED), "report"))
    axes = as_dict(field(feed, "axes", FEED), "axes")
    inputs = [_input(as_dict(item, "an input")) for item in as_list(field(feed, "inputs", FEED), "inputs")]
    left = _left(report, feed.get("cp_size") is not None)
    stages = [
        _stage(index, as_dict(_json(directory, f"stage_{index}.json", checksums), "a stage")) for index in range(count)
    ]
    return numbered([*report_diagnostics(left, {}), *lengths(_axes(axes)), *shape_of_stages(stages, inputs, report)])


def _left(report: ScanReport, follows_slots: bool) -> ScanReport:
    """What lifting has left: what it refused, and the causal flags until ``context_parallel``."""
    reads = [read for read in report.reads if read.refusal or (read.code == "BL004" and not follows_slots)]
    return ScanReport(tuple(reads), report.mixing, report.inputs, report.findings)


def _bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ArchiveError(f"{path.name} has more than {MAX_JSON} bytes")
    return data


def _json(directory: Path, name: str, checksums: dict[str, Any]) -> Any:
    data = _bytes(directory / name)
    if hashlib.sha256(data).hexdigest() != checksums.get(name):
        raise ArchiveError(f"{name} is damaged, or of another partition (its checksum differs)")
    try:
        return load_json(data)
    except SchemaError as error:
        raise SchemaError(f"{name}: {error}") from None


def _report(value: dict[str, Any]) -> ScanReport:
    return ScanReport(
        tuple(_read(as_dict(item, "a read")) for item in as_list(field(value, "reads", "report"), "reads")),
        tuple(_mixing(as_dict(item, "an op")) for item in as_list(field(value, "mixing", "report"), "mixing")),
        (),
        tuple(_finding(as_dict(item, "a finding")) for item in as_list(field(value, "findings", "report"), "findings")),
    )


def _read(value: dict[str, Any]) -> PositionRead:
    refusal = value.get("refusal")
    return PositionRead(
        source_kind=_text(value, "source_kind"),
        source=_text(value, "source"),
        aliases=(),
        value="",
        node=_text(value, "node"),
        op=_text(value, "op"),
        operand=_text(value, "operand"),
        seq_dims=(),
        batch_dim=None,
        stream="positions",
        form=None,
        refusal=None if refusal is None else as_text(refusal, "refusal"),
        location=_location(value),
        modules=_modules(value),
        code=_code(value),
        hint=_text(value, "hint"),
    )


def _mixing(value: dict[str, Any]) -> SequenceMixing:
    return SequenceMixing(
        _text(value, "node"),
        _text(value, "op"),
        _text(value, "reason"),
        _location(value),
        _modules(value),
        as_bool(field(value, "handled", "an op"), "handled"),
        _code(value),
        _text(value, "hint"),
    )


def _finding(value: dict[str, Any]) -> Finding:
    return Finding(_code(value), _text(value, "message"), _text(value, "hint"), _location(value))


def _text(value: dict[str, Any], key: str) -> str:
    return as_text(field(value, key, "report"), key)


def _code(value: dict[str, Any]) -> str:
    code = _text(value, "code")
    if code not in RULES:
        raise SchemaError("the report has a code that is not known here")
    return code


def _modules(value: dict[str, Any]) -> tuple[str, ...]:
    return tuple(as_text(item, "a module") for item in as_list(field(value, "modules", "report"), "modules"))


def _location(value: dict[str, Any]) -> Location | None:
    item = field(value, "location", "report")
    if item is None:
        return None
    where = as_dict(item, "location")
    line = as_int(field(where, "line", "location"), "line")
    return Location(_text(where, "file"), line, _text(where, "code"), _text(where, "function"))


def _input(value: dict[str, Any]) -> LiftedInput:
    batched = as_bool(field(value, "batched", "an input"), "batched")
    return LiftedInput(
        _text(value, "name"),
        "values",
        "positions",
        "row",
        _text(value, "source"),
        "",
        (),
        _text(value, "axis"),
        batched,
    )


def _axes(value: dict[str, Any]) -> AxesInfo:
    sizes = as_dict(field(value, "lengths", "axes"), "lengths")
    batch = field(value, "batch", "axes")
    return AxesInfo(
        None if batch is None else as_int(batch, "batch"),
        {name: None if size is None else as_int(size, "a length") for name, size in sizes.items()},
        as_bool(field(value, "has_batch", "axes"), "has_batch"),
    )


def _stage(index: int, value: dict[str, Any]) -> PlainStage:
    names = [
        tuple(as_text(item, "a name") for item in as_list(field(value, key, "a stage"), key))
        for key in ("activations", "outputs")
    ]
    nodes: list[PlainNode] = []
    known: set[str] = set()
    for item in as_list(field(value, "graph", "a stage"), "graph"):
        entry = as_dict(item, "a node")
        args = (
            *as_list(field(entry, "args", "a node"), "args"),
            *as_dict(field(entry, "kwargs", "a node"), "kwargs").values(),
        )
        node = PlainNode(_text(entry, "name"), _text(entry, "op"), _text(entry, "target"), args)
        for ref in node.refs():
            if as_text(ref, "a reference") not in known:
                raise SchemaError(f"stage {index}: a node reads one that is not there")
        known.add(node.name)
        nodes.append(node)
    return PlainStage(index, names[0], names[1], tuple(nodes))
