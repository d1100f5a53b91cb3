"""Seeded faults for every pattern class: a lifted program of the generator, changed so that an oracle has to object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import mutants as m
import torch
from torch.export import ExportedProgram

import buffer_lifting as bl

from .build import export_spec
from .handmade import PROGRAMS
from .singles import COMPUTED, GATHERED, PLAIN
from .spec import CONSTANT_OFFSET, REGIONS, Mask, Spec

LEARNED = replace(GATHERED, read="embedding", table="parameter")
#: One dynamic program for each pattern class; six tokens, so that shards of two and three ranks are compared too.
CLASSES: dict[str, Spec] = {
    "sliced buffer": Spec(rows=(PLAIN,)),
    "sliced constant": Spec(rows=(replace(PLAIN, table="attribute"),)),
    "sliced parameter": Spec(rows=(replace(PLAIN, table="parameter"),)),
    "narrowed buffer": Spec(rows=(replace(PLAIN, read="narrow", offset="constant"),)),
    "stacked tables": Spec(rows=(replace(PLAIN, read="select_slice"),)),
    "indexed buffer": Spec(rows=(GATHERED,)),
    "gathered buffer": Spec(rows=(replace(GATHERED, read="gather"),)),
    "learned table": Spec(rows=(LEARNED,)),
    "learned table with an offset": Spec(rows=(replace(LEARNED, offset="constant"),)),
    "position_ids buffer": Spec(rows=(replace(LEARNED, index="ids_buffer"),)),
    "cumsum of ones": Spec(rows=(replace(LEARNED, index="cumsum_ones"),)),
    "positions from user data": Spec(rows=(replace(LEARNED, index="padded"),)),
    "computed cos and sin": Spec(rows=(replace(COMPUTED, consumer="rope"),)),
    "complex rotations": Spec(rows=(replace(PLAIN, dtype="complex64", consumer="complex_rope"),)),
    "sequence first": Spec(rows=(replace(PLAIN, layout="seq_first"),)),
    "right-aligned": Spec(rows=(replace(PLAIN, offset="right"),)),
    "causal mask": Spec(mask=Mask("causal")),
    "window mask": Spec(mask=Mask("window")),
    "chunked mask": Spec(mask=Mask("chunked")),
    "tril": Spec(mask=Mask("tril")),
    "mask buffer": Spec(mask=Mask("square", wide=True, attention="masked_fill")),
    "relative bias": Spec(mask=Mask("bucket")),
    "causal with padding": Spec(mask=Mask("padding")),
    "full-length read": Spec(rows=(replace(PLAIN, read="full"),), dynamic=False),
    "shifted labels": Spec(loss="shifted_mean"),
    **{f"higher-order region {name}": Spec(rows=(replace(PLAIN, region=name),)) for name in REGIONS},
}
Mutate = Callable[[bl.LiftedProgram], bl.LiftedProgram]


def programs() -> dict[str, Callable[[], ExportedProgram]]:
    """Every class with faults of its feed and of its graph: random specs and hand-written programs."""
    drawn = {name: partial(_exported, spec) for name, spec in CLASSES.items()}
    return {**drawn, **PROGRAMS}


def _exported(spec: Spec) -> ExportedProgram:
    return export_spec(spec)[1]


def mutations(lifted: bl.LiftedProgram) -> Iterator[tuple[str, Mutate]]:
    """The faults that make sense for a lifted program: each takes a program of its own and returns a wrong one."""
    yield "natural order", lambda x: m.with_feed(x, m.order_fault(lambda o: None))
    yield "inverse order", lambda x: m.with_feed(x, m.order_fault(lambda o: o.argsort(1)))
    batched = all(item.batched for item in lifted.inputs)
    if batched:
        yield "order of the first sample", lambda x: m.with_feed(x, m.order_fault(lambda o: o[:1]))
    for item in lifted.inputs:
        yield f"{item.name} off by one row", _at(item.name, m.roll(1, int(item.batched)))
        yield f"{item.name} of the first token", _at(item.name, m.first_row if item.batched else _first_token)
    if lifted.feed_program.state:
        yield "table shifted by one row", _shifted
    if batched and any(item.stream == "positions" for item in lifted.inputs):
        yield "slots for positions", lambda x: m.with_streams(x, None, "slots")
    if batched and any(item.stream == "slots" for item in lifted.inputs):
        yield "positions for slots", lambda x: m.with_streams(x, None, "positions")
    keys = {item.name for item in lifted.inputs if item.role == "col"}
    if keys:
        yield "the shard's keys for all keys", lambda x: m.with_roles(x, "col", "row")
    for item in lifted.inputs:
        if f"{item.name}_keys" in keys:
            yield f"{item.name}: rows and columns swapped", _swapped(item.name)
    if any(_offsets(lifted)):
        yield "offset dropped", _without_offset


def _at(name: str, transform: m.Transform) -> Mutate:
    return lambda lifted: m.at_input(lifted, name, transform)


def _swapped(name: str) -> Mutate:
    return lambda lifted: m.swap_inputs(lifted, name, f"{name}_keys")


def _first_token(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """As ``mutants.first_row``, without a batch dim."""
    row = m.emit(graph, node, torch.ops.aten.slice.Tensor, node, 0, 0, 1)
    return m.emit(graph, row, torch.ops.aten.expand_as.default, row, node)


def _shifted(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    state = lifted.feed_program.state
    return m.with_feed(lifted, state={fqn: v.roll(1, max(range(v.ndim), key=v.size)) for fqn, v in state.items()})


def _offsets(lifted: bl.LiftedProgram) -> Iterator[torch.fx.Node]:
    """Additions of the constant offset that are left in the program."""
    for node in lifted.program.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and node.args[1] == CONSTANT_OFFSET:
            yield node


def _without_offset(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    for node in list(_offsets(lifted)):
        node.args = (node.args[0], 0)
    lifted.program.graph_module.recompile()
    return lifted


# -- faults that the values of the frontier do not show ----------------------------------------------------------


def compared(new: object) -> Mutate:
    """The comparison of a query with a key becomes another one."""

    def fault(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
        names = {node.target for node in lifted.program.graph.nodes}
        (old,) = names & {torch.ops.aten.le.Tensor, torch.ops.aten.ge.Tensor}
        m.retarget(lifted, old, new)
        return lifted

    return fault


def own_keys(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    """A rank of two takes its own keys for those of all ranks: the length of a shard, twice as many rows of it."""

    def after(feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: v[:, : v.shape[1] // 2] if name.endswith("_keys") else v for name, v in feed.items()}

    return m.with_feed(lifted, after=after)


def off_by_one_label(lifted: bl.LiftedProgram) -> bl.LiftedProgram:
    """Each token is compared with the label of the one before."""
    graph = lifted.program.graph
    (loss,) = (n for n in graph.nodes if n.target is torch.ops.aten.cross_entropy_loss.default)
    with graph.inserting_before(loss):
        rolled = graph.call_function(torch.ops.aten.roll.default, (loss.args[1], [1], [0]))
    rolled.meta = dict(loss.args[1].meta)
    loss.args = (loss.args[0], rolled, *loss.args[2:])
    lifted.program.graph_module.recompile()
    return lifted


CAUSAL: dict[str, Mutate] = {
    "stays causal by flag": m.keep_causal,
    "a query does not see itself": compared(torch.ops.aten.lt.Tensor),
    "the future for the past": compared(torch.ops.aten.gt.Tensor),
    "keys back to front": lambda x: m.at_input(x, "lifted_slots_keys", m.flip(1)),
}
