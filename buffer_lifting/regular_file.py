"""Opens files that may be a stranger's: a regular file or nothing, so that no pipe is waited for and no device read."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """A regular file (or a link to one), open for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    _check(path.stat().st_mode, path)
    stream = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    try:
        _check(os.fstat(stream.fileno()).st_mode, path)  # another file may have taken its place
    except OSError:
        stream.close()
        raise
    return stream


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
