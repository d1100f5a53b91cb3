"""A lifted program is an ExportedProgram like any other: what torch does with one works, with equal results."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.testing import FileCheck
from zoo import CASES, export_case, make_inputs

import buffer_lifting as bl

NAMES = (
    "llama_pr1797",
    "llama_attribute",
    "hf_llama",
    "hf_gpt2",
    "tune_llama3",
    "nanogpt",
    "llama_full_table",
)
BATCH, SEQ = 2, 9
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@cache
def lifted_case(name: str) -> tuple[ExportedProgram, bl.LiftedProgram]:
    program = export_case(name)[1]
    return program, bl.lift(program)


def sizes(name: str) -> tuple[int, int]:
    """Other sizes than those of the export, where the case is dynamic."""
    return (BATCH, SEQ) if CASES[name].dynamic else (3, CASES[name].table_len)


def arguments(name: str) -> tuple[Arguments, Arguments]:
    """The original program's arguments, and the lifted program's."""
    batch, seq = sizes(name)
    args, kwargs = make_inputs(name, batch, seq, seed=3)
    feed = lifted_case(name)[1].feed(batch, seq)
    return (args, kwargs), (args, {**kwargs, **feed})


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def run(module: Callable[..., Any], call: Arguments, of: nn.Module | None = None) -> dict[str, Tensor]:
    """Outputs, and the gradients of the parameters of ``of``."""
    owner = of if of is not None else module
    assert isinstance(owner, nn.Module)
    owner.zero_grad(set_to_none=True)
    outputs = tensors_of(module(*call[0], **call[1]))
    outputs[0].float().sin().sum().backward()
    result = {str(i): out.detach() for i, out in enumerate(outputs)}
    for fqn, parameter in owner.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            result[f"grad {fqn}"] = parameter.grad.clone()
    assert len(result) > len(outputs)
    owner.zero_grad(set_to_none=True)
    return result


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor], close: bool = False) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if close:
            torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        else:
            assert torch.equal(value, right[key]), key


def expected(name: str) -> dict[str, Tensor]:
    return run(lifted_case(name)[0].module(), arguments(name)[0])


def lifted_result(name: str) -> dict[str, Tensor]:
    return run(lifted_case(name)[1].program.module(), arguments(name)[1])


# What torch does with a program --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_module_with_guards(name: str) -> None:
    original, lifted = lifted_case(name)
    lifted.program.validate()
    assert lifted.program.dialect == original.dialect
    assert_equal(expected(name), lifted_result(name))
    assert_equal(expected(name), run(lifted.program.module(check_guards=False), arguments(name)[1]))


@pytest.mark.parametrize("name", NAMES)
def test_guards_refuse_a_feed_of_another_size(name: str) -> None:
    lifted = lifted_case(name)[1]
    args, kwargs = arguments(name)[1]
    first = lifted.inputs[0].name
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        lifted.program.module()(*args, **{**kwargs, first: kwargs[first][:, :-1]})


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name: str) -> None:
    lifted = lifted_case(name)[1]
    stream = io.BytesIO()
    torch.export.save(lifted.program, stream)
    stream.seek(0)
    again = torch.export.load(stream)
    assert again.graph_signature.user_inputs == lifted.program.graph_signature.user_inputs
    if name == "hf_gpt2":  # torch.export.load unties weights, of the original program as well
        return
    assert_equal(expected(name), run(again.module(), arguments(name)[1]))


@pytest.mark.parametrize("table", (None, {}), ids=("default", "core"))
@pytest.mark.parametrize("name", NAMES)
def test_decompositions(name: str, table: dict[Any, Any] | None) -> None:
    original, lifted = lifted_case(name)
    before = str(lifted.program.graph)
    if (name, table) == ("hf_gpt2", None):  # torch cannot decompose the original program either
        with pytest.raises(ValueError, match="Cannot view"):
            original.run_decompositions()
        return
    again = lifted.program.run_decompositions(table)
    again.validate()
    assert str(lifted.program.graph) == before
    result = {key: value for key, value in lifted_result(name).items() if not key.startswith("grad")}
    with torch.no_grad():
        outputs = tensors_of(again.module()(*arguments(name)[1][0], **arguments(name)[1][1]))
    assert_equal(result, {str(i): out for i, out in enumerate(outputs)}, close=True)


@pytest.mark.parametrize("name", NAMES)
def test_unflatten(name: str) -> None:
    lifted = lifted_case(name)[1]
    module = torch.export.unflatten(lifted.program)
    assert_equal(lifted_result(name), run(module, arguments(name)[1]))
    assert {fqn for fqn, _ in module.named_parameters(remove_duplicate=False)} <= set(lifted.program.state_dict)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = tensors_of(module(*arguments(name)[1][0], **arguments(name)[1][1]))[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("name", NAMES)
def test_export_again(name: str) -> None:
    lifted = lifted_case(name)[1]
    example = lifted.program.example_inputs
    assert example is not None
    args, kwargs = example
    shapes = None
    if CASES[name].dynamic:
        names = list(lifted.program.graph_signature.user_inputs)
        dims = {str(key): {0: Dim.AUTO, 1: Dim.AUTO} for key in names}
        by_position = tuple(dims[str(key)] for key in names[: len(args)])
        shapes = {**{key: dims[key] for key in kwargs}}
        shapes = {"args": by_position, **shapes} if args else shapes
        module = lifted.program.module()
        again = torch.export.export(module, args, kwargs, dynamic_shapes=_by_name(module, by_position, shapes))
        assert again.range_constraints
    else:
        again = torch.export.export(lifted.program.module(), args, kwargs)
    assert_equal(expected(name), run(again.module(), arguments(name)[1]))


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import inspect

    kwargs = {key: value for key, value in kwargs.items() if key != "args"}
    names = [key for key in inspect.signature(module.forward).parameters if key not in kwargs]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@pytest.mark.parametrize("name", NAMES)
def test_compile(name: str) -> None:
    module = lifted_case(name)[1].program.module()
    compiled = torch.compile(module, backend="aot_eager")
    assert_equal(lifted_result(name), run(compiled, arguments(name)[1], of=module), close=True)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    module = lifted_case("llama_pr1797")[1].program.module()
    compiled = torch.compile(module, backend="inductor")
    assert_equal(lifted_result("llama_pr1797"), run(compiled, arguments("llama_pr1797")[1], of=module), close=True)


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name: str) -> None:
    """Steps of SGD give bitwise the parameters that the original program gets."""
    states = []
    for which in (0, 1):
        program = export_case(name)[1]
        module = (bl.lift(program).program if which else program).module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        args, kwargs = arguments(name)[which]
        for _ in range(2):
            optimizer.zero_grad()
            tensors_of(module(*args, **kwargs))[0].float().sin().sum().backward()
            optimizer.step()
        named = module.named_parameters(remove_duplicate=False)
        states.append({fqn: parameter.detach() for fqn, parameter in named})
    assert_equal(*states)


# The original --------------------------------------------------------------------------------------------


def snapshot(program: ExportedProgram) -> dict[str, Any]:
    metas = [(node.name, sorted(map(str, node.meta)), str(node.meta.get("val"))) for node in program.graph.nodes]
    return {
        "graph": str(program.graph),
        "code": program.graph_module.code,
        "meta": metas,
        "signature": copy.deepcopy(program.graph_signature),
        "state": {fqn: (id(value), value.detach().clone()) for fqn, value in program.state_dict.items()},
        "constants": {fqn: id(value) for fqn, value in program.constants.items()},
        "ranges": dict(program.range_constraints),
        "specs": str(program.call_spec),
        "calls": str(program.module_call_graph),
        "examples": str(program.example_inputs),
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    state, now = before.pop("state"), after.pop("state")
    assert before == after
    assert list(state) == list(now)
    assert all(state[f][0] == now[f][0] and torch.equal(state[f][1], now[f][1]) for f in state)


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_unchanged(name: str) -> None:
    program = export_case(name)[1]
    before, result = snapshot(program), run(program.module(), arguments(name)[0])
    bl.scan(program)
    lifted = bl.lift(program)
    bl.partition(lifted, num_stages=2)
    bl.lift(program, form="positions", strict=False)
    lifted.program.graph.erase_node(next(reversed(lifted.program.graph.nodes)))
    assert_unchanged(before, snapshot(program))
    assert_equal(result, run(program.module(), arguments(name)[0]))


class Rolled(nn.Module):
    """Mixes the sequence in a way that cannot be lifted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.register_buffer("table", torch.randn(32, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.table[: tokens.shape[1]]
        return h + h.roll(1, 1)


def test_a_refused_lift_changes_nothing() -> None:
    tokens = torch.randint(0, 16, (2, 6))
    program = torch.export.export(Rolled(), (tokens,), dynamic_shapes={"tokens": {0: Dim.AUTO, 1: Dim.AUTO}})
    before, result = snapshot(program), run(program.module(), ((tokens,), {}))
    with pytest.raises(bl.LiftingError):
        bl.lift(program)
    with pytest.raises(ValueError, match="form"):
        bl.lift(program, form="nonsense")  # type: ignore[arg-type]
    assert_unchanged(before, snapshot(program))
    assert_equal(result, run(program.module(), ((tokens,), {})))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_shared_and_keeps_its_names(name: str) -> None:
    original, lifted = lifted_case(name)
    old, new = original.graph_signature, lifted.program.graph_signature
    assert [f for f, _ in lifted.program.named_parameters()] == [f for f, _ in original.named_parameters()]
    assert all(lifted.program.state_dict[fqn] is value for fqn, value in original.state_dict.items())
    assert list(lifted.program.state_dict) == list(original.state_dict)
    assert all(lifted.program.constants[fqn] is value for fqn, value in original.constants.items())
    for field in ("parameters", "buffers", "non_persistent_buffers", "lifted_tensor_constants"):
        assert getattr(new, field) == getattr(old, field), field
    assert new.user_outputs == old.user_outputs or len(new.user_outputs) == len(old.user_outputs)
    module, before = lifted.program.module(), original.module()
    assert list(module.state_dict()) == list(before.state_dict())
    assert [f for f, _ in module.named_buffers()] == [f for f, _ in before.named_buffers()]


# The shape contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_lifted_input_meets_one_expand(name: str) -> None:
    original, lifted = lifted_case(name)
    nodes = {node.name: node for node in lifted.program.graph.nodes}
    user = list(original.graph_signature.user_inputs)
    assert list(lifted.program.graph_signature.user_inputs) == [*user, *(i.name for i in lifted.inputs)]
    for item in lifted.inputs:
        placeholder = nodes[item.name]
        users = [n for n in placeholder.users if n.target is not torch.ops.aten.sym_size.int]
        assert [str(n.target) for n in users] == ["aten.expand.default"], item.name
        value = placeholder.meta["val"]
        assert tuple(value.shape[2:]) == item.row_shape
        assert str(value.dtype) == f"torch.{item.dtype}"
        assert users[0].meta["val"].shape == value.shape
        tokens = nodes[user[0]].meta["val"]
        assert value.shape[0] == tokens.shape[0] and value.shape[1] == tokens.shape[1]


@pytest.mark.parametrize("name", ("llama_pr1797", "llama_attribute", "hf_llama", "hf_gpt2", "nanogpt"))
def test_one_input_for_any_number_of_layers(name: str) -> None:
    many = bl.lift(export_case(name, layers=5)[1])
    assert [i.name for i in many.inputs] == [i.name for i in lifted_case(name)[1].inputs]


def test_names() -> None:
    assert [i.name for i in lifted_case("llama_pr1797")[1].inputs] == ["lifted_freqs_cis"]
    assert [i.name for i in lifted_case("llama_attribute")[1].inputs] == ["lifted_freqs_cis"]
    for name in NAMES:
        names = [i.name for i in lifted_case(name)[1].inputs]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"lifted_[0-9a-zA-Z_]+", item) for item in names)


def test_graph_text() -> None:
    lifted = lifted_case("llama_pr1797")[1]
    (
        FileCheck()
        .check("%lifted_freqs_cis : ")
        .check_same("placeholder")
        .check_count("torch.ops.aten.expand.default](args = (%lifted_freqs_cis", 1, exactly=True)
        .check_not("%lifted_freqs_cis,")
        .run(str(lifted.program.graph))
    )
    FileCheck().check_not("%b_freqs_cis,").run(str(lifted.program.graph))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_specialised(name: str) -> None:
    original, lifted = lifted_case(name)
    assert lifted.program.range_constraints == original.range_constraints
    shapes = {n.name: str(n.meta["val"].shape) for n in original.graph.nodes if _is_tensor(n)}
    after = {n.name: str(n.meta["val"].shape) for n in lifted.program.graph.nodes if _is_tensor(n)}
    common = shapes.keys() & after.keys()
    assert len(common) > len(shapes) // 2
    assert {key: shapes[key] for key in common} == {key: after[key] for key in common}


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].dynamic])
@pytest.mark.parametrize("batch, seq", ((1, 2), (5, 33), (2, 63)))
def test_other_sizes(name: str, batch: int, seq: int) -> None:
    original, lifted = lifted_case(name)
    low = max(v.lower for v in original.range_constraints.values())
    if low > min(batch, seq):
        batch = max(batch, int(low))
    args, kwargs = make_inputs(name, batch, seq, seed=4)
    feed = lifted.feed(batch, seq)
    assert_equal(run(original.module(), (args, kwargs)), run(lifted.program.module(), (args, {**kwargs, **feed})))
