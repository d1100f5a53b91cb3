"""The examples of the rules do what their pages say: the bad one has the finding, and the good one has not."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention.flex_attention import flex_attention

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.inspection.rules import RULES

DIM, BATCH, LENGTH = 8, 4, 16
#: Examples that are sketches of graphs and stages: test_inspection_check.py has graphs of each kind.
SKETCHES = {"BL301", "BL302", "BL303"}
#: Not exported as forwards: run by tests of their own below.
ALONE = {"BL007", "BL101", "BL103", "BL106", "BL107", "BL203", "BL304", "BL901"}
ROWS = {0: "batch", 1: "seq"}
HEADS = {0: "batch", 2: "seq"}
SCORES = {0: "batch", 1: "seq:row", 2: "seq:col"}
AXES: dict[str, dict[int, str]] = {"x": ROWS, "tokens": ROWS, "mask": ROWS, "positions": ROWS, "scores": SCORES}
AXES |= {"q": HEADS, "k": HEADS, "v": HEADS, "lengths": {0: "batch"}}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "x": lambda: torch.randn(BATCH, LENGTH, DIM),
    "tokens": lambda: torch.randint(0, 9, (BATCH, LENGTH)),
    "mask": lambda: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "positions": lambda: torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
    "scores": lambda: torch.randn(BATCH, LENGTH, LENGTH),
    "lengths": lambda: torch.full((BATCH,), LENGTH),
    **{name: lambda: torch.randn(BATCH, 2, LENGTH, DIM) for name in "qkv"},
}


@torch.library.custom_op("mylib::fused_block", mutates_args=())
def fused_block(x: Tensor, weight: Tensor) -> Tensor:
    """An op of somebody's library."""
    return x @ weight


@fused_block.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Names(nn.Module):
    """Whatever the examples take from ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(64, DIM), nn.Embedding(64, DIM)
        self.pointer = nn.Linear(DIM, 64)
        for name, shape in {
            "freqs_cis": (64, DIM),
            "table": (64, DIM),
            "positions": (64, DIM),
            "bias": (64, 64),
        }.items():
            self.register_buffer(name, torch.randn(shape))
        self.register_buffer("inv_freq", torch.rand(DIM))


def namespace(**more: Any) -> dict[str, Any]:
    """What the examples take from around them."""
    weights = {name: torch.randn(DIM, DIM) for name in ("weight", "gate", "up")}
    return {"torch": torch, "F": F, "bl": bl, "rotate": lambda x, freqs: x * freqs, "S": LENGTH, **weights, **more}


def run(code: str, **more: Any) -> dict[str, Any]:
    """The names after an example."""
    names = namespace(**more)
    exec(textwrap.dedent(code), names)
    return names


def forward_of(code: str) -> str:
    """An example as a forward: fragments get their inputs as arguments, and give ``y``."""
    if code.startswith("def forward"):
        return code
    inputs = [name for name in ("q", "k", "v", "x") if re.search(rf"\b{name}\b", code)]
    return f"def forward(self, {', '.join(inputs)}):\n{textwrap.indent(code, '    ')}\n    return y"


def exported(code: str) -> tuple[ExportedProgram, dict[str, Tensor], dict[str, dict[int, str]]]:
    """The program of a forward, its inputs and their axes."""
    forward = run(forward_of(code))["forward"]
    names = forward.__code__.co_varnames[1 : forward.__code__.co_argcount]
    tensors = {name: INPUTS[name]() for name in names}
    model = type("Example", (Names,), {"forward": forward})()
    axes = {name: AXES[name] for name in names}
    shapes = tuple({dim: Dim.AUTO for dim in own} for own in axes.values())
    return torch.export.export(model, tuple(tensors.values()), dynamic_shapes=shapes), tensors, axes


def codes(program: Any, axes: Any = None) -> set[str]:
    """The codes of its findings."""
    return {item.code for item in bl.check(program, axes=axes)}


@pytest.mark.parametrize("code", sorted(set(RULES) - SKETCHES - ALONE))
def test_examples(code: str) -> None:
    rule = RULES[code]
    program, tensors, axes = exported(rule.bad)
    found = codes(program, axes)
    if code == "BL200":
        assert found == set(), "handled, so no finding"
        mixing = bl.scan(program, axes=axes).mixing
        assert [(item.code, item.handled) for item in mixing] == [("BL200", True)]
        return
    assert code in found and all(RULES[other].severity != "note" for other in found)
    if "bl.lift(" not in rule.good:
        program, _, axes = exported(rule.good)
        assert code not in codes(program, axes)
        return
    names = {"program": program, "order": torch.randperm(LENGTH), **tensors}
    good = rule.good
    if "tokens" in good and "tokens" not in tensors:  # the same lines are shown for several rules
        names["tokens"] = next(iter(tensors.values()))
    if axes.keys() & {"q", "x", "scores"}:
        good = good.replace("bl.lift(program)", "bl.lift(program, axes=axes)")
    assert codes(run(good, axes=axes, **names)["lifted"]) == set()


def test_flex_attention() -> None:
    torch.compiler.reset()  # what other tests have compiled: the reason of a recompilation may be an error of torch's
    causal = run(RULES["BL007"].bad)["causal"]

    class Flex(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: torch.where(causal(b, h, i, j), s, -1e9))

    program = torch.export.export(Flex(), (torch.randn(BATCH, 2, LENGTH, 16),))
    axes = {"q": HEADS}
    assert codes(program, axes) == {"BL007"}
    good = RULES["BL007"].good.replace("(program)", "(program, axes=axes)")
    assert codes(run(good, program=program, axes=axes)["lifted"]) == set()


def test_written_state() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(LENGTH, DIM))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.add_(1)
            return x + self.cache[: x.shape[1]]

    assert "BL101" in codes(torch.export.export(Cached(), (INPUTS["x"](),)), {"x": ROWS})
    config = LlamaConfig(
        hidden_size=DIM, intermediate_size=DIM, num_attention_heads=2, num_hidden_layers=1, vocab_size=16
    )
    model = run(RULES["BL101"].good, config=config, AutoModelForCausalLM=AutoModelForCausalLM)["model"]
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    tokens = torch.zeros(3, 11, dtype=torch.long)
    assert "BL101" not in codes(torch.export.export(model, (tokens,), dynamic_shapes=shapes))


def test_ambiguous_axes() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, DIM)

        def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
            return self.embedding(tokens) * weight[:, None, None]

    bad = run(RULES["BL103"].bad, model=Weighted())
    assert codes(bad["program"]) == {"BL103"}
    good = run(f"report = {RULES['BL103'].good}", program=bad["program"])
    assert not good["report"].findings


def test_no_sequence_axis() -> None:
    def export(model: nn.Module, args: tuple[Tensor, ...]) -> ExportedProgram:
        return torch.export.export(model, args)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    names: dict[str, Any] = {"export": export, "model": Two(), "features": torch.randn(64, 512)}
    found = {item.code for item in run(RULES["BL106"].bad, **names)["report"].findings}
    assert found == {"BL106"}
    assert not run(RULES["BL106"].good, **names)["report"].findings


def test_an_axis_that_is_born_inside() -> None:
    class Vision(nn.Module):
        def __init__(self, code: str) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, DIM, 4, 4)
            self.encoder = nn.TransformerEncoderLayer(DIM, 2, batch_first=True, dropout=0.0)
            self.run = run(code)["forward"].__get__(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    bad = torch.export.export(Vision(RULES["BL107"].bad).eval(), (torch.randn(2, 3, 16, 20),))
    assert "BL107" in codes(bad)
    good = torch.export.export(Vision(RULES["BL107"].good).eval(), (INPUTS["x"](),))
    assert "BL107" not in codes(good, {"x": ROWS})


@pytest.mark.parametrize("kind", ["bad", "good"])
def test_one_rank_and_several(kind: str) -> None:
    program, _, axes = exported(getattr(RULES["BL203"], kind))
    lifted = bl.lift(program, axes=axes)
    assert bl.context_parallel(lifted, size=1)
    if kind == "good":
        assert bl.context_parallel(lifted, size=2)
        return
    with pytest.raises(bl.UnsupportedReadError, match="BL203"):
        bl.context_parallel(lifted, size=2)


@pytest.mark.parametrize("kind", ["bad", "good"])
def test_a_length_that_became_a_constant(kind: str) -> None:
    program, _, axes = exported(getattr(RULES["BL304"], kind))
    assert ("BL304" in codes(bl.lift(program, axes=axes))) is (kind == "bad")


def test_a_target_that_cannot_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program, _, _ = exported("def forward(self, tokens):\n    return self.wte(tokens)")
    run(RULES["BL901"].good, program=program)
    assert main(["check", "model.pt2"]) == 0
    Path("model.pt2").write_bytes(Path("model.pt2").read_bytes()[:1000])
    assert main(["check", "model.pt2"]) == 2
    assert "BL901" in capsys.readouterr().err
