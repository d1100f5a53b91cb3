"""Graphs of forward and backward: every read is lifted in both, and tables get their gradients in the right rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import joint_models as models
import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from zoo import reference

import buffer_lifting as bl

LENGTH = 11
SMALL: dict[str, Callable[[], nn.Module]] = {
    "slice of a parameter": models.Sliced,
    "slice with a start": lambda: models.Sliced(start=3),
    "a whole parameter": lambda: models.Sliced(LENGTH, whole=True),
    "indexed parameter": models.Indexed,
    "scaled rows": models.Scaled,
    "ALiBi": models.Attention,
    "learned bias": lambda: models.Attention(learned=True),
    "Llama": lambda: reference.RopeLlama(reference.RopeConfig(n_layers=1)),
    "nanoGPT": lambda: reference.NanoGPT(reference.GPTConfig(n_layer=1)),
}
#: Those whose gradients of a table are sums in another order than the original's; all else is bitwise.
ROUNDED = ("scaled rows", "learned bias")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[name]()


def tokens(batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


@functools.cache
def captured(name: str) -> tuple[nn.Module, GraphModule]:
    """A model and its joint graph, which no test may change."""
    model = make(name)
    return model, models.capture(model, tokens()).graph_module


def lifted_of(name: str) -> tuple[nn.Module, GraphModule, GraphModule, bl.LiftedGraph]:
    """The same, with the lifted graph and its record; the first graph is not changed by it."""
    model, gm = captured(name)
    same = models.frozen(gm)
    new = bl.lift_graph(gm, state=model)
    assert same()
    return model, gm, new, new.meta["buffer_lifting"]


def lift(model: nn.Module, *args: torch.Tensor, **how: Any) -> tuple[GraphModule, GraphModule, bl.LiftedGraph]:
    """The joint graph, the lifted one and its record; the first is not changed."""
    gm = models.capture(model, *args, **how).graph_module
    same = models.frozen(gm)
    new = bl.lift_graph(gm, state=model)
    assert same()
    return gm, new, new.meta["buffer_lifting"]


def placeholders(gm: GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("name", SMALL)
def test_results_and_every_gradient_follow_the_order(name: str) -> None:
    model, gm, new, lifted = lifted_of(name)
    report = lifted.verify(new, models.call(gm, model, tokens()))
    assert report["identity"].compared == report["equivariance"].compared == 1 + len(list(model.parameters()))
    assert report["identity"].detail.startswith("bitwise but for 1" if name in ROUNDED else "bitwise, ")
    assert lifted.inputs and "the original on the same inputs is off" in report["equivariance"].detail


def test_where_the_lifted_inputs_stand_and_what_they_say() -> None:
    _, gm, new, lifted = lifted_of("Llama")
    names = [node.name for node in placeholders(new)]
    own = [item.name for item in lifted.inputs]
    assert own == ["lifted_freqs_cis", "lifted_slots", "lifted_slots_keys"]
    before = [node.name for node in placeholders(gm)]
    assert names == [*before[: lifted.place], *own, "tangents_1"] and names[lifted.place] == own[0]
    described = [node.meta["desc"].idx for node in placeholders(new) if node.name in own]
    assert described == [1, 2, 3]  # further plain inputs, behind the tokens
    assert tuple(placeholders(new)[lifted.place].meta["val"].shape) == (3, LENGTH, 4)
    results = new.graph.output_node()
    assert len(results.meta["desc"]) == len(results.args[0]) == 1 + len(names) - 1
    assert list(results.args[0][-3:]) == [None] * 3
    tags = {node.meta.get("partitioner_tag") for node in new.graph.nodes if node.op != "output"}
    assert tags == {"is_forward", "is_backward"}
    composite = {"aten.reshape.default", "aten.flatten.using_ints"}
    assert composite.isdisjoint(str(node.target) for node in new.graph.nodes)


def test_a_lifted_graph_is_called_as_the_original() -> None:
    """``f(primals, tangents)``, with the lifted inputs behind the primals."""
    model, gm, new, lifted = lifted_of("Llama")
    values = models.call(gm, model, tokens())
    primals, tangents = values[:-1], values[-1:]
    expected, gradients = gm(primals, tangents)
    results, lifted_gradients = new([*primals, *lifted.feed(3, LENGTH).values()], tangents)
    assert torch.equal(expected[0], results[0]) and len(lifted_gradients) == len(gradients) + 3
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, lifted_gradients, strict=False))
    with pytest.raises(bl.FeedError, match="lacks 'lifted_slots'"):
        lifted.arguments(values, {"lifted_freqs_cis": values[0], "lifted_slots_keys": values[0]})
    with pytest.raises(bl.FeedError, match=r"has 15 inputs besides the lifted ones, 1 were given"):
        lifted.arguments(values[:1], {})


def test_a_read_of_the_backward_that_is_left_is_found() -> None:
    """The control of the check itself: rows of a table whose gradients go where the tokens do not stand."""
    model, gm, new, lifted = lifted_of("slice of a parameter")
    put = next(node for node in new.graph.nodes if "index_put" in str(node.target))
    index = put.args[1][0]
    with new.graph.inserting_before(put):
        natural = new.graph.call_function(torch.ops.aten.arange.default, (LENGTH,))
        spread = new.graph.call_function(torch.ops.aten.expand.default, (natural, [3, LENGTH]))
    put.replace_input_with(index, spread)
    with pytest.raises(bl.VerificationError, match=r"equivariance does not hold.*the gradient of positions") as error:
        lifted.verify(new, models.call(gm, model, tokens()))
    assert error.value.report is not None and error.value.report["identity"].passed


def test_a_backward_read_of_the_table_that_is_left_is_found() -> None:
    model, gm, new, lifted = lifted_of("Llama")
    conjugate = [node for node in new.graph.nodes if "_conj" in str(node.target)]
    assert conjugate and all(node.meta["partitioner_tag"] == "is_forward" for node in conjugate[:1])
    shift = next(iter(conjugate[0].users))
    with new.graph.inserting_before(shift):
        along = list(conjugate[0].meta["val"].shape).index(LENGTH)
        flipped = new.graph.call_function(torch.ops.aten.flip.default, (conjugate[0], [along]))
    shift.replace_input_with(conjugate[0], flipped)
    with pytest.raises(bl.VerificationError, match="the gradient of"):
        lifted.verify(new, models.call(gm, model, tokens()))


def test_what_cannot_be_put_off_is_refused_by_name() -> None:
    gm = models.capture(models.Projected(), tokens()).graph_module
    same = models.frozen(gm)
    with pytest.raises(bl.UnsupportedReadError) as error:
        bl.lift_graph(gm)
    text = str(error.value)
    assert "BL201 node 'mm_2' (aten.mm.default): the gradient of 'positions.weight'" in text and same()
    gm = models.capture(models.Convolved(), tokens()).graph_module
    with pytest.raises(bl.UnsupportedReadError, match=r"BL202 node 'convolution_backward'"):
        bl.lift_graph(gm)
    assert bl.lift_graph(gm, strict=False).meta["buffer_lifting"].report.refused


class Cached(models.Base):
    """Writes rows of positions, or of data, to a buffer and reads them back."""

    cache: torch.Tensor

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.of_data = of_data
        self.register_buffer("cache", torch.zeros(3, 16, models.WIDTH))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.sin(torch.arange(x.shape[1])[:, None] * torch.ones(models.WIDTH))
        self.cache[:, : x.shape[1]] = x.detach() if self.of_data else rows
        return x + self.cache[:, : x.shape[1]]


def test_a_cache_of_data_is_refused_and_one_of_positions_is_what_it_was() -> None:
    """What is written is a result of the graph: rows in natural order, whatever the order of the tokens."""
    model = Cached(of_data=False)
    gm, new, lifted = lift(model, tokens())
    report = lifted.verify(new, models.call(gm, model, tokens()))
    assert report["equivariance"].compared == 2 + len(list(model.parameters()))
    gm = models.capture(Cached(of_data=True), tokens()).graph_module
    with pytest.raises(bl.UnsupportedReadError, match=r"BL202 node 'copy"):
        bl.lift_graph(gm)


def test_a_batch_of_one_has_no_sums_over_it() -> None:
    """The gradient of a whole table is put into its rows all the same; that of a part is refused."""
    model = make("a whole parameter")
    gm, new, lifted = lift(model, tokens(1))
    assert not any("aten.sum" in str(node.target) and node.meta["val"].dim() == 3 for node in gm.graph.nodes)
    assert lifted.verify(new, models.call(gm, model, tokens(1))).passed
    model = make("indexed parameter")
    gm, new, lifted = lift(model, tokens(1))
    assert lifted.verify(new, models.call(gm, model, tokens(1))).passed
    gm = models.capture(make("slice of a parameter"), tokens(1)).graph_module
    with pytest.raises(bl.UnsupportedReadError, match=r"BL201 node 'slice_backward"):
        bl.lift_graph(gm)
    model = make("a whole parameter")
    gm, flat, names = traced_step(model, mean_loss, tokens(1), tokens(1))
    with pytest.raises(bl.UnsupportedReadError, match=r"BL105 .*the gradient of 'positions'.*batch of 1"):
        bl.lift_graph(gm, flat, state=model, state_fqns=names)


def test_flags_stay_if_asked() -> None:
    model, gm = captured("Llama")
    new = bl.lift_graph(gm, state=model, follow_slots=False)
    lifted = new.meta["buffer_lifting"]
    assert [item.name for item in lifted.inputs] == ["lifted_freqs_cis"] and not lifted.follows_slots
    assert sum(read.source_kind == "is_causal" for read in lifted.report.reads) == 2  # forward and backward
    with pytest.raises(bl.VerificationError, match="equivariance"):
        lifted.verify(new, models.call(gm, model, tokens()))


def test_tables_without_values_are_named_and_bound() -> None:
    model, gm = captured("Llama")
    new = bl.lift_graph(gm)
    lifted = new.meta["buffer_lifting"]
    with pytest.raises(bl.FeedError, match="freqs_cis"):
        lifted.feed(3, LENGTH)
    lifted.bind_tables(model)
    order = torch.stack([torch.randperm(LENGTH) for _ in range(3)])
    rows = lifted.feed(3, LENGTH, order=order)["lifted_freqs_cis"]
    assert torch.equal(rows, model.freqs_cis[order])
    with pytest.raises(bl.LiftingError, match="lifted already"):
        bl.lift_graph(new)
    with pytest.raises(bl.LiftingError, match="need data"):
        lifted.verify(new, [node.meta["val"] for node in placeholders(gm)])


def test_examples_bring_the_values_of_buffers() -> None:
    model, gm = captured("Llama")
    values = models.call(gm, model, tokens())
    assert bl.lift_graph(gm, values).meta["buffer_lifting"].feed(3, LENGTH)
    with pytest.raises(TypeError, match="example_inputs has 1 values"):
        bl.lift_graph(gm, values[:1])
    with pytest.raises(TypeError, match=r"torch\.fx\.GraphModule"):
        bl.lift_graph(model)  # type: ignore[arg-type]
    bare = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="fake tensors"):
        bl.lift_graph(bare)


def test_a_plain_graph_with_state_by_get_attr() -> None:
    """Not a joint graph: traced with ``make_fx``, and the module of an exported program, called with keywords."""
    model = make("Llama")
    gm = make_fx(lambda ids: model(ids), tracing_mode="fake", _allow_non_fake_inputs=True)(tokens())
    same = models.frozen(gm)
    new = bl.lift_graph(gm, (tokens(),))
    lifted = new.meta["buffer_lifting"]
    lifted.verify(new, (tokens(),))
    assert torch.equal(new(tokens(), *lifted.feed(3, LENGTH).values()), gm(tokens())) and same()
    assert lifted.place == 1 and {n.op for n in new.graph.nodes} == {n.op for n in gm.graph.nodes}

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    gm = torch.export.export(make("learned bias"), (tokens(),), dynamic_shapes=(dims,)).module()
    same = models.frozen(gm)
    new = bl.lift_graph(gm, (tokens(),))
    lifted = new.meta["buffer_lifting"]
    lifted.verify(new, (tokens(2, 7),))
    assert torch.equal(new(tokens(2, 7), **lifted.feed(2, 7)), gm(tokens(2, 7))) and same()
    assert [n.target for n in new.graph.nodes if n.op == "get_attr"] == [
        n.target for n in gm.graph.nodes if n.op == "get_attr"
    ]
    assert new.state_dict().keys() == {n.target for n in new.graph.nodes if n.op == "get_attr"} & gm.state_dict().keys()


def traced_step(model: nn.Module, loss: Callable[..., torch.Tensor], *args: torch.Tensor) -> Any:
    """Loss and gradients of one step as a flat graph without descriptors, as graph trainers trace it."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = len(list(model.parameters()))

    def step(*flat: torch.Tensor) -> list[torch.Tensor]:
        held = dict(zip(state, flat, strict=False))
        out = torch.func.functional_call(model, held, flat[len(state) : len(state) + 1])
        value = loss(out, *flat[len(state) + 1 :])
        return [value, *torch.autograd.grad(value, flat[:weights])]

    flat = [*(value.detach().requires_grad_(i < weights) for i, value in enumerate(state.values())), *args]
    return make_fx(step, tracing_mode="fake")(*flat), flat, list(state)


def mean_loss(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out.flatten(0, 1), labels.flatten())


def counted_loss(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum()


@pytest.mark.parametrize("loss", [mean_loss, counted_loss])
def test_a_traced_train_step_with_its_loss(loss: Callable[..., torch.Tensor]) -> None:
    model = make("learned bias")
    labels = tokens().roll(-1, 1).masked_fill(torch.arange(LENGTH) == 4, -100)
    gm, flat, names = traced_step(model, loss, tokens(), labels)
    new = bl.lift_graph(gm, flat, state=model, state_fqns=names)
    lifted = new.meta["buffer_lifting"]
    report = lifted.verify(new, flat)
    assert report["equivariance"].compared == 1 + len(list(model.parameters()))
    assert lifted.place == len(flat) and {read.source for read in lifted.report.reads} >= {"distances.weight"}
    by_name = dict(zip([node.name for node in placeholders(gm)], names, strict=False))
    again = bl.lift_graph(gm, flat, state=model, state_fqns=by_name)
    assert again.code == new.code
    with pytest.raises(TypeError, match="state_fqns="):
        bl.lift_graph(gm, state_fqns={"nothing": "weight"})


def test_a_reduction_that_goes_back_into_the_tokens_is_refused() -> None:
    """The square of a loss: on a shard of the tokens its gradient is another."""
    gm, flat, names = traced_step(make("slice of a parameter"), lambda o, y: mean_loss(o, y) ** 2, tokens(), tokens())
    with pytest.raises(bl.UnsupportedReadError, match=r"BL201 node 'nll_loss_backward'.*goes back into the tokens"):
        bl.lift_graph(gm, flat, state=make("slice of a parameter"), state_fqns=names)


@pytest.mark.parametrize(
    "partition",
    ["default_partition", pytest.param("min_cut_rematerialization_partition", marks=pytest.mark.slow)],
)
def test_a_lifted_capture_compiles_and_trains(partition: str) -> None:
    import contextlib

    from torch._functorch import aot_autograd, partitioners

    model = make("slice of a parameter")
    with contextlib.ExitStack() as stack:
        capture = aot_autograd.aot_export_joint_with_descriptors(stack, model, (tokens(),), {})
        new = bl.lift_graph(capture.graph_module, state=model)
        lifted = new.meta["buffer_lifting"]
        lifted.install(capture, new)
        run = aot_autograd.aot_compile_joint_with_descriptors(capture, partition_fn=getattr(partitioners, partition))
    order = torch.stack([torch.randperm(LENGTH) for _ in range(3)])
    (name,) = lifted.input_axes.keys() - lifted._tangents
    inputs = lifted.shard_inputs(order=order, **{name: tokens()})
    weights = torch.randn(3, LENGTH, models.VOCABULARY)
    places = order[..., None].expand_as(weights)
    out = run(*model.parameters(), *inputs.values(), *lifted.feed(3, LENGTH, order=order).values())
    got = torch.autograd.grad(out, list(model.parameters()), weights.gather(1, places))
    reference_out = model(tokens())
    wanted = torch.autograd.grad(reference_out, list(model.parameters()), weights)
    torch.testing.assert_close(out, reference_out.gather(1, places))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(bl.LiftingError, match="capture of the joint graph that was lifted"):
        lifted.install(capture, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "nanoGPT", "ALiBi", "learned bias", "slice of a parameter"])
def test_dynamic_graphs_at_two_sizes(name: str) -> None:
    model = make(name)
    gm, new, lifted = lift(model, tokens(), dynamic=True)
    assert lifted.axes.batch is None and lifted.axes.lengths == {"seq": None}
    for size in ((3, LENGTH), (2, 7)):
        lifted.verify(new, models.call(gm, model, tokens(*size)))


class Logits(nn.Module):
    """A Hugging Face model that returns its logits, or its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        out = self.model(input_ids=tokens, labels=labels)
        return out.logits if labels is None else out.loss


def hugging_face(name: str, **config: Any) -> nn.Module:
    import transformers

    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}{config.pop('head')}")
    torch.manual_seed(0)
    return Logits(kind(made(**{**sizes, "use_cache": False, **config})))


LLAMA = {"head": "ForCausalLM", "intermediate_size": 64, "num_key_value_heads": 2}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Gemma3": {**LLAMA, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "GPT2": {"head": "LMHeadModel", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "Bloom": {"head": "ForCausalLM"},
    "Falcon": {"head": "ForCausalLM", "alibi": True},
    "OPT": {"head": "ForCausalLM", "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Bert": {"head": "ForMaskedLM", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "Falcon", "OPT", "Bert", "Gemma3"])
def test_models_of_hugging_face(name: str, dynamic: bool) -> None:
    config = dict(HUGGING_FACE[name])
    model = gemma(config) if name == "Gemma3" else hugging_face(name, **config)
    gm, new, lifted = lift(model, tokens(), dynamo=True, dynamic=dynamic)
    for size in ((3, LENGTH), (2, 7))[: 1 + dynamic]:
        report = lifted.verify(new, models.call(gm, model, tokens(*size)))
        assert report["identity"].detail.startswith("bitwise, ")


def gemma(config: dict[str, Any]) -> nn.Module:
    import transformers

    config.pop("head")
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    made = transformers.Gemma3TextConfig(**{**sizes, "use_cache": False, **config})
    return Logits(transformers.Gemma3ForCausalLM(made))


@pytest.mark.slow
def test_shifted_labels_of_hugging_face() -> None:
    model = hugging_face("Llama", **LLAMA)
    gm, new, lifted = lift(model, tokens(), tokens().clone(), dynamo=True)
    assert lifted.verify(new, models.call(gm, model, tokens(), tokens().clone())).passed


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["recomputed in the trace", "tagged"])
def test_activation_checkpointing_reads_again_in_the_backward(dynamo: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make("Llama")

        def forward(self, tokens: torch.Tensor) -> Any:
            return checkpoint(self.model, tokens, use_reentrant=False)

    model = Checkpointed()
    gm, new, lifted = lift(model, tokens(), dynamo=dynamo)
    assert lifted.verify(new, models.call(gm, model, tokens())).passed


@pytest.mark.slow
def test_the_tracer_of_torchtitan() -> None:
    from torchtitan.experiments.graph_trainer.make_fx_tracer import minimal_fx_tracer

    model = make("Llama")

    def step(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        loss = mean_loss(model(x), y)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    traced = minimal_fx_tracer(step, module=model)(tokens(), tokens().roll(-1, 1))
    new = bl.lift_graph(traced.gm, traced.example_inputs, state=model, state_fqns=traced.state_fqns)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = [held[name].detach() for name in traced.state_fqns]
    assert new.meta["buffer_lifting"].verify(new, [*state, tokens(), tokens().roll(-1, 1)]).passed
