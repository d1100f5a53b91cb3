"""Reads and checks a saved partition from its JSON, without torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from buffer_lifting.boundaries import BoundaryTensor
from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.archive_schema import (
    MAX_JSON,
    SchemaError,
    as_count,
    as_dict,
    as_dims,
    as_int,
    as_list,
    as_text,
    field,
    load_json,
)
from buffer_lifting.inspection.diagnostics import Diagnostic, left_by_lifting, numbered
from buffer_lifting.inspection.lifted_checks import PlainNode, PlainStage, lengths, shape_of_stages
from buffer_lifting.inspection.saved_records import axes_of, input_axes_of, inputs_of, names_of, outputs_of, report_of
from buffer_lifting.inspection.stage_directory import MANIFEST
from buffer_lifting.program import AxesInfo, InputAxes, LiftedInput, ScanReport
from buffer_lifting.regular_file import open_regular

FEED, FORMAT, VERSION = "feed.json", "buffer_lifting.staged", 2
MAX_STAGES, MAX_OUTPUTS = 10_000, 1_000


@dataclass(frozen=True, slots=True)
class SavedStage:
    """A stage as its file has it.

    Attributes:
        plain: its graph.
        kwargs: the inputs that it reads by keyword.
        outputs: what it hands on; ``None`` where the file is older than that record.
        boundary_bytes: bytes that it sends forward per microbatch, at the sizes of the example inputs.
        parameters: FQNs; ``elements`` are those of all of them together.
    """

    plain: PlainStage
    kwargs: tuple[str, ...]
    outputs: tuple[BoundaryTensor, ...] | None
    boundary_bytes: int
    parameters: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class SavedPartition:
    """A saved partition without its tensors; ``report`` is that of the program before lifting."""

    report: ScanReport
    axes: AxesInfo
    input_axes: dict[str, InputAxes]
    inputs: tuple[LiftedInput, ...]
    follows_slots: bool
    stages: tuple[SavedStage, ...]
    tied: dict[str, tuple[int, ...]]


def read_stages(directory: Path) -> SavedPartition:
    """The records of a saved partition. Nothing but JSON is read.

    Raises:
        ArchiveError: not a saved partition, a damaged one, or one of another version.
    """
    try:
        return _read(directory)
    except (SchemaError, ArchiveError) as error:
        raise ArchiveError(f"{directory}: {' '.join(str(error).split())}") from None
    except (MemoryError, RecursionError):
        raise ArchiveError(f"{directory}: too large or too deeply nested") from None
    except OSError as error:
        raise ArchiveError(f"{directory}: cannot be read: {error.strerror}") from None


def stage_findings(saved: SavedPartition) -> tuple[Diagnostic, ...]:
    """The findings of a saved partition."""
    left = left_by_lifting(saved.report, saved.follows_slots)
    shape = shape_of_stages([stage.plain for stage in saved.stages], saved.inputs, saved.report)
    return numbered([*left, *lengths(saved.axes), *shape])


def _read(directory: Path) -> SavedPartition:
    manifest = as_dict(load_json(_bytes(directory / MANIFEST)), MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ArchiveError(f"{MANIFEST} is not of a saved partition, version {VERSION}")
    checksums = as_dict(field(manifest, "sha256", MANIFEST), "sha256")
    count = as_int(field(manifest, "num_stages", MANIFEST), "num_stages")
    if not 1 <= count <= MAX_STAGES:
        raise ArchiveError(f"{count} stages, from 1 to {MAX_STAGES} can be read")
    feed = as_dict(_json(directory, FEED, checksums), FEED)
    stages = [
        _stage(index, as_dict(_json(directory, f"stage_{index}.json", checksums), "a stage")) for index in range(count)
    ]
    tied = {
        fqn: tuple(as_int(index, "a stage") for index in as_list(indices, "tied"))
        for fqn, indices in as_dict(field(manifest, "tied", MANIFEST), "tied").items()
    }
    return SavedPartition(
        report_of(feed),
        axes_of(feed),
        input_axes_of(feed),
        inputs_of(feed),
        feed.get("cp_size") is not None,
        tuple(stages),
        tied,
    )


def _bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            data = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise ArchiveError(f"{path.name} cannot be read: {error.strerror}") from None
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


def _text(value: dict[str, Any], key: str) -> str:
    return as_text(field(value, key, "a stage"), key)


def _stage(index: int, value: dict[str, Any]) -> SavedStage:
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
    plain = PlainStage(index, names_of(value, "activations"), names_of(value, "outputs"), tuple(nodes))
    if sum(len(node.refs()) for node in nodes if node.op == "output") > MAX_OUTPUTS:
        raise ArchiveError(f"stage {index} has more than {MAX_OUTPUTS} outputs")
    size = as_count(field(value, "boundary_bytes", "a stage"), "boundary_bytes")
    parameters = names_of(value, "parameters")
    return SavedStage(plain, names_of(value, "kwargs"), outputs_of(value), size, parameters, _elements(value))


def _elements(value: dict[str, Any]) -> int:
    """Elements of a stage's parameters; one that has two names counts once."""
    total = 0
    for item in as_list(field(value, "state", "a stage"), "state"):
        entry = as_dict(item, "a tensor")
        if entry.get("kind") == "parameter" and "same" not in entry:
            total += prod(as_count(size, "a size") for size in as_dims(field(entry, "shape", "a tensor"), "shape"))
    return total
