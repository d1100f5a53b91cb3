"""The view of a lifted program: of each source what read it, and the lifted inputs that stand for it now.

A lifted program does not hold the chains that its inputs replaced. What is known of them is the report of its lift.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from buffer_lifting.inspection.diagnostics import read_message
from buffer_lifting.inspection.html_report.pictures import input_shape, short_op
from buffer_lifting.inspection.html_report.reads import layers_of, member, status
from buffer_lifting.inspection.html_report.views import Arrow, Box, Picture, ReadGroup
from buffer_lifting.inspection.lifted_checks import PlainNode, from_user
from buffer_lifting.layers import layers
from buffer_lifting.program import LiftedInput, PositionRead, ScanReport, SequenceMixing

#: Readers of one source, or of one lifted input, that a picture shows; the rest is a number.
SHOWN = 6


@dataclass(frozen=True)
class Reader:
    """The op at which a lifted input meets data, and the ops on the way there."""

    op: str
    chain: tuple[str, ...]


def lifted_groups(
    report: ScanReport, inputs: Sequence[LiftedInput], graphs: Iterable[Sequence[PlainNode]], follows_slots: bool
) -> tuple[ReadGroup, ...]:
    """A group for each source that was lifted, one for each kind of refused read and op, one for the causal flags.

    Args:
        report: of the scan before lifting.
        inputs: the lifted inputs.
        graphs: the graphs that read them: of the lifted program, or of its stages.
        follows_slots: whether ``context_parallel`` has replaced the causal flags.
    """
    readers: dict[str, list[Reader]] = defaultdict(list)
    for graph in graphs:
        for name, found in _readers(graph, {item.name for item in inputs}).items():
            readers[name] += found
    lifted: dict[str, list[PositionRead]] = defaultdict(list)
    others: dict[object, list[PositionRead | SequenceMixing]] = defaultdict(list)
    for read in report.reads:
        if status(read) in ("lifted", "natural"):
            lifted[read.source].append(read)
        elif not (follows_slots and status(read) == "causal"):
            others[status(read), read.location, layers_of(read)].append(read)
    for mix in report.mixing:
        others[status(mix), mix.location, layers_of(mix)].append(mix)
    groups = [_plain(items) for items in others.values()]
    groups.sort(key=lambda group: group.status != "refused")
    by_source: dict[str, list[LiftedInput]] = defaultdict(list)
    for item in inputs:
        by_source[item.source].append(item)
    at = sum(group.status == "refused" for group in groups)
    sources = dict.fromkeys([*lifted, *by_source])
    made = [_source(source, lifted.get(source, []), by_source.get(source, []), readers) for source in sources]
    ordered = [*groups[:at], *made, *groups[at:]]
    return tuple(_named(group, f"r{number}") for number, group in enumerate(ordered))


def _named(group: ReadGroup, name: str) -> ReadGroup:
    return replace(group, id=name)


def _plain(items: Sequence[PositionRead | SequenceMixing]) -> ReadGroup:
    item = items[0]
    is_read = isinstance(item, PositionRead)
    title, hint = layers_of(item)
    source = layers(item.source) if isinstance(item, PositionRead) else ""
    boxes = [Box("op", "refused" if status(item) == "refused" else "consumer", short_op(item.op))]
    if is_read:
        boxes.insert(0, Box("source", "source", source))
    arrows = (Arrow("source", "op"),) if is_read else ()
    return ReadGroup(
        id="",
        code=item.code,
        title=title,
        hint=hint,
        status=status(item),
        source=source,
        source_kind=item.source_kind if isinstance(item, PositionRead) else "",
        consumer=short_op(item.op),
        location=item.location,
        members=tuple(member(other) for other in items),
        inputs=(),
        before=Picture(tuple(boxes), arrows, f"{source} to {short_op(item.op)}" if is_read else short_op(item.op)),
        after=None,
    )


def _source(
    source: str, reads: list[PositionRead], inputs: list[LiftedInput], readers: dict[str, list[Reader]]
) -> ReadGroup:
    """What reads one source, and what stands for it."""
    first = reads[0] if reads else None
    found = [reader for item in inputs for reader in readers.get(item.name, [])]
    what = read_message(first)[0].split(" is read by position")[0] if first else _unread(source)
    return ReadGroup(
        id="",
        code=first.code if first else "",
        title=f"{what} is read by position and is lifted"
        if inputs
        else f"{what} is read by position, with lifted inputs of other sources",
        hint="",
        status="natural" if first and first.form == "natural" else "lifted",
        source=source,
        source_kind=first.source_kind if first else "",
        consumer=short_op(first.op) if first else ", ".join(dict.fromkeys(reader.op for reader in found)),
        location=first.location if first else None,
        members=tuple(member(read) for read in reads),
        inputs=tuple(item.name for item in inputs),
        before=_before(source, reads),
        after=_after(source, inputs, readers) if inputs else None,
    )


def _unread(source: str) -> str:
    """A source that no read of the report has, because it is read together with another."""
    return f"the index from {source}" if source.startswith("aten.") else repr(source)


def _before(source: str, reads: list[PositionRead]) -> Picture:
    boxes = [Box("source", "source", source, reads[0].source_kind if reads else "")]
    arrows = []
    kinds = Counter((short_op(read.op), read.location.line if read.location else 0) for read in reads)
    for number, ((op, line), times) in enumerate(kinds.most_common(SHOWN)):
        spread = f"{times} reads" if times > 1 else "1 read"
        boxes.append(Box(f"reader {number}", "consumer", op, f"line {line}, {spread}" if line else spread, number))
        arrows.append(Arrow("source", f"reader {number}"))
    if len(kinds) > SHOWN or not kinds:
        text = f"{len(kinds) - SHOWN} more lines" if kinds else "read together with other sources"
        boxes.append(Box("more", "more", text, "", SHOWN if kinds else 0))
        arrows.append(Arrow("source", "more"))
    return Picture(tuple(boxes), tuple(arrows), f"Before lifting: {source} is read at {len(kinds)} lines")


def _after(source: str, inputs: list[LiftedInput], readers: dict[str, list[Reader]]) -> Picture:
    boxes = [Box("feed", "feed", f"feed: {source}", "")]
    arrows = []
    column = 0
    for item in inputs:
        boxes.append(Box(f"input {item.name}", "input", item.name, input_shape(item), column))
        arrows.append(Arrow("feed", f"input {item.name}", dashed=True))
        kinds = Counter(readers.get(item.name, []))
        for number, (reader, times) in enumerate(kinds.most_common(SHOWN)):
            above = f"input {item.name}"
            if reader.chain:
                name = f"{above} chain {number}"
                title = reader.chain[0] if len(reader.chain) == 1 else f"{len(reader.chain)} steps"
                text = "" if len(reader.chain) == 1 else ", ".join(reader.chain)
                boxes.append(Box(name, "op", title, text, column))
                arrows.append(Arrow(above, name))
                above = name
            end = f"input {item.name} reader {number}"
            boxes.append(Box(end, "consumer", reader.op, f"read {times} times" if times > 1 else "", column))
            arrows.append(Arrow(above, end))
            column += 1
        if len(kinds) > SHOWN:
            boxes.append(Box(f"more {item.name}", "more", f"{len(kinds) - SHOWN} more kinds of readers", "", column))
            arrows.append(Arrow(f"input {item.name}", f"more {item.name}"))
        column += not kinds or len(kinds) > SHOWN
    return Picture(
        tuple(boxes), tuple(arrows), f"After lifting: {', '.join(item.name for item in inputs)} stand for {source}"
    )


def _readers(nodes: Sequence[PlainNode], lifted: set[str]) -> dict[str, list[Reader]]:
    """Where each lifted input meets data, with the ops on the (first) way: one pass in the order of the graph."""
    user: dict[str, bool] = {}
    ways: dict[str, dict[str, tuple[str, ...]]] = {}  # a value without data -> each lifted input in it, and the way
    found: dict[str, list[Reader]] = defaultdict(list)
    for node in nodes:
        if node.op == "placeholder":
            user[node.name] = node.name not in lifted
            ways[node.name] = {node.name: ()} if node.name in lifted else {}
            continue
        user[node.name] = node.op == "call_function" and from_user(node, user)
        merged: dict[str, tuple[str, ...]] = {}
        for ref in node.refs():
            for name, way in ways.get(ref, {}).items():
                if name not in merged or len(way) < len(merged[name]):
                    merged[name] = way
        op = short_op(node.target)
        meets = user[node.name] or node.op == "output"
        if meets:
            for name, way in merged.items():
                found[name].append(Reader(op, way))
        ways[node.name] = {} if meets else {name: (*way, op) for name, way in merged.items()}
    return found
