"""A partition in a directory, with files of its own for each stage.

``manifest.json`` has the SHA-256 of every other file; ``feed.json`` and ``feed.bin`` are the feed program; each stage
has its manifest, ``stage_0.json`` (records, graph, index of tensors), and ``stage_0.pt2``, which torch.export loads.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from buffer_lifting.errors import LiftingError, PartitionError
from buffer_lifting.feed_json import decode_lifted, encode_feed, encode_records
from buffer_lifting.graph.record import StateKind
from buffer_lifting.graph_json import decode_graph, decode_record, encode_graph, encode_record
from buffer_lifting.layer_graphs import require_whole
from buffer_lifting.package.files import (
    DAMAGED,
    MANIFEST,
    STAGED,
    check_seal,
    checked_manifest,
    compare,
    digest,
    dumps,
    earlier_package,
    header,
    read_json,
    replacing,
    sealed,
)
from buffer_lifting.package.lifted_file import check_savable
from buffer_lifting.package.loaded_stage import LoadedStage
from buffer_lifting.package.pt2 import read_pt2_tensors, write_pt2
from buffer_lifting.package.stacks import decode_stacks, encode_stacks
from buffer_lifting.placement import Placement
from buffer_lifting.regular_file import open_regular
from buffer_lifting.stage_builder import _register
from buffer_lifting.stage_program import stage_parts, stage_state
from buffer_lifting.stages import Stage, StagedProgram
from buffer_lifting.tensor_file import read_tensors
from buffer_lifting.torch_compat import StageModule

_FEED, _TABLES = "feed.json", "feed.bin"
_KINDS = {
    InputKind.PARAMETER: StateKind.PARAMETER,
    InputKind.BUFFER: StateKind.BUFFER,
    InputKind.CONSTANT_TENSOR: StateKind.CONSTANT,
}


def save_staged(staged: StagedProgram, directory: str | os.PathLike[str], weights: bool = True) -> None:
    """Writes a partition to a directory, which appears whole or not at all: see :meth:`StagedProgram.save`."""
    directory = Path(directory)
    if directory.exists() and not _replaceable(directory):
        raise LiftingError(f"{directory} exists and is no staged package; it is not overwritten")
    check_savable(staged.lifted)
    with replacing(directory) as package:
        package.mkdir()
        with (package / _TABLES).open("wb") as stream:
            feed = encode_feed(staged.lifted.feed_program, stream, {})
        (package / _FEED).write_bytes(dumps({**feed, **encode_records(staged.lifted)}))
        checksums = {name: digest(package / name) for name in (_FEED, _TABLES)}
        for stage in staged.stages:
            checksums.update(_save_stage(stage, staged.lifted.program, package, weights))
        manifest = {
            **header(STAGED),
            "num_stages": len(staged.stages),
            "weights": weights,
            "boundaries": [list(stage.activations) for stage in staged.stages[1:]],
            "positional": staged.positional,
            "keywords": staged.keywords,
            "tied": encode_record(dict(staged.tied)),
            "placement": encode_record(staged.placement),
            "state_dict": _state_dict_of(staged),
            "sha256": checksums,
        }
        (package / MANIFEST).write_bytes(sealed(manifest))


def _state_dict_of(staged: StagedProgram) -> dict[str, list[int]]:
    """FQN -> the stages that have it, for all that a checkpoint of the model has; what no stage reads is in none."""
    holders: dict[str, list[int]] = {fqn: [] for fqn in staged.lifted.program.state_dict}
    for stage in staged.stages:
        for fqn in stage.module.state_dict():
            holders.setdefault(fqn, []).append(stage.index)
    return holders


def _save_stage(stage: Stage, whole: ExportedProgram, package: Path, weights: bool) -> dict[str, str]:
    """Writes the two files of a stage; returns their checksums."""
    require_whole(stage.module, stage.index)
    state = {item.fqn: item for item in stage_state(stage.module)}
    for node in stage.module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in state:
            raise LiftingError(f"stage {stage.index} has {node.target!r}, which is no tensor; a package cannot hold it")
    graph = encode_graph(stage.module.graph)
    program = package / f"stage_{stage.index}.pt2"
    index, checksum = write_pt2(program, stage_parts(stage, whole), weights)
    for entry in index:
        item = state[entry["name"]]
        persistent = item.kind is InputKind.BUFFER and item.in_state_dict
        entry.update(kind=_KINDS[item.kind].value, persistent=persistent, requires_grad=item.value.requires_grad)
    record = {field.name: encode_record(getattr(stage, field.name)) for field in _record_fields()}
    manifest = package / f"stage_{stage.index}.json"
    manifest.write_bytes(
        dumps({**record, "state": index, "modules": encode_stacks(stage.module.graph), "graph": graph})
    )
    return {program.name: checksum, manifest.name: digest(manifest)}


def _record_fields() -> list[dataclasses.Field[Any]]:
    """The fields of a stage that stand in its manifest as they are."""
    return [field for field in dataclasses.fields(Stage) if field.name != "module"]


def load_stage(directory: str | os.PathLike[str], index: int) -> LoadedStage:
    """Reads one stage of what :meth:`StagedProgram.save` wrote, and no other stage's files.

    Nothing is unpickled or executed: the graph is rebuilt from aten calls. A stage that was saved without weights has
    its parameters on the meta device: see :meth:`LoadedStage.load_weights`.

    Raises:
        PartitionError: there is no such stage.
        LiftingError: no such package, a damaged or mixed-up one, or one of another version of the format.
    """
    directory = Path(directory)
    try:
        with open_regular(directory / MANIFEST) as stream:
            data = stream.read()
        manifest = checked_manifest(data, STAGED, str(directory))
        check_seal(data, manifest, str(directory))
        count, checksums = manifest["num_stages"], manifest["sha256"]
        if not isinstance(index, int) or not 0 <= index < count:
            raise PartitionError(f"there is no stage {index!r}; the program has {count} stages")
        tied = decode_record(dict[str, tuple[int, ...]], manifest["tied"])
        holders = decode_record(dict[str, tuple[int, ...]], manifest["state_dict"])
        document = read_json(directory / _FEED, checksums)
        with open_regular(directory / _TABLES) as stream:
            tables, checksum = read_tensors(stream, document["tables"], own_device=True)
        compare(directory / _TABLES, checksum, checksums)
        # feeding needs no program
        lifted = decode_lifted(cast(ExportedProgram, None), document, document, tables)
        spec = cast(Any, None)
        positional, keywords = tuple(manifest["positional"]), tuple(manifest["keywords"])
        placement = _placement(manifest, count)
        feeder = StagedProgram((), lifted, spec, spec, positional, keywords, tied, placement)
        stage = _load_one(directory, index, checksums)
    except (OSError, *DAMAGED) as error:
        earlier = earlier_package(directory)
        hint = f"; a save that was interrupted has left what was there before in {earlier}" if earlier else ""
        raise LiftingError(
            f"{directory} is no staged package, or damaged: {type(error).__name__}: {error}{hint}"
        ) from error
    return LoadedStage(index, stage, count, tied, holders, feeder)


def _placement(manifest: Mapping[str, Any], count: int) -> Placement | None:
    """The layout that the stages were made for; packages that were saved before it was kept have none.

    Raises:
        LiftingError: a layout of another number of stages, or of ranks that do not exist.
    """
    placement = cast(Placement | None, decode_record(Placement | None, manifest.get("placement")))
    if placement is not None and (len(placement.ranks) != count or set(placement.ranks) != set(range(placement.pp))):
        raise LiftingError(f"the package's manifest has {count} stages on the ranks {placement.ranks}")
    return placement


def _load_one(directory: Path, index: int, checksums: Mapping[str, str]) -> Stage:
    document = read_json(directory / f"stage_{index}.json", checksums)
    state = document.pop("state")
    program = directory / f"stage_{index}.pt2"
    with open_regular(program) as stream:
        tensors, checksum = read_pt2_tensors(stream, state)
    compare(program, checksum, checksums)
    root = torch.nn.Module()
    made: dict[str, Any] = {}
    for entry in state:
        kind, name = StateKind(entry["kind"]), entry["name"]
        source = entry.get("same", name)
        if source not in made:
            value = tensors[source]
            made[source] = torch.nn.Parameter(value, entry["requires_grad"]) if kind is StateKind.PARAMETER else value
        _register(root, name, made[source], kind, entry["persistent"])
    module = decode_graph(document.pop("graph"), root, StageModule)
    decode_stacks(document.pop("modules", {"stacks": [], "nodes": {}}), module.graph)
    hints = get_type_hints(Stage)
    known = {field.name for field in _record_fields()}
    unknown = sorted(document.keys() - known)
    if unknown:
        raise LiftingError(f"stage_{index}.json has {', '.join(unknown)}, which this buffer_lifting does not know")
    values = {name: decode_record(hints[name], value) for name, value in document.items()}
    if values["index"] != index:
        raise LiftingError(f"stage_{index}.json is of stage {values['index']}")
    return Stage(module=module, **values)


def _replaceable(directory: Path) -> bool:
    """Whether a directory is empty, or a package of this kind and nothing else."""
    if not directory.is_dir() or directory.is_symlink():
        return False
    names = {file.name for file in directory.iterdir()}
    if not names:
        return True
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        return manifest["format"] == STAGED and names <= {MANIFEST, *manifest["sha256"]}
    except (OSError, *DAMAGED):
        return False
