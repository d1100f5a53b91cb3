"""The contract of a graph pass.

A pass is one class. ``requires`` raises if its input is not what the pass works on, ``call`` edits a copy of the
graph and says whether it changed anything, ``ensures`` checks the *result* and raises if the pass broke a promise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.fx import Graph

State = TypeVar("State")


@dataclass(frozen=True)
class PassResult(Generic[State]):
    """The state after a pass, and whether the pass changed it."""

    state: State
    modified: bool


class GraphPass(ABC, Generic[State]):
    """One pass over a state that owns its graph."""

    name: str = ""

    @abstractmethod
    def requires(self, state: State) -> None:
        """Raises a LiftingError if the pass cannot run on ``state``."""

    @abstractmethod
    def call(self, state: State) -> PassResult[State]:
        """Edits the state's graph."""

    @abstractmethod
    def ensures(self, result: PassResult[State]) -> None:
        """Raises AssertionError if the result is not what the pass promises."""

    def __call__(self, state: State) -> PassResult[State]:
        """Runs the pass with its checks."""
        self.requires(state)
        result = self.call(state)
        self.ensures(result)
        return result


def check_topology(graph: Graph) -> None:
    """Asserts that every node is defined before it is used (``Graph.lint`` without its module checks)."""
    seen = set()
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            assert operand in seen, f"{node.name} reads {operand.name}, which comes later"
        seen.add(node)
