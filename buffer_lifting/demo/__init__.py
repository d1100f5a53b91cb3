"""``buffer-lifting demo``: trains a small Llama under a pipeline on two processes, and compares with one.

Each sample's tokens are given in a random order of its own, and the lifted inputs follow that order. The
single process sees the text as it is written. If every position value has been found and lifted, losses and
gradients are the same; a control, fed as if the order were natural, shows that they are not without.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLEAN, FINDINGS, COULD_NOT_CHECK = 0, 1, 2
#: Seconds for the two processes together.
TIMEOUT = 120.0
HEADER = """\
step  loss, one process  loss, pipeline  gradient error  |  not fed the order: loss  gradient error"""


class DemoError(Exception):
    """The pipeline did not run to its end."""


class _Clock:
    """Progress on stderr, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.1f} s] {text}", file=sys.stderr, flush=True)


def run(steps: int = 5, layers: int = 4, seed: int = 0, timeout: float = TIMEOUT) -> int:
    """Runs the demo and returns the exit code: 0 pass, 1 fail, 2 could not run."""
    say = _Clock()
    say("importing torch and transformers")
    from buffer_lifting.demo.data import NoText

    try:
        with quiet():
            return _run(say, steps, layers, seed, timeout)
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


def _run(say: _Clock, steps: int, layers: int, seed: int, timeout: float) -> int:
    import buffer_lifting as bl
    from buffer_lifting.demo import data
    from buffer_lifting.demo.compare import judge
    from buffer_lifting.demo.model import build_model, export_model, make_stages
    from buffer_lifting.render import render_scan

    tokens, _ = data.batch(0, seed)
    model = build_model(layers, seed)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"exporting LlamaForCausalLM: {layers} layers, {count:,} parameters, dynamic batch and sequence")
    program = export_model(model, tokens)
    say("lifting it, and splitting it into 2 stages")
    staged = make_stages(program)
    _title("What the program reads by position")
    print(render_scan(bl.scan(program), staged.lifted.inputs, "LlamaForCausalLM"), flush=True)
    _title("The stages")
    print(staged.summary(), flush=True)
    say("verifying the stages against the program")
    _title("Verification")
    try:
        print(bl.verify(program, staged, seed=seed), flush=True)
    except bl.VerificationError as error:
        print(f"{error}\nFAIL: verification", flush=True)
        return FINDINGS
    _title(f"Training on {len(data.text()):,} bytes of the standard library's source")
    size = f"{data.MICROBATCHES} microbatches of {data.BATCH // data.MICROBATCHES} x {data.SEQ} tokens"
    print(f"Schedule1F1B on 2 processes, {size}, each sample in a random")
    print("order of its own; beside it transformers' model on one process, in the order of the text.")
    print('"Not fed the order": the same shuffled tokens, but lifted inputs for the natural order.\n')
    rows = train(say, model, staged, steps, seed, timeout)
    wrong = judge(rows, steps)
    print()
    for line in wrong:
        print(f"  {line}")
    if wrong:
        print("FAIL")
        return FINDINGS
    worst = max(row.error for row in rows)
    control = min(row.control_error for row in rows)
    print(f"PASS: {steps} steps; gradient errors up to {worst:.1e}, and from {control:.1e} on without the feed")
    print("  gradient error: the worst parameter's max|difference| / max(max|g|, 1e-4 * largest gradient)")
    return CLEAN


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def train(say: Callable[[str], None], model: Any, staged: Any, steps: int, seed: int, timeout: float) -> list[Any]:
    """Trains the model here and the stages in two processes, and prints a row a step.

    Raises:
        DemoError: a process failed, or took too long; both are stopped then.
    """
    import torch

    from buffer_lifting.demo import data
    from buffer_lifting.demo.model import LEARNING_RATE, loss_fn
    from buffer_lifting.demo.worker import Job

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = []
    with tempfile.TemporaryDirectory(prefix="buffer_lifting-") as name, _Ranks(Path(name), timeout) as ranks:
        say("saving the stages, and starting 2 processes, each of which loads its own")
        staged.save(Path(name) / "stages")
        Job(steps, seed, timeout).write(Path(name))
        ranks.start()
        for step in range(steps):
            tokens, labels = data.batch(step, seed)
            optimizer.zero_grad()
            loss = loss_fn(model(input_ids=tokens).logits, labels)
            loss.backward()
            gradients = {fqn: p.grad for fqn, p in model.named_parameters() if p.grad is not None}
            rows.append(_row(step, loss.item(), gradients, ranks.results(step)))
            if step == 0:
                print(HEADER)
            row = rows[-1]
            print(
                f"{step:4d}  {row.single:17.6f}  {row.pipeline:14.6f}  {row.error:14.1e}  |  "
                f"{row.control:23.6f}  {row.control_error:14.1e}",
                flush=True,
            )
            optimizer.step()
        ranks.join()
    return rows


def _row(step: int, loss: float, gradients: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    from buffer_lifting.demo.compare import Row, worst_error

    losses, errors = {}, {}
    for name in ("pipeline", "control"):
        parts = [result[name] for result in results]
        losses[name] = next(float(part["loss"]) for part in parts if part["loss"] is not None)
        merged = {fqn: grad for part in parts for fqn, grad in part["gradients"].items()}
        errors[name] = worst_error(gradients, merged)
    error, parameter = errors["pipeline"]
    return Row(step, loss, losses["pipeline"], losses["control"], error, parameter, errors["control"][0])


class _Ranks:
    """The two processes; leaving the context stops those that still run."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self.directory, self.timeout = directory, timeout
        self.processes: list[subprocess.Popen[bytes]] = []
        self.end = 0.0

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start(self) -> None:
        from buffer_lifting.demo.worker import WORLD

        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": paths,
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.end = time.monotonic() + self.timeout
        for rank in range(WORLD):
            command = [sys.executable, "-m", "buffer_lifting.demo.worker", str(rank), str(self.directory)]
            with self._log(rank).open("wb") as log:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def results(self, step: int) -> list[dict[str, Any]]:
        """Both ranks' results of a step, as soon as they are there."""
        import torch

        from buffer_lifting.demo.worker import result_path

        paths = [result_path(self.directory, step, rank) for rank in range(len(self.processes))]
        while not all(path.exists() for path in paths):
            self._check()
            time.sleep(0.02)
        return [torch.load(path, weights_only=True) for path in paths]

    def join(self) -> None:
        """Waits for both to end well."""
        while any(process.poll() is None for process in self.processes):
            self._check()
            time.sleep(0.02)
        self._check()

    def _check(self) -> None:
        failed = [rank for rank, process in enumerate(self.processes) if process.poll()]
        if failed:
            time.sleep(0.5)  # the other one may be about to say more
            logs = {rank: self._log(rank).read_text(errors="replace").strip() for rank in failed}
            for rank, log in logs.items():
                print(f"--- rank {rank}\n{log}", file=sys.stderr)
            raise DemoError(f"rank {failed[0]} failed: {(logs[failed[0]].splitlines() or ['no message'])[-1]}")
        if time.monotonic() > self.end:
            raise DemoError(f"the processes took more than {self.timeout:.0f} s")

    def _log(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.log"
