"""What the demo trains: transformers' Llama, unedited, with small random weights, or a model of the user's."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from buffer_lifting.demo import data
from buffer_lifting.demo.ranks import DemoError
from buffer_lifting.targets import TargetError, call_target
from buffer_lifting.token_loss import cross_entropy_sum
from buffer_lifting.torch_compat import tree_flatten

#: Plain SGD: its steps are as exact as the gradients. Adam divides a gradient that is zero but for rounding
#: by its own size, and the two runs would drift apart by that.
LEARNING_RATE = 0.1
STAGES, RANKS = 2, 2

Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and the batches of its training.

    Attributes:
        name: for headings.
        model: its first output is the logits ``[batch, seq, vocabulary]``.
        batch: step -> the keyword inputs, and the labels ``[batch, seq]`` of the logits (-100: does not count). It is
            called once for each step, in their order.
    """

    name: str
    model: nn.Module
    batch: Callable[[int], Batch]


def llama(layers: int, seed: int) -> Subject:
    """The demo's own model, on the demo's text."""
    return Subject("LlamaForCausalLM", build_model(layers, seed), lambda step: _text_batch("input_ids", step, seed))


def load_subject(target: str, seed: int) -> Subject:
    """The model of ``package.module:callable``.

    The callable takes no arguments and returns a module, which is given the demo's text (bytes, so a vocabulary of
    256 or more) as its first input; or a pair ``(module, batch)``: ``batch(step)`` returns the keyword inputs
    of a step and its labels, ``[batch, seq]``. The subject keeps what it returned for step 0, which is checked here.

    Raises:
        TargetError: it returns something else, the batches do not suit two stages and two context-parallel ranks, or
            the model computes something else each time, or no logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = call_target(target)
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (batch is None or callable(batch)):
        raise TargetError(
            f"{target}: returned {type(made).__name__}; demo takes a torch.nn.Module, or a pair of one and a callable "
            "batch(step) -> (inputs by keyword, labels)"
        )
    if batch is None:
        name = next(iter(inspect.signature(model.forward).parameters), "")

        def batch(step: int) -> Batch:
            return _text_batch(name, step, seed)

    first = cache(lambda: batch(0))  # looked at before the training; it may be another one the next time
    subject = Subject(type(model).__name__, model, lambda step: batch(step) if step else first())
    _check(target, subject)
    return subject


def batch_of(subject: Subject, step: int) -> Batch:
    """A step's batch.

    Raises:
        DemoError: ``batch(step)`` fails or returns something else, or does not suit two stages and two
            context-parallel ranks.
    """
    try:
        inputs, labels = subject.batch(step)
        shape = tuple(labels.shape)
        others = sorted(name for name, value in inputs.items() if not isinstance(value, Tensor))
    except Exception as error:
        kind = type(error).__name__
        raise DemoError(f"batch({step}) gives no pair (inputs by keyword, labels): {kind}: {error}") from error
    if others:
        raise DemoError(f"batch({step}): the inputs {', '.join(others)} are no tensors")
    if len(shape) != 2 or labels.dtype != torch.int64 or not all(shape) or shape[0] % STAGES or shape[1] % (2 * RANKS):
        raise DemoError(
            f"batch({step}): labels are {labels.dtype} {shape}; demo takes int64 [batch, seq] with an even batch and a "
            f"sequence that divides by {2 * RANKS}"
        )
    if not bool((labels != data.IGNORED).any()):
        raise DemoError(f"batch({step}): no label counts, all are {data.IGNORED}")
    return inputs, labels


def _check(target: str, subject: Subject) -> None:
    try:
        inputs, labels = batch_of(subject, 0)
    except DemoError as error:
        raise TargetError(f"{target}: {error}") from error
    shape = tuple(labels.shape)
    try:
        with torch.no_grad():
            first, again = logits_of(subject.model(**inputs)), logits_of(subject.model(**inputs))
    except Exception as error:
        raise TargetError(f"{target}: the model does not run on batch(0): {type(error).__name__}: {error}") from error
    if first.shape[:-1] != labels.shape or first.ndim != 3:
        raise TargetError(f"{target}: the first output is {tuple(first.shape)}, not logits [{shape[0]}, {shape[1]}, *]")
    if not torch.equal(first, again):
        raise TargetError(
            f"{target}: the model computes something else each time (dropout?): there is nothing to compare with"
        )


def _text_batch(name: str, step: int, seed: int) -> Batch:
    tokens, labels = data.batch(step, seed)
    return {name: tokens}, labels


def build_model(layers: int, seed: int) -> nn.Module:
    """The model; the same arguments give the same weights.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=data.VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        attention_dropout=0.0,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def export_model(model: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """The exported program; every dim that the model leaves open is dynamic."""
    shapes: dict[str, Any] = {name: dict.fromkeys(range(value.ndim), Dim.AUTO) for name, value in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def make_stages(program: ExportedProgram) -> Any:
    """The program lifted, its attention made that of two context-parallel ranks, and split in two."""
    import buffer_lifting as bl

    return bl.partition(bl.context_parallel(bl.lift(program), size=RANKS), num_stages=STAGES)


def logits_of(output: Any) -> Tensor:
    """The first tensor of an output: a tensor, a tuple, or a ModelOutput."""
    first: Tensor = tree_flatten(output)[0][0]
    return first


def mean_loss(output: Any, labels: Tensor) -> Tensor:
    """The cross entropy of one process: the mean over the labels that count."""
    return cross_entropy_sum(logits_of(output), labels) / (labels != data.IGNORED).sum()
