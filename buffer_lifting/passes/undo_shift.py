"""Emits what :mod:`buffer_lifting.loss_shift` found: a loss over all positions in place of one over shifted slices.

Cases handled: those of ``loss_shift``. It changes a graph as that module changes its record, node for node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph

from buffer_lifting.graph.record import Arg, Ref
from buffer_lifting.loss_chain import LAST
from buffer_lifting.loss_shift import LossShift
from buffer_lifting.passes.fakes import Fakes
from buffer_lifting.torch_compat import set_arguments


def undo_shifts_in(graph: Graph, shifts: Sequence[LossShift]) -> None:
    """Edits a normalised graph in place.

    Raises:
        UnsupportedReadError: torch's fake of an op would fix a dynamic size.
    """
    if not shifts:
        return
    fakes = Fakes(graph)
    nodes = {node.name: node for node in graph.nodes}
    for shift in shifts:
        cut, target = nodes[shift.cut], nodes[shift.target_cut]
        cut.replace_all_uses_with(nodes[shift.data])
        graph.erase_node(cut)
        args = (nodes[shift.padded], list(shift.widths), shift.ignore_index)
        with graph.inserting_before(target):
            pad = graph.create_node("call_function", torch.ops.aten.constant_pad_nd.default, args, name=shift.pad)
        assert pad.name == shift.pad
        pad.meta = {**target.meta, "val": fakes.of(pad.target, pad.args, {})}
        nodes[shift.pad] = pad
        set_arguments(target, {"self": pad, "end": LAST})
        for name in shift.shapes:
            node = nodes[name]
            if name in shift.sizes:
                key, sizes = shift.sizes[name]
                set_arguments(node, {key: [_argument(size, nodes) for size in sizes]})
            node.meta["val"] = fakes.of(node.target, node.args, dict(node.kwargs))


def _argument(arg: Arg, nodes: dict[str, torch.fx.Node]) -> object:
    return nodes[arg.name] if isinstance(arg, Ref) else arg
