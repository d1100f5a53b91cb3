"""Runs the ranks of a context-parallel program in one process, node by node, with an exchange at its collectives.

Parameters are shared between the ranks, so their gradients are the sums over the ranks that a trainer makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from buffer_lifting.oracles.ring import ring_of_ranks
from buffer_lifting.oracles.running import Runnable
from buffer_lifting.ring import RING
from buffer_lifting.torch_compat import ALL_GATHER, ALL_TO_ALL, WAIT, current_node, tree_flatten


def run_ranks(
    runnable: Runnable, values: Sequence[Mapping[str, Any]], capture: frozenset[str] = frozenset()
) -> tuple[list[list[Any]], dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Outputs of each rank, the shared parameters as fresh leaves by FQN, and captured values of each rank.

    Args:
        runnable: the graph with its state.
        values: the user and lifted inputs of each rank, by name.
        capture: names of nodes whose values are wanted.
    """
    leaves = runnable.leaves()
    feeds = [{**runnable.state, **leaves, **own} for own in values]
    outputs, captured = run_modules(runnable.module, feeds, capture)
    return outputs, {runnable.parameters[name]: leaf for name, leaf in leaves.items()}, captured


def run_modules(
    module: GraphModule, values: Sequence[Mapping[str, Any]], capture: frozenset[str] = frozenset()
) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """Outputs and captured values of each rank of one module; ``values`` are by placeholder, others are ``None``."""
    interpreters = [Interpreter(module) for _ in values]
    captured: list[dict[str, Any]] = [{} for _ in values]
    results: list[Any] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            results = [own.get(node.name) for own in values]
        elif node.op == "call_function" and node.target in _EXCHANGES:
            results = _EXCHANGES[node.target]([interpreter.env[node.args[0]] for interpreter in interpreters])
        elif node.op == "call_function" and node.target is RING:
            results = ring_of_ranks([interpreter.fetch_args_kwargs_from_env(node)[0] for interpreter in interpreters])
        else:
            results = [_run(interpreter, node) for interpreter in interpreters]
        for interpreter, result, kept in zip(interpreters, results, captured, strict=True):
            interpreter.env[node] = result
            if node.name in capture:
                kept[node.name] = result.detach() if isinstance(result, torch.Tensor) else result
    return [list(tree_flatten(result)[0]) for result in results], captured


def _run(interpreter: Interpreter, node: Node) -> Any:
    with current_node(interpreter, node):
        args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
        run: Callable[..., Any] = getattr(interpreter, node.op)
        return run(node.target, args, kwargs)


def _gather(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(parts)] * len(parts)


def _exchange(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    rows = [part.chunk(len(parts)) for part in parts]
    return [torch.cat([row[rank] for row in rows]) for rank in range(len(parts))]


_EXCHANGES: dict[Any, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    ALL_GATHER: _gather,
    ALL_TO_ALL: _exchange,
    WAIT: list,
}
