"""The page: its structure, that nothing in it is markup of the program's, its data, pictures and stages."""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zlib
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from report_pages import page_of_kinds
from zoo import export_case

import buffer_lifting as bl
from buffer_lifting.cli import main
from buffer_lifting.graph.archive import read_archive
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import diagnostic, numbered
from buffer_lifting.inspection.html_report.build import Cut, view_of
from buffer_lifting.inspection.html_report.findings import source_line
from buffer_lifting.inspection.html_report.graph_section import whole_after, whole_before
from buffer_lifting.inspection.html_report.page import render_html
from buffer_lifting.inspection.html_report.stage_section import draw_stages
from buffer_lifting.inspection.html_report.stage_view import per_token
from buffer_lifting.inspection.html_report.svg import draw_chain, draw_columns
from buffer_lifting.inspection.html_report.views import Arrow, Box, Picture, ProgramView
from buffer_lifting.inspection.lifted_file import read_lifted_graph
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult, Failure, Reported, Suppression
from buffer_lifting.inspection.stage_files import read_stages
from buffer_lifting.inspection.targets import Scanned
from buffer_lifting.layers import spans
from buffer_lifting.program import LiftedInput
from buffer_lifting.scanner import scan_record

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
VOID = {"meta", "link", "input", "br"}
EVIL = "</script><img src=x onerror=alert(1)>\"'&amp;<!--\u2028\x1b[31m\ud800"
AUTO = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}

MODEL = """
    import torch
    from torch.export import Dim
    import buffer_lifting as bl


    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(64, 8))
            self.places = torch.nn.Parameter(torch.randn(64, 8))

        def forward(self, x):
            x = x + self.table[: x.shape[1]]  # </script><img src=x onerror=alert(1)> &lt; "q" 'q'
            return x + self.places[: x.shape[1]].flip(0)


    class Model(torch.nn.Module):
        def __init__(self, layers=3):
            super().__init__()
            self.embedding = torch.nn.Embedding(61, 8)
            for index in range(layers):
                self.add_module(f"<b>layers&{index}", Layer())

        def forward(self, tokens):
            x = self.embedding(tokens)
            for name, layer in self.named_children():
                if "layers" in name:
                    x = layer(x)
            return x


    def program():
        dynamic = {0: Dim.AUTO, 1: Dim.AUTO}
        return torch.export.export(Model(), (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=(dynamic,))
"""


class Page(HTMLParser):
    """A parsed page: elements with their attributes and texts. Asserts that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.titles = 0  # outside of pictures
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        self.titles += tag == "title" and "svg" not in self.stack
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert self.stack.pop() == tag

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of a tag; ``class_`` is one of the classes."""
        wanted = attributes.pop("class_", None)
        return [
            found
            for name, found in self.elements
            if name == tag
            and (wanted is None or wanted in (found.get("class") or "").split())
            and all(found.get(key) == value for key, value in attributes.items())
        ]

    def text(self, tag: str) -> list[str]:
        """The texts directly in the elements of a tag."""
        return [data for name, data in self.texts if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """The embedded data."""
        return json.loads(next(data for data in self.text("script") if data.startswith("{")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked llama of 4 layers as a file, lifted, and in 3 stages; a small GPT; the model above."""
    directory = tmp_path_factory.mktemp("report")
    (directory / ".git").mkdir()
    (directory / "report_model.py").write_text(textwrap.dedent(MODEL))
    program = export_case("llama_masked", layers=4)[1]
    torch.export.save(program, directory / "llama.pt2")
    lifted = bl.context_parallel(bl.lift(program), size=1)
    lifted.save(directory / "llama.lifted")
    bl.partition(lifted, num_stages=3).save(directory / "stages")
    torch.export.save(export_case("nanogpt")[1], directory / "gpt.pt2")
    return directory


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in that directory."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", [str(files), *sys.path])
    return files


def scanned(path: Path) -> Scanned:
    """The record and plan of a file."""
    record = read_archive(path)
    return Scanned(record, scan_record(record, None))


# Structure


@pytest.fixture(scope="module")
def texts(files: Path) -> dict[str, str]:
    """Pages by name: of a program, of one that is refused in part, of several targets, of stages, of nothing."""
    pages = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, targets in {
        "program": ["llama.pt2"],
        "refused": ["report_model:program"],
        "several": ["gpt.pt2", "stages", "missing.pt2", "llama.pt2"],
        "stages": ["stages"],
        "nothing": ["missing.pt2"],
    }.items():
        command = [sys.executable, "-m", "buffer_lifting", "check", *targets, "--format", "html"]
        done = subprocess.run(command, cwd=files, env=environment, capture_output=True, timeout=200)
        assert done.returncode == {"stages": 0, "several": 2, "nothing": 2}.get(name, 1), done.stderr
        pages[name] = done.stdout.decode("ascii")
    return pages


NAMES = ["program", "refused", "several", "stages", "nothing"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole(name: str, texts: dict[str, str]) -> None:
    page = Page(texts[name])
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for found in page.all("a"):
        href = found["href"] or ""
        assert href.startswith("#") and href[1:] in ids
    assert len(page.all("h1")) == len(page.all("main")) == page.titles == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(below <= above + 1 for above, below in pairwise(levels))
    labelled = [found for found in page.all("svg") if "aria-hidden" not in found]
    assert all(found.get("aria-label") and found.get("role") in ("img", "group") for found in labelled)
    assert len(page.all("html", lang="en")) == 1 and len(page.all("a", class_="skip")) == 1


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded_and_only_our_script_may_run(name: str, texts: dict[str, str]) -> None:
    page = Page(texts[name])
    (policy,) = [found["content"] or "" for found in page.all("meta") if "http-equiv" in found]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    scripts = page.all("script")
    assert [found.get("type") for found in scripts] == ["application/json", None]
    for kind, text in (("script", page.text("script")[1]), ("style", page.text("style")[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for tag, found in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "b")
        assert not any(key.startswith("on") or key in ("style", "src", "srcset", "action") for key in found), tag
        assert (found.get("href") or "#").startswith(("#", "data:,"))
    assert "://" not in re.sub(r"<script.*?</script>", "", texts[name], flags=re.S)


def test_the_data_is_that_of_the_json_format(here: Path, texts: dict[str, str], capsys: Capture) -> None:
    for name, targets in {"program": ["llama.pt2"], "refused": ["report_model:program"]}.items():
        assert main(["check", *targets, "--format", "json"]) == 1
        data = Page(texts[name]).data
        assert data["version"] == 1
        assert data["check"] == json.loads(capsys.readouterr().out)
        assert [program["target"] for program in data["programs"]] == targets
    several = Page(texts["several"]).data
    assert [program["target"] for program in several["programs"]] == ["gpt.pt2", "stages", "llama.pt2"]
    assert [failure["target"] for failure in several["check"]["failures"]] == ["missing.pt2"]


@pytest.mark.parametrize("name", NAMES)
def test_every_finding_and_read_is_shown(name: str, texts: dict[str, str]) -> None:
    page = Page(texts[name])
    data = page.data
    cards, reads = page.all("article", class_="card"), page.all("details", class_="read")
    shown = Counter[str | None]()
    for card in cards:
        shown[card["data-code"]] += int(card["data-count"] or 0)
    assert shown == Counter(item["code"] for item in data["check"]["findings"])
    for number, program in ((data["check"]["targets"].index(p["target"]), p) for p in data["programs"]):
        own = [found for found in reads if found["data-target"] == str(number)]
        assert [found["id"] for found in own] == [f"read-{number}-{group['id']}" for group in program["reads"]]
        assert [int(found["data-count"] or 0) for found in own] == [len(g["members"]) for g in program["reads"]]
    linked = {found["href"] for found in page.all("a")}
    assert {f"#rule-{item['code']}" for item in data["check"]["findings"]} <= linked


# Escaping


def test_text_of_a_program_is_never_markup(texts: dict[str, str]) -> None:
    page = Page(texts["refused"])
    line = "self.table[: x.shape[1]]  # </script><img src=x onerror=alert(1)> &lt; \"q\" 'q'"
    assert any(line.endswith(text) and "onerror" in text for text in page.text("code"))
    assert "<b>layers&0.table" in "".join(page.text("code"))
    assert "<img" not in texts["refused"] and "<b>" not in texts["refused"]


def test_hostile_text_in_every_field(tmp_path: Path) -> None:
    where = Location(f"/x/{EVIL}.py", 3, EVIL, EVIL)
    found = numbered([diagnostic("BL001", EVIL, EVIL, where, EVIL, EVIL, EVIL, EVIL, EVIL)] * 2)
    known = Reported(EVIL, found[1], Suppression("configuration", EVIL))
    result = CheckResult((EVIL, "b"), (Reported(EVIL, found[0]), known), (Failure("b", EVIL),), (EVIL,))
    box = Box(EVIL, "source", EVIL, EVIL, 0, EVIL)
    picture = Picture((box, Box("b", "op", EVIL)), (Arrow(EVIL, "b"),), EVIL)
    view = ProgramView(EVIL, EVIL, problem=EVIL, unsplit=EVIL, notes=(EVIL,), tied={EVIL: (0, 1)})
    page = render_html(result, Places(tmp_path), [view])
    parsed = Page(page)
    assert [data for data in parsed.text("script") if data.startswith("{")] and len(parsed.all("script")) == 2
    assert not parsed.all("img") and "<!--" not in page
    assert all(char == "\n" or char.isprintable() for _, text in parsed.texts for char in text)
    assert parsed.data["check"]["findings"][0]["message"] == EVIL
    for drawing in (draw_chain(picture, EVIL), draw_columns(picture, EVIL)):
        svg = Page(drawing)
        assert not svg.all("img") and len(svg.all("rect")) == 2


def test_the_marked_part_of_a_line_is_escaped() -> None:
    assert source_line("a<b>c", 1, 3) == "<pre><code>a<mark>&lt;b&gt;</mark>c</code></pre>"
    assert source_line("<i>", 0, 3) == "<pre><code>&lt;i&gt;</code></pre>"


# Size


def expanded(page: str) -> str:
    """A page with everything that it holds compressed put in its place."""

    def inflated(name: str) -> str:
        (found,) = re.findall(
            rf'<script type="text/plain" id="{name}" data-encoding="deflate-base64">(.*?)</script>', page
        )
        return zlib.decompress(base64.b64decode(found, validate=True)).decode("ascii")

    parts = json.loads(inflated("parts"))
    used: list[int] = []

    def part(match: re.Match[str]) -> str:
        used.append(int(match[2]))
        return parts[used[-1]] if match[1] == "later" else f"<div>{parts[used[-1]]}</div>"

    text = re.sub(r'<script type="text/plain" id="(data|parts)".*?</script>', "", page)
    text = re.sub(r'<noscript>.*?</noscript><p id="large".*?</p>', "", text)
    while (text := re.sub(r'<div data-(later|body)="(\d+)"></div>', part, old := text)) != old:
        pass
    assert sorted(used) == list(range(len(parts))), "each part once"
    return text.replace("</footer>", f'</footer><script type="application/json" id="data">{inflated("data")}</script>')


@pytest.mark.parametrize(("kinds", "layers"), [(500, 1), (1, 2500), (30, 80)])
def test_a_large_page_has_what_one_without_compression_has(
    kinds: int, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = page_of_kinds(kinds, tmp_path, layers)
    for name in ("FINDINGS_ROOM", "READS_ROOM"):
        monkeypatch.setattr(f"buffer_lifting.inspection.html_report.page.{name}", 10**9)
    monkeypatch.setattr("buffer_lifting.inspection.html_report.later.DATA_ROOM", 10**9)
    whole, other = Page(page_of_kinds(kinds, tmp_path, layers)), Page(expanded(small))
    assert "<img" not in expanded(small) and whole.data == other.data and not whole.all("noscript")

    def content(page: Page) -> tuple[list[Any], str]:
        """Elements but those that only hold others, and texts."""
        kept = [found for found in page.elements if found[0] not in ("div", "script")]
        return kept, " ".join(" ".join(data for tag, data in page.texts if tag != "script").split())

    assert content(other) == content(whole)


def test_3200_findings_are_below_two_megabytes(tmp_path: Path) -> None:
    assert len(page_of_kinds(3200, tmp_path)) < 2e6
    assert len(page_of_kinds(1, tmp_path, 3200)) < 1e6


# Pictures


def titles(picture: Picture | None) -> list[tuple[str, str]]:
    """Kind and title of each box."""
    assert picture is not None
    return [(box.kind, box.title) for box in picture.boxes]


def test_equal_reads_of_layers_are_one(files: Path) -> None:
    view = view_of("llama.pt2", scanned(files / "llama.pt2"))
    assert sum(len(group.members) for group in view.groups if group.status == "lifted") == len(
        bl.scan(torch.export.load(files / "llama.pt2")).reads
    )
    rotary = next(group for group in view.groups if group.source == "freqs_cis")
    assert len(rotary.members) == 8, "q and k"
    assert {member.module for member in rotary.members} == {f"layers.{index}.attention" for index in range(4)}
    before, after = titles(rotary.before), titles(rotary.after)
    assert before[0] == ("source", "buffer freqs_cis") and before[-1] == ("consumer", "mul")
    assert ("op", "slice") in before
    assert after[0] == ("feed", "feed: freqs_cis") and ("input", rotary.inputs[0]) in after
    assert ("op", "slice") not in after, "the feed takes the rows"


def test_tables_of_layers_are_one(files: Path) -> None:
    view = view_of("gpt.pt2", scanned(files / "gpt.pt2"))
    bias = next(group for group in view.groups if group.source == "transformer.h.*.attn.bias")
    assert [member.source for member in bias.members] == [f"transformer.h.{index}.attn.bias" for index in range(2)]


def test_a_refused_read_shows_where_it_stops(here: Path) -> None:
    from report_model import program

    view = view_of("t", program())
    assert [group.status for group in view.groups] == sorted((g.status for g in view.groups), key="refused".__ne__)
    group = view.groups[0]
    assert ("refused", "flip") in titles(group.before) and group.after is None and group.nearest
    whole = whole_after(view, 0)
    kinds = Counter(box.kind for box in whole.boxes)
    assert kinds["refused"] == kinds["source"] == 3 and kinds["input"] == kinds["feed"] == 3


def test_the_whole_picture_joins_sources_inputs_and_consumers(files: Path) -> None:
    view = view_of("llama.pt2", scanned(files / "llama.pt2"))
    for whole in (whole_before(view, 0), whole_after(view, 0)):
        ids = {box.id for box in whole.boxes}
        assert all({arrow.start, arrow.end} <= ids for arrow in whole.arrows)
        links = {box.link for box in whole.boxes if box.link}
        assert links == {f"read-0-{group.id}" for group in view.groups if group.status != "handled"}
        reached = {arrow.end for arrow in whole.arrows}
        assert links <= reached
    assert {box.title for box in whole_after(view, 0).boxes if box.kind == "input"} == {i.name for i in view.lifted}


def test_a_lifted_program_shows_what_stands_for_its_sources(files: Path) -> None:
    lifted = bl.load(files / "llama.lifted")
    view = view_of("t", lifted)
    assert view.lifted == lifted.inputs and view.notes
    sources = {group.source: group for group in view.groups if group.status == "lifted"}
    assert set(sources) == {"attention_mask", *(item.source for item in lifted.inputs)}
    rotary = sources["freqs_cis"]
    assert len(rotary.members) == 8 and ("consumer", "mul") in titles(rotary.after)
    assert sum(len(group.members) for group in sources.values()) == len(lifted.report.reads)


def test_a_deep_and_a_wide_picture_are_drawn() -> None:
    chain = [Box(str(index), "op", str(index)) for index in range(5000)]
    arrows = [Arrow(str(index), str(index + 1)) for index in range(4999)]
    start = time.perf_counter()
    deep = Page(draw_chain(Picture(tuple(chain), tuple(arrows), "deep"), "deep"))
    fan = [Box("s", "source", "s"), *(Box(str(index), "consumer", "c", column=1) for index in range(5000))]
    wide = Page(draw_columns(Picture(tuple(fan), tuple(Arrow("s", str(i)) for i in range(5000)), "wide"), "wide"))
    assert len(deep.all("rect")) == 5000 and len(wide.all("rect")) == 5001
    assert time.perf_counter() - start < 20
    heights = {rect["y"] for rect in deep.all("rect")}
    assert len(heights) == 5000, "one below the other"


def test_boxes_do_not_cover_each_other(files: Path) -> None:
    for name in ("llama.pt2", "gpt.pt2"):
        view = view_of(name, scanned(files / name))
        drawings = [draw_columns(whole(view, 0), "w") for whole in (whole_before, whole_after)]
        for group in view.groups:
            drawings += [draw_chain(picture, "p") for picture in (group.before, group.after) if picture]
        for drawing in drawings:
            svg = Page(drawing)
            places = [tuple(float(rect[key] or 0) for key in ("x", "y", "width", "height")) for rect in svg.all("rect")]
            (root,) = svg.all("svg")
            for index, (x, y, width, height) in enumerate(places):
                assert x >= 0 and x + width <= float(root["width"] or 0) and y + height <= float(root["height"] or 0)
                for x2, y2, _, _ in places[:index]:
                    assert abs(x - x2) >= width or abs(y - y2) >= height


# Stages


def test_stages_in_memory_and_saved_are_the_same(files: Path) -> None:
    lifted = bl.load(files / "llama.lifted")
    staged = bl.partition(lifted, num_stages=3)
    memory, saved = view_of("t", staged), view_of("t", read_stages(files / "stages"))
    for view in (memory, saved):
        assert [stage.sends for stage in view.stages] == [stage.boundary_bytes for stage in staged.stages]
        assert [stage.outputs for stage in view.stages] == [stage.outputs for stage in staged.stages]
        counts = [sum(p.numel() for p in stage.module.parameters()) for stage in staged.stages]
        assert [stage.elements for stage in view.stages] == counts
    for one, other in zip(memory.stages, saved.stages, strict=True):
        kinds = [[(entry.name, entry.kind, entry.per_token) for entry in stage.inputs] for stage in (one, other)]
        assert kinds[0] == kinds[1] and one.modules == other.modules
        sent = [[entry.size for entry in stage.inputs if entry.kind == "activation"] for stage in (one, other)]
        assert sent[0] == sent[1]
    groups = [Counter((g.source, g.status, len(g.members), g.inputs) for g in view.groups) for view in (memory, saved)]
    assert groups[0] == groups[1]
    assert saved.inputs == memory.inputs


def test_a_lifted_file_is_shown_without_its_tensors(files: Path) -> None:
    path = files / "llama.lifted"
    memory, saved = view_of("t", bl.load(path)), view_of("t", read_lifted_graph(path))
    assert saved == memory and saved.groups


def test_the_bytes_on_the_edges(files: Path) -> None:
    lifted = bl.load(files / "llama.lifted")
    staged = bl.partition(lifted, num_stages=3)
    view = view_of("t", staged)
    sample = lifted.program.example_inputs
    assert sample is not None
    batch, length = next(iter(sample[1].values())).shape[:2] if sample[1] else sample[0][0].shape[:2]
    feed = staged.feed(batch, length)
    for stage in view.stages:
        for entry in stage.inputs:
            if entry.kind == "lifted":
                assert entry.size == feed[entry.name].numel() * feed[entry.name].element_size()
                assert entry.size == batch * length * (entry.per_token or 0)
            assert entry.size is not None
    received = [sum(e.size or 0 for e in stage.inputs if e.kind == "activation") for stage in view.stages]
    assert received[1:] == [stage.boundary_bytes for stage in staged.stages[:-1]]
    svg = "".join(Page(draw_stages(view.stages, "s")).text("text"))
    for stage in staged.stages[:-1]:
        assert f"{stage.boundary_bytes:,} bytes" in svg


def test_bytes_a_token() -> None:
    def item(dtype: str) -> LiftedInput:
        return LiftedInput("x", "values", "positions", "row", "t", dtype, (4, 2), "seq")

    dtypes = ("float32", "bfloat16", "complex64", "bool", "int64", "strange")
    assert [per_token(item(dtype)) for dtype in dtypes] == [32, 16, 64, 8, 64, None]


def test_modules_of_a_stage() -> None:
    names = ["emb.weight", *(f"m.layers.{i}.mlp.0.weight" for i in (3, 0, 1, 2, 5)), "norm.weight", "bias"]
    assert spans(names) == ("emb", "m.layers.0-3,5", "norm", "bias")


def test_a_program_is_shown_split(files: Path) -> None:
    path = files / "llama.pt2"
    program = torch.export.load(path)
    view = view_of(str(path), program, cut=Cut(num_stages=2))
    assert len(view.stages) == 2 and view.groups and not view.unsplit
    view = view_of(str(path), program, cut=Cut(num_stages=99))
    assert not view.stages and "num_stages=99" in view.unsplit and view.groups


# The command


def test_report_writes_a_page(here: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report.html"
    split = ["report", "llama.lifted", "gpt.pt2", "--num-stages", "2", "-o", str(out)]
    assert main(split) == 2 and "--trust" in capsys.readouterr().err and not out.exists()
    assert main([*split, "--trust"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"wrote {out}" in captured.err
    data = Page(out.read_text("ascii")).data
    assert [(p["kind"], len(p["stages"])) for p in data["programs"]] == [("lifted program", 2), ("program", 2)]
    assert main(["report", "stages", "llama.lifted", "--num-stages", "2", "-o", str(out)]) == 2
    assert main(["report", "stages", "--num-stages", "2", "-o", str(out)]) == 0
    assert main(["report", "gpt.pt2", "-o", str(out), "--exit-zero", "--select", "BL002"]) == 0
    assert Page(out.read_text("ascii")).data["check"]["statistics"] == {"BL002": 1}


def test_report_says_why_there_are_no_stages(here: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report.html"
    assert main(["report", "report_model:program", "--num-stages", "2", "-o", str(out)]) == 1
    assert "warning: report_model:program: it cannot be split" in capsys.readouterr().err
    page = Page(out.read_text("ascii"))
    assert page.all("section", id="stages") and any("It cannot be split" in text for text in page.text("p"))


@pytest.mark.parametrize(
    "arguments", [["-o", "r.txt"], [], ["-o", "r.html", "--num-stages", "0"], ["-o", "no/dir/r.html"]]
)
def test_report_usage(arguments: list[str], here: Path, capsys: Capture) -> None:
    assert main(["report", "stages", *arguments]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_view_that_fails_stops_no_check(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("buffer_lifting.inspection.html_report.build.program_view", broken)
    assert main(["check", "gpt.pt2", "--format", "html"]) == 1
    captured = capsys.readouterr()
    assert "warning: gpt.pt2: it cannot be drawn (RuntimeError: no picture)" in captured.err
    page = Page(captured.out)
    assert any("it cannot be drawn (RuntimeError: no picture)" in text for text in page.text("p"))
    assert page.all("article", class_="card")


@pytest.mark.parametrize("target", ["llama.pt2", "stages"])
def test_a_page_of_a_file_needs_no_torch(target: str, files: Path) -> None:
    code = (
        "import sys; from buffer_lifting.cli import main; "
        f"main(['report', {target!r}, '-o', 'out.html']); sys.exit(('torch' in sys.modules) * 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=files, env=environment, timeout=120).returncode == 0


def test_html_as_a_setting(here: Path, capsys: Capture) -> None:
    (here / "setup.cfg").write_text("[buffer_lifting]\nformat = html\n")
    try:
        assert main(["check", "stages"]) == 0
        assert capsys.readouterr().out.startswith("<!DOCTYPE html>")
    finally:
        (here / "setup.cfg").unlink()


def test_the_parts_of_the_page_are_package_data() -> None:
    package = "buffer_lifting.inspection.html_report"
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = parser["options.package_data"][package].split()
    there = [path.name for path in (ROOT / package.replace(".", "/")).iterdir() if path.is_file()]
    assert sorted(listed) == sorted(name for name in there if not name.endswith(".py"))
