"""Seeded faults for every pattern class: a lifted program of the generator, changed so that an oracle has to object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import mutants as m
import torch

import buffer_lifting as bl

from .singles import COMPUTED, GATHERED, PLAIN
from .spec import CONSTANT_OFFSET, Mask, Spec

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
}
Mutate = Callable[[bl.LiftedProgram], bl.LiftedProgram]


def mutations(lifted: bl.LiftedProgram, spec: Spec) -> Iterator[tuple[str, Mutate]]:
    """The faults that make sense for a lifted program: each takes a program of its own and returns a wrong one."""
    yield "natural order", lambda x: m.with_feed(x, m.order_fault(lambda o: None))
    yield "inverse order", lambda x: m.with_feed(x, m.order_fault(lambda o: o.argsort(1)))
    yield "order of the first sample", lambda x: m.with_feed(x, m.order_fault(lambda o: o[:1]))
    for item in lifted.inputs:
        yield f"{item.name} off by one row", _at(item.name, m.roll(1))
        yield f"{item.name} of the first token", _at(item.name, m.first_row)
    if lifted.feed_program.state:
        yield "table shifted by one row", _shifted
    if any(item.stream == "positions" for item in lifted.inputs):
        yield "slots for positions", lambda x: m.with_streams(x, None, "slots")
    if any(item.stream == "slots" for item in lifted.inputs):
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
