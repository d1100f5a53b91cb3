"""Where the weights of a stage come from: a mapping, safetensors of a Hugging Face model, or a distributed checkpoint.

A source lists what it holds before anything is read, and reads only what it is asked for.
"""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from buffer_lifting.errors import LiftingError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DCP = ".metadata"
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a tensor that has not been read; ``dtype`` is its name where torch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class WeightSource(ABC):
    """Tensors by name."""

    #: What an error calls it.
    what: str

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Of every tensor."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Of a tensor that is there."""

    @abstractmethod
    def read(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of these names, in memory of their own on a device."""


def open_source(source: str | os.PathLike[str] | Mapping[str, torch.Tensor]) -> WeightSource:
    """The source that a path or mapping is.

    Raises:
        LiftingError: it is none.
    """
    if isinstance(source, Mapping):
        return _MappingSource(source)
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return _SafetensorsSource(path, None)
    if path.is_file() and path.name == _INDEX:
        return _SafetensorsSource(path.parent, _weight_map(path))
    if (path / _INDEX).is_file():
        return _SafetensorsSource(path, _weight_map(path / _INDEX))
    if (path / _SINGLE).is_file():
        return _SafetensorsSource(path / _SINGLE, None)
    if (path / _DCP).is_file():
        return _DistributedSource(path)
    if not path.exists():
        raise LiftingError(f"there is no checkpoint {path}")
    raise LiftingError(
        f"{path} is no checkpoint that can be read: a directory with {_SINGLE} or {_INDEX}, a .safetensors file, or a "
        "directory of torch.distributed.checkpoint; for another format give a mapping from FQN to tensor"
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        mapping = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(fqn): str(file) for fqn, file in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LiftingError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    outside = next((file for file in pairs.values() if file != Path(file).name or file in ("", "..")), None)
    if outside is not None:
        raise LiftingError(f"{path} names the file {outside!r}, which is not beside it")
    return pairs


class _MappingSource(WeightSource):
    what = "the mapping"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors

    def info(self, name: str) -> TensorInfo:
        value = self.tensors[name]
        if not isinstance(value, torch.Tensor):
            raise LiftingError(f"{name!r} is a {type(value).__name__} in the mapping, not a tensor")
        if value.device.type == "meta":
            raise LiftingError(f"{name!r} is on the meta device in the mapping: it has no values")
        return TensorInfo(tuple(value.shape), value.dtype)

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name].detach().to(device, copy=True) for name in names}


class _SafetensorsSource(WeightSource):
    def __init__(self, path: Path, weight_map: dict[str, str] | None) -> None:
        """``path``: the file, or with ``weight_map`` (tensor -> file) the directory."""
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise LiftingError(f"reading {path} needs the package safetensors") from error
        self.open: Any = safe_open
        self.what = str(path)
        self.files: dict[str, Any] = {}
        if weight_map is None:
            weight_map = dict.fromkeys(self._file(path).keys(), path.name)
            path = path.parent
        self.directory, self.weight_map = path, weight_map

    def _file(self, path: Path) -> Any:
        if path.name not in self.files:
            try:
                self.files[path.name] = self.open(str(path), framework="pt")
            except Exception as error:  # safetensors' own error, or the system's
                raise LiftingError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return self.files[path.name]

    def _slice(self, name: str) -> Any:
        path = self.directory / self.weight_map[name]
        try:
            return self._file(path).get_slice(name)
        except LiftingError:
            raise
        except Exception as error:
            raise LiftingError(f"{path} has no tensor {name!r}, although the index says so: {error}") from error

    def names(self) -> Iterable[str]:
        return self.weight_map

    def info(self, name: str) -> TensorInfo:
        part = self._slice(name)
        dtype = part.get_dtype()
        return TensorInfo(tuple(part.get_shape()), _DTYPES.get(dtype, dtype))

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        tensors = {}
        for name in names:
            mapped = self._file(self.directory / self.weight_map[name]).get_tensor(name)  # the file's own pages
            tensors[name] = mapped.to(device, copy=True)
        return tensors


class _DistributedSource(WeightSource):
    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.path, self.what = path, str(path)
        try:
            metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        except Exception as error:
            raise LiftingError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        self.metadata = {name: meta for name, meta in metadata.items() if isinstance(meta, TensorStorageMetadata)}

    def names(self) -> Iterable[str]:
        return self.metadata

    def info(self, name: str) -> TensorInfo:
        meta = self.metadata[name]
        return TensorInfo(tuple(meta.size), meta.properties.dtype)

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        import torch.distributed.checkpoint as dcp

        infos = {name: self.metadata[name] for name in names}
        tensors = {
            name: torch.empty(meta.size, dtype=meta.properties.dtype, device=device) for name, meta in infos.items()
        }
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                # ranks load different stages, so they do not plan together
                dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
        except Exception as error:
            raise LiftingError(f"{self.path} cannot be read: {type(error).__name__}: {error}") from error
        return tensors
