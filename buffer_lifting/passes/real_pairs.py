"""The public :func:`real_pairs`: complex numbers become pairs of real ones, for backends that want no others."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from buffer_lifting.adapter import as_program
from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.locations import innermost_location
from buffer_lifting.passes.assemble import assemble
from buffer_lifting.passes.base import GraphPass, PassResult, check_topology
from buffer_lifting.passes.fakes import same_layout
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.passes.pair_rules import NoPairs, PairEmitter, lower

_aten = torch.ops.aten


def real_pairs(program: ExportedProgram | GraphModule) -> ExportedProgram:
    """Writes complex arithmetic as arithmetic on real tensors with a last dim of 2: what ``torch.view_as_real`` shows.

    Run it before :func:`buffer_lifting.lift`, and give :func:`buffer_lifting.verify` the program that it returns: it is
    no part of the lift, whose outputs are bitwise the original's. A complex table (``freqs_cis``) is then lifted as its
    pairs, ``[batch, seq, *row, 2]``, and no stage has a complex number, unless the table stays in the stage
    (``form="positions"``), which reads it by ``view_as_real``.

    torch's Inductor runs complex ops one by one, by their eager kernels, and warns; pairs it fuses. Written out are
    products, sums, quotients by real numbers, ``polar``, ``complex``, conjugates, real and imaginary parts, and what
    moves elements (views, slices, gathers, ``cat``, ``stack``, casts). Inputs, parameters, buffers and outputs of the
    program keep their dtypes.

    Args:
        program: as in :func:`buffer_lifting.scan`. It is not modified; parameters and buffers are shared.

    Returns:
        The program on pairs; ``program`` itself if nothing in it is complex.

    Raises:
        LiftingError: another op on complex numbers; the message names the node and the line.
        TypeError: not a program.
    """
    program = as_program(program)
    if not any(_touches(node) for node in program.graph.nodes):
        return program
    normalized = normalize(program)
    if not RealPairs()(normalized.graph).modified:
        return program
    return assemble(program, normalized.graph, normalized.submodules, (), None)


class RealPairs(GraphPass[Graph]):
    """Rewrites a graph.

    Cases handled: the ops of :mod:`buffer_lifting.passes.pair_rules`; complex inputs and state, which are read by
    ``view_as_real``; complex outputs, which are made by ``view_as_complex``.
    Cases refused, before anything is erased: every other op with a complex operand or result, higher-order ops too.
    """

    name = "real_pairs"

    def requires(self, state: Graph) -> None:
        """Nodes have fake values."""
        assert all("val" in node.meta for node in state.nodes if node.op == "placeholder")

    def call(self, state: Graph) -> PassResult[Graph]:
        """Emits the pairs in front of what they replace, then drops that."""
        emitter = PairEmitter(state)
        replaced: list[Node] = []
        renamed: list[tuple[Node, str]] = []
        for node in list(state.nodes):
            if node.op == "placeholder" or not _touches(node):
                continue
            if node.op == "output":
                renamed += _restore(emitter, node)
                continue
            emitter.anchor = node
            replaced.append(node)
            try:
                new = lower(emitter, node)
            except NoPairs as error:
                raise LiftingError(_refusal(node, str(error))) from None
            if new is None:  # an assertion on what is no more
                continue
            if _is_complex(node):
                emitter.pairs[node] = new
                continue
            new = _as_before(emitter, node, new)
            if any(user.op == "output" for user in node.users) and new.name != node.name:
                new = emitter.call(_aten.alias.default, new)
                renamed.append((new, node.name))
            node.replace_all_uses_with(new)
        for node in reversed(replaced):
            state.erase_node(node)
        for node, name in renamed:
            node.name = name
        return PassResult(state, bool(replaced))

    def ensures(self, result: PassResult[Graph]) -> None:
        """What is complex is an input, or an output that is made of pairs."""
        check_topology(result.state)
        for node in result.state.nodes:
            if node.op == "call_function" and _touches(node):
                assert node.target in (_aten.view_as_real.default, _aten.view_as_complex.default), node.name


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _touches(node: Node) -> bool:
    """Whether a node reads or computes complex numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in values) or any(
        map(_is_complex, node.all_input_nodes)
    )


def _restore(emitter: PairEmitter, output: Node) -> list[tuple[Node, str]]:
    """Makes the complex outputs of their pairs; returns them with their names."""
    emitter.anchor = output
    made: dict[Node, Node] = {}

    def complex_again(node: Node) -> Node:
        if not _is_complex(node) or node.op == "placeholder":
            return node
        if node not in made:
            pair = emitter.call(_aten.contiguous.default, emitter.pair(node))
            made[node] = emitter.call(_aten.view_as_complex.default, pair)
        return made[node]

    output.args = map_arg(output.args, complex_again)
    return [(new, node.name) for node, new in made.items()]


def _as_before(emitter: PairEmitter, node: Node, new: Node) -> Node:
    """``new`` with the layout of ``node``, which the views behind it count on."""
    before, after = node.meta["val"], new.meta["val"]
    if not isinstance(before, torch.Tensor) or same_layout(before, after):
        return new
    new = emitter.call(_aten.contiguous.default, new)
    if not same_layout(before, new.meta["val"]):
        raise LiftingError(_refusal(node, "its strides would be others"))
    return new


def _refusal(node: Node, why: str) -> str:
    location = innermost_location(node.meta.get("stack_trace") or "")
    return (
        f"node {node.name!r} ({node.target}) cannot be written with pairs of real numbers: {why}"
        f"{f' [{location}]' if location else ''} -> write it with real tensors in the model, or leave it complex"
    )
