"""Removes what ``torch.vmap`` left in a graph, once nothing reads its results: the block masks of the original.

Export records vmap as calls that enter and leave a level, around ops on values with hidden dims. The calls have
effects, so dead code elimination keeps them.
"""

from __future__ import annotations

from torch.fx import Graph, Node

_ENTER, _LEAVE, _LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"
_BATCHED = ("_add_batch_dim", "_remove_batch_dim")


def _called(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def holds_level(node: Node) -> bool:
    """Whether a call is there for its effect on the level only: nothing reads its result."""
    return _called(node) in (_ENTER, _LEAVE, _LOAD)


def vmap_regions(graph: Graph) -> list[list[Node]]:
    """The outermost regions between entering and leaving a level, in order, their ends included."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        name = _called(node)
        if name == _ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if name == _LEAVE:
            depth -= 1
    return regions


def drop_vmap(graph: Graph) -> bool:
    """Removes the regions whose results nothing reads. Returns whether any region is left."""
    regions = vmap_regions(graph)
    if not regions:
        return False
    inside = {node for region in regions for node in region}
    live = _live(graph, inside)
    left = []
    for region in reversed(regions):
        if any(node in live for node in region if _called(node) in _BATCHED):
            left.append(region)
            for node in region:
                _mark(node, live)
    gone = {node for region in regions if region not in left for node in region if node not in live}
    for node in graph.nodes:  # what is computed from a dead region, assertions included
        if node not in live and any(operand in gone for operand in node.all_input_nodes):
            gone.add(node)
    for node in reversed(list(graph.nodes)):
        if node in gone or (not left and _called(node) == _LOAD):
            graph.erase_node(node)
    return bool(left)


def _live(graph: Graph, inside: set[Node]) -> set[Node]:
    live: set[Node] = set()
    for node in graph.nodes:
        effect = node.is_impure() and node not in inside and "_assert" not in str(node.target)
        if node.op in ("output", "placeholder") or (effect and _called(node) != _LOAD):
            _mark(node, live)
    return live


def _mark(node: Node, live: set[Node]) -> None:
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in live:
            live.add(current)
            stack.extend(current.all_input_nodes)
