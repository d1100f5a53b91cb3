"""Emits the gradients of tables that are read by position, in the place of those of the original graph."""

from __future__ import annotations

from collections.abc import Sequence

from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.plan import GradientPlan


def scatter_gradients(emitter: Emitter, plans: Sequence[GradientPlan]) -> None:
    """Puts each plan in the place of its node, or, if that is only returned, into the output."""
    output = emitter.graph.output_node()
    for item in plans:
        old, new = emitter.nodes[item.node], emitter.emit(item.plan)
        readers = [output] if item.returned else [user for user in old.users if user is not new]
        for reader in readers:
            reader.replace_input_with(old, new)
