"""Packages: what is saved and loaded feeds and runs bitwise as before; anything else is refused."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from zoo import CASES, export_case, make_inputs

import buffer_lifting as bl
from buffer_lifting.graph_json import decode_graph, encode_graph
from buffer_lifting.package import load, load_stage
from buffer_lifting.tensor_file import read_tensors, write_tensors

NAMES = ("llama_pr1797", "hf_llama", "hf_llama_labels", "nanogpt", "hf_gpt2")
BATCH, SEQ = 3, 10


@cache
def lifted_case(name: str) -> bl.LiftedProgram:
    return bl.lift(export_case(name)[1])


def feeds(source: Any, name: str) -> list[dict[str, Tensor]]:
    """The natural feed, one shared order, and an order and position ids per sample."""
    generator = torch.Generator().manual_seed(5)
    orders = torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])
    positions = torch.cat([torch.arange(6), torch.arange(4)])
    rows = torch.stack([positions, positions.roll(3), torch.arange(SEQ)])
    args, kwargs = make_inputs(name, BATCH, SEQ, 1)
    inputs = {**dict(zip(CASES[name].seq_inputs, args, strict=False)), **kwargs}
    return [
        source.feed(BATCH, SEQ, inputs=inputs),
        source.feed(BATCH, SEQ, inputs=inputs, order=orders[0]),
        source.feed(BATCH, SEQ, inputs=inputs, order=orders, positions=rows),
    ]


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, strides apart."""
    if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
        return False
    return left.device.type == "meta" or torch.equal(
        left.detach().contiguous().reshape(-1).view(torch.uint8),
        right.detach().contiguous().reshape(-1).view(torch.uint8),
    )


def assert_same_feeds(left: Any, right: Any, name: str) -> None:
    for one, two in zip(feeds(left, name), feeds(right, name), strict=True):
        assert list(one) == list(two)
        for key in one:
            assert same(one[key], two[key]), key
            assert one[key].stride() == two[key].stride(), key


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def run(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and parameter gradients."""
    module.zero_grad(set_to_none=True)
    outputs = tensors_of(module(*args, **kwargs))
    torch.autograd.backward([out.float().sin().sum() for out in outputs if out.requires_grad])
    named = module.named_parameters(remove_duplicate=False)  # torch may list a tied weight by its other name
    grads = {fqn: p.grad.clone() for fqn, p in named if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return outputs, grads


def assert_same_run(left: torch.nn.Module, right: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    (outs, grads), (outs2, grads2) = run(left, *args, **kwargs), run(right, *args, **kwargs)
    assert len(outs) == len(outs2) and all(same(a, b) for a, b in zip(outs, outs2, strict=True))
    assert grads.keys() == grads2.keys() and grads
    assert all(same(grads[fqn], grads2[fqn]) for fqn in grads)


# One file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_lifted_roundtrip(name: str, tmp_path: Path) -> None:
    lifted = lifted_case(name)
    lifted.save(tmp_path / "model.lifted")
    again = load(tmp_path / "model.lifted")
    assert (again.inputs, again.report, again.axes) == (lifted.inputs, lifted.report, lifted.axes)
    assert again.input_axes == lifted.input_axes and list(again.input_axes) == list(lifted.input_axes)
    assert again.feed_program.outputs == lifted.feed_program.outputs
    assert again.feed_program.input_shapes == lifted.feed_program.input_shapes
    assert again.feed_program.max_lengths == lifted.feed_program.max_lengths
    assert (again.cp_size, again.mesh_dim) == (lifted.cp_size, lifted.mesh_dim)
    assert_same_feeds(lifted, again, name)
    args, kwargs = make_inputs(name, BATCH, SEQ, 1)
    for feed in feeds(lifted, name):
        assert_same_run(lifted.program.module(), again.program.module(), *args, **kwargs, **feed)
    assert {p.name for p in tmp_path.iterdir()} == {"model.lifted"}


def test_loaded_program_goes_on(tmp_path: Path) -> None:
    """What was loaded can be transformed, split and saved again."""
    lifted = lifted_case("llama_pr1797")
    parallel = bl.context_parallel(lifted, size=1)
    parallel.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.cp_size == 1
    assert_same_feeds(parallel, again, "llama_pr1797")
    staged = bl.partition(again, num_stages=2)
    args, kwargs = make_inputs("llama_pr1797", BATCH, SEQ, 1)
    feed = feeds(again, "llama_pr1797")[2]
    assert same(staged(*args, **kwargs, **feed), parallel.program.module()(*args, **kwargs, **feed))
    again.save(tmp_path / "b")
    assert_same_feeds(parallel, load(tmp_path / "b"), "llama_pr1797")


def test_manifest_is_readable_and_stable(tmp_path: Path) -> None:
    lifted = lifted_case("llama_pr1797")
    texts = []
    for name in ("a", "b"):
        lifted.save(tmp_path / name)
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert set(archive.namelist()) == {"manifest.json", "program.pt2", "feed.json", "feed.bin"}
            texts.append((archive.read("manifest.json"), archive.read("feed.json"), archive.read("feed.bin")))
    assert texts[0] == texts[1]
    manifest = json.loads(texts[0][0])
    assert list(manifest) == sorted(manifest)
    assert manifest["version"] == 1 and manifest["torch"] == torch.__version__
    assert manifest["inputs"][0]["source"] == "freqs_cis"
    assert manifest["report"]["reads"][0]["location"]["line"] > 0
    feed = json.loads(texts[0][1])
    assert feed["in_program"] == ["freqs_cis"] and feed["tables"] == []  # the table is in the program already
    assert {n["target"] for n in feed["graphs"]["natural"]["nodes"] if n["op"] == "call_function"} == {
        "aten.slice.Tensor",
        "aten.sym_size.int",
    }


def test_bound_tables_are_saved(tmp_path: Path) -> None:
    lifted = bl.lift(export_case("llama_pr1797")[1])
    changed = {fqn: table * 2 for fqn, table in lifted.feed_program.state.items()}
    lifted.bind_tables(changed)
    lifted.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert_same_feeds(lifted, again, "llama_pr1797")
    assert same(again.feed_program.state["freqs_cis"], changed["freqs_cis"])


def test_meta_tables_stay_meta(tmp_path: Path) -> None:
    lifted = bl.lift(export_case("llama_pr1797")[1])
    table = lifted.feed_program.state["freqs_cis"]
    lifted.feed_program.state["freqs_cis"] = table.to("meta")
    lifted.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.feed_program.state["freqs_cis"].device.type == "meta"
    with pytest.raises(bl.FeedError, match="bind_tables"):
        again.feed(BATCH, SEQ)
    again.bind_tables({"freqs_cis": table})
    assert_same_feeds(again, lifted_case("llama_pr1797"), "llama_pr1797")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    lifted_case("llama_pr1797").save(tmp_path / "model.lifted")
    return tmp_path / "model.lifted"


def rewrite(path: Path, member: str, change: Callable[[bytes], bytes | None]) -> None:
    """Replaces (or, with ``None``, drops) a member of the zip."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = change(members.pop(member))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [*members.items(), *([(member, changed)] if changed is not None else [])]:
            archive.writestr(name, data)


def edit(data: bytes, **values: Any) -> bytes:
    return json.dumps({**json.loads(data), **values}).encode()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bl.LiftingError, match="not there"):
        load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(bl.LiftingError, match="no lifted package"):
        load(tmp_path / "text")
    with pytest.raises(bl.LiftingError, match="no lifted package"):
        load(tmp_path)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(bl.LiftingError, match="no lifted package"):
        load(tmp_path / "weights.pt")
    torch.export.save(lifted_case("llama_pr1797").program, tmp_path / "model.pt2")
    with pytest.raises(bl.LiftingError, match=r"torch\.export file"):
        load(tmp_path / "model.pt2")


@pytest.mark.parametrize("keep", (0.0, 0.3, 0.9, 0.999))
def test_truncated_file_is_refused(package: Path, keep: float) -> None:
    data = package.read_bytes()
    package.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(bl.LiftingError):
        load(package)


def test_flipped_bytes_are_refused(package: Path) -> None:
    data = bytearray(package.read_bytes())
    for place in range(len(data) // 10, len(data), len(data) // 5):
        broken = bytearray(data)
        broken[place] ^= 0xFF
        package.write_bytes(broken)
        with pytest.raises(bl.LiftingError):
            load(package)


def test_other_versions_and_missing_parts_are_refused(package: Path) -> None:
    original = package.read_bytes()
    cases: list[tuple[str, Callable[[bytes], bytes | None], str]] = [
        ("manifest.json", lambda d: edit(d, version=2), "version 2 of the format"),
        ("manifest.json", lambda d: edit(d, version=None), "version None"),
        ("manifest.json", lambda d: edit(d, format="other"), "no lifted package"),
        ("manifest.json", lambda d: edit(d, inputs=[{"name": 3}]), "wanted|manifest"),
        ("manifest.json", lambda d: edit(d, axes={}), "manifest"),
        ("manifest.json", lambda d: edit(d, cp_size="two"), "wanted"),
        ("manifest.json", lambda d: b"{", "no lifted package"),
        ("program.pt2", lambda d: d[: len(d) // 2], "cannot be read"),
        ("program.pt2", lambda d: None, "damaged"),
        ("feed.json", lambda d: None, "damaged"),
        ("feed.json", lambda d: edit(d, in_program=["nothing"]), "damaged"),
        ("feed.bin", lambda d: b"more", "more bytes"),
    ]
    for member, change, message in cases:
        package.write_bytes(original)
        rewrite(package, member, change)
        with pytest.raises(bl.LiftingError, match=message):
            load(package)


def test_only_packages_are_overwritten(package: Path, tmp_path: Path) -> None:
    lifted = lifted_case("nanogpt")
    lifted.save(package)  # a package may be replaced
    assert load(package).inputs == lifted.inputs
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(bl.LiftingError, match="not overwritten"):
        lifted.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(bl.LiftingError, match="not overwritten"):
        lifted.save(tmp_path)
    with pytest.raises(bl.LiftingError, match="no directory"):
        lifted.save(tmp_path / "missing" / "model")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("disk")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(RuntimeError, match="disk"):
        lifted_case("llama_pr1797").save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# A directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_staged_roundtrip(name: str, tmp_path: Path) -> None:
    staged = bl.partition(lifted_case(name), num_stages=2)
    staged.save(tmp_path / "stages")
    loaded = [load_stage(tmp_path / "stages", index) for index in range(2)]
    args, kwargs = make_inputs(name, BATCH, SEQ, 1)
    named = {**dict(zip(staged.positional, args, strict=False)), **kwargs}
    for one in loaded:
        assert one.num_stages == 2 and one.tied == dict(staged.tied)
        assert_same_feeds(staged, one, name)
        spec, expected = one.kwargs_chunk_spec(), staged.kwargs_chunk_spec()
        assert list(spec) == list(expected) and [str(s) for s in spec.values()] == [str(s) for s in expected.values()]
        order = torch.randperm(SEQ)
        for key, value in staged.shard_inputs(order=order, shard=(1, 2), **named).items():
            assert same(one.shard_inputs(order=order, shard=(1, 2), **named)[key], value)
    for feed in feeds(staged, name):
        values = list(args)
        for old, new in zip(staged.stages, loaded, strict=True):
            stage = new.stage
            for field in (
                "index",
                "activations",
                "kwargs",
                "outputs",
                "parameters",
                "boundary_bytes",
                "tied",
            ):
                assert getattr(stage, field) == getattr(old, field)
            keywords = {**kwargs, **feed} if old.index == 0 else {**named, **feed}
            assert_same_run(old.module, stage.module, *values, **keywords)
            result = old.module(*values, **keywords)
            values = [v.detach() for v in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", ("hf_gpt2", "llama_pr1797", "nanogpt_tied"))
def test_state_is_what_it_was(name: str, tmp_path: Path) -> None:
    staged = bl.partition(lifted_case(name), num_stages=2)
    staged.save(tmp_path / "stages")
    for old in staged.stages:
        new = load_stage(tmp_path / "stages", old.index).stage
        for kind in ("named_parameters", "named_buffers"):
            before, after = dict(getattr(old.module, kind)()), dict(getattr(new.module, kind)())
            assert list(before) == list(after)
            assert all(same(before[fqn], after[fqn]) for fqn in before)
            assert [t.requires_grad for t in before.values()] == [t.requires_grad for t in after.values()]
        assert list(old.module.state_dict()) == list(new.module.state_dict())
        new.module.load_state_dict(old.module.state_dict())


def test_stages_of_three_kinds_of_state(tmp_path: Path) -> None:
    """A positions-form lift keeps its table in the stages: a buffer, non-persistent in this model."""
    staged = bl.partition(bl.lift(export_case("llama_pr1797")[1], form="positions"), num_stages=2)
    staged.save(tmp_path / "stages")
    for old in staged.stages:
        new = load_stage(tmp_path / "stages", old.index).stage
        before, after = dict(old.module.named_buffers()), dict(new.module.named_buffers())
        assert list(before) == list(after) == ["freqs_cis"]
        assert same(before["freqs_cis"], after["freqs_cis"])
        assert ("freqs_cis" in old.module.state_dict()) == ("freqs_cis" in new.module.state_dict())


def test_a_stage_reads_only_its_own_files(tmp_path: Path) -> None:
    staged = bl.partition(lifted_case("llama_pr1797"), num_stages=2)
    staged.save(tmp_path / "stages")
    for file in (tmp_path / "stages").glob("stage_0.*"):
        file.unlink()
    assert load_stage(tmp_path / "stages", 1).index == 1
    with pytest.raises(bl.LiftingError, match="damaged"):
        load_stage(tmp_path / "stages", 0)


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    bl.partition(lifted_case("llama_pr1797"), num_stages=2).save(tmp_path / "stages")
    return tmp_path / "stages"


@pytest.mark.parametrize("index", (-1, 2, 1.0, "0", None))
def test_no_such_stage(stages: Path, index: Any) -> None:
    with pytest.raises(bl.PartitionError, match="there is no stage"):
        load_stage(stages, index)


@pytest.mark.parametrize("file", ("feed.json", "stage_1.json", "stage_1.pt2"))
def test_changed_stage_files_are_refused(stages: Path, file: str) -> None:
    path = stages / file
    data = path.read_bytes()
    place = len(data) // 2
    for broken in (
        data[:place],
        data + b" ",
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
        b"",
    ):
        path.write_bytes(broken)
        with pytest.raises(bl.LiftingError):
            load_stage(stages, 1)
    path.unlink()
    with pytest.raises(bl.LiftingError):
        load_stage(stages, 1)


def test_mixed_up_directories_are_refused(stages: Path, tmp_path: Path) -> None:
    """Stages of another save, with other weights, and of one another."""
    other = bl.partition(bl.lift(export_case("llama_pr1797", seed=1)[1]), num_stages=2)
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "stage_1.pt2", stages / "stage_1.pt2")
    with pytest.raises(bl.LiftingError, match="not the file that was saved"):
        load_stage(stages, 1)
    for suffix in ("json", "pt2"):
        shutil.copy(stages / f"stage_0.{suffix}", stages / f"stage_1.{suffix}")
    with pytest.raises(bl.LiftingError, match="not the file that was saved"):
        load_stage(stages, 1)


def test_other_directories_are_refused(stages: Path, tmp_path: Path) -> None:
    with pytest.raises(bl.LiftingError, match="no staged package"):
        load_stage(tmp_path / "nothing", 0)
    with pytest.raises(bl.LiftingError, match="no staged package"):
        load_stage(tmp_path, 0)
    manifest = stages / "manifest.json"
    original = manifest.read_bytes()
    manifest.write_bytes(edit(original, version=7))
    with pytest.raises(bl.LiftingError, match="version 7"):
        load_stage(stages, 0)
    manifest.write_bytes(edit(original, format="buffer_lifting.lifted"))
    with pytest.raises(bl.LiftingError, match="no manifest"):
        load_stage(stages, 0)


def test_only_staged_packages_are_replaced(stages: Path, tmp_path: Path) -> None:
    staged = bl.partition(lifted_case("nanogpt"), num_stages=2)
    (tmp_path / "empty").mkdir()
    staged.save(tmp_path / "empty")
    staged.save(stages)
    assert load_stage(stages, 0).stage.parameters == staged.stages[0].parameters
    (stages / "mine.txt").write_text("mine")
    with pytest.raises(bl.LiftingError, match="not overwritten"):
        staged.save(stages)
    assert (stages / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(bl.LiftingError, match="not overwritten"):
            staged.save(path)
    assert {p.name for p in tmp_path.iterdir()} == {"stages", "empty", "file"}


# Graphs and tensors --------------------------------------------------------------------------------------


def graph_of(target: Any, args: tuple[Any, ...], **kwargs: Any) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, tuple(x if arg is ... else arg for arg in args), kwargs))
    return graph


ATEN = torch.ops.aten


@pytest.mark.parametrize(
    "graph",
    (
        graph_of(ATEN.add.Tensor, (..., 0.1), alpha=3),
        graph_of(ATEN.full_like.default, (..., float("-inf")), dtype=torch.float64),
        graph_of(ATEN.full_like.default, (..., float("inf")), memory_format=torch.preserve_format),
        graph_of(ATEN.full_like.default, (..., float("nan")), device=torch.device("cpu")),
        graph_of(ATEN.full_like.default, (..., 1e-300), layout=torch.strided, pin_memory=False),
        graph_of(ATEN.mul.Tensor, (..., 1.5 + 2j)),
        graph_of(ATEN.permute.default, (..., [1, 0])),
        graph_of(ATEN.clone.default, (...,), memory_format=torch.contiguous_format),
    ),
    ids=str,
)
def test_graph_roundtrip(graph: Graph) -> None:
    again = decode_graph(json.loads(json.dumps(encode_graph(graph), allow_nan=False)), torch.nn.Module())
    assert str(again.graph) == str(graph)
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert same(GraphModule(torch.nn.Module(), graph)(x), again(x))


def node(target: Any, **values: Any) -> list[dict[str, Any]]:
    base = {"op": "call_function", "args": [], "kwargs": {}}
    return [{**base, "name": "x", "target": target, **values}]


@pytest.mark.parametrize(
    "nodes",
    (
        node("builtins.exec", args=["1"]),
        node("os.system", args=["true"]),
        node("operator.attrgetter", args=["x"]),
        node("torch.load", args=["x"]),
        node("aten.from_file.default", args=["x"]),
        node("aten.__class__.default"),
        node("aten.no_such_op.default"),
        node("prims.add.default"),
        node(None),
        node("x", op="call_method"),
        node("x", op="call_module"),
        node("x=exec('1')", op="placeholder"),
        node("x y", op="placeholder"),
        node("a b", op="get_attr"),
        node("aten.add.Tensor", name="x = 1"),
        node("aten.add.Tensor", kwargs={"a=exec('1'), b": 1}),
        node("aten.add.Tensor", args=[{"node": "missing"}]),
        node("aten.add.Tensor", args=[{"dtype": "save"}]),
        node("aten.add.Tensor", args=[{"pickle": "x"}]),
        node("aten.add.Tensor", args=[{}]),
        [{"name": "x"}],
        [3],
        None,
    ),
    ids=str,
)
def test_other_graphs_are_refused(nodes: Any) -> None:
    with pytest.raises(bl.LiftingError):
        decode_graph(nodes, torch.nn.Module())


@pytest.mark.parametrize("target", (print, torch.add, ATEN.from_file.default))
def test_other_calls_are_not_saved(target: Any) -> None:
    with pytest.raises(bl.LiftingError, match="cannot hold"):
        encode_graph(graph_of(target, (...,)))
    with pytest.raises(bl.LiftingError, match="cannot hold"):
        encode_graph(graph_of(ATEN.add.Tensor, (..., object)))


def test_tensors_roundtrip_bitwise() -> None:
    bits = torch.randint(-(2**31), 2**31, (4, 6), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    tensors = {
        "float32 with every nan": bits.view(torch.float32),
        "bfloat16": bits.view(torch.bfloat16),
        "float8": bits.view(torch.float8_e4m3fn),
        "complex64": bits.view(torch.float32).view(torch.complex64),
        "complex128": torch.randn(3, 2, dtype=torch.complex128),
        "conjugate": torch.randn(3, 2, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "strided": torch.randn(8)[::2],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "meta": torch.empty(2, 3, dtype=torch.bfloat16, device="meta"),
    }
    tensors["again"] = tensors["bool"]
    stream = io.BytesIO()
    index = json.loads(json.dumps(write_tensors(stream, tensors)))
    stream.seek(0)
    again, _ = read_tensors(stream, index, own_device=True)
    assert list(again) == list(tensors)
    for name, value in tensors.items():
        plain = value if value.device.type == "meta" else value.resolve_conj()
        assert same(plain, again[name]), name
        if name not in ("expanded", "strided"):
            assert again[name].stride() == value.stride()
    assert again["again"] is again["bool"]


def test_tensors_that_do_not_fit_their_index() -> None:
    stream = io.BytesIO()
    index = write_tensors(stream, {"a": torch.arange(4)})
    for data, changed, message in (
        (stream.getvalue()[:-1], index, "cut off"),
        (stream.getvalue() + b"x", index, "more bytes"),
        (stream.getvalue(), [{**index[0], "dtype": "save"}], "no dtype"),
        (stream.getvalue(), [{**index[0], "shape": [-4]}], "damaged"),
        (stream.getvalue(), [{**index[0], "order": [3]}], "damaged"),
        (stream.getvalue(), [{"name": "a", "same": "b"}], "damaged"),
        (stream.getvalue(), None, "damaged"),
    ):
        with pytest.raises(bl.LiftingError, match=message):
            read_tensors(io.BytesIO(data), changed, own_device=False)
    with pytest.raises(bl.LiftingError, match="plain tensors"):
        write_tensors(io.BytesIO(), {"a": torch.eye(2).to_sparse()})
