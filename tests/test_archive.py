"""The reader of .pt2 archives against torch's own loader: the same record and the same findings."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_outputs
from archive_models import MODELS, export_model, regions_without_outputs
from torch._export.serde import serialize
from torch._export.verifier import SpecViolationError
from torch.utils._sympy import functions as torch_functions
from zoo import CASES, export_case

import buffer_lifting as bl
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.archive_schema import DTYPES, LAYOUTS, MEMORY_FORMATS
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.op_schemas import arguments_of
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.graph.shape_grammar import GrammarError, parse_condition, parse_size
from buffer_lifting.graph.sizes import Size
from buffer_lifting.inspection.diagnostics import check_record
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.program import Axes
from buffer_lifting.scanner import scan_record
from buffer_lifting.torch_compat import _convert

ROOT = Path(__file__).parent.parent
ZOO = [
    (name, shape)
    for name, case in CASES.items()
    for shape in ("dynamic", "static")
    if case.dynamic or shape == "static"
]
assert transformers.modeling_outputs  # registers the outputs of its models with torch's loader


def loaded_record(path: Path) -> GraphRecord:
    """The record by way of torch's loader."""
    program = torch.export.load(path)
    return build_record(program, normalize(program, read_only=True).graph)


def described(node: Node) -> dict[str, Any]:
    """Every field of a node but its content, which is compared as a partition; NaN equals itself."""
    result = {field.name: getattr(node, field.name) for field in fields(node) if not field.name.startswith("_")}
    del result["content"]
    nan = {key: "nan" for key, arg in node.args.items() if isinstance(arg, float) and math.isnan(arg)}
    return {**result, "args": {**node.args, **nan}}


def same_content(record: GraphRecord) -> set[frozenset[str]]:
    """The sets of states of equal content."""
    states = [node for node in record.nodes.values() if node.kind is NodeKind.STATE]
    return {frozenset(other.fqn for other in states if other.content == node.content) for node in states}


def assert_same(read: GraphRecord, loaded: GraphRecord) -> None:
    """Both records are equal, and so are the reports on them."""
    assert list(read.nodes) == list(loaded.nodes)
    for name, node in read.nodes.items():
        assert described(node) == described(loaded.nodes[name])
    assert read.ranges == loaded.ranges
    assert read.hints == loaded.hints
    assert same_content(read) == same_content(loaded)
    assert scan_record(read).report == scan_record(loaded).report


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_the_zoo_reads_as_torch_loads_it(name: str, shape: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(export_case(name, dynamic=shape == "dynamic", layers=1)[1], path)
    read = read_archive(path)
    assert_same(read, loaded_record(path))
    assert scan_record(read).report.reads


@pytest.mark.parametrize("name", MODELS)
def test_small_programs_read_as_torch_loads_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(export_model(name), path)
    assert_same(read_archive(path), loaded_record(path))


def test_states_are_compared_by_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(export_model("states"), path)
    read = read_archive(path)
    groups = {group for group in same_content(read) if len(group) > 1}
    expected = [
        {"a", "b", "same"},
        {"bottom", "bottom_copy"},
        {"turned", "straight"},
        {"wide", "ones"},
        {"empty", "hollow"},
    ]
    assert {frozenset(group) for group in expected} <= groups
    states = {node.fqn: node for node in read.nodes.values() if node.kind is NodeKind.STATE}
    assert states["a"].aliases == ("same",)
    assert [fqn for fqn, node in states.items() if node.mutated] == ["count"]
    assert not states["b"].persistent


def test_an_op_of_an_unknown_library_is_named_and_refused(tmp_path: Path) -> None:
    """In a process that does not know the op: torch's loader fails there."""
    path = tmp_path / "model.pt2"
    torch.export.save(export_model("custom"), path)
    script = (
        "import sys\n"
        "from buffer_lifting.graph.archive import read_archive\n"
        "from buffer_lifting.scanner import scan_record\n"
        "axes = {'x': {0: 'batch', 1: 'seq'}}\n"
        "mixing = scan_record(read_archive(sys.argv[1]), axes).report.mixing\n"
        "print([item.op for item in mixing if item.code == 'BL202'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['archive_test.blend.default']"


def test_reading_and_scanning_do_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(export_case("llama_pr1797")[1], path)
    script = (
        "import sys\n"
        "from buffer_lifting.graph.archive import read_archive\n"
        "from buffer_lifting.scanner import scan_record\n"
        "print(len(scan_record(read_archive(sys.argv[1])).report.reads))\n"
        "print([name for name in ('torch', 'numpy', 'sympy', 'pickle', 'zipfile') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["6", "[]"]


# -- tables -------------------------------------------------------------------------------------------------------


def test_enumerations_are_those_of_torch() -> None:
    dtypes = {int(number): dtype for number, dtype in serialize._SERIALIZE_TO_TORCH_DTYPE.items()}
    assert {number: (f"torch.{name}", size) for number, (name, size) in DTYPES.items()} == {
        number: (str(dtype), dtype.itemsize) for number, dtype in dtypes.items()
    }
    assert {int(n): str(v) for n, v in serialize._SERIALIZE_TO_TORCH_LAYOUT.items()} == LAYOUTS
    assert {int(n): str(v) for n, v in serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT.items()} == MEMORY_FORMATS


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schemas_tool", ROOT / "tools" / "generate_ops_schemas.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_op_schemas_is_up_to_date() -> None:
    """On each torch: all of its ops are there, and what it lacks is what another version has."""
    tool = _generator()
    ops, partial = tool.known()
    assert tool.merge(ops, partial, tool.collect()) == (ops, partial), "run python tools/generate_ops_schemas.py"
    assert tool.TARGET.read_text() == tool.render(ops, partial)
    assert len(partial) < 50 and sum("~" in arguments for arguments in ops.values()) < 10


def test_op_schemas_are_those_of_the_registry() -> None:
    """Every op: names in order, and default values as torch gives them; another version may have more behind them."""
    ops, differing = _generator().collect(), 0
    assert len(ops) > 2500
    for name in ops:
        packet, _, overload = name.rpartition(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
        arguments = arguments_of(name)
        if arguments is None:
            differing += 1
            continue
        assert [argument.name for argument in arguments][: len(schema.arguments)] == [a.name for a in schema.arguments]
        assert all(argument.has_default for argument in arguments[len(schema.arguments) :])
        for ours, theirs in zip(arguments, schema.arguments, strict=False):
            assert ours.has_default == theirs.has_default_value()
            default = theirs.default_value
            assert ours.default == (tuple(default) if isinstance(default, list) else default)
    assert differing < 10
    assert all(arguments_of(name) is not None for name in ("add.Tensor", "index.Tensor", "embedding.default"))
    assert arguments_of("view.evil") is None
    assert arguments_of("view") is None


@pytest.mark.parametrize(
    "left, right, expected",
    [
        (["a:T"], ["a:T"], ["a:T"]),
        (["a:T"], ["a:T", "b:i=1"], ["a:T", "b:i=1"]),
        (["a:T", "b:i=1", "!"], ["a:T", "!"], ["a:T", "b:i=1", "!"]),
        (["a:T"], ["a:T", "b:i"], ["~"]),
        (["a:T", "b:i=1"], ["a:T", "b:i=2"], ["~"]),
        (["a:T", "!"], ["b:T", "!"], ["~", "!"]),
        (["a:T", "!add.Tensor"], ["a:T", "!"], ["~", "!"]),
        (["~"], ["a:T"], ["~"]),
        (["~", "!"], ["a:T", "!"], ["~", "!"]),
    ],
)
def test_one_record_for_an_op_of_two_versions(left: list[str], right: list[str], expected: list[str]) -> None:
    merge = _generator().merge
    assert merge({"x.y": left}, frozenset(), {"x.y": right}) == ({"x.y": expected}, frozenset())
    assert merge({"x.y": right}, frozenset(), {"x.y": left})[0]["x.y"] == expected or "~" in left
    assert merge({"x.y": left}, frozenset("p"), {"z.y": right}) == ({"x.y": left, "z.y": right}, {"p", "x.y", "z.y"})


# -- sizes --------------------------------------------------------------------------------------------------------


def _expressions() -> dict[str, Callable[[Any, Any], Any]]:
    import sympy

    f = torch_functions
    return {
        "symbol": lambda a, b: a,
        "polynomial": lambda a, b: (a + 2) * (b - 3) + a**2,
        "negative": lambda a, b: 53 - a,
        "floor": lambda a, b: f.FloorDiv(a + 1, 2) * 3 - b,
        "floor of floor": lambda a, b: f.FloorDiv(f.FloorDiv(a, 3) + b, 7),
        "mod": lambda a, b: f.PythonMod(a, 4) + f.Mod(b, 2),
        "max": lambda a, b: f.Max(0, 53 - a) * b,
        "min": lambda a, b: f.Min(a, b) + 1,
        "modular": lambda a, b: f.ModularIndexing(a, 2, 3),
        "clean": lambda a, b: f.CleanDiv(a * b, 3),
        "power": lambda a, b: f.PowByNatural(2, a),
        "rational": lambda a, b: sympy.Rational(1, 2) * a,
        "root": lambda a, b: sympy.Pow(a, -1) * b,
        "to int": lambda a, b: f.TruncToInt(f.IntTrueDiv(a, 3)),
        "float": lambda a, b: f.CeilToInt(f.FloatTrueDiv(f.ToFloat(a), sympy.Float(1.5))),
    }


@pytest.mark.parametrize("name", _expressions())
def test_sizes_are_those_of_sympy(name: str) -> None:
    import sympy

    a, b = sympy.symbols("s27 s70", positive=True, integer=True)
    expression = _expressions()[name](a, b)
    for ranges in ({}, {"s27": (2, 40), "s70": (50, None)}):
        assert parse_size(sympy.srepr(expression), ranges) == _convert(expression, ranges)


def test_conditions_are_of_the_grammar() -> None:
    import sympy

    a, b = sympy.symbols("s27 s70", positive=True, integer=True)
    for condition in (sympy.Eq(a, b), sympy.Ne(a, 3), (a < b) & (b >= 2), sympy.Not(sympy.Eq(a, 4)), sympy.true):
        parse_condition(sympy.srepr(condition))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "s27 + 1",
            "__import__('os')",
            "Symbol('s', integer=True).func",
            "Symbol",
            "Symbol()",
            "Symbol('a b')",
        ),
        *("Integer(1", "Integer(1))", "Integer(1.5)", "Integer('1')", "Add()", "Add(Integer(1),)", "eval('1')", "true"),
        *("Symbol('s', integer=1)", "Symbol('s', x=True)", "Lambda(Symbol('s'), Integer(1))", "Pow(Symbol('s'))"),
        *(
            "Pow(Symbol('s'), Integer(1000000))",
            f"Integer({'9' * 50})",
            f"Mul({', '.join(['Integer(9999999999)'] * 9)})",
        ),
        *("Add(" * 5000, "Add(" * 40 + "Integer(1)" + ")" * 40, "Equality(Symbol('s'), Integer(1))", "Integer(0x10)"),
        "Mul({0}, {0}, {0}, {0}, {0})".format("Add(" + ", ".join(f"Symbol('a{i}')" for i in range(9)) + ")"),
    ],
)
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        size: Size = parse_size(text)
        print(size)
    assert str(caught.value).isprintable()


class _Unused(torch.nn.Module):
    """Computes cos and sin in a region, and does not use them: Falcon does, with ALiBi."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            torch.arange(x.shape[1]).cos()
        return x + torch.arange(x.shape[1])[:, None]


def test_a_region_without_outputs_is_read_where_torch_cannot(tmp_path: Path) -> None:
    """It fails on the day that torch can: then the tests of the catalog need no exception."""
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(_Unused(), (torch.randn(3, 11, 4),), dynamic_shapes=dims)
    assert regions_without_outputs(program)
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(SpecViolationError, match="missing val field"):
        torch.export.load(tmp_path / "m.pt2")
    axes: Axes = {"x": {0: "batch", 1: "seq"}}
    found = check_record(read_archive(tmp_path / "m.pt2"), axes)
    assert found == bl.check(program, axes=axes) and found
