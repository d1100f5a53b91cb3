"""Rewrites ``flex_attention``: bodies that look their indices up in lifted slots, and a block mask for any order.

The block mask becomes what torch uses where none is given: one block, larger than any sequence, that is never
skipped. ``mask_mod`` decides for every pair of query and key, so all blocks are computed.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.flex_plan import BodyPlan, FlexPlan
from buffer_lifting.graph.bodies import attribute_of, is_mod_index
from buffer_lifting.passes.emitter import Emitter
from buffer_lifting.plan import Replacement
from buffer_lifting.torch_compat import fake_mode_of

#: torch's size of the one block of an empty block mask.
WHOLE = 1 << 30
_BUFFERS = {"score_mod": 7, "mask_mod": 8}  # the places of the bodies' operands


def rewrite_flex(emitter: Emitter, plans: list[FlexPlan], submodules: MutableMapping[str, Any]) -> None:
    """Edits each planned node in place, and adds the new bodies to ``submodules``."""
    landed: dict[Any, Node] = {}
    blocks: tuple[Node, Node] | None = None
    for plan in plans:
        node = emitter.nodes[plan.node]
        args = list(node.args)
        names = {}
        for body in plan.bodies:
            operands = _operands(emitter, body, args[_BUFFERS[body.name]], landed)
            names[body.name] = _new_body(emitter, node, body, operands, submodules)
            args[_BUFFERS[body.name]] = tuple(operands)
        blocks = blocks or _whole_block(emitter, node)
        count, index = blocks
        args[3] = names["score_mod"]
        rest = (None, None, count, index, None, None, None, None, None, None, WHOLE, WHOLE)
        args[4] = (1, 1, count, index, *rest, names["mask_mod"])
        node.args = tuple(args)


def _operands(emitter: Emitter, body: BodyPlan, before: Any, landed: dict[Any, Node]) -> list[Any]:
    """The operands that are kept, and the added ones."""
    operands = [operand for name, operand in zip(body.buffers, before, strict=True) if name in body.kept]
    for added in body.added:
        key = (id(added.plan), added.value, added.alignment)
        if key not in landed:
            landed[key] = emitter.land(
                Replacement(body.body, "", added.value, added.plan, added.alignment),
            )
        operands.append(landed[key])
    return operands


def _new_body(
    emitter: Emitter, node: Node, body: BodyPlan, operands: list[Any], submodules: MutableMapping[str, Any]
) -> Node:
    """The node that names the body; a new one if the body changes."""
    old = emitter.nodes[body.body]
    if not body.added and not body.reads and body.kept == body.buffers:
        return old
    module = attribute_of(old)
    assert isinstance(module, GraphModule)
    new = _rewritten(module, body, [operand.meta["val"] for operand in operands[len(body.kept) :]])
    name = base = f"lifted_{body.name}"
    count = 0
    while name in submodules or name in emitter.nodes:
        count += 1
        name = f"{base}_{count}"
    submodules[name] = new
    with emitter.graph.inserting_before(node):
        reference = emitter.graph.get_attr(name)
    reference.meta = {**{key: value for key, value in old.meta.items() if key != "val"}, "body": new}
    return reference


def _rewritten(module: GraphModule, body: BodyPlan, fakes: list[torch.Tensor]) -> GraphModule:
    graph = Graph()
    old = {node.name: node for node in module.graph.nodes}
    env: dict[Node, Node] = {}
    own: dict[str, Node] = {}  # the placeholders as they are, and whatever does not come from them
    first: list[Node] = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in first:
        if node.name not in body.buffers or node.name in body.kept:
            env[node] = own[node.name] = graph.node_copy(node)
    added = []
    for number, fake in enumerate(fakes):
        placeholder = graph.placeholder(f"lifted_{number}")
        placeholder.meta["val"] = fake
        added.append(placeholder)
    for label, number in body.slots.items():
        index = body.indices[label]
        slots = graph.call_function(torch.ops.aten.index.Tensor, (added[number], [own[body.indices["b"]], own[index]]))
        slots.meta["val"] = _scalar(fakes[number])
        env[old[index]] = slots
    needed = _needed(module.graph, body, old)
    for node in module.graph.nodes:
        if node.op == "placeholder" or node not in needed:
            continue
        read = body.reads.get(node.name)
        if read is None:
            env[node] = graph.node_copy(node, lambda n: env[n])
            continue
        indices = [own[name] if as_given else env[old[name]] for name, as_given in read.indices]
        if read.operand is None and is_mod_index(node) and len(node.args) == 4 + len(indices):
            head = torch.fx.map_arg(node.args[:4], lambda n: env[n])
            env[node] = graph.call_function(node.target, (*head, *indices))
            env[node].meta = dict(node.meta)
            continue
        buffer = added[read.operand] if read.operand is not None else env[_base(node)]
        lead = [own[body.indices["b"]]] if read.lead else []
        env[node] = graph.call_function(torch.ops.aten.index.Tensor, (buffer, [*lead, *indices]))
        env[node].meta = dict(node.meta)
    return GraphModule(module, graph)


def _needed(graph: Graph, body: BodyPlan, old: dict[str, Node]) -> set[Node]:
    """What the output is computed from once the reads are redirected."""
    needed: set[Node] = set()
    stack = [graph.output_node()]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        read = body.reads.get(node.name)
        if read is None:
            stack.extend(node.all_input_nodes)
            continue
        stack.extend(old[name] for name, as_given in read.indices if not as_given)
        if read.operand is None and is_mod_index(node):
            stack.extend(operand for operand in node.args[:2] if isinstance(operand, Node))
    return needed


def _base(node: Node) -> Node:
    """The buffer that successive reads begin at."""
    while node.op != "placeholder":
        node = node.args[3] if is_mod_index(node) else node.args[0]  # type: ignore[assignment]
    return node


def _scalar(fake: torch.Tensor) -> torch.Tensor:
    with fake_mode_of(fake):
        return torch.empty((), dtype=fake.dtype, device=fake.device)


def _whole_block(emitter: Emitter, node: Node) -> tuple[Node, Node]:
    """``kv_num_blocks`` and ``kv_indices`` of the one block: ones ``[1, 1, 1]`` and zeros ``[1, 1, 1, 1]``, int32."""
    query = node.args[0].meta["val"]  # type: ignore[union-attr]
    made = []
    for target, shape in ((torch.ops.aten.ones.default, [1] * 3), (torch.ops.aten.zeros.default, [1] * 4)):
        with emitter.graph.inserting_before(node):
            block = emitter.graph.call_function(target, (shape,), {"dtype": torch.int32, "device": query.device})
        with fake_mode_of(query):
            block.meta = {"val": target(shape, dtype=torch.int32, device=query.device)}
        block.meta.update({key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta})
        made.append(block)
    return made[0], made[1]
