"""A save that is killed, or fails, leaves what was there before, and nothing that is half there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.package import files, staged_directory


@cache
def staged_case(seed: int = 0) -> bl.StagedProgram:
    return bl.partition(bl.lift(export_case("llama_pr1797", seed=seed)[1]), num_stages=2)


@pytest.mark.multiprocess
@pytest.mark.timeout(300)
@pytest.mark.parametrize("exchange", ("one step", pytest.param("two renames", marks=pytest.mark.slow)))
def test_killed_saves(exchange: str, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("kill_saves.py")
    result = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), exchange], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["leftovers"] >= 3, seen  # it was killed in the middle
    assert min(seen["new"], seen["limited"], seen["old"]) >= 3, seen
    assert bool(seen["away"]) == (exchange == "two renames"), seen


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("swap", (False, True))
def test_a_save_that_fails_changes_nothing(
    old: bool, swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stages"
    if old:
        staged_case(1).save(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()} if old else None
    if not swap:
        monkeypatch.setattr(files, "_swap", lambda one, other: False)
    write, replace = staged_directory.write_pt2, os.replace
    calls: list[Any] = []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    def refuse(source: Any, target: Any) -> None:
        calls.append(source)
        if Path(source).name == "new":
            raise PermissionError(errno.EPERM, "no")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staged_directory, "write_pt2", full)
        with pytest.raises(OSError, match="No space"):
            staged_case().save(path)
    with monkeypatch.context() as patch:
        patch.setattr(staged_directory, "write_pt2", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            staged_case().save(path)
    if not (old and swap):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(PermissionError):
                staged_case().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["stages"] if old else [])
    assert before is None or {file.name: file.read_bytes() for file in path.iterdir()} == before


def _raise(error: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def leave(path: Path, *, old: bool, locked: bool = True) -> Path:
    """What a save that was killed leaves beside ``path``."""
    work = path.parent / f".{path.name}.a1b2_3.saving"
    (work / "new").mkdir(parents=True)
    (work / "new" / "stage_0.pt2").write_bytes(b"half")
    if locked:
        (work / "lock").touch()
    if old:
        os.replace(path, work / "old")
    return work


def test_leftovers_are_removed_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "stages"
    work = leave(path, old=False)
    other = leave(tmp_path / "stages.b", old=False)  # of another path whose name begins alike
    staged_case().save(path)
    assert not work.exists() and other.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"stages", other.name}


def test_what_was_moved_away_is_found_and_put_back(tmp_path: Path) -> None:
    """Killed between two renames, where the file system cannot exchange directories in one step."""
    path = tmp_path / "stages"
    staged_case(1).save(path)
    manifest = (path / "manifest.json").read_bytes()
    work = leave(path, old=True)
    with pytest.raises(bl.LiftingError, match=r"interrupted.*old"):
        bl.load_stage(path, 0)
    assert bl.load_stage(work / "old", 0).index == 0
    files.remove_leftovers(path)
    assert (path / "manifest.json").read_bytes() == manifest and not work.exists()


def test_a_save_that_runs_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "stages"
    running, starting = leave(path, old=False), tmp_path / ".stages.zzz.saving"
    starting.mkdir()
    with (running / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staged_case().save(path)
        assert running.exists() and starting.exists()
        assert bl.load_stage(path, 0).index == 0
    os.utime(starting, (0, 0))
    staged_case().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stages"]


def test_a_lifted_program_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted, path = staged_case().lifted, tmp_path / "model.lifted"
    lifted.save(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.write", _raise(OSError))
        with pytest.raises(OSError):
            lifted.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.lifted"]
