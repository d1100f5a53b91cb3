"""Archives from strangers: nothing in them runs, and what is not as torch.export writes it is an error of one line.

An audit hook watches every read: no code is compiled or executed, no pickle, process or socket is opened, and no file
but the archive. For the attacks that torch's loader falls for, a subprocess shows that it does.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_fuzz import JSON_FILES, MODEL, Members, edited, expressions, members, mutate, mutate_bytes, pack
from archive_models import export_model

from buffer_lifting.cli import main
from buffer_lifting.errors import ArchiveError, AxesError
from buffer_lifting.graph import archive_schema
from buffer_lifting.graph.archive import SCHEMA_VERSION, read_archive
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.inspection.html_report.build import view_of
from buffer_lifting.inspection.targets import check_target
from buffer_lifting.program import Axes
from buffer_lifting.scanner import scan_record

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
FORBIDDEN = ("exec", "compile", "pickle.", "os.", "subprocess.", "socket.", "ctypes.", "import", "marshal.", "shutil.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watching: list[Path] = []
_seen: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        if isinstance(args[0], int) or Path(os.fspath(args[0])) != _watching[-1] or args[2] & WRITES:
            _seen.append(f"open {args}")
    elif event.startswith(FORBIDDEN):
        _seen.append(f"{event} {args!r:.80}")


sys.addaudithook(_audit)


@contextmanager
def nothing_runs(path: Path) -> Iterator[None]:
    """Fails if the body does anything but read ``path``."""
    _seen.clear()
    _watching.append(path)
    try:
        yield
    finally:
        _watching.pop()
    assert _seen == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves one of the small programs, once."""
    folder = tmp_path_factory.mktemp("archives")
    read_archive(_save("modes", folder))  # what is imported on first use is imported

    def save(name: str) -> Path:
        return folder / f"{name}.pt2" if (folder / f"{name}.pt2").exists() else _save(name, folder)

    return save


def _save(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pt2"
    torch.export.save(export_model(name), path)
    return path


@pytest.fixture(scope="module")
def content(saved: Callable[[str], Path]) -> Members:
    """The members of one archive."""
    return members(saved("states"))


def error_of(path: Path) -> str:
    """The error of reading an archive: one printable line that names the file."""
    with nothing_runs(path), pytest.raises(ArchiveError) as caught:
        read_archive(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 600
    return message.removeprefix(f"{path}: ")


def read(path: Path) -> GraphRecord:
    """Reads an archive under the audit hook."""
    with nothing_runs(path):
        return read_archive(path)


def test_the_audit_hook_sees_what_it_should(tmp_path: Path) -> None:
    target = tmp_path / "other"
    for act in (
        lambda: eval("1 + 1"),
        target.touch,
        lambda: pickle.loads(b"cos\ngetcwd\n."),
        lambda: os.system("true"),
    ):
        with pytest.raises(AssertionError), nothing_runs(tmp_path / "m.pt2"):
            act()


# -- attacks that torch's loader runs --------------------------------------------------------------------------------


class Payload:
    """Pickles as a call that makes a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def _in_samples(content: Members, target: Path, folder: Path) -> Members:
    torch.save(Payload(target), folder / "payload")
    return {**content, SAMPLES: (folder / "payload").read_bytes()}


def _in_weights(content: Members, target: Path, folder: Path) -> Members:
    torch.save(Payload(target), folder / "payload")

    def use_pickle(config: dict[str, Any]) -> None:
        config["config"]["linear.bias"]["use_pickle"] = True
        config["config"]["linear.bias"]["path_name"] = "weight_99"

    return {**edited(content, use_pickle, WEIGHTS), "data/weights/weight_99": (folder / "payload").read_bytes()}


def _in_size(content: Members, target: Path, folder: Path) -> Members:
    def change(program: dict[str, Any]) -> None:
        next(expressions(program))["expr_str"] = f"__import__('os').mkdir({str(target)!r})"

    return edited(content, change)


ATTACKS = {"samples": _in_samples, "weights": _in_weights, "size": _in_size}
LOAD = """
import sys, torch
for path in sys.argv[1:]:
    try:
        torch.export.load(path)
    except Exception as error:
        print(type(error).__name__)
"""


def test_code_that_torch_runs_is_not_run(content: Members, tmp_path: Path) -> None:
    paths, targets = {}, {}
    for name, attack in ATTACKS.items():
        targets[name] = tmp_path / f"ran_{name}"
        paths[name] = pack(tmp_path / f"{name}.pt2", attack(content, targets[name], tmp_path))
    plain = read(pack(tmp_path / "plain.pt2", content))
    assert read(paths["samples"]).nodes == plain.nodes
    assert read(paths["weights"]).nodes.keys() == plain.nodes.keys()
    assert "is no function of size expressions" in error_of(paths["size"])
    assert not any(target.exists() for target in targets.values())
    subprocess.run([sys.executable, "-c", LOAD, *map(str, paths.values())], check=True, capture_output=True)
    assert {name for name, target in targets.items() if target.exists()} == set(ATTACKS)


def test_every_size_expression_of_a_program_is_parsed_by_the_grammar(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also in strides and conditions, which the record does not keep, and which torch evaluates as well."""
    content = members(saved("shapes"))
    count = sum(1 for _ in expressions(json.loads(content[MODEL])))
    assert count > 50
    for index in range(0, count, 3):
        program = json.loads(content[MODEL])
        list(expressions(program))[index]["expr_str"] = "Symbol('s0').__class__.__base__"
        path = pack(tmp_path / "m.pt2", {**content, MODEL: json.dumps(program).encode()})
        assert "is no size expression" in error_of(path)


# -- ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        *(
            "torch.ops.aten.add.evil",
            "torch.ops.aten.add",
            "aten.add.Tensor",
            "torch.ops.aten.add.Tensor.x",
            "os.system",
        ),
        *(
            "torch.load",
            "torch.hub.load",
            "builtins.eval",
            "#ext:op",
            "torch.ops.hop.cond.default",
            "torch.ops.sym.add.x",
        ),
    ],
)
def test_ops_are_names(target: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        next(node for node in nodes if node["target"] == "torch.ops.aten.add.Tensor")["target"] = target

    record = read(pack(tmp_path / "m.pt2", edited(members(saved("modes")), change)))
    changed = [node for node in record.nodes.values() if node.op == f"unknown.{target}"]
    assert len(changed) == 1
    report = scan_record(record, {"x": {0: "batch", 1: "seq"}}).report
    assert changed[0].op in {item.op for item in report.mixing if item.code == "BL202"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        *(
            ("rm -rf /", "is not the name of an op"),
            ("x" * 300, "has 300 characters"),
            ("", "is not the name of an op"),
        ),
        *(("torch.ops.aten.\x1b[31m", "is not the name"), ("torch.ops.aten.sin.default", "has no argument 'other'")),
        ("torch.ops.aten.addmm.default", "has no argument 'other'"),
    ],
)
def test_calls_that_no_op_has_are_errors(target: str, message: str, content: Members, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        next(node for node in nodes if node["target"] == "torch.ops.aten.add.Tensor")["target"] = target

    assert message in error_of(pack(tmp_path / "m.pt2", edited(content, change)))


# -- versions, nesting, claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        *(("archive_version", b"1", "archive version"), ("archive_version", b"", "archive version")),
        *(("archive_version", b"0" * 100, "limit is 64"), ("archive_format", b"aoti", "archive_format")),
        *(("byteorder", b"big", "little-endian"), ("models/other.json", b"{}", "exactly models/model.json")),
        *((MODEL, b"", "not valid JSON"), (MODEL, b"[]", "not an object"), (MODEL, b"{}", "no 'schema_version'")),
        *((MODEL, b"\xff\xfe{}", "not valid JSON"), (MODEL, b'{"a":' + b"9" * 10000 + b"}", "not valid JSON")),
        *((MODEL, b"[" * 200_000, "nested too deeply"), (MODEL, b'{"a":' * 200_000, "nested too deeply")),
        *((WEIGHTS, b"{}", "no 'config'"), (CONSTANTS, b"null", "not an object")),
        ("data/weights/model.pt", b"", "one pickle"),
    ],
)
def test_other_contents(member: str, data: bytes, message: str, content: Members, tmp_path: Path) -> None:
    assert message in error_of(pack(tmp_path / "m.pt2", {**content, member: data}))


@pytest.mark.parametrize("member", ["archive_version", "archive_format", MODEL, WEIGHTS, CONSTANTS])
def test_missing_members(member: str, content: Members, tmp_path: Path) -> None:
    rest = {name: data for name, data in content.items() if name != member}
    assert member in error_of(pack(tmp_path / "m.pt2", rest))


@pytest.mark.parametrize("version", [(7, 3), (9, 0), (SCHEMA_VERSION[0], SCHEMA_VERSION[1] + 1), (8, -1), (0, 0)])
def test_other_schema_versions(version: tuple[int, int], content: Members, tmp_path: Path) -> None:
    def change(program: dict[str, Any]) -> None:
        program["schema_version"] = {"major": version[0], "minor": version[1]}

    message = error_of(pack(tmp_path / "m.pt2", edited(content, change)))
    assert f"schema version {version[0]}.{version[1]}, this reader knows 8.0 to 8.20" in message


def _graph(program: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = program["graph_module"]["graph"]
    return graph


def _size(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda program: _graph(program)["tensor_values"]["x"]["sizes"].__setitem__(0, value)


def _expression(text: str) -> Callable[[dict[str, Any]], None]:
    return _size({"as_expr": {"expr_str": text, "hint": None}})


def _nested_graphs(program: dict[str, Any]) -> None:
    graph = _graph(program)
    empty = {key: type(value)() for key, value in graph.items()}
    for _ in range(40):
        argument = {"name": "", "arg": {"as_graph": {"name": "body", "graph": empty}}, "kind": 1}
        node = {"target": "torch.ops.higher_order.cond", "inputs": [argument], "outputs": [], "metadata": {}}
        empty = {**{key: type(value)() for key, value in graph.items()}, "nodes": [{**node, "name": "cond"}]}
    graph["nodes"] = empty["nodes"]


def _nested_mapping(program: dict[str, Any]) -> None:
    value: dict[str, Any] = {"as_int": 1}
    for _ in range(50):
        value = {"as_string_to_argument": {"a": value}}
    _graph(program)["nodes"][0]["inputs"][0]["arg"] = value


def _claims_in_storage(config: dict[str, Any]) -> None:
    config["config"]["a"]["tensor_meta"]["sizes"] = [{"as_int": 2**40}, {"as_int": 2**20}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((_size({"as_int": -1}), "negative size"), (_size({"as_int": 2**65}), "64 bits"), (_size({}), "one field")),
        *((_size({"as_int": True}), "not an integer"), (_size({"as_float": 1.0}), "neither an integer nor")),
        (_expression("Add(" * 5000), "the limit is 4096"),
        (_expression("Add(" * 100 + "Integer(1)" + ")" * 100), "nested deeper"),
        (_expression("Pow(Symbol('s'), Integer(999999999))"), "a power of 999999999"),
        (
            _expression("Mul(" + ", ".join(["Add(Symbol('a'), Symbol('b'), Symbol('c'), Symbol('d'))"] * 12) + ")"),
            "terms",
        ),
        (lambda p: _graph(p)["tensor_values"]["x"].update(sizes=[{"as_int": 1}] * 1000), "1000 sizes"),
        (lambda p: _graph(p)["tensor_values"]["x"].update(dtype=99), "unknown dtype 99"),
        (lambda p: _graph(p)["nodes"].reverse(), "not computed before it"),
        (lambda p: _graph(p)["nodes"].append(_graph(p)["nodes"][-1]), "defined twice"),
        (lambda p: _graph(p)["inputs"].pop(), "inputs, its signature"),
        (lambda p: _graph(p)["nodes"][0]["metadata"].update(stack_trace="x" * 100_000), "100000 characters"),
        (lambda p: _graph(p)["nodes"][0]["metadata"].update(nn_module_stack="a,b"), "key,path,class"),
        (_nested_graphs, "graphs in graphs"),
        (_nested_mapping, "nested too deeply"),
    ],
)
def test_programs_beyond_the_schema(
    change: Callable[[dict[str, Any]], object], message: str, content: Members, tmp_path: Path
) -> None:
    assert message in error_of(pack(tmp_path / "m.pt2", edited(content, change)))


def test_weights_cannot_claim_more_than_their_file(content: Members, tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt2", edited(content, _claims_in_storage, WEIGHTS))
    assert "claims more elements" in error_of(path)


def test_too_many_values(content: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_schema, "MAX_VALUES", 100)
    assert "values, the limit is 100" in error_of(pack(tmp_path / "m.pt2", content))


def test_huge_shapes_cost_nothing(content: Members, tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt2", edited(content, _size({"as_int": 2**62})))
    assert read(path).nodes["x"].tensor is not None


def test_terminal_escapes_are_not_shown(content: Members, tmp_path: Path) -> None:
    trace = 'File "/home/\x1b]0;title\x07/model.py", line 3, in \u202eforward\n    x = \x1b[31mred'

    def change(program: dict[str, Any]) -> None:
        for node in _graph(program)["nodes"]:
            node["metadata"] = {"stack_trace": trace, "nn_module_stack": "a,\x1b\x07,c\u200b"}

    def text(node: Node) -> str:
        location = node.location
        return "".join(map("".join, node.modules)) + (
            f"{location}{location.code}{location.function}" if location else ""
        )

    nodes = read(pack(tmp_path / "m.pt2", edited(content, change))).nodes.values()
    texts = [text(node) for node in nodes if node.kind is NodeKind.OP]
    assert texts and all(item.isprintable() and "?" in item for item in texts)


# -- zip files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "m/../x", "m/../../x", "/m/x", "m//x", "m/./x", "m\\x", "C:/x", "m/x\ny", "x", "other/x"),
        *("m/models/MODEL.json", "M/models/model.json", "m/models/model.json", "m/"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_names(name: str, content: Members, tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt2", content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"{}")
    message = error_of(path)
    assert "member name" in message or "ambiguous" in message


@pytest.mark.parametrize("path_name", ["../../../etc/passwd", "/etc/passwd", "weight_0/../weight_1", "weight_999", ""])
def test_payload_paths(path_name: str, content: Members, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["config"]["a"]["path_name"] = path_name

    error_of(pack(tmp_path / "m.pt2", edited(content, change, WEIGHTS)))


def test_compressed_members_are_read_within_their_claims(content: Members, tmp_path: Path) -> None:
    packed = pack(tmp_path / "m.pt2", content, method=zipfile.ZIP_DEFLATED)
    assert read(packed).nodes == read(pack(tmp_path / "n.pt2", content)).nodes
    bomb = {**content, MODEL: b" " * (archive_schema.MAX_JSON + 1)}
    path = pack(tmp_path / "bomb.pt2", bomb, method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert "the limit is" in error_of(path)


def test_a_bomb_that_lies_about_its_size(content: Members, tmp_path: Path) -> None:
    size = 200 * 2**20
    path = pack(tmp_path / "bomb.pt2", {**content, MODEL: b"[" * size}, method=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    assert data.count(struct.pack("<L", size)) == 2  # in the local header and in the directory
    path.write_bytes(data.replace(struct.pack("<L", size), struct.pack("<L", 1000)))
    assert "unpacks to more than the 1000 bytes" in error_of(path)


def test_overlapping_members(content: Members, tmp_path: Path) -> None:
    """The directory's entries all point to one member: a bomb without recursion."""
    path = pack(tmp_path / "m.pt2", content)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
        for info in archive.infolist():
            data[at + 42 : at + 46] = bytes(4)
            at += 46 + len(info.filename)
    path.write_bytes(data)
    assert "overlaps" in error_of(path) or "another name" in error_of(path)


@pytest.mark.parametrize("where", ["front", "end", "comment", "hidden"])
def test_data_that_the_directory_does_not_name(where: str, content: Members, tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt2", content)
    data = path.read_bytes()
    if where == "comment":
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"PK\5\6" + bytes(18)
    elif where == "hidden":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo("m/extra/x"), b"x" * 99)
            archive.filelist.pop()
    else:
        path.write_bytes(b"x" * 10 + data if where == "front" else data + b"x" * 10)
    error_of(path)


def test_encrypted_and_unknown_compression(content: Members, tmp_path: Path) -> None:
    path = pack(tmp_path / "m.pt2", content, method=zipfile.ZIP_BZIP2)
    assert "method 12" in error_of(path)
    plain = bytearray(pack(path, content).read_bytes())
    with zipfile.ZipFile(path) as archive:
        plain[archive.start_dir + 8] |= 1
    path.write_bytes(plain)
    assert "encrypted" in error_of(path)


def test_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    assert "cannot be opened" in error_of(path)
    for data in (b"", b"PK", b"not a zip file at all" * 10, b"PK\5\6" + bytes(18), pickle.dumps({})):
        path.write_bytes(data)
        error_of(path)
    assert "cannot be opened" in error_of(tmp_path)


def test_every_truncation_is_an_error(saved: Callable[[str], Path], tmp_path: Path) -> None:
    data = saved("modes").read_bytes()
    path = tmp_path / "m.pt2"
    for length in {*range(0, len(data), 61), *range(len(data) - 60, len(data))}:
        path.write_bytes(data[:length])
        error_of(path)


# -- fuzzing ---------------------------------------------------------------------------------------------------------


#: Of the programs whose input is ``x`` [batch, seq, feature].
X_AXES: Axes = {"x": {0: "batch", 1: "seq"}}


def _fuzz(source: Path, path: Path, count: int, seed: int, axes: Axes | None = X_AXES) -> tuple[int, int]:
    """Reads and scans ``count`` damaged archives; how many were errors, and how many were read."""
    generator = random.Random(seed)
    content, data = members(source), source.read_bytes()
    programs = {name: json.loads(content[name]) for name in JSON_FILES}
    errors = inconsistent = 0
    for index in range(count):
        if index % 3 == 0:
            path.write_bytes(mutate_bytes(data, generator))
        else:
            name = generator.choice((*JSON_FILES, MODEL, MODEL, MODEL))
            pack(path, {**content, name: json.dumps(mutate(programs[name], generator)).encode()})
        try:
            with nothing_runs(path):
                observe = partial(view_of, str(path), axes=axes) if index % 7 == 0 else None
                check_target(str(path), axes, observe)
        except AxesError:
            errors += 1
        except ArchiveError as error:
            errors += 1
            assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 600
            inconsistent += "its graph is inconsistent at node" in str(error)
    print(f"{inconsistent} of {count} are inconsistent")
    return errors, count - errors


@pytest.mark.parametrize("name", ["modes", "casts"])
def test_shapes_that_contradict_each_other_are_a_clear_error(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every tensor of a graph in turn with a dim less, a dim more of size 0, and no dims."""
    content, path, inconsistent = members(saved(name)), tmp_path / "m.pt2", 0
    for tensor in _graph(json.loads(content[MODEL]))["tensor_values"]:
        for sizes in (slice(None, -1), slice(None), slice(0)):

            def change(program: dict[str, Any], tensor: str = tensor, sizes: slice = sizes) -> None:
                meta = _graph(program)["tensor_values"][tensor]
                more = [{"as_int": 0}] if sizes == slice(None) else []
                meta["sizes"] = [*meta["sizes"][sizes], *more]
                meta["strides"] = [{"as_int": 1}] * len(meta["sizes"])

            try:
                check_target(str(pack(path, edited(content, change))), {"x": {0: "batch", 1: "seq"}})
            except (ArchiveError, AxesError) as error:
                inconsistent += "its graph is inconsistent at node" in str(error)
    assert inconsistent


def test_an_exception_of_the_analysis_names_the_node(
    content: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from buffer_lifting import scanner

    def broken(node: Node, *_: object) -> None:
        raise IndexError("list index\x1b out of range")

    def scan(record: GraphRecord, *_: object) -> None:
        broken(next(node for node in record.nodes.values() if node.kind is NodeKind.OP))

    monkeypatch.setattr(scanner, "scan_record", scan)
    path = pack(tmp_path / "m.pt2", content)
    for command in ("check", "scan"):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert re.search(r"m.pt2: its graph is inconsistent at node '\w+' \(aten\.[\w.]+\): shapes or arguments", error)
        assert "IndexError: list index? out of range" in error and "crashed" not in error


@pytest.mark.parametrize(("name", "count"), [("modes", 600), ("conditions", 500), ("custom", 500), ("writes", 300)])
def test_damaged_archives(name: str, count: int, saved: Callable[[str], Path], tmp_path: Path) -> None:
    errors, reads = _fuzz(saved(name), tmp_path / "m.pt2", count, seed=count)
    assert errors > count // 2 and reads > count // 50


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["modes", "results", "conditions", "unbacked", "shapes", "states", "writes", "inputs", "kinds"]
)
def test_damaged_archives_at_length(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    axes = None if name == "inputs" else X_AXES  # nested inputs, none of them named x
    errors, reads = _fuzz(saved(name), tmp_path / "m.pt2", 6000, seed=1, axes=axes)
    assert errors > 3000 and reads > 100
