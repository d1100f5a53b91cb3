"""Models, data and the single process of the parity cells, in float32 and in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from zoo import CASES, make_inputs  # noqa: E402
from zoo.catalog import dynamic_dims, entries, export_of  # noqa: E402

LAYERS = 4
MICROBATCHES = 4
MICROBATCH = 2
BATCH = MICROBATCHES * MICROBATCH
SEQ = 32
VOCAB = 61
IGNORED = -100
#: Tokens of the packed documents of each sample; torch's per-document balancer wants multiples of 8 for 4 ranks.
DOCUMENTS = ([8, 24], [24, 8], [16, 16], [8, 8, 16], [32], [8, 16, 8], [16, 8, 8], [8, 8, 8, 8])
WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Model:
    """A model of the parity cells.

    Attributes:
        kind: its class in ``parity_expected.txt``.
        case: a name of the zoo, or ``entry export`` of the catalog with ``fields`` for its configuration.
        shifted: the loss shifts the labels.
    """

    name: str
    what: str
    kind: str
    case: str
    fields: tuple[tuple[str, Any], ...] = ()
    shifted: bool = False

    @property
    def loss_in_graph(self) -> bool:
        """Whether the model takes labels and returns its loss."""
        return self.kind in ("loss", "shifted")


MODELS = {
    model.name: model
    for model in (
        Model("llama_pr1797", "Llama of PR #1797", "rotary", "llama_pr1797"),
        Model("hf_llama", "HF Llama", "rotary", "hf_llama"),
        Model("hf_gpt2", "HF GPT-2, learned positions, tied weights", "learned", "hf_gpt2"),
        Model("tune_llama3", "torchtune Llama 3, grouped-query attention", "rotary", "tune_llama3"),
        Model(
            "hf_gemma3",
            "HF Gemma 3, sliding-window and full layers",
            "window",
            "hf_gemma3 sdpa",
            (("num_hidden_layers", LAYERS), ("layer_types", ("sliding_attention", "full_attention") * (LAYERS // 2))),
        ),
        Model("hf_falcon_alibi", "HF Falcon, ALiBi", "alibi", "hf_falcon_alibi sdpa", (("num_hidden_layers", LAYERS),)),
        Model(
            "hf_mixtral", "HF Mixtral, mixture of experts", "moe", "hf_mixtral sdpa", (("num_hidden_layers", LAYERS),)
        ),
        Model("llama_loss", "Llama with its loss in the graph", "loss", "llama_loss"),
        Model(
            "hf_llama_labels", "HF Llama, shifted labels and loss in the graph", "shifted", "hf_llama_labels", (), True
        ),
        Model(
            "hf_llama_packed",
            "HF Llama, packed documents (position_ids)",
            "packed",
            "hf_llama positions",
            (("num_hidden_layers", LAYERS),),
        ),
    )
}
#: The window of the one layer of ``PROBED["hf_mistral_1"]``.
WINDOW = 4
#: The models of the probes: packed documents, and one sliding-window layer.
PROBED = {
    "hf_llama_packed": MODELS["hf_llama_packed"],
    "hf_mistral_1": Model(
        "hf_mistral_1", "HF Mistral, one layer", "window", "hf_mistral sdpa", (("num_hidden_layers", 1),)
    ),
}


def build(model: Model, experts: str | None = None) -> nn.Module:
    """The model with seeded weights, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _builder(model, experts)().train()


def _builder(model: Model, experts: str | None) -> Callable[[], nn.Module]:
    if model.case in CASES:
        return partial(CASES[model.case].build, layers=LAYERS)
    name, export = model.case.split()
    entry = entries()[name]
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in model.fields}
    options = {**export_of(entry, export).options, **fields}
    return partial(entry.build, **(options if experts is None else {**options, "experts": experts}))


def draw(model: Model, batch: int, seq: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of the model."""
    if model.case in CASES:
        return make_inputs(model.case, batch, seq, seed)
    name, export = model.case.split()
    return export_of(entries()[name], export).inputs(batch, seq, torch.Generator().manual_seed(seed))


def export(model: Model) -> torch.export.ExportedProgram:
    """The float32 program, with dynamic batch and sequence and examples of other sizes than a step's."""
    module = build(model)
    args, kwargs = draw(model, 3, 16, 0)
    name, way = ("hf_llama", "sdpa") if model.case in CASES else model.case.split()
    shapes = dynamic_dims(module, export_of(entries()[name], way), args, kwargs)
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def document_positions() -> Tensor:
    """int64 ``[B, S]``: position ids that restart at every document."""
    return torch.stack([torch.cat([torch.arange(length) for length in sample]) for sample in DOCUMENTS])


def step_data(model: Model) -> tuple[dict[str, Tensor], Tensor]:
    """``(user inputs by name, target)``: the whole batch in natural order.

    A third of the targets are ignored, unevenly: ranks, microbatches and samples have different numbers of them.
    """
    args, kwargs = draw(model, BATCH, SEQ, seed=100)
    names = CASES[model.case].seq_inputs if model.case in CASES else ()
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    generator = torch.Generator().manual_seed(200)
    target = torch.randint(3, VOCAB, (BATCH, SEQ), generator=generator)
    share = torch.linspace(0.1, 0.6, SEQ) * torch.linspace(0.5, 1.5, BATCH).unsqueeze(1)
    target = target.masked_fill(torch.rand(BATCH, SEQ, generator=generator) < share, IGNORED)
    if "position_ids" in inputs:
        inputs["position_ids"] = document_positions()
    if "labels" in inputs:
        inputs["labels"] = target
    return inputs, F.pad(target, (0, 1), value=IGNORED)[:, 1:] if model.shifted else target


# The single process -------------------------------------------------------------------------------------


class Double(TorchFunctionMode):
    """What asks for float32 gets float64: models cast norms, rotations and losses to float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces dtypes in the arguments."""
        if func is Tensor.float:
            return args[0].double()
        args = tuple(_wider(arg) for arg in args)
        return func(*args, **{key: _wider(value) for key, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def computing_in(dtype: str) -> Any:
    """Float64 throughout, or nothing changed for float32."""
    if dtype == "float32":
        yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def widened(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers in double precision, complex ones too."""
    module = module.double()
    for holder in module.modules():
        for name, value in [*holder._buffers.items(), *vars(holder).items()]:
            if isinstance(value, Tensor) and value.dtype in WIDER:
                setattr(holder, name, value.to(WIDER[value.dtype]))
    return module


def cross_entropy_sum(output: Any, target: Tensor) -> Tensor:
    """Summed over the valid tokens, in the precision of the logits."""
    logits = output if isinstance(output, Tensor) else output[0]
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class Reference:
    """Loss and gradients of the eager model on the whole batch, in natural order."""

    loss: float
    gradients: dict[str, Tensor]

    @property
    def largest(self) -> float:
        """Of all gradients' elements."""
        return max(float(gradient.abs().max()) for gradient in self.gradients.values())

    def error(self, name: str, gradient: Tensor) -> float:
        """Relative to the parameter's largest gradient, or to 1e-4 of the model's."""
        own = self.gradients[name]
        return float((gradient - own).abs().max()) / max(float(own.abs().max()), 1e-4 * self.largest)


@cache
def reference(name: str, dtype: str) -> Reference:
    """The eager model, trained for one step in one process."""
    model = MODELS[name]
    double = dtype == "float64"
    # torch has no grouped product in float64
    module = build(model, "batched_mm" if double and model.kind == "moe" else None)
    module = widened(module) if double else module
    inputs, target = step_data(model)
    with computing_in(dtype):
        output = module(**inputs)
        if model.loss_in_graph:
            loss = output if isinstance(output, Tensor) else output.loss
        else:
            logits = output if isinstance(output, Tensor) else output.logits
            loss = cross_entropy_sum(logits, target) / (target != IGNORED).sum()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert all(gradient.dtype == getattr(torch, dtype) for gradient in gradients.values())
    return Reference(float(loss.detach()), gradients)


def canonical_names(name: str) -> dict[str, str]:
    """Every FQN of a parameter -> the first FQN of that parameter: tied weights have several."""
    module = build(MODELS[name])
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {fqn: first.setdefault(id(parameter), fqn) for fqn, parameter in named}
