"""Archives whose tensors unpack to far more than the file: refused, in bounded time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_fuzz import MODEL, Members, edited, members
from archive_models import export_model

from buffer_lifting.errors import ArchiveError
from buffer_lifting.graph import archive_state
from buffer_lifting.graph.archive import read_archive

WEIGHTS = "data/weights/model_weights_config.json"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The members of a program with strided, shared and equal buffers."""
    path = tmp_path_factory.mktemp("archives") / "states.pt2"
    torch.export.save(export_model("states"), path)
    return members(path)


def _pack(path: Path, content: Members, name: str, size: int) -> Path:
    """The archive with a deflated member of ``size`` zeros."""
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in content.items():
            if other != name:
                archive.writestr(zipfile.ZipInfo(f"m/{other}"), data)
        info = zipfile.ZipInfo(f"m/{name}")
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w") as member:
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
    return path


def _member_of(content: Members, fqn: str) -> str:
    path: str = json.loads(content[WEIGHTS])["config"][fqn]["path_name"]
    return f"data/weights/{path}"


def _error(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        read_archive(path)
    return str(caught.value)


def test_a_strided_buffer_in_a_bomb_takes_no_memory(content: Members, tmp_path: Path) -> None:
    path = _pack(tmp_path / "m.pt2", content, _member_of(content, "turned"), 256 << 20)
    assert path.stat().st_size < 2**19
    tracemalloc.start()
    try:
        message = _error(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "unpacks to 268435456 bytes, and its tensors take 128 of them" in message


def test_a_bomb_below_the_refusal_is_read_as_far_as_its_tensors_go(content: Members, tmp_path: Path) -> None:
    path = _pack(tmp_path / "m.pt2", content, _member_of(content, "turned"), 60 << 20)
    tracemalloc.start()
    try:
        read_archive(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def _views(content: Members, name: str, size: int, count: int) -> Members:
    """Adds ``count`` buffers that are views of one member, each from another element on."""

    def add(config: dict[str, Any]) -> None:
        for index in range(count):
            entry = json.loads(json.dumps(config["config"]["a"]))
            entry["path_name"] = name.rpartition("/")[2]
            entry["tensor_meta"] |= {
                "sizes": [{"as_int": size // 4 - count}],
                "strides": [{"as_int": 1}],
                "storage_offset": {"as_int": index},
            }
            config["config"][f"view{index}"] = entry

    def use(program: dict[str, Any]) -> None:
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        spec = next(item for item in signature["input_specs"] if item.get("buffer", {}).get("buffer_name") == "a")
        own = spec["buffer"]["arg"]["name"]
        for index in range(count):
            copied = json.loads(json.dumps(spec))
            copied["buffer"] |= {"arg": {"name": f"b_view{index}"}, "buffer_name": f"view{index}"}
            signature["input_specs"].insert(0, copied)
            graph["inputs"].insert(0, {"as_tensor": {"name": f"b_view{index}"}})
            graph["tensor_values"][f"b_view{index}"] = graph["tensor_values"][own]

    return edited(edited(content, add, WEIGHTS), use, MODEL)


def test_many_buffers_of_one_compressed_member_spend_one_budget(
    content: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_state, "_MAX_READ", 64 << 20)
    size, name = 32 << 20, "data/weights/weight_900"
    path = _pack(tmp_path / "m.pt2", _views({**content, name: b""}, name, size, 200), name, size)
    before = time.monotonic()
    assert "its buffers unpack to more than" in _error(path)
    assert time.monotonic() - before < 20  # 200 times the member takes more than a minute


def test_one_view_under_many_names_is_read_once(
    content: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_state, "_MAX_READ", 4 << 20)
    size, name = 2 << 20, "data/weights/weight_900"
    views = _views({**content, name: b""}, name, size, 50)

    def same(config: dict[str, Any]) -> None:
        for index in range(50):
            config["config"][f"view{index}"]["tensor_meta"]["storage_offset"] = {"as_int": index % 2}

    nodes = read_archive(_pack(tmp_path / "m.pt2", edited(views, same, WEIGHTS), name, size)).nodes
    assert len({nodes[f"b_view{index}"].content for index in range(50)}) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64, torch.complex128])
def test_strided_elements_are_those_of_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Equal values in other layouts have equal content."""

    class Layouts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(48).view(4, 12).to(dtype)
            for name, value in {
                "columns": base[:, 2:8:2],
                "straight": base[:, 2:8:2].contiguous(),
                "turned": base[:, 2:8:2].t().contiguous().t(),
                "other": base[:, 3:9:2].contiguous(),
            }.items():
                self.register_buffer(name, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.columns + self.straight + self.turned + self.other).abs().sum()

    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Layouts(), (torch.ones(2),)), path)
    content = {node.fqn: node.content for node in read_archive(path).nodes.values() if node.fqn}
    assert content["columns"] == content["straight"] == content["turned"] != content["other"]
