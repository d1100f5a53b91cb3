"""Stages under torch's own schedules, in two processes: loss and gradients of one process, and what is sent.

``pipeline_worker.py`` has the cells (a model under a schedule) and trains them. A fixture runs those that the
selected tests ask for, all in one pair of processes, and each test judges one cell.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pipeline_worker
import pytest
import torch
from pipeline_worker import (
    BATCH,
    DIM,
    EXAMPLES,
    LOOPED,
    MICROBATCH,
    MICROBATCHES,
    SEQ,
    SGD,
    SINGLE,
    STEPS,
    V_SHAPED,
    WITHOUT_CHUNK_SPEC,
    WORLD,
    Cell,
    build_model,
    canonical_names,
    cross_entropy,
    random_orders,
    run_cells,
    step_data,
)
from torch import Tensor
from torch.distributed import pipelining

pytestmark = pytest.mark.multiprocess

#: Seconds for all workers together; the cells that are left then have no result, and fail.
BUDGET = 240.0
TOLERANCE = 1e-5
SEVEN = (*SINGLE, *LOOPED, *V_SHAPED)
THREE = ("Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble")
MODELS = (
    "hf_llama",
    "hf_gpt2",
    "tune_llama3",
    "nanogpt",
    "llama_masked",
    "hf_llama_mask",
    "llama_loss",
    "hf_llama_labels",
)

ALL_SCHEDULES = tuple(Cell("llama_pr1797", schedule) for schedule in SEVEN)
ALL_MODELS = tuple(Cell(model, schedule) for model in MODELS for schedule in THREE)
STATIC = (
    *(Cell("llama_pr1797", schedule, "static", cp=False) for schedule in THREE),
    *(Cell("hf_llama", schedule, "static") for schedule in THREE),
    Cell("hf_llama_mask", "Schedule1F1B", "static"),
    Cell("hf_llama_labels", "Schedule1F1B", "static"),
)
#: Exported with a microbatch's sizes: ``boundary_bytes`` is then what is sent.
MEASURED = tuple(Cell(model, s, "same") for model in ("llama_pr1797", "hf_llama", "llama_masked") for s in THREE)
PERMUTED = (
    Cell("llama_pr1797", "Schedule1F1B", order="permuted"),
    Cell("llama_pr1797", "Schedule1F1B", "static", order="permuted"),
    Cell("llama_pr1797", "ScheduleZBVZeroBubble", order="permuted"),
    Cell("hf_llama", "Schedule1F1B", order="permuted"),
    Cell("llama_masked", "Schedule1F1B", order="permuted"),
    Cell("hf_llama_labels", "Schedule1F1B", order="permuted"),
)
CONTROLS = tuple(Cell(model, "Schedule1F1B", order="feed left natural") for model in ("llama_pr1797", "hf_llama"))
MESH = Cell("llama_pr1797", "Schedule1F1B", mesh=True)
PLAIN_LOSS = Cell("llama_pr1797", "Schedule1F1B", plain_loss=True)
TRAINED = (*ALL_SCHEDULES, *ALL_MODELS, *STATIC, *MEASURED, *PERMUTED, MESH, PLAIN_LOSS)

Run = list[dict[str, Any]]
Results = dict[Cell, Run | str]


def cells(*these: Cell) -> Any:
    """One test for each cell, named after it."""
    return pytest.mark.parametrize("cell", these, ids=[cell.name for cell in these])


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the cells that the selected tests name."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = [spec.params["cell"] for spec in params if spec is not None and "cell" in spec.params]
    return run_cells(list(dict.fromkeys(wanted)), tmp_path_factory.mktemp("pipeline"), BUDGET)


def run_of(cell: Cell, results: Results) -> Run:
    """What both ranks recorded of the cell. No fixture: a cell without a result is a failure of its tests."""
    result = results.get(cell, f"no result within {BUDGET} seconds")
    if isinstance(result, str):
        pytest.fail(result, pytrace=False)
    assert [len(rank["steps"]) for rank in result] == [STEPS] * WORLD
    return result


# The single process -------------------------------------------------------------------------------------


@cache
def reference(model: str, update: bool = True) -> list[dict[str, Any]]:
    """Loss, output and gradients of each step of the eager model on the whole batch, in natural order."""
    module = copy.deepcopy(build_model(model))
    optimizer = torch.optim.SGD(module.parameters(), **SGD)
    steps = []
    for step in range(STEPS):
        inputs, target = step_data(model, step)
        output = module(**inputs)
        if "labels" in inputs:
            loss, logits = output if isinstance(output, Tensor) else output.loss, None
        else:
            logits = output if isinstance(output, Tensor) else output.logits
            loss = cross_entropy(logits, target)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        logits = None if logits is None else logits.detach()
        steps.append({"loss": loss.detach(), "output": logits, "gradients": gradients})
        if update:
            optimizer.step()
        optimizer.zero_grad()
    return steps


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error and its parameter: relative to the gradient, or to 1e-4 of the model's largest one.

    Some true gradients are zero, a key bias's for one, and have no relative error.
    """
    assert set(actual) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = {
        name: float((actual[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-4 * largest)
        for name, gradient in expected.items()
    }
    assert all(error == error for error in errors.values()), errors
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def gradients(run: Run, step: int, model: str) -> dict[str, Tensor]:
    """The gradients of all ranks' stages, by the eager model's name; checks the copies of tied weights."""
    names = canonical_names(build_model(model))
    found: dict[str, dict[int, Tensor]] = {}
    for rank in run:
        for stage, own in rank["steps"][step]["gradients"].items():
            assert set(own) == set(rank["parameters"][stage])
            for fqn, gradient in own.items():
                assert gradient is not None, f"{fqn} of stage {stage} has no gradient"
                assert stage not in found.setdefault(names[fqn], {})
                found[names[fqn]][stage] = gradient
    several = {name: tuple(sorted(stages)) for name, stages in found.items() if len(stages) > 1}
    assert several == {names[fqn]: tuple(sorted(stages)) for fqn, stages in run[0]["tied"].items()}
    for name in several:
        first, *others = found[name].values()
        assert all(torch.equal(first, other) for other in others)
    return {name: next(iter(stages.values())) for name, stages in found.items()}


@pytest.mark.parametrize("model", ["llama_pr1797", *MODELS])
def test_the_measure_tells_one_step_from_another(model: str) -> None:
    """A control: the first step's gradients, or those without the update, don't pass for the second's."""
    first, second = reference(model)
    assert worst(first["gradients"], second["gradients"])[0] > 1e-2
    assert worst(reference(model, update=False)[1]["gradients"], second["gradients"])[0] > 1e-2


def test_every_schedule_of_torch_is_tried() -> None:
    """A schedule that torch adds has to be added here."""
    assert {cell.schedule for cell in ALL_SCHEDULES} == {n for n in pipelining.__all__ if n.startswith("Schedule")}
    assert set(WITHOUT_CHUNK_SPEC) == {
        name for name in SEVEN if "kwargs_chunk_spec" not in inspect.signature(getattr(pipelining, name)).parameters
    }


# The cells ----------------------------------------------------------------------------------------------


@cells(*TRAINED)
def test_loss_and_gradients_are_the_single_process_s(cell: Cell, results: Results) -> None:
    """Two optimizer steps, the second one on the weights and the momentum that the first one left."""
    run = run_of(cell, results)
    expected = reference(cell.model)
    last = cell.placement[-1]
    for step in range(STEPS):
        losses = [rank["steps"][step]["losses"] for rank in run]
        assert [len(own) for own in losses] == [MICROBATCHES if rank == last else 0 for rank in range(WORLD)]
        loss = torch.stack(losses[last]).mean()
        assert abs(float(loss - expected[step]["loss"])) <= TOLERANCE * abs(float(expected[step]["loss"]))
        error, name = worst(gradients(run, step, cell.model), expected[step]["gradients"])
        assert error <= TOLERANCE, f"step {step}: {name} is off by {error:.1e}"


@cells(*(cell for cell in TRAINED if not cell.loss_in_graph))
def test_step_returns_the_single_process_s_output(cell: Cell, results: Results) -> None:
    """The rank of the last stage gets the whole batch's logits, in the order of its tokens."""
    run = run_of(cell, results)
    last = cell.placement[-1]
    for step in range(STEPS):
        outputs = [rank["steps"][step]["output"] for rank in run]
        assert [output is not None for output in outputs] == [rank == last for rank in range(WORLD)]
        expected = reference(cell.model)[step]["output"]
        if cell.order == "permuted":
            expected = expected.gather(1, random_orders(step).unsqueeze(-1).expand_as(expected))
        assert outputs[last].shape == expected.shape == (BATCH, SEQ, pipeline_worker.VOCAB)
        assert float((outputs[last] - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@cells(*CONTROLS)
def test_permuted_tokens_with_the_natural_feed_give_wrong_gradients(cell: Cell, results: Results) -> None:
    """The control of the permuted cells: tokens alone in another order are another computation."""
    run = run_of(cell, results)
    expected = reference(cell.model)
    for step in range(STEPS):
        assert worst(gradients(run, step, cell.model), expected[step]["gradients"])[0] > 1e-2


@cells(*TRAINED)
def test_only_hidden_states_and_their_gradients_are_sent(cell: Cell, results: Results) -> None:
    """One ``[microbatch, S, D]`` float32 tensor a microbatch, hop and direction, in a step after the first.

    The labels come from where torch asks a stage for its messages; gloo has to get their bytes and no more.
    """
    run = run_of(cell, results)
    assert cell.hops
    hidden = {"dtype": "torch.float32", "shape": (MICROBATCH, SEQ, DIM), "bytes": MICROBATCH * SEQ * DIM * 4}
    places = cell.placement
    for rank in range(WORLD):
        record = run[rank]["steps"][STEPS - 1]
        sent = Counter(tuple(sorted(message.items())) for message in record["sends"])
        expected = Counter(
            tuple(sorted({"direction": direction, "stage": stage, "microbatch": microbatch, **hidden}.items()))
            for hop in cell.hops
            for direction, stage in (("forward", hop), ("backward", hop + 1))
            if places[stage] == rank
            for microbatch in range(MICROBATCHES)
        )
        assert sent == expected
        assert record["posted"] == [hidden["bytes"]] * expected.total()


@cells(*TRAINED)
def test_boundary_bytes_are_those_of_the_example_sizes(cell: Cell, results: Results) -> None:
    """What ``Stage`` says that it sends; for examples as large as a microbatch, that is what it did send."""
    run = run_of(cell, results)
    batch, seq = EXAMPLES[cell.export]
    said = {stage: size for rank in run for stage, size in rank["boundary"].items()}
    last = cell.num_stages - 1
    assert said == {stage: 0 if stage == last else batch * seq * DIM * 4 for stage in range(cell.num_stages)}
    if cell.export == "dynamic":
        return
    for hop in cell.hops:
        messages = [m for m in run[cell.placement[hop]]["steps"][STEPS - 1]["sends"] if m["stage"] == hop]
        forward = [message["bytes"] for message in messages if message["direction"] == "forward"]
        assert forward == [said[hop]] * MICROBATCHES


@cells(MESH)
def test_a_mesh_gives_the_group_by_its_pp_dim(cell: Cell, results: Results) -> None:
    """The cell's gradients are judged with the others'; here: the meshes and groups that are refused."""
    run = run_of(cell, results)
    for rank in run:
        errors = rank["mesh errors"]
        assert set(errors) == {"no pp dim", "no names", "group and mesh"}
        assert errors["no pp dim"].startswith("PartitionError: the mesh has no 'pp' dim")
        assert errors["no names"].startswith("PartitionError: the mesh has no 'pp' dim")
        assert errors["group and mesh"].startswith("PartitionError: give either group or mesh")


def test_a_cell_that_fails_is_named_and_the_next_one_runs(tmp_path: Path) -> None:
    """The harness itself: a rank that ends inside a cell takes its peer along, and a new pair goes on."""
    broken, good, late = (Cell("sinusoid", name) for name in ("ScheduleNothing", "ScheduleGPipe", "Schedule1F1B"))
    results = run_cells([broken, good], tmp_path, BUDGET)
    assert set(results) == {broken, good}
    assert "ScheduleNothing" in str(results[broken]) and "it has GPipe, 1F1B" in str(results[broken])
    error, name = worst(gradients(run_of(good, results), 0, "sinusoid"), reference("sinusoid")[0]["gradients"])
    assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
    assert run_cells([late], tmp_path, budget=0.0) == {}
    with pytest.raises(pytest.fail.Exception, match="no result"):
        run_of(late, {})
