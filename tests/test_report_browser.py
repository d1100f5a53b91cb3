"""The page in headless Chromium: ``-m browser`` selects these, and they fail where there is none."""

from __future__ import annotations

import base64
import json
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from report_pages import page_of_kinds

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import diagnostic, numbered
from buffer_lifting.inspection.html_report.page import render_html
from buffer_lifting.inspection.html_report.views import (
    Arrow,
    Box,
    Member,
    Picture,
    ProgramView,
    ReadGroup,
    StageInput,
    StageView,
)
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult, Reported, Suppression
from buffer_lifting.program import LiftedInput

pytestmark = pytest.mark.browser

KINDS, LAYERS = 120, 5
MANY = 3200
EVIL = "</script><img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 600 findings (one kind is suppressed) in 2 targets, 120 kinds of reads and 3 stages; hostile names."""
    directory = tmp_path_factory.mktemp("browser")
    reported, groups = [], []
    for kind in range(KINDS):
        code = ("BL001", "BL105")[kind % 2]
        where = Location(f"/model_{kind % 7}.py", kind + 1, f"x = table_{kind}[:n]  # {EVIL}", "forward")
        nodes = [f"add_{kind}_{layer}" for layer in range(LAYERS)]
        modules = [f"layers.{layer}.part_{kind}" for layer in range(LAYERS)]
        rows = [
            diagnostic(
                code, f"table_{kind} is read", "help", where, module, "m.Part", f"table_{kind}", node, "aten.add"
            )
            for module, node in zip(modules, nodes, strict=True)
        ]
        why = Suppression("configuration", "known") if kind == 2 else None
        target = ("a.pt2", "b.pt2")[kind % 3 == 0]
        reported += [Reported(target, item, why) for item in numbered(rows)]
        chain = (Box("s", "source", f"table_{kind}"), Box("c", "consumer", "add", "float32[s0=batch, s1=seq:row, 8]"))
        picture = Picture(chain, (Arrow("s", "c"),), "chain")
        members = tuple(Member(n, "other", m, f"table_{kind}") for n, m in zip(nodes, modules, strict=True))
        group = ReadGroup(
            f"r{kind}", code, f"table_{kind} is read", "", "lifted", f"table_{kind}", "buffer", "add", where, members,
            (f"lifted_{kind}",), picture, picture,
        )  # fmt: skip
        groups.append((target, group))
    lifted = tuple(
        LiftedInput(f"lifted_{kind}", "values", "positions", "row", f"table_{kind}", "float32", (8,), "seq")
        for kind in range(KINDS)
    )
    stages = tuple(
        StageView(index, (StageInput("lifted_0", "lifted", 64, 32),), (f"add_{index}",), 10, ("layers.0",), 128)
        for index in range(3)
    )
    views = [
        ProgramView(target, "program", 7000, (), lifted, tuple(group for of, group in groups if of == target), stages)
        for target in ("a.pt2", "b.pt2")
    ]
    result = CheckResult(("a.pt2", "b.pt2"), tuple(reported))
    page = directory / "report.html"
    page.write_text(render_html(result, Places(directory), views), encoding="ascii")
    return page


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of one target with 3,200 findings, each of its own kind."""
    page = tmp_path_factory.mktemp("large") / "report.html"
    page.write_text(page_of_kinds(MANY, page.parent), encoding="ascii")
    return page


def shown(page: Browser) -> str:
    """The count beside the filters, once the search has been taken up."""
    time.sleep(0.5)
    return str(page.run("return document.getElementById('shown').textContent"))


def visible(page: Browser, selector: str) -> int:
    """How many elements are rendered."""
    script = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).length"
    return int(page.run(script, selector))


def test_it_loads_nothing_else_and_says_nothing_in_the_console(file: Path) -> None:
    with browser() as page:
        page.open(file)
        assert [address for address in page.requests() if not address.startswith("data:")] == [file.as_uri()]
        assert page.log("browser") == []
        assert page.run("return document.title") == "buffer-lifting: 2 targets"
        assert page.run("return document.images.length") == 0
        assert shown(page) == "600 of 600 findings, 600 of 600 reads and ops"
        data = page.run("const d = document.getElementById('data'); return [d.dataset.encoding, d.textContent]")
        assert data[0] == "deflate-base64"
        assert len(json.loads(zlib.decompress(base64.b64decode(data[1])))["check"]["findings"]) == KINDS * LAYERS


def test_search_and_filters(file: Path) -> None:
    with browser() as page:
        page.open(file)
        page.keys("/part_7\ue00d")  # a space ends the word
        assert page.run("return document.activeElement.id") == "search"
        assert shown(page).startswith("55 of 600 findings"), "part_7, part_70 to part_79"
        page.keys("layers.3")
        assert shown(page) == "11 of 600 findings, 11 of 600 reads and ops"
        page.run("document.querySelector('.card:not([hidden]) details').open = true")
        assert visible(page, ".card .members li") == 1
        page.keys("\ue00c")  # escape
        assert shown(page).startswith("600 of 600")
        page.run("document.querySelector('.codes input[value=BL105]').click()")
        assert shown(page).startswith("300 of 600")
        page.run("document.getElementById('suppressed').click()")
        assert shown(page).startswith("295 of 600")
        page.run("const t = document.getElementById('target'); t.value = '1'; t.dispatchEvent(new Event('change'))")
        assert shown(page).startswith("100 of 600"), "every sixth kind"
        page.run("document.getElementById('reset').click()")
        assert shown(page).startswith("600 of 600")


def test_search_is_quick(file: Path) -> None:
    script = """
        const search = document.getElementById("search"), done = arguments[0];
        search.value = "layers.2 table"; search.dispatchEvent(new Event("input"));
        const start = performance.now();
        document.getElementById("reset").click();
        document.body.getBoundingClientRect();
        return performance.now() - start;
    """
    with browser() as page:
        page.open(file)
        assert page.run(script) < 1000


def colours(page: Browser) -> Any:
    """Text and ground of the body."""
    return page.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")


CONTRAST = """
    const sum = (c) => c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((total, v, i) => total + v * [0.2126, 0.7152, 0.0722][i], 0);
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
            if (a > 0) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const worst = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest("script, .skip")) continue;
        const svg = e.closest("g.box"), style = getComputedStyle(e);
        const fore = parse(svg ? style.fill : style.color).slice(0, 3);
        const back = svg ? parse(getComputedStyle(svg.querySelector("rect")).fill).slice(0, 3) : ground(e);
        const [low, high] = [sum(fore), sum(back)].sort((a, b) => a - b);
        worst.push([(high + 0.05) / (low + 0.05), e.tagName + "." + (e.className.baseVal ?? e.className)]);
    }
    return worst.sort((a, b) => a[0] - b[0])[0];
"""


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_have_contrast(dark: bool, file: Path) -> None:
    with browser(dark=dark) as page:
        page.open(file)
        page.run("document.getElementById('toggle').click()")
        first = colours(page)
        assert (sum(map(int, first[1][4:-1].split(","))) < 200) is dark
        for _ in range(2):
            ratio, where = page.run(CONTRAST)
            assert ratio >= 4.5, where
            page.run("document.getElementById('theme').click()")
        assert colours(page) == first, "twice is back"
        page.run("document.getElementById('theme').click()")
        other = colours(page)
        assert other == [*reversed(first)] or other != first
        page.open(file)
        assert colours(page) == other, "the choice is kept"


def test_narrow(file: Path) -> None:
    with browser(width=400) as page:
        page.open(file)
        page.run("document.getElementById('toggle').click()")
        assert page.run("return document.documentElement.scrollWidth - innerWidth") <= 0, (
            "only pictures and tables scroll"
        )


def test_keyboard(file: Path) -> None:
    with browser() as page:
        page.open(file)
        page.keys("\ue004")
        assert page.run("return document.activeElement.className") == "skip"
        page.keys("\ue007")
        assert page.run("return location.hash") == "#findings"
        page.run("document.querySelector('.read summary').focus()")
        page.keys("\ue007")
        assert page.run("return document.querySelector('.read').open") is True
        hidden = "return [...document.querySelectorAll('.picture')].filter((e) => e.tabIndex < 0).length"
        assert page.run(hidden) == 0, "what scrolls can be reached"


def test_before_and_after_and_links(file: Path) -> None:
    with browser() as page:
        page.open(file)
        both = visible(page, "figure")
        page.run("document.querySelector('input[name=show][value=after]').click()")
        assert (visible(page, "figure.before"), visible(page, "figure.after")) == (0, both // 2)
        page.run("location.hash = '#read-0-r4'")
        time.sleep(0.5)
        assert page.run("return document.getElementById('read-0-r4').open") is True
        assert 0 <= page.run("return document.getElementById('read-0-r4').getBoundingClientRect().top") < 400


def test_print_shows_everything_in_light_colours(file: Path) -> None:
    with browser(dark=True) as page:
        page.open(file)
        page.run("dispatchEvent(new Event('beforeprint'))")
        page.media("print", dark=True)
        assert colours(page)[1] == "rgb(255, 255, 255)"
        assert visible(page, ".tools") == 0
        assert visible(page, ".members li") == KINDS * LAYERS * 2
        page.run("dispatchEvent(new Event('afterprint'))")
        assert visible(page, ".members li") == 0


def test_without_scripts_it_is_all_there(file: Path) -> None:
    with browser(scripts=False) as page:
        page.open(file)
        assert visible(page, ".card") == KINDS
        assert visible(page, ".needs-script") == 0


# -- a large page: most of it is compressed ---------------------------------------------------------------------------

OPENED = "const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd"
FILTERED = """
    const search = document.getElementById("search"), start = performance.now();
    search.value = arguments[0];
    document.querySelector(".codes input").dispatchEvent(new Event("change"));
    document.body.getBoundingClientRect();
    return performance.now() - start;
"""
BODY = "return document.getElementById('read-0-r3100').textContent"


def test_a_large_page_opens_and_filters_fast(large: Path) -> None:
    """Bars that a busy machine keeps too; one that is idle takes a fifth of them."""
    with browser() as page:
        start = time.perf_counter()
        page.open(large)
        assert shown(page) == f"{MANY} of {MANY} findings, {MANY} of {MANY} reads and ops"
        assert time.perf_counter() - start < 15
        page.run(FILTERED, "first")  # takes up the texts
        best = min(page.run(FILTERED, words) for words in ("table_31 buffer", "", "layers.7", ""))
        assert best < 1000
        assert page.log("browser") == []


def test_all_of_a_large_page_is_found_opened_and_linked(large: Path) -> None:
    with browser() as page:
        page.open(large)
        assert shown(page).startswith(f"{MANY} of")
        assert page.run("return document.querySelectorAll('.card').length") == MANY
        assert page.run("return document.querySelectorAll('[data-later]').length") == 0
        page.keys("/node_3100 slice_3100")
        assert shown(page) == f"0 of {MANY} findings, 1 of {MANY} reads and ops", "what is in closed tables"
        page.keys("\ue00c</script>")  # as the program has it, not as the page escapes it
        assert shown(page) == f"{MANY} of {MANY} findings, {MANY} of {MANY} reads and ops"
        page.keys("\ue00cnode_3100")
        assert shown(page).startswith(f"1 of {MANY}") and visible(page, ".card") == 1
        assert "slice_3100" not in page.run(BODY)
        page.run("document.querySelector('.card:not([hidden]) a[href^=\"#read\"]').click()")
        time.sleep(0.5)
        assert page.run("return document.getElementById('read-0-r3100').open") is True
        assert "slice_3100" in page.run(BODY)
        assert 0 <= page.run("return document.getElementById('read-0-r3100').getBoundingClientRect().top") < 400
        assert page.run("return document.images.length") == 0 and page.run("return document.title") != "run"


def test_a_large_page_prints_and_saves_everything(large: Path) -> None:
    saved = """
        URL.createObjectURL = (blob) => { window.saved = blob; return "blob:x"; };
        HTMLAnchorElement.prototype.click = () => {};
        document.getElementById("download").click();
    """
    with browser() as page:
        page.open(large)
        assert shown(page).startswith(f"{MANY} of")
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert page.run("return document.querySelectorAll('[data-body]').length") == 0
        assert "slice_3100" in page.run(BODY)
        page.run(saved)
        time.sleep(1)
        page.run("window.saved.text().then((text) => { window.count = JSON.parse(text).check.findings.length; })")
        time.sleep(1)
        assert page.run("return window.count") == MANY


def test_a_large_page_without_scripts_says_what_is_missing(large: Path) -> None:
    with browser(scripts=False) as page:
        page.open(large)
        assert visible(page, ".card") > 100
        assert "need JavaScript" in page.run("return document.querySelector('noscript').textContent")
