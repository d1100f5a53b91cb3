"""Assertions about programs for a project's own tests: what the fixture ``lifted_graph`` returns."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from buffer_lifting.inspection.diagnostics import Diagnostic, check
from buffer_lifting.inspection.outline import NOT_RECORDED, Outline, outline
from buffer_lifting.inspection.outline_text import outline_text
from buffer_lifting.inspection.rules import check_prefixes, is_enabled
from buffer_lifting.program import Axes

UPDATE = "--buffer-lifting-update"


class GraphAssertions:
    """Assertions about programs.

    A program is an ExportedProgram (or ``fx.GraphModule``), a LiftedProgram, a StagedProgram, or the path of a ``.pt2``
    file, a ``.lifted`` file or a directory of saved stages; files are read without running anything from them.

    Args:
        test_file, test_name: of the test; snapshots are beside it.
        root: the directory that paths in messages are relative to.
        update: write snapshots instead of comparing with them.
    """

    def __init__(self, test_file: Path, test_name: str, root: Path, update: bool = False) -> None:
        self._test_file, self._test_name, self._root, self._update = test_file, test_name, root, update
        self._used: set[Path] = set()

    def assert_clean(
        self,
        program: Any,
        *,
        select: Iterable[str] | None = None,
        ignore: Iterable[str] | None = None,
        axes: Axes | None = None,
    ) -> None:
        """The program has no findings, by the rules of ``buffer-lifting check``.

        Args:
            program: see the class.
            select, ignore: as in :func:`buffer_lifting.check`; default: those of ``setup.cfg``. What ``suppress``
                covers there is left out in any case.
            axes: as in :func:`buffer_lifting.scan`, for a program that is not lifted; default: those of ``setup.cfg``.
        """
        __tracebackhide__ = True
        from buffer_lifting.cli import parse_axes
        from buffer_lifting.inspection.config import exemptions, find_config
        from buffer_lifting.inspection.places import Places, repository_root
        from buffer_lifting.inspection.results import CheckResult, Reported
        from buffer_lifting.inspection.text import render_text

        root = repository_root(self._root)
        config = find_config(self._root, root)
        chosen = config.select if select is None else check_prefixes(select, "select")
        left_out = config.ignore if ignore is None else check_prefixes(ignore, "ignore")
        found = [
            item
            for item in _findings(program, parse_axes(config.axes) if axes is None else axes, axes is None)
            if is_enabled(item.code, chosen, left_out) and not exemptions(config.suppress, item)
        ]
        if not found:
            return
        target = str(program) if isinstance(program, str | os.PathLike) else "program"
        result = CheckResult((target,), tuple(Reported(target, item) for item in found))
        codes = sorted({item.code for item in found})
        raise AssertionError(
            f"{len(found)} finding{'s' * (len(found) > 1)}, expected none:\n\n{render_text(result, Places(root))}\n\n"
            f"`buffer-lifting rule {' '.join(codes)}` explains the rules. What is meant to stay: pass "
            f"ignore={codes!r}, or suppress it with a reason in [buffer_lifting] of setup.cfg."
        )

    def assert_lifted_inputs(
        self, program: Any, expected: Mapping[str, str] | Iterable[str], *, axes: Axes | None = None
    ) -> None:
        """The program has exactly these lifted inputs (one that is not lifted: lifting would add exactly these).

        Args:
            program: see the class.
            expected: name -> dtype and shape, as in ``{"lifted_freqs_cis": "float32[batch, seq, 64]"}``, or the names
                alone. ``batch`` and the names of the sequence axes stand for these dims, also of a static program;
                ``seq_all`` is a dim that has all slots, which keys need.
            axes: as in :func:`buffer_lifting.scan`; only for a program that is not lifted.
        """
        __tracebackhide__ = True
        found = {dict(e.facts)["name"]: dict(e.facts)["tensor"] for e in _outline(program, axes).of("lifted_inputs")}
        if isinstance(expected, Mapping):
            wanted = {key: _spaced(text) for key, text in expected.items()}
        else:
            wanted, found = dict.fromkeys(_texts(expected), ""), dict.fromkeys(found, "")
        if found == wanted:
            return
        lines = _comparison(_rows(wanted), _rows(found))
        what = found if isinstance(expected, Mapping) else sorted(found)
        raise AssertionError(
            f"the lifted inputs are not the expected ones (- expected, + found):\n\n{lines}\n\n"
            f"If the program is right, expect {what!r}. `buffer-lifting scan --explain` shows where each comes from."
        )

    def assert_boundaries(self, program: Any, expected: Sequence[Sequence[str]]) -> None:
        """The stages of a partition hand on exactly these tensors.

        Args:
            program: a StagedProgram, or the directory of a saved one.
            expected: for each boundary in order the tensors that cross it, in order, as in
                ``[["float32[batch, seq, 64]"], ["float32[batch, seq, 64]"]]``; a dynamic size has the name of its axis,
                a static one is a number.
        """
        __tracebackhide__ = True
        found = _boundaries(_outline(program, None))
        wanted = [[_spaced(text) for text in _texts(tensors)] for tensors in expected]
        if found == wanted:
            return
        lines = _comparison(_numbered(wanted), _numbered(found))
        raise AssertionError(
            f"the stage boundaries are not the expected ones (- expected, + found):\n\n{lines}\n\n"
            f"If the program is right, expect {found!r}. A tensor too many is one that a later stage could compute or "
            "be fed: `buffer-lifting check` of the stages names it if it is made from positions alone (BL303)."
        )

    def assert_snapshot(self, program: Any, name: str = "", *, axes: Axes | None = None) -> None:
        """The program's outline (axes, reads, mixing ops, lifted inputs, stages) is that of a snapshot file.

        The file is ``snapshots/<test file>/<test>.txt`` beside the test file, a text to be committed; pytest writes it
        when it is run with ``--buffer-lifting-update``. It has no paths, lines or names of nodes.

        Args:
            program: see the class.
            name: tells several snapshots of a test apart.
            axes: as in :func:`buffer_lifting.scan`; only for a program that is not lifted.
        """
        __tracebackhide__ = True
        path = self._path(name)
        shown = os.path.relpath(path, self._root)
        if path in self._used:
            raise AssertionError(f"{shown} is used by this test already: give assert_snapshot another name=")
        self._used.add(path)
        text = outline_text(_outline(program, axes))
        if self._update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        if not path.is_file():
            raise AssertionError(
                f"there is no snapshot {shown}: run pytest with {UPDATE}, look at the file, and commit it. It would be:"
                f"\n\n{text}"
            )
        known = path.read_text(encoding="utf-8")
        if known != text:
            lines = _comparison(known.splitlines(), text.splitlines())
            raise AssertionError(
                f"the program is not that of the snapshot {shown} (- snapshot, + program):\n\n{lines}\n\n"
                f"If the change is meant, run pytest with {UPDATE} and commit the file; if not, "
                "`buffer-lifting scan --explain` shows where a read comes from."
            )

    def _path(self, name: str) -> Path:
        parts = [self._test_name, *([name] if name else [])]
        text = re.sub(r"[^\w.-]+", "_", "-".join(parts)).strip("_.")
        if text != "-".join(parts) or len(text) > 100:  # other names may become the same text
            digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
            text = f"{text[:100]}-{digest}"
        return self._test_file.parent / "snapshots" / self._test_file.stem / f"{text}.txt"


def _findings(program: Any, axes: Axes | None, general: bool) -> tuple[Diagnostic, ...]:
    from buffer_lifting.inspection.targets import check_target, is_lifted

    if isinstance(program, str | os.PathLike):
        return check_target(os.fspath(program), axes, general_axes=general)
    return check(program, axes=None if general and is_lifted(program) else axes)


def _outline(program: Any, axes: Axes | None) -> Outline:
    if isinstance(program, str | os.PathLike):
        from buffer_lifting.inspection.outline_targets import target_outline

        return target_outline(os.fspath(program), axes)
    return outline(program, axes)


def _boundaries(found: Outline) -> list[list[str]]:
    if not found.staged:
        raise TypeError("assert_boundaries takes a StagedProgram or the directory of a saved one")
    boundaries: list[list[str]] = [[] for _ in found.of("stages")[1:]]
    for entry in found.of("boundaries"):
        tensor = dict(entry.facts)["tensor"]
        if tensor == NOT_RECORDED:
            raise AssertionError("the stages were saved before their boundaries were recorded: split again")
        boundaries[int(entry.named("boundary").split()[0])].append(tensor)
    return boundaries


def _texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got the text {texts!r}")
    return list(texts)


def _spaced(text: str) -> str:
    """``float32[batch,seq]`` as ``float32[batch, seq]``."""
    return re.sub(r"\s*,\s*", ", ", text.strip())


def _rows(inputs: Mapping[str, str]) -> list[str]:
    return [f"{name}{': ' * bool(text)}{text}" for name, text in sorted(inputs.items())]


def _numbered(boundaries: Sequence[Sequence[str]]) -> list[str]:
    return [f"stage {i} -> {i + 1}: {text}" for i, tensors in enumerate(boundaries) for text in tensors or ["nothing"]]


def _comparison(expected: Sequence[str], found: Sequence[str]) -> str:
    """Both texts line by line, ``-`` for what is expected and ``+`` for what was found; long equal parts are cut."""
    lines = list(difflib.unified_diff(expected, found, lineterm="", n=3))[3:]
    return "\n".join(f"  {'...' if line.startswith('@@') else line}" for line in lines)
