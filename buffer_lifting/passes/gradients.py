"""Emits the gradients of tables that are read by position, in the place of those of the original graph."""

from __future__ import annotations

from collections.abc import Sequence

from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.plan import GradientPlan


def scatter_gradients(emitter: Emitter, plans: Sequence[GradientPlan]) -> None:
    """Puts each plan in the place of its node, or, if that is only returned, into the output."""
    for item in plans:
        old = emitter.nodes[item.node]
        new = emitter.emit(item.plan)
        output = emitter.graph.output_node()
        old.replace_all_uses_with(new, lambda user, item=item: user is output or not item.returned)
