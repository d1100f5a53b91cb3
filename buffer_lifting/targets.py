"""The command line's targets: a ``.pt2`` file, a saved lifted program, or ``package.module:callable``.

The graph of a file is read by readers of our own, which run nothing. Its tensors are read by torch's loader, which runs
code that is in the file: only where the user says so (``--trust``). A module is imported, and runs.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer_lifting.terminal import stdout_to_stderr

if TYPE_CHECKING:
    from buffer_lifting.graph.record import GraphRecord
    from buffer_lifting.program import Axes

_NOT_REGISTERED = re.compile(r"Deserializing ([\w.]+) in pytree is not registered")


class TargetError(Exception):
    """The target cannot be loaded; the message is one line."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def load_program(target: str, trust: bool = False) -> Any:
    """The ExportedProgram (or ``fx.GraphModule``) of a target, with its tensors. A file needs ``trust``.

    Raises:
        TargetError: it cannot be loaded, is something else, or a file that is not trusted.
    """
    if target.endswith(".lifted"):
        raise TargetError(f"{target}: a lifted program; this command takes the program before lifting")
    with stdout_to_stderr():  # what a module or a model prints is no finding
        program = _load_file(Path(target), trust) if _is_file(target) else call_target(target)
    return _checked(target, program)


def load_graph(target: str, trust: bool = False) -> GraphRecord:
    """The record of a target. Nothing of a file is run, and torch is not imported, unless there is ``trust``.

    Raises:
        TargetError: it cannot be loaded, or is something else.
        ArchiveError: a file that the reader refuses.
    """
    if _is_file(target) and target.endswith(".pt2") and not trust:
        _check_there(Path(target))
        from buffer_lifting.graph.archive import read_archive

        return read_archive(target)
    program = load_program(target, trust)
    from buffer_lifting.adapter import as_program
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize

    program = as_program(program)
    return build_record(program, normalize(program, read_only=True).graph)


def load_checkable(target: str, trust: bool = False) -> Any:
    """A program, lifted or staged ones included: that of a file (which needs ``trust``), or what the callable returns.

    Raises:
        TargetError: it cannot be loaded or called, or is something else.
    """
    if target.endswith(".lifted"):
        return load_lifted(target, trust)
    if target.endswith(".pt2"):
        return load_program(target, trust)
    with stdout_to_stderr():
        program = call_target(target)
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

    return program if isinstance(program, LiftedProgram | StagedProgram) else _checked(target, program)


def load_lifted(target: str, trust: bool, axes: Axes | None = None) -> Any:
    """A saved lifted program, which needs ``trust``.

    Raises:
        TargetError: it cannot be loaded, is not trusted, or ``axes`` are given, which it has.
    """
    if axes:
        raise TargetError(f"{target}: a lifted program, whose axes are known; --axes is for a program to be lifted")
    check_trusted(Path(target), trust)
    from buffer_lifting.package import load

    with stdout_to_stderr():
        return _read(Path(target), load, "a program that `buffer-lifting lift` wrote")


def _is_file(target: str) -> bool:
    return target.endswith(".pt2") or ":" not in target or Path(target).is_file()


def _checked(target: str, program: Any) -> Any:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    if not isinstance(program, ExportedProgram | GraphModule):
        raise TargetError(
            f"{target}: returned {type(program).__name__}, not an ExportedProgram "
            "(torch.export.export makes one) or an fx.GraphModule"
        )
    return program


def _load_file(path: Path, trust: bool) -> Any:
    if path.suffix != ".pt2":
        raise TargetError(f"{path}: a target is a .pt2 file or package.module:callable")
    check_trusted(path, trust)
    from torch.export import load

    return _read(path, load, "a program that torch.export.save wrote with this torch")


def _check_there(path: Path) -> None:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise TargetError(f"{path}: it is no regular file")
        path.open("rb").close()
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}") from error


def check_trusted(path: Path, trust: bool) -> None:
    """Refuses to load a file, if there is one, without ``trust``.

    Raises:
        TargetError: it cannot be opened, or is not trusted.
    """
    _check_there(path)
    if not trust:
        raise TargetError(
            f"{path}: this needs the tensors in the file, and torch's loader, which reads them, runs code that is in "
            "it; give --trust if you trust the file"
        )


def _read(path: Path, load: Callable[[Any], Any], expected: str) -> Any:
    try:
        return _with_classes(load, str(path))
    except Exception as error:
        raise TargetError(f"{path}: not {expected} ({first_line(error)})") from error


def _with_classes(load: Callable[[Any], Any], path: str) -> Any:
    """What ``load`` makes of a trusted file.

    A program may return objects (Hugging Face's ``ModelOutput``) that torch can only make once the module of their
    class is imported: it is imported then. torch logs why a file cannot be read, with a traceback, and raises an
    error without the reason: here the reason is raised, and nothing is printed.
    """
    logger, known = logging.getLogger("torch.export"), set[str]()
    while True:
        reasons: list[BaseException] = []

        def keep(record: logging.LogRecord, reasons: list[BaseException] = reasons) -> bool:
            error = record.exc_info[1] if record.exc_info else None
            reasons += [error] if error is not None else []
            return error is None

        logger.addFilter(keep)
        try:
            return load(path)
        except Exception as error:
            reason = reasons[-1] if reasons else error
            match = _NOT_REGISTERED.search(str(reason))
            if match is None or match[1] in known:
                raise reason from error
            known.add(match[1])
            try:
                pkgutil.resolve_name(match[1])
            except Exception:
                raise TargetError(
                    f"it returns a {match[1]}, and {match[1].split('.')[0]} cannot be imported here"
                ) from error
        finally:
            logger.removeFilter(keep)


def call_target(target: str) -> Any:
    """What the callable of ``package.module:callable`` returns.

    Raises:
        TargetError: it cannot be imported or called.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise TargetError(f"{target}: a target is a .pt2 file or package.module:callable")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        value: Any = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, pytest.skip: an exit code of theirs is not the command's
        raise TargetError(f"{target}: cannot import {module_name} ({_what(error)})") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise TargetError(f"{target}: {module_name} has no {attribute!r}")
        value = getattr(value, part)
    if not callable(value):
        raise TargetError(f"{target}: {attribute} is not callable")
    try:
        return value()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TargetError(f"{target}: {attribute}() failed ({_what(error)})") from error


def _what(error: BaseException) -> str:
    return f"it exits, SystemExit: {error.code}" if isinstance(error, SystemExit) else first_line(error)
