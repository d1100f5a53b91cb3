"""Which nodes of a stage's graph are a layer's, and in what order layers and other nodes run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from buffer_lifting.errors import PartitionError
from buffer_lifting.torch_compat import OpOverload, is_mutable, returns_alias

#: A layer and which call of it: ``("layers.0", "")``, ``("layers.0", "1")`` for the second one.
Home = tuple[str, str]


@dataclass(eq=False)
class Region:
    """One call of a layer.

    Attributes:
        fqn: the layer's, in the original model.
        nodes: what it computes, in order.
        state: the ``get_attr`` nodes of what lies below its FQN, and of bodies of higher-order ops.
        inputs: what it takes from outside, in the order of its first use.
        outputs: what others take from it, in order.
    """

    fqn: str
    nodes: list[Node] = field(default_factory=list)
    state: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    members: set[Node] = field(default_factory=set)


def find_regions(
    graph: Graph, parameters: Collection[str], bodies: Collection[str], chosen: Callable[[str], bool] | None
) -> list[Region]:
    """The layers of a graph, in order. Position arithmetic that a stage repeats, without a parameter, is no layer.

    Args:
        graph: a flat one.
        parameters: the targets of the nodes that read one; ``bodies``: of those that name no tensor.
        chosen: whether an FQN is a layer's; ``None`` for the entries of the outermost module lists.

    Raises:
        PartitionError: layers inside one another, that need each other's values, or that values written in place join.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    home: dict[Node, Home] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found = _home(node, chosen)
            if found is not None:
                home[node] = found
    _leave_sizes(graph, home)
    regions = _collect(graph, home)
    for key, region in list(regions.items()):
        if not any(_own_state(operand, region.fqn) and operand.target in parameters for operand in _operands(region)):
            del regions[key]
            home = {node: own for node, own in home.items() if own != key}
    for key, region in regions.items():
        _absorb(region, key, home, order)
    regions = _collect(graph, home)
    _check_writes(graph, home, regions, order)
    for region in regions.values():
        _connect(region, bodies)
    return [region for region in regions.values() if region.outputs]


def _home(node: Node, chosen: Callable[[str], bool] | None) -> Home | None:
    """The layer that a node was traced in; as a module list is not called, its entries may be lists themselves."""
    found: dict[str, str] = {}
    for key, (fqn, _) in (node.meta.get("nn_module_stack") or {}).items():
        name, call = str(fqn).partition("@")[0], str(key).partition("@")[2]
        for prefix in _prefixes(name):
            if prefix.rpartition(".")[2].isdigit() if chosen is None else chosen(prefix):
                found.setdefault(prefix, call)
                if chosen is None:
                    return prefix, call
    names = list(found)
    if len(names) > 1:
        raise PartitionError(
            f"the layers {names[0]!r} and {names[1]!r} lie inside one another; give layers= one kind of them"
        )
    return (names[0], found[names[0]]) if found else None


def _prefixes(fqn: str) -> Iterator[str]:
    """``"a"``, ``"a.b"``, ``"a.b.c"``."""
    parts = fqn.split(".") if fqn else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _leave_sizes(graph: Graph, home: dict[Node, Home]) -> None:
    """Sizes of what lies outside are taken outside, if another layer needs them: a layer would have to return them."""
    for node in graph.nodes:
        own = home.get(node)
        size = node.target is torch.ops.aten.sym_size.int or isinstance(node.meta.get("val"), torch.SymInt | int)
        if own is None or not size:
            continue
        outside = all(home.get(operand) != own for operand in node.all_input_nodes)
        if outside and any(home.get(user) != own for user in node.users):
            del home[node]


def _collect(graph: Graph, home: dict[Node, Home]) -> dict[Home, Region]:
    regions: dict[Home, Region] = {}
    for node in graph.nodes:
        if node in home:
            region = regions.setdefault(home[node], Region(home[node][0]))
            region.nodes.append(node)
            region.members.add(node)
    return regions


def _absorb(region: Region, key: Home, home: dict[Node, Home], order: dict[Node, int]) -> None:
    """Takes in what computes from the layer's values, between its first node and its last, for the layer itself."""
    first, last = order[region.nodes[0]], order[region.nodes[-1]]
    if last - first + 1 == len(region.nodes):
        return
    window = _between(region.nodes[0], region.nodes[-1])
    behind: set[Node] = set()
    for node in window:
        if any(operand in region.members or operand in behind for operand in node.all_input_nodes):
            behind.add(node)
    ahead: set[Node] = set()
    for node in reversed(window):
        if any(user in region.members or user in ahead for user in node.users):
            ahead.add(node)
    for node in window:
        if node in region.members or node not in behind or node not in ahead:
            continue
        if home.get(node, key) != key:
            raise PartitionError(
                f"the layers {region.fqn!r} and {home[node][0]!r} need each other's values (at {node.name!r}); "
                "give layers= the module that holds both"
            )
        home[node] = key


def _between(first: Node, last: Node) -> list[Node]:
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(nodes[-1].next)
    return nodes


def _check_writes(graph: Graph, home: dict[Node, Home], regions: dict[Home, Region], order: dict[Node, int]) -> None:
    """What is written in place is written and read by one layer, or outside of all: calls may move past each other."""
    for node in graph.nodes:
        if not (isinstance(node.target, OpOverload) and is_mutable(node.target)):
            continue
        base = node
        aliases = [node]
        while base.op == "call_function" and base.all_input_nodes:
            base = base.all_input_nodes[0]
            aliases.append(base)
            if not (isinstance(base.target, OpOverload) and returns_alias(base)):
                break
        readers = [user for alias in aliases for user in alias.users if user.op == "call_function"]
        homes = {home.get(other) for other in (*aliases, *readers) if other.op == "call_function"}
        if len(homes) > 1 and not _in_order(node, readers, home, regions, order):
            layers = ", ".join(sorted(repr(key[0]) for key in homes if key))
            raise PartitionError(f"{node.name!r} writes in place to a value that is read on both sides of {layers}")


def _in_order(
    node: Node, readers: list[Node], home: dict[Node, Home], regions: dict[Home, Region], order: dict[Node, int]
) -> bool:
    """Whether every reader runs before, or behind, the write as it did when each layer runs as one."""

    def place(other: Node) -> int:
        return order[regions[home[other]].nodes[-1]] if other in home else order[other]

    return all(
        reader is node
        or home.get(reader) == home.get(node)
        or (order[reader] < order[node]) == (place(reader) < place(node))
        for reader in readers
    )


def _operands(region: Region) -> Iterator[Node]:
    for node in region.nodes:
        yield from node.all_input_nodes


def _own_state(node: Node, fqn: str) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(f"{fqn}.")


def _connect(region: Region, bodies: Collection[str]) -> None:
    inputs: dict[Node, None] = {}
    state: dict[Node, None] = {}
    for operand in _operands(region):
        if operand not in region.members:
            body = operand.op == "get_attr" and operand.target in bodies
            (state if body or _own_state(operand, region.fqn) else inputs)[operand] = None
    region.inputs, region.state = list(inputs), list(state)
    region.outputs = [node for node in region.nodes if any(user not in region.members for user in node.users)]


def parent_order(graph: Graph, regions: list[Region]) -> list[Node | Region]:
    """The nodes outside of the layers, and the layers, in an order in which everything comes behind what it needs.

    Raises:
        PartitionError: layers that need each other's values.
    """
    of: dict[Node, Region] = {node: region for region in regions for node in region.members}
    lasts = {region.nodes[-1] for region in regions}
    own = {node for region in regions for node in region.state}
    done: list[Node | Region] = []
    seen: set[Node | Region] = set()
    open_: set[Node | Region] = set()

    def visit(start: Node | Region) -> None:
        stack: list[tuple[Node | Region, bool]] = [(start, False)]
        while stack:
            item, ready = stack.pop()
            if ready:
                open_.discard(item)
                seen.add(item)
                done.append(item)
                continue
            if item in seen:
                continue
            if item in open_:
                where = f"the layer {item.fqn!r}" if isinstance(item, Region) else f"node {item.name!r}"
                raise PartitionError(
                    f"{where} and another layer need each other's values; give layers= the module that holds both"
                )
            open_.add(item)
            stack.append((item, True))
            operands = item.inputs if isinstance(item, Region) else item.all_input_nodes
            stack.extend((of.get(operand, operand), False) for operand in reversed(operands))

    for node in graph.nodes:
        if node in of:
            if node in lasts:
                visit(of[node])
        elif not (node in own and all(user in of for user in node.users)):
            visit(node)
    return done
