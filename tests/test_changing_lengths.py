"""Batch size and sequence length change from step to step: gradients of one process, and what it costs.

``lengths_worker.py`` has the cells and trains them, all in one pair of processes.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lengths_worker
import pytest
import torch
from lengths_worker import CELLS, MICROBATCHES, OTHERS, STEPS, Cell, launch, lifted_program, loss_fn, step_data
from pipeline_worker import DIM, LAYERS, SGD, WORLD, build_model, canonical_names
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.export import Dim
from zoo import CASES, export_case, make_inputs

import buffer_lifting as bl
from buffer_lifting.boundaries import BoundaryTensor
from buffer_lifting.errors import AxesError, FeedError, PartitionError
from buffer_lifting.step_sizes import StepSizes, step_sizes

#: Seconds for a pair of workers.
BUDGET = 270.0
TOLERANCE = 1e-5
#: Bytes of torch's first message between neighbours: one int32.
VOTE = 4
#: Up to torch 2.14 each stage votes to its neighbours; then the ranks vote at once, and of two the first connects.
STAGES_VOTE = hasattr(PipelineStage, "_warmup_forward_vote")


def first_messages(rank: int, hops: int) -> list[int]:
    """Bytes of what one of two ranks with so many ``hops`` to the other sends before its first step."""
    return [VOTE] * (hops if STAGES_VOTE else int(rank == 0))


Results = list[dict[str, dict[str, Any]]]


def selected(request: pytest.FixtureRequest, key: str) -> list[Any]:
    """What the selected tests ask for."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return list(dict.fromkeys(spec.params[key] for spec in params if spec is not None and key in spec.params))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the cells that the selected tests name."""
    names = [cell.name for cell in selected(request, "cell")]
    return launch(names, tmp_path_factory.mktemp("cells"), BUDGET)


@pytest.fixture(scope="module")
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the other parts of the worker, in a pair of processes of their own."""
    return launch(selected(request, "part"), tmp_path_factory.mktemp("parts"), BUDGET)


def of(name: str, results: Results) -> list[dict[str, Any]]:
    """Both ranks' records; one without a result is a failure of its tests."""
    for rank in results:
        if rank[name]["error"]:
            pytest.fail(rank[name]["error"], pytrace=False)
    return [rank[name] for rank in results]


@cache
def reference(model: str, steps: tuple[int, ...] = tuple(range(len(STEPS))), update: bool = True) -> list[Any]:
    """``(loss, gradients)`` of each step of the eager model on the whole batch, in natural order."""
    module = copy.deepcopy(build_model(model))
    optimizer = torch.optim.SGD(module.parameters(), **SGD)
    found = []
    for step in steps:
        inputs, target = step_data(model, step)
        output = module(**inputs)
        loss = loss_fn(output if isinstance(output, Tensor) else output.logits, target)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
        if update:
            optimizer.step()
        optimizer.zero_grad()
    return found


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error: relative to the gradient, or to 1e-4 of the model's largest one (a true one may be zero)."""
    assert set(actual) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = {
        name: float((actual[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-4 * largest)
        for name, gradient in expected.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def joined(ranks: list[dict[int, dict[str, Tensor]]], model: str) -> dict[str, Tensor]:
    """All stages' gradients by the eager model's names; the copies of a tied weight have one."""
    names = canonical_names(build_model(model))
    found: dict[str, Tensor] = {}
    for own in ranks:
        for gradients in own.values():
            for fqn, gradient in gradients.items():
                assert torch.equal(found.setdefault(names[fqn], gradient), gradient)
    return found


def cells(*these: Cell) -> Any:
    """One test for each cell."""
    return pytest.mark.parametrize("cell", these, ids=[cell.name for cell in these])


def part(name: str) -> Any:
    """The test judges that part of the worker."""
    assert name in OTHERS
    return pytest.mark.parametrize("part", [name])


# Two processes ------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@cells(*CELLS)
def test_loss_and_gradients_are_the_single_process_s(cell: Cell, results: Results) -> None:
    """Every step, whatever its sizes; odd ones in another order for each sample. The optimizer steps in between."""
    run = of(cell.name, results)
    for number, (loss, gradients) in enumerate(reference(cell.model)):
        losses = [rank["steps"][number]["losses"] for rank in run]
        assert sorted(len(own) for own in losses) == [0, MICROBATCHES]
        actual = torch.stack(max(losses, key=len)).mean()
        assert abs(float(actual - loss)) <= TOLERANCE * abs(float(loss)), number
        error, name = worst(joined([rank["steps"][number]["gradients"] for rank in run], cell.model), gradients)
        assert error <= TOLERANCE, f"step {number}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("model", sorted({cell.model for cell in CELLS}))
def test_the_measure_tells_one_length_from_another(model: str) -> None:
    """A control: the gradients of two steps of unlike sizes, or on other weights, don't pass for each other."""
    steps = reference(model)
    assert worst(steps[1][1], steps[0][1])[0] > 1e-2
    assert worst(steps[4][1], reference(model, (4,))[0][1])[0] > 1e-2


@pytest.mark.multiprocess
@cells(*CELLS)
def test_nothing_but_activations_and_their_gradients_is_sent(cell: Cell, results: Results) -> None:
    """No message for a new length, none for one that was forgotten; a vote of torch's before the first step.

    Of messages between two ranks: the sizes that all compare before a step go by a collective.
    """
    run = of(cell.name, results)
    for number, (batch, seq) in enumerate(STEPS):
        hidden = batch // MICROBATCHES * seq * DIM * 4
        for rank, record in enumerate(run):
            stages = record["stages"]
            hops = [s for s in stages if s + 1 < cell.num_stages and s + 1 not in stages]
            back = [s for s in stages if s and s - 1 not in stages]
            votes = first_messages(rank, len(hops) + len(back)) if number == 0 else []
            expected = [hidden] * MICROBATCHES * (len(hops) + len(back)) + votes
            assert sorted(record["steps"][number]["posted"]) == sorted(expected), (rank, number)


@pytest.mark.multiprocess
@cells(*CELLS)
def test_no_table_is_made_twice_and_no_parameter(cell: Cell, results: Results) -> None:
    """One evaluation a length, for all batch sizes; as many parameters as at the beginning."""
    for rank in of(cell.name, results):
        seen: list[int] = []
        for number, (_, seq) in enumerate(STEPS):
            seen += [seq] if seq not in seen else []
            assert rank["steps"][number]["evaluations"] == (len(seen) if rank["natural"] else 0)
            assert rank["steps"][number]["parameters"] == rank["parameters"]
        assert rank["natural"] == (cell.model != "nanogpt_tied")
        assert len(rank["sizes"]) == 3 and rank["sizes"][-1] == (8, {"seq": 48})


@pytest.mark.multiprocess
@part("accumulate")
def test_gradients_accumulate_as_with_one_stage(part: str, others: Results) -> None:
    """torch divides what is there by the number of microbatches at the end of each step, once for all stages."""
    run = of(part, others)
    (_, first), (_, second) = reference("llama_pr1797", (0, 1), update=False)
    scaled = {name: first[name] / MICROBATCHES + second[name] for name in first}
    plain = {name: first[name] + second[name] for name in first}
    assert worst(joined([rank["True"] for rank in run], "llama_pr1797"), scaled)[0] <= TOLERANCE
    assert worst(joined([rank["False"] for rank in run], "llama_pr1797"), plain)[0] <= TOLERANCE


@pytest.mark.multiprocess
@part("evaluate")
def test_evaluation_goes_between_steps(part: str, others: Results) -> None:
    """Without gradients, and without a message more than the activations when it takes turns with steps."""
    run = of(part, others)
    for rank, sign in enumerate(("forward", "backward")):
        for place, (number, kind) in enumerate(((0, "step"), (1, "eval"), (0, "eval"), (1, "step"), (1, "eval"))):
            batch, seq = STEPS[number]
            size = batch // MICROBATCHES * seq * DIM * 4
            sent = MICROBATCHES if sign == "forward" or kind == "step" else 0
            votes = first_messages(rank, 1) if place == 0 else []
            assert sorted(run[rank]["posted"][place]) == sorted([size] * sent + votes), (rank, place)
    outputs = next(rank["outputs"] for rank in run if rank["outputs"][0] is not None)
    module = build_model("llama_pr1797")
    for output, number in zip(outputs, (1, 0, 1), strict=True):
        inputs, _ = step_data("llama_pr1797", number)
        with torch.no_grad():
            expected = module(**inputs)
        assert float((output - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.multiprocess
@part("by_microbatch")
def test_a_static_microbatch_takes_batches_of_any_number(part: str, others: Results) -> None:
    """Two and four microbatches of two samples."""
    run = of(part, others)
    for batch in (8, 4):
        module = copy.deepcopy(build_model("llama_pr1797"))
        (tokens,), _ = make_inputs("llama_pr1797", batch, 16, seed=batch)
        loss_fn(module(tokens), tokens).backward()
        expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert worst(joined([rank[batch] for rank in run], "llama_pr1797"), expected)[0] <= TOLERANCE


@pytest.mark.multiprocess
@part("refusals")
def test_a_step_that_does_not_fit_is_refused_before_it_begins(part: str, others: Results) -> None:
    """On both ranks, with nothing sent; the next step works."""
    expected = {
        "static length": "AxesError: rank RANK: the program was exported with a static sequence of 16",
        "static batch": "AxesError: rank RANK: the program was exported with a static batch of 2",
        "another feed": "has 48 for 'seq', but 'tokens' has 32",
        "another seq_len": "has 32 for 'seq', but seq_len= has 48",
        "another batch_size": "has 8 for 'batch', but batch_size= has 4",
        "uneven batch": "FeedError: rank RANK: a batch of 6 does not divide into 4 microbatches",
        "no sizes": "FeedError: rank RANK: no input of this rank tells the size of batch, seq",
        "too long": "FeedError: rank RANK: a sequence of 128 is longer than the program allows",
        "unknown": "FeedError: rank RANK: the program has no inputs ['mask']",
        "missing": "FeedError: rank RANK: the stages [RANK] read ['lifted_",
        "twice": "FeedError: rank RANK: ['tokens'] are given by position and by name",
        "no target": "FeedError: rank RANK: the last stage's rank needs target=",
        "other target": "FeedError: rank RANK: target has 4 samples, the batch has 8",
    }
    run = of(part, others)
    assert set(run[WORLD - 1]) - {"error", "posted"} == set(expected)
    for rank, record in enumerate(run):
        assert record["posted"] == "[]"
        for name, message in record.items():
            if name not in ("error", "posted"):
                assert expected[name].replace("RANK", str(rank)) in message, f"{name}: {message}"
                assert f"Error: rank {rank}: " in message, f"{name}: {message}"


@pytest.mark.multiprocess
@part("compared")
def test_ranks_that_are_given_unlike_steps_say_so(part: str, others: Results) -> None:
    """On every rank, which has what; also where only one of them refuses the step, or knows the sizes that it has."""
    for rank, record in enumerate(of(part, others)):
        start = f"FeedError: rank {rank}: "
        unlike = f"{start}the ranks were given unlike steps: "
        assert record["lengths"] == f"{unlike}'seq' is 32 on rank 0, 48 on rank 1 (here 'tokens' says so)"
        assert record["lengths, one of them known"] == record["lengths"]
        assert record["kind"] == f"{unlike}step() on rank 0, eval() on rank 1"
        other = "rank 1 refused the step, whose own error says why"
        assert record["refused"] == start + ("target has 3 samples, the batch has 8" if rank else other)
        batch, micro = ("is 8 on rank 0, 4 on rank 1 (here 'tokens' says so)", "is 2 on rank 0, 1 on rank 1")
        assert record["batches"] == f"{unlike}'batch' {batch}; 'microbatch' {micro}"


@pytest.mark.multiprocess
@part("sharded")
def test_the_gradients_of_fsdp_modules_survive_a_new_length(part: str, others: Results) -> None:
    """torch drops an FSDP module's gradients when a schedule begins, for the sake of a dry run that there is not."""
    run = of(part, others)
    (_, first), (_, second) = reference("llama_pr1797", (0, 1), update=False)
    scaled = {name: first[name] / MICROBATCHES + second[name] for name in first}
    assert worst(joined([rank["gradients"] for rank in run], "llama_pr1797"), scaled)[0] <= TOLERANCE


@pytest.mark.multiprocess
@part("converted")
def test_converted_stages_send_the_dtype_that_the_runner_was_told(part: str, others: Results) -> None:
    """float64 stages of a float32 program."""
    run = of(part, others)
    batch, seq = STEPS[0]
    for number, rank in enumerate(run):
        hidden = batch // MICROBATCHES * seq * DIM * 8
        assert sorted(rank["posted"]) == first_messages(number, 1) + [hidden] * MICROBATCHES
    (loss, _) = reference("nanogpt", (0,))[0]
    (losses,) = (rank["losses"] for rank in run if rank["losses"])
    assert abs(sum(losses) / MICROBATCHES - float(loss)) <= TOLERANCE * float(loss)


@pytest.mark.multiprocess
def test_an_activation_that_the_metadata_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """The rank that computes it says so before it is sent, and the other one does not wait for ever."""
    results = launch(["untold"], tmp_path, 120.0)
    error = results[0]["untold"]["error"]
    assert "PartitionError: stage 0 computed" in error and "torch.float64" in error and "activation_dtype=" in error
    assert results[1]["untold"]["error"] and "no result" not in results[1]["untold"]["error"]


@pytest.mark.multiprocess
@part("dry_run")
def test_given_shapes_save_the_dry_run(part: str, others: Results) -> None:
    """torch's own stages run once more, and send what they found: the control of the messages counted above."""
    for number, rank in enumerate(of(part, others)):
        expected = MICROBATCHES + len(first_messages(number, 1))
        assert rank["True"]["forwards"] == MICROBATCHES
        assert rank["False"]["forwards"] == MICROBATCHES + 1
        assert len(rank["True"]["posted"]) == expected
        assert len(rank["False"]["posted"]) > expected


# One process --------------------------------------------------------------------------------------------


@cache
def staged_case(model: str, dynamic: bool = True, stages: int = 2) -> bl.StagedProgram:
    if not dynamic:
        return bl.partition(bl.lift(export_case(model, dynamic=False, layers=LAYERS)[1]), num_stages=stages)
    return bl.partition(lifted_program(model), num_stages=stages)


@pytest.mark.parametrize("model", ["llama_pr1797", "hf_llama", "hf_gpt2", "nanogpt_tied", "hf_llama_labels"])
def test_boundaries_are_those_of_a_run(model: str) -> None:
    """The shapes, dtypes and strides that the stages return, for several sizes."""
    staged = staged_case(model, stages=3)
    for batch, seq in ((1, 9), (5, 16), (2, 40)):
        args, kwargs = make_inputs(model, batch, seq, seed=1)
        inputs = {**dict(zip(CASES[model].seq_inputs, args, strict=False)), **kwargs}
        feed = staged.feed(batch, seq, inputs=inputs)
        values: list[Tensor] = [inputs[name] for name in staged.stages[0].activations]
        for stage in staged.stages:
            taken, given = staged.boundary(stage.index, batch, seq)
            assert [describe(t) for t in taken] == [describe(v) for v in values]
            result = stage.module(*values, **{**(inputs if stage.index else {**kwargs}), **feed})
            values = [v.detach() for v in (result if isinstance(result, tuple) else (result,))]
            assert [describe(t) for t in given] == [describe(v) for v in values]
            assert all(t.device.type == "meta" and t.requires_grad == t.is_floating_point() for t in (*taken, *given))


def describe(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, value.stride()


def test_boundaries_are_readable_expressions() -> None:
    """What the record says, and what it says of a static program."""
    first, second = staged_case("hf_llama").stages
    assert [tensor.shape for tensor in first.output_shapes] == [("batch", "seq", str(DIM))]
    assert first.output_shapes == second.activation_shapes
    static = staged_case("hf_llama", dynamic=False)
    (tensor,) = static.stages[0].output_shapes
    assert all(size.isdigit() for size in tensor.shape)


def test_a_package_keeps_the_boundaries(tmp_path: Path) -> None:
    """As JSON; a package without them loads, and refuses sizes only."""
    staged = staged_case("llama_pr1797")
    staged.save(tmp_path / "stages")
    loaded = bl.load_stage(tmp_path / "stages", 1)
    assert loaded.stage.activation_shapes == staged.stages[1].activation_shapes
    assert loaded.stage.output_shapes == staged.stages[1].output_shapes
    for mine, saved in zip(loaded.boundary(3, 20), staged.boundary(1, 3, 20), strict=True):
        assert [describe(t) for t in mine] == [describe(t) for t in saved]
    document = json.loads((tmp_path / "stages" / "stage_1.json").read_text())
    assert document["activation_shapes"][0]["shape"] == ["batch", "seq", str(DIM)]
    old = replace(loaded, stage=replace(loaded.stage, activation_shapes=(), output_shapes=()))
    with pytest.raises(PartitionError, match="earlier version"):
        old.boundary(3, 20)


def test_sizes_that_a_program_does_not_take() -> None:
    """Each names what is wrong."""
    static, dynamic = staged_case("llama_pr1797", dynamic=False), staged_case("llama_pr1797")
    with pytest.raises(AxesError, match="static sequence"):
        static.boundary(0, static.lifted.axes.batch or 0, 9)
    with pytest.raises(AxesError, match="static batch"):
        static.boundary(0, 77, 16)
    with pytest.raises(PartitionError, match="there is no stage 7"):
        dynamic.boundary(7, 2, 16)
    with pytest.raises(PartitionError, match="both microbatch_size and seq_len"):
        dynamic.build_stage(0, "cpu", microbatch_size=2)
    with pytest.raises(FeedError, match="longer than the program allows"):
        dynamic.boundary(0, 2, 1000)


SIZES = {"batch": 6, "seq": 24, "decoder": 5}


class TestExpressions:
    """The arithmetic of one dim."""

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            *(("7", 7), ("batch", 6), ("2*batch*seq", 288), ("seq/8", 3), ("3*decoder + -1", 14), ("batch**2", 36)),
            ("4*seq/8**2 + 1", 37),
        ],
    )
    def test_values(self, text: str, value: int) -> None:
        assert BoundaryTensor("h", "float32", (text,)).concrete(SIZES) == (value,)

    @pytest.mark.parametrize("text", ["u0", "Max(0, 53 + -1*seq)", "((seq)//2)", "s7*batch", "(seq + 1)//2"])
    def test_what_the_sizes_do_not_decide(self, text: str) -> None:
        with pytest.raises(PartitionError, match="build its stages without sizes"):
            BoundaryTensor("h", "float32", (text,)).concrete(SIZES)

    @pytest.mark.parametrize("text", ["seq/7", "seq/0"])
    def test_a_length_that_does_not_divide(self, text: str) -> None:
        with pytest.raises(FeedError, match="multiple"):
            BoundaryTensor("h", "float32", (text,)).concrete(SIZES)


class Folded(torch.nn.Module):
    """Its sequence is a multiple of 4, and its boundary is folded and laid out sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = self.first(hidden.transpose(0, 1)).transpose(0, 1) * 2
        return self.second(hidden)


def test_what_is_sent_is_contiguous() -> None:
    """A process group refuses anything else; here the stage's own layout is sequence first."""
    length = 4 * Dim("quarter", min=2, max=64)
    tokens = torch.zeros(3, 12, dtype=torch.long)
    program = torch.export.export(Folded(), (tokens,), dynamic_shapes=({0: Dim("samples"), 1: length},))
    staged = bl.partition(bl.lift(program), split_points=["second"])
    hidden = staged.stages[0].module(torch.zeros(2, 20, dtype=torch.long))
    assert hidden.shape == (2, 20, 8) and hidden.is_contiguous()
    assert staged.boundary(0, 2, 20)[1][0].shape == (2, 20, 8)
    assert torch.equal(staged(tokens), program.module()(tokens))


class TestSizes:
    """What the inputs of a rank tell."""

    def sizes(self, *, batch: int | None = None, seq: Any = None, cp: int | None = None, **inputs: Tensor) -> StepSizes:
        lifted = copy.copy(lifted_program("llama_pr1797"))
        lifted.cp_size = cp
        return step_sizes(lifted, inputs, batch, seq, 2, None)

    def test_from_inputs_or_from_the_caller(self) -> None:
        lifted = lifted_program("llama_pr1797")
        tokens = torch.zeros(4, 24, dtype=torch.long)
        expected = StepSizes(4, 2, (("seq", 24),))
        assert self.sizes(tokens=tokens) == self.sizes(**lifted.feed(4, 24)) == self.sizes(batch=4, seq=24) == expected
        assert self.sizes(batch=4, seq={"seq": 24}) == expected and expected.n_microbatches == 2

    def test_a_shard_s_rows_tell_the_whole_sequence(self) -> None:
        """Rows are the rank's part, columns the whole sequence."""
        lifted = lifted_program("llama_pr1797")
        feed = lifted.feed(4, 24)
        roles = {item.name: item.role for item in lifted.inputs}
        assert set(roles.values()) == {"row", "col"}
        cut = {name: value if roles[name] == "col" else value[:, :12] for name, value in feed.items()}
        assert self.sizes(cp=2, tokens=torch.zeros(4, 12), **cut) == StepSizes(4, 2, (("seq", 24),))
        with pytest.raises(FeedError, match="has 24 for 'seq', but 'tokens' has 48"):
            self.sizes(cp=2, tokens=torch.zeros(4, 24), **cut)

    def test_the_rank_s_part_is_on_the_boundary(self) -> None:
        staged = staged_case("llama_pr1797")
        lifted = copy.copy(staged.lifted)
        lifted.cp_size = 2
        _, (hidden,) = replace(staged, lifted=lifted).boundary(0, 2, 24)
        assert hidden.shape == (2, 12, DIM)
        with pytest.raises(FeedError, match="does not divide into 2"):
            replace(staged, lifted=lifted).boundary(0, 2, 23)


def test_tables_of_many_lengths_are_forgotten() -> None:
    """The least recently used first; a length in use is evaluated once."""
    from buffer_lifting.feed import KEPT

    lifted = lifted_program("hf_llama")
    lifted.feed_program.clear_tables()
    name = next(item.name for item in lifted.inputs if item.form == "values")
    kept = lifted.feed(2, 8)[name]
    for length in range(9, 9 + 2 * KEPT):
        lifted.feed(2, length)
        again = lifted.feed(3, 8)[name]
        assert again.data_ptr() == kept.data_ptr()
    assert len(lifted.feed_program._tables) == KEPT
    lifted.feed_program.clear_tables()


def test_the_stage_of_torch_is_as_it_was_read() -> None:
    """The private methods that are left out have to exist: another torch may do it all in another way."""
    assert callable(PipelineStage._post_metadata_inference_cleanup)
    if STAGES_VOTE:
        assert callable(PipelineStage._warmup_backward_result)
    else:
        known = inspect.signature(_PipelineSchedule._initialize_pipeline_distributed_state)
        assert list(known.parameters) == ["self", "stages", "has_backward", "initialize_p2p"]


def test_every_schedule_is_known_here() -> None:
    """The worker's cells have the three kinds of schedules that the stages lie on ranks for."""
    assert len({cell.schedule for cell in lengths_worker.CELLS}) >= 3
