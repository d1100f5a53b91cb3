"""Saved lifted programs and stage directories from strangers: special files, lies, and fuzzing at length."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from archive_fuzz import mutate, mutate_bytes
from test_archive_attacks import nothing_runs
from test_inspection_safety import Model

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.errors import ArchiveError, LiftingError
from buffer_lifting.inspection.html_report.build import view_of
from buffer_lifting.inspection.outline_targets import target_outline
from buffer_lifting.inspection.targets import check_target, expand
from buffer_lifting.targets import TargetError

Capture = pytest.CaptureFixture[str]
MANIFEST, FEED, STAGE, PROGRAM = "manifest.json", "feed.json", "stage_1.json", "program.pt2"
COMMANDS = ("check", "diff", "report")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good.lifted`` and ``stages``; what is imported on first use is imported."""
    directory = tmp_path_factory.mktemp("made")
    example = (torch.zeros(3, 11, dtype=torch.long),)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    lifted = bl.lift(torch.export.export(Model(), example, dynamic_shapes=(dims,)))
    lifted.save(directory / "good.lifted")
    bl.partition(lifted, num_stages=2).save(directory / "stages")
    for target in ("good.lifted", "stages"):
        everything(directory / target)
    return directory


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with copies of both, in which commands run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(path: Path) -> None:
    """All that is read of a target, by ``check``, ``diff`` and ``report``.

    Raises:
        ArchiveError: it cannot be read.
    """
    check_target(str(path), None, partial(view_of, str(path)))
    target_outline(str(path))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails if the body takes longer: what waits for a pipe would wait for ever."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still there after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(target: str, why: str, capsys: Capture, commands: tuple[str, ...] = COMMANDS) -> None:
    """Every command that reads the target says in one printable line why it cannot, soon, and exits with 2."""
    for command in commands:
        more = {"diff": [target], "report": ["-o", "page.html"]}.get(command, [])
        with within(20):
            assert main([command, target, *more]) == 2, command
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "error" in line]
        assert len(lines) == 1 and why in lines[0] and captured.out == "", (command, captured.err)
        assert all(line.isprintable() for line in captured.err.splitlines())


# -- special files ----------------------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # what is bound stays


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (_fifo, "no regular file"),
    "link to a fifo": (_link_to_fifo, "no regular file"),
    "socket": (_socket, "no regular file"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "directory": (lambda path: path.mkdir(), "Is a directory"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic link"),
}


@pytest.mark.parametrize("name", [FEED, STAGE])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_among_the_stages(kind: str, name: str, here: Path, capsys: Capture) -> None:
    make, why = SPECIAL[kind]
    (here / "stages" / name).unlink()
    make(here / "stages" / name)
    refused("stages", why, capsys)
    with within(20), pytest.raises(LiftingError):
        bl.load_stage(here / "stages", 1)


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_for_a_manifest(kind: str, here: Path, capsys: Capture) -> None:
    make, _ = SPECIAL[kind]
    (here / "stages" / MANIFEST).unlink()
    make(here / "stages" / MANIFEST)
    refused("stages", "a directory without a manifest", capsys)
    with within(20), pytest.raises(LiftingError):
        bl.load_stage(here / "stages", 1)


@pytest.mark.parametrize("suffix", [".lifted", ".pt2"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_for_a_program(kind: str, suffix: str, here: Path, capsys: Capture) -> None:
    make, why = SPECIAL[kind]
    target = Path(f"bad{suffix}")
    make(target)
    if kind == "directory":
        why = "a directory without a manifest"
    refused(str(target), why, capsys)
    refused("ba[d]*", why, capsys, ("check",))


def test_links_that_lead_in_circles_are_not_followed(here: Path) -> None:
    for name in ("a", "b", "c"):
        (here / name).symlink_to(".")
    (here / "[x]" / "deep" / ".hidden").mkdir(parents=True)
    for place in ("[x]/deep/m.pt2", "[x]/deep/.hidden/m.pt2"):
        (here / place).touch()
    with within(20):
        assert expand(["**/m*.pt2"]) == (["[x]/deep/m.pt2"], [])
        assert expand([f"{here}/**/*.lifted"]) == ([f"{here}/good.lifted"], [])
        assert {"./[x]/deep/m.pt2", "./good.lifted", "./stages"} <= set(expand(["./**"])[0])
        assert expand(["[[]x]/**/deep/**/m.pt2"]) == (["[x]/deep/m.pt2"], [])


# -- stages: JSON -----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Changes a file of a partition, and its checksum in the manifest with it."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / name).write_bytes(data)
    manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Changes the JSON of a partition's file in place."""
    document = json.loads((folder / name).read_bytes())
    change(document)
    rewrite(folder, name, json.dumps(document).encode())


def _state(value: Any) -> Callable[[Any], object]:
    return lambda document: next(e for e in document["state"] if e["kind"] == "parameter").update(shape=value)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (STAGE, _state([2**62] * 65), "shape has 65 dims, the limit is 64"),
        (STAGE, _state([2**80]), "does not fit 64 bits"),
        (STAGE, lambda d: d["graph"][0].update(args=[{"node": "later"}]), "reads one that is not there"),
        (STAGE, lambda d: d.update(outputs=[1]), "not a string"),
        (FEED, lambda d: d["input_axes"][0][1].update(rank=2**60), "the limit is 64"),
        (FEED, lambda d: d["input_axes"][0][1].update(batch_dim=2**40), "the limit is 64"),
        (FEED, lambda d: d["inputs"][0].update(row_shape=[2**60] * 65), "row_shape has 65 dims"),
        (FEED, lambda d: d["report"]["reads"][0].update(seq_dims=[[0, "seq", "row"]] * 99), "the limit is 64"),
        (FEED, lambda d: d["report"]["reads"][0].update(code="BL777"), "a code that is not known"),
    ],
)
def test_claims_of_stages(name: str, change: Callable[[Any], object], why: str, here: Path, capsys: Capture) -> None:
    edit(here / "stages", name, change)
    refused("stages", why, capsys)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_stages": 10**9}, "stages, from 1 to 10000 can be read"),
        ({"num_stages": -1}, "stages, from 1 to 10000 can be read"),
        ({"num_stages": 3}, "stage_2.json cannot be read: No such file"),
        ({"version": 3}, "not of a saved partition, version 2"),
        ({"sha256": {}}, "its checksum differs"),
        ({"sha256": {"../../escape": "x"}}, "its checksum differs"),
        ({"tied": {"x": [[]]}}, "not an integer"),
    ],
)
def test_claims_of_a_manifest(change: dict[str, Any], why: str, here: Path, capsys: Capture) -> None:
    path = here / "stages" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    refused("stages", why, capsys)


@pytest.mark.parametrize("name", [FEED, STAGE, MANIFEST])
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "not an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" + b"0," * 16_000_001 + b"0]", "the limit is 16000000"),
    ],
)
def test_other_json(data: bytes, why: str, name: str, here: Path, capsys: Capture) -> None:
    if name == MANIFEST:
        (here / "stages" / name).write_bytes(data)
    else:
        rewrite(here / "stages", name, data)
    refused("stages", why, capsys, ("check", "diff"))


def test_a_file_of_holes_takes_no_memory(here: Path, capsys: Capture) -> None:
    with (here / "stages" / FEED).open("r+b") as stream:
        stream.truncate(2**40)
    refused("stages", "more than 268435456 bytes", capsys, ("check",))


EVIL = "x\x1b[31m\n::error::y\r\u202e\u2028\ud800##[group]"


def _everywhere(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        texts = {key for key in keys if isinstance(value.get(key), str)}
        return {key: EVIL if key in texts else _everywhere(item, keys) for key, item in value.items()}
    return [_everywhere(item, keys) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("target", ["stages", "good.lifted"])
@pytest.mark.parametrize("format", ["text", "json", "github", "sarif", "html"])
def test_names_are_no_commands_and_no_escapes(target: str, format: str, here: Path, capsys: Capture) -> None:
    keys = ("source", "hint", "refusal", "message", "file", "function", "dtype", "axis", "value", "operand")

    def change(data: bytes) -> bytes:
        document = json.loads(data)
        document["report"]["reads"][0].update(refusal="because", form=None, code="BL105", modules=[EVIL])
        document["report"] = _everywhere(document["report"], keys)
        document["axes"]["lengths"] = {EVIL: 11, "seq": None}
        return json.dumps(document).encode()

    if target == "stages":
        rewrite(here / target, FEED, change((here / target / FEED).read_bytes()))
    else:
        repack(here / target, lambda name, data: change(data) if name == MANIFEST else data)
    code = main(["check", target, "--format", format])
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert code == 1 and ("BL105" in text or target == "good.lifted") and "BL304" in text
    assert not any(mark in text for mark in ("\x1b", "\r", "\u202e", "\u2028", "##[group]"))
    assert not any(line.lstrip().startswith("::") and format != "github" for line in text.splitlines())
    assert all(
        line.startswith(("::warning ", "::error ", "::notice "))
        for line in text.splitlines()
        if "::er" in line and format == "github"
    )
    assert main(["diff", target, target]) == 0


# -- lifted programs: zip ---------------------------------------------------------------------------------------------


def repack(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Writes an archive again with members changed."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in found.items():
            archive.writestr(name, change(name, data))


def _central(data: bytes, name: str) -> int:
    """Where the entry of a member in the directory begins."""
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    return at


@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("which", ["size", "packed", "offset"])
@pytest.mark.parametrize("member", [MANIFEST, PROGRAM])
def test_lies_in_64_bits(member: str, which: str, size: int, here: Path, capsys: Capture) -> None:
    """The fields of the directory that do not fit 32 bits, as a zip64 extra field has them."""
    path = here / "good.lifted"
    data = bytearray(path.read_bytes())
    at = _central(data, member)
    names, extra = struct.unpack_from("<HH", data, at + 28)
    assert extra == 0
    fields = {"packed": 20, "size": 24, "offset": 42}
    struct.pack_into("<L", data, at + fields[which], 0xFFFFFFFF)
    more = struct.pack("<HHQ", 1, 8, size)
    struct.pack_into("<H", data, at + 30, len(more))
    data[at + 46 + names : at + 46 + names] = more
    end = data.rindex(b"PK\5\6")
    (length,) = struct.unpack_from("<L", data, end + 12)
    struct.pack_into("<L", data, end + 12, length + len(more))
    path.write_bytes(data)
    refused("good.lifted", "good.lifted: ", capsys)


def test_axes_that_do_not_fit_the_program(here: Path, capsys: Capture) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name != MANIFEST:
            return data
        document = json.loads(data)
        document["input_axes"][0][1]["seq_dims"] = [[7, "seq\x1b", "row"]]
        return json.dumps(document).encode()

    repack(here / "good.lifted", change)
    refused("good.lifted", "the axes in it do not fit its program", capsys, ("check", "report"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name", [MANIFEST, MANIFEST.upper(), "../manifest.json", "/manifest.json", "a\x1b[31mb", "a\nb"]
)
def test_other_members(name: str, here: Path, capsys: Capture) -> None:
    with zipfile.ZipFile(here / "good.lifted", "a") as archive:
        archive.writestr(name, b"{}")
    refused("good.lifted", "member", capsys)


# -- fuzzing ----------------------------------------------------------------------------------------------------------


@cache
def _documents(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / name).read_bytes()) for name in (FEED, "stage_0.json", STAGE, MANIFEST)}


def _outcome(path: Path) -> str:
    try:
        with within(60):
            everything(path)
    except (ArchiveError, TargetError) as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 600, str(error)
        return "inconsistent" if "bug of buffer_lifting" in str(error) else "refused"
    return "read"


def fuzz_stages(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Reads ``count`` damaged partitions."""
    dice, sound = random.Random(seed), {name: (folder / name).read_bytes() for name in _documents(folder)}
    outcomes = {"read": 0, "refused": 0, "inconsistent": 0}
    for index in range(count):
        name = dice.choice(sorted(sound))
        if index % 3 == 0:
            data = mutate_bytes(sound[name], dice)
        else:
            data = json.dumps(mutate(_documents(folder)[name], dice)).encode()
        if name == MANIFEST:
            (folder / name).write_bytes(data)
        else:
            rewrite(folder, name, data)
        outcomes[_outcome(folder)] += 1
        for other in (name, MANIFEST):
            (folder / other).write_bytes(sound[other])
    return outcomes


def fuzz_lifted(path: Path, count: int, seed: int) -> dict[str, int]:
    """Reads ``count`` damaged lifted programs: bytes of the file, and the JSON of its manifest."""
    dice, sound = random.Random(seed), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members[MANIFEST])
    outcomes = {"read": 0, "refused": 0, "inconsistent": 0}
    for index in range(count):
        if index % 3 == 0:
            path.write_bytes(mutate_bytes(sound, dice))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in members.items():
                    changed = json.dumps(mutate(manifest, dice)).encode() if name == MANIFEST else data
                    archive.writestr(name, changed)
        with nothing_runs(path):
            outcomes[_outcome(path)] += 1
    path.write_bytes(sound)
    return outcomes


def test_damaged_stages(here: Path) -> None:
    outcomes = fuzz_stages(here / "stages", 250, seed=0)
    assert outcomes["refused"] > 50 and outcomes["read"] > 10, outcomes


def test_damaged_lifted_programs(here: Path) -> None:
    outcomes = fuzz_lifted(here / "good.lifted", 150, seed=0)
    assert outcomes["refused"] > 50 and outcomes["read"] > 5, outcomes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_saves_at_length(seed: int, here: Path) -> None:
    outcomes = [fuzz_stages(here / "stages", 4000, seed), fuzz_lifted(here / "good.lifted", 3000, seed)]
    print(outcomes)
    assert all(found["refused"] > 1000 and found["read"] > 100 for found in outcomes), outcomes
