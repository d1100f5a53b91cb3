"""Which states of an archive are one storage, and which hold equal values: from raw bytes, never from a pickle."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from buffer_lifting.graph.archive_schema import (
    DTYPES,
    MAX_DIMS,
    MAX_JSON,
    STRIDED,
    SchemaError,
    as_bool,
    as_count,
    as_dict,
    as_int,
    as_list,
    as_name,
    as_union,
    device_name,
    dtype_name,
    field,
    load_json,
)
from buffer_lifting.graph.archive_zip import Member, ZipArchive
from buffer_lifting.graph.record import Node, StateKind
from buffer_lifting.graph.shape_grammar import short

_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_PATH = re.compile(r"\w{1,64}", re.ASCII)
_MAX_GATHER = 1 << 22  # elements of a strided tensor that are gathered to compare its content
_MAX_SPAN = 1 << 28  # bytes of its storage that are held for it
_MAX_ROWS = 1 << 22  # rows that are gathered in all
_MAX_READ = 1 << 30  # bytes of tensors that are read in all, besides some times the file's own size
_FILE_TIMES = 4
_UNUSED_TIMES, _UNUSED_BYTES = 16, 1 << 26  # how much more than its tensors a compressed member may hold
_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class _Payload:
    """A tensor of the archive: a strided view of a member's bytes."""

    member: Member
    dtype: str
    item: int  # bytes of an element
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements
    has_data: bool

    @property
    def span(self) -> int:
        """Bytes of the member from its start to the end of the last element."""
        if not prod(self.shape):
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.item

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class States:
    """The tensors of an archive by FQN, for :meth:`fill`."""

    def __init__(self, archive: ZipArchive) -> None:
        self.archive = archive
        self.stores = [_config(archive, _WEIGHTS, "weights"), _config(archive, _CONSTANTS, "constants")]
        self.aliases: dict[str, list[str]] = defaultdict(list)
        self._reader = _Elements(archive)
        self._digests: dict[tuple[str, str], str | None] = {}
        self._uniforms: dict[tuple[str, str], bool] = {}
        self._check_claims()
        for store in self.stores:
            for fqn, payload in store.items():
                if payload is not None:
                    self.aliases[_key(payload, fqn)].append(fqn)

    def _check_claims(self) -> None:
        """A compressed member that holds far more than the tensors in it would be unpacked for nothing."""
        spans: dict[str, int] = defaultdict(int)
        members: dict[str, Member] = {}
        for payload in (item for store in self.stores for item in store.values() if item is not None):
            members[payload.member.name] = payload.member
            spans[payload.member.name] = max(spans[payload.member.name], payload.span)
        for name, member in members.items():
            if member.compressed and member.size > max(_UNUSED_TIMES * spans[name], _UNUSED_BYTES):
                raise SchemaError(f"{name} unpacks to {member.size} bytes, and its tensors take {spans[name]} of them")

    def _digest(self, payload: _Payload, fqn: str) -> str | None:
        """The hash of a tensor's content; each view of a storage is read once."""
        key = (_key(payload, fqn), payload.dtype)
        if key not in self._digests:
            self._digests[key] = _digest(self._reader, payload)
        return self._digests[key]

    def _uniform(self, payload: _Payload, fqn: str) -> bool:
        key = (_key(payload, fqn), payload.dtype)
        if key not in self._uniforms:
            self._uniforms[key] = _is_uniform(self._reader, payload)
        return self._uniforms[key]

    def _payload(self, fqn: str) -> _Payload | None:
        return self.stores[0].get(fqn) if fqn in self.stores[0] else self.stores[1].get(fqn)

    def fill(self, nodes: Iterable[Node]) -> None:
        """Sets the aliases and the content of the state nodes. Parameters' data is never read."""
        nodes = list(nodes)
        groups: dict[Any, list[str]] = defaultdict(list)
        for node in nodes:
            payload = self._payload(node.fqn)
            if payload is not None and node.state_kind is not StateKind.PARAMETER:
                groups[payload.dtype, payload.shape].append(node.fqn)
        contents = {}
        for fqns in groups.values():
            payloads = {fqn: payload for fqn in fqns if (payload := self._payload(fqn)) is not None}
            keys = {fqn: _key(payload, fqn) for fqn, payload in payloads.items()}
            compare = len(set(keys.values())) > 1
            for fqn, payload in payloads.items():
                contents[fqn] = (self._digest(payload, fqn) if compare else None) or keys[fqn]
        for node in nodes:
            payload = self._payload(node.fqn)
            node.content = contents.get(node.fqn, node.fqn)
            if payload is not None:
                transient = node.state_kind is not StateKind.BUFFER or not node.persistent
                node.uniform = transient and self._uniform(payload, node.fqn)
                node.aliases = tuple(fqn for fqn in self.aliases[_key(payload, node.fqn)] if fqn != node.fqn)


def _config(archive: ZipArchive, folder: str, kind: str) -> dict[str, _Payload | None]:
    """The payloads of one configuration file; ``None`` for a pickled one, which is not opened."""
    name = f"{folder}model_{kind}_config.json"
    if f"{folder}model.pt" in archive.members:
        raise SchemaError(f"its {kind} are one pickle, as old versions of torch wrote it; export it again")
    try:
        config = as_dict(field(as_dict(load_json(archive.read(name, MAX_JSON)), "it"), "config", "it"), "config")
        return {as_name(fqn, "an FQN"): _payload(archive, folder, value) for fqn, value in config.items()}
    except SchemaError as error:
        raise SchemaError(f"{name}: {error}") from None


def _payload(archive: ZipArchive, folder: str, value: Any) -> _Payload | None:
    payload = as_dict(value, "a payload")
    path = as_name(field(payload, "path_name", "a payload"), "a path")
    if not _PATH.fullmatch(path) or f"{folder}{path}" not in archive.members:
        raise SchemaError(f"the payload {short(path)} is not a member of {folder}")
    if as_bool(field(payload, "use_pickle", path), path):
        return None
    member = archive.members[f"{folder}{path}"]
    meta = as_dict(field(payload, "tensor_meta", path), path)
    dtype = dtype_name(field(meta, "dtype", path), path)
    item = DTYPES[meta["dtype"]][1]
    shape = _ints(field(meta, "sizes", path), path)
    strides = _ints(field(meta, "strides", path), path)
    (offset,) = _ints([field(meta, "storage_offset", path)], path)
    if len(shape) != len(strides):
        raise SchemaError(f"{path} has {len(shape)} sizes and {len(strides)} strides")
    strided = as_int(field(meta, "layout", path), path) == STRIDED
    on_meta = device_name(field(meta, "device", path), path) == "meta"
    numel = prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if numel and member.size and (last + 1) * item > member.size:
        raise SchemaError(f"a tensor in {path} claims more elements than its {member.size} bytes have")
    has_data = bool(numel and member.size and strided and not on_meta)
    return _Payload(member, dtype, item, shape, strides, offset, has_data)


def _ints(values: Any, what: str) -> tuple[int, ...]:
    items = as_list(values, what)
    if len(items) > MAX_DIMS:
        raise SchemaError(f"{what} has {len(items)} dims, the limit is {MAX_DIMS}")
    numbers = []
    for item in items:
        tag, value = as_union(item, what)
        if tag != "as_int":
            raise SchemaError(f"{what} has a size that is no integer")
        numbers.append(as_count(value, what))
    return tuple(numbers)


def _key(payload: _Payload, fqn: str) -> str:
    """What two names of one storage and one view of it share."""
    if not payload.has_data:
        return fqn
    return f"{payload.member.name}:{payload.offset}:{payload.shape}:{payload.strides}"


def _digest(reader: _Elements, payload: _Payload) -> str | None:
    """A hash of a tensor's elements in order; ``None`` if they are not there, or too many to gather."""
    if not prod(payload.shape):
        return f"empty:{payload.dtype}:{payload.shape}"
    digest, empty = hashlib.blake2b(digest_size=16), True
    for piece in reader.pieces(payload):
        digest.update(piece)
        empty = False
    return None if empty else f"{digest.hexdigest()}:{payload.dtype}:{payload.shape}"


def _is_uniform(reader: _Elements, payload: _Payload) -> bool:
    """Whether all elements of an integer tensor are equal."""
    if not payload.has_data or not payload.dtype.startswith(("int", "uint", "bool")):
        return False
    first = b""
    for piece in reader.pieces(payload):
        first = first or piece[: payload.item]
        if piece != first * (len(piece) // payload.item):
            return False
    return bool(first)


class _Elements:
    """Reads tensors' elements, within a budget of bytes and rows for the whole archive."""

    def __init__(self, archive: ZipArchive) -> None:
        self.archive = archive
        self.limit = self.left = _MAX_READ + _FILE_TIMES * archive.length
        self.rows = _MAX_ROWS

    def pieces(self, payload: _Payload) -> Iterator[bytes]:
        """A tensor's elements in order, as pieces of whole elements; nothing if none are there, or too many to gather.

        Raises:
            SchemaError: the budget is spent.
        """
        if not payload.has_data:
            return
        if not payload.contiguous:
            yield from self._gathered(payload)
            return
        start, left = payload.offset * payload.item, prod(payload.shape) * payload.item
        kept = b""
        for chunk in self._chunks(payload.member):
            part = chunk[start : start + left]
            start = max(0, start - len(chunk))
            left -= len(part)
            part = kept + part
            whole = len(part) // payload.item * payload.item
            kept = part[whole:]
            if whole:
                yield part[:whole]
            if not left:
                break

    def _chunks(self, member: Member) -> Iterator[bytes]:
        for chunk in self.archive.chunks(member):
            self.left -= len(chunk)
            if self.left < 0:
                raise SchemaError(f"its buffers unpack to more than {self.limit} bytes: more than the limit")
            yield chunk

    def _gathered(self, payload: _Payload) -> Iterator[bytes]:
        """The rows of a strided tensor, from the part of its storage that has them."""
        rows = prod(payload.shape[:-1])
        if prod(payload.shape) > _MAX_GATHER or payload.span > _MAX_SPAN or rows > self.rows:
            return
        self.rows -= rows
        data = bytearray()
        for chunk in self._chunks(payload.member):
            data += chunk[: payload.span - len(data)]
            if len(data) >= payload.span:
                break
        if len(data) < payload.span:
            raise SchemaError(f"{payload.member.name} has fewer bytes than its tensors claim")
        count, step = payload.shape[-1], payload.strides[-1]
        for index in product(*[range(size) for size in payload.shape[:-1]]):
            outer = sum(i * stride for i, stride in zip(index, payload.strides[:-1], strict=True))
            yield _row(data, payload.offset + outer, count, step, payload.item)


def _row(data: bytearray, start: int, count: int, step: int, item: int) -> bytes:
    """``count`` elements, ``step`` elements apart."""
    if not step:
        return bytes(data[start * item : (start + 1) * item]) * count
    if item not in _FORMATS:
        return b"".join(bytes(data[at * item : (at + 1) * item]) for at in range(start, start + count * step, step))
    whole = len(data) // item * item
    view: Any = memoryview(data)[:whole]
    return bytes(view.cast(_FORMATS[item])[start : start + (count - 1) * step + 1 : step].tobytes())
