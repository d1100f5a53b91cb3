"""Saves and loads a lifted program (one file) and a partition (a directory, a stage a file).

A lifted package is a zip: ``manifest.json`` (every record, readable), ``program.pt2`` (torch.export's own
format), ``feed.json`` (the feed graphs as lists of aten calls) and ``feed.bin`` (their tables as raw bytes).
A partition is a directory: ``manifest.json`` with the SHA-256 of every other file, ``feed.json`` and
``feed.bin``, and for each stage its graph (``stage_0.json``) and its state (``stage_0.bin``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch.export import ExportedProgram

from buffer_lifting.boundaries import BoundaryTensor
from buffer_lifting.errors import LiftingError, PartitionError
from buffer_lifting.feed import Lengths
from buffer_lifting.feed_json import decode_lifted, encode_feed, encode_records
from buffer_lifting.graph.bodies import flex_nodes
from buffer_lifting.graph.record import StateKind
from buffer_lifting.graph_json import decode_graph, decode_record, encode_graph, encode_record
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.runtime import Shapes, make_stage
from buffer_lifting.stage_builder import _register
from buffer_lifting.stages import Stage, StagedProgram, bind_tables, boundary_tensors
from buffer_lifting.tables import TableSource
from buffer_lifting.tensor_file import read_tensors, write_tensors

VERSION = 1
LIFTED, STAGED = "buffer_lifting.lifted", "buffer_lifting.staged"
_MANIFEST, _PROGRAM, _FEED, _TABLES = "manifest.json", "program.pt2", "feed.json", "feed.bin"
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def save_lifted(lifted: LiftedProgram, path: str | os.PathLike[str]) -> None:
    """Writes a lifted program to one file. The file appears whole or not at all.

    Raises:
        LiftingError: ``path`` exists and is no lifted package, or the program has something that a package
            cannot hold.
    """
    path = Path(path)
    if path.exists() and _kind_of_file(path) != LIFTED:
        raise LiftingError(f"{path} exists and is no lifted package; it is not overwritten")
    _check_flex(lifted)
    with _beside(path) as work:
        torch.export.save(lifted.program, work / _PROGRAM)
        known = {**lifted.program.constants, **lifted.program.state_dict}
        with zipfile.ZipFile(work / "package", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(
                _MANIFEST, _dumps({**_header(LIFTED), **encode_records(lifted), "tied": _tied(lifted.program)})
            )
            archive.write(work / _PROGRAM, _PROGRAM)
            with (work / _TABLES).open("wb") as stream:
                feed = encode_feed(lifted.feed_program, stream, known)
            archive.write(work / _TABLES, _TABLES)
            archive.writestr(_FEED, _dumps(feed))
        os.replace(work / "package", path)


def _check_flex(lifted: LiftedProgram) -> None:
    if flex_nodes(lifted.program.graph):
        raise LiftingError(
            "the program has flex_attention, which torch cannot save (torch.export.save has no form for its score_mod "
            "and mask_mod): export and lift it again in each process"
        )


def load(path: str | os.PathLike[str]) -> LiftedProgram:
    """Reads what :meth:`LiftedProgram.save` wrote.

    The graphs that make the feed are rebuilt from aten calls, and nothing in them is executed on loading. But
    the program itself is read by ``torch.export.load``, which unpickles its example inputs: a file from a
    stranger is code.

    Raises:
        LiftingError: no lifted package, a damaged one, or one of another version of the format.
    """
    path = Path(path)
    kind = _kind_of_file(path)
    if kind != LIFTED:
        what = "a torch.export file; lift its program" if kind == "pt2" else "no lifted package"
        raise LiftingError(f"{path} is {what if path.exists() else 'not there'}")
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as work:
            manifest = _checked(archive.read(_MANIFEST), LIFTED, str(path))
            archive.extract(_PROGRAM, work)
            program = _load_program(Path(work) / _PROGRAM, manifest)
            for first, *others in manifest["tied"]:  # torch.export.load makes each a parameter of its own
                program.state_dict.update(dict.fromkeys(others, program.state_dict[first]))
            document = json.loads(archive.read(_FEED))
            with archive.open(_TABLES) as stream:
                tables, _ = read_tensors(stream, document["tables"], own_device=True)
        known = {**program.constants, **program.state_dict}
        tables.update({fqn: known[fqn].detach() for fqn in document["in_program"]})
        return decode_lifted(program, manifest, document, tables)
    except (zipfile.BadZipFile, EOFError, OSError, *_DAMAGED) as error:
        raise LiftingError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _load_program(path: Path, manifest: Mapping[str, Any]) -> ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:
        raise LiftingError(
            f"the program in the package cannot be read (saved by torch {manifest['torch']}, this is "
            f"{torch.__version__}): {type(error).__name__}: {error}"
        ) from error


def _tied(program: ExportedProgram) -> list[list[str]]:
    """Groups of FQNs that are one tensor."""
    groups: dict[int, list[str]] = {}
    for fqn, value in program.state_dict.items():
        groups.setdefault(id(value), []).append(fqn)
    return [group for group in groups.values() if len(group) > 1]


def save_staged(staged: StagedProgram, directory: str | os.PathLike[str]) -> None:
    """Writes a partition to a directory, which appears whole or not at all.

    Raises:
        LiftingError: ``directory`` exists, is not empty and is no such package, or a stage has something that
            a package cannot hold.
    """
    directory = Path(directory)
    if directory.exists() and not _replaceable(directory):
        raise LiftingError(f"{directory} exists and is no staged package; it is not overwritten")
    _check_flex(staged.lifted)
    with _beside(directory) as work:
        package = work / "package"
        package.mkdir()
        with (package / _TABLES).open("wb") as stream:
            feed = encode_feed(staged.lifted.feed_program, stream, {})
        _write(package / _FEED, _dumps({**feed, **encode_records(staged.lifted)}))
        for stage in staged.stages:
            _save_stage(stage, package)
        manifest = {
            **_header(STAGED),
            "num_stages": len(staged.stages),
            "boundaries": [list(stage.activations) for stage in staged.stages[1:]],
            "positional": staged.positional,
            "keywords": staged.keywords,
            "tied": encode_record(dict(staged.tied)),
            "sha256": {file.name: _digest(file) for file in sorted(package.iterdir())},
        }
        _write(package / _MANIFEST, _dumps(manifest))
        if directory.exists():
            os.replace(directory, work / "old")
        try:
            os.replace(package, directory)
        except OSError:
            if (work / "old").exists():
                os.replace(work / "old", directory)
            raise


def _save_stage(stage: Stage, package: Path) -> None:
    module = stage.module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    persistent = set(module.state_dict())
    tensors: dict[str, torch.Tensor] = {**parameters, **buffers}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, torch.Tensor):
                raise LiftingError(
                    f"stage {stage.index} has {node.target!r}, a {type(value).__name__}, which a package cannot hold"
                )
            tensors[str(node.target)] = value
    with (package / f"stage_{stage.index}.bin").open("wb") as stream:
        index = write_tensors(stream, tensors)
    for entry in index:
        name = entry["name"]
        kind = (
            StateKind.PARAMETER if name in parameters else StateKind.BUFFER if name in buffers else StateKind.CONSTANT
        )
        entry.update(kind=kind.value, persistent=name in persistent, requires_grad=tensors[name].requires_grad)
    record = {f.name: encode_record(getattr(stage, f.name)) for f in fields(stage) if f.name != "module"}
    document = {**record, "state": index, "graph": encode_graph(module.graph)}
    _write(package / f"stage_{stage.index}.json", _dumps(document))


@dataclass(frozen=True)
class LoadedStage:
    """One stage, read from a directory: see :func:`load_stage`.

    Attributes:
        index: 0 for the first.
        stage: the stage; its module is on the CPU, or on the meta device if it was saved from there.
        num_stages: how many stages the program has.
        tied: FQN -> the stages that hold a copy of that parameter.
    """

    index: int
    stage: Stage
    num_stages: int
    tied: Mapping[str, tuple[int, ...]]
    _feeder: StagedProgram  # has the feed program and the names of the inputs, but no stages and no program

    @property
    def lifted(self) -> LiftedProgram:
        """The lifted program without its graph: it has its inputs and can feed them."""
        return self._feeder.lifted

    def feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None = None,
        order: Any = None,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        shard: Any = (0, 1),
        device: torch.device | str | None = None,
        n_microbatches: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The lifted inputs of one step: see :meth:`StagedProgram.feed`."""
        return self._feeder.feed(batch_size, seq_len, inputs, order, positions, shard, device, n_microbatches)

    def shard_inputs(
        self, *, order: Any = None, shard: Any = (0, 1), **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """User inputs in the order of the shards: see :meth:`LiftedProgram.shard_inputs`."""
        return self._feeder.shard_inputs(order=order, shard=shard, **inputs)

    def kwargs_chunk_spec(self, kwargs: Iterable[str] | None = None) -> dict[str, Any]:
        """Along which dim a schedule cuts each keyword: see :meth:`StagedProgram.kwargs_chunk_spec`."""
        return self._feeder.kwargs_chunk_spec(kwargs)

    def bind_tables(self, source: TableSource) -> None:
        """Gives values to the tables that the stage is fed from and keeps: see :meth:`StagedProgram.bind_tables`."""
        bind_tables(self.lifted, [self.stage], source)

    def build_stage(
        self,
        device: torch.device | str,
        group: Any = None,
        mesh: Any = None,
        *,
        microbatch_size: int | None = None,
        seq_len: Lengths | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> Any:
        """torch's ``PipelineStage`` of this stage: see :meth:`StagedProgram.build_stage`."""
        shapes = None
        if microbatch_size is not None or seq_len is not None:
            shapes = self.boundary(microbatch_size, seq_len, activation_dtype)
        return make_stage(self._feeder.lifted, self.stage, self.num_stages, device, group, mesh, shapes)

    def boundary(
        self, microbatch_size: int | None, seq_len: Lengths | None, activation_dtype: torch.dtype | None = None
    ) -> Shapes:
        """What the stage gets by position and what it hands on: see :meth:`StagedProgram.boundary`."""
        return boundary_tensors(self._feeder.lifted, self.stage, microbatch_size, seq_len, activation_dtype)


def load_stage(directory: str | os.PathLike[str], index: int) -> LoadedStage:
    """Reads one stage of what :meth:`StagedProgram.save` wrote, and no other stage's files.

    Nothing is unpickled or executed: the graph is rebuilt from aten calls.

    Raises:
        PartitionError: there is no such stage.
        LiftingError: no such package, a damaged or mixed-up one, or one of another version of the format.
    """
    directory = Path(directory)
    try:
        manifest = _checked((directory / _MANIFEST).read_bytes(), STAGED, str(directory))
        count, checksums = manifest["num_stages"], manifest["sha256"]
        if not isinstance(index, int) or not 0 <= index < count:
            raise PartitionError(f"there is no stage {index!r}; the program has {count} stages")
        tied = decode_record(dict[str, tuple[int, ...]], manifest["tied"])
        document = _read_json(directory / _FEED, checksums)
        tables = _read_state(directory / _TABLES, document["tables"], checksums, own_device=True)
        # feeding needs no program
        lifted = decode_lifted(cast(ExportedProgram, None), document, document, tables)
        spec = cast(Any, None)
        positional, keywords = tuple(manifest["positional"]), tuple(manifest["keywords"])
        feeder = StagedProgram((), lifted, spec, spec, positional, keywords, tied)
        stage = _load_one(directory, index, checksums)
    except (OSError, *_DAMAGED) as error:
        raise LiftingError(f"{directory} is no staged package, or damaged: {type(error).__name__}: {error}") from error
    return LoadedStage(index, stage, count, tied, feeder)


def _load_one(directory: Path, index: int, checksums: Mapping[str, str]) -> Stage:
    document = _read_json(directory / f"stage_{index}.json", checksums)
    state = document.pop("state")
    tensors = _read_state(directory / f"stage_{index}.bin", state, checksums, own_device=False)
    root = torch.nn.Module()
    made: dict[str, Any] = {}
    for entry in state:
        kind, name = StateKind(entry["kind"]), entry["name"]
        source = entry.get("same", name)
        if source not in made:
            value = tensors[source]
            made[source] = torch.nn.Parameter(value, entry["requires_grad"]) if kind is StateKind.PARAMETER else value
        _register(root, name, made[source], kind, entry["persistent"])
    module = decode_graph(document.pop("graph"), root)
    names = {"activations", "kwargs", "outputs", "parameters"}
    values: dict[str, Any] = {key: decode_record(tuple[str, ...], document[key]) for key in names}
    tied = decode_record(tuple[tuple[str, ...], ...], document["tied"])
    for key in ("activation_shapes", "output_shapes"):
        values[key] = decode_record(tuple[BoundaryTensor, ...], document.get(key, []))
    sent = decode_record(int, document["boundary_bytes"])
    return Stage(index, module, **values, boundary_bytes=sent, tied=tied)


# Files --------------------------------------------------------------------------------------------------


def _header(kind: str) -> dict[str, Any]:
    return {"format": kind, "version": VERSION, "torch": str(torch.__version__)}


def _dumps(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked(data: bytes, kind: str, where: str) -> dict[str, Any]:
    """A manifest of the wanted kind and version."""
    manifest = json.loads(data)
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise LiftingError(f"{where} has no manifest of a {kind} package")
    if manifest.get("version") != VERSION:
        raise LiftingError(
            f"{where} has version {manifest.get('version')!r} of the format; this buffer_lifting reads "
            f"version {VERSION}"
        )
    return manifest


def _read_json(path: Path, checksums: Mapping[str, str]) -> dict[str, Any]:
    data = path.read_bytes()
    _compare(path, hashlib.sha256(data).hexdigest(), checksums)
    return cast(dict[str, Any], json.loads(data))


def _read_state(path: Path, index: Any, checksums: Mapping[str, str], own_device: bool) -> dict[str, torch.Tensor]:
    with path.open("rb") as stream:
        tensors, digest = read_tensors(stream, index, own_device)
    _compare(path, digest, checksums)
    return tensors


def _compare(path: Path, digest: str, checksums: Mapping[str, str]) -> None:
    if checksums.get(path.name) != digest:
        raise LiftingError(f"{path} is not the file that was saved (its SHA-256 is another); save the package again")


def _kind_of_file(path: Path) -> str | None:
    """The format of a package's manifest, ``"pt2"`` for a file of torch.export, or ``None``."""
    try:
        with zipfile.ZipFile(path) as archive:
            if _MANIFEST in archive.namelist():
                manifest = json.loads(archive.read(_MANIFEST))
                return str(manifest.get("format")) if isinstance(manifest, dict) else None
            return "pt2" if any(name.endswith("archive_format") for name in archive.namelist()) else None
    except (zipfile.BadZipFile, OSError, ValueError):
        return None


def _replaceable(directory: Path) -> bool:
    """Whether a directory is empty, or a package of this kind and nothing else."""
    if not directory.is_dir() or directory.is_symlink():
        return False
    names = {file.name for file in directory.iterdir()}
    if not names:
        return True
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        return manifest["format"] == STAGED and names <= {_MANIFEST, *manifest["sha256"]}
    except (OSError, *_DAMAGED):
        return False


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory for work in progress on the same file system, gone afterwards."""
    if not path.parent.is_dir():
        raise LiftingError(f"there is no directory {path.parent}")
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
