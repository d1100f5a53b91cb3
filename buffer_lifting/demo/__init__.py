"""``buffer-lifting demo``: trains an unedited model on a mesh of 2 pipeline stages x 2 context-parallel ranks, and
compares with one process.

The tokens of a step are laid out by torch's head-tail load balancer, or in a random order of its own for every sample,
and the lifted inputs follow. The single process sees the text as it is written. If every position value has been found
and lifted, losses and gradients are the same; a control, in which each rank reads positions as the unlifted model does,
shows that they are not without.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer_lifting.demo.ranks import DemoError, Ranks

if TYPE_CHECKING:
    from buffer_lifting.demo.batches import Batches
    from buffer_lifting.demo.compare import Row
    from buffer_lifting.demo.model import Subject

CLEAN, FINDINGS, COULD_NOT_CHECK = 0, 1, 2
#: Seconds without a result after which the processes count as stuck.
TIMEOUT = 120.0


class _Clock:
    """Progress on stderr, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.1f} s] {text}", file=sys.stderr, flush=True)


def run(
    steps: int = 4,
    layers: int = 4,
    seed: int = 0,
    timeout: float = TIMEOUT,
    target: str | None = None,
    losses: str | None = None,
    learning_rate: float | None = None,
) -> int:
    """Runs the demo and returns the exit code: 0 pass, 1 fail, 2 could not run.

    Args:
        steps: of training.
        layers: of the demo's own model.
        seed: of weights, text and orders.
        timeout: seconds without a result after which the processes are stopped.
        target: ``package.module:callable`` of another model: see :func:`buffer_lifting.demo.model.load_subject`.
        losses: the file to write all losses to: see :mod:`buffer_lifting.demo.losses`.
        learning_rate: of SGD; default: :data:`buffer_lifting.demo.model.LEARNING_RATE`.
    """
    say = _Clock()
    say("importing torch" if target else "importing torch and transformers")
    from buffer_lifting.demo.data import NoText
    from buffer_lifting.demo.model import llama, load_subject

    try:
        if losses is not None:
            Path(losses).write_text("")  # a file that cannot be written is better known now
        with quiet():
            subject = load_subject(target, seed) if target else llama(layers, seed)
            return _run(say, subject, steps, seed, timeout, losses, learning_rate)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        text = "the demo needs transformers: pip install buffer_lifting[cli]"
    except (NoText, DemoError) as error:
        text = str(error)
    print(f"buffer-lifting: error: {text}", file=sys.stderr, flush=True)
    return COULD_NOT_CHECK


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run(
    say: _Clock,
    subject: Subject,
    steps: int,
    seed: int,
    timeout: float,
    losses: str | None,
    learning_rate: float | None,
) -> int:
    with tempfile.TemporaryDirectory(prefix="buffer_lifting-") as directory:
        return _run_in(Path(directory), say, subject, steps, seed, timeout, losses, learning_rate)


def _run_in(
    directory: Path,
    say: _Clock,
    subject: Subject,
    steps: int,
    seed: int,
    timeout: float,
    losses: str | None,
    learning_rate: float | None,
) -> int:
    import buffer_lifting as bl
    from buffer_lifting.demo import report
    from buffer_lifting.demo.batches import load_step, make_batches
    from buffer_lifting.demo.compare import judge
    from buffer_lifting.demo.losses import write_losses
    from buffer_lifting.demo.model import LEARNING_RATE, export_model, make_stages

    batches = make_batches(subject, steps, seed, directory)
    count = sum(parameter.numel() for parameter in subject.model.parameters())
    say(f"exporting {subject.name}: {count:,} parameters, dynamic batch and sequence")
    program = export_model(subject.model, load_step(directory, 0).inputs)
    say("lifting it, for 2 context-parallel ranks and in 2 stages")
    staged = make_stages(program)
    batches.check(staged)
    print(report.title(f"What {subject.name} reads by position"))
    print(report.reads(staged.lifted.report, staged.lifted.inputs))
    print(report.title("The stages"))
    print(report.stages(staged), flush=True)
    say("verifying the stages against the program")
    print(report.title("Verification"), flush=True)
    try:
        for line in str(bl.verify(program, staged, seed=seed)).splitlines():
            print(textwrap.fill(line, report.WIDTH, subsequent_indent=" " * 5), flush=True)
    except bl.VerificationError as error:
        print(f"{error}\nFAIL: verification", flush=True)
        return FINDINGS
    print(report.title(f"Training: {steps} steps of {batches} tokens"))
    print("Schedule1F1B on 4 processes, 2 stages x 2 halves of every sequence; beside it\nthe model on one process.")
    print('"Not lifted": each rank reads positions as the model does, from 0.\n', flush=True)
    rows = train(say, subject, staged, batches, timeout, learning_rate or LEARNING_RATE)
    if losses is not None:
        write_losses(Path(losses), rows)
        say(f"wrote {losses}: buffer-lifting compare-losses {losses}:single {losses}:pp_cp")
    wrong = judge(rows, steps)
    print("\n" + "\n".join(f"  {line}" for line in wrong) if wrong else "")
    if wrong:
        print("FAIL")
        return FINDINGS
    measured = [row.measured for row in rows if row.measured]
    apart = max(abs(row.single - row.lifted) / abs(row.single) for row in rows)
    print(f"PASS: {steps} steps; losses agree to {apart:.1e}; gradients are off by at most")
    print(
        f"  {max(m.error for m in measured):.1e} lifted, and by {min(m.control_error for m in measured):.1e} or more "
        "if nothing is lifted"
    )
    print("  (of the worst parameter: max|difference| / max(max|g|, 1e-4 x largest g))")
    return CLEAN


def train(
    say: Callable[[str], None],
    subject: Subject,
    staged: Any,
    batches: Batches,
    timeout: float,
    learning_rate: float,
) -> list[Row]:
    """Trains the model here and the stages in four processes, and prints a row a measured step.

    Raises:
        DemoError: a process failed, or got stuck; all are stopped then.
    """
    import torch

    from buffer_lifting.demo import data, report
    from buffer_lifting.demo.batches import load_step, step_path
    from buffer_lifting.demo.model import RANKS, STAGES, mean_loss
    from buffer_lifting.demo.worker import Job

    optimizer = torch.optim.SGD(subject.model.parameters(), lr=learning_rate)
    rows: list[Row] = []
    directory, steps = batches.directory, len(batches.sizes)
    with Ranks(directory, timeout) as ranks:
        say("saving the stages, and starting 4 processes, each of which loads its own")
        staged.save(directory / "stages")
        Job(steps, batches.microbatches, learning_rate, timeout).write(directory)
        ranks.start()
        for number in range(steps):
            step = load_step(directory, number)
            optimizer.zero_grad()
            try:
                loss = mean_loss(subject.model(**step.inputs), step.labels)
            except Exception as error:
                raise DemoError(
                    f"the model does not run on batch({number}): {type(error).__name__}: {error}"
                ) from error
            loss.backward()
            wanted = [stage * RANKS for stage in range(STAGES)]
            results = ranks.results(number, wanted if step.measure else wanted[-1:])
            rows.append(_row(number, data.ORDERS[number % 2], loss.item(), subject.model, results))
            if number == 0:
                say("training")
                print(report.HEADER)
            if step.measure:
                print(report.row(rows[-1]), flush=True)
            optimizer.step()
            step_path(directory, number).unlink()
        ranks.join()
    return rows


def _row(step: int, order: str, loss: float, model: Any, results: list[dict[str, Any]]) -> Row:
    from buffer_lifting.demo.compare import Measured, Row, worst_error

    if "control" not in results[-1]:
        return Row(step, order, loss, results[-1]["lifted"]["loss"])
    gradients = {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}
    first: dict[int, str] = {}  # a tied weight has several names
    names = {fqn: first.setdefault(id(p), fqn) for fqn, p in model.named_parameters(remove_duplicate=False)}
    errors = {}
    for name in ("lifted", "control"):
        merged = {names.get(fqn, fqn): grad for result in results for fqn, grad in result[name]["gradients"].items()}
        errors[name] = worst_error(gradients, merged)
    control = Measured(*errors["lifted"], results[-1]["control"]["loss"], errors["control"][0])
    return Row(step, order, loss, results[-1]["lifted"]["loss"], control)
