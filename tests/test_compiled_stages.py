"""Compiled stages: outputs and gradients are those of eager stages; complex numbers can be written as pairs.

The slow tests compile C++ (Inductor, AOTInductor). They need g++, and fail without it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import CASES, export_case

import buffer_lifting as bl
from buffer_lifting.compiled import CompiledStage, _inputs
from buffer_lifting.stage_code import spelled

COMPLEX = ("llama_pr1797", "llama_attribute")


def complex_nodes(graph: torch.fx.Graph) -> list[str]:
    values = [(node, node.meta.get("val")) for node in graph.nodes]
    return [str(node.target) for node, value in values if isinstance(value, Tensor) and value.is_complex()]


@functools.cache
def exported(name: str) -> ExportedProgram:
    program: ExportedProgram = export_case(name, dynamic=True)[1]
    return program


def staged_case(name: str, pairs: bool = False) -> tuple[ExportedProgram, bl.StagedProgram]:
    program = bl.real_pairs(exported(name)) if pairs else exported(name)
    return program, bl.partition(bl.lift(program), num_stages=2)


def run_stages(
    staged: bl.StagedProgram,
    run: Callable[[Any], Callable[..., Any]],
    inputs: dict[str, Tensor],
    feed: dict[str, Tensor],
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Outputs and gradients (of activations and parameters) of each stage; each gets what the eager one before sent."""
    found = []
    values: list[Tensor] = []
    for stage in staged.stages:
        kwargs = {**feed, **{n: v for n, v in inputs.items() if stage.index or n in stage.kwargs}}
        sent = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
        args = [inputs[name] for name in stage.activations] if not stage.index else sent
        result = run(stage.module)(*args, **kwargs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        wanted = [*stage.module.parameters(), *(v for v in args if v.requires_grad)]
        loss = sum((out.double().square().sum() for out in outputs if out.requires_grad), torch.zeros(()))
        grads = torch.autograd.grad(loss, wanted)
        found.append(([out.detach() for out in outputs], list(grads)))
        eager = stage.module(*args, **kwargs)
        values = list(eager) if isinstance(eager, tuple) else [eager]
    return found


def assert_same(got: list[tuple[list[Tensor], list[Tensor]]], want: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    assert len(got) == len(want)
    for (outputs, grads), (eager_outputs, eager_grads) in zip(got, want, strict=True):
        torch.testing.assert_close(outputs, eager_outputs, rtol=1e-5, atol=1e-5)
        largest = max(float(grad.abs().max()) for grad in eager_grads)
        for grad, eager in zip(grads, eager_grads, strict=True):
            assert float((grad - eager).abs().max()) <= 1e-5 * max(float(eager.abs().max()), 1e-2 * largest)


def sizes(staged: bl.StagedProgram, batch: int, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """User inputs and lifted inputs, in another order for each sample."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 32, (batch, length), generator=generator)
    (name,) = staged.lifted.input_axes
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    return {name: tokens}, staged.feed(batch, length, order=order)


def test_stages_compile_whole() -> None:
    """Dynamo and AOTAutograd take each stage as one graph, for training; its code is that of a stage."""
    _, staged = staged_case("llama_pr1797", pairs=True)
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)

    inputs, feed = sizes(staged, 2, 9)
    torch._dynamo.reset()
    compiled = run_stages(staged, lambda m: torch.compile(m, backend=backend, fullgraph=True), inputs, feed)
    assert_same(compiled, run_stages(staged, lambda m: m, inputs, feed))
    assert len(graphs) == len(staged.stages)


def test_a_stage_is_compiled_in_place() -> None:
    """Before its code is written."""
    _, staged = staged_case("llama_pr1797")
    module, other = staged.stages[0].module, copy.deepcopy(staged.stages[0].module)
    module.compile(backend="eager", fullgraph=True)
    inputs, feed = sizes(staged, 2, 9)
    (tokens,) = inputs.values()
    assert torch.equal(module(tokens, **feed), other(tokens, **feed))


def needs_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.fail("the slow tests of compiled stages need g++")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "pairs"), [("llama_pr1797", True), ("llama_pr1797", False), ("nanogpt", False)])
def test_training_with_inductor(name: str, pairs: bool) -> None:
    """Outputs and all gradients, at two sizes; Inductor warns of complex numbers only where there are some."""
    needs_compiler()
    _, staged = staged_case(name, pairs)
    torch._dynamo.reset()
    importlib.import_module("torch._inductor.lowering")._warn_complex_not_supported.cache_clear()
    compiled: dict[int, Any] = {}

    def run(module: nn.Module) -> Any:
        return compiled.setdefault(id(module), torch.compile(module, fullgraph=True, dynamic=True))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch, length in ((2, 9), (3, 14)):
            inputs, feed = sizes(staged, batch, length)
            assert_same(run_stages(staged, run, inputs, feed), run_stages(staged, lambda m: m, inputs, feed))
    warned = any("complex" in str(item.message) for item in caught)
    assert warned == (name in COMPLEX and not pairs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pairs", [True, False])
def test_packages_of_ahead_of_time_inductor(pairs: bool, tmp_path: Path) -> None:
    """Each stage as a package, at other sizes than it was compiled with, and in an order that all samples share."""
    needs_compiler()
    _, staged = staged_case("llama_pr1797", pairs)
    packages = [
        bl.load_compiled(bl.compile_package(staged.exported(stage.index), tmp_path / f"{stage.index}.pt2"))
        for stage in staged.stages
    ]
    for batch, length in ((2, 9), (3, 14)):
        inputs, feed = sizes(staged, batch, length)
        (tokens,) = inputs.values()
        for own in (feed, staged.feed(batch, length), staged.feed(batch, length, order=torch.randperm(length))):
            value = tokens
            for package in packages:
                value = package(value, **own)
            torch.testing.assert_close(value, staged(tokens, **own), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_why_inputs_are_laid_out(tmp_path: Path) -> None:
    """The control: AOTInductor's own call takes any strides for those of the export, and computes something else."""
    needs_compiler()
    _, staged = staged_case("llama_pr1797", pairs=True)
    package = bl.load_compiled(bl.compile_package(staged.exported(1), tmp_path / "stage.pt2"))
    hidden = torch.randn(2, 9, 32)
    rows = torch.randn(18, 4, 2)  # what lies behind the nine rows is read for the second sample
    shared = {"lifted_freqs_cis": rows[:9].expand(2, 9, 4, 2)}
    wanted = staged.stages[1].module(hidden, **shared)
    torch.testing.assert_close(package(hidden, **shared), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(package.package(hidden, **shared), wanted, rtol=1e-5, atol=1e-5)


class Recorded:
    """In place of a compiled package: what it is called with."""

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return args, kwargs


def test_inputs_of_a_compiled_stage() -> None:
    """Strides are those of the export; what the code would misread is refused by name."""
    _, staged = staged_case("llama_pr1797", pairs=True)
    inputs, examples, _ = _inputs(staged.exported(1))
    (hidden,) = examples
    assert [(item.name, item.keyword, item.dtype) for item in inputs] == [
        (staged.stages[1].activations[0], False, "float32"),
        ("lifted_freqs_cis", True, "float32"),
    ]
    stage = CompiledStage(Recorded(), tuple(inputs), {inputs[0].shape[1]: (2, 53)})  # type: ignore[dict-item]
    feed = staged.feed(4, 10, order=torch.randperm(10))
    (rows,) = feed.values()
    assert rows.stride(0) == 0
    activation = torch.randn(10, 4, hidden.shape[2]).transpose(0, 1)
    args, kwargs = stage(activation, **feed, unread=3)
    assert args[0].is_contiguous() and torch.equal(args[0], activation)
    assert list(kwargs) == ["lifted_freqs_cis"] and kwargs["lifted_freqs_cis"].is_contiguous()
    assert torch.equal(kwargs["lifted_freqs_cis"], rows)
    for given, why in (
        ((activation.double(), feed), "float64, the stage was compiled for torch.float32"),
        ((activation[:3], feed), "'lifted_freqs_cis' has shape"),
        ((activation[..., :-1], feed), f"'{inputs[0].name}' has shape"),
        ((activation[:, :1], {"lifted_freqs_cis": rows[:, :1]}), "limits"),
        ((activation, {}), "keywords missing: .'lifted_freqs_cis'."),
    ):
        with pytest.raises(bl.FeedError, match=why):
            stage(given[0], **given[1])
    with pytest.raises(bl.FeedError, match="by position and got 0"):
        stage(**feed)


# pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [COMPLEX[0], pytest.param(COMPLEX[1], marks=pytest.mark.slow)])
def test_pairs_of_a_rotary_model(name: str) -> None:
    """No stage has a complex number, the oracles hold, and outputs are the complex program's."""
    original = exported(name)
    program = bl.real_pairs(original)
    before = str(original.graph)
    staged = bl.partition(bl.lift(program), num_stages=2)
    assert [complex_nodes(stage.module.graph) for stage in staged.stages] == [[], []]
    assert [(item.dtype, item.row_shape[-1]) for item in staged.lifted.inputs if item.form == "values"] == [
        ("float32", 2)
    ]
    assert bl.verify(program, staged, checks=("identity", "values")).passed
    args, kwargs = original.example_inputs
    torch.testing.assert_close(program.module()(*args, **kwargs), original.module()(*args, **kwargs))
    assert str(original.graph) == before and bl.real_pairs(program) is not original


def test_a_table_that_stays_is_read_as_pairs() -> None:
    program = bl.real_pairs(exported("llama_pr1797"))
    staged = bl.partition(bl.lift(program, form="positions"), num_stages=2)
    assert [complex_nodes(stage.module.graph) for stage in staged.stages] == [["freqs_cis"]] * 2


class Ops(nn.Module):
    """Every rule, on data and on a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16, 3, dtype=torch.complex64), persistent=False)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        c = torch.view_as_complex(x.reshape(*x.shape[:-1], 3, 2))
        rows = self.table[: x.shape[1]]
        turned = c * rows.unsqueeze(0) * z
        joined = torch.cat([turned, c.conj()], -1).transpose(0, 1)
        stacked = torch.stack([turned, -turned, turned / 2.0], 1).permute(0, 2, 1, 3).flatten(-2)
        made = torch.polar(x[..., :3].abs(), x[..., 3:]) + torch.complex(x[..., :3], x[..., 3:]) * x[..., :1]
        moved = made.expand(2, *made.shape).select(0, 1)[:, :, 1:].repeat(1, 1, 2) - turned[..., :1]
        looked_up = rows.index_select(-1, torch.tensor([2, 0])) + self.table[torch.arange(x.shape[1])][:, :2]
        wide = turned.to(torch.complex128).reshape(x.shape[0], -1)
        real = (turned.real + turned.imag, torch.view_as_real(joined), torch.view_as_real(looked_up))
        return *real, stacked, moved, wide, c.squeeze(0).clone(), z


def test_rules() -> None:
    """Each op gives what it gives on complex numbers, values and gradients, dynamic sizes included."""
    torch.manual_seed(0)
    model, x = Ops(), torch.randn(2, 5, 6)
    z = torch.randn(2, 5, 3, dtype=torch.complex64)
    shapes = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(model, (x, z), dynamic_shapes=(shapes, shapes))
    pairs = bl.real_pairs(program)
    computed = [str(n.target) for n in pairs.graph.nodes if n.op == "call_function" and n.meta["val"] is not None]
    assert "aten.polar.default" not in computed and "aten._conj.default" not in computed
    assert set(complex_nodes(pairs.graph)) <= {"b_table", "z", "aten.view_as_complex.default"}
    for batch, length in ((2, 5), (3, 7)):
        x = torch.randn(batch, length, 6, requires_grad=True)
        z = torch.randn(batch, length, 3, dtype=torch.complex64)
        results = [p.module()(x, z) for p in (program, pairs)]
        torch.testing.assert_close(results[0], results[1])
        grads = [torch.autograd.grad(sum(r.abs().double().sum() for r in out), x)[0] for out in results]
        torch.testing.assert_close(grads[0], grads[1])


class Refused(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        c = torch.view_as_complex(x)
        if self.what == "exp":
            return torch.view_as_real(c.exp())
        if self.what == "number":
            return torch.view_as_real(c * 2j)
        return torch.view_as_real(1.0 / c if self.what == "divisor" else c + x[..., 0])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("exp", "no rule"),
        ("number", "complex number"),
        ("divisor", "no rule|complex"),
        ("mixed", "one operand is real"),
    ],
)
def test_refusals_name_the_node_and_the_line(what: str, why: str) -> None:
    program = torch.export.export(Refused(what), (torch.randn(4, 2),))
    before = str(program.graph)
    with pytest.raises(
        bl.LiftingError, match=rf"node '.*' \(aten.*\).*({why}).*test_compiled_stages.py:\d+.* -> write it"
    ):
        bl.real_pairs(program)
    assert str(program.graph) == before


def test_nothing_complex() -> None:
    program = exported("nanogpt")
    assert bl.real_pairs(program) is program


# the code of a stage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ("llama_pr1797", "nanogpt", "hf_llama") if name in CASES])
def test_code_of_a_stage_computes_its_graph(name: str) -> None:
    """The module runs torch's bindings, its graph aten ops: outputs and gradients are the same bits."""
    _, staged = staged_case(name)
    inputs, feed = sizes(staged, 2, 9)
    for stage in staged.stages:
        assert "aten.linear.default" in [str(node.target) for node in stage.module.graph.nodes]
        assert ".linear(" in stage.module.code and "aten.linear" not in stage.module.code

    def plain(module: Any) -> Any:
        return torch.fx.GraphModule(module, module.graph)

    for got, want in zip(
        run_stages(staged, lambda m: m, inputs, feed), run_stages(staged, plain, inputs, feed), strict=True
    ):
        assert all(map(torch.equal, got[0], want[0])) and all(map(torch.equal, got[1], want[1]))


def test_calls_that_are_spelled_otherwise_stay() -> None:
    """More arguments than a binding takes, or keywords."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    to = graph.call_function(aten.to.dtype, (x, torch.float64, False, True))
    added = graph.call_function(aten.add.Tensor, (to, to), {"alpha": 2})
    graph.output(graph.call_function(aten.mul.Tensor, (added, 3)))
    copied = spelled(graph)
    assert [str(node.target) for node in copied.nodes][1:3] == ["aten.to.dtype", "aten.add.Tensor"]
    value = torch.randn(3)
    results = [torch.fx.GraphModule(nn.Module(), own)(value) for own in (graph, copied)]
    assert torch.equal(results[0], results[1]) and results[0].dtype == torch.float64


class Shares(nn.Module):
    """Position values that layers compute alike, and tensors that must not be shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(32, 4), persistent=False)
        self.embedding = nn.Embedding(8, 4)

    def layer(self, x: Tensor, linear: nn.Linear) -> Tensor:
        sums = torch.zeros(x.shape[0], x.shape[1], 4)
        sums.add_(linear(x))
        return sums + self.table[: x.shape[1]].cos()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.layer(self.embedding(tokens), self.first), self.second)


def test_position_values_are_computed_once() -> None:
    """In a stage of several layers; a tensor that is written to is never shared."""
    program, _ = staged_case("llama_pr1797")
    staged = bl.partition(bl.lift(program), num_stages=1)
    module = staged.stages[0].module
    sizes_read = [node.args for node in module.graph.nodes if str(node.target) == "aten.sym_size.int"]
    assert len(sizes_read) == len(set(sizes_read)) > 0
    (rows,) = (node for node in module.graph.nodes if node.name.startswith("expand") and len(node.args[1]) == 3)
    assert len(rows.users) == 1, "one view of the rows, for all layers"
    tokens = torch.randint(0, 8, (2, 6))
    dims = {0: Dim.AUTO, 1: Dim.AUTO}
    model = Shares()
    staged = bl.partition(bl.lift(torch.export.export(model, (tokens,), dynamic_shapes=(dims,))), num_stages=1)
    assert torch.equal(staged(tokens, **staged.feed(2, 6)), model(tokens))
