"""What a read is made from: every source counts, in findings, suppressions, baselines, diffs and snapshots."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.inspection.diagnostics import Diagnostic, check_record
from buffer_lifting.inspection.diff import compare
from buffer_lifting.inspection.outline import outline
from buffer_lifting.inspection.outline_text import outline_text
from buffer_lifting.inspection.targets import check_target

DIM, TOKENS = 8, torch.zeros(3, 11, dtype=torch.long)
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Tables, and a forward that is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.body = forward
        self.e = nn.Embedding(16, DIM)
        self.learned = nn.Parameter(torch.randn(64, DIM))
        for name in ("alpha", "beta", "gamma"):
            self.register_buffer(name, torch.randn(64, DIM))
        self.register_buffer("inv_freq", torch.rand(DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self, tokens)


def export(forward: Forward) -> ExportedProgram:
    """A dynamic export of a net with this forward."""
    torch.manual_seed(0)
    return torch.export.export(Net(forward), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))


def check_archive(name: str) -> tuple[Diagnostic, ...]:
    """The findings of a file by the reader that executes nothing."""
    return check_record(read_archive(Path(name)))


def one(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + net.alpha[: ids.shape[1]]


def two(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + (net.alpha[: ids.shape[1]] + net.beta[: ids.shape[1]])


def three(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + (net.alpha[: ids.shape[1]] + net.beta[: ids.shape[1]] * net.gamma[1 : ids.shape[1] + 1])


def shifted(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + net.alpha[1 : ids.shape[1] + 1]


def stepped(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + net.alpha[: 2 * ids.shape[1] : 2]


def cosine(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) + net.alpha[: ids.shape[1]].cos()


def scores(net: Net, ids: Tensor, hidden: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x, i = net.e(ids), torch.arange(ids.shape[1])
    return (x @ x.mT).masked_fill(hidden(i[:, None], i[None]), -1e9).softmax(-1) @ x


def causal(net: Net, ids: Tensor) -> Tensor:
    return scores(net, ids, lambda i, j: i < j)


def inverted(net: Net, ids: Tensor) -> Tensor:
    return scores(net, ids, lambda i, j: i > j)


def window(net: Net, ids: Tensor) -> Tensor:
    return scores(net, ids, lambda i, j: (i < j) | (i - j > 4))


def narrow_window(net: Net, ids: Tensor) -> Tensor:
    return scores(net, ids, lambda i, j: (i < j) | (i - j > 3))


def rope(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) * (torch.arange(ids.shape[1])[:, None] * net.inv_freq).cos()


def looked_up(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) * net.alpha[torch.arange(ids.shape[1])]


def joined(net: Net, ids: Tensor) -> Tensor:
    return net.e(ids) * (torch.arange(ids.shape[1])[:, None] * net.inv_freq + net.beta[: ids.shape[1]])


def test_all_sources_are_named() -> None:
    (read,) = bl.scan(export(three)).reads
    assert read.sources == ("alpha", "beta", "gamma") and read.source == "alpha"
    (found,) = bl.check(export(three))
    assert found.message.startswith("buffer 'alpha' with 'beta', 'gamma' is read by position")
    assert found.sources == read.sources
    keys = {item.key for forward in (one, two, three) for item in bl.check(export(forward))}
    assert {key[1] for key in keys} == {"alpha", "alpha, beta", "alpha, beta, gamma"}


@pytest.mark.parametrize(
    ("forward", "code", "words"),
    [
        (rope, "BL001", "buffer 'inv_freq' is read by position"),
        (looked_up, "BL001", "buffer 'alpha' is read by position"),
        (joined, "BL001", "buffer 'beta' with 'inv_freq' is read by position"),
        (lambda net, ids: net.e(ids) + net.learned[torch.arange(ids.shape[1])], "BL002", "parameter 'learned' is read"),
        (lambda net, ids: net.e(ids) * torch.arange(ids.shape[1])[:, None], "BL003", "the index from aten.arange is"),
        (causal, "BL003", "the index from aten.arange is read"),
    ],
)
def test_the_code_is_that_of_the_source(forward: Forward, code: str, words: str) -> None:
    (found,) = bl.check(export(forward))
    assert found.code == code and words in found.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (one, two),
        (two, three),
        (one, shifted),
        (one, stepped),
        (one, cosine),
        (causal, inverted),
        (causal, window),
        (window, narrow_window),
    ],
)
def test_what_a_read_is_made_of_is_compared(old: Forward, new: Forward) -> None:
    before, after = outline(export(old)), outline(export(new))
    assert not compare(before, outline(export(old))).changes, "another export of the same"
    assert any(change.entry.section == "reads" for change in compare(before, after).changes)
    assert outline_text(before) != outline_text(after), "what a snapshot holds"
    lifted = [outline(bl.lift(export(forward))) for forward in (old, new)]
    assert not compare(before, lifted[0]).changes and compare(*lifted).changes


def test_expressions() -> None:
    texts = {f.__name__: bl.scan(export(f)).reads[0].expression for f in (one, shifted, stepped, causal, window)}
    assert texts["one"] == "slice('alpha', dim=0, end=seq)"
    assert texts["shifted"] == "slice('alpha', dim=0, start=1, end=seq + 1)"
    assert texts["stepped"] == "slice('alpha', dim=0, end=2*seq, step=2)"
    assert (
        texts["causal"]
        == "lt(unsqueeze(arange(end=seq), dim=1), unsqueeze(arange(end=seq), dim=0)); value=-1000000000.0"
    )
    assert re.fullmatch(r"or\(lt\(…\), gt\(…\)\) #[0-9a-f]{8}; value=-1000000000\.0", texts["window"])


def test_layers_have_one_text() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.randn(64, DIM))
            self.register_buffer("b", torch.randn(64, DIM))

        def forward(self, x: Tensor) -> Tensor:
            S = x.shape[1]
            return x * (self.a[:S].cos() * self.b[1 : S + 1].sin() + self.b[:S].cos() * self.a[2 : S + 2].sin())

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(16, DIM)
            self.layers = nn.Sequential(*(Layer() for _ in range(3)))

        def forward(self, ids: Tensor) -> Tensor:
            return self.layers(self.e(ids))

    program = torch.export.export(Deep(), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    reads = bl.scan(program).reads
    assert len(reads) == 3 and len({read.expression for read in reads}) == 1 and "#" in reads[0].expression
    assert "'layers.{0-2}.a' read by aten.mul.Tensor in layers.{0-2}:" in outline_text(outline(program))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a program whose read has two sources."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.export.save(export(one), "model.pt2")
    return tmp_path


def test_a_new_buffer_in_a_known_read_is_a_new_finding(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model.pt2", "--baseline", "known.json", "--update-baseline"]) == 0
    assert main(["check", "model.pt2", "--baseline", "known.json"]) == 0
    torch.export.save(export(two), here / "model.pt2")
    capsys.readouterr()
    assert main(["check", "model.pt2", "--baseline", "known.json"]) == 1
    captured = capsys.readouterr()
    assert "buffer 'alpha' with 'beta'" in captured.out and "stale entry of model.pt2" in captured.err


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["BL001 alpha: fed by hand"], 1),
        (["BL001 beta: fed by hand"], 1),
        (["BL001 alpha: fed by hand", "BL001 beta: so is this"], 0),
        (["BL001 alpha: fed by hand", "BL002 beta: another rule"], 1),
        (["BL001 *: all of them"], 0),
    ],
)
def test_every_source_has_to_be_suppressed(
    lines: list[str], code: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.export.save(export(two), here / "model.pt2")
    (here / "setup.cfg").write_text("\n    ".join(["[buffer_lifting]\nsuppress =", *lines]) + "\n")
    assert main(["check", "model.pt2"]) == code
    assert capsys.readouterr().err.count("matches no finding") == (len(lines) if code else 0)
    main(["check", "model.pt2", "--format", "json"])
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["sources"] == ["alpha", "beta"]
    reasons = "; ".join(line.partition(": ")[2] for line in lines)
    assert found["suppressed"] == (None if code else {"by": "configuration", "reason": reasons})


def test_findings_name_their_target_where_there_are_several(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model.pt2"]) == 1
    assert "(model.pt2)" not in capsys.readouterr().out
    torch.export.save(export(two), here / "other.pt2")
    assert main(["check", "model.pt2", "other.pt2"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "BL001" in line]
    assert [line.rpartition(" ")[2] for line in lines] == ["(model.pt2)", "(other.pt2)"]
    assert main(["check", "model.pt2", "other.pt2", "--format", "github"]) == 1
    assert "(other.pt2)" in capsys.readouterr().out


def test_the_page_draws_every_source(here: Path) -> None:
    torch.export.save(export(two), here / "model.pt2")
    assert main(["report", "model.pt2", "-o", "page.html"]) == 1
    page = (here / "page.html").read_text()
    (picture,) = re.findall(r"<svg[^>]*aria-label=\"model.pt2 before lifting[^\"]*\".*?</svg>", page, re.DOTALL)
    assert "alpha" in picture and "beta" in picture


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda x, p, n: torch.add(x, p[:n], alpha=2), lambda x, p, n: torch.add(x, p[:n], alpha=3)),
        (lambda x, p, n: torch.add(x, p[:n]), lambda x, p, n: torch.add(x, p[:n], alpha=3)),
        (lambda x, p, n: torch.addcmul(x, x, p[:n], value=2), lambda x, p, n: torch.addcmul(x, x, p[:n], value=3)),
    ],
)
def test_numbers_of_the_reader_are_compared(old: Callable[..., Tensor], new: Callable[..., Tensor]) -> None:
    before, after = (outline(export(lambda net, ids, f=f: f(net.e(ids), net.alpha, ids.shape[1]))) for f in (old, new))
    (change,) = compare(before, after).changes
    assert change.kind == "changed" and change.entry.section == "reads"


def test_the_sides_of_a_product_are_no_change() -> None:
    one_way = outline(export(lambda net, ids: net.e(ids) * net.alpha[: ids.shape[1]]))
    assert not compare(one_way, outline(export(lambda net, ids: net.alpha[: ids.shape[1]] * net.e(ids)))).changes


def test_a_moved_boundary_is_a_change() -> None:
    """Where the residual adds of the root are all that crosses, as in most decoders."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(16, DIM)
            self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.e(ids)
            for layer in self.layers:
                x = x + layer(x)
            return x

    program = torch.export.export(Root(), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    lifted = bl.lift(program)
    early, late = (bl.partition(lifted, split_points=[point]) for point in ("layers.1", "layers.3"))
    changes = compare(outline(early), outline(late)).changes
    assert {change.entry.section for change in changes} == {"stages"}
    assert outline_text(outline(early)) != outline_text(outline(late))
    assert "stage 0: keyword inputs none, parameters 3 of e, layers.0" in outline_text(outline(early))


def test_a_written_cache_is_known_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(name: str) -> Forward:
        def forward(net: Net, ids: Tensor) -> Tensor:
            getattr(net, name)[: ids.shape[1]] = net.alpha[: ids.shape[1]]
            return net.e(ids) + getattr(net, name)[: ids.shape[1]]

        return forward

    found = {name: [d for d in bl.check(export(written(name))) if not d.node] for name in ("beta", "gamma")}
    assert [(d.code, d.source) for own in found.values() for d in own] == [("BL101", "beta"), ("BL101", "gamma")]
    assert all(
        d.location is not None and "getattr(net, name)[" in d.location.code for own in found.values() for d in own
    )
    assert compare(*(outline(export(written(name))) for name in found)).changes
    torch.export.save(export(written("beta")), "model.pt2")
    Path("setup.cfg").write_text("[buffer_lifting]\nselect = BL101\nsuppress =\n    BL101 beta*: known\n")
    assert main(["check", "model.pt2", "--select", "BL101"]) == 1, "the read of it has another source as well"
    assert "1 suppressed" in capsys.readouterr().err


@pytest.mark.parametrize("size", [2 * Dim("h", min=1, max=20), Dim("h", min=2, max=31) + 1, 4 * Dim("h", min=1, max=9)])
def test_a_derived_dim(size: object, here: Path) -> None:
    ids = torch.zeros(3, 12, dtype=torch.long)
    program = torch.export.export(Net(one), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: size},))
    torch.export.save(program, "model.pt2")
    bl.lift(program).save("model.lifted")
    (found,) = bl.check(program)
    assert found.code == "BL001" and [d.key for d in check_archive("model.pt2")] == [found.key]
    assert main(["check", "model.lifted"]) == 0


def test_a_range_of_something_else_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(
        Net(one), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: 2 * Dim("h", min=1, max=20) - 1},)
    )
    torch.export.save(program, "model.pt2")
    with zipfile.ZipFile("model.pt2") as archive, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("models/model.json"):
                document = json.loads(content)
                (key,) = [key for key in document["range_constraints"] if not key.isidentifier()]
                document["range_constraints"]["__import__('os').system('touch ran')"] = document[
                    "range_constraints"
                ].pop(key)
                content = json.dumps(document).encode()
            bad.writestr(name, content)
    assert main(["check", "bad.pt2"]) == 2 and not Path("ran").exists()
    assert "BL901" in capsys.readouterr().err


def test_vmap_has_one_name(here: Path) -> None:
    program = export(lambda net, ids: torch.vmap(lambda row: row + net.alpha[: ids.shape[1]])(net.e(ids)))
    torch.export.save(program, "model.pt2")
    assert [d.key for d in bl.check(program)] == [d.key for d in check_archive("model.pt2")]


def test_the_page_keeps_what_stays_in_the_stage(here: Path) -> None:
    torch.export.save(export(lambda net, ids: net.e(ids) + net.learned[torch.arange(ids.shape[1])]), "model.pt2")
    assert main(["report", "model.pt2", "-o", "page.html"]) == 1
    page = Path("page.html").read_text()
    (picture,) = re.findall(r"<svg[^>]*aria-label=\"model.pt2 after lifting[^\"]*\".*?</svg>", page, re.DOTALL)
    assert "learned" in picture and "lifted_positions" in picture


def test_the_class_of_the_module_outlives_a_save(here: Path) -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.attn = nn.Embedding(16, DIM), Causal()

        def forward(self, ids: Tensor) -> Tensor:
            return self.attn(self.e(ids)[:, None])[:, 0]

    program = torch.export.export(Model(), (TOKENS,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    staged = bl.partition(bl.lift(program), num_stages=1)
    staged.save("stages")
    (live,) = bl.check(staged)
    (saved,) = check_target("stages", None)
    assert live == saved and live.code == "BL004" and live.module_class.endswith("Causal")


def test_options_between_targets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(export(two), "other.pt2")
    assert main(["check", "model.pt2", "--exit-zero", "other.pt2"]) == 0
    assert "2 findings in 2 targets" in capsys.readouterr().err
    assert main(["check", "model.pt2", "--exit-zero", "other.pt2", "--nonsense"]) == 2
    assert "unrecognized arguments: other.pt2 --nonsense" in capsys.readouterr().err
