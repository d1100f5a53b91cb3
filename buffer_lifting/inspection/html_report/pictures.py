"""Pictures of one read: its chain from the source to the consumer, as it is, and as lifting leaves it."""

from __future__ import annotations

from dataclasses import replace

from buffer_lifting.explanation import STAYS, Explanation, Step, shape_text
from buffer_lifting.inspection.html_report.views import Arrow, Box, BoxKind, Picture
from buffer_lifting.program import LiftedInput, SequenceMixing

#: A picture of more boxes than this has its straight runs shortened.
SHOWN = 10


def short_op(op: str) -> str:
    """``"slice"`` for ``"aten.slice.Tensor"``; other ops as they are."""
    return op.removeprefix("aten.").split(".")[0] if op.startswith("aten.") else op


def input_shape(item: LiftedInput) -> str:
    """``"float32[B, S, 8]"``; ``S_all`` are all slots, which keys read."""
    length = "S" if item.axis == "seq" else item.axis
    dims = ["B"] * item.batched + [f"{length}_all" if item.role == "col" else length, *map(str, item.row_shape)]
    return f"{item.dtype}[{', '.join(dims)}]"


def before(explanation: Explanation) -> Picture:
    """The chain in the program as it is; its branches stand beside it."""
    drawing = _Drawing()
    if isinstance(explanation.item, SequenceMixing):
        *operands, op = explanation.steps
        for column, step in enumerate(operands):
            drawing.add(_box(step, "source" if step.fqn else "op", column))
            drawing.join(step.node, op.node)
        drawing.add(_box(op, "consumer" if explanation.item.handled else "refused", 0))
        return drawing.picture("The operands of an op that mixes the sequence")
    last = explanation.steps[-1].node
    for column, chain in enumerate((explanation.steps, *explanation.branches)):
        for place, step in enumerate(chain):
            kind: BoxKind = "op" if place else "source"
            if step.mark == "refused" or step.node == explanation.stopped:
                kind = "refused"
            elif step.node == last:
                kind = "consumer"
            drawing.add(_box(step, kind, column))
            if place:
                drawing.join(chain[place - 1].node, step.node)
    return drawing.picture("The chain before lifting")


def after(explanation: Explanation) -> Picture | None:
    """The chain after lifting: what the feed computes is one box, a cut is a lifted input. ``None``: not lifted."""
    if not explanation.fed_by:
        return None
    known = {fed.input.name: fed.input for fed in explanation.fed_by}
    drawing = _Drawing()
    last = explanation.steps[-1].node
    feeds: dict[str, str] = {}  # a node that the feed computes -> the box that stands for it
    cuts: dict[str, list[str]] = {}  # a node that is made an input -> the boxes of its inputs
    for column, chain in enumerate((explanation.steps, *explanation.branches)):
        drawing.feed(chain, column, feeds)
        above: list[str] = []
        for place, step in enumerate(chain):
            if step.node in feeds:
                above = [feeds[step.node]]
                continue
            names = [name for name in step.detail.split(", ") if name in known]
            if step.mark == "cut":
                boxes = cuts.setdefault(step.node, [f"input {name}" for name in names])
                for name in names:
                    drawing.add(Box(f"input {name}", "input", name, input_shape(known[name]), column))
                    for start in above:
                        drawing.join(start, f"input {name}", dashed=True)
                above = boxes
                continue
            if step.node in cuts:
                above = cuts[step.node]
                continue
            kept = step.mark == "kept" or STAYS in step.detail
            kind: BoxKind = "consumer" if step.node == last else "kept" if kept else "op"
            drawing.add(_box(step, kind, column))
            for start in above:
                if place:
                    drawing.join(start, step.node)
            if step.mark == "gathered":
                for offset, name in enumerate(names, 1):
                    drawing.add(Box(f"input {name}", "input", name, input_shape(known[name]), column + offset))
                    drawing.join(f"input {name}", step.node)
            above = [step.node]
    return drawing.picture("The chain after lifting")


class _Drawing:
    """Boxes and arrows, each once, in the order in which they come."""

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        self.arrows: dict[tuple[str, str], Arrow] = {}

    def add(self, box: Box) -> None:
        self.boxes.setdefault(box.id, box)

    def join(self, start: str, end: str, dashed: bool = False) -> None:
        if start != end:
            self.arrows.setdefault((start, end), Arrow(start, end, dashed))

    def feed(self, chain: tuple[Step, ...], column: int, feeds: dict[str, str]) -> None:
        """One box for the run of steps at the head of a chain that the feed computes."""
        steps = []
        for step in chain:
            if step.mark != "feed" and not (step.mark == "source" and step.detail == "in the feed"):
                break
            steps.append(step)
        known = [step for step in steps if step.node in feeds]
        if not steps or len(known) == len(steps):
            return
        head = steps[0]
        name = feeds[known[-1].node] if known else f"feed {head.node}"
        feeds.update({step.node: name for step in steps if step.node not in feeds})
        ops = ", ".join(short_op(step.op) for step in steps[1:])
        self.add(Box(name, "feed", f"feed: {head.fqn or short_op(head.op)}", ops, column))

    def picture(self, about: str) -> Picture:
        if len(self.boxes) > SHOWN:
            self._shorten()
        arrows = tuple(arrow for arrow in self.arrows.values() if arrow.start in self.boxes and arrow.end in self.boxes)
        return Picture(tuple(self.boxes.values()), arrows, f"{about}: {self._words()}")

    def _words(self) -> str:
        return "; ".join(f"{self.boxes[a.start].title} to {self.boxes[a.end].title}" for a in self.arrows.values())

    def _shorten(self) -> None:
        """Straight runs of three and more plain boxes become one."""
        into: dict[str, list[str]] = {name: [] for name in self.boxes}
        out: dict[str, list[str]] = {name: [] for name in self.boxes}
        for start, end in self.arrows:
            into[end].append(start)
            out[start].append(end)

        def straight(name: str) -> bool:
            return self.boxes[name].kind in ("op", "kept") and len(into[name]) == 1 and len(out[name]) == 1

        done: set[str] = set()
        for name in list(self.boxes):
            if name in done or not straight(name) or straight(into[name][0]):
                continue
            run = [name]
            while straight(out[run[-1]][0]) and self.boxes[out[run[-1]][0]].column == self.boxes[name].column:
                run.append(out[run[-1]][0])
            done.update(run)
            middle = run[1:-1]
            if len(middle) < 3:
                continue
            titles = ", ".join(self.boxes[item].title for item in middle)
            more = Box(middle[0], "more", f"{len(middle)} more steps", titles, self.boxes[name].column)
            last = self.arrows[middle[-1], run[-1]]
            for start, end in ((a, b) for a in middle for b in out[a]):
                del self.arrows[start, end]
            for item in middle[1:]:
                del self.boxes[item]
            self.boxes[middle[0]] = more
            self.arrows[middle[0], run[-1]] = replace(last, start=middle[0])


def _box(step: Step, kind: BoxKind, column: int) -> Box:
    title = step.fqn or short_op(step.op)
    if step.fqn and step.op != "input":
        title = f"{step.op} {step.fqn}"
    return Box(step.node, kind, title, shape_text(step), column)
