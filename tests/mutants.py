"""Deliberate faults: edits of a lifted program, its feed or its stages that an oracle has to catch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

import buffer_lifting as bl
from buffer_lifting.feed import FeedProgram
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.plan import FrontierEdge
from buffer_lifting.scanner import scan_record
from buffer_lifting.streams import Streams
from buffer_lifting.torch_compat import replace_operands, schema_args, set_arguments

aten = torch.ops.aten
Transform = Callable[[Graph, Node], Node]


def frontier(program: Any) -> list[FrontierEdge]:
    """Every operand that is read by position, in graph order."""
    return scan_record(build_record(program, normalize(program).graph)).frontier


def node_of(lifted: bl.LiftedProgram, name: str) -> Node:
    """A node of the lifted program's graph."""
    return next(node for node in lifted.program.graph.nodes if node.name == name)


def emit(graph: Graph, after: Node, target: Any, *args: Any) -> Node:
    """A call behind ``after``, with a fake value."""
    with graph.inserting_after(after):
        node = graph.call_function(target, args)
    node.meta = {k: v for k, v in after.meta.items() if k != "val"}
    fakes = torch.fx.map_arg(args, lambda n: n.meta["val"])
    with after.meta["val"].fake_mode:
        node.meta["val"] = target(*fakes)
    return node


# -- transforms of one value [batch, seq, ...] ------------------------------------------------------------------


def roll(by: int, dim: int = 1) -> Transform:
    """Every position off by ``by``."""
    return lambda graph, node: emit(graph, node, aten.roll.default, node, [by], [dim])


def flip(dim: int) -> Transform:
    """One axis the wrong way round."""
    return lambda graph, node: emit(graph, node, aten.flip.default, node, [dim])


def first_row(graph: Graph, node: Node) -> Node:
    """Every position reads the row of position 0."""
    row = emit(graph, node, aten.slice.Tensor, node, 1, 0, 1)
    return emit(graph, row, aten.expand_as.default, row, node)


def scaled(graph: Graph, node: Node) -> Node:
    """Positions twice as far apart (or a table of twice the values)."""
    return emit(graph, node, aten.mul.Tensor, node, 2)


def offset(by: int) -> Transform:
    """An index off by ``by``, kept in range from below."""

    def transform(graph: Graph, node: Node) -> Node:
        moved = emit(graph, node, aten.add.Tensor, node, by)
        return emit(graph, moved, aten.clamp_min.default, moved, 0)

    return transform


def zeroed(graph: Graph, node: Node) -> Node:
    """A table that was never filled."""
    return emit(graph, node, aten.zeros_like.default, node)


def rounded(graph: Graph, node: Node) -> Node:
    """The right dtype, with the precision of bfloat16."""
    low = emit(graph, node, aten.to.dtype, node, torch.bfloat16)
    return emit(graph, low, aten.to.dtype, low, node.meta["val"].dtype)


def conjugated(graph: Graph, node: Node) -> Node:
    """A rotation the other way round."""
    turned = emit(graph, node, aten.conj_physical.default, node)
    return turned


def widened(graph: Graph, node: Node) -> Node:
    """The wrong dtype."""
    wide = {torch.complex64: torch.complex128, torch.float32: torch.float64, torch.int64: torch.int32}
    return emit(graph, node, aten.to.dtype, node, wide[node.meta["val"].dtype])


def swapped(graph: Graph, node: Node) -> Node:
    """Batch and sequence swapped: the same elements, read in the other order."""
    turned = emit(graph, node, aten.transpose.int, node, 0, 1)
    flat = emit(graph, turned, aten.reshape.default, turned, [-1])
    return emit(graph, flat, aten.view_as.default, flat, node)


def sample_zero(graph: Graph, node: Node) -> Node:
    """Every sample gets the first sample's values."""
    first = emit(graph, node, aten.slice.Tensor, node, 0, 0, 1)
    return emit(graph, first, aten.expand_as.default, first, node)


# -- where a transform is put -----------------------------------------------------------------------------------


def at_input(lifted: bl.LiftedProgram, name: str, transform: Transform) -> bl.LiftedProgram:
    """Behind the batch-broadcast node of a lifted input: all its reads."""
    graph = lifted.program.graph
    (spread,) = [u for u in node_of(lifted, name).users if u.target is aten.expand.default]
    users = list(spread.users)
    changed = transform(graph, spread)
    for user in users:
        user.replace_input_with(spread, changed)
    lifted.program.graph_module.recompile()
    return lifted


def at_read(lifted: bl.LiftedProgram, edge: FrontierEdge, transform: Transform) -> bl.LiftedProgram:
    """At one operand of one op."""
    consumer = node_of(lifted, edge.consumer)
    operand = schema_args(consumer)[edge.path]
    changed = transform(lifted.program.graph, operand)
    consumer.args, consumer.kwargs = replace_operands(consumer, {edge.path: changed})
    lifted.program.graph_module.recompile()
    return lifted


def unlift(program: Any, lifted: bl.LiftedProgram, edges: list[FrontierEdge]) -> bl.LiftedProgram:
    """Some reads as they were: the original's chain in front of them."""
    original = {node.name: node for node in normalize(program).graph.nodes}
    graph = lifted.program.graph
    present = {node.name: node for node in graph.nodes}
    copied: dict[Node, Node] = {}

    def copy(node: Node, before: Node) -> Node:
        if node.op == "placeholder":
            return present[node.name]
        if node not in copied:
            operands = {n: copy(n, before) for n in node.all_input_nodes}
            with graph.inserting_before(before):
                copied[node] = graph.node_copy(node, lambda n: operands[n])
        return copied[node]

    for edge in edges:
        consumer = present[edge.consumer]
        first = min((present[e.consumer] for e in edges), key=lambda n: list(graph.nodes).index(n))
        old = copy(original[edge.value], first)
        consumer.args, consumer.kwargs = replace_operands(consumer, {edge.path: old})
    lifted.program.graph_module.recompile()
    return lifted


def swap_inputs(lifted: bl.LiftedProgram, one: str, other: str) -> bl.LiftedProgram:
    """Two lifted inputs in each other's place."""
    nodes = [node_of(lifted, name) for name in (one, other)]
    spreads = [next(u for u in node.users if u.target is aten.expand.default) for node in nodes]
    args = [spread.args for spread in spreads]
    spreads[0].args = (nodes[1], *args[0][1:])
    spreads[1].args = (nodes[0], *args[1][1:])
    lifted.program.graph_module.recompile()
    return lifted


def retarget(lifted: bl.LiftedProgram, old: Any, new: Any) -> str:
    """The first call of one op becomes another op; returns its name."""
    node = next(node for node in lifted.program.graph.nodes if node.target is old)
    node.target = new
    lifted.program.graph_module.recompile()
    return str(node.name)


def swap_operands(lifted: bl.LiftedProgram, target: Any) -> bl.LiftedProgram:
    """The operands of the first call of an op, the other way round: rows for columns."""
    node = next(node for node in lifted.program.graph.nodes if node.target is target)
    node.args = (node.args[1], node.args[0])
    lifted.program.graph_module.recompile()
    return lifted


def detach_parameter(lifted: bl.LiftedProgram, placeholder: str) -> bl.LiftedProgram:
    """A learned table that gets no gradient any more."""
    node = node_of(lifted, placeholder)
    users = list(node.users)
    last = [n for n in lifted.program.graph.nodes if n.op == "placeholder"][-1]
    with lifted.program.graph.inserting_after(last):
        detached = lifted.program.graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, detached)
    lifted.program.graph_module.recompile()
    return lifted


def keep_causal(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    """Attention of the last layer stays causal by flag."""
    node = [n for n in lifted.program.graph.nodes if n.target is aten.scaled_dot_product_attention.default][-1]
    set_arguments(node, {"attn_mask": None, "is_causal": True})
    lifted.program.graph_module.recompile()
    return lifted


# -- faults of the feed -----------------------------------------------------------------------------------------


class MutantStreams(Streams):
    """Streams whose order was changed after validation."""

    def __init__(self, base: Streams, order: torch.Tensor | None, rank: int | None = None) -> None:
        self.__dict__.update(base.__dict__)
        self.order = order
        if rank is not None:
            self.rank = rank


class MutantFeed(FeedProgram):
    """A feed program that is given other streams, or whose result is changed."""

    change: Callable[[Streams], Streams] = staticmethod(lambda streams: streams)
    exchange: Callable[[dict[str, Streams]], dict[str, Streams]] = staticmethod(lambda streams: streams)
    after: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = staticmethod(lambda feed: feed)

    def feed(self, batch_size, lengths, inputs, streams, device, names=None):  # type: ignore[no-untyped-def]
        """As the base, with the fault."""
        changed = self.exchange({axis: self.change(own) for axis, own in streams.items()})
        return self.after(super().feed(batch_size, lengths, inputs, changed, device, names))


def with_feed(
    lifted: bl.LiftedProgram, change: Any = None, after: Any = None, exchange: Any = None, **fields: Any
) -> bl.LiftedProgram:
    """The lifted program with a faulty feed."""
    base = lifted.feed_program
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.init}
    faults = {"change": change, "after": after, "exchange": exchange}
    # of the class, not of the object: dataclasses.replace() makes a new object
    faulty = type("FaultyFeed", (MutantFeed,), {name: staticmethod(fault) for name, fault in faults.items() if fault})
    return dataclasses.replace(lifted, feed_program=faulty(**{**values, **fields}))


def order_fault(make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Streams], Streams]:
    """A fault that makes another order of the order."""
    return lambda s: s if s.order is None else MutantStreams(s, make(s.order))


def with_streams(lifted: bl.LiftedProgram, role: str | None, stream: str) -> bl.LiftedProgram:
    """Lifted inputs on the wrong stream."""
    outputs = tuple(
        dataclasses.replace(out, input=dataclasses.replace(out.input, stream=stream))
        if role in (None, out.input.role)
        else out
        for out in lifted.feed_program.outputs
    )
    return with_feed(lifted, outputs=outputs)


def with_roles(lifted: bl.LiftedProgram, old: str, new: str) -> bl.LiftedProgram:
    """Lifted inputs in the wrong role."""
    outputs = tuple(
        dataclasses.replace(out, input=dataclasses.replace(out.input, role=new)) if out.input.role == old else out
        for out in lifted.feed_program.outputs
    )
    return with_feed(lifted, outputs=outputs)


def stale_state(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    """Tables from before the model was initialised: another base frequency."""
    return with_feed(lifted, state={fqn: value.roll(1, 0) for fqn, value in lifted.feed_program.state.items()})


def ignoring_positions(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    """Position ids that the user gave are dropped."""

    def change(streams: Streams) -> Streams:
        mutant = MutantStreams(streams, streams.order)
        mutant.positions = None
        return mutant

    return with_feed(lifted, change)
