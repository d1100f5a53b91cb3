"""``scan --explain``: what it prints for each kind of read and refusal, and what holds for every chain."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from zoo import CASES, export_case

from buffer_lifting.adapter import as_program
from buffer_lifting.cli import main
from buffer_lifting.explain import Explainer, explain
from buffer_lifting.explanation import Explanation, Step
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind
from buffer_lifting.ops import content_operands
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.patterns import PATTERNS, family_of, no_rule
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import PositionRead
from buffer_lifting.render_explain import SHOWN, WIDTH, explanation_lines
from buffer_lifting.scanner import scan_record

ROOT = Path(__file__).resolve().parents[1]
Read = Callable[["Net", Tensor, Tensor], Tensor]
DIM, TABLE, VOCAB = 8, 32, 23


class Net(nn.Module):
    """Tokens to features; ``read`` is the part of the forward that a test is about."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read
        self.emb, self.out = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM)
        self.wpe = nn.Parameter(torch.randn(TABLE, DIM))
        self.register_buffer("table", torch.randn(TABLE, DIM))
        self.register_buffer("inv_freq", torch.rand(DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        y = self.read(self, x, tokens)
        return self.out(y)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]


def sliced(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    return x + net.table[: x.shape[1]]


def rotary(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1])[:, None] * net.inv_freq
    return x * angles.cos()[None]


def causal(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return attend(x, i[:, None] >= i)


def documents(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    index = (tokens == 1).cumsum(1)
    return x * index[..., None]


def computed_start(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    start = tokens.max().item()
    torch._check(start >= 0)
    torch._check(start + x.shape[1] <= TABLE)
    return x + net.table.narrow(0, start, x.shape[1])


def flipped(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    return x + net.wpe[: x.shape[1]].flip(0)


def equal_before(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    equal = tokens[:, :, None] == tokens[:, None]
    seen = equal.cumsum(-1)
    return attend(x, (seen > 1)[:, None])


def running_sum(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    return x.cumsum(1)


def returned(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    return x * 2, torch.arange(x.shape[1]) * 2  # type: ignore[return-value]


class Returned(Net):
    """Its positions leave the program."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, positions = self.read(self, self.emb(tokens), tokens)
        return self.out(x), positions  # type: ignore[return-value]


def export(read: Read, dynamic: bool = True) -> ExportedProgram:
    tokens = torch.zeros(3, 7, dtype=torch.long)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    net = Returned(read) if read is returned else Net(read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(net, (tokens,), dynamic_shapes=shapes, strict=False)


def analysed(program: ExportedProgram) -> tuple[GraphRecord, LiftPlan]:
    prepared = as_program(program)
    record = build_record(prepared, normalize(prepared, read_only=True).graph)
    return record, scan_record(record)


def items(plan: LiftPlan) -> list:
    return [*plan.report.reads, *plan.report.mixing]


def shown(read: Read, everything: bool = False) -> str:
    """What is printed under the first item that is not handled, with symbols and lines by fixed names."""
    record, plan = analysed(export(read))
    item = next(i for i in items(plan) if not getattr(i, "handled", False))
    text = "\n".join(explanation_lines(explain(record, plan, item), everything))
    length = plan.report.inputs[0].seq_dims[0][0]
    tokens = next(node for node in record.inputs() if node.tensor is not None)
    assert tokens.tensor is not None
    batch, seq = (str(tokens.tensor.shape[dim]) for dim in (0, length))
    text = text.replace(batch, "s52").replace(seq, "s27")
    return textwrap.dedent(re.sub(r"(test_explain\.py):\d+", r"\1:N", text))


#: Read -> the lines under its finding, as a user sees them.
EXPECTED: dict[Read, str] = {
    sliced: """
source    b_table  buffer  float32[32, 8]  'table', in the feed
cut       slice_1  slice   float32[s27=seq:row, 8]  -> lifted_table
consumer  add      add     float32[s52=batch, s27=seq:row, 8]  operand 'other'
fed by    lifted_table float32[B, S, 8], values, positions stream, at slice_1
""",
    rotary: """
source    b_inv_freq   buffer     float32[8]  'inv_freq', in the feed
feed      mul          mul        float32[s27=seq:row, 8]
cut       cos          cos        float32[s27=seq:row, 8]  -> lifted_inv_freq
rebuilt   unsqueeze_1  unsqueeze  float32[1, s27=seq:row, 8]
consumer  mul_1        mul        float32[s52=batch, s27=seq:row, 8]  operand 'other'
beside it
source    arange       arange     int64[s27=seq:row]  in the feed
          tests/test_explain.py:N: y = self.read(self, x, tokens)
feed      slice_1      slice      int64[s27=seq:row]
feed      unsqueeze    unsqueeze  int64[s27=seq:row, 1]
joins     mul
fed by    lifted_inv_freq float32[B, S, 8], values, positions stream, at cos
""",
    causal: """
cut       arange  arange  int64[s27=seq:row]  -> lifted_slots, lifted_slots_keys
rebuilt   ge      ge      bool[s27=seq:row, s27=seq:col]
consumer  scaled_dot_product_attention  scaled_dot_product_attention
          float32[s52=batch, 1, s27=seq:row, 8]  operand 'attn_mask'
fed by    lifted_slots int64[B, S], positions, slots stream, at arange
fed by    lifted_slots_keys int64[B, S_all], positions, slots stream, at arange
""",
    documents: """
source    tokens     input      int64[s52=batch, s27=seq:row]  in the feed
feed      eq         eq         bool[s52=batch, s27=seq:row]
cut       cumsum     cumsum     int64[s52=batch, s27=seq:row]  -> lifted_tokens
rebuilt   unsqueeze  unsqueeze  int64[s52=batch, s27=seq:row, 1]
consumer  mul        mul        float32[s52=batch, s27=seq:row, 8]  operand 'other'
fed by    lifted_tokens int64[B, S], values, inputs stream, at cumsum
""",
    computed_start: """
source    b_table  buffer  float32[32, 8]  'table'
          narrow   narrow  float32[s27=seq:row, 8]
consumer  add_1    add     float32[s52=batch, s27=seq:row, 8]  operand 'other'
beside it
source    tokens   input   int64[s52=batch, s27=seq:row]
          max_1    max     int64[]
          tests/test_explain.py:N: y = self.read(self, x, tokens)
refused   item     item    a number
joins     narrow
nearest   rows of a table read by slice
          needs: a start that is constant or made from the length, step 1, a source made of
            state alone
          here: narrow(self=b_table[32, 8], dim=0, start=item (u0), length=sym_size_int_2 (s27))
          fails: a number computed from user inputs (at item)
tried     the value itself as a lifted input
          needs: one sequence dim, whole and not folded; no parameter and no random numbers
            above it
          fails: a number computed from user inputs
""",
    flipped: """
source    p_wpe    parameter  float32[32, 8]  'wpe'
          slice_1  slice      float32[s27=seq:row, 8]
refused   flip     flip       float32[s27=seq:row, 8]
consumer  add      add        float32[s52=batch, s27=seq:row, 8]  operand 'other'
nearest   features in another order
          needs: dims that run along neither batch nor sequence
          here: flip(self=slice_1[s27, 8], dims=[0])
          fails: aten.flip.default along the sequence
tried     the value itself as a lifted input
          needs: one sequence dim, whole and not folded; no parameter and no random numbers
            above it
          fails: parameter 'wpe' is above it and needs its gradient
""",
    equal_before: """
source    tokens       input      int64[s52=batch, s27=seq:row]
          slice_3      slice      int64[s52=batch, s27=seq:row]
...       2 more steps: unsqueeze, eq
refused   cumsum       cumsum     int64[s52=batch, s27=seq:row, s27=seq:col]
          gt           gt         bool[s52=batch, s27=seq:row, s27=seq:col]
          slice_4      slice      bool[s52=batch, s27=seq:row, s27=seq:col]
          unsqueeze_2  unsqueeze  bool[s52=batch, 1, s27=seq:row, s27=seq:col]
consumer  scaled_dot_product_attention  scaled_dot_product_attention
          float32[s52=batch, 1, s27=seq:row, 8]  operand 'attn_mask'
nearest   no rule for aten.cumsum.default
          needs: an op with a rule; none of the scans has one
          here: cumsum(self=eq[s52, s27, s27], dim=-1)
          fails: aten.cumsum.default is not known to be local along the sequence
tried     the value itself as a lifted input
          needs: one sequence dim, whole and not folded; no parameter and no random numbers
            above it
          fails: it runs along seq:row and seq:col; aten.cumsum.default is not known to be local
            along the sequence
""",
    running_sum: """
operand   embedding  embedding  float32[s52=batch, s27=seq:row, 8]  operand 'self'
          tests/test_explain.py:N: x = self.emb(tokens)
mixes     cumsum     cumsum     float32[s52=batch, s27=seq:row, 8]
          tests/test_explain.py:N: y = self.read(self, x, tokens)
nearest   aten.cumsum along features
          needs: a dim that runs along features: 2
          here: cumsum(self=embedding[s52, s27, 8], dim=1)
          fails: aten.cumsum runs along the sequence or batch
""",
    returned: """
source    arange  arange  int64[s27=seq:row]
refused   mul_1   mul     int64[s27=seq:row]
consumer  output  output    operand 'results.1'
nearest   a value that the graph reads
          needs: a consumer that is not the output
          fails: it is returned: the caller gets it in natural order, whatever the order of the
            tokens
""",
}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are shown relative to the directory that a command runs in."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("read", EXPECTED, ids=lambda read: read.__name__)
def test_what_is_shown(read: Read) -> None:
    assert shown(read) == EXPECTED[read].strip("\n")


def test_source_lines_are_those_of_the_code() -> None:
    lines = Path(__file__).read_text().splitlines()
    for read in EXPECTED:
        record, plan = analysed(export(read))
        places = [s.location for i in items(plan) for s in explain(record, plan, i).steps if s.location]
        assert places
        for place in places:
            if place.file == __file__:
                assert lines[place.line - 1].strip() == place.code.strip()


# What holds for every chain ------------------------------------------------------------------------------


def is_source(read: PositionRead, node: Node) -> bool:
    """Whether a node is what the report names as the source."""
    if read.source_kind == "iota":
        return node.base_op == "aten.arange"
    if read.source_kind == "length":
        return not content_operands(node)
    kind = NodeKind.INPUT if read.source_kind == "input" else NodeKind.STATE
    return node.kind is kind and node.fqn in (read.source, *read.aliases)


def check_chain(record: GraphRecord, steps: tuple[Step, ...]) -> None:
    for step, following in pairwise(steps):
        assert step.node in record.nodes[following.node].refs(), (step.node, following.node)
    for step in steps:
        tensor = record.nodes[step.node].tensor
        if tensor is not None:
            assert step.shape == tensor.shape and step.dtype == tensor.dtype
            assert len(step.roles) == len(tensor.shape)


def check_read(record: GraphRecord, plan: LiftPlan, read: PositionRead, made: Explanation) -> None:
    steps = made.steps
    assert steps[-1].node == read.node
    if read.source_kind == "is_causal":
        assert len(steps) == 1
        return
    assert is_source(read, record.nodes[steps[0].node]), (read, steps[0])
    assert steps[-2].node == read.value
    check_chain(record, steps)
    met = {step.node for step in steps}
    for branch in made.branches:
        check_chain(record, branch)
        assert branch[-1].node in met
        met |= {step.node for step in branch}
    if read.refusal:
        assert made.stopped and made.nearest and not made.fed_by
        return
    assert not made.stopped and not made.nearest
    edge = next(e for e in plan.frontier if (e.consumer, e.path) == (read.node, read.operand))
    assert {fed.input.name for fed in made.fed_by} == {plan.outputs[key].input.name for key in edge.keys}
    marks = {step.node: step.mark for chain in (steps, *made.branches) for step in chain[::-1]}
    assert "refused" not in marks.values()
    if read.form != "natural":
        for fed in made.fed_by:
            assert marks[fed.node] in ("cut", "gathered"), (fed, marks)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_chains_of_the_zoo(name: str, dynamic: bool) -> None:
    """From the source to the consumer, each step an operand of the next; readable in a terminal."""
    record, plan = analysed(export_case(name, dynamic=dynamic)[1])
    explainer = Explainer(record, plan)
    assert plan.report.reads
    for item in items(plan):
        made = explainer.explain(item)
        assert made == explain(record, plan, item)
        if isinstance(item, PositionRead):
            check_read(record, plan, item, made)
        for everything in (False, True):
            lines = explanation_lines(made, everything)
            assert all(len(line) <= WIDTH for line in lines), lines
            if everything:
                for step in made.steps:
                    assert any(step.node in line or "..." in line for line in lines)


@pytest.mark.parametrize("read", [computed_start, flipped, equal_before, returned], ids=lambda read: read.__name__)
def test_chains_of_refusals(read: Read) -> None:
    record, plan = analysed(export(read))
    refused = [item for item in plan.report.reads if item.refusal]
    assert refused
    for item in refused:
        made = explain(record, plan, item)
        check_read(record, plan, item, made)
        chains = (made.steps, *made.branches)
        assert [s.node for chain in chains for s in chain if s.mark == "refused"] == [made.stopped]


def test_a_value_may_be_cut_above_a_cut() -> None:
    """It is an input for one reader, and computed in the feed for another: both ways down are shown."""

    def mask(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
        index = torch.arange(x.shape[1]).cumsum(0)
        above = index.cumsum(0)
        return attend(x, (above[:, None] >= above) & (index[:, None] >= index))

    record, plan = analysed(export(mask))
    (read,) = [read for read in plan.report.reads if read.operand == "attn_mask"]
    made = explain(record, plan, read)
    check_read(record, plan, read, made)
    cuts = [[step.node for step in chain if step.mark == "cut"] for chain in (made.steps, *made.branches)]
    assert ["cumsum"] in cuts and any("cumsum_1" in nodes for nodes in cuts)


def test_roles_of_a_static_program() -> None:
    """Without symbols the dims still say what they run along, below the cut and above it."""
    record, plan = analysed(export(rotary, dynamic=False))
    steps = explain(record, plan, plan.report.reads[0]).steps
    assert [(step.shape, step.roles) for step in steps[-3:]] == [
        ((7, DIM), ("seq:row", "")),
        ((1, 7, DIM), ("", "seq:row", "")),
        ((3, 7, DIM), ("batch", "seq:row", "")),
    ]
    assert steps[0].roles == ("",)


# Long chains, the command line, the words ----------------------------------------------------------------


def long_chain(net: Net, x: Tensor, tokens: Tensor) -> Tensor:
    y = net.table[: x.shape[1]]
    for _ in range(9):
        y = y.sin()
    return x + y


def test_long_chains_are_elided() -> None:
    record, plan = analysed(export(long_chain))
    made = explain(record, plan, plan.report.reads[0])
    assert len(made.steps) == 12 > SHOWN
    short, full = (explanation_lines(made, everything) for everything in (False, True))
    assert any(re.search(r"\.\.\. +8 more steps: sin, sin", line) for line in short)
    assert not any("more steps" in line for line in full)
    nodes = [step.node for step in made.steps]
    named = [[line.split()[1] for line in lines if line.split()[1] in nodes] for lines in (short, full)]
    assert named == [[*nodes[:2], *nodes[-2:]], nodes]


TARGETS = '''
    """Targets."""
    import torch
    from test_explain import export, flipped, running_sum, sliced


    def lifts():
        return export(sliced)


    def refuses():
        return export(flipped)


    def mixes():
        return export(running_sum)
'''


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explain_targets.py").write_text(textwrap.dedent(TARGETS))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("targets")
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("lifts", 0, "fed by    lifted_table"), ("refuses", 1, "nearest   features in"), ("mixes", 1, "mixes     cumsum")],
)
def test_the_command_line(name: str, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", f"explain_targets:{name}"]) == code
    plain = capsys.readouterr().out
    assert words not in plain
    assert main(["scan", "--explain", f"explain_targets:{name}"]) == code
    out = capsys.readouterr().out
    assert words in out
    assert set(plain.splitlines()) <= set(out.splitlines())
    assert "\n\n\n" not in out
    assert main(["scan", f"explain_targets:{name}", "--explain", "--all"]) == code
    assert words in capsys.readouterr().out


@pytest.mark.usefixtures("targets")
@pytest.mark.parametrize(("name", "code"), [("lifts", 0), ("refuses", 1), ("mixes", 1)])
def test_json(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", f"explain_targets:{name}", "--json"]) == code
    plain = json.loads(capsys.readouterr().out)
    assert main(["scan", f"explain_targets:{name}", "--json", "--explain"]) == code
    report = json.loads(capsys.readouterr().out)
    explanations = report.pop("explanations")
    assert report == plain
    for kind in ("reads", "mixing"):
        assert [e["node"] for e in explanations[kind]] == [item["node"] for item in report[kind]]
        for item in explanations[kind]:
            assert item["steps"][-1]["node"] == item["node"]
            assert (item["stopped"] is None) is (code == 0)
            assert bool(item["nearest"]) is (code == 1)
    if name == "lifts":
        (read,) = explanations["reads"]
        assert [step["mark"] for step in read["steps"]] == ["source", "cut", "consumer"]
        assert read["fed_by"] == [{"name": "lifted_table", "node": read["steps"][1]["node"]}]
        assert read["steps"][1]["roles"] == ["seq:row", ""]


def test_every_rule_has_words() -> None:
    """And no words speak of an op that has no rule."""
    from buffer_lifting.local_rules import rule_docs

    assert set(PATTERNS) == set(rule_docs()), "PATTERNS of patterns.py says what each local rule reads and needs"


def test_the_kind_of_an_op() -> None:
    assert family_of("aten.cumsum") == "scans"
    assert family_of("aten.cumsum_") == "scans"
    assert family_of("aten.fft_rfft") == "Fourier transforms"
    assert family_of("mylib.scan") == ""
    assert no_rule("aten.scatter", ["aten.gather", "aten.cos"]) == (
        "an op with a rule, as these scatter and gather have: gather"
    )
    assert no_rule("mylib.scan", ["aten.cos"]) == "an op with a rule"
    assert no_rule("aten.coss", ["aten.cos"]) == "an op with a rule, as: cos"


def test_it_needs_no_torch() -> None:
    code = "import sys, buffer_lifting.explain, buffer_lifting.render_explain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
