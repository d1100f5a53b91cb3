"""How the losses of the ranks of a context-parallel program add up to the loss of the whole batch.

A loss that is a mean over the valid tokens of a rank counts as much as it has valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from buffer_lifting.plan import LiftPlan
from buffer_lifting.torch_compat import schema_args

_MEAN = 1


@dataclass(frozen=True)
class Losses:
    """The reductions over all tokens of a program, and the values that tell how many tokens each counts."""

    nodes: tuple[Node, ...]
    needed: frozenset[str]
    results: frozenset[str]  # what is computed from a loss


def loss_values(graph: Graph, plan: LiftPlan) -> Losses:
    """The losses of a graph, as the scan of the original found them."""
    names = {mix.node for mix in plan.report.mixing if mix.handled and mix.reason.startswith("a loss")}
    nodes = tuple(node for node in graph.nodes if node.name in names)
    needed = set()
    below: set[Node] = set(nodes)
    for node in graph.nodes:
        if node in below:
            continue
        if any(operand in below for operand in node.all_input_nodes):
            below.add(node)
    for node in nodes:
        args = schema_args(node)
        counted = args.get("target") if "target" in args else args.get("other")
        if isinstance(counted, Node):
            needed.add(counted.name)
    return Losses(nodes, frozenset(needed), frozenset(node.name for node in below))


def loss_shares(losses: Losses, captured: list[dict[str, Any]]) -> list[float]:
    """What the loss of each rank counts for.

    The last reduction decides: a division by a number of tokens, a mean over the targets that are not ignored, a
    mean over all tokens (every rank has as many), or a sum.
    """
    ranks = len(captured)
    node = losses.nodes[-1]
    args = schema_args(node)
    if "target" in args:
        if args.get("reduction") != _MEAN:
            return [1.0] * ranks
        targets = [own[args["target"].name] for own in captured]
        ignored = args.get("ignore_index")  # losses of single elements have none
        counts = [1.0 if ignored is None else float((target != ignored).sum()) for target in targets]
    elif isinstance(args.get("other"), Node) and args["other"].name in losses.needed:
        counts = [float(torch.as_tensor(own[args["other"].name]).sum()) for own in captured]
    elif "mean" in str(node.target):
        counts = [1.0] * ranks
    else:
        return [1.0] * ranks
    whole = sum(counts)
    return [count / whole for count in counts]
