"""The demo: it passes, and it can fail."""

from __future__ import annotations

import builtins
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from buffer_lifting import demo
from buffer_lifting.cli import main
from buffer_lifting.demo import data
from buffer_lifting.demo.batches import MEASURED, Batches, Step, load_step, make_batches
from buffer_lifting.demo.compare import Measured, Row, judge, worst_error
from buffer_lifting.demo.losses import read_losses
from buffer_lifting.demo.model import RANKS, Subject, batch_of, load_subject
from buffer_lifting.demo.worker import unlifted_feed
from buffer_lifting.program import VerifyReport
from buffer_lifting.targets import TargetError

ROOT = Path(__file__).resolve().parents[1]
GOOD = Row(0, "head-tail", 5.0, 5.0, Measured(1e-6, "weight", 5.1, 0.5))


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The demo's command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "buffer_lifting", "demo", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.multiprocess
@pytest.mark.timeout(280)
def test_the_demo_passes(tmp_path: Path) -> None:
    losses = tmp_path / "losses.jsonl"
    done = run("--steps", "12", "--layers", "2", "--losses", str(losses))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 12 steps" in done.stdout
    assert "modeling_llama.py:" in done.stdout
    assert "ok   composition" in done.stdout
    assert "Warning" not in done.stderr
    assert all(line.startswith("[") for line in done.stderr.splitlines()), "progress alone"
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = re.findall(r"^ +(\d+)  (head-tail|per sample) +[0-9.]+", done.stdout, flags=re.M)
    assert len(rows) == MEASURED, "of many steps, some are measured"
    assert {order for _, order in rows} == set(data.ORDERS)
    runs = read_losses(str(losses))
    assert list(runs) == ["single", "pp_cp"]
    assert list(runs["single"]) == list(runs["pp_cp"]) == list(range(12))
    assert main(["compare-losses", f"{losses}:single", f"{losses}:pp_cp"]) == 0


MODEL = """\
import torch
from torch import nn


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.head = nn.Linear(16, 50)
        self.head.weight = self.tokens.weight

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for layer in self.layers:
            q, k, v = (t.unsqueeze(1) for t in layer(x).chunk(3, -1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head(x)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, 50, (4, 25), generator=generator)
    labels = text[:, 1:].clone()
    labels[step % 4, :17] = -100
    return {"idx": text[:, :-1].contiguous()}, labels


def make():
    return Gpt(), batch


stream = torch.Generator().manual_seed(0)  # as of a data loader: what comes next, whatever the step
calls = []


def changing(step):
    calls.append(step)
    samples, tokens = ((4, 24), (2, 32), (4, 16))[step % 3]
    text = torch.randint(0, 50, (samples, tokens + 1), generator=stream)
    return {"idx": text[:, :-1]}, text[:, 1:]


def make_changing():
    return Gpt(), changing


def sized(*sizes):
    def batch(step):
        samples, tokens, *more = sizes[step]
        text = torch.zeros(samples, tokens, dtype=torch.long)
        return {"idx": text, **{name: text for name in more}}, text

    return lambda: (Gpt(), batch)


odd_later, uneven_later, too_long = sized((4, 8), (4, 16), (3, 16)), sized((4, 8), (4, 18)), sized((4, 8), (2, 128))
renamed = sized((4, 8), (4, 8, "mask"))
short = sized((4, 8))


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gpt = Gpt()
        self.layers = self.gpt.layers

    def forward(self, idx):
        return self.gpt(idx) if len(idx) == 4 else self.gpt(idx) * 2


def one_batch():
    return Fixed(), sized((4, 8), (8, 8))()[1]


def dropout():
    return nn.Sequential(nn.Embedding(256, 8), nn.Dropout(0.5), nn.Linear(8, 256))


def no_logits():
    return nn.Embedding(256, 8), lambda step: ({"input": torch.zeros(2, 8, dtype=torch.long)}, torch.zeros(2, 4).long())


def odd():
    return nn.Embedding(256, 8), lambda step: ({"input": torch.zeros(3, 8, dtype=torch.long)}, torch.zeros(3, 8).long())


def small_vocabulary():
    return nn.Embedding(100, 8)


def nothing():
    return 7
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(280)
def test_a_model_of_the_user_s(tmp_path: Path) -> None:
    """Learned positions, a weight tied across the stages, and batches of its own: labels that count lie unevenly."""
    (tmp_path / "mine.py").write_text(MODEL)
    done = run("--model", "mine:make", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 2 steps" in done.stdout
    assert "Gpt reads by position" in done.stdout and "positions.weight, 1 read\n" in done.stdout


@pytest.fixture
def unsuited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of the models that do not suit."""
    (tmp_path / "unsuited.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsuited", raising=False)
    return "unsuited"


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_batches_of_other_sizes_that_are_other_data_each_time(
    unsuited: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is made once, in order, and is the same for one process and the ranks, whatever its size."""
    from buffer_lifting.demo.model import export_model, make_stages

    subject = load_subject(f"{unsuited}:make_changing", 0)
    batches = make_batches(subject, 3, 0, tmp_path)
    assert sys.modules[unsuited].calls == [0, 1, 2]
    assert batches.sizes == [(4, 24), (2, 32), (4, 16)] and batches.microbatches == 2
    staged = make_stages(export_model(subject.model, load_step(tmp_path, 0).inputs))
    batches.check(staged)
    rows = demo.train(lambda text: None, subject, staged, batches, 100.0, 0.1)
    assert judge(rows, 3) == []
    assert sys.modules[unsuited].calls == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd_later", "batch(2): labels are torch.int64 (3, 16); demo takes int64 [batch, seq] with an even batch"),
        ("uneven_later", "batch(1): labels are torch.int64 (4, 18); demo takes"),
        ("too_long", "batch(1), 2 samples of 128 tokens: a sequence of 128 is longer than"),
        ("renamed", "batch(1) gives the inputs ['idx', 'mask'], batch(0) gave ['idx']"),
        ("short", "batch(1) gives no pair (inputs by keyword, labels): IndexError"),
        ("one_batch", "the program was exported with a static batch of 4"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_refused_before_a_process_starts(
    name: str, message: str, unsuited: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("buffer_lifting.demo.ranks.Ranks.start", lambda _: pytest.fail("a process was started"))
    assert demo.run(steps=3 if name == "odd_later" else 2, target=f"{unsuited}:{name}") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Training" not in captured.out


def test_every_step_is_cut_into_as_many_microbatches(tmp_path: Path) -> None:
    """Four where every batch divides by four, else two; a file holds a batch, and not all the text it is a view of."""
    text = torch.zeros(1000, 1000, dtype=torch.long)

    def made(*samples: int) -> Batches:
        def batch(step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            part = text[: samples[step], :8]
            return {"x": part}, part

        return make_batches(Subject("x", torch.nn.Identity(), batch), len(samples), 0, tmp_path)

    assert [made(4, 8).microbatches, made(4, 2).microbatches, made(2, 6).microbatches] == [4, 2, 2]
    assert str(made(4, 2)) == "(2 to 4) x 8" and str(made(2)) == "2 x 8"
    assert (tmp_path / "step0.pt").stat().st_size < 20_000
    assert load_step(tmp_path, 0).inputs["x"].is_contiguous()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (({"x": 1}, torch.zeros(2, 8).long()), "the inputs x are no tensors"),
        (({}, torch.zeros(2, 8)), "labels are torch.float32 (2, 8)"),
        (({}, torch.zeros(0, 8).long()), "labels are torch.int64 (0, 8)"),
        (({}, torch.full((2, 8), -100)), "no label counts"),
        (None, "gives no pair"),
    ],
)
def test_what_is_no_batch(made: Any, message: str) -> None:
    with pytest.raises(demo.DemoError, match=re.escape(message)):
        batch_of(Subject("x", torch.nn.Identity(), lambda step: made), 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dropout", "something else each time"),
        ("no_logits", "not logits [2, 4, *]"),
        ("odd", "an even batch"),
        ("small_vocabulary", "does not run on batch(0): IndexError"),
        ("nothing", "returned int; demo takes a torch.nn.Module"),
    ],
)
def test_a_model_that_does_not_suit_is_refused(name: str, message: str, unsuited: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_subject(f"{unsuited}:{name}", 0)
    assert message in str(caught.value)


@pytest.mark.multiprocess
@pytest.mark.timeout(200)
def test_a_sabotaged_lift_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages that compute with other rotary values than the model, which nothing has verified."""
    from buffer_lifting.demo import model

    make_stages = model.make_stages

    def sabotaged(program: Any) -> Any:
        staged = make_stages(program)
        graph = staged.stages[1].module.graph
        node = next(n for n in graph.nodes if n.name.startswith("lifted_model_rotary_emb_inv_freq"))
        users = list(node.users)
        with graph.inserting_before(users[0]):
            wrong = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.99))
        for user in users:
            user.replace_input_with(node, wrong)
        staged.stages[1].module.recompile()
        return staged

    monkeypatch.setattr(model, "make_stages", sabotaged)
    monkeypatch.setattr("buffer_lifting.verification.verify", lambda *_, **__: VerifyReport(()))
    assert demo.run(steps=1, layers=2, seed=0) == 1
    out = capsys.readouterr().out
    assert out.rstrip().endswith("FAIL")
    assert "is off by" in out


@pytest.mark.multiprocess
@pytest.mark.timeout(150)
def test_a_rank_that_dies_is_reported(tmp_path: Path) -> None:
    """The error of the rank that failed, not of those that lost it; and no rank is left behind."""
    from buffer_lifting.demo.model import export_model, llama, make_stages

    subject = llama(2, 0)
    batches = make_batches(subject, 1, 0, tmp_path)
    staged = make_stages(export_model(subject.model, subject.batch(0)[0]))

    class Damaged:
        def save(self, directory: Path) -> None:
            """One stage's file is cut off."""
            staged.save(directory)
            largest = max((f for f in directory.rglob("*") if "1" in f.name), key=lambda f: f.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:100])

    began = time.monotonic()
    with pytest.raises(demo.DemoError, match=r"rank [23] failed: .*cut off"):
        demo.train(lambda text: None, subject, Damaged(), batches, 100.0, 0.1)
    assert time.monotonic() - began < 100


@pytest.mark.multiprocess
@pytest.mark.timeout(150)
def test_a_rank_that_is_killed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from buffer_lifting.demo.model import export_model, llama, make_stages
    from buffer_lifting.demo.ranks import Ranks

    subject = llama(2, 0)
    start = Ranks.start

    def start_and_kill(self: Ranks) -> None:
        start(self)
        self.processes[2].kill()

    monkeypatch.setattr(Ranks, "start", start_and_kill)
    batches = make_batches(subject, 1, 0, tmp_path)
    staged = make_stages(export_model(subject.model, subject.batch(0)[0]))
    with pytest.raises(demo.DemoError, match="rank 2 was stopped by signal 9"):
        demo.train(lambda text: None, subject, staged, batches, 100.0, 0.1)


def test_ranks_that_say_nothing_are_stopped(tmp_path: Path) -> None:
    from buffer_lifting.demo.ranks import Ranks

    with pytest.raises(demo.DemoError, match=r"no result for 1 s \(ranks 0 still run\)"), Ranks(tmp_path, 1.0) as ranks:
        ranks.processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]
        ranks.end = time.monotonic() + 1.0
        ranks.results(0, [0])
    assert ranks.processes[0].poll() is not None


def test_a_file_of_losses_that_cannot_be_written_is_known_before_training(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        demo.run(steps=1, losses=str(tmp_path / "missing" / "losses.jsonl"))


def test_nothing_lifted_means_positions_from_0_on_each_rank() -> None:
    """The control's feed: rows count from 0 on every rank, and keys do so once for each rank."""
    import buffer_lifting as bl
    from buffer_lifting.demo.model import export_model, llama

    subject = llama(1, 0)
    inputs, labels = subject.batch(0)
    lifted = bl.context_parallel(bl.lift(export_model(subject.model, inputs)), size=RANKS)
    order = data.order("per sample", (data.BATCH, data.SEQ), RANKS, 0, 0)
    step = Step(inputs, labels, order, True)
    half = data.SEQ // RANKS
    natural = lifted.feed(data.BATCH, data.SEQ, shard=(0, RANKS))
    for rank in range(RANKS):
        feed = unlifted_feed(lifted, step, rank, RANKS)
        assert set(feed) == set(natural)
        for item in lifted.inputs:
            wanted = natural[item.name]
            wanted = torch.cat([wanted[:, :half]] * RANKS, 1) if item.role == "col" else wanted
            assert torch.equal(feed[item.name], wanted), item.name


def test_the_text_is_real_and_each_step_has_its_own() -> None:
    tokens, labels = data.batch(0, seed=0)
    assert tokens.shape == labels.shape == (data.BATCH, data.SEQ)
    counted = labels[:, :-1] != data.IGNORED
    assert torch.equal(tokens[:, 1:][counted], labels[:, :-1][counted])
    assert bool((tokens[:, 1:][~counted] == ord(" ")).all()) and not bool(counted.all())
    again, other = data.batch(0, seed=0)[0], data.batch(1, seed=0)[0]
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    shape = (data.BATCH, data.SEQ)
    order = data.order("per sample", shape, RANKS, 0, seed=0)
    assert torch.equal(order.sort(1).values, torch.arange(data.SEQ).expand(data.BATCH, -1))
    assert not torch.equal(order[0], order[1])
    assert data.order("head-tail", (2, 8), 2, 0, 0).tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
    halves = [(data.batch(step, 0)[1] != data.IGNORED).chunk(RANKS, 1) for step in range(4)]
    assert any(int(left.sum()) != int(right.sum()) for left, right in halves), "labels that count lie unevenly"


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert demo.run(steps=1) == 2
    captured = capsys.readouterr()
    assert "pip install buffer_lifting[cli]" in captured.err
    assert captured.out == ""


# the comparison


def test_gradients_are_measured_by_parameter() -> None:
    expected = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
    assert worst_error(expected, {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])})[0] == 0.0
    error, where = worst_error(expected, {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.6])})
    assert where == "b"
    assert error == pytest.approx(0.2)


def test_a_gradient_of_nearly_zero_is_measured_by_the_largest() -> None:
    expected = {"a": torch.tensor([1.0]), "zero": torch.tensor([0.0])}
    error, where = worst_error(expected, {"a": torch.tensor([1.0]), "zero": torch.tensor([1e-10])})
    assert where == "zero"
    assert error == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "got",
    [
        {},
        {"a": None},
        {"a": torch.ones(3)},
        {"a": torch.tensor([1.0, math.nan])},
        {"a": torch.ones(2), "more": torch.ones(1)},
    ],
)
def test_gradients_that_cannot_be_compared_are_wrong(got: dict[str, torch.Tensor | None]) -> None:
    assert worst_error({"a": torch.ones(2)}, got)[0] == math.inf


def test_a_good_run_passes() -> None:
    assert judge([GOOD], 1) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(GOOD, lifted=5.001), "losses differ"),
        (replace(GOOD, lifted=math.nan), "losses differ"),
        (replace(GOOD, measured=Measured(2e-5, "weight", 5.1, 0.5)), "is off by 2.0e-05"),
        (replace(GOOD, measured=Measured(math.nan, "weight", 5.1, 0.5)), "gradient of weight"),
        (replace(GOOD, measured=Measured(1e-6, "weight", 5.1, 1e-6)), "proves nothing"),
        (replace(GOOD, measured=Measured(1e-6, "weight", 5.1, math.nan)), "proves nothing"),
        (replace(GOOD, measured=None), "no gradient was compared"),
    ],
)
def test_a_bad_row_fails(row: Row, message: str) -> None:
    (wrong,) = judge([row], 1)
    assert message in wrong


def test_missing_steps_fail() -> None:
    assert judge([GOOD], 2) == ["1 of 2 steps ran"]
    assert judge([], 1)


# the comparison of losses


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


A = ('{"step": 0, "loss": 5.0}', '{"step": 1, "loss": 4.0}')


def test_losses_that_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", *A)
    b = write(tmp_path / "b", '{"step": 1, "loss": 4.00001, "run": "x"}', "", '{"step": 0, "loss": 5, "run": "x"}')
    assert main(["compare-losses", a, b]) == 0
    assert "same    A and x: 2 steps, worst at step 1: 4 and 4.00001, 2.5e-06 apart (rtol 1e-05)" in (
        capsys.readouterr().out
    )
    assert main(["compare-losses", a, b, "--rtol", "1e-6"]) == 1
    assert capsys.readouterr().out.startswith("differ  A and x: 2 steps, worst at step 1")
    assert main(["compare-losses", a, a, "--rtol", "0"]) == 0


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "4.1"])
def test_losses_that_differ(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", *A), write(tmp_path / "b", A[0], f'{{"step": 1, "loss": {loss}}}')
    for pair in ([a, b], [b, a], [b, b])[: 3 if loss != "4.1" else 2]:
        assert main(["compare-losses", *pair]) == 1
        assert "worst at step 1" in capsys.readouterr().out


def test_runs_of_one_name_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ['{"run": "x", "step": 0, "loss": 1.0}', '{"run": "y", "step": 0, "loss": 2.0}']
    a, b = write(tmp_path / "a", *runs), write(tmp_path / "b", *reversed(runs))
    assert main(["compare-losses", a, b]) == 0
    assert capsys.readouterr().out.count("same") == 2
    assert main(["compare-losses", f"{a}:x", f"{a}:y"]) == 1
    assert "x and y" in capsys.readouterr().out
    assert main(["compare-losses", a, f"{b}:x"]) == 2
    assert "name one, as in FILE:RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "no losses"),
        (("not json",), "b:1: not a line like"),
        (("[1]",), "b:1: not a line like"),
        (('{"step": 0}',), "b:1: not a line like"),
        (('{"step": "0", "loss": 1.0}',), "b:1: step is an integer"),
        (('{"step": 0, "loss": true}',), "b:1: step is an integer"),
        ((*A, A[0]), "b:3: step 0 of run '' comes twice"),
        ((A[0],), "step 1 is only in A"),
        ((*A, '{"step": 2, "loss": 1.0}'), "step 2 is only in B"),
    ],
)
def test_files_that_cannot_be_compared(
    lines: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare-losses", write(tmp_path / "a", *A), write(tmp_path / "b", *lines)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", *A)
    assert main(["compare-losses", a, str(tmp_path / "b")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["compare-losses", a, f"{a}:x"]) == 2
    assert "no run 'x'" in capsys.readouterr().err
    assert main(["compare-losses", a, a, "--rtol", "nan"]) == 2
    assert main(["compare-losses", a, a, "--rtol", "-1"]) == 2
