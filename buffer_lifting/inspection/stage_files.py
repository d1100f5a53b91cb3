"""Checks a saved partition from its JSON, without torch: what its report refused, and the shape of its stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast, get_args

from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.archive_schema import (
    MAX_JSON,
    SchemaError,
    as_bool,
    as_count,
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
from buffer_lifting.program import (
    AxesInfo,
    Finding,
    Form,
    InputAxes,
    LiftedInput,
    PositionRead,
    ScanReport,
    SequenceMixing,
    Stream,
)

MANIFEST, FEED, FORMAT, VERSION = "manifest.json", "feed.json", "buffer_lifting.staged", 1
MAX_STAGES = 10_000
_STREAMS: tuple[str, ...] = get_args(Stream)


@dataclass(frozen=True, slots=True)
class SavedStage:
    """A stage of a directory.

    Attributes:
        plain: its graph.
        kwargs: the inputs that it reads by keyword.
        sends: bytes that it sends forward per microbatch.
        parameters: FQNs; ``elements`` are those of all of them together.
    """

    plain: PlainStage
    kwargs: tuple[str, ...]
    sends: int
    parameters: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class SavedStages:
    """A saved partition: what its lift reported and added, its axes and its stages."""

    report: ScanReport
    inputs: tuple[LiftedInput, ...]
    axes: AxesInfo
    follows_slots: bool
    stages: tuple[SavedStage, ...]
    tied: dict[str, tuple[int, ...]]


def is_stage_directory(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).is_file()


def check_stages(directory: Path) -> tuple[Diagnostic, ...]:
    """The findings of a saved partition. Nothing but JSON is read.

    Raises:
        ArchiveError: not a saved partition, a damaged one, or one of another version.
    """
    return saved_findings(read_stages(directory))


def read_stages(directory: Path) -> SavedStages:
    """A saved partition. Nothing but JSON is read.

    Raises:
        ArchiveError: not a saved partition, a damaged one, or one of another version.
    """
    try:
        return _read_all(directory)
    except (SchemaError, ArchiveError) as error:
        raise ArchiveError(f"{directory}: {' '.join(str(error).split())}") from None
    except (MemoryError, RecursionError):
        raise ArchiveError(f"{directory}: too large or too deeply nested") from None
    except OSError as error:
        raise ArchiveError(f"{directory}: cannot be read: {error.strerror}") from None


def saved_findings(saved: SavedStages) -> tuple[Diagnostic, ...]:
    """The findings of a saved partition."""
    left = _left(saved.report, saved.follows_slots)
    shape = shape_of_stages([stage.plain for stage in saved.stages], saved.inputs, saved.report)
    return numbered([*report_diagnostics(left, {}), *lengths(saved.axes), *shape])


def _read_all(directory: Path) -> SavedStages:
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
    stages = [
        _stage(index, as_dict(_json(directory, f"stage_{index}.json", checksums), "a stage")) for index in range(count)
    ]
    tied = {
        fqn: tuple(as_int(index, "a stage") for index in as_list(indices, "tied"))
        for fqn, indices in as_dict(field(manifest, "tied", MANIFEST), "tied").items()
    }
    return SavedStages(report, tuple(inputs), _axes(axes), feed.get("cp_size") is not None, tuple(stages), tied)


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
        tuple(_axes_of(as_dict(item, "an input")) for item in as_list(field(value, "inputs", "report"), "inputs")),
        tuple(_finding(as_dict(item, "a finding")) for item in as_list(field(value, "findings", "report"), "findings")),
    )


def _axes_of(value: dict[str, Any]) -> InputAxes:
    batch = field(value, "batch_dim", "an input")
    dims = []
    for item in as_list(field(value, "seq_dims", "an input"), "seq_dims"):
        parts = as_list(item, "a sequence dim")
        if len(parts) != 3:
            raise SchemaError("a sequence dim is a dim, an axis and a role")
        dims.append((as_int(parts[0], "a dim"), as_text(parts[1], "an axis"), as_text(parts[2], "a role")))
    return InputAxes(
        _text(value, "name"),
        None if batch is None else as_int(batch, "batch_dim"),
        tuple(dims),
        as_int(field(value, "rank", "an input"), "rank"),
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
    form, stream = _one_of(value, "form", ("values", "positions")), _one_of(value, "stream", _STREAMS)
    return LiftedInput(
        _text(value, "name"),
        cast(Form, form),
        cast(Stream, stream),
        _text(value, "role"),
        _text(value, "source"),
        _text(value, "dtype"),
        tuple(as_count(size, "a size") for size in as_list(field(value, "row_shape", "an input"), "row_shape")),
        _text(value, "axis"),
        as_bool(field(value, "batched", "an input"), "batched"),
    )


def _one_of(value: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    text = _text(value, key)
    if text not in known:
        raise SchemaError(f"{key} is none of {', '.join(known)}")
    return text


def _axes(value: dict[str, Any]) -> AxesInfo:
    sizes = as_dict(field(value, "lengths", "axes"), "lengths")
    batch = field(value, "batch", "axes")
    return AxesInfo(
        None if batch is None else as_int(batch, "batch"),
        {name: None if size is None else as_int(size, "a length") for name, size in sizes.items()},
        as_bool(field(value, "has_batch", "axes"), "has_batch"),
    )


def _stage(index: int, value: dict[str, Any]) -> SavedStage:
    activations, kwargs, outputs, parameters = (
        tuple(as_text(item, "a name") for item in as_list(field(value, key, "a stage"), key))
        for key in ("activations", "kwargs", "outputs", "parameters")
    )
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
    plain = PlainStage(index, activations, outputs, tuple(nodes))
    sends = as_count(field(value, "boundary_bytes", "a stage"), "boundary_bytes")
    return SavedStage(plain, kwargs, sends, parameters, _elements(value))


def _elements(value: dict[str, Any]) -> int:
    """Elements of a stage's parameters; one that has two names counts once."""
    total = 0
    for item in as_list(field(value, "state", "a stage"), "state"):
        entry = as_dict(item, "a tensor")
        if entry.get("kind") == "parameter" and "same" not in entry:
            sizes = as_list(field(entry, "shape", "a tensor"), "shape")
            total += prod(as_count(size, "a size") for size in sizes)
    return total
