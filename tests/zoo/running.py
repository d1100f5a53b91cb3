"""Runs cells of the catalog, each into one small record: export, scan, lift, split, verify.

``run_cell`` does one of them in this process, ``Pool`` many of them in worker processes with a time limit for each.
What goes wrong stands in the record (``error``), and ``differences`` says how a record departs from the table.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import buffer_lifting as bl

from .catalog import Entry, Expected, Export, Shape, entries, export_cell, export_of
from .facts import facts_of
from .patterns import occurring

Cell = tuple[str, str, Shape]
CHECKS = ("values", "identity", "equivariance", "composition")
#: Seconds that one cell may take in a worker, export included.
LIMIT = 240.0
#: Seconds in which an idle worker ends by itself.
IDLE = 5.0
_SILENT = re.compile(r"it proves nothing for (.+), which move")


@dataclass
class Record:
    """What one cell gave.

    Attributes:
        reads: number of liftable reads by code.
        refusals: number of items that a strict lift refuses, by code; empty when the program was lifted.
        findings: a line for each kind of refused item (code, op, reason).
        handled: number of ops that mix the sequence and are handled, by reason.
        inputs: number of lifted inputs by form.
        checks: the oracles that passed.
        gradients: number of parameters whose gradients were compared.
        patterns: the pattern classes that occur (:mod:`patterns`), whatever the entry says.
        frozen: whether the model was frozen for the export.
        silent: lifted inputs whose perturbation moved nothing: the control proves nothing for them.
        seconds: CPU seconds of all of it.
        error: what went wrong in its first line, the traceback behind it; ``""`` when nothing did.
    """

    entry: str
    export: str
    shape: str
    reads: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    handled: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    gradients: int = 0
    patterns: tuple[str, ...] = ()
    frozen: bool = False
    silent: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""


def run_cell(cell: Cell) -> Record:
    """Exports, scans and lifts a cell; what can be lifted is split into two stages and verified."""
    record = Record(*cell)
    started = time.process_time()
    entry = entries()[cell[0]]
    try:
        _run(record, entry, export_of(entry, cell[1]), cell[2])
    except Exception as error:  # the cell's failure: ``differences`` accepts no record with an error
        record.error = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    record.seconds = time.process_time() - started
    return record


def _run(record: Record, entry: Entry, export: Export, shape: Shape) -> None:
    program = export_cell(entry, export, shape)
    axes: Any = export.axes
    report = bl.scan(program, axes=axes)
    record.patterns, record.frozen = occurring(facts_of(program, axes)), export.frozen
    record.reads = _counts(read.code for read in report.reads if not read.refusal)
    record.handled = _counts(mix.reason for mix in report.mixing if mix.handled)
    if report.refused:
        record.refusals = _counts(item.code for item in report.refused)
        record.findings = tuple(dict.fromkeys(finding(item) for item in report.refused))
        try:
            bl.lift(program, axes=axes)
        except (bl.UnsupportedReadError, bl.AxesError):
            return
        raise AssertionError("lift accepted a program that the scan refuses")
    lifted = bl.lift(program, axes=axes)
    assert lifted.report.reads == report.reads, "lift and scan report different reads"
    record.inputs = _counts(str(item.form) for item in lifted.inputs)
    lifted = bl.context_parallel(lifted, size=1)
    points = list(entry.split_points)
    staged = bl.partition(lifted, split_points=points) if points else bl.partition(lifted, num_stages=2)
    assert len(staged.stages) == 2, f"{len(staged.stages)} stages"
    verified = bl.verify(program, staged)
    record.checks = tuple(check.name for check in verified.checks if check.passed and check.compared)
    record.gradients = len(dict(program.module().named_parameters()))
    for name in ("identity", "composition"):
        assert verified[name].compared > record.gradients, f"{name} did not compare every gradient"
    silent = _SILENT.search(verified["equivariance"].detail)
    record.silent = tuple(silent.group(1).split(", ")) if silent else ()


def finding(item: Any) -> str:
    """Code, op and reason of a refused item, in one line; the same for all layers of a model."""
    reason = str(getattr(item, "refusal", None) or getattr(item, "reason", None) or getattr(item, "message", ""))
    op = getattr(item, "op", "")
    return f"{item.code} {op + ': ' if op else ''}{re.sub(r' [(]at [^)]*[)]', '', reason)}"


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def differences(record: Record, expected: Expected | None) -> list[str]:
    """How a record departs from the table; empty when it agrees.

    A refused export has the code of the finding that decides, and exactly the written codes that follow from it.
    """
    if expected is None:
        return ["it does not stand in the table"]
    if record.error:
        return [f"it fails: {record.error.splitlines()[0]}"]
    if expected.refusal:
        if expected.refusal not in record.refusals:
            return [f"expected a refusal with {expected.refusal}, got {record.refusals or 'none'}"]
        wanted = {expected.refusal} | expected.consequences
        more, missing = sorted(set(record.refusals) - wanted), sorted(wanted - set(record.refusals))
        found = [f"refused with {', '.join(more)} too: {_first(record, more)}"] if more else []
        return found + ([f"{', '.join(missing)} does not follow"] if missing else [])
    found = []
    if record.refusals:
        found.append(f"refused: {record.refusals}: {record.findings[0]}")
    if record.reads != dict(sorted(expected.reads.items())):
        found.append(f"expected reads {_spelt(expected.reads)}, got {_spelt(record.reads)}")
    if not record.refusals:
        missing = [name for name in CHECKS if name not in record.checks]
        if missing:
            found.append(f"not verified: {', '.join(missing)}")
        if not record.gradients:
            found.append("no gradient was compared")
    return found


def wrong_tags(entry: Entry, records: Iterable[Record]) -> list[str]:
    """How the tags of an entry depart from the classes that occur in its exports; empty when they agree."""
    occur = {pattern for record in records for pattern in record.patterns}
    extra, missing = sorted(set(entry.patterns) - occur), sorted(occur - set(entry.patterns))
    return [f"{tag} does not occur in any export" for tag in extra] + [f"{tag} occurs and is no tag" for tag in missing]


def _first(record: Record, codes: list[str]) -> str:
    return next(line for line in record.findings if line.split()[0] in codes)


def _spelt(reads: Mapping[str, int]) -> str:
    return " ".join(f"{code}={count}" for code, count in sorted(reads.items())) or "none"


# Worker processes ---------------------------------------------------------------------------------------


class Pool:
    """Runs cells in worker processes, each with one thread; ``pool[cell]`` waits for a cell's record.

    The given cells are run in their order, others when they are asked for. A cell that takes longer than ``limit``
    seconds, or whose process dies, has a record with an error, and its worker is started anew.
    """

    def __init__(self, cells: Iterable[Cell], workers: int = 2, limit: float = LIMIT) -> None:
        self.limit = limit
        self._workers = [_Worker() for _ in range(workers)]
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)
        self._futures: dict[Cell, Future[Record]] = {}
        for cell in cells:
            self._future(cell)

    def __getitem__(self, cell: Cell) -> Record:
        return self._future(cell).result()

    def _future(self, cell: Cell) -> Future[Record]:
        if cell not in self._futures:
            self._futures[cell] = self._threads.submit(self._task, cell)
        return self._futures[cell]

    def _task(self, cell: Cell) -> Record:
        worker = self._idle.get()
        try:
            return worker.run(cell, self.limit)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._futures.values():
            future.cancel()
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()


class _Worker:
    """A process that runs one cell after another; started when it is needed first."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, cell: Cell, limit: float) -> Record:
        """The record of a cell; one with an error if the process dies or takes too long."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
        assert self._connection is not None
        try:
            self._connection.send(cell)
            if self._connection.poll(limit):
                record: Record = self._connection.recv()
                return record
            error = f"it took more than {limit:.0f} seconds"
        except (EOFError, OSError):
            error = "its process died"
        self.stop(patience=0.0)
        return Record(*cell, error=error)

    def stop(self, patience: float = IDLE) -> None:
        """Ends the process: an idle one ends when its connection closes, others are killed after ``patience``."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return
        connection.close()
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        while True:
            connection.send(run_cell(connection.recv()))
    except (EOFError, BrokenPipeError):  # the other end is closed: nobody waits for records any more
        return
