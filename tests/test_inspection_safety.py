"""Saved lifted programs and partitions from strangers: nothing runs, a clear error, exit code 2."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.errors import ArchiveError
from buffer_lifting.inspection.lifted_file import read_lifted
from buffer_lifting.inspection.outline_targets import target_outline
from buffer_lifting.inspection.targets import check_target

Capture = pytest.CaptureFixture[str]
Members = dict[str, bytes]
MANIFEST, PROGRAM = "manifest.json", "program.pt2"
VALUES: list[Any] = [None, True, -1, 0, 2**70, 1.5, "", "x", "batch", [], {}, {"node": 3}, [[]], ["x"], [0, "seq"]]


class Model(nn.Module):
    """Reads a table by position, in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("table", torch.randn(32, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table[: tokens.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good.lifted`` and ``stages``."""
    directory = tmp_path_factory.mktemp("made")
    example = (torch.zeros(3, 11, dtype=torch.long),)
    program = torch.export.export(Model(), example, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    lifted = bl.lift(program)
    lifted.save(directory / "good.lifted")
    bl.partition(lifted, num_stages=2).save(directory / "stages")
    return directory


@pytest.fixture
def members(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Members:
    """The members of ``good.lifted``; commands run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(made / "good.lifted") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(members: Members, method: int = zipfile.ZIP_STORED, name: str = "bad.lifted") -> str:
    """A file of these members."""
    with zipfile.ZipFile(name, "w", method) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return name


def inner(members: Members, change: Callable[[str, bytes], bytes]) -> Members:
    """The same with members of the program in it replaced."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(members[PROGRAM])) as old, zipfile.ZipFile(stream, "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, change(item.filename, old.read(item)))
    return {**members, PROGRAM: stream.getvalue()}


def refused(path: str, why: str, capsys: Capture, *commands: str) -> None:
    """Every command that reads the file says so in one line, and exits with 2."""
    for command in commands or ("check", "diff"):
        assert main([command, path, *([path] if command == "diff" else [])]) == 2
        captured = capsys.readouterr()
        (line,) = [line for line in captured.err.splitlines() if "error" in line]
        assert captured.out == "" and why in line and line.isprintable()


def test_what_is_packed_again_is_read(members: Members, capsys: Capture) -> None:
    """Else the tests below would prove nothing."""
    assert main(["check", pack(inner(members, lambda _, data: data))]) == 0
    assert main(["diff", pack(members), "bad.lifted"]) == 0


def test_a_pickle_in_the_program_does_not_run(members: Members) -> None:
    def change(name: str, data: bytes) -> bytes:
        return b"cos\nmkdir\n(S'run'\ntR." if "sample_inputs" in name else data

    path = pack(inner(members, change))
    assert [main(["check", path]), main(["diff", path, path])] == [0, 0]
    assert main(["split", path, "--num-stages", "2", "-o", "out"]) == 2
    assert not Path("run").exists()
    main(["check", path, "--trust"])
    assert Path("run").exists(), "the control: torch's loader runs it"


def test_a_size_that_is_code_does_not_run(members: Members, capsys: Capture) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return re.sub(rb'"expr_str": ?"[^"]*"', b"\"expr_str\": \"__import__('os').mkdir('run')\"", data)

    path = pack(inner(members, change))
    refused(path, "size expression", capsys, "check")
    assert not Path("run").exists()
    main(["check", path, "--trust"])
    assert Path("run").exists(), "the control: torch's loader runs it"


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "not an object"),
        (b"{}", "is not of a saved lifted program, version 1"),
        (b'{"format": "buffer_lifting.staged", "version": 1}', "is not of a saved lifted program"),
        (b'{"format": "buffer_lifting.lifted", "version": 2}', "is not of a saved lifted program, version 1"),
        (b'{"format": "buffer_lifting.lifted", "version": 1}', "has no 'report'"),
        (b"[" + b"1," * 9_000_000 + b"1" + b",[]" * 4_000_000 + b"]", "the limit is"),
    ],
)
def test_other_manifests(manifest: bytes, why: str, members: Members, capsys: Capture) -> None:
    refused(pack({**members, MANIFEST: manifest}), why, capsys)


def test_bombs_claims_and_paths(members: Members, capsys: Capture) -> None:
    bomb = {**members, MANIFEST: b" " * (257 * 2**20)}
    refused(pack(bomb, zipfile.ZIP_DEFLATED), "claims 269484032 bytes, the limit is", capsys)
    refused(pack(members, zipfile.ZIP_DEFLATED), "program.pt2 in it that is stored uncompressed", capsys)
    refused(pack({**members, "../../escape": b"x"}), "is not one that", capsys)
    refused(pack({name: data for name, data in members.items() if name != PROGRAM}), "there is no program.pt2", capsys)
    refused(pack({name: data for name, data in members.items() if name != MANIFEST}), "there is no manifest", capsys)
    refused(pack({**members, PROGRAM: b"no zip"}), "truncated, or not a zip file", capsys, "check")
    data = Path(pack(members)).read_bytes()
    Path("bad.lifted").write_bytes(data + b"behind")
    refused("bad.lifted", "no end record at its end", capsys)


def changed(document: Any, dice: random.Random) -> Any:
    """The same document with one value replaced, or one key gone."""
    document = json.loads(json.dumps(document))
    holder: Any = document
    key: Any = dice.choice(sorted(document))
    while isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.9:
        holder = holder[key]
        key = dice.choice(sorted(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
    if dice.random() < 0.25 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = dice.choice(VALUES)
    return document


def test_edited_manifests_are_an_error_or_findings_and_nothing_else(members: Members) -> None:
    """Values of the JSON replaced by others: no crash, for all that is read of the file."""
    dice = random.Random(0)
    manifest = json.loads(members[MANIFEST])
    outcomes = {"read": 0, "refused": 0}
    for step in range(1500):
        data = json.dumps(changed(manifest, dice)).encode()
        path = Path(pack({MANIFEST: data, PROGRAM: members[PROGRAM]}))
        try:
            read_lifted(path)
            target_outline(str(path))
            if step % 5 == 0:
                check_target(str(path), None)
            outcomes["read"] += 1
        except bl.LiftingError as error:
            assert "\n" not in str(error) or not isinstance(error, ArchiveError)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_edited_stages_can_be_compared_or_not_and_nothing_else(made: Path) -> None:
    dice = random.Random(1)
    folder = made / "stages"
    manifest = json.loads((folder / MANIFEST).read_text())
    texts = {name: (folder / name).read_text() for name in ("feed.json", "stage_0.json", "stage_1.json")}
    outcomes = {"read": 0, "refused": 0}
    try:
        for _ in range(800):
            name = dice.choice(sorted(texts))
            data = json.dumps(changed(json.loads(texts[name]), dice)).encode()
            (folder / name).write_bytes(data)
            sums = {**manifest["sha256"], name: hashlib.sha256(data).hexdigest()}
            (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": sums}))
            try:
                target_outline(str(folder))
                outcomes["read"] += 1
            except ArchiveError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            (folder / name).write_text(texts[name])
    finally:
        (folder / MANIFEST).write_text(json.dumps(manifest))
    assert min(outcomes.values()) > 100, outcomes
