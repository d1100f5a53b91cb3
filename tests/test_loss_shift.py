"""Losses whose shift is made by slicing, each beside the near misses that have to stay refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

import buffer_lifting as bl
from buffer_lifting import loss_shift
from buffer_lifting.axes import label_inputs
from buffer_lifting.cli import main
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord, Node
from buffer_lifting.loss_shift import undo_shifts
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.passes.undo_shift import undo_shifts_in
from buffer_lifting.scanner import scan_record

VOCAB, WIDTH, BATCH, LENGTH = 17, 8, 3, 11
Loss = Callable[["Net", Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]
ce = F.cross_entropy


class Net(nn.Module):
    """Embeddings of tokens and positions, and a loss of their hidden states, the tokens and the labels."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.p = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.head, self.norm = nn.Linear(WIDTH, VOCAB), nn.LayerNorm(WIDTH)
        self.classes = nn.Buffer(torch.linspace(0.5, 2.0, VOCAB))
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The loss, perhaps with more."""
        return self.loss(self, self.e(ids) + self.p(torch.arange(ids.shape[1])), ids, labels)


def inputs(batch: int = BATCH, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Tokens and labels, some of which are ignored: others in each sample, so that ranks have different numbers."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(1, VOCAB, (batch, length), generator=generator) for _ in range(2))
    labels[0, :4], labels[1, -2:] = -100, -100
    return ids, labels


def program(loss: Loss, dynamic: bool) -> ExportedProgram:
    """The exported net; dynamic means ``Dim.AUTO`` on both dims of both inputs."""
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2 if dynamic else None
    return export(Net(loss), inputs(), dynamic_shapes=shapes)


def old_transformers(n: Net, x: Tensor, i: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """What the models of transformers did before they padded their labels."""
    logits = n.head(x).float()
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), t[..., 1:].contiguous()
    shift_logits, shift_labels = shift_logits.view(-1, VOCAB), shift_labels.view(-1).to(shift_logits.device)
    return ce(shift_logits, shift_labels), logits


def sizes_written_out(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
    """Reshapes to sizes that are computed from the slice."""
    logits = n.head(x)[:, :-1]
    batch, length, vocab = logits.shape
    return ce(logits.reshape(batch * length, vocab), t[:, 1:].reshape(batch * length))


def three_dims(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
    """A reshape that keeps the sequence, whose size is an expression."""
    logits = n.head(x)[:, :-1]
    return ce(logits.view(i.shape[0], i.shape[1] - 1, VOCAB).mT, t[:, 1:])


SHIFTED: dict[str, Loss] = {
    "old_transformers": old_transformers,
    "sizes_written_out": sizes_written_out,
    "three_dims": three_dims,
    "hidden_states": lambda n, x, i, t: ce(n.head(n.norm(x[:, :-1])).flatten(0, 1), t[:, 1:].flatten()),
    "length_minus_one": lambda n, x, i, t: ce(n.head(x)[:, : i.shape[1] - 1].mT, t[:, 1 : i.shape[1]]),
    "narrow": lambda n, x, i, t: ce(n.head(x).narrow(1, 0, i.shape[1] - 1).mT, t[:, 1:]),
    "sum": lambda n, x, i, t: ce(n.head(x)[:, :-1].transpose(1, 2), t[:, 1:], reduction="sum"),
    "tokens_as_labels": lambda n, x, i, t: ce(n.head(x)[:, :-1].reshape(-1, VOCAB), i[:, 1:].reshape(-1)),
    "nll": lambda n, x, i, t: F.nll_loss(F.log_softmax(n.head(x)[:, :-1].float(), -1).permute(0, 2, 1), t[:, 1:]),
    "softcap": lambda n, x, i, t: ce((torch.tanh(n.head(x)[:, :-1] / 5) * 5).flatten(0, 1), t[:, 1:].flatten()),
    "a_class_is_ignored": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, i[:, 1:], ignore_index=3),
    "smoothed": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t[:, 1:], label_smoothing=0.1),
    "weighted_sum": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t[:, 1:], weight=n.classes, reduction="sum"),
    "by_two": lambda n, x, i, t: ce(n.head(x)[:, :-2].reshape(-1, VOCAB), t[:, 2:].reshape(-1)),
    "masked_labels": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t.masked_fill(i == 3, -100)[:, 1:]),
    "narrow_integers": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t.int()[:, 1:].long()),
    "two_sums": lambda n, x, i, t: sum(  # type: ignore[arg-type, return-value]
        ce(n.head(x)[:, :-k].mT, t[:, k:], reduction="sum") for k in (1, 2)
    ),
    "two_means": lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t[:, 1:]) + ce(n.head(x)[:, :-2].mT, t[:, 2:]),
    "next_tokens": lambda n, x, i, t: (  # multi-token prediction, a head for each
        ce(n.head(x)[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
        0.3 * ce(n.head(n.norm(x))[:, :-2].flatten(0, 1), t[:, 2:].flatten()),
    ),
}
SEVERAL = ("two_sums", "two_means", "next_tokens")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SHIFTED)
def test_lifted_and_verified(name: str, dynamic: bool) -> None:
    """The shifted target is one hoisted input, and every oracle holds; on two ranks too when the program is dynamic."""
    own = program(SHIFTED[name], dynamic)
    report = bl.scan(own)
    assert not report.refused
    lifted = bl.lift(own)
    reads = [read for read in report.reads if read.operand == "target"]
    assert reads and {(read.form, read.stream, read.source_kind) for read in reads} == {("values", "inputs", "input")}
    assert len([item for item in lifted.inputs if item.stream == "inputs"]) == len(reads)
    assert not [node for node in lifted.program.graph.nodes if "slice" in node.name and -1 in node.args]
    checks = {check.name: check for check in bl.verify(own, lifted).checks}
    assert checks.keys() == {"values", "identity", "equivariance"}
    assert "bitwise" in checks["identity"].detail or "a shifted loss" in checks["identity"].detail
    if dynamic and name == "two_means":  # a rank's share of each is another
        with pytest.raises(bl.LiftingError, match=r"losses that count tokens of their own.*return each loss by itself"):
            bl.context_parallel(lifted, size=2)
    elif dynamic:
        whole = bl.verify(own, bl.context_parallel(lifted, size=2))
        assert "shards" in {check.name for check in whole.checks}


@pytest.mark.parametrize("name", SHIFTED)
def test_any_length(name: str) -> None:
    """Loss and gradients of a lifted dynamic program are those of the model at other sizes."""
    net, lifted = Net(SHIFTED[name]), bl.lift(program(SHIFTED[name], True))
    module = lifted.program.module()
    for batch, length in ((2, 7), (5, 16)):
        ids, labels = inputs(batch, length)
        feed = lifted.feed(batch, length, inputs={"ids": ids, "labels": labels})
        found, expected = module(ids, labels, **feed), net(ids, labels)
        found, expected = (value[0] if isinstance(value, tuple) else value for value in (found, expected))
        assert expected.isfinite()
        torch.testing.assert_close(found, expected)
        wanted = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)
        parameters = dict(module.named_parameters())
        given = torch.autograd.grad(found, [parameters[n] for n, _ in net.named_parameters()], allow_unused=True)
        for one, other in zip(given, wanted, strict=True):
            assert (one is None) == (other is None)
            torch.testing.assert_close(one, other)


def returned_too(n: Net, x: Tensor, i: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The sliced logits are an output."""
    logits = n.head(x)[:, :-1]
    return ce(logits.mT, t[:, 1:]), logits


def read_too(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
    """A second loss on the sliced logits."""
    logits = n.head(x)[:, :-1]
    return ce(logits.mT, t[:, 1:]) + logits.logsumexp(-1).square().mean()


def masked_mean(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
    """A loss for each token, and a mean by hand."""
    valid = t[:, 1:] != -100
    return (ce(n.head(x)[:, :-1].mT, t[:, 1:], reduction="none") * valid).sum() / valid.sum()


def counted(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
    """The number of targets is read from the slice."""
    target = t[:, 1:]
    return ce(n.head(x)[:, :-1].mT, target, reduction="sum") / (target != -100).sum()


REFUSED: dict[str, tuple[Loss, str]] = {
    "same_positions": (lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t[:, :-1]), "[:, :-1] of the data goes with"),
    "too_few_targets": (lambda n, x, i, t: ce(n.head(x)[:, :-2].mT, t[:, 1:-1]), "[:, :-2] of the data goes with"),
    "the_other_way": (lambda n, x, i, t: ce(n.head(x)[:, 1:].mT, t[:, :-1]), "drops the last positions"),
    "first_dropped": (lambda n, x, i, t: ce(n.head(x)[:, 1:].mT, t[:, 1:]), "drops the last positions"),
    "fixed_length": (lambda n, x, i, t: ce(n.head(x)[:, :4].mT, t[:, 1:5]), "no shifted loss: "),
    "returned_too": (returned_too, "read elsewhere than by its loss"),
    "read_too": (read_too, "read elsewhere than by its loss"),
    "counted": (counted, "read elsewhere than by its loss"),
    "masked_mean": (masked_mean, "reduction='none'"),
    "own_targets": (lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, n.head(x).argmax(-1)[:, 1:]), "user inputs alone"),
    "weighted_mean": (lambda n, x, i, t: ce(n.head(x)[:, :-1].mT, t[:, 1:], weight=n.classes), "class weights"),
    "transposed": (
        lambda n, x, i, t: ce(n.head(x).transpose(0, 1)[:-1].reshape(-1, VOCAB), t[:, 1:].reshape(-1)),
        "not laid out alike",
    ),
    "sequence_first": (
        lambda n, x, i, t: ce(n.head(x).transpose(0, 1)[:-1].reshape(-1, VOCAB), t.T[1:].reshape(-1)),
        "the batch is folded behind the sequence",
    ),
    "positions_on_the_slice": (
        lambda n, x, i, t: ce(n.head(x[:, :-1] + n.p(torch.arange(i.shape[1] - 1))).mT, t[:, 1:]),
        "another value meets its rows",
    ),
    "dropout": (lambda n, x, i, t: ce(F.dropout(n.head(x)[:, :-1], 0.1).mT, t[:, 1:]), "read elsewhere"),
    "pole": (lambda n, x, i, t: ce(n.head(x)[:, :-1].square().sqrt().mT, t[:, 1:]), "read elsewhere"),
    "part_of_the_slice": (lambda n, x, i, t: ce(n.head(x)[:, :-1][:, :4].mT, t[:, 1:][:, :4]), "another part of it"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", REFUSED)
def test_near_miss_stays_refused(name: str, dynamic: bool) -> None:
    """The slice of the data is a finding that says what does not hold, and lifting raises."""
    loss, why = REFUSED[name]
    own = program(loss, dynamic)
    mixing = [mix for mix in bl.scan(own).mixing if mix.code == "BL201" and "no shifted loss" in mix.reason]
    assert mixing and any(why in mix.reason for mix in mixing), [mix.reason for mix in mixing]
    assert all(mix.location is not None for mix in mixing)
    with pytest.raises(bl.UnsupportedReadError, match="a part of the sequence is cut out"):
        bl.lift(own)


@pytest.mark.parametrize("padded", [False, True], ids=["sliced", "padded"])
def test_a_count_of_shifted_targets_is_refused(padded: bool) -> None:
    """On a shard a second shift, whose targets are only counted, would count other tokens."""

    def loss(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
        shifted = F.pad(t, (0, 1), value=-100)[:, 1:] if padded else t[:, 1:]
        logits = n.head(x) if padded else n.head(x)[:, :-1]
        return ce(logits.mT, shifted, reduction="sum") / (t[:, 1:] != -100).sum()

    assert [read.node for read in bl.scan(program(loss, True)).refused if "mixes the sequence" in str(read.refusal)]


def same(one: Node, other: Node) -> bool:
    """Whether two nodes say the same, but for where they come from."""
    return all(
        getattr(one, f.name) == getattr(other, f.name)
        for f in fields(Node)
        if not f.name.startswith("_") and f.name not in ("location", "modules")
    )


@pytest.mark.parametrize("name", SHIFTED)
def test_record_and_graph_are_changed_alike(name: str) -> None:
    """The record of the edited graph is the edited record, node for node, and the graph computes the same loss."""
    own = program(SHIFTED[name], True)
    normalized = normalize(own)
    record = build_record(own, normalized.graph)
    shifts = undo_shifts(record, label_inputs(record)).shifts
    assert len(shifts) == (2 if name in SEVERAL else 1)
    undo_shifts_in(normalized.graph, shifts)
    edited = build_record(own, normalized.graph)
    label_inputs(edited)  # gives both inputs one batch and one length
    live = record.live()
    assert [n for n in edited.nodes if n in edited.live()] == [n for n in record.nodes if n in live]
    for node in record.nodes.values():
        assert node.name not in live or same(node, edited.nodes[node.name]), (node, edited.nodes[node.name])
    state = {**own.state_dict, **own.constants}
    fqns = {**own.graph_signature.inputs_to_parameters, **own.graph_signature.inputs_to_buffers}
    values = [*(state[fqn] for fqn in fqns.values()), *inputs()]
    result = GraphModule(normalized.submodules, normalized.graph)(*values)[0]
    expected = Net(SHIFTED[name])(*inputs())
    torch.testing.assert_close(result, expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("loss", [old_transformers, sizes_written_out, counted], ids=lambda loss: loss.__name__)
def test_archive_is_read_alike(loss: Loss, dynamic: bool, tmp_path: Path) -> None:
    """A saved program has the findings of the program, read without torch's loader."""
    own = program(loss, dynamic)
    torch.export.save(own, tmp_path / "own.pt2")

    def told(record: GraphRecord) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]], int]:
        plan = scan_record(record)
        reads = [(read.node, read.operand, read.refusal) for read in plan.report.reads]
        return reads, [(mix.node, mix.reason) for mix in plan.report.mixing], len(plan.shifts)

    found = told(read_archive(tmp_path / "own.pt2"))
    assert found == told(build_record(own, normalize(own, read_only=True).graph))
    assert found[2] == (0 if loss is counted else 1)


def export_old_transformers() -> ExportedProgram:
    """For the command line."""
    return program(old_transformers, True)


def export_counted() -> ExportedProgram:
    """For the command line."""
    return program(counted, True)


def test_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """The chain from the labels, and the pattern that came nearest."""
    assert main(["scan", "--explain", "test_loss_shift:export_counted"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "a loss of the next token, shifted by slices" in text
    assert "fails: it is read elsewhere than by its loss: by 'ne'" in text
    assert main(["scan", "--explain", "--all", "test_loss_shift:export_old_transformers"]) in (0, 1)
    text = " ".join(capsys.readouterr().out.split())
    assert "constant_pad_nd" in text and "cross_entropy_loss" in text


class WithLoss(nn.Module):
    """A causal language model of transformers with a loss around it, as user code has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of the next token."""
        logits = self.model(input_ids=input_ids).logits
        return ce(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))


class Attention(nn.Module):
    """Causal attention in the manner of nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.ln = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        """A layer with its residual."""
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.c_attn(self.ln(x)).split(16, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.c_proj(y.transpose(1, 2).contiguous().flatten(2))


class NanoGPT(nn.Module):
    """In the manner of nanoGPT, with the tokens as targets and the head on what the loss reads only."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, 16), nn.Embedding(32, 16)
        self.h, self.ln_f = nn.ModuleList(Attention() for _ in range(2)), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The loss of the next token."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        logits = self.lm_head(self.ln_f(x)[:, :-1, :])
        return ce(logits.view(-1, logits.size(-1)), labels[:, 1:].contiguous().view(-1), ignore_index=-1)


def llama() -> nn.Module:
    """A Hugging Face Llama, which knows nothing of the loss."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    return WithLoss(transformers.LlamaForCausalLM(config))


def image_gpt() -> nn.Module:
    """A model of transformers that slices its own logits."""
    sizes = {"vocab_size": VOCAB + 1, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
    return transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**sizes)).eval()


def blip_text() -> nn.Module:
    """Another one, which smooths its labels as well."""
    config = transformers.BlipTextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        encoder_hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        is_decoder=True,
        use_cache=False,
    )
    return BlipTextLMHeadModel(config).eval()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("build", [NanoGPT, llama, image_gpt, blip_text])
def test_models(build: Callable[[], nn.Module], dynamic: bool) -> None:
    """Whole models: lifted, split into stages, and on two context-parallel ranks."""
    torch.manual_seed(0)
    ids, labels = inputs(4, 12)
    labels = labels.masked_fill(labels == -100, -1) if build is NanoGPT else labels
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in ("input_ids", "labels")} if dynamic else None
    own = export(build(), (), {"input_ids": ids, "labels": labels}, dynamic_shapes=shapes)
    lifted = bl.lift(own)
    assert [item.stream for item in lifted.inputs].count("inputs") == 1
    staged = bl.partition(bl.context_parallel(lifted, size=1), num_stages=2)
    assert {check.name for check in bl.verify(own, staged).checks} >= {"identity", "equivariance", "composition"}
    if dynamic:
        bl.verify(own, bl.context_parallel(lifted, size=2))


def pads_with_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last position counts, with class 2 as its target."""
    monkeypatch.setattr(loss_shift._Search, "_check_loss", lambda self, loss: 2)


def pads_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets are not shifted."""
    monkeypatch.setattr(loss_shift.LossShift, "widths", property(lambda self: (self.amount, 0)))


def takes_any_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of the same positions pass for the next ones."""

    def paired(self: object, node: Node, found: tuple[int, object, object, object]) -> tuple[Node, int]:
        return node, found[0]

    monkeypatch.setattr(loss_shift._Search, "_paired", paired)


@pytest.mark.parametrize("fault", [pads_with_a_class, pads_in_front, takes_any_slice], ids=lambda fault: fault.__name__)
def test_identity_sees_faults(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle compares with the program as it is, not with the longer form that the values are compared with."""

    def loss(n: Net, x: Tensor, i: Tensor, t: Tensor) -> Tensor:
        target = t[:, :-1] if fault is takes_any_slice else t[:, 1:]
        return ce(n.head(x)[:, :-1].mT, target)

    own = program(loss, False)
    fault(monkeypatch)
    lifted = bl.lift(own)
    with pytest.raises(bl.VerificationError, match="identity does not hold"):
        bl.verify(own, lifted)
