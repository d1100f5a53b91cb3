"""The shape of a lifted graph and of stages: batch-broadcast nodes, batch first, what crosses a boundary, lengths.

Works on a plain form of a graph, that of the files of a saved partition, so that these are checked without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.diagnostics import Diagnostic, diagnostic
from buffer_lifting.ops import FILLS
from buffer_lifting.program import AxesInfo, InputAxes, LiftedInput, ScanReport

if TYPE_CHECKING:
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.stages import StagedProgram

_EXPAND = "aten.expand.default"
_SIZES = ("aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset")
_LIKE = ("aten.expand_as", "aten.view_as", "aten.reshape_as", "aten.type_as")


@dataclass(frozen=True, slots=True)
class PlainNode:
    """A node as in a saved stage: a reference in ``args`` is ``{"node": name}``.

    ``shape`` is that of a placeholder, where it is known.
    """

    name: str
    op: str  # "placeholder", "call_function", "get_attr" or "output"
    target: str
    args: tuple[Any, ...]
    shape: tuple[str, ...] | None = None

    def refs(self) -> list[str]:
        """The nodes that the arguments refer to, in order."""
        return _refs(self.args)


@dataclass(frozen=True, slots=True)
class PlainStage:
    """A stage: the names of its positional inputs, of what it hands on, and its graph."""

    index: int
    activations: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[PlainNode, ...]


def shape_of_lifted(lifted: LiftedProgram) -> list[Diagnostic]:
    """BL301, BL302 and BL304 of a lifted program."""
    nodes = plain_graph(lifted.program.graph.nodes)
    return shape_of_graph(nodes, lifted.inputs, lifted.report, lifted.input_axes, lifted.axes)


def shape_of_graph(
    nodes: Sequence[PlainNode],
    inputs: Sequence[LiftedInput],
    report: ScanReport,
    input_axes: Mapping[str, InputAxes],
    axes: AxesInfo,
) -> list[Diagnostic]:
    """BL301, BL302 and BL304 of a lifted graph."""
    return [*_broadcasts(nodes, inputs, report, _batch_size(input_axes, nodes), ""), *lengths(axes)]


def shape_of_staged(staged: StagedProgram) -> list[Diagnostic]:
    """BL301 to BL304 of a partition: of the lifted program, of each stage, and of each boundary."""
    stages = [
        PlainStage(stage.index, stage.activations, stage.outputs, plain_graph(stage.module.graph.nodes))
        for stage in staged.stages
    ]
    return [*shape_of_lifted(staged.lifted), *shape_of_stages(stages, staged.lifted.inputs, staged.lifted.report)]


def shape_of_stages(
    stages: Sequence[PlainStage], inputs: Sequence[LiftedInput], report: ScanReport
) -> list[Diagnostic]:
    """BL301 and BL302 of each stage, and BL303 of each boundary."""
    found: list[Diagnostic] = []
    for stage in stages:
        found += _broadcasts(stage.nodes, inputs, report, None, f" of stage {stage.index}")
    return found + _boundaries(stages, {item.name for item in inputs})


def lengths(axes: AxesInfo) -> list[Diagnostic]:
    """BL304 for each sequence axis with a constant length in a program that has dynamic dims."""
    dynamic = (axes.has_batch and axes.batch is None) or None in axes.lengths.values()
    if not dynamic:
        return []
    return [
        diagnostic(
            "BL304",
            f"the length of the sequence axis {axis!r} is the constant {length}, although other dims are dynamic",
            "export with an example that is shorter than the model's tables",
            source=axis,
        )
        for axis, length in axes.lengths.items()
        if length is not None
    ]


def _broadcasts(
    nodes: Sequence[PlainNode], inputs: Sequence[LiftedInput], report: ScanReport, batch: str | None, where: str
) -> list[Diagnostic]:
    """``batch``: the batch size as text, where the shapes of placeholders are known."""
    by_name = {item.name: item for item in inputs}
    users: dict[str, list[PlainNode]] = {}
    for node in nodes:
        for ref in dict.fromkeys(node.refs()):
            users.setdefault(ref, []).append(node)
    places: dict[str, Location] = {}  # where the source of a lifted input is read in the model
    for read in report.reads:
        if read.location:
            places.setdefault(read.source, read.location)
    found = []
    for node in nodes:
        item = by_name.get(node.name) if node.op == "placeholder" else None
        if item is None:
            continue
        place = places.get(item.source)
        readers = users.get(node.name, [])
        name = f"lifted input {item.name!r}{where}"
        if len(readers) != 1 or readers[0].target != _EXPAND:
            ops = ", ".join(dict.fromkeys(user.target for user in readers)) or "nothing"
            message = f"{name} is not followed by one batch-broadcast node: it is read by {ops}"
            op = readers[0].target if readers else ""
            found.append(diagnostic("BL301", message, "", place, source=item.source, node=node.name, op=op))
            continue
        sizes = readers[0].args[1] if len(readers[0].args) > 1 else ()
        sizes = sizes if isinstance(sizes, list | tuple) else ()
        spread = [dim for dim, size in enumerate(sizes) if size != -1]
        if not item.batched:
            if spread:
                found.append(_misplaced(item, node, place, f"{name} has no batch dim, yet it is expanded"))
        elif spread != [0]:
            message = f"{name} is expanded along {_dims(spread)}, not along dim 0, the batch"
            found.append(_misplaced(item, node, place, message))
        elif node.shape and batch is not None and node.shape[0] != batch:
            message = f"{name} has shape [{', '.join(node.shape)}]: dim 0 is not the batch, {batch}"
            found.append(_misplaced(item, node, place, message))
    return found


def _misplaced(item: LiftedInput, node: PlainNode, place: Location | None, message: str) -> Diagnostic:
    hint = "a lifted input is [batch, seq, *row]"
    return diagnostic("BL302", message, hint, place, source=item.source, node=node.name, op=_EXPAND)


def _dims(dims: Sequence[int]) -> str:
    return f"the dims {', '.join(map(str, dims))}" if dims else "no dim"


def _boundaries(stages: Sequence[PlainStage], lifted: set[str]) -> list[Diagnostic]:
    """Values that no user input and no activation enters by its contents, where a stage hands them on first."""
    found = []
    received: list[bool] = []
    for stage in stages:
        user: dict[str, bool] = {}
        places = {name: index for index, name in enumerate(stage.activations)}
        handed: list[str] = []
        nodes = {node.name: node for node in stage.nodes}
        written: set[str] = set()
        for node in stage.nodes:
            if node.op == "placeholder":
                user[node.name] = node.name not in lifted
                if stage.index and node.name in places:
                    place = places[node.name]
                    user[node.name] = received[place] if place < len(received) else True
            elif node.op == "call_function":
                user[node.name] = from_user(node, user)
                if node.target.split(".")[1:2] and node.target.split(".")[1].endswith("_"):
                    _write(node, user, nodes, written)
            elif node.op == "output":
                handed = node.refs()
            else:
                user[node.name] = False
        received = [user[name] for name in handed]
        if stage.index == len(stages) - 1:
            break
        for name in handed:
            carried = stage.index > 0 and _uncloned(name, nodes) in places  # found where it was made
            if not user[name] and not carried:
                message = f"{name!r}, which stage {stage.index} sends on, is made from positions alone"
                hint = "feed the later stage its own lifted input"
                source = ", ".join(sorted(_sources(name, nodes) & lifted))
                found.append(diagnostic("BL303", message, hint, source=source, node=name, op=nodes[name].target))
    return found


def from_user(node: PlainNode, user: dict[str, bool]) -> bool:
    """Whether user contents enter a call, by what is known of its operands; sizes are none."""
    base = node.target.rsplit(".", 1)[0]
    if base in _SIZES or base in FILLS:
        return False
    refs = _refs(node.args[:1]) if base in _LIKE or node.target == "aten.to.other" else node.refs()
    return any(user[ref] for ref in refs)


def _write(node: PlainNode, user: dict[str, bool], nodes: dict[str, PlainNode], written: set[str]) -> None:
    """An in-place op gives its dependence to what it writes to, through views; ``written`` are those that have it."""
    target = _refs(node.args[:1]) if user[node.name] else []
    while target and nodes[target[0]].op == "call_function" and target[0] not in written:
        user[target[0]] = True
        written.add(target[0])
        target = _refs(nodes[target[0]].args[:1])


def _uncloned(name: str, nodes: dict[str, PlainNode]) -> str:
    node = nodes[name]
    return node.refs()[0] if node.target == "aten.clone.default" else name


def _sources(name: str, nodes: dict[str, PlainNode]) -> set[str]:
    seen: set[str] = set()
    stack = [name]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += nodes[current].refs()
    return seen


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return [value["node"]]
        return [name for item in value.values() for name in _refs(item)]
    if isinstance(value, list | tuple):
        return [name for item in value for name in _refs(item)]
    return []


def plain_graph(nodes: Any) -> tuple[PlainNode, ...]:
    """The nodes of an ``fx.Graph``."""
    plain = []
    for node in nodes:
        shape = getattr(node.meta.get("val"), "shape", None) if node.op == "placeholder" else None
        plain.append(
            PlainNode(
                node.name,
                node.op,
                str(node.target),
                (*map(_plain_arg, node.args), *map(_plain_arg, node.kwargs.values())),
                None if shape is None else tuple(str(size) for size in shape),
            )
        )
    return tuple(plain)


def _plain_arg(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain_arg(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain_arg(item) for key, item in value.items()}
    if hasattr(value, "all_input_nodes"):
        return {"node": value.name}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _batch_size(input_axes: Mapping[str, InputAxes], nodes: Sequence[PlainNode]) -> str | None:
    for node in nodes:
        own = input_axes.get(node.name) if node.op == "placeholder" else None
        if own is not None and own.batch_dim is not None and node.shape:
            return node.shape[own.batch_dim]
    return None
