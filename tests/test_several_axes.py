"""Programs with two sequence axes of different names and lengths: encoder-decoders through the whole library."""

from __future__ import annotations

import json
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import mutants as m
import pytest
import torch
from test_verify import caught
from torch import Tensor, nn
from torch.export import Dim
from zoo.seq2seq import DIM, TABLE, VOCAB, export_seq2seq, padding_mask, tokens

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.streams import Streams

BATCH, SRC, TGT = 3, 12, 8
LENGTHS = {"seq": SRC, "tgt": TGT}
NAMED: dict[str, Any] = {"src": {0: "batch", 1: "enc"}, "tgt": {0: "batch", 1: "dec"}}


@cache
def program_of(name: str, dynamic: bool = True, src: int = 11, tgt: int = 7, mask: bool = False) -> Any:
    """One export; nothing below changes it."""
    return export_seq2seq(name, dynamic, src, tgt, mask)[1]


def order_of(length: int, seed: int, rows: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])


def orders() -> dict[str, Tensor]:
    return {"seq": order_of(SRC, 1), "tgt": order_of(TGT, 2)}


def rows_of(report: bl.ScanReport) -> dict[str, tuple[int | None, tuple[tuple[int, str, str], ...]]]:
    return {own.name: (own.batch_dim, own.seq_dims) for own in report.inputs}


# Inference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_have_axes_of_their_own(dynamic: bool) -> None:
    report = bl.scan(program_of("rope", dynamic, mask=True))
    assert rows_of(report) == {
        "src": (0, ((1, "seq", "row"),)),
        "tgt": (0, ((1, "tgt", "row"),)),
        "src_mask": (0, ((1, "seq", "col"),)),  # keys alone read it
    }
    assert not report.refused


@pytest.mark.parametrize("dynamic", [True, False])
def test_inputs_of_bart(dynamic: bool) -> None:
    report = bl.scan(program_of("bart", dynamic, mask=True))
    assert rows_of(report) == {
        "input_ids": (0, ((1, "seq", "row"),)),
        "attention_mask": (0, ((1, "seq", "row"),)),  # indexed, and so hoisted: the input itself is not read
        "decoder_input_ids": (0, ((1, "decoder", "row"),)),
        "decoder_attention_mask": (0, ((1, "decoder", "row"),)),
    }
    assert not report.refused


class Attend(nn.Module):
    """Cross attention of the first input to the others; learned positions in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.table = nn.Embedding(VOCAB, DIM), nn.Embedding(TABLE, DIM)

    def attend(self, *inputs: Tensor) -> Tensor:
        first, *others = (value if value.is_floating_point() else self.embedding(value) for value in inputs)
        first = first + self.table(torch.arange(first.shape[1]))
        for other in others:
            first = first + nn.functional.scaled_dot_product_attention(first, other, other)
        return first


def attending(dynamic: bool = True, **inputs: Tensor) -> Any:
    """The export of a model whose inputs have these names."""
    names = ", ".join(inputs)
    made: dict[str, Any] = {}
    exec(f"def forward(self, {names}): return self.attend({names})", made)
    model = type("Attending", (Attend,), {"forward": made["forward"]})()
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


HIDDEN = torch.zeros(BATCH, 9, DIM)
OPENED = {
    "tokens": ({"input_ids": tokens(BATCH, 11, 0), "decoder_input_ids": tokens(BATCH, 7, 0)}, ["seq", "decoder"]),
    "states": ({"decoder_input_ids": tokens(BATCH, 7, 0), "encoder_hidden_states": HIDDEN}, ["seq", "encoder"]),
    "same_size": ({"input_ids": tokens(BATCH, 11, 0), "labels": tokens(BATCH, 11, 0)}, ["seq", "seq"]),
    "three": (
        {"a_ids": tokens(BATCH, 11, 0), "b_ids": tokens(BATCH, 7, 0), "c": tokens(BATCH, 5, 0)},
        ["seq", "b", "c"],
    ),
    "same_name": (
        {"a_ids": tokens(BATCH, 11, 0), "seq_ids": tokens(BATCH, 7, 0), "batch": tokens(BATCH, 5, 0)},
        ["seq", "seq_ids", "batch_2"],
    ),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("case", OPENED)
def test_names_of_axes(case: str, dynamic: bool) -> None:
    inputs, names = OPENED[case]
    report = bl.scan(attending(dynamic, **inputs))
    assert [axis for own in report.inputs for _, axis, _ in own.seq_dims] == names
    assert [own.batch_dim for own in report.inputs] == [0] * len(inputs)


@pytest.mark.parametrize("dynamic", [True, False])
def test_equal_lengths_are_asked_for(dynamic: bool) -> None:
    """Whether two sides of one length are one sequence is not known: never assumed."""
    program = program_of("rope", dynamic, 8, 8)
    (finding,) = bl.scan(program).findings
    assert finding.code == "BL103"
    assert all(word in finding.message + finding.hint for word in ("'tgt'", "'src'", "8", "axes=", "distinct lengths"))
    with pytest.raises(bl.AxesError, match=r"BL103.*'tgt'"):
        bl.lift(program)
    one = {"src": {0: "batch", 1: "seq"}, "tgt": {0: "batch", 1: "seq"}}
    assert list(bl.lift(program, axes=one).axes.lengths) == ["seq"]
    assert list(bl.lift(program, axes=NAMED).axes.lengths) == ["enc", "dec"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_mask_of_either_side_is_asked_for(dynamic: bool) -> None:
    program = program_of("bart", dynamic, 8, 8, True)
    sides: Any = {"input_ids": {0: "batch", 1: "enc"}, "decoder_input_ids": {0: "batch", 1: "dec"}}
    findings = bl.scan(program, sides).findings
    if not dynamic:  # a dynamic program states which: the mask has the symbol of its tokens, or its own
        assert [f.code for f in findings] == ["BL103", "BL103"]
        assert "'attention_mask'" in findings[0].message and "'enc' and 'dec'" in findings[0].message
    sides |= {"attention_mask": {0: "batch", 1: "enc"}, "decoder_attention_mask": {0: "batch", 1: "dec"}}
    assert not bl.scan(program, sides).refused


def test_axes_of_one_side_alone() -> None:
    """What is not named is still inferred."""
    report = bl.scan(program_of("rope"), {"tgt": {0: "batch", 1: "dec"}})
    assert [own.seq_dims for own in report.inputs] == [((1, "seq", "row"),), ((1, "dec", "row"),)]
    report = bl.scan(program_of("rope"), {"src": {0: "batch", 1: "enc"}})
    assert [own.seq_dims for own in report.inputs] == [((1, "enc", "row"),), ((1, "tgt", "row"),)]


def test_an_input_without_a_sequence() -> None:
    inputs = {"input_ids": tokens(BATCH, 11, 0), "image_embeds": HIDDEN}
    program = attending(**inputs)
    assert [own.seq_dims for own in bl.scan(program, {"image_embeds": {0: "batch"}}).inputs] == [
        ((1, "seq", "row"),),
        (),
    ]


# Reads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", ["distance", "table", "written"])
def test_reads_along_both_axes(name: str, dynamic: bool) -> None:
    """The bias of cross attention is read along the decoder in its rows, along the encoder in its columns."""
    reads = bl.scan(program_of(name, dynamic)).reads
    rope = [read for read in reads if read.source == "freqs_cis"]
    axes = [read.seq_dims[0][1:] for read in rope]
    # queries and keys of two encoder layers; then of self and cross attention in two decoder layers
    assert axes == [("seq", "row")] * 4 + [("tgt", "row"), ("tgt", "row"), ("tgt", "row"), ("seq", "row")] * 2
    across = [read for read in reads if [axis for _, axis, _ in read.seq_dims] == ["tgt", "seq"]]
    assert len(across) == 2  # one a decoder layer
    assert {tuple(role for *_, role in read.seq_dims) for read in across} == {("row", "col")}
    causal = [read for read in reads if [dim[1:] for dim in read.seq_dims] == [("tgt", "row"), ("tgt", "col")]]
    assert len(causal) == 2
    assert all(read.refusal is None for read in reads)


def test_lifted_inputs_are_named_after_their_axes() -> None:
    lifted = bl.context_parallel(bl.lift(program_of("table")))
    assert [(item.name, item.axis, item.role) for item in lifted.inputs] == [
        ("lifted_freqs_cis", "seq", "row"),
        ("lifted_freqs_cis_tgt", "tgt", "row"),
        ("lifted_tgt_slots", "tgt", "row"),
        ("lifted_slots_keys", "seq", "col"),
        ("lifted_tgt_slots_keys", "tgt", "col"),
    ]


class Meeting(nn.Module):
    """Elements of two sequences meet; ``how`` says in which op."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding, self.how = nn.Embedding(VOCAB, DIM), how

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        x, y = self.embedding(src), self.embedding(tgt)
        if self.how == "add":
            return x + y
        if self.how == "cat":
            return torch.cat([x, y], 1)
        if self.how == "keys and values":
            return nn.functional.scaled_dot_product_attention(y, x, y)
        if self.how == "causal":
            return nn.functional.scaled_dot_product_attention(y, x, x, is_causal=True)
        scores = (y @ x.transpose(1, 2)).softmax(-1)
        return scores @ y


@pytest.mark.parametrize("how", ["add", "cat", "keys and values", "causal", "written"])
def test_sequences_that_meet_are_refused(how: str) -> None:
    """With axes of their own, two sequences have orders of their own: nothing may pair their elements."""
    program = torch.export.export(Meeting(how), (tokens(BATCH, 8, 0), tokens(BATCH, 8, 1)))
    with pytest.raises(bl.UnsupportedReadError, match="BL201"):
        bl.lift(program, axes=NAMED)


# Feed and shards ----------------------------------------------------------------------------------------


def brute(table: Tensor, order: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table at the position ids of the slots, in a loop."""
    return torch.stack([torch.stack([table[int(positions[b, int(slot)])] for slot in order[b]]) for b in range(BATCH)])


def test_feed_follows_the_order_of_each_axis() -> None:
    lifted = bl.context_parallel(bl.lift(program_of("table")))
    table = lifted.feed_program.state["freqs_cis"]
    both = orders()
    positions = {"tgt": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 1, 2, 0, 1]])}
    feed = lifted.feed(BATCH, LENGTHS, order=both, positions=positions)
    natural = torch.arange(SRC).expand(BATCH, -1)
    assert torch.equal(feed["lifted_freqs_cis"], brute(table, both["seq"], natural))
    assert torch.equal(feed["lifted_freqs_cis_tgt"], brute(table, both["tgt"], positions["tgt"]))
    for name, axis in (("lifted_tgt_slots", "tgt"), ("lifted_tgt_slots_keys", "tgt"), ("lifted_slots_keys", "seq")):
        assert torch.equal(feed[name], both[axis])  # masks go by slot, not by position id


def test_an_axis_without_an_order_is_natural() -> None:
    lifted = bl.lift(program_of("rope"))
    feed = lifted.feed(BATCH, LENGTHS, order={"tgt": orders()["tgt"]})
    plain = lifted.feed(BATCH, LENGTHS)
    assert torch.equal(feed["lifted_freqs_cis"], plain["lifted_freqs_cis"])
    assert not torch.equal(feed["lifted_freqs_cis_tgt"], plain["lifted_freqs_cis_tgt"])
    assert plain["lifted_freqs_cis"].stride(0) == 0


def test_shards_of_each_axis() -> None:
    lifted, both = bl.lift(program_of("rope")), orders()
    whole = lifted.feed(BATCH, LENGTHS, order=both)
    parts = [lifted.feed(BATCH, LENGTHS, order=both, shard=(rank, 2)) for rank in range(2)]
    for name, value in whole.items():
        assert parts[0][name].shape[1] == value.shape[1] // 2
        assert torch.equal(torch.cat([part[name] for part in parts], 1), value)


def test_shard_inputs() -> None:
    lifted, both = bl.lift(program_of("rope", mask=True)), orders()
    inputs = {"src": tokens(BATCH, SRC, 3), "tgt": tokens(BATCH, TGT, 4), "src_mask": padding_mask(BATCH, SRC)}
    got = lifted.shard_inputs(order=both, shard=(1, 2), **inputs)
    assert torch.equal(got["src"], inputs["src"].gather(1, both["seq"][:, SRC // 2 :]))
    assert torch.equal(got["tgt"], inputs["tgt"].gather(1, both["tgt"][:, TGT // 2 :]))
    assert torch.equal(got["src_mask"], inputs["src_mask"].gather(1, both["seq"]))  # keys want the whole sequence
    only = lifted.shard_inputs(order={"seq": both["seq"]}, **inputs)
    assert torch.equal(only["tgt"], inputs["tgt"]) and torch.equal(only["src"], inputs["src"].gather(1, both["seq"]))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (bl.AxesError, ["several sequence axes", "seq", "tgt", "mapping"], {"seq_len": 12}),
        (bl.AxesError, ["no length", "tgt"], {"seq_len": {"seq": 12}}),
        (bl.AxesError, ["decoder", "seq", "tgt"], {"seq_len": {**LENGTHS, "decoder": 4}}),
        (bl.FeedError, ["tgt", "positive integer"], {"seq_len": {"seq": 12, "tgt": 0}}),
        (bl.FeedError, ["longer", "'tgt'", str(TABLE)], {"seq_len": {"seq": 12, "tgt": TABLE + 1}}),
        (bl.FeedError, ["order", "'seq'", "'tgt'", "mapping"], {"order": order_of(SRC, 1)}),
        (bl.FeedError, ["positions", "'seq'", "'tgt'", "mapping"], {"positions": torch.arange(TGT)}),
        (bl.FeedError, ["order", "'decoder'", "'seq', 'tgt'"], {"order": {"decoder": order_of(TGT, 1)}}),
        (bl.FeedError, ["order of axis 'tgt'", f"({BATCH}, {SRC})", f"({TGT},)"], {"order": {"tgt": order_of(SRC, 1)}}),
        (bl.FeedError, ["order of axis 'seq'", "twice"], {"order": {"seq": torch.zeros(SRC).long()}}),
        (bl.FeedError, ["positions of axis 'tgt'", "outside 0..7"], {"positions": {"tgt": torch.arange(TGT) + 1}}),
        (bl.FeedError, ["of axis 'tgt'", "does not divide"], {"seq_len": {"seq": 12, "tgt": 7}, "shard": (0, 2)}),
    ],
)
def test_feed_refuses(error: type[Exception], words: list[str], call: dict[str, Any]) -> None:
    lifted = bl.lift(program_of("rope"))
    with pytest.raises(error) as raised:
        lifted.feed(**{"batch_size": BATCH, "seq_len": LENGTHS, **call})
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_shard_inputs_refuses() -> None:
    lifted = bl.lift(program_of("rope"))
    src = tokens(BATCH, SRC, 3)
    for order, words in (
        (order_of(SRC, 1), ["'seq', 'tgt'", "mapping"]),
        ({"enc": order_of(SRC, 1)}, ["'enc'", "'seq', 'tgt'"]),
        ({"seq": order_of(TGT, 1)}, ["order of axis 'seq'", f"({SRC},)"]),
    ):
        with pytest.raises(bl.FeedError) as raised:
            lifted.shard_inputs(order=order, src=src)
        assert all(word in str(raised.value) for word in words), str(raised.value)
    with pytest.raises(bl.FeedError, match="target has no axis of its own"):
        lifted.shard_inputs(order=None, src=src, target=src)


def test_one_axis_takes_a_mapping_too() -> None:
    lifted, order = bl.lift(attending(input_ids=tokens(BATCH, 8, 0))), order_of(8, 1)
    assert lifted.inputs
    plain, mapped = lifted.feed(BATCH, 8, order=order), lifted.feed(BATCH, {"seq": 8}, order={"seq": order})
    assert all(torch.equal(plain[name], mapped[name]) for name in plain)
    with pytest.raises(bl.FeedError, match="'tgt'"):
        lifted.feed(BATCH, 8, order={"tgt": order})


# Values, gradients, stages ------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["rope", "distance", "table", "written", "bart"])
def test_verifies(name: str, mask: bool, dynamic: bool) -> None:
    program = program_of(name, dynamic, mask=mask)
    staged = bl.partition(bl.context_parallel(bl.lift(program)), num_stages=4)  # two layers on each side
    report = bl.verify(program, staged)
    assert all(check.passed and check.compared for check in report.checks) and len(report.checks) == 4
    assert "seq 11" in report["identity"].detail


@pytest.mark.parametrize("form", ["values", "positions"])
def test_verifies_in_either_form(form: str) -> None:
    program = program_of("table")
    assert bl.verify(program, bl.lift(program, form=form)).passed


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", ["distance", "written"])
def test_verifies_with_equal_lengths(name: str, dynamic: bool) -> None:
    program = program_of(name, dynamic, 8, 8)
    staged = bl.partition(bl.context_parallel(bl.lift(program, axes=NAMED)), split_points=["decoder.layers.1"])
    assert bl.verify(program, staged).passed


def test_the_module_itself_with_two_orders() -> None:
    """No oracle: the model on whole inputs against the stages on permuted ones, at other lengths."""
    model, program = export_seq2seq("written", mask=True)
    staged = bl.partition(bl.context_parallel(bl.lift(program)), num_stages=3)
    inputs = {"src": tokens(BATCH, SRC, 3), "tgt": tokens(BATCH, TGT, 4), "src_mask": padding_mask(BATCH, SRC)}
    both = orders()
    want = model(**inputs).gather(1, both["tgt"][..., None].expand(-1, -1, VOCAB))
    feed = staged.feed(BATCH, LENGTHS, inputs=inputs, order=both)
    got = staged(*staged.shard_inputs(order=both, **inputs).values(), **feed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wrong = staged.feed(BATCH, LENGTHS, inputs=inputs, order={"seq": both["seq"]})
    other = staged(*staged.shard_inputs(order=both, **inputs).values(), **wrong)
    assert (other - want).abs().max() > 1e-2


def test_the_encoder_output_is_carried_to_the_decoder_layers() -> None:
    staged = bl.partition(
        bl.context_parallel(bl.lift(program_of("rope"))), split_points=["decoder.layers.0", "decoder.layers.1"]
    )
    shapes = []
    for stage in staged.stages[1:]:
        nodes = {node.name: node for node in stage.module.graph.nodes}
        shapes.append([str(nodes[name].meta["val"].shape[1]) for name in stage.activations])
    symbols = {str(s): n for n, s in zip(("src", "tgt"), symbols_of(program_of("rope")), strict=True)}
    assert [sorted(symbols[size] for size in sizes) for sizes in shapes] == [["src", "tgt"], ["src", "tgt"]]
    assert "lifted_freqs_cis_tgt" in staged.stages[2].kwargs
    spec = staged.kwargs_chunk_spec(staged.feed(BATCH, LENGTHS))
    assert {chunk.split_dim for chunk in spec.values()} == {0} and len(spec) == len(staged.lifted.inputs)


def symbols_of(program: Any) -> list[Any]:
    return [n.meta["val"].shape[1] for n in program.graph.nodes if n.name in ("src", "tgt")]


def test_cuts_lie_in_the_layers_of_both_sides() -> None:
    staged = bl.partition(bl.lift(program_of("rope")), num_stages=4)
    layers = [{fqn.rsplit(".", 3)[0].split(".attention")[0] for fqn in s.parameters} for s in staged.stages]
    assert any("encoder.layers.1" in part and "encoder.layers.0" not in part for part in map(" ".join, layers))
    assert any("decoder.layers.1" in part and "decoder.layers.0" not in part for part in map(" ".join, layers))
    with pytest.raises(bl.PartitionError, match="4 layers"):
        bl.partition(bl.lift(program_of("rope")), num_stages=9)


def test_microbatches_of_a_static_program() -> None:
    staged = bl.partition(bl.lift(program_of("rope", False)), num_stages=2)
    both = {"seq": order_of(11, 1, 2 * BATCH), "tgt": order_of(7, 2, 2 * BATCH)}
    feed = staged.feed(2 * BATCH, {"seq": 11, "tgt": 7}, order=both)
    for part in range(2):
        rows = slice(part * BATCH, (part + 1) * BATCH)
        own = staged.feed(BATCH, {"seq": 11, "tgt": 7}, order={axis: order[rows] for axis, order in both.items()})
        assert all(torch.equal(feed[name][rows], own[name]) for name in own)


# Faults -------------------------------------------------------------------------------------------------


def equal_lengths(name: str, dynamic: bool = True) -> tuple[Any, bl.LiftedProgram]:
    program = program_of(name, dynamic, 8, 8)
    return program, bl.context_parallel(bl.lift(program, axes=NAMED))


@pytest.mark.parametrize("check", ["values", "equivariance"])
def test_orders_of_the_axes_swapped(check: str) -> None:
    program, lifted = equal_lengths("distance", dynamic=False)
    mutant = m.with_feed(lifted, exchange=lambda s: {"enc": s["dec"], "dec": s["enc"]})
    caught(program, mutant, check)


@pytest.mark.parametrize("check", ["values", "equivariance"])
@pytest.mark.parametrize("axis", ["seq", "tgt"])
def test_one_axis_left_in_natural_order(axis: str, check: str) -> None:
    def natural(streams: dict[str, Streams]) -> dict[str, Streams]:
        return {**streams, axis: m.MutantStreams(streams[axis], None)}

    program = program_of("distance")
    caught(program, m.with_feed(bl.context_parallel(bl.lift(program)), exchange=natural), check)


PAIRS = [
    ("lifted_freqs_cis", "lifted_freqs_cis_dec"),
    ("lifted_dec_slots", "lifted_enc_slots_keys"),  # rows for columns, in another axis
    ("lifted_dec_slots_keys", "lifted_enc_slots_keys"),  # the keys of self attention for those of cross attention
]


@pytest.mark.parametrize("check", ["values", "equivariance"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_inputs_of_two_axes_swapped(pair: tuple[str, str], check: str) -> None:
    program, lifted = equal_lengths("distance", dynamic=False)
    caught(program, m.swap_inputs(lifted, *pair), check)


@pytest.mark.parametrize("check", ["values", "identity", "equivariance"])
def test_the_length_of_the_other_axis(check: str) -> None:
    program = program_of("rope")
    lifted = bl.context_parallel(bl.lift(program))

    def after(feed: dict[str, Tensor]) -> dict[str, Tensor]:
        one, other = feed["lifted_freqs_cis"], feed["lifted_freqs_cis_tgt"]
        return {**feed, "lifted_freqs_cis": other, "lifted_freqs_cis_tgt": one}

    caught(program, m.with_feed(lifted, after=after), check)


@pytest.mark.parametrize("check", ["values"])
def test_position_ids_of_the_axes_swapped(check: str) -> None:
    """Packed documents on either side: the ids of one side are not those of the other."""

    def change(streams: dict[str, Streams]) -> dict[str, Streams]:
        changed = {axis: m.MutantStreams(own, own.order) for axis, own in streams.items()}
        changed["enc"].positions, changed["dec"].positions = streams["dec"].positions, streams["enc"].positions
        return changed

    program, lifted = equal_lengths("rope", dynamic=False)
    error = caught(program, m.with_feed(lifted, exchange=change), check)
    assert "packed" in str(error)


# Packages and the command line --------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    lifted = bl.context_parallel(bl.lift(program_of("bart", mask=True)))
    staged = bl.partition(lifted, num_stages=2)
    lifted.save(tmp_path / "bart.lifted")
    staged.save(tmp_path / "stages")
    inputs = {
        "input_ids": tokens(BATCH, SRC, 3),
        "decoder_input_ids": tokens(BATCH, TGT, 4),
        "attention_mask": padding_mask(BATCH, SRC).long(),
        "decoder_attention_mask": padding_mask(BATCH, TGT).long(),
    }
    both = {"seq": order_of(SRC, 1), "decoder": order_of(TGT, 2)}
    call: dict[str, Any] = {"inputs": inputs, "order": both, "positions": {"decoder": torch.arange(TGT) % 5}}
    want = lifted.feed(BATCH, {"seq": SRC, "decoder": TGT}, **call)
    loaded = bl.load(tmp_path / "bart.lifted")
    assert loaded.input_axes == lifted.input_axes and loaded.inputs == lifted.inputs
    for source in (loaded, bl.load_stage(tmp_path / "stages", 1)):
        got = source.feed(BATCH, {"decoder": TGT, "seq": SRC}, **call)
        assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
        sharded = source.shard_inputs(order=both, **inputs)
        assert all(torch.equal(v, lifted.shard_inputs(order=both, **inputs)[k]) for k, v in sharded.items())
    user = lifted.shard_inputs(order=both, **inputs)
    left, right = lifted.program.module()(**user, **want), loaded.program.module()(**user, **want)
    assert torch.equal(left["logits"], right["logits"])
    bl.verify(program_of("bart", mask=True), loaded)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tests = Path(__file__).parent
    text = f"""
        import sys

        sys.path.insert(0, {str(tests)!r})
        from zoo.seq2seq import export_seq2seq


        def two():
            return export_seq2seq("distance")[1]


        def equal():
            return export_seq2seq("distance", False, 8, 8)[1]
    """
    (tmp_path / "two_axes.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["scan", "two_axes:two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [dim["axis"] for own in found["inputs"] for dim in own["seq_dims"]] == ["seq", "tgt"]
    assert main(["scan", "two_axes:two"]) == 0
    assert "tgt: batch dim 0, tgt dim 1 (row)" in capsys.readouterr().out
    axes = ["--axes", "src:0=batch,1=enc", "--axes", "tgt:0=batch,1=dec"]
    assert main(["scan", "two_axes:equal"]) == 1
    assert "BL103" in capsys.readouterr().out
    assert main(["lift", "two_axes:equal", "-o", "equal.lifted", *axes]) == 0
    assert "lifted_dec_slots" in capsys.readouterr().out
    assert main(["verify", "two_axes:equal", "--num-stages", "2", *axes]) == 0
    assert main(["split", "two_axes:equal", "--num-stages", "2", "-o", "refused"]) == 1
    assert main(["split", "two_axes:equal", "--num-stages", "2", "-o", "stages", *axes]) == 0
    assert main(["split", "equal.lifted", "--trust", "--num-stages", "2", "-o", "again"]) == 0
    capsys.readouterr()
    assert main(["split", "equal.lifted", "--num-stages", "2", "-o", "other", *axes]) == 2
    assert "--axes" in capsys.readouterr().err
    feed = bl.load_stage(tmp_path / "stages", 0).feed(BATCH, {"enc": 8, "dec": 8}, order={"dec": order_of(8, 1)})
    assert "lifted_freqs_cis_dec" in feed
