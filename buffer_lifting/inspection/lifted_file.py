"""Reads and checks a saved lifted program without torch, and without running anything from it.

The file is a zip of JSON records and the program's own archive, which is read where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer_lifting.axes import axes_argument
from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.archive_schema import MAX_JSON, SchemaError, as_count, as_dict, load_json
from buffer_lifting.graph.archive_zip import ZipArchive
from buffer_lifting.graph.record import Arg, GraphRecord, NodeKind, Ref
from buffer_lifting.inspection.diagnostics import Diagnostic, check_record, gathers_natural, or_misplaced
from buffer_lifting.inspection.lifted_checks import PlainNode, shape_of_graph
from buffer_lifting.inspection.saved_records import axes_of, input_axes_of, inputs_of, report_of
from buffer_lifting.program import AxesInfo, InputAxes, LiftedInput, ScanReport

MANIFEST, PROGRAM, FORMAT, VERSION = "manifest.json", "program.pt2", "buffer_lifting.lifted", 1
_PLAIN = {
    NodeKind.INPUT: "placeholder",
    NodeKind.STATE: "placeholder",
    NodeKind.OP: "call_function",
    NodeKind.OUTPUT: "output",
}


@dataclass(frozen=True, slots=True)
class SavedLifted:
    """A saved lifted program without its tensors; ``report`` is that of the program before lifting."""

    report: ScanReport
    axes: AxesInfo
    input_axes: dict[str, InputAxes]
    inputs: tuple[LiftedInput, ...]
    cp_size: int | None


@dataclass(frozen=True, slots=True)
class LiftedFile:
    """A saved lifted program with the graph in it."""

    saved: SavedLifted
    record: GraphRecord

    def nodes(self) -> tuple[PlainNode, ...]:
        """Its graph in the plain form."""
        return tuple(_plain_nodes(self.record))


def read_lifted_graph(path: Path) -> LiftedFile:
    """A saved lifted program: its records, and the program in it.

    Raises:
        ArchiveError: as in :func:`read_lifted`, or a program in it that cannot be read.
    """
    saved, window = _open(path)
    return LiftedFile(saved, read_archive(path, window))


def lifted_findings(file: LiftedFile) -> tuple[Diagnostic, ...]:
    """The findings of a saved lifted program."""
    saved = file.saved
    shape = shape_of_graph(file.nodes(), saved.inputs, saved.report, saved.input_axes, saved.axes)

    def rescanned() -> tuple[Diagnostic, ...]:
        found = check_record(file.record, axes_argument(saved.input_axes, saved.inputs))
        return tuple(item for item in found if not gathers_natural(item, saved.report, saved.inputs))

    return or_misplaced(rescanned, shape)


def read_lifted(path: Path) -> SavedLifted:
    """The records of a saved lifted program; the program in it is not read.

    Raises:
        ArchiveError: no saved lifted program, a damaged one, or one of another version.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[SavedLifted, tuple[int, int]]:
    """The records, and where in the file the program's archive is."""
    try:
        with ZipArchive(path, rooted=False) as archive:
            manifest = as_dict(load_json(archive.read(MANIFEST, MAX_JSON)), MANIFEST)
            if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
                raise ArchiveError(f"{MANIFEST} is not of a saved lifted program, version {VERSION}")
            saved = SavedLifted(
                report_of(manifest), axes_of(manifest), input_axes_of(manifest), inputs_of(manifest), _size(manifest)
            )
            return saved, archive.window(PROGRAM)
    except (SchemaError, ArchiveError) as error:
        raise ArchiveError(f"{path}: {' '.join(str(error).split())}") from None
    except (MemoryError, RecursionError):
        raise ArchiveError(f"{path}: too large or too deeply nested") from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}") from None


def _size(manifest: dict[str, Any]) -> int | None:
    size = manifest.get("cp_size")
    return None if size is None else as_count(size, "cp_size")


def _plain_nodes(record: GraphRecord) -> list[PlainNode]:
    nodes = []
    for node in record.nodes.values():
        if node.kind in _PLAIN:
            op = _PLAIN[node.kind]
            shape = tuple(str(size) for size in node.tensor.shape) if op == "placeholder" and node.tensor else None
            args = tuple(_plain_arg(arg) for arg in node.args.values())
            nodes.append(PlainNode(node.name, op, node.op or node.name, args, shape))
    return nodes


def _plain_arg(arg: Arg) -> object:
    if isinstance(arg, Ref):
        return {"node": arg.name}
    return [_plain_arg(item) for item in arg] if isinstance(arg, tuple) else arg
