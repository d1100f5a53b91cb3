"""Lifts a graph of forward and backward, or any plain graph: :func:`lift_graph`, a pass for other compilers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.collecting import uncollected
from buffer_lifting.errors import LiftingError
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.joint_program import JointProgram, joint_program
from buffer_lifting.lifted_graph import META, LiftedGraph, gm_inputs
from buffer_lifting.lifting import check_report, feed_program
from buffer_lifting.passes.follow_slots import AttentionState, FollowSlots
from buffer_lifting.passes.lift_buffers import LiftBuffers, LiftState
from buffer_lifting.passes.lower_composites import lower_composites
from buffer_lifting.passes.normalize import Normalized, normalize
from buffer_lifting.program import Axes, LiftedInput
from buffer_lifting.scanner import FormOption, scan_record
from buffer_lifting.tables import TableSource
from buffer_lifting.torch_compat import (
    codegen_with,
    gradient_descriptor,
    input_descriptors,
    outside_of_modes,
    tree_flatten,
    tree_unflatten,
)

_TAG = "partitioner_tag"  # where torch's partitioners read whether a node is forward or backward


@uncollected
def lift_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    axes: Axes | None = None,
    form: FormOption = "auto",
    strict: bool = True,
    follow_slots: bool = True,
    state: TableSource | None = None,
    state_fqns: Sequence[str] | Mapping[str, str] | None = None,
) -> GraphModule:
    """Lifts every read by sequence position of a graph, backward included, to new placeholders.

    A graph pass ``(gm, example_inputs, *, ...) -> gm``. It takes the joint graph of
    ``aot_export_joint_with_descriptors``, a train step that was traced with ``make_fx``, and plain graphs with state by
    ``get_attr``. What a placeholder holds is known by its descriptor (``meta["desc"]``); without descriptors by
    ``state_fqns``; any other placeholder is a user input, and ``tangents_*`` are gradients of results.

    The lifted inputs are placeholders behind the last one that is no tangent, ``[batch, seq, *row]``, in the order of
    ``LiftedGraph.inputs``. Each has ``meta["val"]``, and ``meta["desc"]`` and ``meta["partitioner_tag"]`` where the
    others have them: further plain inputs of the forward, whose gradients, further results at the end, are ``None``.

    Args:
        gm: a functional graph of ATen ops whose nodes have fake tensors in ``meta["val"]``. It is not modified.
        example_inputs: one for each placeholder, flat or nested as ``gm`` is called; those of buffers are their values,
            others only say sizes. ``None``: what is in ``meta["val"]``.
        axes: as in :func:`buffer_lifting.scan`, by placeholder name; tangents run along the axes of their results.
        form: as in :func:`buffer_lifting.lift`.
        strict: as in :func:`buffer_lifting.lift`.
        follow_slots: whether attention with ``is_causal=True`` gets a mask over the lifted slots, in the forward and
            in its backward. Without it the flags stay, and the order of the sequence has to.
        state: the values of buffers, and which FQNs are parameters: the model, or a mapping from FQN to tensor. Buffers
            without values can be given later (``bind_tables``).
        state_fqns: FQNs of the first placeholders, or of placeholders by name, where descriptors do not tell.

    Returns:
        A new graph module. ``gm.meta["buffer_lifting"]`` is its :class:`LiftedGraph`, which makes the lifted inputs
        (``feed``), puts them in their places (``arguments``) and compares it with the original (``verify``).

    Raises:
        AxesError: no user input has a sequence axis, or the axes are ambiguous.
        UnsupportedReadError: ``strict`` and something cannot be lifted; the message names node, source and line.
        LiftingError: a graph that was lifted already, or is called in a way that has no place for further inputs.
        TypeError: no graph module, or one whose nodes have no fake tensors.
    """
    if not isinstance(gm, GraphModule):
        raise TypeError(f"lift_graph takes a torch.fx.GraphModule, not {type(gm).__name__}")
    if META in gm.meta:
        raise LiftingError("the graph was lifted already")
    examples = None if example_inputs is None else tree_flatten(example_inputs)[0]
    count = len(gm_inputs(gm))
    if examples is not None and len(examples) != count:
        raise TypeError(f"example_inputs has {len(examples)} values, the graph has {count} placeholders")
    with outside_of_modes():
        return _lift(gm, examples, axes, form, strict, follow_slots, _by_fqn(state), state_fqns)


def _lift(
    gm: GraphModule,
    examples: Sequence[Any] | None,
    axes: Axes | None,
    form: FormOption,
    strict: bool,
    follow_slots: bool,
    state: Mapping[str, torch.Tensor],
    state_fqns: Sequence[str] | Mapping[str, str] | None,
) -> GraphModule:
    joint = joint_program(gm, examples, state, state_fqns)
    normalized = normalize(joint.program)
    record = build_record(joint.program, normalized.graph)
    record.joint = joint.joint
    known = {node.name for node in normalized.graph.nodes}
    plan = scan_record(record, axes, form)
    check_report(plan.report, strict)
    feed = feed_program(joint.program, normalized, record, plan, axes)
    LiftBuffers()(LiftState(normalized.graph, plan, normalized.submodules))
    if follow_slots:
        attention = AttentionState(normalized.graph, plan, feed.outputs)
        FollowSlots()(attention)
        feed = replace(feed, outputs=(*feed.outputs, *attention.added))
    lower_composites(normalized.graph, known)
    inputs = tuple(output.input for output in feed.outputs)
    result = _rebuilt(gm, joint, normalized, inputs)
    result.meta[META] = LiftedGraph.of(gm, result, joint, plan, feed, follow_slots)
    return result


def _by_fqn(state: TableSource | None) -> dict[str, torch.Tensor]:
    if state is None:
        return {}
    if isinstance(state, torch.nn.Module):
        named = [*state.named_parameters(remove_duplicate=False), *state.named_buffers(remove_duplicate=False)]
        return dict(named)
    return {fqn: value for fqn, value in state.items() if isinstance(value, torch.Tensor)}


def _rebuilt(gm: GraphModule, joint: JointProgram, edited: Normalized, inputs: Sequence[LiftedInput]) -> GraphModule:
    """The graph module of an edited graph, called as the original, with its state where it was.

    Raises:
        LiftingError: the original is called in a way that has no place for further inputs.
    """
    names = [item.name for item in inputs]
    output = gm.graph.output_node()
    results, spec = tree_flatten(output.args[0])
    descriptors = output.meta.get("desc")
    gradients = len(names) if joint.tangents and len(results) > len(gm_inputs(gm)) - len(joint.tangents) else 0
    new = Graph()
    by_name = {node.name: node for node in edited.graph.nodes}
    env: dict[Node, Node] = {}
    own = [node.name for node in gm_inputs(gm)]
    place = max((index + 1 for index, name in enumerate(own) if name not in joint.tangents), default=0)
    for name in (*own[:place], *names, *own[place:]):
        env[by_name[name]] = copy_node(new, by_name[name], lambda n: env[n])
        env[by_name[name]].name = name
    for name, target in joint.attributes.items():
        made = new.get_attr(target)
        made.name, made.meta = name, dict(by_name[name].meta)
        env[by_name[name]] = made
    for node in edited.graph.nodes:
        if node.op not in ("placeholder", "output"):
            env[node] = copy_node(new, node, lambda n: env[n])
            env[node].name = node.name
    kept = iter(edited.graph.output_node().args[0])  # type: ignore[arg-type]
    flat = [env[next(kept)] if isinstance(item, Node) else item for item in results]
    whole: Any = tree_unflatten(flat, spec)
    if gradients:
        whole = type(whole)([*whole, *[None] * gradients])
    made = new.output(whole)
    made.meta = dict(output.meta)
    codegen = codegen_with(gm.graph, names, len(joint.tangents), gradients)
    if codegen is None:
        raise LiftingError(
            "the graph is called with nested inputs that have no place for the lifted ones; give one with flat inputs"
        )
    new.set_codegen(codegen)
    lifted = [node for node in new.nodes if node.op == "placeholder" and node.name in set(names)]
    _describe(new, lifted, descriptors, gradients)
    root: Any = gm
    return _module(root, new, edited)


def _module(root: GraphModule, graph: Graph, edited: Normalized) -> GraphModule:
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            target = str(node.target)
            held[target] = edited.submodules[target] if target in edited.submodules else _attribute(root, target)
    result = GraphModule(held if held else torch.nn.Module(), graph, class_name=type(root).__name__)
    result.meta.update(root.meta)
    kept = set(root.state_dict())
    for fqn, value in list(result.named_buffers(remove_duplicate=False)):
        if fqn not in kept:
            path, _, leaf = fqn.rpartition(".")
            result.get_submodule(path).register_buffer(leaf, value, persistent=False)
    return result.train(root.training)


def _attribute(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root


def _describe(graph: Graph, lifted: Sequence[Node], results: Sequence[Any] | None, gradients: int) -> None:
    """Descriptors and partitioner tags for what is new, where the rest of the graph has them."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    present = [node.meta["desc"] for node in placeholders if "desc" in node.meta]
    if present:
        made = input_descriptors(present, len(lifted))
        for node, descriptor in zip(lifted, made, strict=True):
            node.meta["desc"] = descriptor
        if gradients and results is not None:
            new = [gradient_descriptor(descriptor) for descriptor in made]
            graph.output_node().meta["desc"] = [*results, *new]
    if not any(_TAG in node.meta for node in graph.nodes):
        return
    backward: set[Node] = set()
    for node in graph.nodes:
        if _TAG not in node.meta and node.op != "output":
            late = any(operand in backward for operand in node.all_input_nodes)
            node.meta[_TAG] = "is_backward" if late else "is_forward"
        if node.meta.get(_TAG) == "is_backward" or (
            node.op == "placeholder" and str(node.target).startswith("tangents")
        ):
            backward.add(node)
