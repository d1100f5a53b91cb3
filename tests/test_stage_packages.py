"""Directories of stages: each ``.pt2`` is its stage for torch too, and a rank reads its own files only."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import CASES, export_case, make_inputs

import buffer_lifting as bl
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.record import NodeKind, StateKind
from buffer_lifting.package.files import sealed
from buffer_lifting.package.pt2_graph import model_json
from buffer_lifting.placement import placement_of
from buffer_lifting.stage_builder import _register
from buffer_lifting.stage_program import exported_stage, stage_parts, stage_state
from buffer_lifting.stages import Stage

_SLOW = [
    pytest.param(name, cp, marks=pytest.mark.slow)
    for name in ("nanogpt_tied", "hf_llama_labels", "hf_gpt2")
    for cp in (None, 1)
]
BATCH, SEQ = 3, 10
META = torch.device("meta")


@cache
def staged_case(name: str, cp: int | None = None, form: str = "auto") -> bl.StagedProgram:
    lifted = bl.lift(export_case(name)[1], form=form)  # type: ignore[arg-type]
    return bl.partition(lifted if cp is None else bl.context_parallel(lifted, size=cp), num_stages=2)


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def gradients(module: torch.nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    total = sum((out.float().sin().sum() for out in outputs if out.requires_grad), torch.zeros(()))
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {fqn: grad for fqn, grad in zip(parameters, found, strict=True) if grad is not None}


def inputs_of(staged: Any, name: str) -> tuple[list[Any], dict[str, Any]]:
    """The program's positional inputs, and everything by name, in another order for each sample."""
    args, kwargs = make_inputs(name, BATCH, SEQ, 1)
    named = {**dict(zip(staged.positional, args, strict=False)), **kwargs}
    order = torch.stack([torch.randperm(SEQ, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    return list(args), {**named, **staged.feed(BATCH, SEQ, inputs=named, order=order)}


# A stage as a program ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cp"), (("llama_pr1797", 1), *_SLOW))
def test_torch_loads_a_stage(name: str, cp: int | None, tmp_path: Path) -> None:
    """``torch.export.load`` of a stage's file, the stage in memory as a program, and the stage: bitwise the same."""
    staged = staged_case(name, cp)
    staged.save(tmp_path / "stages")
    values, named = inputs_of(staged, name)
    for stage in staged.stages:
        keywords = {key: named[key] for key in stage.kwargs}
        args = values[: len(stage.activations)]
        outputs = flat(stage.module(*args, **keywords))
        expected = gradients(stage.module, outputs)
        made = staged.exported(stage.index)
        loaded = torch.export.load(tmp_path / "stages" / f"stage_{stage.index}.pt2")
        assert str(loaded.graph) == str(made.graph)
        for program in (made, loaded):
            program.validate()
            module = program.module()
            again = flat(module(*args, **keywords))
            assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
            if not stage.tied:  # torch makes each name of a tied weight a parameter of its own
                grads = gradients(module, again)
                assert grads.keys() == expected.keys() and grads
                assert all(torch.equal(grads[fqn], expected[fqn]) for fqn in grads)
        assert dict(loaded.state_dict).keys() == dict(stage.module.state_dict()).keys()
        values = [out.detach() for out in outputs]


def test_a_stage_has_the_sizes_of_the_whole(tmp_path: Path) -> None:
    """Symbolic sizes and their limits: other sizes run, those beyond the table are refused."""
    staged = staged_case("llama_pr1797")
    staged.save(tmp_path / "stages")
    module = torch.export.load(tmp_path / "stages" / "stage_1.pt2").module()
    width = 32
    for batch, seq in ((2, 3), (5, CASES["llama_pr1797"].table_len)):
        feed = staged.feed(batch, seq)
        assert module(torch.randn(batch, seq, width), **feed).shape[:2] == (batch, seq)
    with pytest.raises((RuntimeError, AssertionError)):
        module(torch.randn(2, 65, width), lifted_freqs_cis=torch.zeros(2, 65, 4, dtype=torch.complex64))


def document_of(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (member,) = (n for n in archive.namelist() if n.endswith("/models/model.json"))
        document = json.loads(archive.read(member))
    for node in document["graph_module"]["graph"]["nodes"]:
        for key in ("from_node", "custom", "source_fn_stack"):  # notes that nothing here needs
            node["metadata"].pop(key, None)
    return document


@pytest.mark.parametrize(
    ("name", "cp"), (("llama_pr1797", None), ("nanogpt_tied", 2), pytest.param("hf_gpt2", 2, marks=pytest.mark.slow))
)
def test_it_is_written_as_torch_writes_it(name: str, cp: int | None, tmp_path: Path) -> None:
    """The document in the file is the one that ``torch.export.save`` makes of the same program."""
    staged = staged_case(name, cp)
    staged.save(tmp_path / "stages")
    for index in range(2):
        torch.export.save(staged.exported(index), tmp_path / "torch.pt2")
        assert document_of(tmp_path / "torch.pt2") == document_of(tmp_path / "stages" / f"stage_{index}.pt2")
        record = read_archive(tmp_path / "stages" / f"stage_{index}.pt2")  # and so our own reader takes it
        state = {node.fqn for node in record.nodes.values() if node.kind is NodeKind.STATE}
        assert state == {item.fqn for item in stage_state(staged.stages[index].module)}


def test_every_kind_of_argument_is_written(tmp_path: Path) -> None:
    """Lists, sizes, floats that are no numbers, devices, several results: a graph of our own, as torch writes it."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.register_buffer("table", torch.arange(64.0).view(8, 8), persistent=False)
            self.constant = torch.ones(3, dtype=torch.int64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            batch, seq, _ = x.shape
            y = self.linear(x).masked_fill(x > 1, float("-inf")).to(torch.float64, memory_format=torch.preserve_format)
            a, b, c = y.split([2, 2, 4], dim=-1)
            values, indices = c.topk(2)
            made = torch.full((batch, seq // 2 + 1), float("nan"), dtype=torch.complex64, device=x.device) * 2j
            parts = torch.stack([a, b, values], 0)[0, :, indices[0, 0, 0] :]
            bias = (
                torch.zeros(batch, seq, device=x.device).sum((0, 1))
                + self.constant.sum()
                + float(seq) * 0.5
                + max(seq, 3) % 7
            )
            return parts.sum() + self.table.sum() + bias, torch.view_as_real(made).nan_to_num()

    program = torch.export.export(
        Model(),
        (torch.randn(3, 9, 8),),
        dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},),
    )
    stage = Stage(0, _as_graph_module(program), ("x",), (), (), (), 0)
    document = json.loads(model_json(stage_parts(stage, program)))
    torch.export.save(exported_stage(stage, program), tmp_path / "model.pt2")
    assert document == document_of(tmp_path / "model.pt2")


def _as_graph_module(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """A program as a stage's module has it: state by ``get_attr``, results in a tuple."""
    signature = program.graph_signature
    root, graph, env = torch.nn.Module(), torch.fx.Graph(), {}
    state = {**program.constants, **program.state_dict}
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    held = {n: s.target for n, s in kinds.items() if s.target}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in held:
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in held:
            fqn, spec = str(held[node.name]), kinds[node.name]
            kind = {"PARAMETER": StateKind.PARAMETER, "BUFFER": StateKind.BUFFER}.get(spec.kind.name)
            _register(root, fqn, state[fqn], kind, bool(spec.persistent))
            env[node] = graph.get_attr(fqn)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(tuple(env[n] for n in node.args[0]))
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
    return torch.fx.GraphModule(root, graph)


class OddTensors(torch.nn.Module):
    """State of every layout and dtype that a stage can have."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(3, 5, generator=generator)
        self.turned = torch.nn.Parameter(random.t())
        self.frozen = torch.nn.Parameter(random.bfloat16(), requires_grad=False)
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("empty", torch.ones(0, 4))
        self.register_buffer("conjugate", torch.complex(random, random + 1).conj())
        self.register_buffer("expanded", torch.tensor([[1.0, 2.0, 3.0]]).expand(4, 3), persistent=False)
        self.register_buffer("part", torch.arange(40)[3:30:3], persistent=False)
        self.flags = torch.tensor([True, False, True])

    def forward(self, x: Tensor) -> Tensor:
        x = (
            (x @ self.turned @ self.frozen.float())[..., :3] * self.scalar
            + self.empty.sum()
            + self.conjugate.real.sum()
        )
        return x + self.expanded.sum() + self.part[2] + self.flags


@pytest.mark.parametrize("weights", (True, False))
def test_tensors_of_every_kind_come_back(weights: bool, tmp_path: Path) -> None:
    model = OddTensors()
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.randn(2, 6, 5),), dynamic_shapes=sizes)
    staged = bl.partition(bl.lift(program), num_stages=1)
    staged.save(tmp_path / "stages", weights=weights)
    loaded = bl.load_stage(tmp_path / "stages", 0)
    by_torch = torch.export.load(tmp_path / "stages" / "stage_0.pt2")
    theirs = {**by_torch.constants, **by_torch.state_dict}
    kept = set(model.state_dict())
    for item in stage_state(loaded.stage.module):
        found = theirs[item.fqn]
        assert found.shape == item.value.shape and found.dtype == item.value.dtype, item.fqn
        assert item.in_state_dict == (item.fqn in kept)
        if weights or item.fqn not in kept:
            expected = next(other.value for other in stage_state(staged.stages[0].module) if other.fqn == item.fqn)
            assert torch.equal(item.value, expected) and torch.equal(found, expected), item.fqn
        else:
            assert item.value.device == found.device == META
    if not weights:
        loaded.load_weights(model.state_dict())
    x = torch.randn(3, 4, 5)
    assert torch.equal(loaded.stage.module(x), model(x))
    if weights:
        assert torch.equal(by_torch.module()(x), model(x))


def test_files_beyond_the_limits_of_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that zip has for them, which is used here from 1 KB on: torch and both readers of our own take it."""
    staged = staged_case("llama_pr1797")
    staged.save(tmp_path / "small")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1 << 10)
    staged.save(tmp_path / "large")
    file = tmp_path / "large" / "stage_1.pt2"
    assert file.read_bytes() != (tmp_path / "small" / file.name).read_bytes() and b"PK\6\7" in file.read_bytes()
    state = staged.stages[1].module.state_dict()
    loaded, by_torch = (
        bl.load_stage(tmp_path / "large", 1).stage.module.state_dict(),
        torch.export.load(file).state_dict,
    )
    assert all(torch.equal(loaded[fqn], value) and torch.equal(by_torch[fqn], value) for fqn, value in state.items())
    assert len(read_archive(file).nodes) == len(read_archive(tmp_path / "small" / file.name).nodes)


# What a rank reads ---------------------------------------------------------------------------------------

_OPENED: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _OPENED is not None:
        _OPENED.append(str(args[0]))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    global _OPENED
    if not getattr(sys, "_buffer_lifting_audit", False):
        sys.addaudithook(_note)
        sys._buffer_lifting_audit = True  # type: ignore[attr-defined]
    _OPENED = found = []
    try:
        yield found
    finally:
        _OPENED = None


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_rank_opens_and_reads_its_own_files_only(tmp_path: Path) -> None:
    path = tmp_path / "stages"
    staged_case("llama_pr1797").save(path)
    bl.load_stage(path, 1)  # whatever is imported on the first call
    with opened_files() as opened:
        before = bytes_read()
        bl.load_stage(path, 1)
        read = bytes_read() - before
    own = {"manifest.json", "feed.json", "feed.bin", "stage_1.json", "stage_1.pt2"}
    assert {Path(name).name for name in opened if str(tmp_path) in name} == own
    size = sum((path / name).stat().st_size for name in own)
    assert size <= read < size + 20_000  # once: /proc itself is read too
    assert size < 0.8 * sum(file.stat().st_size for file in path.iterdir())
    for name in {file.name for file in path.iterdir()} - own:
        (path / name).write_bytes(b"not a stage")
    assert bl.load_stage(path, 1).index == 1
    for name in {file.name for file in path.iterdir()} - own:
        (path / name).unlink()
    assert bl.load_stage(path, 1).index == 1


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stages"
    staged_case("llama_pr1797").save(path)
    for index in range(2):
        with zipfile.ZipFile(path / f"stage_{index}.pt2") as archive:
            samples = next(n for n in archive.namelist() if n.endswith("sample_inputs/model.pt"))
            assert archive.read(samples) == b""
            assert not any(b'"use_pickle": true' in archive.read(n) for n in archive.namelist() if "config" in n)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr(torch.export, "load", fail)
    for index in range(2):
        assert bl.load_stage(path, index).index == index


# Damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packages")
    staged_case("llama_pr1797").save(path / "stages")
    lifted = bl.lift(export_case("llama_pr1797")[1])
    bl.partition(lifted, split_points=["layers.1"]).save(path / "again")
    bl.partition(lifted, num_stages=1).save(path / "one")
    bl.partition(bl.lift(export_case("llama_pr1797", seed=1)[1]), num_stages=2).save(path / "other")
    return path


@pytest.fixture
def stages(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound / "stages", tmp_path / "stages")
    return tmp_path / "stages"


def test_the_same_partition_is_the_same_files(sound: Path, tmp_path: Path) -> None:
    staged_case("llama_pr1797").save(tmp_path / "twice")
    for file in (sound / "stages").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@pytest.mark.parametrize("file", ("manifest.json", "feed.json", "stage_1.json", "stage_1.pt2"))
def test_any_changed_byte_is_noticed(stages: Path, file: str) -> None:
    """A bit changed, or the rest missing, at many places of every file that the rank reads."""
    path = stages / file
    data = path.read_bytes()
    for step in range(12):
        place = len(data) * step // 12
        for broken in (data[:place] + bytes([data[place] ^ (1 << step % 8)]) + data[place + 1 :], data[:place]):
            path.write_bytes(broken)
            with pytest.raises(bl.LiftingError):
                bl.load_stage(stages, 1)


MixUp = Callable[[Path, Path], None]


def copy_files(source: str, *names: tuple[str, str]) -> MixUp:
    def mix(sound: Path, stages: Path) -> None:
        for old, new in names:
            shutil.copy(sound / source / old, stages / new)

    return mix


@pytest.mark.parametrize(
    "mix",
    (
        copy_files("other", ("stage_1.pt2", "stage_1.pt2")),
        copy_files("other", ("stage_1.pt2", "stage_1.pt2"), ("stage_1.json", "stage_1.json")),
        copy_files("other", ("manifest.json", "manifest.json")),
        copy_files("one", ("manifest.json", "manifest.json")),
        copy_files("one", ("stage_0.pt2", "stage_1.pt2"), ("stage_0.json", "stage_1.json")),
        copy_files("stages", ("stage_0.pt2", "stage_1.pt2"), ("stage_0.json", "stage_1.json")),
        copy_files("stages", ("stage_0.json", "stage_1.json")),
    ),
    ids=("weights", "stage", "manifest", "fewer stages", "stage of fewer", "swapped stages", "swapped manifests"),
)
def test_mixed_up_files_are_refused(sound: Path, stages: Path, mix: MixUp) -> None:
    mix(sound, stages)
    with pytest.raises(bl.LiftingError, match=r"of another save or stage|there is no stage"):
        bl.load_stage(stages, 1)


@pytest.mark.parametrize(
    ("version", "match"),
    ((3, "version 3 .*another buffer_lifting"), (1, "version 1 .*save the program again"), ("2", "version '2'")),
)
def test_other_versions_are_refused(stages: Path, version: Any, match: str) -> None:
    path = stages / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "version": version}))
    with pytest.raises(bl.LiftingError, match=match):
        bl.load_stage(stages, 0)


def seal(stages: Path, file: str, **changes: Any) -> None:
    """Changes a manifest of a stage, and the checksum with it."""
    document = json.loads((stages / file).read_bytes())
    document = {key: value for key, value in {**document, **changes}.items() if value is not ...}
    (stages / file).write_text(json.dumps(document))
    manifest = json.loads((stages / "manifest.json").read_bytes())
    manifest["sha256"][file] = hashlib.sha256((stages / file).read_bytes()).hexdigest()
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    (stages / "manifest.json").write_bytes(sealed(body))


def test_records_that_came_later_have_their_defaults(stages: Path) -> None:
    seal(stages, "stage_1.json", output_shapes=..., activation_shapes=...)
    loaded = bl.load_stage(stages, 1)
    assert loaded.stage.output_shapes == () and loaded.stage.outputs
    with pytest.raises(bl.PartitionError, match="save it again"):
        loaded.boundary(2, 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    (
        ({"kwargs": ...}, "kwargs"),
        ({"later": 3}, "later, which this buffer_lifting does not know"),
        ({"index": 0}, "is of stage 0"),
        ({"boundary_bytes": "many"}, "is wanted"),
        ({"state": []}, "damaged|not the file"),
        ({"graph": [{"name": "x", "op": "call_function", "target": "os.system", "args": [], "kwargs": {}}]}, "calls"),
    ),
    ids=str,
)
def test_wrong_manifests_of_stages_are_refused(stages: Path, changes: dict[str, Any], match: str) -> None:
    """Checksums do not keep out what was written wrongly: the records themselves are checked."""
    seal(stages, "stage_1.json", **changes)
    with pytest.raises(bl.LiftingError, match=match):
        bl.load_stage(stages, 1)


@pytest.mark.parametrize("change", ("behind", "overlap", "negative", "text", "shape", "dtype"))
def test_wrong_indices_of_tensors_are_refused(stages: Path, change: str) -> None:
    state = json.loads((stages / "stage_1.json").read_bytes())["state"]
    size = (stages / "stage_1.pt2").stat().st_size
    state[1].update(
        {
            "behind": {"offset": size - 4},
            "overlap": {"offset": state[0]["offset"] + 4},
            "negative": {"offset": -8},
            "text": {"offset": "8"},
            "shape": {"shape": [1 << 20, 1 << 10]},
            "dtype": {"dtype": "save"},
        }[change]
    )
    seal(stages, "stage_1.json", state=state)
    with pytest.raises(bl.LiftingError):
        bl.load_stage(stages, 1)


# Without weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("llama_pr1797", "nanogpt_tied"))
def test_without_weights_nothing_of_them_is_written(name: str, tmp_path: Path) -> None:
    staged = staged_case(name, None, "positions")
    staged.save(tmp_path / "with")
    staged.save(tmp_path / "without", weights=False)
    for stage in staged.stages:
        state = stage.module.state_dict()
        held = (tmp_path / "with" / f"stage_{stage.index}.pt2").read_bytes()
        for file in (tmp_path / "without").iterdir():
            data = file.read_bytes()
            for fqn, value in state.items():
                part = value.contiguous().view(-1)[:64].view(torch.uint8).numpy().tobytes()
                assert part in held or len(set(part)) < 3, fqn  # the search finds what is there
                assert part not in data or len(set(part)) < 9, fqn  # ones and zeros are anywhere
        loaded = bl.load_stage(tmp_path / "without", stage.index)
        assert all(value.device == META for value in loaded.stage.module.state_dict().values())
        tables = {fqn: table for fqn, table in stage.module.named_buffers() if fqn not in state}
        for fqn, table in tables.items():  # in no checkpoint
            assert torch.equal(loaded.stage.module.get_buffer(fqn), table)
        assert bool(tables) == (name == "llama_pr1797") and not set(tables) & set(loaded.stage.module.state_dict())
        assert [p.requires_grad for p in loaded.stage.module.parameters()] == [
            p.requires_grad for p in stage.module.parameters()
        ]
        for key, value in staged.feed(BATCH, SEQ).items():
            assert torch.equal(loaded.feed(BATCH, SEQ)[key], value)
        program = torch.export.load(tmp_path / "without" / f"stage_{stage.index}.pt2")
        assert program.state_dict and all(value.device == META for value in program.state_dict.values())
        with pytest.raises(bl.LiftingError, match="has no values"):
            loaded.build_stage("cpu")


def test_programs_on_the_meta_device_are_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(10**6, 10**5), torch.nn.Linear(10**5, 8))  # 400 GB

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.register_buffer("table", torch.empty(64, 10**5), persistent=False)

            def forward(self, tokens: Tensor) -> Tensor:
                return self.model[1](self.model[0](tokens) + self.table[: tokens.shape[1]])  # type: ignore[no-any-return]

        program = torch.export.export(
            Model(),
            (torch.zeros(2, 8, dtype=torch.long),),
            dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},),
        )
    staged = bl.partition(bl.lift(program), split_points=["model.1"])
    for weights in (True, False):
        staged.save(tmp_path / "stages", weights=weights)
        assert sum(file.stat().st_size for file in (tmp_path / "stages").iterdir()) < 200_000
        loaded = bl.load_stage(tmp_path / "stages", 0)
        assert loaded.stage.module.get_parameter("model.0.weight").shape == (10**6, 10**5)
        with pytest.raises(bl.FeedError, match="'table'"):
            loaded.feed(2, 8)


def test_the_layout_of_ranks_is_kept(tmp_path: Path) -> None:
    lifted = bl.lift(export_case("llama_pr1797")[1])
    staged = bl.partition(lifted, num_stages=2, schedule="ZBVZeroBubble")
    staged.save(tmp_path / "stages")
    loaded = bl.load_stage(tmp_path / "stages", 1)
    assert loaded.placement == staged.placement is not None and loaded.placement.ranks == (0, 0)
    for own in (lambda **k: staged.build_stage(1, "cpu", **k), lambda **k: loaded.build_stage("cpu", **k)):
        with pytest.raises(bl.PartitionError, match=r"ZBVZeroBubble on 1 ranks.*1F1B has one stage on each rank"):
            own(schedule="1F1B")
    loops = bl.partition(lifted, num_stages=2, schedule="1F1B")
    with pytest.raises(bl.PartitionError, match=r"1F1B on 2 ranks.*ZBVZeroBubble has two stages"):
        loops.build_stage(0, "cpu", schedule="ZBVZeroBubble")


def test_a_rank_of_another_layout_is_refused() -> None:
    placement = placement_of("Interleaved1F1B", 4, 2)
    placement.check(2, "LoopedBFS", 0, 2)
    placement.check(3, None)
    with pytest.raises(bl.PartitionError, match=r"on ranks \(0, 1, 0, 1\); ScheduleZBV.* on ranks \(0, 1, 1, 0\)"):
        placement.check(2, "ZBVZeroBubble", 0, 2)
    with pytest.raises(bl.PartitionError, match="the pipeline group has 4"):
        placement.check(2, None, 0, 4)
    with pytest.raises(bl.PartitionError, match=r"stage 2 belongs to rank 0, and this is rank 1.*\(1, 3\)"):
        placement.check(2, None, 1, 2)


def test_layouts_that_are_none(stages: Path) -> None:
    def seal_manifest(**changes: Any) -> None:
        manifest = json.loads((stages / "manifest.json").read_bytes())
        body = {k: v for k, v in {**manifest, **changes}.items() if k != "checksum" and v is not ...}
        (stages / "manifest.json").write_bytes(sealed(body))

    seal_manifest(placement=...)  # as of a package that was saved before layouts were kept
    loaded = bl.load_stage(stages, 0)
    assert loaded.placement is None
    with pytest.raises(bl.PartitionError, match="made for no schedule"):
        loaded.build_stage("cpu", schedule="1F1B")
    for ranks in ([0], [0, 2], [0, -1]):
        seal_manifest(placement={"schedule": "Schedule1F1B", "ranks": ranks})
        with pytest.raises(bl.LiftingError, match="has 2 stages on the ranks"):
            bl.load_stage(stages, 0)
    seal_manifest(placement={"schedule": "Schedule1F1B", "ranks": "01"})
    with pytest.raises(bl.LiftingError, match="is wanted"):
        bl.load_stage(stages, 0)


def test_a_stage_without_weights_says_how_it_gets_them(tmp_path: Path) -> None:
    staged_case("llama_pr1797").save(tmp_path / "stages", weights=False)
    with pytest.raises(bl.PartitionError, match=r"has no values for 'tok_embeddings.*load_weights\(checkpoint\)"):
        bl.load_stage(tmp_path / "stages", 0).build_stage("cpu")
