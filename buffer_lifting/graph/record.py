"""The record of a graph: what an analysis needs to know, as plain data.

A record is a list of :class:`Node` in topological order. It is built from an ExportedProgram or a plain
``fx.GraphModule`` (``from_fx.py``); analysis reads nothing else, so that it is the same for any front end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from buffer_lifting.graph.sizes import Size, rename


class NodeKind(Enum):
    """What a node stands for."""

    INPUT = "input"  # a user input
    STATE = "state"  # a parameter, buffer or constant tensor
    OP = "op"  # a call
    OUTPUT = "output"


class StateKind(Enum):
    """What a state node holds."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to another node's value in an argument."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """An argument that analysis does not look into (a dtype, a device, a submodule), by its text."""

    text: str


Arg = Ref | Opaque | int | float | bool | str | None | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape (sizes, outermost first) and dtype (``"float32"``) of a tensor value."""

    shape: tuple[Size, ...]
    dtype: str

    @property
    def is_floating(self) -> bool:
        """Whether the dtype carries gradients (floating or complex)."""
        return self.dtype.startswith(("float", "bfloat", "complex", "half", "double"))


@dataclass(frozen=True, slots=True)
class ScalarMeta:
    """A symbolic integer, float or bool: its expression as a size where it is one."""

    size: Size | None


Meta = TensorMeta | ScalarMeta | tuple["Meta", ...] | None


@dataclass(frozen=True, slots=True)
class Location:
    """A place in the model's source."""

    file: str
    line: int
    code: str = ""
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True)
class Node:
    """One node. ``args`` maps the op's schema names to arguments, defaults included."""

    name: str
    kind: NodeKind
    op: str = ""  # "aten.slice.Tensor"
    args: dict[str, Arg] = field(default_factory=dict)
    meta: Meta = None
    modules: tuple[tuple[str, str], ...] = ()  # ((module FQN, class), ...), outermost first
    location: Location | None = None
    fqn: str = ""  # of a state node; of an input node its name as the user gives it
    aliases: tuple[str, ...] = ()  # other FQNs of the same storage
    content: str = ""  # of a state node: equal for states that hold the same values
    state_kind: StateKind | None = None
    persistent: bool = True
    uniform: bool = False  # of a state node: an integer tensor that is in no checkpoint, with all elements equal
    mutated: bool = False
    _refs: tuple[tuple[str, str], ...] | None = field(default=None, compare=False, repr=False)
    _by_path: dict[str, str] | None = field(default=None, compare=False, repr=False)
    _names: tuple[str, ...] = field(default=(), compare=False, repr=False)  # those of _refs, once these are known
    _base_op: str | None = field(default=None, compare=False, repr=False)

    @property
    def base_op(self) -> str:
        """The op without its overload: ``"aten.slice"``."""
        base = self._base_op
        if base is None:
            base = self._base_op = self.op.rsplit(".", 1)[0] if self.op.startswith("aten.") else self.op
        return base

    @property
    def tensor(self) -> TensorMeta | None:
        """The tensor meta of a node with one tensor output."""
        return self.meta if isinstance(self.meta, TensorMeta) else None

    @property
    def module(self) -> str:
        """The FQN of the innermost module that the node was traced in."""
        return self.modules[-1][0] if self.modules else ""

    @property
    def module_class(self) -> str:
        """The class of that module; empty if it is not known."""
        return self.modules[-1][1] if self.modules else ""

    def refs(self) -> tuple[str, ...]:
        """The names of all nodes that the arguments refer to, in order."""
        if self._refs is None:
            self.named_refs()
        return self._names

    def named_refs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of argument path (``"input"``, ``"tensors.1"``) and node name."""
        if self._refs is None:
            pairs: list[tuple[str, str]] = []
            for key, arg in self.args.items():
                if type(arg) is Ref:
                    pairs.append((key, arg.name))
                elif type(arg) is tuple and arg:
                    pairs.extend(_walk(key, arg))
            self._refs, self._by_path = tuple(pairs), dict(pairs)
            self._names = tuple([pair[1] for pair in pairs])
        return self._refs

    def ref(self, path: str) -> str | None:
        """The name of the node that an argument refers to, by its path."""
        if self._refs is None or self._by_path is None:
            self._refs = None
            self.named_refs()
        assert self._by_path is not None
        return self._by_path.get(path)


def renamed_meta(meta: Meta, names: dict[str, str] | dict[str, Size]) -> Meta:
    """A meta with size symbols renamed, or replaced by sizes."""
    if isinstance(meta, TensorMeta):
        return TensorMeta(tuple(rename(size, names) for size in meta.shape), meta.dtype)
    if isinstance(meta, ScalarMeta):
        return ScalarMeta(None if meta.size is None else rename(meta.size, names))
    if isinstance(meta, tuple):
        return tuple(renamed_meta(item, names) for item in meta)
    return meta


def _walk(path: str, arg: Arg) -> Iterator[tuple[str, str]]:
    if isinstance(arg, Ref):
        yield path, arg.name
    elif isinstance(arg, tuple):
        for index, item in enumerate(arg):
            yield from _walk(f"{path}.{index}", item)


@dataclass(frozen=True, slots=True)
class Joint:
    """What is known of a graph of ATen ops that may compute gradients as well.

    Attributes:
        backward: whether it does.
        tangents: input that is the gradient of a result -> the node of that result; ``""`` if it is not known.
        gradients: node that is returned as a gradient -> the FQN (or input) whose gradient it is.
    """

    backward: bool = False
    tangents: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class GraphRecord:
    """A whole graph: nodes by name in topological order, and the bounds of its size symbols."""

    nodes: dict[str, Node]
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)  # size symbol -> its size in the example inputs
    bodies: dict[str, GraphRecord] = field(default_factory=dict)  # bodies of flex_attention, by the node that names one
    joint: Joint | None = None  # of a graph that is no exported program
    shared: frozenset[str] = field(default=frozenset(), compare=False)  # nodes that are another record's as well
    renamed: bool = field(default=False, compare=False)  # sizes are no longer those of the graph

    def rename_symbols(self, names: dict[str, str] | dict[str, Size]) -> None:
        """Renames size symbols in every node's meta (two symbols that are known to be one size), or replaces them."""
        self.nodes.update({name: replace(self.nodes[name]) for name in self.shared})
        self.shared, self.renamed = frozenset(), True
        for node in self.nodes.values():
            node.meta = renamed_meta(node.meta, names)
        for body in self.bodies.values():
            body.rename_symbols(names)

    def inputs(self) -> list[Node]:
        """The user inputs, in the order of the signature; gradients of results are none."""
        tangents = self.joint.tangents if self.joint else {}
        return [node for node in self.nodes.values() if node.kind is NodeKind.INPUT and node.name not in tangents]

    def live(self) -> set[str]:
        """The nodes that an output, or a write to storage, depends on."""
        from buffer_lifting.ops import is_mutating

        stack = [
            n.name
            for n in self.nodes.values()
            if n.kind is NodeKind.OUTPUT or (n.kind is NodeKind.OP and is_mutating(n))
        ]
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack.extend(self.nodes[name].refs())
        return seen

    def users(self) -> dict[str, list[str]]:
        """For each node the names of the nodes that read it."""
        users: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.refs()):
                users[name].append(node.name)
        return users
