"""The demo's processes, seen from the one that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class DemoError(Exception):
    """The ranks did not run to their end."""


class Ranks:
    """The processes of the ranks; leaving the context stops those that still run.

    Args:
        directory: where they find their job, and leave results and what they print.
        timeout: seconds without a result after which they count as stuck.
    """

    def __init__(self, directory: Path, timeout: float) -> None:
        self.directory, self.timeout = directory, timeout
        self.processes: list[subprocess.Popen[bytes]] = []
        self.end = 0.0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def start(self) -> None:
        """Starts them all."""
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

    def results(self, step: int, ranks: list[int]) -> list[dict[str, Any]]:
        """The results of some ranks of a step, as soon as they are there.

        Raises:
            DemoError: a rank failed, or there is no result in time.
        """
        import torch

        from buffer_lifting.demo.worker import result_path

        paths = [result_path(self.directory, step, rank) for rank in ranks]
        while not all(path.exists() for path in paths):
            self._check()
            time.sleep(0.005)
        self.end = time.monotonic() + self.timeout
        found = [torch.load(path, weights_only=True) for path in paths]
        for path in paths:
            path.unlink()
        return found

    def join(self) -> None:
        """Waits for all to end well."""
        while any(process.poll() is None for process in self.processes):
            self._check()
            time.sleep(0.02)
        self._check()

    def _check(self) -> None:
        if any(process.poll() for process in self.processes):
            time.sleep(0.5)  # another one may be about to say more
            failed = [rank for rank, process in enumerate(self.processes) if process.poll()]
            logs = {rank: self._log(rank).read_text(errors="replace").strip() for rank in failed}
            for rank, log in logs.items():
                print(f"--- rank {rank}\n{log}", file=sys.stderr)
            # the others lose their peer and complain too
            first = min(failed, key=lambda rank: (self._code(rank) > 0, "gloo" in logs[rank], rank))
            code, last = self._code(first), (logs[first].splitlines() or ["no message"])[-1]
            raise DemoError(f"rank {first} " + (f"was stopped by signal {-code}" if code < 0 else f"failed: {last}"))
        if time.monotonic() > self.end:
            waiting = [str(rank) for rank, process in enumerate(self.processes) if process.poll() is None]
            raise DemoError(f"no result for {self.timeout:.0f} s (ranks {', '.join(waiting)} still run)")

    def _code(self, rank: int) -> int:
        return self.processes[rank].poll() or 0

    def _log(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.log"
