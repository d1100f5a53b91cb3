"""A lifted program in one file.

It is a zip: ``manifest.json`` (every record, readable), ``program.pt2`` (torch.export's own format), ``feed.json``
(the feed graphs as lists of aten calls) and ``feed.bin`` (their tables as raw bytes).
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.errors import LiftingError
from buffer_lifting.feed_json import decode_lifted, encode_feed, encode_records
from buffer_lifting.graph.bodies import flex_nodes
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.package.files import DAMAGED, LIFTED, MANIFEST, checked_manifest, dumps, header, replacing
from buffer_lifting.tensor_file import read_tensors
from buffer_lifting.torch_compat import with_state_dict

_PROGRAM, _FEED, _TABLES = "program.pt2", "feed.json", "feed.bin"


def save_lifted(lifted: LiftedProgram, path: str | os.PathLike[str], weights: bool = True) -> None:
    """Writes a lifted program to one file: see :meth:`LiftedProgram.save`."""
    path = Path(path)
    if path.exists() and _kind_of_file(path) != LIFTED:
        raise LiftingError(f"{path} exists and is no lifted package; it is not overwritten")
    check_savable(lifted)
    with replacing(path) as new:
        program = new.with_name(_PROGRAM)
        torch.export.save(lifted.program if weights else _without_weights(lifted.program), program)
        known = {**lifted.program.constants, **(lifted.program.state_dict if weights else {})}
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
            manifest = {**header(LIFTED), **encode_records(lifted), "tied": _tied(lifted.program)}
            archive.writestr(MANIFEST, dumps(manifest))
            archive.write(program, _PROGRAM)
            tables = new.with_name(_TABLES)
            with tables.open("wb") as stream:
                feed = encode_feed(lifted.feed_program, stream, known)
            archive.write(tables, _TABLES)
            archive.writestr(_FEED, dumps(feed))


def _without_weights(program: ExportedProgram) -> ExportedProgram:
    """The same program with parameters and persistent buffers on the meta device; what was tied is tied."""
    made: dict[int, torch.Tensor] = {}
    for value in program.state_dict.values():
        empty = value.detach().to("meta")
        parameter = isinstance(value, torch.nn.Parameter)
        made[id(value)] = torch.nn.Parameter(empty, value.requires_grad) if parameter else empty
    return with_state_dict(program, {fqn: made[id(value)] for fqn, value in program.state_dict.items()})


def check_savable(lifted: LiftedProgram) -> None:
    """Refuses what torch has no form for.

    Raises:
        LiftingError: a program with ``flex_attention``.
    """
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
            manifest = checked_manifest(archive.read(MANIFEST), LIFTED, str(path))
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
    except (zipfile.BadZipFile, EOFError, OSError, *DAMAGED) as error:
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


def _kind_of_file(path: Path) -> str | None:
    """The format of a package's manifest, ``"pt2"`` for a file of torch.export, or ``None``."""
    try:
        with zipfile.ZipFile(path) as archive:
            if MANIFEST in archive.namelist():
                manifest = json.loads(archive.read(MANIFEST))
                return str(manifest.get("format")) if isinstance(manifest, dict) else None
            return "pt2" if any(name.endswith("archive_format") for name in archive.namelist()) else None
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
