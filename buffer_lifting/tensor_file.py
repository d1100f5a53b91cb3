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
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise LiftingError(
                f"{name!r} is a {type(tensor).__name__} of layout {tensor.layout}; plain tensors can be saved"
            )
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))
        if not tensor.permute(order).is_contiguous():
            order = list(range(tensor.ndim))
        entry = {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "order": order}
        index.append({**entry, "device": str(tensor.device)})
        if tensor.device.type != "meta":
            plain = tensor.detach().resolve_conj().resolve_neg().permute(order).cpu().contiguous()
            stream.write(_bytes(plain))
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
            order, device = entry["order"], torch.device(entry["device"])
            shape = [entry["shape"][dim] for dim in order]
            plain = torch.empty(
                shape, dtype=dtype_of(entry["dtype"]), device="meta" if device.type == "meta" else "cpu"
            )
            if device.type != "meta":
                view = _bytes(plain)
                if _read_into(stream, view) != len(view):
                    raise LiftingError(f"the bytes of {entry['name']!r} are cut off")
                digest.update(view)
            tensor = plain.permute([order.index(dim) for dim in range(len(order))])
            tensors[entry["name"]] = tensor.to(device) if own_device else tensor
        if stream.read(1):
            raise LiftingError("there are more bytes than the index lists")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise LiftingError(f"the index of the tensors is damaged: {type(error).__name__}: {error}") from error
    return tensors, digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def _read_into(stream: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done
