"""What is written to standard output and error: text that no CI takes for a command, and no other output."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

_COMMAND = re.compile(r"^([^\S\n]*)::", re.MULTILINE)
_LOG_COMMAND = re.compile(r"##(?=[\w.]*\[)")


def inert(text: str) -> str:
    r"""The text with ``\`` where it would be a command of a CI's log: ``::error``, ``##[add-mask]``, ``##vso[...]``."""
    return inert_inside(_COMMAND.sub(r"\1\\::", text))


def inert_inside(text: str) -> str:
    """The same for text that no line begins with."""
    return _LOG_COMMAND.sub(r"##\\", text)


def inert_json(text: str) -> str:
    """A JSON document of the same value, with no such command in its strings."""
    return _LOG_COMMAND.sub(r"#\\u0023", text)


def inert_html(text: str) -> str:
    """Text of a page, escaped already, that shows the same."""
    return _LOG_COMMAND.sub("#&#35;", _COMMAND.sub(r"\1&#58;:", text))


def emit(text: str) -> None:
    """Prints a document. Who reads it may stop early (``| head``): that is no failure of what was checked."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends to standard error what the body writes to standard output, also by C libraries and child processes."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # there is none
        with redirect_stdout(sys.stderr):
            yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        with suppress(OSError, ValueError, AttributeError):
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
            import ctypes

            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
