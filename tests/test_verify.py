"""verify on every zoo model, and each of its oracles on deliberate faults: all are caught, the right node named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mutants as m
import pytest
import torch
from zoo import CASES, export_case

import buffer_lifting as bl

EXPORTS = [(name, dynamic) for name, case in CASES.items() for dynamic in ((True, False) if case.dynamic else (False,))]


@cache
def program_of(name: str, dynamic: bool = True) -> Any:
    """One export a model; nothing below changes it."""
    return export_case(name, dynamic=dynamic)[1]


@pytest.mark.parametrize(("name", "dynamic"), EXPORTS)
@pytest.mark.parametrize("form", ["auto", "values", "positions"])
def test_every_model_verifies(name: str, dynamic: bool, form: str) -> None:
    """All checks hold, on the lifted program and on its stages."""
    program = program_of(name, dynamic)
    lifted = bl.lift(program, form=form)
    report = bl.verify(program, lifted)
    assert [check.name for check in report.checks] == ["values", "identity", "equivariance"]
    assert all(check.passed and check.compared > 0 for check in report.checks)
    staged = bl.partition(bl.context_parallel(lifted, size=1), num_stages=2)
    report = bl.verify(program, staged, checks=("values", "equivariance", "composition"))
    assert report.passed and report["composition"].compared > 10


def caught(program: Any, target: Any, check: str) -> bl.VerificationError:
    """The error that one oracle alone raises."""
    with pytest.raises(bl.VerificationError) as raised:
        bl.verify(program, target, checks=(check,))
    report = raised.value.report
    assert report is not None and not report[check].passed
    return raised.value


def named(error: bl.VerificationError) -> str:
    """The node that the failed check names."""
    assert error.report is not None
    return next(check.node for check in error.report.checks if not check.passed)


# -- faults that show in natural order: values, identity and equivariance each catch them alone ------------------

TABLES = {"llama_pr1797": "lifted_freqs_cis", "tune_llama3": "lifted_layers_1_attn_pos_embeddings_cache"}
ROPE = {"hf_llama": "lifted_model_rotary_emb_inv_freq"}
INDEXES = {"nanogpt": "lifted_positions", "hf_gpt2": "lifted_positions"}
ON_VALUES: dict[str, m.Transform] = {
    "flip_seq": m.flip(1),
    "flip_features": m.flip(2),
    "first_row": m.first_row,
    "scaled": m.scaled,
    "zeroed": m.zeroed,
    "swapped": m.roll(1, 2),
}
ON_INDEX: dict[str, m.Transform] = {
    "offset_by_one": m.offset(1),
    "offset_by_minus_one": m.offset(-1),
    "flip_seq": m.flip(1),
    "first_row": m.first_row,
    "scaled": m.scaled,
    "roll": m.roll(1),
}
NATURAL = [
    *((model, name, t) for model in [*TABLES, *ROPE] for name, t in ON_VALUES.items()),
    *((model, name, t) for model in INDEXES for name, t in ON_INDEX.items()),
]


@pytest.mark.parametrize("check", ["values", "identity", "equivariance"])
@pytest.mark.parametrize(("model", "fault", "transform"), NATURAL, ids=[f"{a}-{b}" for a, b, _ in NATURAL])
def test_a_wrong_value_is_caught_by_each_oracle_alone(
    check: str, model: str, fault: str, transform: m.Transform
) -> None:
    """30 faults of a lifted value, all its reads at once."""
    program = program_of(model)
    source = {**TABLES, **ROPE, **INDEXES}[model]
    mutant = m.at_input(bl.lift(program), source, transform)
    error = caught(program, mutant, check)
    if check == "values":
        readers = {e.consumer for e in m.frontier(program) if e.keys}
        assert named(error) == next(iter(_readers(program, source))) and named(error) in readers
    else:
        assert named(error)


def _readers(program: Any, source: str) -> list[str]:
    """The ops that read a lifted input, in graph order."""
    from buffer_lifting.graph.from_fx import build_record
    from buffer_lifting.passes.normalize import normalize
    from buffer_lifting.scanner import scan_record

    plan = scan_record(build_record(program, normalize(program).graph))
    plan_outputs = {key for key, output in plan.outputs.items() if output.input.name == source}
    return [edge.consumer for edge in plan.frontier if plan_outputs & set(edge.keys)]


# -- faults at a single read: the values oracle names the op ----------------------------------------------------

READS = [(model, index) for model in ("llama_pr1797", "hf_llama", "tune_llama3") for index in (0, 1, 2, -1)]


@pytest.mark.parametrize(("model", "index"), READS)
@pytest.mark.parametrize("fault", ["offset", "unlifted", "wrong_dtype"])
def test_one_read_of_many_is_named(model: str, index: int, fault: str) -> None:
    """One operand off by one, left out of the lift, or in another dtype."""
    program = program_of(model)
    lifted = bl.lift(program)
    edge = [edge for edge in m.frontier(program) if "mask" not in edge.path][index]
    if fault == "offset":
        seq = next(d for d, label in enumerate(edge.labels) if any(f.is_seq for f in label))
        lifted = m.at_read(lifted, edge, m.roll(1, seq))
    elif fault == "wrong_dtype":
        lifted = m.at_read(lifted, edge, m.widened)
    else:
        lifted = m.unlift(program, lifted, [edge])
    assert named(caught(program, lifted, "values")) == edge.consumer


@pytest.mark.parametrize("model", ["llama_pr1797", "hf_llama", "tune_llama3", "llama_masked"])
@pytest.mark.parametrize("check", ["values", "equivariance"])
def test_a_layer_that_was_left_out_is_named(model: str, check: str) -> None:
    """Every read of the last layer stays as it was: in natural order nothing is wrong."""
    program = program_of(model)
    edges = [e for e in m.frontier(program) if "layers.1" in e.read.modules[0] and "mask" not in e.path]
    assert edges
    mutant = m.unlift(program, bl.lift(program), edges)
    assert bl.verify(program, mutant, checks=("identity",)).passed  # the reason why identity is not enough
    assert named(caught(program, mutant, check)) == edges[0].consumer


def test_a_mask_that_was_left_out_is_named() -> None:
    """Transformers' mask in natural order."""
    program = program_of("hf_llama")
    edges = [e for e in m.frontier(program) if e.path == "attn_mask"]
    mutant = m.unlift(program, bl.lift(program), edges[:1])
    for check in ("values", "equivariance"):
        assert named(caught(program, mutant, check)) == edges[0].consumer


# -- faults of order, stream, role and shard: values and equivariance --------------------------------------------

FEEDS: dict[str, Callable[[bl.LiftedProgram], bl.LiftedProgram]] = {
    "order_ignored": lambda x: m.with_feed(x, m.order_fault(lambda o: None)),
    "order_inverted": lambda x: m.with_feed(x, m.order_fault(lambda o: o.argsort(1))),
    "order_twice": lambda x: m.with_feed(x, m.order_fault(lambda o: o.gather(1, o))),
    "order_of_sample_zero": lambda x: m.with_feed(x, m.order_fault(lambda o: o[:1])),
    "order_of_next_sample": lambda x: m.with_feed(x, m.order_fault(lambda o: o.roll(1, 0))),
    "order_reversed": lambda x: m.with_feed(x, m.order_fault(lambda o: o.flip(1))),
    "order_rolled": lambda x: m.with_feed(x, m.order_fault(lambda o: o.roll(1, 1))),
}
FEED_CASES = [(model, fault) for model in ("llama_pr1797", "hf_llama", "nanogpt", "hf_llama_labels") for fault in FEEDS]


@pytest.mark.parametrize(("model", "fault"), FEED_CASES)
def test_a_wrong_order_is_caught(model: str, fault: str) -> None:
    """28 faults of the order. In natural order all of them are right."""
    program = program_of(model)
    mutant = FEEDS[fault](bl.lift(program))
    assert bl.verify(program, mutant, checks=("identity",)).passed
    first = m.frontier(program)[0].consumer
    assert named(caught(program, mutant, "values")) == first


@pytest.mark.parametrize("model", ["llama_pr1797", "hf_llama", "nanogpt"])
@pytest.mark.parametrize("fault", ["slot_for_position", "positions_ignored"])
def test_the_wrong_stream_is_caught(model: str, fault: str) -> None:
    """Packed documents tell positions from slots; the first table read is named."""
    program = program_of(model)
    lifted = bl.lift(program)
    mutant = m.with_streams(lifted, None, "slots") if fault == "slot_for_position" else m.ignoring_positions(lifted)
    error = caught(program, mutant, "values")
    assert "packed" in str(error) and named(error) == m.frontier(program)[0].consumer


@pytest.mark.parametrize("model", ["nanogpt", "llama_masked"])
def test_position_for_slot_is_caught(model: str) -> None:
    """A mask that follows restarting positions lets queries see future keys."""
    program = program_of(model)
    lifted = bl.lift(program)
    error = caught(program, m.with_streams(lifted, None, "positions"), "values")
    masks = [e.consumer for e in m.frontier(program) if e.path in ("mask", "attn_mask")]
    assert "packed" in str(error) and named(error) == masks[0]


@pytest.mark.parametrize("model", ["nanogpt", "llama_masked", "hf_llama"])
@pytest.mark.parametrize("fault", ["keys_cut_to_the_shard", "rows_not_cut", "roles_swapped"])
def test_a_wrong_role_is_caught(model: str, fault: str) -> None:
    """Only a shard tells rows from columns: one that does not start at 0."""
    program = program_of(model)
    lifted = bl.lift(program)
    if fault == "keys_cut_to_the_shard":
        mutant = m.with_roles(lifted, "col", "row")
    elif fault == "rows_not_cut":
        mutant = m.with_roles(lifted, "row", "col")
    else:
        pair = (
            ("lifted_index_2", "lifted_index_3_keys") if model == "hf_llama" else ("lifted_slots", "lifted_slots_keys")
        )
        mutant = m.swap_inputs(lifted, *pair)
    inputs = [_call(model, 2, 12), _call(model, 2, 14)]
    with pytest.raises(bl.VerificationError, match="shard"):
        bl.verify(program, mutant, inputs=inputs, checks=("values",))


def _call(model: str, batch: int, length: int) -> tuple[Any, Any]:
    from zoo import make_inputs

    return make_inputs(model, batch, length, 5)


@pytest.mark.parametrize("model", ["llama_pr1797", "hf_llama", "nanogpt"])
def test_a_shard_that_starts_at_zero_is_caught(model: str) -> None:
    """Every rank feeds rank 0's rows."""
    program = program_of(model)
    mutant = m.with_feed(bl.lift(program), lambda s: m.MutantStreams(s, s.order, rank=0))
    with pytest.raises(bl.VerificationError, match="shard"):
        bl.verify(program, mutant, inputs=[_call(model, 2, 12)], checks=("values",))


# -- other faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama_pr1797", "tune_llama3", "hf_llama", "sinusoid"])
@pytest.mark.parametrize("check", ["values", "identity", "equivariance"])
def test_a_stale_table_is_caught(model: str, check: str) -> None:
    """Tables that are not those of the model."""
    program = program_of(model)
    assert named(caught(program, m.stale_state(bl.lift(program)), check))


@pytest.mark.parametrize("check", ["values", "identity"])
@pytest.mark.parametrize("model", ["hf_llama", "tune_llama3", "sinusoid"])
def test_lost_precision_is_caught(model: str, check: str) -> None:
    """A detour through bfloat16 leaves dtype and shape as they were."""
    program = program_of(model)
    lifted = bl.lift(program)
    source = next(i.name for i in lifted.inputs if i.dtype == "float32")
    assert named(caught(program, m.at_input(lifted, source, m.rounded), check))


def test_swapped_tables_are_caught() -> None:
    """cos for sin."""
    program = program_of("hf_llama")
    mutant = m.swap_inputs(bl.lift(program), *(f"lifted_model_rotary_emb_inv_freq{s}" for s in ("", "_1")))
    for check in ("values", "identity", "equivariance"):
        assert named(caught(program, mutant, check))


def test_a_rotation_the_other_way_is_caught() -> None:
    """The complex conjugate."""
    program = program_of("llama_pr1797")
    first = m.frontier(program)[0]
    mutant = m.at_read(bl.lift(program), first, m.conjugated)
    assert named(caught(program, mutant, "values")) == first.consumer
    assert named(caught(program, mutant, "equivariance")) == first.consumer
    assert named(caught(program, mutant, "identity"))


@pytest.mark.parametrize(
    ("model", "batch_swap"), [("llama_pr1797", "lifted_freqs_cis"), ("nanogpt", "lifted_positions")]
)
def test_batch_and_sequence_swapped_are_caught(model: str, batch_swap: str) -> None:
    """The same elements, in the other order."""
    program = program_of(model)
    mutant = m.at_input(bl.lift(program), batch_swap, m.swapped)
    for check in ("values", "identity", "equivariance"):
        assert named(caught(program, mutant, check))


@pytest.mark.parametrize("model", ["llama_pr1797", "nanogpt", "hf_llama"])
def test_samples_that_share_the_first_ones_values_are_caught(model: str) -> None:
    """Right as long as all samples have one order."""
    program = program_of(model)
    lifted = bl.lift(program)
    mutant = m.at_input(lifted, lifted.inputs[0].name, m.sample_zero)
    for check in ("values", "equivariance"):
        assert named(caught(program, mutant, check)) == m.frontier(program)[0].consumer


@pytest.mark.parametrize(("model", "old", "new"), [("llama_masked", "ge", "gt"), ("llama_masked", "ge", "le")])
def test_a_wrong_comparison_is_caught(model: str, old: str, new: str) -> None:
    """A causal mask without its diagonal, and one that looks ahead."""
    program = program_of(model)
    lifted = bl.lift(program)
    present = {str(n.target).split(".")[1] for n in lifted.program.graph.nodes if "aten" in str(n.target)}
    source = old if old in present else "le"
    target = {"gt": "gt" if source == "ge" else "lt", "le": "le" if source == "ge" else "ge"}[new]
    m.retarget(lifted, getattr(torch.ops.aten, source).Tensor, getattr(torch.ops.aten, target).Tensor)
    masks = [e.consumer for e in m.frontier(program) if e.path == "attn_mask"]
    assert named(caught(program, lifted, "values")) == masks[0]


@pytest.mark.parametrize(
    ("model", "table"), [("hf_gpt2", "p_transformer_wpe_weight"), ("nanogpt", "p_transformer_wpe_weight")]
)
def test_a_learned_table_without_gradient_is_caught(model: str, table: str) -> None:
    """The values are right; only the gradient of the table is gone, and the error names the table."""
    program = program_of(model)
    mutant = m.detach_parameter(bl.lift(program), table)
    assert bl.verify(program, mutant, checks=("values",)).passed
    assert named(caught(program, mutant, "identity")) == "transformer.wpe.weight"
    error = caught(program, mutant, "equivariance")
    assert "transformer.wpe.weight" in str(error)


@pytest.mark.parametrize("model", ["llama_pr1797", "tune_llama3"])
def test_attention_that_stays_causal_is_caught(model: str) -> None:
    """After context_parallel, one attention still follows the place in the shard instead of the slot."""
    program = program_of(model)
    mutant = m.keep_causal(bl.context_parallel(bl.lift(program), size=1))
    attentions = [n.name for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    for check in ("values", "equivariance"):
        assert named(caught(program, mutant, check)) == attentions[-1]


def test_labels_that_are_not_shifted_are_caught() -> None:
    """The hoisted label shift."""
    program = program_of("hf_llama_labels")
    lifted = bl.lift(program)
    name = lifted.inputs[-1].name
    mutant = m.at_input(lifted, name, m.roll(1))
    for check in ("values", "identity", "equivariance"):
        assert named(caught(program, mutant, check))


def test_a_control_that_moves_nothing_is_reported() -> None:
    """Two lifted inputs that nothing reads: the report names them, and the values oracle finds the fault."""
    program = program_of("hf_gpt2")
    mutant = m.at_input(bl.lift(program), "lifted_index", m.zeroed)
    mutant = m.at_input(mutant, "lifted_index_1_keys", m.zeroed)
    report = bl.verify(program, mutant, checks=("equivariance",))
    assert "3 controls move it" in report["equivariance"].detail
    assert "proves nothing for lifted_index, lifted_index_1_keys" in report["equivariance"].detail
    assert named(caught(program, mutant, "values"))


# -- composition -------------------------------------------------------------------------------------------------


def _stage_fault(staged: bl.StagedProgram, stage: int, index: int, kind: str) -> None:
    """Changes the ``index``-th floating op of a stage."""
    module = staged.stages[stage].module
    graph = module.graph
    nodes = [
        n
        for n in graph.nodes
        if n.op == "call_function" and "aten" in str(n.target) and n.meta["val"] is not None and _floating(n)
    ]
    node = nodes[index % len(nodes)]
    users = list(node.users)
    with graph.inserting_after(node):
        if kind == "detach":
            new = graph.call_function(torch.ops.aten.detach.default, (node,))
        elif kind == "scale":
            new = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
        else:
            new = graph.call_function(torch.ops.aten.roll.default, (node, [1], [0]))
    for user in users:
        user.replace_input_with(node, new)
    module.recompile()


def _floating(node: Any) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3


STAGE_FAULTS = [
    (model, stage, index, kind)
    for model in ("llama_pr1797", "hf_gpt2")
    for stage in (0, 1)
    for index, kind in [(0, "scale"), (-1, "scale"), (-1, "detach"), (5, "roll"), (-3, "roll"), (0, "detach")]
]


@pytest.mark.parametrize(("model", "stage", "index", "kind"), STAGE_FAULTS)
def test_a_wrong_stage_is_caught(model: str, stage: int, index: int, kind: str) -> None:
    """24 faults of an op in a stage; a detached activation shows in gradients alone."""
    program = program_of(model)
    staged = bl.partition(bl.lift(program), num_stages=2)
    assert bl.verify(program, staged, checks=("composition",)).passed
    _stage_fault(staged, stage, index, kind)
    assert named(caught(program, staged, "composition"))


# -- the report --------------------------------------------------------------------------------------------------


def test_the_error_names_the_node_and_lists_all_checks() -> None:
    """What a user sees."""
    program = program_of("llama_pr1797")
    mutant = m.at_input(bl.lift(program), "lifted_freqs_cis", m.roll(1))
    with pytest.raises(bl.VerificationError) as raised:
        bl.verify(program, mutant)
    text = str(raised.value)
    assert "values does not hold at node 'mul'" in text and "freqs_cis" in text
    assert "FAIL values" in text and "FAIL identity" in text
    assert "equivariance" in text


def test_a_shift_of_all_positions_is_invisible_to_equivariance() -> None:
    """RoPE does not see a common shift: why the values oracle exists."""
    program = program_of("hf_llama")
    lifted = bl.lift(program, form="positions")
    mutant = m.at_input(lifted, "lifted_positions", m.offset(1))
    assert bl.verify(program, mutant, checks=("equivariance",)).passed
    assert named(caught(program, mutant, "values")) == m.frontier(program)[0].consumer


def test_verify_refuses_what_it_cannot_check() -> None:
    """Wrong arguments, and a program without example inputs."""
    program = program_of("llama_pr1797")
    lifted = bl.lift(program)
    with pytest.raises(TypeError, match="LiftedProgram"):
        bl.verify(program, program)
    with pytest.raises(ValueError, match="identity"):
        bl.verify(program, lifted, checks=("everything",))
    bare = export_case("llama_pr1797")[1]
    lifted = bl.lift(bare)
    bare.example_inputs = None
    with pytest.raises(bl.LiftingError, match="inputs="):
        bl.verify(bare, lifted)
    assert bl.verify(bare, lifted, inputs=[_call("llama_pr1797", 2, 9)]).passed


class Halved(torch.nn.Module):
    """Learned positions, attention, and a length that has to be even, which torch states as a guard."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = torch.nn.Embedding(16, 8), torch.nn.Embedding(64, 8)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] % 2:
            raise ValueError("an odd length")
        x = (self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))).unsqueeze(1)
        mixed = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        result: torch.Tensor = self.second(self.first(mixed).relu())
        return result


@pytest.mark.parametrize("size", [1, 2])
def test_an_export_on_a_view_of_a_batch_runs_on_other_tensors(size: int) -> None:
    """torch guards the tensor that ``text[:, :-1]`` is a view of, which verify's inputs and a trainer's have not."""
    text = torch.randint(0, 16, (4, 25), generator=torch.Generator().manual_seed(0))
    sizes = {"tokens": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(Halved(), (), {"tokens": text[:, :-1]}, dynamic_shapes=sizes)
    tokens = text[:2, :20].clone()
    with pytest.raises(AttributeError):
        program.module()(tokens=tokens)  # torch's guard; without it this test shows nothing
    inputs = [((), {"tokens": tokens})]
    lifted = bl.lift(program)
    if size == 1:
        assert bl.verify(program, lifted, inputs).passed
        run = lifted.program.module()
        assert run(tokens=tokens, **lifted.feed(2, 20)).shape == (2, 20, 16)
        with pytest.raises(AssertionError, match="Guard failed"):
            run(tokens=tokens[:, :19], **lifted.feed(2, 19))
    staged = bl.partition(bl.context_parallel(lifted, size=size), split_points=["second"])
    assert bl.verify(program, staged, inputs).passed
