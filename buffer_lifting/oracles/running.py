"""Runs graphs for the oracles: whole programs with gradients, parts of them, and all of it in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Interpreter, Node

from buffer_lifting.errors import LiftingError
from buffer_lifting.examples import named_inputs
from buffer_lifting.feed_graph import FeedGraph, above
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.grouped import grouped_product
from buffer_lifting.passes.normalize import Normalized, normalize
from buffer_lifting.tables import has_values, lack_values
from buffer_lifting.torch_compat import schema_names, set_arguments, tree_flatten

_DOUBLE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


@dataclass
class Case:
    """One set of whole inputs in natural order."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    batch: int
    lengths: dict[str, int]

    @property
    def length(self) -> str:
        """The length for a person: of the one axis, or of each by name."""
        if len(self.lengths) < 2:
            return str(next(iter(self.lengths.values()), 1))
        return " ".join(f"{axis} {length}" for axis, length in self.lengths.items())

    def orders(self, generator: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
        """A random order of each axis, ``[rows, length]``."""
        return {
            axis: torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
            for axis, length in self.lengths.items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor inputs by name."""
        return {name: value for name, value in self.named.items() if isinstance(value, torch.Tensor)}


@dataclass
class Runnable:
    """A graph with its state, ready to be run on named user inputs."""

    graph: Graph
    module: GraphModule
    state: dict[str, torch.Tensor]  # placeholder -> tensor
    parameters: dict[str, str]  # placeholder -> FQN
    outputs: list[str] = field(default_factory=list)  # names of the output nodes
    frozen: bool = False  # the parameters require no gradients

    def run(
        self, values: Mapping[str, Any], capture: set[str] | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """Outputs, the parameters as fresh leaves by FQN, and the values of the captured nodes."""
        leaves = self.leaves()
        feed = {**self.state, **leaves, **values}
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        interpreter = _Capture(self.module, capture or set())
        result = interpreter.run(*[feed.get(name) for name in names])
        flat = [value for value in tree_flatten(result)[0]]
        return flat, {self.parameters[name]: leaf for name, leaf in leaves.items()}, interpreter.captured

    def leaves(self) -> dict[str, torch.Tensor]:
        """The parameters as fresh leaves, by placeholder."""
        return {
            n: self.state[n].detach().requires_grad_(self.state[n].is_floating_point() and not self.frozen)
            for n in self.parameters
        }


class _Capture(Interpreter):
    def __init__(self, module: GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.captured: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.captured[n.name] = value.detach() if isinstance(value, torch.Tensor) else value
        return value


def runnable(program: ExportedProgram, double: bool = False) -> Runnable:
    """A normalised copy of a program's graph with its state; in float64 if ``double``."""
    normalized: Normalized = normalize(program)
    if double:
        to_double(normalized.graph)
    store = {**program.constants, **program.state_dict}
    signature = program.graph_signature
    fqns = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    state = {name: store[fqn].detach() for name, fqn in fqns.items()}
    if double:
        state = {name: doubled(value) for name, value in state.items()}
    bodies = normalized.submodules if not double else {n: _double_body(b) for n, b in normalized.submodules.items()}
    module = GraphModule(dict(bodies), normalized.graph)
    output = normalized.graph.output_node().args[0]
    names = [item.name if isinstance(item, Node) else "" for item in tree_flatten(output)[0]]
    return Runnable(normalized.graph, module, state, dict(signature.inputs_to_parameters), names)


def nudged(original: Runnable, seed: int) -> Runnable:
    """The same program with each element of its floating parameters one unit in the last place up or down."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(original.state)
    for name in original.parameters:
        value = state[name]
        if value.is_floating_point():
            up = torch.rand(value.shape, generator=generator) < 0.5
            state[name] = torch.nextafter(value, torch.where(up, torch.inf, -torch.inf).to(value))
    return replace(original, state=state)


def doubled(value: Any) -> Any:
    """A floating or complex tensor in double precision; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in _DOUBLE:
        return value.to(_DOUBLE[value.dtype])
    return value


def to_double(graph: Graph) -> None:
    """Replaces the floating dtypes that a graph names by double precision, and drops checks of dtypes."""
    for node in list(graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        names = schema_names(node)
        if node.target is torch.ops.aten._grouped_mm.default:
            node.target = grouped_product
            continue
        if names & {"train", "dropout_p"} and "dropout" in f"{node.target}{sorted(names)}":
            set_arguments(
                node, {key: {"train": False, "dropout_p": 0.0}[key] for key in names & {"train", "dropout_p"}}
            )
        if any(isinstance(value, torch.dtype) for value in [*node.args, *node.kwargs.values()]):
            node.args = tuple(_DOUBLE.get(a, a) if isinstance(a, torch.dtype) else a for a in node.args)
            node.kwargs = {k: _DOUBLE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in node.kwargs.items()}
        elif _makes_floats(node):
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
        elif _promotes(node):  # attention reads a float32 mask beside float64 queries wrongly, without an error
            with graph.inserting_after(node):
                wide = graph.call_function(torch.ops.aten.to.dtype, (node, _DOUBLE[node.meta["val"].dtype]))
            wide.meta = dict(node.meta)
            node.replace_all_uses_with(wide, lambda user, wide=wide: user is not wide)


def _makes_floats(node: Node) -> bool:
    """Whether an op without tensor operands makes a tensor of the default floating dtype."""
    value = node.meta.get("val")
    names = schema_names(node)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return "dtype" in names and not tensors and isinstance(value, torch.Tensor) and value.dtype in _DOUBLE


def _promotes(node: Node) -> bool:
    """Whether an op makes floats of the default dtype out of booleans and integers (``where`` of two numbers)."""
    value = node.meta.get("val")
    operands = [v for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    floats = any(operand.is_floating_point() or operand.is_complex() for operand in operands)
    return bool(operands) and not floats and isinstance(value, torch.Tensor) and value.dtype in _DOUBLE


def _double_body(body: Any) -> Any:
    """A copy of the body of a higher-order op that computes in double precision."""
    if not isinstance(body, GraphModule):
        return body
    new = Graph()
    new.output(new.graph_copy(body.graph, {}))
    for before, after in zip(body.graph.nodes, new.nodes, strict=True):
        after.meta = dict(before.meta)
    to_double(new)
    return GraphModule(body, new)


def double_feed(lifted: LiftedProgram) -> LiftedProgram:
    """The same lifted program with a feed program that computes in double precision."""
    feed = lifted.feed_program

    def convert(graph: FeedGraph | None) -> FeedGraph | None:
        if graph is None:
            return None
        new = Graph()
        new.output(new.graph_copy(graph.module.graph, {}))
        for before, after in zip(graph.module.graph.nodes, new.nodes, strict=True):
            after.name, after.meta = before.name, dict(before.meta)
        to_double(new)
        module = GraphModule(torch.nn.Module(), new)
        module.meta.update(graph.module.meta)
        return replace(graph, module=module)

    program = replace(
        feed,
        state={fqn: doubled(value) for fqn, value in feed.state.items()},
        natural=convert(feed.natural),
        substituted=convert(feed.substituted),
        hoisted=convert(feed.hoisted),
    )
    return replace(lifted, feed_program=program)


def per_sample(lifted: LiftedProgram) -> bool:
    """Whether samples can have orders of their own: every input along the sequence has a batch dim."""
    along = [axes for axes in lifted.input_axes.values() if axes.seq_dims]
    return lifted.axes.has_batch and all(axes.batch_dim is not None for axes in along)


#: Casts of the first operand to the dtype of the second, whose contents do not matter: data of a shard that only
#: context_parallel can compute, for one.
_CASTS_LIKE = (torch.ops.aten.type_as.default, torch.ops.aten.to.other)


def _contents(node: Node) -> list[Node]:
    return node.all_input_nodes[:1] if node.target in _CASTS_LIKE else node.all_input_nodes


def evaluate(graph: Graph, values: Mapping[str, Any], targets: set[str]) -> dict[str, Any]:
    """The values of some nodes; only what they are computed from is run, and not a tensor that lends its dtype alone.

    Raises:
        KeyError: a placeholder that they need has no value.
    """
    nodes = {node.name: node for node in graph.nodes}
    needed = above(nodes, targets, values, _contents)
    env: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in needed:
                continue
            if node.name in values:
                env[node] = values[node.name]
            elif node.op == "placeholder":
                raise KeyError(node.name)
            elif node.target in _CASTS_LIKE:
                env[node] = env[node.args[0]].to(node.meta["val"].dtype)
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    return {name: env[nodes[name]] for name in targets}


def example_cases(program: ExportedProgram, lifted: LiftedProgram, inputs: Any, seed: int) -> list[Case]:
    """The inputs to verify on: those given, else the example inputs and, if dynamic, a resized copy of them.

    Raises:
        LiftingError: there are no inputs, or they have no data.
    """
    calls = [(tuple(args), dict(kwargs)) for args, kwargs in inputs] if inputs is not None else []
    if not calls:
        if program.example_inputs is None:
            raise LiftingError("the program has no example inputs; give verify(inputs=[(args, kwargs), ...])")
        calls = [program.example_inputs]
    cases = [_case(program, lifted, args, kwargs) for args, kwargs in calls]
    if any(not has_values(t) for case in cases for t in case.tensors().values()):
        raise LiftingError("the example inputs have no data; give verify(inputs=[(args, kwargs), ...])")
    missing = lack_values({**program.constants, **program.state_dict})
    if missing:
        raise LiftingError(
            f"the program has no values for {missing[0]!r} and {len(missing) - 1} more: it was exported on the meta "
            "device or with fake tensors; verify an export of a small configuration of the model"
        )
    if inputs is None:
        resized = _resized(program, lifted, cases[0], seed)
        if resized is not None:
            cases.append(resized)
    return cases


def _case(program: ExportedProgram, lifted: LiftedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
    from buffer_lifting.examples import sizes_of

    named = named_inputs(program, args, kwargs)
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    batch, lengths = sizes_of(tensors, lifted.input_axes)
    return Case(args, kwargs, named, batch, lengths)


def _resized(program: ExportedProgram, lifted: LiftedProgram, case: Case, seed: int) -> Case | None:
    """The example with another batch and length, where those are dynamic: its own values, drawn again."""
    axes = lifted.axes
    if axes.batch is not None and all(length is not None for length in axes.lengths.values()):
        return None
    batch = case.batch if axes.batch is not None or not axes.has_batch else max(2, case.batch - 1)
    lengths: dict[str, int] = {}
    for axis, length in case.lengths.items():
        fixed = axes.lengths.get(axis)
        # no power of two and not the table's full length: sizes at which models take another path
        bigger = min(length + 7, lifted.feed_program.longest(axis, length + 7) - 1)
        wanted = length if fixed is not None else (bigger if bigger > length else max(2, length - 2))
        if fixed is None and wanted in lengths.values() and wanted > 3:
            wanted -= 2  # axes of the same length in the example get different ones here
        lengths[axis] = wanted
    return _redrawn(case, lifted, batch, lengths, seed)


def resize_case(case: Case, lifted: LiftedProgram, ranks: int, seed: int) -> Case:
    """The case, or a copy of it whose sequences divide into ``ranks`` shards, as long or a little longer."""
    if all(length % ranks == 0 for length in case.lengths.values()):
        return case
    lengths = {}
    for axis, length in case.lengths.items():
        most = lifted.feed_program.longest(axis, length + ranks)
        wanted = -(-length // ranks) * ranks
        lengths[axis] = wanted if wanted <= most else most // ranks * ranks
    return _redrawn(case, lifted, case.batch, lengths, seed)


def _redrawn(case: Case, lifted: LiftedProgram, batch: int, lengths: dict[str, int], seed: int) -> Case:
    from buffer_lifting.torch_compat import tree_map

    generator = torch.Generator().manual_seed(seed)
    named = {name: resize(value, name, lifted, batch, lengths, generator) for name, value in case.named.items()}
    leaves = iter(named.values())
    args, kwargs = tree_map(lambda _: next(leaves), (case.args, case.kwargs))
    return Case(args, kwargs, named, batch, lengths)


def resize(
    value: Any,
    name: str,
    lifted: LiftedProgram,
    batch: int,
    lengths: dict[str, int],
    generator: torch.Generator,
) -> Any:
    """One input at another size. Masks keep their shape (padding stays at the end), other values are redrawn."""
    axes = lifted.input_axes.get(name)
    if not isinstance(value, torch.Tensor) or axes is None:
        return value
    mask = value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()) or len(axes.seq_dims) > 1
    wanted = {dim: lengths[axis] for dim, axis, _ in axes.seq_dims}
    if axes.batch_dim is not None:
        wanted[axes.batch_dim] = batch
    for dim, size in wanted.items():
        have = value.shape[dim]
        if mask or have == 1:
            index = torch.arange(size).clamp(max=have - 1)
        else:
            index = torch.randint(0, have, (size,), generator=generator)
        value = value.index_select(dim, index.to(value.device))
    return value
