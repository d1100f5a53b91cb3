"""What the documents say is true: snippets run, tables are those of a run, links exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTEXT_PARALLEL = (ROOT / "docs" / "CONTEXT_PARALLEL.md").read_text()
PACKAGES = (ROOT / "docs" / "PACKAGES.md").read_text()
PARTITIONING = (ROOT / "docs" / "PARTITIONING.md").read_text()
JOINT_GRAPH = (ROOT / "docs" / "JOINT_GRAPH.md").read_text()
COMPOSABILITY = (ROOT / "docs" / "COMPOSABILITY.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, in the README by default."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def environment() -> dict[str, str]:
    """The environment of a child process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments: str, cwd: Path, code: int = 0, timeout: float = 200) -> str:
    """What a Python process prints that ends with ``code``."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert result.returncode == code, result.stderr
    return result.stdout


def test_python_snippets_run_as_written(tmp_path: Path) -> None:
    """Each in a process of its own."""
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        printed = run("-c", snippet, cwd=tmp_path)
        assert "torch.Size([4, 16, 64])" in printed and "ok   composition" in printed


def test_the_snippets_on_scale_print_what_stands_behind_them(tmp_path: Path) -> None:
    """All in one process, each with its output."""
    text = (ROOT / "docs" / "SCALE.md").read_text()
    snippets, outputs = blocks("python", text), blocks("text", text)
    printed = run("-W", "ignore", "-c", "\n".join(snippets), cwd=tmp_path)
    assert len(snippets) == len(outputs) == 2 and printed == "".join(outputs)


PAGES = {
    "context parallelism": CONTEXT_PARALLEL,
    "packages": PACKAGES,
    "partitioning": PARTITIONING,
    "joint": JOINT_GRAPH,
    "composability": COMPOSABILITY,
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_snippets_print_what_stands_behind_them(page: str, tmp_path: Path) -> None:
    """All of a page in one process, each with its output; errors of rounding may be others."""
    snippets, outputs = blocks("python", page), blocks("text", page)
    pairs = re.findall(r"```python\n.*?```\n```text\n.*?```", page, flags=re.S)
    assert len(snippets) == len(outputs) == len(pairs) > 3
    mark = "=== next ==="
    got = run("-W", "ignore", "-c", f"print({mark!r})\n".join(snippets), cwd=tmp_path).split(f"{mark}\n")
    rounding = re.compile(r"\d\.\d+e-\d+")
    assert [rounding.sub("~", text) for text in got] == [rounding.sub("~", text) for text in outputs]


COMPILED = (ROOT / "docs" / "COMPILED_STAGES.md").read_text()


def test_the_first_snippet_on_compiled_stages(tmp_path: Path) -> None:
    """It prints what stands behind it; the others compile C++ (the next test)."""
    printed = run("-W", "ignore", "-c", blocks("python", COMPILED)[0], cwd=tmp_path)
    assert printed == blocks("text", COMPILED)[0]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_snippets_on_compiled_stages(tmp_path: Path) -> None:
    """All in one process, each with its output."""
    snippets, outputs = blocks("python", COMPILED), blocks("text", COMPILED)
    (tmp_path / "page.py").write_text("\n".join(snippets))
    assert len(snippets) == len(outputs) == 3
    assert run("-W", "ignore", "page.py", cwd=tmp_path, timeout=2300) == "".join(outputs)


def test_links_and_commands_on_context_parallelism_exist() -> None:
    from buffer_lifting.cli import make_parser

    for link in re.findall(r"\]\(([^)#]+)\)", CONTEXT_PARALLEL):
        assert (ROOT / "docs" / link).exists(), link
    for line in "".join(blocks("bash", CONTEXT_PARALLEL)).splitlines():
        assert make_parser().parse_args(line.split()[1:]).run


def test_the_table_of_partitioning_is_that_of_its_benchmark() -> None:
    """Its columns, each model in each number of stages, and no cut by cost that is worse than equal layers."""
    from benchmarks.stages import COUNTS, TOPIC, block, rows
    from benchmarks.stages_cost import MODELS, Cell

    text = PARTITIONING.split(f"<!-- benchmark-{TOPIC}:begin -->\n")[1].split("\n<!--")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    figures = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    cells = []
    for figure in figures:
        schedule = "1F1B" if figure["largest of"] == "stages" else "ZBVZeroBubble"
        for split, name in (("equal layers", "equal layers"), ("cost", "ours")):
            values = [float(figure[f"{what}, {name}"]) for what in ("cost", "FLOPs", "bytes")]
            cells.append(Cell(figure["model"], int(figure["stages"]), schedule, split, *values))
    assert {(cell.model, cell.stages) for cell in cells} == {(name, count) for name in MODELS for count in COUNTS}
    assert rows(cells) == figures and block(cells, "python benchmarks/stages.py --docs") == text
    assert text.endswith("worse than equal layers: 0.")


def test_the_table_of_the_demo_is_one_that_it_prints() -> None:
    """Its heading, its columns, and figures that pass."""
    from buffer_lifting.demo import report
    from buffer_lifting.demo.compare import Measured, Row, judge

    lines = README.split(report.HEADER)[1].split("```")[0].strip("\n").splitlines()
    rows = []
    for line in lines:
        step, order, single, control, control_error, lifted, error = re.split(r" {2,}| (?=\d)", line.strip())
        measured = Measured(float(error), "it", float(control), float(control_error))
        rows.append(Row(int(step), order, float(single), float(lifted), measured))
        assert report.row(rows[-1]) == line
    assert len(rows) == 4 and judge(rows, 4) == []


REFUSED = """\
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 8)
        self.positions = torch.nn.Parameter(torch.randn(128, 8))

    def forward(self, tokens):
        x = self.embedding(tokens)
        positions = self.positions[: tokens.shape[1]]
        return x + positions.flip(0)


def export():
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return torch.export.export(Model(), (torch.zeros(2, 16, dtype=torch.long),), dynamic_shapes=(dynamic,))
"""


def test_the_explanation_is_that_of_a_run(tmp_path: Path) -> None:
    """The README's refusal, word by word."""
    (tmp_path / "model.py").write_text(REFUSED)
    command, *lines = blocks("text")[0].splitlines()
    name, *arguments = command.removeprefix("$ ").split()
    assert name == "buffer-lifting"
    assert run("-m", "buffer_lifting", *arguments, cwd=tmp_path, code=1).splitlines()[: len(lines)] == lines


def test_the_commands_of_the_readme_exist() -> None:
    """make targets, subcommands and files that the README names."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        if target in ("demo", "test", "bench"):
            assert f"{target}:" in makefile
    commands = set(re.findall(r"^buffer-lifting +([a-z-]+)", "\n".join(blocks("bash")), flags=re.M))
    assert commands == {"scan", "lift", "split", "verify", "check", "report", "diff", "demo", "compare-losses"}
    from buffer_lifting.cli import make_parser

    help_text = make_parser().format_help()
    assert all(command in help_text for command in commands | {"demo"})
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_tables_are_filled() -> None:
    """Each block between markers holds a table."""
    for name in ("models", "benchmark"):
        body = README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
        assert body.count("\n|") > 3, f"run the command that fills the {name} table"


@pytest.mark.slow
def test_the_table_of_models_is_that_of_a_run() -> None:
    """The README's table, made again."""
    result = subprocess.run(
        [sys.executable, "tools/model_table.py", "--check"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr.decode()


def test_the_snippet_of_causal_flags_runs(tmp_path: Path) -> None:
    """It prints what the document says it prints."""
    text = (ROOT / "docs" / "CAUSAL_FLAGS.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (said,) = re.findall(r"```text\n(.*?)```", text, flags=re.S)
    (tmp_path / "model.py").write_text(snippet)
    assert re.sub(r"\[.*model.py", "[model.py", run("model.py", cwd=tmp_path)) == said


@pytest.mark.multiprocess
def test_the_snippet_of_changing_lengths_trains(tmp_path: Path) -> None:
    """As written, on 2 processes: a line for each step, and what it says of a boundary."""
    text = (ROOT / "docs" / "CHANGING_LENGTHS.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "train.py").write_text(
        snippet.replace(
            "dist.destroy", "print([str(tensor) for tensor in staged.stages[0].output_shapes])\ndist.destroy"
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = re.findall(r"batch (\d+), length (\d+): loss [0-9.]+", result.stdout)
    assert steps == [("4", "32"), ("4", "64"), ("8", "32"), ("4", "48"), ("4", "32")]
    said = re.search(r"\n(\['float32\[.*)\n", text)
    assert said is not None and said[1] in result.stdout, result.stdout
