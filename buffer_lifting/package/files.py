"""The files of packages: manifests with a version, checksums, and writing that is finished or has not happened."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from buffer_lifting.errors import LiftingError
from buffer_lifting.regular_file import open_regular

LIFTED, STAGED = "buffer_lifting.lifted", "buffer_lifting.staged"
VERSIONS = {LIFTED: 1, STAGED: 2}
MANIFEST = "manifest.json"
#: What a damaged document raises where it is taken for a sound one.
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
_SUFFIX, _LOCK, _NEW, _OLD = ".saving", "lock", "new", "old"
_CHECKSUM = "checksum"
_FRESH = 60.0  # seconds


def header(kind: str) -> dict[str, Any]:
    """How every manifest begins."""
    return {"format": kind, "version": VERSIONS[kind], "torch": str(torch.__version__)}


def dumps(document: Any) -> bytes:
    """A document as readable JSON that is the same for the same content.

    Lists of objects are written an object a line: the nodes of a graph, the index of tensors.
    """
    return (_block(document, "") + "\n").encode()


def _block(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        lines = [f"{inner}{json.dumps(key)}: {_block(value[key], inner)}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return "[\n" + ",\n".join(inner + _line(item) for item in value) + f"\n{indent}]"
    return _line(value)


_line = functools.partial(json.dumps, sort_keys=True, allow_nan=False)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked_manifest(data: bytes, kind: str, where: str) -> dict[str, Any]:
    """A manifest of the wanted kind and version.

    Raises:
        LiftingError: of another kind or version.
    """
    manifest = json.loads(data)
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise LiftingError(f"{where} has no manifest of a {kind} package")
    version, known = manifest.get("version"), VERSIONS[kind]
    if version != known:
        older = type(version) is int and version < known
        hint = (
            "export, lift and save the program again"
            if older
            else f"it was saved by another buffer_lifting (with torch {manifest.get('torch')}): load it with that one"
        )
        raise LiftingError(f"{where} has version {version!r} of the format; this buffer_lifting reads {known}: {hint}")
    return manifest


def sealed(document: Mapping[str, Any]) -> bytes:
    """A manifest with its own checksum."""
    return dumps({**document, _CHECKSUM: hashlib.sha256(dumps(document)).hexdigest()})


def check_seal(data: bytes, manifest: Mapping[str, Any], where: str) -> None:
    """Refuses a manifest that is not byte for byte what :func:`sealed` made.

    Raises:
        LiftingError: it was changed.
    """
    if data != sealed({key: value for key, value in manifest.items() if key != _CHECKSUM}):
        raise LiftingError(f"{where} has a manifest that was changed or damaged; save the package again")


def read_json(path: Path, checksums: Mapping[str, str]) -> dict[str, Any]:
    """A JSON file that has the checksum of the manifest.

    Raises:
        LiftingError: another checksum.
    """
    with open_regular(path) as stream:
        data = stream.read()
    compare(path, hashlib.sha256(data).hexdigest(), checksums)
    return cast(dict[str, Any], json.loads(data))


def compare(path: Path, found: str, checksums: Mapping[str, str]) -> None:
    """Refuses a file whose SHA-256 is not the one of the manifest."""
    if checksums.get(path.name) != found:
        raise LiftingError(
            f"{path} is not the file that was saved (its SHA-256 is another): it is damaged, or of another save or "
            "stage; save the package again"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place for a new file or directory, which takes the place of ``path`` if nothing is raised.

    The place is in a hidden directory beside ``path``, ``.<name>.<random>.saving``, which is gone afterwards. A process
    that is killed leaves it behind; the next save to the same path removes it. Until the new content is complete,
    ``path`` is what it was.

    Raises:
        LiftingError: the directory of ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise LiftingError(f"there is no directory {path.parent}")
    remove_leftovers(path)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
    try:
        with (work / _LOCK).open("w") as lock:  # held for as long as this process lives and saves
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield work / _NEW
            _exchange(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _exchange(work: Path, path: Path) -> None:
    """Puts the new content at ``path``; what was there before ends up in ``work``."""
    new = work / _NEW
    if not path.is_dir() or path.is_symlink():
        os.replace(new, path)  # a file, or nothing: one step
    elif not _swap(new, path):
        os.replace(path, work / _OLD)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(work / _OLD, path)
            raise


def _swap(one: Path, other: Path) -> bool:
    """Exchanges two directories in one step, where system and file system can: ``renameat2(RENAME_EXCHANGE)``."""
    rename = _renameat2()
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return cast("Callable[..., int] | None", function)


def leftovers(path: Path) -> list[Path]:
    """What saves to ``path`` that were killed have left beside it, and what saves that still run write to."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\w+{re.escape(_SUFFIX)}")  # mkdtemp's random part has no dot
    try:
        return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir())
    except OSError:
        return []


def remove_leftovers(path: Path) -> None:
    """Removes what killed saves to ``path`` have left; puts back an earlier package that one had moved away."""
    for work in leftovers(path):
        try:
            if not (work / _LOCK).exists() and time.time() - work.stat().st_mtime < _FRESH:
                continue  # a save that is about to take its lock
            with (work / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (work / _OLD).exists() and not path.exists():
                    os.replace(work / _OLD, path)
                shutil.rmtree(work, ignore_errors=True)
        except OSError:  # a save that still runs, or one of another user
            continue


def earlier_package(path: Path) -> Path | None:
    """Where a save that was killed between two renames has left what was at ``path``."""
    return next((work / _OLD for work in leftovers(path) if (work / _OLD).is_dir()), None)
