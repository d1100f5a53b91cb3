"""Pages of made-up findings: as many as a test wants, without a program."""

from __future__ import annotations

from pathlib import Path

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import diagnostic, numbered
from buffer_lifting.inspection.html_report.page import render_html
from buffer_lifting.inspection.html_report.views import Arrow, Box, Member, Picture, ProgramView, ReadGroup, Row
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult, Reported
from buffer_lifting.program import LiftedInput

EVIL = "</script><img src=x onerror=\"document.title='run'\">"
MESSAGE = "buffer {!r} is read by position and is not lifted"
HINT = "buffer_lifting.lift handles it"
SHAPES = (
    "float32[128, 8]",
    "float32[s27=seq:row, 8]",
    "float32[1, s27=seq:row, 8]",
    "float32[s0=batch, s1=seq:row, 8]",
)


def page_of_kinds(kinds: int, root: Path, layers: int = 1) -> str:
    """The page of one target that reads ``kinds`` tables, each at a line of its own and in ``layers`` layers."""
    found, groups, lifted = [], [], []
    for kind in range(kinds):
        code, source = ("BL001", "BL002", "BL105")[kind % 3], f"table_{kind}"
        where = Location("/src/model.py", 30 + kind, f"x = x + self.{source}[: tokens.shape[1]]  # {EVIL}", "forward")
        reads = [(f"layers.{layer}.part_{kind}", f"node_{kind * layers + layer}") for layer in range(layers)]
        message = MESSAGE.format(source)
        found += [
            diagnostic(code, message, HINT, where, module, "model.Part", source, node, "aten.add.Tensor")
            for module, node in reads
        ]
        boxes = (
            Box("a", "source", f"buffer {source}", SHAPES[0]),
            Box("b", "op", "slice", SHAPES[1]),
            Box("c", "op", "unsqueeze", SHAPES[2]),
            Box("d", "consumer", "add", SHAPES[3]),
        )
        picture = Picture(boxes, tuple(Arrow(*pair) for pair in ("ab", "bc", "cd")), f"The chain of {source}")
        rows = (
            Row(0, "source", f"b_{source}", "buffer", SHAPES[0], repr(source), where),
            Row(0, "feed", f"slice_{kind}", "slice", SHAPES[1], "", where),
            Row(0, "cut", f"unsqueeze_{kind}", "unsqueeze", SHAPES[2], f"lifted_{source}", where),
            Row(0, "consumer", reads[0][1], "add", SHAPES[3], "operand 'other'", where),
        )
        members = tuple(Member(node, "other", module, source) for module, node in reads)
        groups.append(
            ReadGroup(
                f"r{kind}", code, message, HINT, "lifted", source, "buffer", "add", where, members,
                (f"lifted_{source}",), picture, picture, rows,
            )
        )  # fmt: skip
        lifted.append(LiftedInput(f"lifted_{source}", "values", "positions", "row", source, "float32", (8,), "seq"))
    view = ProgramView("exports/model.pt2", "program", 20_000, (), tuple(lifted), tuple(groups))
    result = CheckResult((view.target,), tuple(Reported(view.target, item) for item in numbered(found)))
    return render_html(result, Places(root), [view])
