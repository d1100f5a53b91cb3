"""Tensors as raw bytes behind one another, with an index as JSON: every dtype comes back bit for bit."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import IO, Any

import torch

from buffer_lifting.errors import LiftingError
from buffer_lifting.graph_json import dtype_name, dtype_of


def write_tensors(stream: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Writes the tensors in their order; returns the index.

    A tensor on the meta device has no bytes; the same tensor under two names is written once.

    Raises:
        LiftingError: a tensor that is more than its values (sparse, or of a subclass).
    """
    index: list[dict[str, Any]] = []
    written: dict[int, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) in written:
            index.append({"name": name, "same": written[id(tensor)]})
            continue
        written[id(tensor)] = name
        index.append({**describe_tensor(name, tensor), "device": str(tensor.device)})
        if tensor.device.type != "meta":
            plain = stored_form(tensor)
            stream.write(bytes_of(plain))
    return index


def read_tensors(stream: IO[bytes], index: Any, own_device: bool) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of an index, and the SHA-256 of what was read.

    ``own_device`` puts them on the device that they were on; otherwise they are on the CPU (or meta).

    Raises:
        LiftingError: the bytes and the index do not fit each other.
    """
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256()
    try:
        for entry in index:
            if "same" in entry:
                tensors[entry["name"]] = tensors[entry["same"]]
                continue
            device = torch.device(entry["device"])
            on_meta = device.type == "meta"
            tensor, view = empty_tensor(entry, "meta" if on_meta else "cpu")
            if not on_meta:
                if fill(stream, view) != len(view):
                    raise LiftingError(f"the bytes of {entry['name']!r} are cut off")
                digest.update(view)
            tensors[entry["name"]] = tensor.to(device) if own_device else tensor
        if stream.read(1):
            raise LiftingError("there are more bytes than the index lists")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise LiftingError(f"the index of the tensors is damaged: {type(error).__name__}: {error}") from error
    return tensors, digest.hexdigest()


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The entry of a tensor in an index: name, dtype, shape, and the order of its dims in memory.

    Raises:
        LiftingError: a tensor that is more than its values (sparse, or of a subclass).
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise LiftingError(
            f"{name!r} is a {type(tensor).__name__} of layout {tensor.layout}; plain tensors can be saved"
        )
    return {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "order": _order(tensor)}


def _order(tensor: torch.Tensor) -> list[int]:
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.ndim))


def stored_form(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor as they are written: on the CPU, without gaps, in the order of its dims in memory."""
    return tensor.detach().resolve_conj().resolve_neg().permute(_order(tensor)).cpu().contiguous()


def empty_tensor(entry: Mapping[str, Any], device: str) -> tuple[torch.Tensor, memoryview]:
    """A tensor for an entry of an index, and its memory (none on the meta device), which it must outlive."""
    order = entry["order"]
    plain = torch.empty([entry["shape"][dim] for dim in order], dtype=dtype_of(entry["dtype"]), device=device)
    view = memoryview(b"") if device == "meta" else bytes_of(plain)
    return plain.permute([order.index(dim) for dim in range(len(order))]), view


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def fill(stream: IO[bytes], view: memoryview) -> int:
    """Reads bytes into a tensor's memory; returns how many there were."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done
