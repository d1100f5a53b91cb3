"""Writes a stage as a ``.pt2`` file of torch.export, and reads the tensors back without torch's loader.

Each tensor is a member of the zip, uncompressed: a file offset and a length. The manifest of the stage lists them, so
that reading is one pass over the file, which checks its SHA-256 and fills the tensors as they come.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.archive import ARCHIVE_VERSION
from buffer_lifting.package.pt2_graph import model_json, tensor_meta
from buffer_lifting.stage_program import StageParts
from buffer_lifting.tables import has_values
from buffer_lifting.tensor_file import bytes_of, describe_tensor, empty_tensor, fill, stored_form

_META = torch.device("meta")
_ZIP_VERSION = b"6\n"  # what torch's writer of archives states as the version of its own zip


def write_pt2(path: Path, parts: StageParts, weights: bool) -> tuple[list[dict[str, Any]], str]:
    """Writes a program and its tensors.

    Args:
        path: the file; it must not exist.
        parts: of the program of a stage.
        weights: without them, parameters and persistent buffers are on the meta device in the file.

    Returns:
        An entry for each tensor of the stage (name, dtype, shape, order of its dims in memory, offset in the file if
        it has bytes there; or name and the earlier one that it is the ``same`` as), and the SHA-256 of the file.

    Raises:
        LiftingError: a node or a tensor that the file cannot hold.
    """
    entries: list[dict[str, Any]] = []
    folders: dict[str, dict[str, Any]] = {"weights": {}, "constants": {}}
    first: dict[tuple[int, str], str] = {}
    with path.open("xb") as stream:
        sink = _Sink(stream)
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
            root = path.stem
            for item in parts.state:
                fqn, tensor = item.fqn, item.value
                kept = item.in_state_dict
                folder = "weights" if kept else "constants"
                config = folders[folder]
                earlier = first.setdefault((id(tensor), folder), fqn)
                if earlier != fqn:
                    entries.append({"name": fqn, "same": earlier})
                    config[fqn] = config[earlier]
                    continue
                entry = describe_tensor(fqn, tensor)
                entries.append(entry)
                path_name = f"{'weight' if kept else 'tensor'}_{len(config)}"
                stored = has_values(tensor) and (weights or not kept)
                info = _member(f"{root}/data/{folder}/{path_name}")
                info.file_size = tensor.numel() * tensor.element_size() if stored else 0
                with archive.open(info, "w") as member:
                    if stored:
                        entry["offset"] = sink.count
                        plain = stored_form(tensor)
                        member.write(bytes_of(plain))
                config[fqn] = {
                    "path_name": path_name,
                    "is_param": isinstance(tensor, torch.nn.Parameter),
                    "use_pickle": False,
                    "tensor_meta": _dense_meta(tensor, entry, stored),
                }
            for folder, config in folders.items():
                text = json.dumps({"config": config})
                archive.writestr(_member(f"{root}/data/{folder}/model_{folder}_config.json"), text)
            for name, data in (
                ("models/model.json", model_json(parts)),
                ("data/sample_inputs/model.pt", b""),  # none: they would be a pickle
                ("archive_format", b"pt2"),
                ("archive_version", ARCHIVE_VERSION.encode()),
                (".data/version", _ZIP_VERSION),
                ("byteorder", b"little"),
            ):
                archive.writestr(_member(f"{root}/{name}"), data)
    return entries, sink.digest.hexdigest()


def _member(name: str) -> zipfile.ZipInfo:
    """A member whose header says no date, so that the same content is the same file."""
    return zipfile.ZipInfo(name)


def _dense_meta(tensor: torch.Tensor, entry: Mapping[str, Any], stored: bool) -> dict[str, Any]:
    """The meta of a tensor as it is in the file: without gaps, from the beginning of its member."""
    order = entry["order"]
    shape = [tensor.shape[dim] for dim in order]
    dense = torch.empty(shape, dtype=tensor.dtype, device="meta").permute([order.index(d) for d in range(len(order))])
    meta = tensor_meta(dense, tensor.device if stored else _META)
    return {**meta, "requires_grad": tensor.requires_grad}


class _Sink:
    """What zipfile writes to: it cannot go back, so the checksum is that of the bytes as they come."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.count = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.stream.write(data)
        size = memoryview(data).nbytes
        self.count += size
        return size

    def flush(self) -> None:
        self.stream.flush()


def read_pt2_tensors(stream: IO[bytes], entries: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of the entries that :func:`write_pt2` made, on the CPU or the meta device; the file's SHA-256.

    Raises:
        LiftingError: entries that do not fit one another or the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256()
    place = 0
    try:
        made: dict[str, torch.Tensor] = {}
        stored = [entry for entry in entries if "offset" in entry]
        for entry in sorted(stored, key=lambda entry: entry["offset"]):
            gap = entry["offset"] - place
            if type(gap) is not int or gap < 0:
                raise LiftingError(f"{entry['name']!r} begins inside another tensor")
            _skip(stream, gap, digest)
            tensor, view = empty_tensor(entry, "cpu")
            if fill(stream, view) != len(view):
                raise LiftingError(f"the bytes of {entry['name']!r} are cut off")
            digest.update(view)
            place = entry["offset"] + len(view)
            made[entry["name"]] = tensor
        for entry in entries:
            name = entry["name"]
            if "same" in entry:
                tensors[name] = tensors[entry["same"]]
            elif "offset" in entry:
                tensors[name] = made[name]
            else:
                tensors[name] = empty_tensor(entry, "meta")[0]
        _skip(stream, None, digest)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise LiftingError(f"the index of the tensors is damaged: {type(error).__name__}: {error}") from error
    return tensors, digest.hexdigest()


def _skip(stream: IO[bytes], count: int | None, digest: Any) -> None:
    """Hashes the next bytes: ``count`` of them, or all that are left."""
    while count is None or count > 0:
        data = stream.read(1 << 20 if count is None else min(count, 1 << 20))
        if not data:
            if count is None:
                return
            raise LiftingError("the file is cut off")
        digest.update(data)
        if count is not None:
            count -= len(data)
