"""Programs without values: on the meta device or with fake tensors, from scan to saved stages."""

from __future__ import annotations

import copy
import cProfile
import functools
import gc
import pstats
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import buffer_lifting as bl
from buffer_lifting.analysis import forget
from buffer_lifting.axes import label_inputs
from buffer_lifting.dataflow import Dep, activations_of, analyse
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.passes.context_parallel import lifted_axes
from buffer_lifting.scanner import scan_record
from buffer_lifting.tables import has_values

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import models, scale, scale_models

LARGE = 4096  # elements: more than any index or table row that a test feeds, far fewer than a weight


class NoWeights(TorchDispatchMode):
    """Fails when an op makes a tensor with a memory of its own that could be a weight."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta":
                assert value.untyped_storage().nbytes() <= 8 * LARGE, f"{func} made {tuple(value.shape)}"
        return result


def test_the_guard_sees_a_weight() -> None:
    with pytest.raises(AssertionError, match="made"), NoWeights():
        torch.zeros(LARGE, 4)


@functools.cache
def exported(make: Callable[[], torch.nn.Module], kind: str, name: str = "input_ids") -> ExportedProgram:
    """A program exported with dynamic batch and sequence, on the CPU, on the meta device or with fake tensors."""
    contexts = {"cpu": lambda: torch.device("cpu"), "meta": lambda: torch.device("meta"), "fake": FakeTensorMode}
    with torch.random.fork_rng(devices=[]), contexts[kind]():
        torch.manual_seed(0)
        model, tokens = make(), torch.zeros(2, 16, dtype=torch.long)
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO}}
    return torch.export.export(model, (), {name: tokens}, dynamic_shapes=shapes)


def tiny() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def model_of(program: ExportedProgram) -> transformers.LlamaForCausalLM:
    """The model with the weights of a program."""
    model = tiny()
    model.load_state_dict(dict(program.state_dict))
    return model


SHAPES = {
    "llama": lambda: scale_models.llama_405b(layers=2),
    "deepseek": lambda: scale_models.deepseek_v3(layers=2, dense=1, experts=16),
    "pr1797": lambda: models.Llama(2),
}


@pytest.mark.parametrize(
    ("shape", "kind"), [("llama", "meta"), ("llama", "fake"), ("deepseek", "meta"), ("pr1797", "meta")]
)
def test_no_weight_is_allocated_from_scan_to_saved_stages(shape: str, kind: str, tmp_path: Path) -> None:
    program = exported(SHAPES[shape], kind, "tokens" if shape == "pr1797" else "input_ids")
    with NoWeights():
        assert bl.scan(program).refused == ()
        lifted = bl.lift(program)
        lifted.save(tmp_path / "lifted")
        loaded = bl.load(tmp_path / "lifted")
        assert not has_values(next(iter(loaded.program.state_dict.values())))
        for size in (1, 2):
            parallel = bl.context_parallel(lifted, size=size)
            staged = bl.partition(parallel, num_stages=2)
            assert [d for d in bl.check(staged) if d.severity == "error"] == []
            staged.save(tmp_path / f"stages{size}")
            stage = bl.load_stage(tmp_path / f"stages{size}", 1)
            assert stage.stage.parameters == staged.stages[1].parameters
    assert all(not has_values(p) for stage in staged.stages for p in stage.module.parameters())
    assert not list((tmp_path / "stages1").glob("*.bin")) or all(
        file.stat().st_size < 8 * LARGE for file in (tmp_path / "stages1").glob("*.bin")
    )


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("form", ["values", "positions"])
def test_bound_tables_and_loaded_weights_give_the_model(kind: str, form: str, tmp_path: Path) -> None:
    program, empty = exported(tiny, "cpu"), exported(tiny, kind)
    model, weights = model_of(program), dict(program.state_dict)
    tokens = torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))
    order = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    expected = bl.partition(bl.context_parallel(bl.lift(program, form=form)), num_stages=2)
    staged = bl.partition(bl.context_parallel(bl.lift(empty, form=form)), num_stages=2)
    assert staged.tied == expected.tied != {}
    with pytest.raises(bl.PartitionError, match=r"stage 0 has no values for .*bind_tables"):
        staged.build_stage(0, "cpu")
    tables = {"model.rotary_emb": transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config)}
    staged.save(tmp_path / "stages")
    loaded = bl.load_stage(tmp_path / "stages", 1)
    for own in (*staged.stages, loaded.stage):
        own.module.load_state_dict({name: weights[name] for name in own.module.state_dict()}, assign=True)
    staged.bind_tables(tables)
    loaded.bind_tables(model)
    feed = expected.feed(3, 11, order=order)
    for other in (staged.feed(3, 11, order=order), loaded.feed(3, 11, order=order)):
        assert feed.keys() == other.keys()
        assert all(torch.equal(feed[name], other[name]) for name in feed)
    inputs = staged.shard_inputs(order=order, input_ids=tokens)
    wanted = expected(**inputs, **feed).logits
    assert torch.equal(staged(**inputs, **feed).logits, wanted)
    hidden = staged.stages[0].module(**inputs, **feed)
    assert torch.equal(loaded.stage.module(hidden, **inputs, **feed), wanted)


def test_values_inside_routing_keep_their_names() -> None:
    lifted = bl.lift(exported(SHAPES["deepseek"], "meta"))
    for program in (lifted, bl.context_parallel(lifted)):
        record = build_record(program.program)
        assert program._routed and program._routed == scan_record(record, lifted_axes(program)).routed


@pytest.mark.parametrize("name", ("llama", "deepseek"))
def test_the_record_of_a_lifted_program_is_that_of_its_graph(name: str) -> None:
    lifted = bl.lift(exported(SHAPES[name], "meta"))
    program, known = lifted.program, lifted._recorded
    assert known is not None
    shared, fresh = build_record(program, recorded=known), build_record(program)
    assert shared == fresh and len(shared.shared) > len(fresh.nodes) // 2
    labels = label_inputs(fresh, lifted_axes(lifted)).labels
    positional = frozenset(item.name for item in lifted.inputs)
    wanted = {n for n, dep in analyse(fresh, labels, positional).items() if dep & (Dep.DATA | Dep.RANDOM)}
    assert activations_of(fresh, labels, positional) == wanted
    shared.rename_symbols({size: f"{size}_new" for size in shared.hints})  # the scan's record keeps its own
    assert build_record(program, recorded=known) == fresh != shared


@pytest.mark.parametrize("edit", ("args", "kwargs", "target", "val", "nn_module_stack", "stack_trace", "name", "sizes"))
def test_the_record_of_a_node_that_was_edited_is_made_anew(edit: str) -> None:
    lifted = bl.lift(exported(tiny, "meta"))
    program, known = lifted.program, lifted._recorded
    shared = build_record(program, recorded=known).shared
    node = next(n for n in program.graph.nodes if n.name in shared and n.target is torch.ops.aten.mul.Tensor)
    if edit == "args":
        node.args = (node.args[1], node.args[0])
    elif edit == "kwargs":
        node.kwargs = {"other": node.args[1]}
        node.args = node.args[:1]
    elif edit == "target":
        node.target = torch.ops.aten.div.Tensor
    elif edit == "val":
        node.meta["val"] = node.meta["val"].unsqueeze(0)
    elif edit == "name":
        node.name = "another"
    elif edit == "sizes":
        value = next(n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name == "input_ids")
        symbols = [size.node.expr for size in value.shape]
        value.shape[0].node.shape_env.replacements[symbols[0]] = symbols[1]
    else:
        node.meta[edit] = {} if edit == "nn_module_stack" else ""
    again = build_record(program, recorded=known)
    assert node.name not in again.shared and again == build_record(program)
    assert bool(again.shared) == (edit not in ("name", "sizes"))


def test_to_empty_comes_before_bind_tables() -> None:
    model = model_of(exported(tiny, "cpu"))
    staged = bl.partition(bl.lift(exported(tiny, "meta"), form="positions"), num_stages=2)
    weights = model.state_dict()
    for stage in staged.stages:
        stage.module.to_empty(device="cpu")
        stage.module.load_state_dict({name: weights[name] for name in stage.module.state_dict()})
    staged.bind_tables(model)
    tokens = torch.arange(24).view(2, 12) % 32
    assert torch.equal(staged(input_ids=tokens, **staged.feed(2, 12)).logits, model(input_ids=tokens).logits)


def test_feed_without_values_names_the_tables() -> None:
    lifted = bl.lift(exported(tiny, "meta"))
    with pytest.raises(bl.FeedError, match=r"'model.rotary_emb.inv_freq' have no values.*bind_tables"):
        lifted.feed(2, 16)
    with pytest.raises(bl.FeedError, match=r"no values are given for 'model.rotary_emb.inv_freq'"):
        lifted.bind_tables({})
    with torch.device("meta"):
        still = tiny()
    with pytest.raises(bl.FeedError, match="no values are given"):
        lifted.bind_tables(still)
    with pytest.raises(bl.FeedError, match=r"is torch.float32 \(3,\), the program has torch.float32 \(2,\)"):
        lifted.bind_tables({"model.rotary_emb.inv_freq": torch.ones(3)})
    lifted.bind_tables({"model.rotary_emb.inv_freq": torch.ones(2)})
    assert set(lifted.feed(2, 16)) == {item.name for item in lifted.inputs}


def test_verify_says_that_there_is_nothing_to_compute_with() -> None:
    program = exported(tiny, "meta")
    with pytest.raises(bl.LiftingError, match="no data"):
        bl.verify(program, bl.lift(program))
    with pytest.raises(bl.LiftingError, match=r"no values for .* small configuration"):
        bl.verify(program, bl.lift(program), inputs=[((), {"input_ids": torch.zeros(2, 16, dtype=torch.long)})])


def test_an_edited_program_is_analysed_again() -> None:
    program = torch.export.export(
        models.build(2), (models.tokens(),), dynamic_shapes={"tokens": {0: Dim.AUTO, 1: Dim.AUTO}}
    )
    before = bl.scan(program)
    assert bl.scan(program) is before
    assert bl.scan(program, axes={"tokens": {0: "batch", 1: "time"}}) is not before
    before = bl.scan(program)
    causal = next(n for n in program.graph.nodes if "scaled_dot_product" in str(n.target))
    causal.update_arg(5, False)
    after = bl.scan(program)
    assert len(after.reads) == len(before.reads) - 1
    first, second = bl.lift(program), bl.lift(program)
    assert str(first.program.graph) == str(second.program.graph)
    assert first.inputs == second.inputs


def test_equal_tables_are_found_again_when_one_changes() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.arange(64.0).view(16, 4))
            self.register_buffer("two", torch.arange(64.0).view(16, 4))
            self.proj = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.proj(x) + self.one[: x.shape[1]]
            return self.proj(y) + self.two[: x.shape[1]]

    shapes = {"x": {0: Dim("b"), 1: Dim("s", max=16)}}
    program = torch.export.export(Twice(), (torch.randn(2, 8, 4),), dynamic_shapes=shapes)
    bl.scan(program)
    assert len(bl.lift(program).inputs) == 1
    bl.scan(program)
    program.state_dict["two"].data.add_(1)
    assert len(bl.lift(program).inputs) == 2


def test_code_is_written_at_the_first_call_and_hooks_run_once() -> None:
    program = torch.export.export(
        models.build(2), (models.tokens(),), dynamic_shapes={"tokens": {0: Dim.AUTO, 1: Dim.AUTO}}
    )
    staged = bl.partition(bl.lift(program), num_stages=2)
    module, calls = staged.stages[0].module, []
    assert "_code" not in vars(module)
    module.register_forward_pre_hook(lambda *args: calls.append(args))
    feed = staged.feed(2, 16)
    first = module(models.tokens(), **feed)
    assert len(calls) == 1 and "_code" in vars(module)
    assert torch.equal(first, module(models.tokens(), **feed))
    assert len(calls) == 2
    assert "sdpa" in bl.lift(program).program.graph_module.code or "scaled_dot" in module.code


def test_a_stage_is_compiled_before_its_code_is_written() -> None:
    program = torch.export.export(
        models.build(2), (models.tokens(),), dynamic_shapes={"tokens": {0: Dim.AUTO, 1: Dim.AUTO}}
    )
    stage = bl.partition(bl.lift(program), num_stages=2).stages[0].module
    other = copy.deepcopy(stage)
    feed = bl.lift(program).feed(2, 16)
    compiled = torch.compile(stage, backend="eager", fullgraph=True)
    assert torch.equal(compiled(models.tokens(), **feed), other(models.tokens(), **feed))


def test_the_collector_is_on_again_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(TypeError):
        bl.scan(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(TypeError):
            bl.lift(3)  # type: ignore[arg-type]
        assert not gc.isenabled()
    finally:
        gc.enable()


def entry(model: str, nodes: int, ours: float) -> dict[str, Any]:
    steps = dict.fromkeys(scale.STEPS, ours / 3)
    sizes = {"layers": nodes // 10, "stages": 16, "parameters": 10**9, "nodes": nodes, "megabytes": 12.0}
    return {"model": model, **sizes, "export": 10.0, **steps, "ours": ours}


def test_report_of_the_benchmark(tmp_path: Path) -> None:
    beside = {"layers": 4, "stages": 4, "export": 2.0, "ours": 0.1, "pipeline_outside_export": 1.6, "failure": None}
    linear = [entry("m", nodes, nodes / 1e4) for nodes in (100, 1000)]
    good = scale.record([entry("m", 100, 0.4)], linear, beside, "python benchmarks/scale.py")
    assert scale.missed(good) == []
    assert good["exponents"]["scan"] == pytest.approx(1)
    assert "`pipeline()` adds 0.80 of export, ours 0.05" in scale.text(good)
    square = [entry("m", nodes, nodes**2 / 1e6) for nodes in (100, 1000)]
    bad = scale.record([entry("m", 100, 0.6) | {"megabytes": 2000.0}], square, None, "")
    assert len(scale.missed(bad)) == 2 + len(scale.STEPS)
    page = tmp_path / "SCALE.md"
    page.write_text("a\n<!-- benchmark-scale:begin -->\n<!-- benchmark-scale:end -->\nb\n")
    scale.write_block(page, scale.TOPIC, scale.block(good))
    assert "| m | 10 | 1 B | 100 | **0.040** |" in page.read_text()


def test_a_small_measurement_has_every_step() -> None:
    with torch.device("meta"):
        model = scale_models.Deep(4)
    found = scale.measure(model, 4, 2, repeats=1)
    assert found["nodes"] > 40 and all(found[name] > 0 for name in (*scale.STEPS, "export"))
    assert found["ours"] == pytest.approx(sum(found[name] for name in scale.OURS))


def calls_of(function: Callable[[], Any]) -> dict[Any, int]:
    """How often each Python function was called."""
    profile = cProfile.Profile()
    profile.enable()
    function()
    profile.disable()
    return {key: value[1] for key, value in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]


def test_four_times_the_layers_take_four_times_the_calls() -> None:
    counts = {}
    for layers in (10, 40):
        with torch.device("meta"):
            model = scale_models.Deep(layers)
        program = scale_models.export(model)
        lifted = bl.lift(program)
        points = [f"layers.{layers * stage // 4}" for stage in range(1, 4)]
        bl.partition(bl.context_parallel(lifted), split_points=points)
        forget()
        steps = {
            "scan": lambda program=program: bl.scan(program),
            "lift": lambda program=program: bl.lift(program),
            "context_parallel": lambda lifted=lifted: bl.context_parallel(lifted),
            "partition": lambda lifted=lifted, points=points: bl.partition(lifted, split_points=points),
        }
        counts[layers] = {name: calls_of(step) for name, step in steps.items()}
    for name, few in counts[10].items():
        many = counts[40][name]
        assert sum(many.values()) <= 4.1 * sum(few.values()), name
        grown = {key: (few.get(key, 0), n) for key, n in many.items() if n > 5 * few.get(key, 0) + 100}
        assert not grown, f"{name}: {grown}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(scale.MODELS))
def test_full_size_costs_at_most_a_twentieth_of_export(name: str) -> None:
    found = scale.alone(scale.measure_model, name, scale.MODELS[name][0], scale.STAGES, 3)
    assert found["ours"] / found["export"] <= scale.MAX_SHARE
    assert found["megabytes"] <= scale.MAX_MEGABYTES


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_growth_to_a_thousand_layers() -> None:
    found = [scale.alone(scale.measure_growth, layers, scale.STAGES, 3) for layers in scale.GROWTH_LAYERS]
    exponents = {name: scale.exponent(found, name) for name in scale.STEPS}
    assert all(value is not None and value <= scale.MAX_GROWTH for value in exponents.values()), exponents
