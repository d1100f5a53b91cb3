"""A graph of forward and backward as a program that analysis takes: what each placeholder is, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from buffer_lifting.graph.bodies import attribute_of
from buffer_lifting.graph.copies import copy_node
from buffer_lifting.graph.record import Joint
from buffer_lifting.joint_rules import has_backward_ops
from buffer_lifting.torch_compat import (
    described,
    fake_mode_of,
    gradient_of,
    input_spec,
    is_fake,
    program_from_graph_module,
    same_result,
    tree_flatten,
)

#: What placeholders hold: their values, by FQN.
State = Mapping[str, torch.Tensor]
_KINDS = {
    "parameter": InputKind.PARAMETER,
    "buffer": InputKind.BUFFER,
    "constant": InputKind.CONSTANT_TENSOR,
}


@dataclass
class JointProgram:
    """The program that stands for a graph.

    Attributes:
        program: its placeholders are those of the graph, and one for each tensor that the graph has by ``get_attr``.
        attributes: placeholder of the program -> the attribute of the module.
        tangents: names of the placeholders that are gradients of results, in order.
        joint: what is known of the backward pass.
    """

    program: ExportedProgram
    attributes: dict[str, str] = field(default_factory=dict)
    tangents: tuple[str, ...] = ()
    joint: Joint = field(default_factory=Joint)


def joint_program(
    module: GraphModule,
    examples: Sequence[Any] | None,
    state: State,
    fqns: Sequence[str] | Mapping[str, str] | None,
) -> JointProgram:
    """The program of a graph.

    What a placeholder is: by ``fqns``, those of the first placeholders or by name, of which ``state`` tells parameters
    from buffers; else by its descriptor (``meta["desc"]``); ``tangents_*`` are gradients of results. Any other is a
    user input.

    Raises:
        TypeError: nodes without ``meta["val"]``, or FQNs of placeholders that the graph does not have.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    kinds = _kinds(placeholders, state, fqns or ())
    values = [node.meta.get("val") for node in module.graph.nodes]
    fake = next((value for value in values if isinstance(value, torch.Tensor) and is_fake(value)), None)
    if fake is None:
        raise TypeError("the graph's nodes have no fake tensors in meta['val']; trace it with fake tensors")
    if any(not isinstance(node.meta.get("val"), torch.Tensor | torch.SymInt | int | float) for node in placeholders):
        lacking = next(n for n in placeholders if not isinstance(n.meta.get("val"), torch.Tensor | torch.SymInt | int))
        raise TypeError(f"placeholder {lacking.name!r} has no meta['val']: a tensor or a number")
    build = _Builder(module, fake)
    for node, example in zip(placeholders, examples or [None] * len(placeholders), strict=True):
        build.placeholder(node, *kinds[node], example, state)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            build.attribute(node)
    return build.finish(placeholders, [n for n in placeholders if kinds[n][0] == "tangent"])


def _kinds(
    placeholders: Sequence[Node], state: State, fqns: Sequence[str] | Mapping[str, str]
) -> dict[Node, tuple[str, str]]:
    names = [node.name for node in placeholders]
    given = dict(fqns) if isinstance(fqns, Mapping) else dict(zip(names, fqns, strict=False))
    unknown = sorted(set(given) - set(names))
    if unknown or len(given) < len(fqns):
        raise TypeError(
            f"state_fqns= names {unknown or len(fqns)} placeholders, the graph has {len(names)}: {names[:9]}"
        )
    kinds = {}
    for node in placeholders:
        kind, fqn = described(node.meta.get("desc"))
        if node.name in given:
            fqn = given[node.name]
            kind = "parameter" if isinstance(state.get(fqn), torch.nn.Parameter) else "buffer"
        elif not kind:
            kind = "tangent" if node.name.startswith("tangents_") else "input"
        kinds[node] = (kind, fqn)
    return kinds


class _Builder:
    def __init__(self, module: GraphModule, fake: torch.Tensor) -> None:
        self.module, self.fake = module, fake
        self.graph = Graph()
        self.env: dict[Node, Any] = {}
        self.specs: list[InputSpec] = []
        self.store: dict[str, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.attributes: dict[str, str] = {}
        self.by_target: dict[str, Node] = {}
        self.examples: list[Any] = []

    def placeholder(self, node: Node, kind: str, fqn: str, example: Any, state: State) -> None:
        new = copy_node(self.graph, node, lambda n: self.env[n])
        new.name = node.name
        self.env[node] = new
        value = node.meta["val"]
        if kind in _KINDS:
            held = next((t for t in (state.get(fqn), example) if isinstance(t, torch.Tensor)), value)
            self._state(new, kind, fqn, held)
            return
        if not isinstance(value, torch.Tensor):
            self.specs.append(InputSpec(InputKind.USER_INPUT, SymIntArgument(name=new.name), None))
            return
        if kind == "input":
            self.examples.append(example)
        self.specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=new.name), None))

    def _state(self, node: Node, kind: str, fqn: str, value: torch.Tensor) -> None:
        keep = False if kind == "buffer" else None
        self.specs.append(InputSpec(_KINDS[kind], TensorArgument(name=node.name), fqn, persistent=keep))
        if kind == "parameter" and not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, value.is_floating_point() or value.is_complex())
        (self.store if kind == "parameter" else self.constants)[fqn] = value

    def attribute(self, node: Node) -> None:
        """State that the module has itself becomes a placeholder behind the others."""
        target = str(node.target)
        value = attribute_of(node, self.module)
        if not isinstance(value, torch.Tensor):
            return
        if target not in self.by_target:
            new = self.graph.placeholder(node.name)
            new.name = node.name
            own = node.meta.get("val")
            if not isinstance(own, torch.Tensor):
                own = fake_mode_of(self.fake).from_tensor(value, static_shapes=True)
            new.meta = {**node.meta, "val": own}
            parameter = isinstance(value, torch.nn.Parameter)
            held = target in dict(self.module.named_buffers(remove_duplicate=False))
            self._state(new, "parameter" if parameter else "buffer" if held else "constant", target, value)
            self.attributes[new.name] = target
            self.by_target[target] = new
        self.env[node] = self.by_target[target]

    def finish(self, placeholders: Sequence[Node], tangents: Sequence[Node]) -> JointProgram:
        bodies: dict[str, Any] = {}
        ops: set[str] = set()
        for node in self.module.graph.nodes:
            if node in self.env or node.op == "output" or (node.op == "call_module" and node.target == "_guards_fn"):
                continue
            self.env[node] = copy_node(self.graph, node, lambda n: self.env[n])
            self.env[node].name = node.name
            if node.op == "get_attr":
                bodies[str(node.target)] = attribute_of(node, self.module)
            ops.add(str(node.target).rpartition(".")[0])
        output = self.module.graph.output_node()
        results = tree_flatten(output.args[0])[0]
        kept = [item for item in results if isinstance(item, Node)]
        self.graph.output(tuple(self.env[node] for node in kept))
        out_spec = tree_flatten(tuple(kept))[1]
        inputs = [spec for spec in self.specs if spec.kind is InputKind.USER_INPUT]
        signature = ExportGraphSignature(
            self.specs,
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=self.env[n].name), None) for n in kept],
        )
        program = program_from_graph_module(
            bodies,
            self.graph,
            signature,
            self.store,
            self.constants,
            input_spec(tuple(0 for _ in inputs), {}),
            out_spec,
            [spec.arg.name for spec in inputs],
        )
        joint = self._joint(output, results, tangents, bool(tangents) or has_backward_ops(ops))
        return JointProgram(program, self.attributes, tuple(node.name for node in tangents), joint)

    def _joint(self, output: Node, results: Sequence[Any], tangents: Sequence[Node], backward: bool) -> Joint:
        descriptors = output.meta.get("desc") or [None] * len(results)
        gradients: dict[str, str] = {}
        found: dict[str, str] = dict.fromkeys((node.name for node in tangents), "")
        for item, descriptor in zip(results, descriptors, strict=True):
            if not isinstance(item, Node):
                continue
            whose = gradient_of(descriptor)
            if whose is not None:
                gradients[self.env[item].name] = whose
                continue
            for node in tangents:
                if same_result(node.meta.get("desc"), descriptor):
                    found[node.name] = self.env[item].name
        if not any(found.values()) and all(descriptor is None for descriptor in descriptors):
            self._by_place(results, tangents, found)
        return Joint(backward, found, gradients)

    def _by_place(self, results: Sequence[Any], tangents: Sequence[Node], found: dict[str, str]) -> None:
        """Without descriptors: torch gives the results that require gradients first, and their tangents in order."""
        free = [item for item in results if isinstance(item, Node) and isinstance(item.meta.get("val"), torch.Tensor)]
        for node in tangents:
            while free:
                item = free.pop(0)
                if item.meta["val"].shape == node.meta["val"].shape:
                    found[node.name] = self.env[item].name
                    break
