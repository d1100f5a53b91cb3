"""A clear error for a file whose graph contradicts itself: shapes or arguments that no op gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from buffer_lifting.errors import ArchiveError, LiftingError
from buffer_lifting.graph.record import Node, NodeKind
from buffer_lifting.graph.shape_grammar import short


@contextmanager
def untrusted(path: str | os.PathLike[str], *expected: type[Exception]) -> Iterator[None]:
    """For the analysis of what was read from a file that may be a stranger's.

    The schema of a file does not say whether the recorded shapes and arguments go together; the analysis relies on it,
    as torch.export guarantees it.

    Raises:
        ArchiveError: for every exception of the body that is no :class:`LiftingError` or ``OSError``, and none of
            ``expected``, with the node where it happened.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (LiftingError, OSError, *expected)):
            raise
        raise inconsistent(path, error) from error


def inconsistent(path: str | os.PathLike[str], error: Exception) -> ArchiveError:
    """The error that says so, with the node where an exception was raised."""
    node = _node(error.__traceback__)
    where = f" at node {short(node.name)} ({node.op})" if node is not None else ""
    reason = " ".join(str(error).split())[:120]
    printable = "".join(char if char.isprintable() else "?" for char in reason)
    return ArchiveError(
        f"{path}: its graph is inconsistent{where}: shapes or arguments that do not go together "
        f"({type(error).__name__}: {printable}); if torch.export.save wrote it so, this is a bug of buffer_lifting"
    )


def _node(trace: TracebackType | None) -> Node | None:
    """The op that the innermost function which has one was working on."""
    found = None
    while trace is not None:
        here = trace.tb_frame.f_locals
        nodes = [value for value in (here.get("node"), *here.values()) if isinstance(value, Node)]
        found = next((node for node in nodes if node.kind is NodeKind.OP), found)
        trace = trace.tb_next
    return found
