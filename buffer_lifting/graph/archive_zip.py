"""A strict reader of the zip files that torch.export writes: members by name, within limits, nothing else.

Stricter than ``zipfile`` on purpose. torch has a zip reader of its own (it matches names without regard to case, and
takes the first directory as the archive's), so whatever two readers could see differently is refused: data before,
between or behind the members that the directory does not name, overlapping members, names that differ by case only,
several roots, names that leave the archive, encryption, and compression other than deflate.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.shape_grammar import short
from buffer_lifting.regular_file import open_regular

MAX_DIRECTORY = 64 * 2**20  # bytes
MAX_MEMBERS = 200_000
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")
_HAS_DESCRIPTOR = 8
_STORED, _DEFLATED = 0, 8
_CHUNK = 1 << 20
_BIG = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the archive."""

    name: str  # without the root directory
    flags: int
    method: int
    crc: int
    packed: int  # bytes in the file
    size: int  # bytes as the directory claims
    offset: int  # of its local header
    stored_name: bytes

    @property
    def compressed(self) -> bool:
        """Whether it may unpack to more bytes than it has."""
        return self.method != _STORED


class ZipArchive:
    """The members of a zip file, by name without the common root directory. A context manager.

    Args:
        path: the file.
        window: offset and length of the part of the file that is the archive; default: all of it.
        rooted: whether there has to be a common root directory, as torch.export writes one; else there is none.

    Raises:
        ArchiveError: on construction and on reading, for whatever is not as described in the module's docstring.
    """

    def __init__(self, path: Path, window: tuple[int, int] | None = None, rooted: bool = True) -> None:
        self.members: dict[str, Member] = {}
        self._rooted = rooted
        self._file: BinaryIO
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise ArchiveError(f"cannot be opened: {error.strerror}") from None
        try:
            self._start, self._length = window or (0, os.fstat(self._file.fileno()).st_size)
            self._index()
        except OSError as error:
            self._file.close()
            raise ArchiveError(f"cannot be read: {error.strerror}") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ZipArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str, limit: int) -> bytes:
        """The content of a member of at most ``limit`` bytes, checked against its CRC."""
        member = self.members.get(name)
        if member is None:
            raise ArchiveError(f"there is no {name} in it: not written by torch.export.save, or damaged")
        if member.size > limit:
            raise ArchiveError(f"{name} claims {member.size} bytes, the limit is {limit}")
        return b"".join(self.chunks(member))

    @property
    def length(self) -> int:
        """The size of the archive in bytes."""
        return self._length

    def window(self, name: str) -> tuple[int, int]:
        """Offset and length of a member in the file, if it is stored as it is: an archive in this one."""
        member = self.members.get(name)
        if member is None or member.method != _STORED:
            raise ArchiveError(f"there is no {name} in it that is stored uncompressed")
        return self._start + self._data_start(member), member.size

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The content of a member in pieces, never more than it claims; its CRC is checked at the end."""
        start = self._data_start(member)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == _DEFLATED else None
        self._file.seek(self._start + start)
        left, produced, crc, tail = member.packed, 0, 0, b""
        while left or tail:
            raw = tail or self._take(min(left, _CHUNK))
            left -= 0 if tail else len(raw)
            piece, tail = raw, b""
            if unpack is not None:
                try:
                    piece = unpack.decompress(raw, _CHUNK)
                except zlib.error:
                    raise ArchiveError(f"{member.name} is damaged (its compressed data)") from None
                tail = unpack.unconsumed_tail
            produced += len(piece)
            if produced > member.size:
                raise ArchiveError(f"{member.name} unpacks to more than the {member.size} bytes that it claims")
            crc = zlib.crc32(piece, crc)
            position = self._file.tell()
            yield piece
            self._file.seek(position)
            if unpack is not None and unpack.eof:
                break
        if produced != member.size or left or crc != member.crc:
            raise ArchiveError(f"{member.name} is damaged (its length or checksum)")

    # -- the directory ------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ArchiveError("truncated: the file ends inside of a member")
        return data

    def _at(self, offset: int, count: int) -> bytes:
        if offset < 0 or offset + count > self._length:
            raise ArchiveError("truncated, or not a zip file")
        self._file.seek(self._start + offset)
        return self._take(count)

    def _index(self) -> None:
        start, size, count = self._directory()
        if size > MAX_DIRECTORY or count > MAX_MEMBERS:
            raise ArchiveError(f"its directory claims {count} members in {size} bytes: more than the limits")
        data = self._at(start, size)
        found: list[Member] = []
        at = 0
        while at < size:
            member, at = _central(data, at)
            found.append(member)
        if len(found) != count or not found:
            raise ArchiveError(f"damaged: {len(found)} members in a directory that claims {count}")
        self._check_layout(found, start)
        self._check_names(found)

    def _directory(self) -> tuple[int, int, int]:
        """Offset, size and number of entries of the central directory."""
        end = self._length - _END.size
        signature, *_, entries, size, start, comment = _END.unpack(self._at(end, _END.size))
        if signature != b"PK\5\6" or comment:
            raise ArchiveError("truncated, or not a zip file (no end record at its end)")
        if self._length >= _END.size + _END64_LOCATOR.size + _END64.size:
            locator = end - _END64_LOCATOR.size
            mark, _, where, _ = _END64_LOCATOR.unpack(self._at(locator, _END64_LOCATOR.size))
            if mark == b"PK\6\7":
                mark, *_, entries, size, start = _END64.unpack(self._at(where, _END64.size))
                end = where
                if mark != b"PK\6\6" or where + _END64.size != locator:
                    raise ArchiveError("damaged: its zip64 end record")
        if start + size != end:
            raise ArchiveError("damaged: its directory is not where its end record claims")
        return start, size, entries

    def _check_layout(self, members: list[Member], end: int) -> None:
        at = 0
        for member in sorted(members, key=lambda item: item.offset):
            if member.offset != at:
                raise ArchiveError(f"{short(member.name)} overlaps another member, or data is hidden before it")
            at = self._end_of(member)
        if at != end:
            raise ArchiveError("truncated, or data is hidden behind the last member")

    def _check_names(self, members: list[Member]) -> None:
        roots, folded = set(), set()
        for member in members:
            parts = member.name.split("/")
            bad = "\\" in member.name or ":" in member.name or not member.name.isprintable()
            if bad or len(parts) < 1 + self._rooted or any(part in ("", ".", "..") for part in parts):
                raise ArchiveError(f"the member name {short(member.name)} is not one that torch.export.save writes")
            roots.add(parts[0] if self._rooted else "")
            if len(roots) > 1 or member.name.casefold() in folded:
                raise ArchiveError(f"the member {short(member.name)} is ambiguous: a second root, or a second time")
            folded.add(member.name.casefold())
            name = member.name.partition("/")[2] if self._rooted else member.name
            self.members[name] = replace(member, name=name)

    def _end_of(self, member: Member) -> int:
        """The offset behind a member and the descriptor that repeats its CRC and sizes, if it has one."""
        end = self._data_start(member) + member.packed
        if not member.flags & _HAS_DESCRIPTOR:
            return end
        for descriptor in (_DESCRIPTOR, _DESCRIPTOR64):
            if end + descriptor.size <= self._length:
                values = descriptor.unpack(self._at(end, descriptor.size))
                if values == (b"PK\7\x08", member.crc, member.packed, member.size):
                    return end + descriptor.size
        raise ArchiveError(f"{short(member.name)} is damaged: its descriptor does not agree with the directory")

    def _data_start(self, member: Member) -> int:
        header = _LOCAL.unpack(self._at(member.offset, _LOCAL.size))
        signature, _, flags, method, *_, name_length, extra = header
        if signature != b"PK\3\4" or method != member.method or flags & 1 or name_length != len(member.stored_name):
            raise ArchiveError(f"{short(member.name)} is damaged: its header does not agree with the directory")
        if self._take(name_length) != member.stored_name:
            raise ArchiveError(f"{short(member.name)} has another name in its header than in the directory")
        return member.offset + _LOCAL.size + name_length + int(extra)


def _central(data: bytes, at: int) -> tuple[Member, int]:
    """The directory entry at an offset, and the offset behind it."""
    if at + _CENTRAL.size > len(data):
        raise ArchiveError("damaged: its directory is cut off")
    header = _CENTRAL.unpack_from(data, at)
    signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length = header[:13]
    offset = header[16]
    at += _CENTRAL.size
    end = at + name_length + extra_length + comment_length
    if signature != b"PK\1\2" or end > len(data):
        raise ArchiveError("damaged: its directory is not readable")
    stored_name = data[at : at + name_length]
    try:
        name = stored_name.decode("utf-8")
    except UnicodeDecodeError:
        raise ArchiveError("a member name that is not UTF-8") from None
    if flags & 1:
        raise ArchiveError(f"{short(name)} is encrypted")
    if method not in (_STORED, _DEFLATED):
        raise ArchiveError(f"{short(name)} is compressed with method {method}, which is not known")
    size, packed, offset = _zip64(data[at + name_length : at + name_length + extra_length], size, packed, offset)
    if method == _STORED and size != packed:
        raise ArchiveError(f"{short(name)} is not compressed, but claims {size} bytes in {packed}")
    return Member(name, flags, method, crc, packed, size, offset, stored_name), end


def _zip64(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Replaces the fields that do not fit 32 bits by those of the zip64 extra field."""
    fields = [size, packed, offset]
    if _BIG not in fields:
        return size, packed, offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            values = [value[0] for value in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
            for index, field in enumerate(fields):
                if field == _BIG and values:
                    fields[index] = values.pop(0)
            break
        at += 4 + length
    return fields[0], fields[1], fields[2]
