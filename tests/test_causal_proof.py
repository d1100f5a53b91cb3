"""What the prover knows is so: random masks, every value that it follows against the real one, at several lengths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

from buffer_lifting.causal_domain import Affine, Number, Steps, Unknown, Value, as_dtype, blocks, lowest
from buffer_lifting.causal_proof import prove_masks
from buffer_lifting.causal_rules import Prover
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.graph.sizes import Size
from buffer_lifting.ops import ATTENTION
from buffer_lifting.passes.causal_flags import _Tables
from buffer_lifting.passes.normalize import normalize

INF = float("inf")
LENGTHS = (2, 3, 4, 7, 12)
Build = Callable[[nn.Module, int], Tensor]


class RandomMask:
    """Draws expressions of a length: positions along rows or columns, masks, numbers under masks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mask(self, depth: int) -> Build:
        """A mask ``[S, S]`` of bool."""
        draw, few = self.random, self.random.randint(-2, 2)
        if depth == 0:
            kind = draw.choice(["compare", "compare", "tril", "triu", "causal", "causal", "table", "distance"])
        else:
            kinds = ["and", "or", "not", "transpose", "cut", "where", "numbers", "added", "xor", "index"]
            kind = draw.choice([*kinds, "and", "or"])
        if kind == "compare":
            name = draw.choice(["le", "lt", "ge", "gt", "eq", "ne"])
            left, right = self.positions(draw.choice([0, 1])), self.positions(draw.choice([0, 1]))
            return lambda m, s: getattr(torch, name)(left(m, s), right(m, s)).expand(s, s)
        if kind == "distance":
            left, right = self.positions(0), self.positions(1)
            return lambda m, s: (left(m, s) - right(m, s)) >= few
        if kind in ("tril", "triu"):
            return lambda m, s: getattr(torch.ones(s, s, dtype=torch.bool), kind)(few)
        if kind == "causal":
            return lambda m, s: torch.arange(s)[None] <= torch.arange(s)[:, None]
        if kind == "table":
            first = draw.randint(0, 2)
            return lambda m, s: m.table[first : s + first, :s]  # type: ignore[index]
        one, two, three = self.mask(depth - 1), self.mask(depth - 1), self.mask(0)
        builds: dict[str, Build] = {
            "and": lambda m, s: one(m, s) & two(m, s),
            "or": lambda m, s: torch.logical_or(one(m, s), two(m, s)),
            "xor": lambda m, s: one(m, s) ^ two(m, s),
            "not": lambda m, s: ~one(m, s),
            "transpose": lambda m, s: one(m, s).T,
            "cut": lambda m, s: one(m, s + 3)[abs(few) : s + abs(few), 1 : s + 1],
            "where": lambda m, s: torch.where(three(m, s), one(m, s), two(m, s)),
            "numbers": lambda m, s: torch.zeros(s, s).masked_fill(one(m, s), -INF) == (0.0 if few > 0 else -INF),
            "added": lambda m, s: (one(m, s).long() * 2 + two(m, s).long() - 1) > few,
            "index": lambda m, s: one(m, s)[torch.arange(s)[:, None], torch.arange(s)[None]],
        }
        return builds[kind]

    def positions(self, along: int) -> Build:
        """Integers ``[S, 1]`` or ``[1, S]``."""
        few, factor = self.random.randint(-2, 2), self.random.choice([1, 1, 1, 2, -1])
        kind = self.random.choice(["plain", "plain", "plus", "times", "down", "table", "doubled", "view", "const"])
        lines: dict[str, Build] = {
            "plain": lambda m, s: torch.arange(s),
            "plus": lambda m, s: torch.arange(few, s + few),
            "times": lambda m, s: torch.arange(s) * factor + few,
            "down": lambda m, s: s - 1 - torch.arange(s),
            "table": lambda m, s: m.index[abs(few) : s + abs(few)],  # type: ignore[index]
            "doubled": lambda m, s: torch.arange(0, 2 * s, 2)[:s] + few,
            "view": lambda m, s: torch.arange(2 * s)[1::2],
            "const": lambda m, s: torch.full((s,), few, dtype=torch.long),
        }
        line = lines[kind]
        return lambda m, s: line(m, s)[:, None] if along == 0 else line(m, s)[None]


class Masked(nn.Module):
    """Attention under a mask, which is an output as well."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.embedding, self.build = nn.Embedding(16, 4), build
        self.register_buffer("table", torch.ones(40, 40).tril().bool(), persistent=False)
        self.register_buffer("index", torch.arange(40), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)[:, None]
        mask = self.build(self, tokens.shape[1])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask), mask


def number_of(size: Size, length: int) -> int:
    """A size at a length; the graph has no other symbol than the length and the batch."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, coefficient in size.terms:
        for _, power in monomial:
            coefficient *= length**power
        total += coefficient
    return total


def expand(value: Value, shape: tuple[int, ...], length: int) -> Tensor:
    """All elements of a value that is known, as float64."""
    grid = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    if isinstance(value, Affine):
        result = torch.full(shape, number_of(value.const, length), dtype=torch.float64)
        for dim, coefficient in value.coefs:
            result += coefficient * grid[dim]
        return result
    assert isinstance(value, Steps)
    if not value.breaks:
        return torch.full(shape, float(value.values[0]), dtype=torch.float64)
    distance = (grid[value.pair[0]] - grid[value.pair[1]]).flatten().tolist()
    return torch.tensor([float(value.at(d)) for d in distance], dtype=torch.float64).view(shape)


def record_of(model: nn.Module, dynamic: bool) -> tuple[torch.export.ExportedProgram, GraphRecord]:
    """An export with 5 tokens, and its record."""
    dims = ({1: Dim("s", min=2, max=30)},) if dynamic else None
    program = export(model, (torch.zeros(1, 5, dtype=torch.long),), dynamic_shapes=dims)
    return program, build_record(program, normalize(program).graph)


@pytest.mark.parametrize("block", range(8))
def test_what_is_known_is_so(block: int) -> None:
    """Each value that is not unknown, element by element; a proof only where the mask is causal."""
    known = attempts = 0
    for seed in range(block * 10, block * 10 + 10):
        build = RandomMask(seed).mask(seed % 3)
        model = Masked(build)
        try:
            for length in (*LENGTHS, 5):
                model(torch.zeros(1, length, dtype=torch.long))
            program, record = record_of(model, dynamic=seed % 4 != 3)
        except Exception:  # an expression that does not run, or that has a length of its own
            continue
        attempts += 1
        prover = Prover(record, _Tables(program), documents=False)
        for name in record.nodes:
            prover.value(name)
        for length in LENGTHS if seed % 4 != 3 else (5,):
            real = _Values(program).run_on(torch.zeros(1, length, dtype=torch.long))
            for name, value in prover.known.items():
                if isinstance(value, Unknown) or not isinstance(real.get(name), Tensor):
                    continue
                tensor = real[name]
                known += 1
                assert torch.equal(expand(value, tuple(tensor.shape), length), tensor.double()), (seed, name, value)
            mask = model.build(model, length)
            (proof,) = prove_masks(record, _Tables(program), documents=False)
            if proof.causal:
                assert torch.equal(mask, torch.ones(length, length, dtype=torch.bool).tril()), seed
    assert attempts >= 8 and known > 250


class _Values(torch.fx.Interpreter):
    """Runs a normalised graph and keeps the value of every node."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        normalized = normalize(program)
        super().__init__(torch.fx.GraphModule(normalized.submodules, normalized.graph))
        self.program, self.values = program, dict[str, object]()

    def run_on(self, tokens: Tensor) -> dict[str, object]:
        """All values by node name."""
        signature = self.program.graph_signature
        states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {**self.program.state_dict, **self.program.constants}
        constants = signature.inputs_to_lifted_tensor_constants
        names = [node.name for node in self.module.graph.nodes if node.op == "placeholder"]
        args = [tensors[{**states, **constants}[n]] if n in states or n in constants else tokens for n in names]
        self.run(*args)
        return self.values

    def run_node(self, n: torch.fx.Node) -> object:
        self.values[n.name] = result = super().run_node(n)
        return result


def test_random_masks_that_are_causal_are_proven() -> None:
    """Most of those that are causal at every length, so that what is checked above is no empty claim."""
    causal = proven = 0
    for seed in range(400):
        if causal == 20:
            break
        build = RandomMask(seed).mask(seed % 2)
        model = Masked(build)
        try:
            real = [model.build(model, length) for length in LENGTHS]
        except Exception:
            continue
        if not all(torch.equal(m, torch.ones_like(m).tril()) for m in real):
            continue
        causal += 1
        program, record = record_of(model, dynamic=True)
        proven += prove_masks(record, _Tables(program))[0].causal
    assert causal == 20 and proven >= 0.8 * causal, (causal, proven)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_are_those_of_the_dtype(dtype: str) -> None:
    """What a cast gives, or nothing."""
    real = getattr(torch, dtype)
    assert lowest(dtype) == torch.finfo(real).min
    low = [torch.finfo(d).min for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    numbers: list[Number] = [0, 1, True, -1, 256, 257, 0.5, -1e4, -65504.0, -65519.0, -65520.0, -1e9, 2**24 + 1, -INF]
    for number in [*numbers, *low, *(2 * x for x in low), *(1.001 * x for x in low), *(1.003 * x for x in low)]:
        found = as_dtype(number, dtype)
        if found is not None:
            assert found == torch.tensor(float(number), dtype=torch.float64).to(real).double().item(), number
    assert as_dtype(lowest(dtype), dtype) == lowest(dtype) and as_dtype(float("nan"), dtype) is None
    assert as_dtype(-INF, dtype) == -INF and as_dtype(1, dtype) == 1.0


def test_what_blocks_a_key() -> None:
    """``-inf``; the lowest number, but not of float16."""
    assert blocks(-INF, "float16") and not blocks(-65504.0, "float16")
    assert blocks(lowest("float32"), "float32") and not blocks(-1e9, "float32") and not blocks(0.0, "float32")
    assert blocks(lowest("bfloat16"), "bfloat16") and not blocks(lowest("float32"), "float64")


def test_a_damaged_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A triangle that is off by one: the comparison above is no empty one."""
    from buffer_lifting import causal_rules

    whole = causal_rules._RULES["tril"]

    def off(prover: Prover, node: object) -> Value:
        value = whole(prover, node)  # type: ignore[arg-type]
        assert isinstance(value, Steps)
        return Steps(value.values, tuple(start + 1 for start in value.breaks), value.pair)

    model = Masked(lambda m, s: torch.ones(s, s, dtype=torch.bool).tril(-1))
    program, record = record_of(model, dynamic=True)
    assert not prove_masks(record, _Tables(program))[0].causal
    monkeypatch.setitem(causal_rules._RULES, "tril", off)
    prover = Prover(record, _Tables(program), documents=True)
    mask = next(n.args["attn_mask"] for n in record.nodes.values() if n.base_op == ATTENTION)
    value = prover.value(mask.name)  # type: ignore[union-attr]
    assert not torch.equal(expand(value, (5, 5), 5), model.build(model, 5).double())
