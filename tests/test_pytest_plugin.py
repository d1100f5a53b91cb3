"""The pytest plugin: its fixture, its snapshots, and that it costs nothing where it is not used."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import buffer_lifting as bl

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]
INSTALLED = any(entry.name == "buffer_lifting" for entry in importlib.metadata.entry_points(group="pytest11"))
LOAD = [] if INSTALLED else ["-p", "buffer_lifting.pytest_plugin"]

MODEL = """
import torch
from torch.export import Dim


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, rows):
        return x + self.linear(x * rows)


class Model(torch.nn.Module):
    def __init__(self, layers=2, mixing=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(61, 8)
        self.register_buffer("table", torch.randn(64, 8))
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.mixing = mixing

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.table[: tokens.shape[1]])
        return torch.cumsum(x, 1) if self.mixing else x


def export(layers=2, mixing=False, dynamic=True):
    torch.manual_seed(0)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    return torch.export.export(Model(layers, mixing), (torch.zeros(3, 11, dtype=torch.long),), dynamic_shapes=shapes)
"""
SNAPSHOT = """\
# buffer_lifting outline 1

axes
  axis batch: size dynamic
  axis seq: size dynamic
  input tokens: dims [batch, seq]

reads
  'table' read by aten.mul.Tensor in layers.{0-1}: code BL001, kind buffer, operand either, lifted as values, \
stream positions, dims [0=seq:row], value slice('table', dim=0, end=seq)

lifted inputs
  'table' by positions, axis seq, row: name lifted_table, form values, tensor float32[batch, seq, 8]

stages
  stage 0: keyword inputs lifted_table, parameters 3 of embedding, layers.0
  stage 1: keyword inputs lifted_table, parameters 2 of layers.1

boundaries
  stage 0 -> 1 by aten.add.Tensor in layers.0: tensor float32[batch, seq, 8]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved programs: ``clean`` (lifted and staged ones), ``read`` (two layers), ``deeper`` (three), ``mixing``."""
    directory = tmp_path_factory.mktemp("made")
    space: dict[str, object] = {}
    exec(MODEL, space)
    export = space["export"]
    assert callable(export)
    program = export()
    torch.export.save(program, directory / "read.pt2")
    torch.export.save(export(layers=3), directory / "deeper.pt2")
    torch.export.save(export(mixing=True), directory / "mixing.pt2")
    lifted = bl.context_parallel(bl.lift(program), size=1)
    lifted.save(directory / "clean.lifted")
    bl.partition(lifted, split_points=["layers.1"]).save(directory / "stages")
    return directory


@pytest.fixture
def project(made: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A repository with these files, on a developer's machine: in CI, pytest repeats a failure in its summary."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("BUILD_NUMBER", raising=False)
    shutil.copytree(made, pytester.path, dirs_exist_ok=True)
    (pytester.path / ".git").mkdir()
    return pytester


def run(project: pytest.Pytester, body: str, *args: str, **outcomes: int) -> str:
    """Runs a test file with the plugin, and returns what pytest printed."""
    project.makepyfile(test_model=textwrap.dedent(body))
    result = project.runpytest_inprocess(*LOAD, "-p", "no:cacheprovider", *args)
    result.assert_outcomes(**outcomes)
    return "\n".join(line.removeprefix("E").removeprefix("   ") for line in result.outlines)


def test_what_is_right_passes(project: pytest.Pytester) -> None:
    body = """
        def test_files(lifted_graph):
            lifted_graph.assert_clean("clean.lifted")
            lifted_graph.assert_clean("stages")
            lifted_graph.assert_clean("read.pt2", ignore=["BL001"])
            lifted_graph.assert_lifted_inputs("read.pt2", {"lifted_table": "float32[batch,seq,8]"})
            lifted_graph.assert_lifted_inputs("clean.lifted", ["lifted_table"])
            lifted_graph.assert_boundaries("stages", [["float32[batch, seq, 8]"]])
    """
    run(project, body, passed=1)


def test_programs_in_memory(project: pytest.Pytester) -> None:
    """Live programs, dynamic and static."""
    project.makepyfile(plugin_model=MODEL)
    body = """
        import buffer_lifting as bl
        import pytest
        from plugin_model import export

        @pytest.mark.parametrize("dynamic", [True, False])
        def test_live(lifted_graph, dynamic):
            program = export(dynamic=dynamic)
            lifted = bl.lift(program)
            staged = bl.partition(lifted, split_points=["layers.1"])
            lifted_graph.assert_clean(lifted)
            lifted_graph.assert_clean(staged)
            for graph in (program, lifted, staged):
                lifted_graph.assert_lifted_inputs(graph, {"lifted_table": "float32[batch, seq, 8]"})
            lifted_graph.assert_boundaries(staged, [["float32[batch, seq, 8]" if dynamic else "float32[3, 11, 8]"]])
            with pytest.raises(AssertionError, match="BL001"):
                lifted_graph.assert_clean(program)
            with pytest.raises(TypeError, match="takes a StagedProgram"):
                lifted_graph.assert_boundaries(lifted, [])
            with pytest.raises(TypeError, match="a list of texts"):
                lifted_graph.assert_lifted_inputs(program, "lifted_table")
            lifted_graph.assert_snapshot(staged)
    """
    run(project, body, "--buffer-lifting-update", passed=2)
    run(project, body, passed=2)
    snapshots = sorted((project.path / "snapshots" / "test_model").iterdir())
    assert len(snapshots) == 2 and all(path.name.startswith("test_live_") for path in snapshots)
    texts = [path.read_text() for path in snapshots]
    assert SNAPSHOT in texts
    assert any("float32[3, 11, 8]" in text and "axis seq: size 11" in text for text in texts)


def test_findings_are_shown_like_a_compilers(project: pytest.Pytester) -> None:
    output = run(
        project,
        """
        def test_it(lifted_graph):
            lifted_graph.assert_clean("mixing.pt2")
        """,
        failed=1,
    )
    assert "3 findings, expected none:" in output
    assert "BL001 buffer 'table' is read by position and is not lifted  [x2 layers: layers.*]" in output
    assert "BL201 aten.cumsum.default mixes the sequence" in output
    assert "`buffer-lifting rule BL001 BL201` explains the rules." in output
    assert "pass ignore=['BL001', 'BL201'], or suppress it with a reason in [buffer_lifting] of setup.cfg" in output
    assert "golden.py" not in output, "the traceback ends in the test"


def test_settings_of_the_project_count(project: pytest.Pytester) -> None:
    body = """
        import pytest
        def test_it(lifted_graph):
            lifted_graph.assert_clean("mixing.pt2")
            with pytest.raises(AssertionError, match="1 finding,"):
                lifted_graph.assert_clean("mixing.pt2", ignore=[])
    """
    config = "[buffer_lifting]\nignore = BL2\nsuppress = BL001 tab*: the trainer feeds it\n"
    (project.path / "setup.cfg").write_text(config)
    run(project, body, passed=1)
    (project.path / "setup.cfg").write_text("[buffer_lifting]\nignore = BL2\n")
    run(project, body, failed=1)
    (project.path / "setup.cfg").write_text("[buffer_lifting]\naxes = other:0=batch\n")
    output = run(
        project,
        """
        def test_lifted(lifted_graph):
            lifted_graph.assert_clean("clean.lifted")
            lifted_graph.assert_clean("stages")

        def test_other(lifted_graph):
            lifted_graph.assert_clean("mixing.pt2")
        """,
        passed=1,
        failed=1,
    )
    assert "AxesError" in output


def test_other_inputs_and_boundaries_are_a_diff(project: pytest.Pytester) -> None:
    output = run(
        project,
        """
        def test_inputs(lifted_graph):
            expected = {"lifted_table": "float32[batch, seq, 4]", "lifted_mask": "x"}
            lifted_graph.assert_lifted_inputs("read.pt2", expected)

        def test_names(lifted_graph):
            lifted_graph.assert_lifted_inputs("read.pt2", [])

        def test_boundaries(lifted_graph):
            lifted_graph.assert_boundaries("stages", [["float32[batch, seq, 8]", "int64[batch, seq]"], []])
        """,
        failed=3,
    )
    assert "-lifted_table: float32[batch, seq, 4]" in output
    assert "-lifted_mask: x" in output and "+lifted_table: float32[batch, seq, 8]" in output
    assert "expect {'lifted_table': 'float32[batch, seq, 8]'}" in output
    assert "expect ['lifted_table']" in output
    assert "-stage 0 -> 1: int64[batch, seq]" in output and "-stage 1 -> 2: nothing" in output
    assert "expect [['float32[batch, seq, 8]']]" in output


def test_a_snapshot_is_written_compared_and_updated(project: pytest.Pytester) -> None:
    body = """
        def test_it(lifted_graph):
            lifted_graph.assert_snapshot("stages")
            lifted_graph.assert_snapshot("{name}.pt2", "whole")
    """
    two, three = body.replace("{name}", "read"), body.replace("{name}", "deeper")
    output = run(project, two, failed=1)
    assert "there is no snapshot snapshots/test_model/test_it.txt" in output
    assert "run pytest with --buffer-lifting-update, look at the file, and commit it" in output
    assert not (project.path / "snapshots").exists()
    run(project, two, "--buffer-lifting-update", passed=1)
    folder = project.path / "snapshots" / "test_model"
    assert sorted(path.name for path in folder.iterdir()) == ["test_it-whole.txt", "test_it.txt"]
    assert (folder / "test_it.txt").read_text() == SNAPSHOT
    run(project, two, passed=1)
    before = (folder / "test_it-whole.txt").read_text()
    output = run(project, three, failed=1)
    assert (folder / "test_it-whole.txt").read_text() == before, "comparing writes nothing"
    assert "is not that of the snapshot snapshots/test_model/test_it-whole.txt (- snapshot, + program)" in output
    changed = [line.strip() for line in output.splitlines() if line.strip()[:1] in ("-", "+") and "table" in line]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "in layers.{0-1}: " in changed[0] and "in layers.{0-2}: " in changed[1]
    run(project, three, "--buffer-lifting-update", passed=1)
    run(project, three, passed=1)


def test_one_snapshot_is_not_used_twice(project: pytest.Pytester) -> None:
    body = """
        def test_it(lifted_graph):
            lifted_graph.assert_snapshot("read.pt2")
            lifted_graph.assert_snapshot("deeper.pt2")
    """
    assert "give assert_snapshot another name=" in run(project, body, "--buffer-lifting-update", failed=1)


def test_snapshots_of_other_tests_have_other_files(project: pytest.Pytester) -> None:
    body = """
        import pytest

        @pytest.mark.parametrize("name", ["a/b", "a b", "a_b", "é", "x" * 300])
        def test_it(lifted_graph, name):
            lifted_graph.assert_snapshot("read.pt2")
    """
    run(project, body, "--buffer-lifting-update", passed=5)
    names = [path.name for path in (project.path / "snapshots" / "test_model").iterdir()]
    assert len(names) == 5 and all(len(name) < 120 for name in names)


def test_a_file_that_cannot_be_read_is_an_error(project: pytest.Pytester) -> None:
    (project.path / "broken.pt2").write_bytes(b"no zip")
    body = """
        def test_it(lifted_graph):
            lifted_graph.assert_clean("broken.pt2")
    """
    assert "broken.pt2: truncated, or not a zip file" in run(project, body, failed=1)


def test_the_entry_point_loads_the_plugin_and_nothing_else(tmp_path: Path) -> None:
    """A pytest of its own, with the entry point of setup.cfg as an installation has it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    info = tmp_path / "site" / "buffer_lifting_entry-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: buffer-lifting-entry\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + config["options.entry_points"]["pytest11"].strip() + "\n")
    (tmp_path / "test_plain.py").write_text(
        textwrap.dedent("""\
            import sys

            def test_unused(pytestconfig):
                assert pytestconfig.pluginmanager.has_plugin("buffer_lifting")
                assert pytestconfig.getoption("--buffer-lifting-update") is False
                packages = ("buffer_lifting", "torch", "numpy")
                loaded = {name for name in sys.modules if name.partition(".")[0] in packages}
                assert loaded == {"buffer_lifting", "buffer_lifting.pytest_plugin"}
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    command.insert(-1, "-pno:buffer_lifting")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, "the control: the test sees that the plugin is gone"


def test_classes_of_a_file_have_snapshots_of_their_own(project: pytest.Pytester) -> None:
    """Two tests of one name wrote one file, and the one written first failed ever after."""
    body = """
        class TestOne:
            def test_it(self, lifted_graph):
                lifted_graph.assert_snapshot("read.pt2")

        class TestTwo:
            def test_it(self, lifted_graph):
                lifted_graph.assert_snapshot("deeper.pt2")
    """
    run(project, body, "--buffer-lifting-update", passed=2)
    run(project, body, passed=2)
    assert len(list((project.path / "snapshots").rglob("*.txt"))) == 2
