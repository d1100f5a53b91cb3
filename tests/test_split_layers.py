"""Layers of stages as modules: the same ops, values and names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from zoo.catalog import BATCH, entries, export_cell

import buffer_lifting as bl
from buffer_lifting.layer_graphs import graphs_of
from buffer_lifting.passes.collectives import collectives
from buffer_lifting.runtime import bind_ranks
from buffer_lifting.torch_compat import rewrite_code

#: Entry of the catalog -> the layers of each of its two stages.
LAYERS = {
    "hf_llama": [["model.layers.0"], ["model.layers.1"]],
    "hf_t5": [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]],
}
MORE_LAYERS = {
    "hf_mixtral": [["model.layers.0"], ["model.layers.1"]],
    "hf_deepseek_v3": [["model.layers.0"], ["model.layers.1"]],
    "hf_gemma3": [["model.layers.0"], ["model.layers.1"]],
    "hf_gpt2": [["transformer.h.0"], ["transformer.h.1"]],
    "hf_albert": [["albert.encoder.albert_layer_groups.0"], ["albert.encoder.albert_layer_groups.1"]],
    "hf_bart": [
        ["model.encoder.layers.0", "model.encoder.layers.1"],
        ["model.decoder.layers.0", "model.decoder.layers.1"],
    ],
    "titan_llama3": [["layers.0"], ["layers.1"]],
    "tune_llama3": [["layers.0"], ["layers.1"]],
    "x_rotary": [
        ["wrapper.attn_layers.layers.0"],
        ["wrapper.attn_layers.layers.1", "wrapper.attn_layers.layers.2", "wrapper.attn_layers.layers.3"],
    ],
}


@cache
def lifted(name: str) -> bl.LiftedProgram:
    """An entry of the catalog, lifted."""
    entry = entries()[name]
    return bl.lift(export_cell(entry, entry.exports[0], "dynamic"), axes=entry.exports[0].axes)


def names(module: nn.Module) -> list[list[str]]:
    """Everything that has a name in a checkpoint or for an optimizer, in order."""
    named: tuple[Callable[[], Any], ...] = (
        module.state_dict,
        lambda: [name for name, _ in module.named_parameters(remove_duplicate=False)],
        lambda: [name for name, _ in module.named_parameters()],
        lambda: [name for name, _ in module.named_buffers()],
    )
    return [list(each()) for each in named]


def results(staged: bl.StagedProgram, name: str) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients of one call of all stages."""
    export = entries()[name].exports[0]
    args, kwargs = export.inputs(BATCH, export.seq, torch.Generator().manual_seed(3))
    inputs = {**dict(zip(staged.positional, args, strict=False)), **kwargs}
    lengths: Any = export.seq
    if len(staged.lifted.axes.lengths) > 1:
        lengths = {"enc": inputs["input_ids"].shape[1], "dec": inputs["decoder_input_ids"].shape[1]}
    feed = staged.feed(BATCH, lengths, inputs=inputs)
    for stage in staged.stages:
        stage.module.zero_grad()
    found = [value for value in pytree.tree_leaves(staged(*args, **kwargs, **feed)) if isinstance(value, Tensor)]
    torch.stack([value.float().square().mean() for value in found if value.is_floating_point()]).sum().backward()
    parameters = [item for stage in staged.stages for item in stage.module.named_parameters()]
    return found, {fqn: None if p.grad is None else p.grad.clone() for fqn, p in parameters}


def check_split(name: str, expected: list[list[str]]) -> None:
    """Bitwise the same outputs and gradients, the same names in the same order, and parameters inside their layers."""
    staged = bl.partition(lifted(name), num_stages=2)
    values, gradients = results(staged, name)
    parameters = [dict(stage.module.named_parameters()) for stage in staged.stages]
    before = [names(stage.module) for stage in staged.stages]
    for stage, wanted in zip(staged.stages, expected, strict=True):
        layers = bl.split_layers(stage.module)
        assert list(layers) == wanted
        assert all(stage.module.get_submodule(fqn) is layer for fqn, layer in layers.items())
        for _, part in graphs_of(stage.module):
            part.graph.lint()
        for fqn, layer in layers.items():
            reads = {str(node.target) for node in layer.graph.nodes if node.op == "get_attr"}  # type: ignore[union-attr]
            assert {name for name, _ in layer.named_parameters(remove_duplicate=False)} <= reads, fqn
        own = {str(node.target) for node in stage.module.graph.nodes if node.op == "get_attr"}
        assert not any(target.startswith(f"{fqn}.") for fqn in layers for target in own if target in parameters)
    assert [names(stage.module) for stage in staged.stages] == before
    for stage, held in zip(staged.stages, parameters, strict=True):
        assert all(held[fqn] is parameter for fqn, parameter in stage.module.named_parameters())
    again, others = results(staged, name)
    assert all(map(torch.equal, values, again))
    assert others.keys() == gradients.keys()
    for fqn, gradient in gradients.items():
        other = others[fqn]
        assert (gradient is None and other is None) or torch.equal(gradient, other), fqn  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
def test_a_split_stage_is_the_stage(name: str) -> None:
    """Layers behind embeddings, beside an encoder's output, and with a bias that every stage repeats."""
    check_split(name, LAYERS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYERS)
def test_more_split_stages_are_the_stages(name: str) -> None:
    """Experts, windows, tied weights, tables of each layer, lists of lists."""
    check_split(name, MORE_LAYERS[name])


class Block(nn.Module):
    """Mixes features; ``shared`` is another block's weight."""

    def __init__(self, shared: nn.Parameter | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        if shared is not None:
            self.linear.weight = shared

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.dropout(self.linear(x).tanh()) * scale


class Positions(nn.Module):
    """An embedding with learned positions, blocks, and a head."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.positions = nn.Embedding(16, 8), nn.Embedding(32, 8)
        first = Block()
        self.blocks = nn.ModuleList([first, Block(first.linear.weight if kind == "shared" else None), Block()])
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        if self.kind == "twice":
            return self.head(self.blocks[0](self.blocks[1](self.blocks[0](x))))
        if self.kind == "unlike":
            return self.head(self.blocks[0](self.blocks[0](x), 2.0))
        if self.kind == "read outside":
            return self.head(self.blocks[1](self.blocks[0](x))) + self.blocks[0].linear.weight.sum()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stage_of(kind: str = "plain", train: bool = False, stages: int = 1) -> bl.StagedProgram:
    """The model, seeded, exported and lifted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Positions(kind).train(train)
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, (torch.zeros(2, 12, dtype=torch.long),), dynamic_shapes=(shape,))
    return bl.partition(bl.lift(program), num_stages=stages)


def run(staged: bl.StagedProgram) -> Tensor:
    """The output for some tokens, dropout seeded."""
    tokens = torch.arange(20).view(2, 10) % 16
    torch.manual_seed(1)
    output: Tensor = staged(tokens, **staged.feed(2, 10))
    return output


@pytest.mark.parametrize("kind", ["plain", "twice"])
def test_dropout_and_a_layer_that_is_called_twice(kind: str) -> None:
    """Random numbers are drawn in the order of the stage; two calls of a layer are calls of one module."""
    staged = stage_of(kind, train=True)
    expected = run(staged)
    expected.sum().backward()
    before = {fqn: p.grad.clone() for fqn, p in staged.stages[0].module.named_parameters() if p.grad is not None}
    staged.stages[0].module.zero_grad()
    layers = bl.split_layers(staged.stages[0].module)
    assert list(layers) == [f"blocks.{n}" for n in range(3 if kind == "plain" else 2)]
    calls = [str(node.target) for node in staged.stages[0].module.graph.nodes if node.op == "call_module"]
    assert len(calls) == 3 and len(set(calls)) == len(layers)
    assert torch.equal(run(staged), expected)
    run(staged).sum().backward()
    for fqn, parameter in staged.stages[0].module.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, before[fqn])


def test_splitting_again_changes_nothing() -> None:
    """The same layers, even wrapped."""
    module = stage_of().stages[0].module
    layers = bl.split_layers(module)
    code = module.code
    assert bl.split_layers(module) == layers and module.code == code
    module.get_submodule("blocks").register_module("1", checkpoint_wrapper(layers["blocks.1"]))
    assert bl.split_layers(module) == layers
    assert list(module.state_dict()) == names(stage_of().stages[0].module)[0]


@pytest.mark.parametrize(
    "layers, found",
    [
        (["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.1", ["blocks.1"]),
        (["blocks.*.linear", "head", "nothing.*"], ["blocks.0.linear", "blocks.1.linear", "blocks.2.linear", "head"]),
        ([], []),
    ],
)
def test_layers_can_be_named(layers: Any, found: list[str]) -> None:
    """A star is one component."""
    staged = stage_of()
    expected = run(staged)
    assert list(bl.split_layers(staged.stages[0].module, layers)) == found
    assert torch.equal(run(staged), expected)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "shared": ("shared", None, r"'blocks\.\d\.linear\.weight' of the layer 'blocks\.\d' is read outside of it as well"),
    "read outside": ("read outside", None, r"'blocks\.0\.linear\.weight' of the layer 'blocks\.0' is read outside"),
    "unlike": ("unlike", None, r"the layer 'blocks\.0' is called 2 times, and not alike"),
    "nested": ("plain", ["blocks.*", "blocks.*.linear"], r"'blocks\.0' and 'blocks\.0\.linear' lie inside one another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_alone_is_refused(case: str) -> None:
    """With the names, and the stage as it was."""
    kind, layers, message = REFUSED[case]
    staged = stage_of(kind)
    expected = run(staged)
    with pytest.raises(bl.PartitionError, match=message):
        bl.split_layers(staged.stages[0].module, layers)
    assert torch.equal(run(staged), expected)


def test_no_stage_is_a_type_error() -> None:
    """Neither the eager model nor a program."""
    with pytest.raises(TypeError, match="takes the module of a stage, not Positions"):
        bl.split_layers(Positions())


def test_a_stage_that_does_not_say_where_it_was_traced_is_refused() -> None:
    """As a package of an earlier version loads."""
    module = stage_of().stages[0].module
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(bl.PartitionError, match="save it again"):
        bl.split_layers(module)


def test_what_reads_the_whole_graph_says_that_it_comes_before(tmp_path: Path) -> None:
    """Saving, exporting, estimates; running and verifying still work."""
    staged = stage_of(stages=2)
    bl.split_layers(staged.stages[1].module)
    for call in (lambda: staged.save(tmp_path / "stages"), lambda: staged.exported(1), staged.summary, staged.memory):
        with pytest.raises(bl.PartitionError, match="stage 1 was split into layers"):
            call()
    assert not (tmp_path / "stages").exists()


def test_loaded_stages_have_layers_too(tmp_path: Path) -> None:
    """A package says in which modules its ops were traced."""
    staged = stage_of(stages=2)
    expected = run(staged)
    staged.save(tmp_path / "stages")
    loaded = [bl.load_stage(tmp_path / "stages", index) for index in range(2)]
    found = [fqn for stage in loaded for fqn in bl.split_layers(stage.stage.module)]
    assert found == ["blocks.0", "blocks.1", "blocks.2"]
    tokens, feed = torch.arange(20).view(2, 10) % 16, staged.feed(2, 10)
    assert torch.equal(loaded[1].stage.module(loaded[0].stage.module(tokens, **feed), **feed), expected)


class Mesh:
    """Has one dim, of two ranks."""

    mesh_dim_names = ("cp",)

    def __getitem__(self, name: str) -> Mesh:
        return self

    def size(self) -> int:
        return 2

    def get_group(self) -> Any:
        return type("Group", (), {"group_name": "the group"})


def test_collectives_inside_layers_get_their_group() -> None:
    """Before and behind the split."""
    program = bl.context_parallel(lifted("hf_llama"), size=2)

    def groups(graphs: Iterator[Graph]) -> list[Any]:
        found: list[Node] = [node for graph in graphs for node in collectives(graph)]
        return [node.args[-1] for node in found]

    for first in (True, False):
        module = bl.partition(program, num_stages=2).stages[0].module
        steps: list[Callable[[], Any]] = [
            partial(bl.split_layers, module),
            partial(bind_ranks, program, module, Mesh()),
        ]
        for step in steps if first else reversed(steps):
            step()
        assert not groups(iter([module.graph]))
        assert groups(part.graph for _, part in graphs_of(module)) == ["the group"] * 2


@pytest.mark.parametrize("loaded", [False, True])
def test_a_wrapped_module_whose_graph_changes_can_be_called(loaded: bool, tmp_path: Path) -> None:
    """FSDP gives a module another class; tables, devices and groups are put in behind that."""
    staged = stage_of()
    expected = run(staged)
    module = staged.stages[0].module
    if loaded:
        staged.save(tmp_path / "stages")
        module = bl.load_stage(tmp_path / "stages", 0).stage.module
    layers = bl.split_layers(module)
    for part in (*layers.values(), module):
        part.__class__ = type(f"Wrapped{type(part).__name__}", (type(part),), {})
    for _, graph in graphs_of(module):
        rewrite_code(graph)
    tokens = torch.arange(20).view(2, 10) % 16
    assert torch.equal(module(tokens, **staged.feed(2, 10)), expected)


def test_tables_inside_layers_get_their_values() -> None:
    """Of a program from the meta device that keeps its tables, behind the split."""
    entry = entries()["titan_llama3"]
    eager = export_cell(entry, entry.exports[0], "dynamic")
    staged = bl.partition(bl.lift(eager, form="positions"), num_stages=2)
    tables = {fqn: value.clone() for fqn, value in {**eager.state_dict, **eager.constants}.items()}
    module = staged.stages[1].module
    kept = {fqn: value.clone() for fqn, value in module.named_buffers()}
    bl.split_layers(module)
    for fqn in kept:
        path, _, leaf = fqn.rpartition(".")
        module.get_submodule(path)._buffers[leaf] = torch.empty_like(kept[fqn], device="meta")
    if kept:
        staged.bind_tables(tables)
        assert all(torch.equal(value, kept[fqn]) for fqn, value in module.named_buffers())
    assert kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lifted_input_that_lost_precision_is_refused(dtype: torch.dtype) -> None:
    """What FSDP does to the inputs of a module unless it is told not to."""
    program = bl.context_parallel(lifted("hf_llama"), size=1)
    staged = bl.partition(program, num_stages=1)
    from buffer_lifting.stage_inputs import check_inputs_of

    check_inputs_of(program, staged.stages[0])
    tokens, feed = torch.zeros(2, 8, dtype=torch.long), staged.feed(2, 8)
    staged(input_ids=tokens, **feed)
    low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in feed.items()}
    with pytest.raises(bl.FeedError, match=r"lifted_model_rotary_emb_inv_freq.*cast_forward_inputs=False"):
        staged(input_ids=tokens, **low)
