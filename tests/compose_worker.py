"""Stages under FSDP, activation checkpointing, clipping, mixed precision and checkpoints, on four gloo processes.

A *cell* is a run of a model on a mesh; ``test_composability.py`` judges the results. One process exports the models of
all cells and forks the ranks, as ``cp_worker.py`` does.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import cp_worker  # noqa: E402
from cp_worker import WORLD, fork_ranks, mesh_of  # noqa: E402
from pipeline_worker import make_schedule, process_group, work_through  # noqa: E402
from zoo import CASES, VOCAB, titan  # noqa: E402

LAYERS, BATCH, SEQ, MICROBATCHES, IGNORED = 4, 16, 16, 4, -100
STEPS, SAVED = 4, 2
MAX_NORM = 0.05
ADAM = {"lr": 1e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Cell:
    """A run.

    Attributes:
        model: of ``MODELS``.
        pp, other: the mesh; ``kind``: what its second dim is, ``"dp"`` (samples) or ``"cp"`` (tokens).
        schedule: of torch; ``stages``: how many the program is split into (default: ``pp``).
        fsdp: what is sharded: ``"layers"`` and the rest, the ``"stage"`` as one, or ``"none"``.
        checkpointed: layers compute their activations again in the backward.
        runner: the steps are those of a ``StepRunner``.
        feed: ``"unlifted"``: what the model that was not lifted would read, a control.
        steps: of the optimizer; with 0, one step's gradients are compared.
        save, resume: name of a checkpoint to write before step ``SAVED``, or to go on from.
        optimizer_state: whether a resumed run loads it; without, its losses must be others.
        tied: ``"apart"``: the gradients of copies are not summed, a control.
        precision: ``"bfloat16"``: parameters in float32, computation in bfloat16.
        packaged: the stage is loaded from a package without weights, and its weights from a checkpoint, into shards.
    """

    model: str
    pp: int = 2
    other: int = 2
    kind: str = "dp"
    schedule: str = "Schedule1F1B"
    stages: int = 0
    fsdp: str = "layers"
    checkpointed: bool = False
    runner: bool = False
    feed: str = "lifted"
    steps: int = 0
    save: str = ""
    resume: str = ""
    optimizer_state: bool = True
    tied: str = "summed"
    precision: str = "float32"
    packaged: bool = False

    @property
    def name(self) -> str:
        """Names the test, and the files of results: what is not as usual."""
        parts = [self.model, f"pp{self.pp}{self.kind}{self.other}"]
        for field, usual in (("schedule", "Schedule1F1B"), ("fsdp", "layers"), ("feed", "lifted"), ("tied", "summed")):
            value = getattr(self, field)
            parts += [] if value == usual else [f"{field}_{value.removeprefix('Schedule')}"]
        parts += [f"stages{self.stages}"] if self.stages else []
        parts += [f"{field}_{getattr(self, field)}" for field in ("save", "resume") if getattr(self, field)]
        parts += [word for word in ("checkpointed", "runner", "packaged") if getattr(self, word)]
        parts += [] if self.optimizer_state else ["without_optimizer"]
        parts += [] if self.precision == "float32" else [self.precision]
        return "-".join(parts).replace(" ", "_")

    @property
    def num_stages(self) -> int:
        """One a rank unless it is said."""
        return self.stages or self.pp


def _tied_llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=True,
        attention_dropout=0.0,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "hf_llama_tied": partial(_tied_llama, LAYERS),
    "llama_pr1797": partial(CASES["llama_pr1797"].build, layers=LAYERS),
    "titan_llama3": lambda: titan.build("llama3"),
    "nanogpt_tied": partial(CASES["nanogpt_tied"].build, layers=LAYERS),
}


@cache
def build(model: str) -> nn.Module:
    """The eager model with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[model]().train()


def input_name(model: str) -> str:
    """Of the tokens."""
    return "input_ids" if model.startswith("hf_") else CASES[model].seq_inputs[0]


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(tokens, labels, order)``, each ``[BATCH, SEQ]``: labels with -100, unevenly; another order for each sample."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    share = torch.linspace(0.1, 0.6, BATCH).unsqueeze(1)
    labels = labels.masked_fill(torch.rand(BATCH, SEQ, generator=generator) < share, IGNORED)
    return tokens, labels, torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])


def cross_entropy_sum(output: Any, target: Tensor) -> Tensor:
    """Over the valid tokens."""
    logits = output if isinstance(output, Tensor) else output[0]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="sum"
    )


# Made once, before the ranks are forked -----------------------------------------------------------------


@cache
def lifted_program(model: str, precision: str) -> Any:
    """Lifted, from an export of other sizes than a step's."""
    import buffer_lifting as bl

    module = build(model)
    if precision != "float32":
        module = copy.deepcopy(module).bfloat16()
        if model == "llama_pr1797":
            module.freqs_cis = build(model).freqs_cis
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    name = input_name(model)
    tokens = torch.zeros(3, 12, dtype=torch.long)
    args, kwargs = ((), {name: tokens}) if model.startswith("hf_") else ((tokens,), {})
    program = torch.export.export(module, args, kwargs, dynamic_shapes={name: sizes})
    return bl.lift(program)


def key_of(cell: Cell) -> tuple[str, int, int, str]:
    """The model, context-parallel ranks, stages and dtype."""
    precision = "float32" if cell.precision == "float32" else "bfloat16"
    return cell.model, cell.other if cell.kind == "cp" else 1, cell.num_stages, precision


def prepare(cell: Cell) -> Any:
    """The lifted program, before it is forked; the stages, which are wrapped in place, are made for each cell."""
    if cell.model == "titan_llama3":
        return cell
    lifted_program(cell.model, key_of(cell)[3])
    return cell


# The ranks ----------------------------------------------------------------------------------------------


class Rank:
    """One rank of a cell: its stages, wrapped, with optimizer and schedule."""

    def __init__(self, cell: Cell, directory: Path) -> None:
        import buffer_lifting as bl

        self.cell, self.directory = cell, directory
        self.mesh = named_mesh(cell)
        self.pp, self.other = self.mesh["pp"], self.mesh[cell.kind]
        model, cp, stages, precision = key_of(cell)
        program = bl.context_parallel(fresh(lifted_program(model, precision)), size=cp)
        self.staged: Any = bl.partition(program, num_stages=stages)
        self.mine = self.staged.stages_of_rank(self.pp.get_local_rank(), cell.schedule, cell.pp)
        self.last = stages - 1 in self.mine
        self.loss_fn = bl.TokenLoss(self.other, MICROBATCHES, loss=cross_entropy_sum)
        self.runner: Any = None
        source: Any = self.staged
        if cell.packaged:
            source = self.load_packages()
        if cell.runner:
            schedule = getattr(torch.distributed.pipelining, cell.schedule)
            self.runner = bl.StepRunner(
                source, schedule, "cpu", n_microbatches=MICROBATCHES, loss_fn=self.loss_fn, mesh=self.mesh
            )
            self.modules = self.runner.modules
        elif cell.packaged:
            self.modules = {loaded.index: loaded.stage.module for loaded in source}
        else:
            self.stages = [self.staged.build_stage(index, "cpu", mesh=self.mesh) for index in self.mine]
            self.modules = {stage.stage_index: stage.submod for stage in self.stages}
        if cell.precision != "float32":
            for module in self.modules.values():
                for parameter in module.parameters():
                    parameter.data = parameter.data.float()
        self.layers = [fqn for module in self.modules.values() for fqn in self.wrap(module)]
        if cell.packaged:
            self.fill(source)
            self.stages = [loaded.build_stage("cpu", mesh=self.mesh) for loaded in source]
        self.gradients = bl.StageGradients(source, self.modules, mesh=self.mesh)
        self.optimizers = {index: torch.optim.AdamW(m.parameters(), **ADAM) for index, m in self.modules.items()}
        self.schedule: Any = None

    def wrap(self, module: Any) -> list[str]:
        """Layers, then checkpointing, then FSDP."""
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        import buffer_lifting as bl

        cell = self.cell
        layers = bl.split_layers(module) if cell.fsdp == "layers" or cell.checkpointed else {}
        if cell.checkpointed:
            for fqn in layers:
                path, _, leaf = fqn.rpartition(".")
                wrapped = checkpoint_wrapper(layers[fqn])
                module.get_submodule(path).register_module(leaf, wrapped)
                layers[fqn] = wrapped
        if cell.fsdp == "none":
            return list(layers)
        policy = MixedPrecisionPolicy()
        if cell.precision != "float32":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            )
        parts = [*(layers.values() if cell.fsdp == "layers" else ()), module]
        for part in parts:
            fully_shard(part, mesh=self.other, mp_policy=policy)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
        return list(layers)

    def load_packages(self) -> list[Any]:
        """This rank's stages, from a package without weights."""
        import buffer_lifting as bl

        where = self.directory / f"package_{self.cell.name}"
        if torch.distributed.get_rank() == 0:
            with torch.device("meta"):  # .to("meta") would untie the embedding
                on_meta = MODELS[self.cell.model]().train()
            program = torch.export.export(
                on_meta,
                (),
                {"input_ids": torch.zeros(3, 12, dtype=torch.long, device="meta")},
                dynamic_shapes={"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}},
            )
            lifted = bl.context_parallel(bl.lift(program), size=1)
            bl.partition(lifted, num_stages=self.cell.num_stages).save(where, weights=False)
        torch.distributed.barrier()
        loaded = [bl.load_stage(where, index) for index in self.mine]
        for stage in loaded:
            stage.bind_tables(build(self.cell.model))
        return loaded

    def fill(self, loaded: Sequence[Any]) -> None:
        """Allocates the shards, and fills them from a Hugging Face checkpoint."""
        import torch.distributed.checkpoint as dcp

        where = self.directory / "huggingface"
        if torch.distributed.get_rank() == 0:
            build(self.cell.model).save_pretrained(where)
        torch.distributed.barrier()
        for stage in loaded:
            module = stage.stage.module
            module.to_empty(device="cpu")
            stage.bind_tables(build(self.cell.model))
            names = {"lm_head.weight": "model.embed_tokens.weight"}  # the tied weight has the other name in the file
            state = {names.get(fqn, fqn): value for fqn, value in module.state_dict().items()}
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(where)))

    def step(self, step: int) -> float | None:
        """Gradients of a step, reduced; the loss of the whole batch on the ranks of the last stage."""
        cell, name = self.cell, input_name(self.cell.model)
        tokens, labels, order = data(step)
        given = (self.other.get_local_rank(), cell.other)
        rows = slice(None) if cell.kind == "cp" else slice(*(BATCH // cell.other * (given[0] + n) for n in (0, 1)))
        tokens, labels, order = tokens[rows], labels[rows], order[rows]
        shard: Any = given if cell.kind == "cp" else (0, 1)
        inputs = self.staged.shard_inputs(order=order, shard=shard, **{name: tokens}, target=labels)
        target = inputs.pop("target")
        feed = self.staged.feed(
            len(tokens), SEQ, order=None if cell.feed == "unlifted" else order, shard=shard, n_microbatches=MICROBATCHES
        )
        losses: list[Tensor] = []
        if self.last:
            self.loss_fn.begin(target)
        kwargs = {**inputs, **feed}
        last = {"target": target, "losses": losses} if self.last else {}
        if self.runner is not None:
            self.runner.step(**kwargs, **last, return_outputs=False)
        else:
            if self.schedule is None:
                spec = self.staged.kwargs_chunk_spec(kwargs)
                self.schedule = make_schedule(cell.schedule, self.stages, MICROBATCHES, self.loss_fn, spec)
            self.schedule.step(**kwargs, **last, return_outputs=False)
        if cell.fsdp == "none":
            for module in self.modules.values():
                self.loss_fn.reduce_gradients(module.parameters())
        if cell.tied == "summed":
            self.gradients.reduce_tied()
        return float(self.loss_fn.total(losses)) if self.last else None

    def grads(self) -> dict[int, dict[str, Tensor | None]]:
        """Whole gradients by stage and FQN."""
        return {
            index: {plain(name): None if p.grad is None else full(p.grad).clone() for name, p in m.named_parameters()}
            for index, m in self.modules.items()
        }

    def state(self, *stages: int) -> dict[str, Any]:
        """Some stages' part of a checkpoint, by the FQNs of the original model."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state: dict[str, Any] = {"model": {}, "optimizer": {}}
        for index in stages:
            weights, optimizer = get_state_dict(self.modules[index], self.optimizers[index], options=options)
            state["model"].update(weights)
            state["optimizer"].update(optimizer)
        return state

    def save(self, name: str) -> None:
        """Writes a checkpoint."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(*self.mine), checkpoint_id=self.directory / name)

    def resume(self, name: str) -> None:
        """Goes on from a checkpoint, whatever the number of stages was that wrote it."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for index, module in self.modules.items():
            state = self.state(index)
            if not self.cell.optimizer_state:
                del state["optimizer"]
            dcp.load(state, checkpoint_id=self.directory / name)  # into the parameters themselves
            if self.cell.optimizer_state:
                set_optimizer_state_dict(module, self.optimizers[index], state["optimizer"], options=options)


def plain(name: str) -> str:
    """Without what ``checkpoint_wrapper`` adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


def full(value: Any) -> Tensor:
    """All of a sharded tensor."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach()


def fresh(lifted: Any) -> Any:
    """The lifted program with parameters of its own, with what is tied tied."""
    return copy.deepcopy(lifted)


@cache
def _mesh(pp: int, other: int, kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (pp, other), mesh_dim_names=("pp", kind))


def named_mesh(cell: Cell) -> Any:
    """``("pp", "dp")`` or ``("pp", "cp")``."""
    return mesh_of(cell.pp, cell.other) if cell.kind == "cp" else _mesh(cell.pp, cell.other, cell.kind)


def run_titan(cell: Cell) -> dict[str, Any]:
    """What torchtitan's trainer does with the schedule and parts of ``examples/torchtitan_stages.py``, for one step."""
    from types import SimpleNamespace

    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed.utils import clip_grad_norm_

    sys.path.insert(0, str(TESTS.parent / "examples"))
    import torchtitan_stages

    shard, cp = (cell.other, 1) if cell.kind == "dp" else (1, cell.other)
    parallel_dims.device_type = "cpu"  # torchtitan takes a machine without GPUs for one with CUDA
    dims = ParallelDims(dp_replicate=1, dp_shard=shard, cp=cp, tp=1, pp=cell.pp, ep=1, world_size=WORLD)
    dims.build_mesh()
    config = titan_config()
    with torch.device("meta"):
        model = config.build()
    schedule, parts, first, last = torchtitan_stages.pipeline_by_export(
        model,
        parallel_dims=dims,
        training=SimpleNamespace(local_batch_size=BATCH // shard),
        parallelism=SimpleNamespace(
            pipeline_parallel_schedule=cell.schedule.removeprefix("Schedule"),
            pipeline_parallel_microbatch_size=BATCH // shard // MICROBATCHES,
        ),
        ac_config=object() if cell.checkpointed else None,
        device=torch.device("cpu"),
        model_config=config,
        loss_fn=lambda output, target, global_valid_tokens: (
            cross_entropy_sum(output, target) / global_valid_tokens,
            {},
        ),
    )
    for part in parts:
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights(buffer_device=None)
        part.train()
    tokens, labels, order = data(0)
    rank = torch.distributed.get_rank() % cell.other
    rows = slice(None) if cell.kind == "cp" else slice(rank * BATCH // shard, (rank + 1) * BATCH // shard)
    inputs, target, feed = torchtitan_stages.stage_inputs(
        schedule.staged, {"input": tokens[rows]}, labels[rows], dims.get_optional_mesh("cp"), order[rows]
    )
    losses: list[Tensor] = []
    schedule.step(
        *([inputs] if first else []),
        **feed,
        **({"target": target, "losses": losses} if last else {}),
        loss_kwargs={"global_valid_tokens": (labels != IGNORED).sum()},
        return_outputs=False,
    )
    parameters = [p for part in parts for p in part.parameters()]
    gradients = {plain(name): full(p.grad).clone() for part in parts for name, p in part.named_parameters()}
    norm = clip_grad_norm_(parameters, MAX_NORM, foreach=True, pp_mesh=dims.get_optional_mesh("pp"))
    loss = torch.stack(losses).detach().sum() if last else torch.zeros(())
    torch.distributed.all_reduce(loss)
    return {"loss": float(loss), "norm": float(norm), "gradients": {0: gradients}, "tied": {}}


def titan_config() -> Any:
    """A torchtitan Llama 3."""
    return titan.config_of("llama3")


def run(cell: Cell, directory: Path) -> dict[str, Any]:
    """What a rank has to tell of a cell."""
    if cell.model == "titan_llama3":
        return run_titan(cell)
    rank = Rank(cell, directory)
    if cell.resume:
        rank.resume(cell.resume)
    result: dict[str, Any] = {"layers": rank.layers, "tied": dict(rank.staged.tied), "stages": list(rank.mine)}
    if not cell.steps:
        result["loss"] = rank.step(0)
        result["gradients"] = rank.grads()
        result["norm"] = float(rank.gradients.clip_norm(MAX_NORM))
        result["clipped"] = rank.grads()
        return result
    result["losses"] = {}
    result["norms"] = {}
    for step in range(SAVED if cell.resume else 0, cell.steps):
        if cell.save and step == SAVED:
            rank.save(cell.save)
        result["losses"][step] = rank.step(step)
        result["norms"][step] = float(rank.gradients.clip_norm(MAX_NORM))
        for optimizer in rank.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return result


def serve(rank: int, port: int, directory: Path, cells: Sequence[Cell]) -> None:
    """Runs the cells on one rank, in a forked process."""
    faulthandler.enable()
    with process_group(rank, WORLD, port):
        work_through(cells, directory, rank, prepare, lambda cell, _, __: run(cell, directory))


def main(port: int, directory: Path) -> int:
    """Exports and lifts the models, and forks the ranks."""
    torch.set_num_threads(1)
    cells = [Cell(**entry) for entry in json.loads((directory / "cells.json").read_text())]
    for cell in cells:
        prepare(cell)
    return fork_ranks(directory, lambda rank: serve(rank, port, directory, cells))


def launch(cells: Sequence[Any], directory: Path, timeout: float) -> str:
    """Runs one set of four ranks; returns what they printed."""
    return cp_worker.launch(cells, directory, timeout, __file__)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
