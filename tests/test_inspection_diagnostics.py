"""Diagnostics of programs: what is a finding, its place, its key, and the shape of lifted graphs and stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import check_record, diagnostic, numbered
from buffer_lifting.inspection.lifted_checks import PlainNode, PlainStage, lengths, shape_of_stages
from buffer_lifting.program import AxesInfo, LiftedInput, ScanReport

AUTO = ({0: Dim.AUTO, 1: Dim.AUTO},)
REPORT = ScanReport((), (), ())


class Mixed(nn.Module):
    """One read that can be lifted, one that cannot, and an op that mixes the sequence, twice in a submodule."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(torch.cumsum(x, 1), 1)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 8)
        self.register_buffer("table", torch.randn(64, 8))
        self.positions = nn.Parameter(torch.randn(64, 8))
        self.inner = self.Inner()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.table[: tokens.shape[1]]
        x = x + self.positions[: tokens.shape[1]].flip(0)
        return self.inner(x)


def mixed() -> torch.export.ExportedProgram:
    return torch.export.export(Mixed(), (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=AUTO)


def codes(found: tuple[bl.Diagnostic, ...]) -> list[str]:
    return [item.code for item in found]


# Exported programs


def test_findings_of_an_exported_program() -> None:
    found = bl.check(mixed())
    assert codes(found) == ["BL001", "BL105", "BL201", "BL201"]
    read, refused, first, second = found
    assert read.source == "table" and read.severity == "warning" and read.module == ""
    assert read.message == "buffer 'table' is read by position and is not lifted"
    assert read.location is not None and read.location.file == __file__
    assert read.location.code == "x = self.embedding(tokens) + self.table[: tokens.shape[1]]"
    assert refused.severity == "error" and refused.message.startswith("cannot lift parameter 'positions': ")
    assert refused.location is not None and "flip" in refused.location.code
    assert (first.module, first.op, first.source) == ("inner", "aten.cumsum.default", "")
    assert first.module_class.endswith("Mixed.Inner")
    assert [first.ordinal, second.ordinal] == [0, 1]
    assert first.key == ("BL201", "", "inner", "aten.cumsum.default", 0)
    assert len({item.fingerprint for item in found}) == 4


def test_a_handled_mix_is_no_finding() -> None:
    program = export_case("hf_llama")[1]
    assert any(mix.handled for mix in bl.scan(program).mixing)
    assert "BL200" not in codes(bl.check(program))


def test_select_and_ignore() -> None:
    program = mixed()
    assert codes(bl.check(program, select=["BL0"])) == ["BL001"]
    assert codes(bl.check(program, ignore=["BL2", "BL001"])) == ["BL105"]
    assert codes(bl.check(program, select=["BL105"], ignore=["BL1"])) == ["BL105"]
    with pytest.raises(ValueError, match="BL7"):
        bl.check(program, ignore=["BL7"])
    with pytest.raises(TypeError, match="int"):
        bl.check(3)


@pytest.mark.parametrize("name", ["llama_pr1797", "nanogpt", "hf_llama_mask", "tune_llama3"])
def test_a_file_has_the_findings_of_its_program(name: str, tmp_path: Path) -> None:
    program = export_case(name)[1]
    torch.export.save(program, tmp_path / "program.pt2")
    found = check_record(read_archive(tmp_path / "program.pt2"))
    assert found
    assert found == bl.check(program)


def test_the_key_survives_edits_of_lines_and_node_names() -> None:
    program = mixed()
    before = [item.key for item in bl.check(program)]
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.name = f"renamed_{node.name}"
            node.meta["stack_trace"] = node.meta["stack_trace"].replace("line ", "line 1")
    program.graph_signature.output_specs[0].arg.name = program.graph.output_node().args[0][0].name
    after = bl.check(program)
    assert [item.key for item in after] == before
    assert all(item.node.startswith("renamed_") for item in after)


def test_ordinals_count_equal_findings() -> None:
    item = diagnostic("BL201", "a", module="m", op="o", node="x", location=Location("f.py", 1))
    found = numbered([item, replace(item, op="p"), replace(item, node="y", location=None)])
    assert [entry.ordinal for entry in found] == [0, 0, 1]


# Lifted programs and stages


@pytest.mark.parametrize("name", ["llama_pr1797", "nanogpt", "sinusoid", "hf_llama_labels"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_is_lifted_is_clean(name: str, dynamic: bool) -> None:
    lifted = bl.context_parallel(bl.lift(export_case(name, dynamic=dynamic)[1]), size=1)
    assert bl.check(lifted) == ()
    assert bl.check(bl.partition(lifted, num_stages=2)) == ()


def test_a_causal_flag_is_left_until_context_parallel() -> None:
    lifted = bl.lift(export_case("llama_pr1797")[1])
    assert codes(bl.check(lifted)) == ["BL004", "BL004"]
    assert codes(bl.check(bl.partition(lifted, num_stages=2))) == ["BL004", "BL004"]
    with pytest.raises(ValueError, match="axes="):
        bl.check(lifted, axes={"tokens": {0: "batch"}})


def test_what_a_lift_left_is_found() -> None:
    lifted = bl.lift(mixed(), strict=False)
    found = bl.check(lifted)
    assert codes(found) == ["BL105", "BL201", "BL201"]
    assert found[0].source == "positions"


def test_a_lifted_input_without_its_broadcast() -> None:
    lifted = bl.lift(export_case("sinusoid")[1])
    (item,) = lifted.inputs
    graph = lifted.program.graph
    placeholder = next(node for node in graph.nodes if node.name == item.name)
    (spread,) = placeholder.users
    spread.replace_all_uses_with(placeholder)
    graph.erase_node(spread)
    found = bl.check(lifted, select=["BL3"])
    assert codes(found) == ["BL301"]
    assert found[0].source == item.source and found[0].node == item.name
    assert found[0].location is not None and found[0].location.file.endswith("reference.py")


def test_a_lifted_input_whose_batch_is_not_first() -> None:
    lifted = bl.lift(export_case("sinusoid")[1])
    placeholder = next(node for node in lifted.program.graph.nodes if node.name == lifted.inputs[0].name)
    (spread,) = placeholder.users
    batch, *rest = spread.args[1]
    assert bl.check(lifted) == ()
    spread.args = (placeholder, [-1, batch, *rest[1:]])
    assert codes(bl.check(lifted, select=["BL3"])) == ["BL302"]
    spread.args = (placeholder, [batch, *rest])
    placeholder.meta["val"] = placeholder.meta["val"].transpose(0, 1)
    found = bl.check(lifted, select=["BL3"])
    assert codes(found) == ["BL302"]
    assert "dim 0 is not the batch" in found[0].message


def test_a_specialised_length() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(11, 8))
            self.embedding = nn.Embedding(61, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens) + self.table

    program = torch.export.export(Whole(), (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=AUTO)
    found = bl.check(bl.lift(program))
    assert codes(found) == ["BL304"]
    assert found[0].source == "seq" and "11" in found[0].message
    assert lengths(AxesInfo(3, {"seq": 11})) == [], "wholly static: one size is meant"
    assert codes(tuple(lengths(AxesInfo(3, {"seq": None, "decoder": 7})))) == ["BL304"]


def node(name: str, target: str, *args: Any) -> PlainNode:
    """A call."""
    return PlainNode(name, "call_function", target, args)


def stages(*first: PlainNode, sent: str, more: str = "") -> list[PlainStage]:
    """Two stages; the first has ``tokens`` and ``lifted``, and hands on ``sent`` and ``more``."""
    handed = tuple(name for name in (sent, more) if name)
    start = [PlainNode(name, "placeholder", name, ()) for name in ("tokens", "lifted")]
    spread = node("spread", "aten.expand.default", {"node": "lifted"}, [{"node": "size"}, -1, -1])
    size = node("size", "aten.sym_size.int", {"node": "tokens"}, 0)
    results = PlainNode("output", "output", "output", ({"tuple": [{"node": name} for name in handed]},))
    received = tuple(PlainNode(name, "placeholder", name, ()) for name in handed)
    last = PlainNode("output", "output", "output", ({"node": handed[0]},))
    return [
        PlainStage(0, ("tokens",), handed, (*start, size, spread, *first, results)),
        PlainStage(1, handed, handed[:1], (*received, last)),
    ]


ITEM = LiftedInput("lifted", "values", "positions", "row", "table", "float32", (8,), "seq")


def test_a_position_value_that_crosses_a_boundary() -> None:
    hidden = node("hidden", "aten.mul.Tensor", {"node": "tokens"}, {"node": "spread"})
    cos = node("cos", "aten.cos.default", {"node": "spread"})
    assert shape_of_stages(stages(hidden, cos, sent="hidden"), [ITEM], REPORT) == []
    found = shape_of_stages(stages(hidden, cos, sent="hidden", more="cos"), [ITEM], REPORT)
    assert codes(tuple(found)) == ["BL303"]
    assert (found[0].node, found[0].source, found[0].op) == ("cos", "lifted", "aten.cos.default")


def test_a_carried_position_value_is_found_where_it_is_made() -> None:
    hidden = node("hidden", "aten.mul.Tensor", {"node": "tokens"}, {"node": "spread"})
    first, second = stages(hidden, sent="hidden", more="spread")
    again = node("again", "aten.clone.default", {"node": "spread"})
    output = PlainNode("output", "output", "output", ({"tuple": [{"node": "hidden"}, {"node": "again"}]},))
    carries = replace(second, outputs=("hidden", "again"), nodes=(*second.nodes[:-1], again, output))
    last = PlainStage(2, ("hidden", "again"), ("hidden",), (*second.nodes[:1], second.nodes[-1]))
    found = shape_of_stages([first, carries, last], [ITEM], REPORT)
    assert [item.node for item in found] == ["spread"]


def test_shapes_of_inputs_are_no_contents_and_writes_are() -> None:
    zeros = node("zeros", "aten.zeros_like.default", {"node": "tokens"})
    assert codes(tuple(shape_of_stages(stages(zeros, sent="zeros"), [ITEM], REPORT))) == ["BL303"]
    view = node("view", "aten.view.default", {"node": "zeros"}, [-1])
    write = node("write", "aten.copy_.default", {"node": "view"}, {"node": "tokens"})
    assert shape_of_stages(stages(zeros, view, write, sent="zeros"), [ITEM], REPORT) == []


def test_a_boundary_of_a_real_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    lifted = bl.context_parallel(bl.lift(export_case("sinusoid")[1]), size=1)
    staged = bl.partition(lifted, num_stages=2)
    graph = staged.stages[0].module.graph
    spread = next(n for n in graph.nodes if n.target is torch.ops.aten.expand.default)
    output = graph.output_node()
    output.args = ((*output.all_input_nodes, spread),)
    found = bl.check(staged)
    assert codes(found) == ["BL303"]
    assert found[0].source == lifted.inputs[0].name
