"""Saves over and over in child processes that are killed at random moments; what is on disk is looked at after each.

Run by ``test_saving.py``, with a directory to work in and the way a directory takes another's place. It forks, which a
process of pytest with threads should not. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.package import files

ROUNDS = 25


def main(work: Path, exchange: str) -> None:
    torch.set_num_threads(1)
    if exchange == "two renames":
        files._swap = lambda one, other: False
        move = os.replace

        def slowly(*args: object) -> None:  # makes it likely that a process is killed between the two
            time.sleep(0.15)
            move(*args)  # type: ignore[arg-type]

        files.os.replace = slowly
    partitions = [bl.partition(bl.lift(export_case("llama_pr1797", seed=s)[1]), num_stages=2) for s in (0, 1)]
    known = []
    for index, staged in enumerate(partitions):
        staged.save(work / f"known_{index}")
        known.append((work / f"known_{index}" / "manifest.json").read_bytes())
    started = time.monotonic()
    os.waitpid(in_child(partitions[0], work / "known_0"), 0)
    duration = time.monotonic() - started
    target, rng = work / "stages", random.Random(0)
    seen = {"nothing": 0, "old": 0, "new": 0, "leftovers": 0, "away": 0, "limited": 0}
    current = -1
    for round_ in range(ROUNDS):
        before = sorted(path.name for path in work.iterdir())
        wanted = round_ % 2
        full = round_ % 5 == 4  # the disk is, or so it seems
        child = in_child(partitions[wanted], target, rng.randrange(1, 60_000) if full else None)
        if not full and round_ % 5 != 2:  # which may end
            time.sleep(rng.uniform(0, 1.3 * duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 3), status
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3:
            seen["limited"] += 1
            assert sorted(path.name for path in work.iterdir() if ".saving" not in path.name) == [
                name for name in before if ".saving" not in name
            ]
        seen["leftovers"] += bool(files.leftovers(target))
        if not target.exists():
            if current >= 0:  # only between two renames; what was there is beside it, whole
                assert exchange == "two renames"
                earlier = files.earlier_package(target)
                assert earlier is not None
                assert (earlier / "manifest.json").read_bytes() == known[current]
                seen["away"] += 1
                files.remove_leftovers(target)
                assert (target / "manifest.json").read_bytes() == known[current]
            else:
                seen["nothing"] += 1
                continue
        found = known.index((target / "manifest.json").read_bytes())
        for index in range(2):
            stage = bl.load_stage(target, index)
            assert all(
                torch.equal(value, partitions[found].stages[index].module.state_dict()[fqn])
                for fqn, value in stage.stage.module.state_dict().items()
            )
        assert found in (current, wanted)
        seen["new" if found == wanted else "old"] += 1
        current = found
    for left in files.leftovers(target):
        os.utime(left, (0, 0))  # one that was killed before it took its lock is removed only when it is old
    partitions[0].save(target)
    assert sorted(path.name for path in work.iterdir()) == ["known_0", "known_1", "stages"]
    print(json.dumps(seen))


def in_child(staged: bl.StagedProgram, target: Path, limit: int | None = None) -> int:
    """Starts a process that saves; with a limit no file can have more bytes."""
    child = os.fork()
    if child:
        return child
    code = 4
    try:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        staged.save(target)
        code = 0
    except OSError:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
