"""Every mistake gives one error, of the right class, that names the thing and the way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import export_case

import buffer_lifting as bl

VOCAB, DIM, TABLE = 17, 8, 32


def export(model: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> ExportedProgram:
    shapes = tuple({d: Dim.AUTO for d in range(min(2, a.ndim))} for a in args) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, DIM)
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.register_buffer("freqs_cis", torch.randn(TABLE, DIM))

    def body(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.freqs_cis[: tokens.shape[-1]]
        return self.second(self.first(x).tanh())


class Plain(Base):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)


class Named(Base):
    """A user input that has the name of a lifted one."""

    def forward(self, tokens: Tensor, lifted_freqs_cis: Tensor) -> Tensor:
        return self.body(tokens) * lifted_freqs_cis[..., None]


class Target(Base):
    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.body(tokens) * target[..., None]


class Losses(Base):
    def forward(self, tokens: Tensor, losses: Tensor) -> Tensor:
        return self.body(tokens) * losses[..., None]


class Pooled(Base):
    """Mixes the sequence in a way that is not handled; ``how`` says in which."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, tokens: Tensor) -> Tensor:
        return self.how(self.body(tokens))


class Vision(nn.Module):
    """Image patches: the sequence axis is born inside."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 16, DIM))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.pos
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


class Cache(Plain):
    """Writes its keys into a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("kv_cache", torch.zeros(2, TABLE, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(tokens)
        s = tokens.shape[1]
        if self.how == "copy_":
            self.kv_cache[:, :s].copy_(x.detach())
        else:
            self.kv_cache[:, torch.arange(s)] = x.detach()
        return x + self.kv_cache[:, :s]


def tokens(batch: int = 2, seq: int = 8) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def static() -> Any:
    return bl.lift(export(Plain(), tokens()))


@pytest.fixture(scope="module")
def dynamic() -> Any:
    return bl.lift(export(Plain(), tokens(3, 7), dynamic=True))


@pytest.fixture(scope="module")
def hf() -> Any:
    return bl.lift(export_case("hf_llama")[1])


def refused(error: type[Exception], words: list[str], call: Callable[[], Any], *programs: ExportedProgram) -> None:
    """``call`` raises ``error`` with all of ``words``, and the programs stay what they were."""
    before = [(str(p.graph), str(p.graph_signature)) for p in programs]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert [(str(p.graph), str(p.graph_signature)) for p in programs] == before


# Programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [bl.scan, bl.lift])
@pytest.mark.parametrize("thing", [None, "model.pt2", Plain()], ids=["none", "path", "module"])
def test_not_a_program(call: Callable[..., Any], thing: Any) -> None:
    refused(TypeError, ["ExportedProgram", type(thing).__name__, "torch.export.export"], lambda: call(thing))


def test_not_a_lifted_program() -> None:
    ep = export(Plain(), tokens())
    refused(TypeError, ["ExportedProgram", "lift"], lambda: bl.partition(ep, num_stages=2), ep)


def test_no_sequence_axis() -> None:
    ep = export(nn.Linear(4, 4), torch.randn(2, 4))
    refused(bl.AxesError, ["no user input has a sequence axis", "input", "axes="], lambda: bl.lift(ep), ep)
    assert [finding.code for finding in bl.scan(ep).findings] == ["BL106"]


def test_sequence_axis_born_inside() -> None:
    ep = export(Vision(), torch.randn(2, 3, 16, 16))
    words = ["pixels", "born inside the graph", "behind the embedding"]
    refused(bl.AxesError, words, lambda: bl.lift(ep), ep)
    assert [finding.code for finding in bl.scan(ep).findings] == ["BL107"]


def test_ambiguous_axes() -> None:
    class Weighted(Base):
        def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
            return self.body(tokens) * weight[:, None]

    ep = export(Weighted(), tokens(8, 8), torch.randn(8))
    words = ["weight", "both the batch size and the sequence length", "axes=", "distinct sizes"]
    refused(bl.AxesError, words, lambda: bl.lift(ep), ep)
    assert [f.code for f in bl.scan(ep).findings] == ["BL103"]


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"nothing": {0: "batch"}}, ["nothing", "tokens"]),
        ({"tokens": {0: "batch", 2: "seq"}}, ["dim 2", "tokens", "2 dims"]),
        ({"tokens": {0: "seq", 1: "seq"}}, ["seq", "tokens", "8", "2"]),
    ],
    ids=["input", "dim", "sizes"],
)
def test_bad_axes(axes: Any, words: list[str]) -> None:
    ep = export(Plain(), tokens())
    refused(bl.AxesError, words, lambda: bl.lift(ep, axes=axes), ep)
    refused(bl.AxesError, words, lambda: bl.scan(ep, axes=axes), ep)


@pytest.mark.parametrize("form", ["value", {"freqs_cis": "rows"}])
def test_unknown_form(form: Any) -> None:
    ep = export(Plain(), tokens())
    refused(
        ValueError,
        ["values", "positions", "auto", "value" if form == "value" else "rows"],
        lambda: bl.lift(ep, form=form),
        ep,
    )


@pytest.mark.parametrize("how", ["copy_", "index_put_"])
def test_written_buffer(how: str) -> None:
    ep = export(Cache(how), tokens())
    refused(bl.UnsupportedReadError, ["kv_cache", "cache", "BL101"], lambda: bl.lift(ep), ep)
    loose = bl.lift(ep, strict=False)
    refused(bl.PartitionError, ["kv_cache", "without its cache"], lambda: bl.partition(loose, split_points=["second"]))


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean": (lambda x: x.mean(1), "'mean'"),
    "roll": (lambda x: x.roll(1, 1), "'roll'"),
    "cumsum": (lambda x: x.cumsum(1), "'cumsum'"),
    "last": (lambda x: x[:, -1], "'select'"),
    "conv1d": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(DIM, DIM, 3)), "'conv1d'"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused_unless_loose(name: str) -> None:
    how, node = MIXING[name]
    ep = export(Pooled(how), tokens())
    refused(bl.UnsupportedReadError, [node, "test_bad_input.py:", "strict=False"], lambda: bl.lift(ep), ep)
    lifted = bl.lift(ep, strict=False)
    assert [item.name for item in lifted.inputs] == ["lifted_freqs_cis"]
    x = tokens()
    assert torch.equal(lifted.program.module()(x, **lifted.feed(2, 8)), ep.module()(x))


def test_name_that_is_taken() -> None:
    x, weight = tokens(), torch.randn(2, 8)
    ep = export(Named(), x, weight)
    lifted = bl.lift(ep, axes={"lifted_freqs_cis": {0: "batch", 1: "seq"}})
    assert [item.name for item in lifted.inputs] == ["lifted_freqs_cis_1"]
    assert torch.equal(lifted.program.module()(x, weight, **lifted.feed(2, 8)), ep.module()(x, weight))


@pytest.mark.parametrize("model, name", [(Target, "target"), (Losses, "losses")])
def test_names_that_a_schedule_keeps(model: type[Base], name: str) -> None:
    lifted = bl.lift(export(model(), tokens(), torch.randn(2, 8)), axes={name: {0: "batch", 1: "seq"}})
    words = [name, "schedule", "rename"]
    refused(bl.PartitionError, words, lambda: bl.partition(lifted, split_points=["second"]), lifted.program)


def test_flat_tokens() -> None:
    x = torch.randint(0, VOCAB, (11,))
    model = Plain()
    ep = export(model, x, dynamic=True)
    lifted = bl.lift(ep)
    assert [item.batched for item in lifted.inputs] == [False]
    feed = lifted.feed(1, 11)
    assert feed["lifted_freqs_cis"].shape == (11, DIM)
    assert torch.equal(lifted.program.module()(x, **feed), model(x))
    staged = bl.partition(lifted, split_points=["second"])
    assert torch.equal(staged(x, **feed), model(x))
    refused(bl.PartitionError, ["flat tokens", "kwarg_mbs"], staged.kwargs_chunk_spec)


# The feed ------------------------------------------------------------------------------------------------

TWICE = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
FEEDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "range": ({"order": torch.arange(1, 9)}, ["order", "8", "0..7"]),
    "negative": ({"order": torch.arange(-1, 7)}, ["order", "-1", "0..7"]),
    "twice": ({"order": torch.stack([torch.arange(8), TWICE])}, ["order", "sample 1", "twice"]),
    "length": ({"order": torch.arange(7)}, ["order", "(7,)", "(8,)"]),
    "dtype": ({"order": torch.arange(8.0)}, ["order", "integer", "float32"]),
    "bool": ({"order": torch.ones(8, dtype=torch.bool)}, ["order", "integer", "bool"]),
    "rows": ({"order": torch.arange(8).expand(3, 8)}, ["order", "3 rows", "batch of 2"]),
    "dims": ({"order": torch.arange(8).view(1, 1, 8)}, ["order", "(1, 1, 8)"]),
    "list": ({"order": list(range(8))}, ["order", "tensor", "list"]),
    "positions": ({"positions": torch.arange(8) + 1}, ["positions", "8", "0..7"]),
    "positions_dtype": ({"positions": torch.rand(8)}, ["positions", "integer"]),
    "positions_length": ({"positions": torch.arange(9)}, ["positions", "(9,)"]),
    "divides": ({"shard": (0, 3)}, ["8", "3 shards"]),
    "rank": ({"shard": (2, 2)}, ["shard", "0..1"]),
    "shard": ({"shard": 1}, ["shard", "(rank, size)"]),
}


@pytest.mark.parametrize("name", FEEDS)
def test_bad_feed(dynamic: Any, name: str) -> None:
    kwargs, words = FEEDS[name]
    refused(bl.FeedError, words, lambda: dynamic.feed(2, 8, **kwargs), dynamic.program)


@pytest.mark.parametrize("batch, length", [(0, 8), (-1, 8), (True, 8), (2, 0), (2, 8.0), ("2", 8)])
def test_bad_sizes(dynamic: Any, batch: Any, length: Any) -> None:
    refused(bl.FeedError, ["positive integer"], lambda: dynamic.feed(batch, length))


def test_sequence_longer_than_the_table(dynamic: Any) -> None:
    refused(bl.FeedError, ["33", "seq", "32"], lambda: dynamic.feed(2, TABLE + 1))
    assert dynamic.feed(2, TABLE)["lifted_freqs_cis"].shape == (2, TABLE, DIM)


def test_static_program_fed_other_sizes(static: Any) -> None:
    refused(bl.AxesError, ["static batch of 2", "batch of 3", "torch.export.Dim"], lambda: static.feed(3, 8))
    refused(bl.AxesError, ["static sequence of 8", "9", "torch.export.Dim"], lambda: static.feed(2, 9))
    refused(bl.FeedError, ["static", "size 2", "dynamic"], lambda: static.feed(2, 8, shard=(0, 2)))


def test_shard_of_another_size(hf: Any, dynamic: Any) -> None:
    refused(bl.FeedError, ["context_parallel(lifted, size=2)"], lambda: hf.feed(2, 8, shard=(0, 2)))
    cp = bl.context_parallel(dynamic)
    refused(bl.FeedError, ["size 2", "size of 1"], lambda: cp.feed(2, 8, shard=(0, 2)))


def test_hoisted_inputs_are_asked_for() -> None:
    lifted = bl.lift(export_case("hf_llama_labels")[1])
    refused(bl.FeedError, ["'labels'", "inputs="], lambda: lifted.feed(2, 8))
    short = {"labels": torch.zeros(2, 7, dtype=torch.int64)}
    refused(bl.FeedError, ["'labels'", "(2, 7)", "size 8"], lambda: lifted.feed(2, 8, inputs=short))


def test_shard_inputs(dynamic: Any) -> None:
    refused(bl.FeedError, ["'token'", "tokens"], lambda: dynamic.shard_inputs(token=tokens()))
    refused(bl.FeedError, ["tokens", "1 dims", "2"], lambda: dynamic.shard_inputs(tokens=tokens()[0]))


def test_bind_tables() -> None:
    with torch.device("meta"):
        model = Plain()
        ep = export(model, torch.zeros(2, 8, dtype=torch.int64))
    lifted = bl.lift(ep)
    refused(bl.FeedError, ["freqs_cis", "bind_tables"], lambda: lifted.feed(2, 8))
    refused(bl.FeedError, ["freqs_cis", "no values are given"], lambda: lifted.bind_tables({}))
    wrong = {"freqs_cis": torch.zeros(TABLE, DIM + 1)}
    refused(bl.FeedError, ["freqs_cis", "(32, 9)", "(32, 8)"], lambda: lifted.bind_tables(wrong))
    table = torch.randn(TABLE, DIM)
    lifted.bind_tables({"freqs_cis": table})
    assert torch.equal(lifted.feed(2, 8)["lifted_freqs_cis"], table[:8].expand(2, 8, DIM))


def test_context_parallel(static: Any) -> None:
    cp = bl.context_parallel(static)
    refused(bl.LiftingError, ["already", "size 1"], lambda: bl.context_parallel(cp))
    sharded = ["static sequence", "'seq'", "export with a dynamic sequence"]
    refused(bl.UnsupportedReadError, sharded, lambda: bl.context_parallel(static, size=2), static.program)
    refused(bl.LiftingError, ["strategy", "'rings'"], lambda: bl.context_parallel(static, strategy="rings"))


# Stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2"])
def test_bad_number_of_stages(hf: Any, count: Any) -> None:
    refused(bl.PartitionError, ["num_stages", "positive integer"], lambda: bl.partition(hf, num_stages=count))


SPLITS: dict[str, tuple[Any, list[str]]] = {
    "unknown": (["model.layer.1"], ["'model.layer.1'", "did you mean", "'model.layers.1'"]),
    "order": (["model.norm", "model.layers.1"], ["'model.layers.1'", "does not come after", "'model.norm'"]),
    "twice": (["model.layers.1", "model.layers.1"], ["'model.layers.1'", "each once"]),
    "first": (["model.embed_tokens"], ["'model.embed_tokens'", "stage 0 would be empty"]),
    "chain": (["model.rotary_emb"], ["'model.rotary_emb'", "inside a lifted chain"]),
    "string": ("model.layers.1", ["split_points", "sequence of module FQNs"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_bad_split_points(hf: Any, name: str) -> None:
    points, words = SPLITS[name]
    refused(bl.PartitionError, words, lambda: bl.partition(hf, split_points=points), hf.program)


def test_both_neither_and_too_many(hf: Any) -> None:
    refused(bl.PartitionError, ["num_stages", "split_points"], lambda: bl.partition(hf))
    points = ["model.layers.1"]
    refused(bl.PartitionError, ["either"], lambda: bl.partition(hf, num_stages=2, split_points=points))
    words = ["num_stages=5", "2 layers", "model.layers.0", "at most 4 stages"]
    refused(bl.PartitionError, words, lambda: bl.partition(hf, num_stages=5))


def test_stage_out_of_range(hf: Any) -> None:
    staged = bl.partition(hf, num_stages=2)
    for index in (2, -1, "0"):
        refused(bl.PartitionError, [repr(index), "2 stages"], lambda index=index: staged.build_stage(index, "cpu"))


def test_microbatches_that_do_not_divide(static: Any, dynamic: Any) -> None:
    staged = bl.partition(static, split_points=["second"])
    refused(bl.FeedError, ["batch of 5", "microbatches of 2"], lambda: staged.feed(5, 8))
    refused(bl.FeedError, ["batch of 4", "3 microbatches"], lambda: staged.feed(4, 8, n_microbatches=3))
    refused(bl.FeedError, ["static batch of 2"], lambda: staged.feed(4, 8, n_microbatches=1))
    assert staged.feed(4, 8, n_microbatches=2)["lifted_freqs_cis"].shape == (4, 8, DIM)
    other = bl.partition(dynamic, split_points=["second"])
    refused(bl.FeedError, ["batch of 4", "3 microbatches"], lambda: other.feed(4, 8, n_microbatches=3))
    refused(bl.PartitionError, ["nothing"], lambda: other.kwargs_chunk_spec(["nothing"]))
