"""Splits a lifted program into pipeline stages.

An activation depends on user contents *and* a parameter (or is differentiable input): it is computed in one stage
and sent on. Everything else, position arithmetic, masks, sizes, is recomputed where it is read, from the stage's
own inputs. So stage boundaries carry activations alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch.fx import Node

from buffer_lifting.axes import label_inputs
from buffer_lifting.boundaries import BoundaryTensor, axis_names, describe
from buffer_lifting.collecting import uncollected
from buffer_lifting.cost import example_sizes, tensor_bytes
from buffer_lifting.cost_model import CostWeights, balanced_cuts
from buffer_lifting.cuts import cuts_at
from buffer_lifting.dataflow import activations_of
from buffer_lifting.errors import PartitionError
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord, NodeKind, Ref, StateKind, TensorMeta
from buffer_lifting.graph.record import Node as GraphNode
from buffer_lifting.labels import Labels
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.ops import ASSERTIONS, is_mutating
from buffer_lifting.passes.context_parallel import lifted_axes
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.passes.vmap import vmap_regions
from buffer_lifting.placement import Placement, placement_of
from buffer_lifting.routing import makes_rows
from buffer_lifting.scanner import scan_record
from buffer_lifting.stage_builder import StageBuilder
from buffer_lifting.stages import Stage, StagedProgram, check_names
from buffer_lifting.torch_compat import flat_names, root_spec


@uncollected
def partition(
    lifted: LiftedProgram,
    num_stages: int | None = None,
    split_points: Sequence[str] | None = None,
    *,
    schedule: Any = None,
    pp: int | None = None,
    weights: CostWeights | None = None,
) -> StagedProgram:
    """Splits a lifted program into pipeline stages.

    Args:
        lifted: the result of :func:`buffer_lifting.lift` or :func:`buffer_lifting.context_parallel`; it is not
            modified, and its stages share its parameters.
        num_stages: cut between layers, before the first and behind the last one so that FLOPs and parameter bytes are
            balanced: the smallest largest stage, and the fewest bytes sent among equals; or
        split_points: the FQN of the first module of each next stage.
        schedule: the schedule of ``torch.distributed.pipelining`` that the stages are for (its name or class). Where it
            puts several stages on a rank, ``num_stages`` counts them all and what is balanced is each rank's sum.
        pp: pipeline ranks, where ``schedule`` does not tell (see :func:`buffer_lifting.stage_ranks`).
        weights: what counts how much in the cost of a stage.

    Raises:
        PartitionError: neither or both of the two; a split point that does not exist, is out of order or computes
            position values only; more stages than layers; a graph that writes to a buffer, or in place to a value
            of another stage; an input name that a schedule keeps for itself; stages that do not lie on the ranks of
            ``schedule``.
        TypeError: ``lifted`` is no LiftedProgram.
    """
    if not isinstance(lifted, LiftedProgram):
        raise TypeError(
            f"partition takes what buffer_lifting.lift returns, not {type(lifted).__name__}; call lift(program) first"
        )
    if (num_stages is None) == (split_points is None):
        raise PartitionError("give either num_stages or split_points")
    if split_points is not None and weights is not None:
        raise PartitionError("weights balance num_stages; split_points say where stages begin")
    if schedule is None and pp is not None:
        raise PartitionError("pp is the number of ranks of a schedule: give schedule too")
    placement = None
    if schedule is not None:
        count = num_stages if num_stages is not None else len(split_points or ()) + 1
        placement = placement_of(schedule, count, pp)
    program = lifted.program
    if program.graph_signature.buffers_to_mutate:
        names = ", ".join(sorted(program.graph_signature.buffers_to_mutate.values()))
        raise PartitionError(f"the program writes to the buffers {names}; export the model without its cache")
    normalized = normalize(program, read_only=True)
    record = build_record(program, normalized.graph, recorded=lifted._recorded)
    written = sorted(node.fqn for node in record.nodes.values() if node.mutated)
    if written:
        raise PartitionError(
            f"the program writes to the buffers {', '.join(written)}; export the model without its cache"
        )
    nodes = {node.name: node for node in normalized.graph.nodes}
    if vmap_regions(normalized.graph):
        raise PartitionError(
            "the program has values computed under torch.vmap, which a stage cannot compute on its own; write them "
            "with broadcasting, or export after run_decompositions({})"
        )
    user = list(lifted.input_axes) or []
    check_names(lifted.input_axes, user)
    labels = label_inputs(record, lifted_axes(lifted))
    computed = _computed(record, labels.labels, lifted)
    activations = [
        node.name
        for node in record.nodes.values()
        if node.kind is NodeKind.OP and node.name in computed and node.base_op not in ASSERTIONS
    ]
    routed = _routed(record, lifted) if num_stages != 1 else frozenset()
    if split_points is not None:
        cuts = cuts_at(record, activations, split_points)
    else:
        assert num_stages is not None
        cuts = balanced_cuts(
            record, nodes, activations, num_stages, routed, weights, placement.ranks if placement else None
        )
    return _Partition(lifted, record, nodes, activations, cuts, axis_names(labels), routed).build(placement)


def _computed(record: GraphRecord, labels: dict[str, Labels], lifted: LiftedProgram) -> set[str]:
    """The activations; lifted inputs are positions, which every stage computes with itself.

    But for those that are the tokens of the model: user inputs that the graph has shifted, say, and that most of its
    parameters meet.
    """
    everything = frozenset(item.name for item in lifted.inputs)
    computed = activations_of(record, labels, everything)
    hoisted = {item.name for item in lifted.inputs if item.stream == "inputs"}
    if not hoisted:
        return computed
    of_tokens = activations_of(record, labels, everything - hoisted)
    weighted = [n.name for n in record.nodes.values() if n.kind is NodeKind.OP and _reads_parameter(record, n)]
    missed = [name for name in weighted if name in of_tokens and name not in computed]
    return of_tokens if 2 * len(missed) > len(weighted) else computed


def _reads_parameter(record: GraphRecord, node: GraphNode) -> bool:
    return any(record.nodes[name].state_kind is StateKind.PARAMETER for name in node.refs())


def _routed(record: GraphRecord, lifted: LiftedProgram) -> frozenset[str]:
    """The values inside the routing of tokens to experts. They keep their names, so the scan behind the lift knows."""
    if not any(makes_rows(record, node) for node in record.nodes.values()):
        return frozenset()
    return scan_record(record, lifted_axes(lifted)).routed if lifted._routed is None else lifted._routed


class _Partition:
    def __init__(
        self,
        lifted: LiftedProgram,
        record: GraphRecord,
        nodes: dict[str, Node],
        activations: list[str],
        cuts: list[int],
        axes: dict[str, str],
        routed: frozenset[str],
    ) -> None:
        self.lifted, self.record, self.nodes, self.axes, self.routed = lifted, record, nodes, axes, routed
        bounds = [0, *cuts, len(activations)]
        self.count = len(bounds) - 1
        self.owned = [activations[a:b] for a, b in pairwise(bounds)]
        self.stage_of = {name: index for index, names in enumerate(self.owned) for name in names}
        program = lifted.program
        self.in_spec, self.out_spec = root_spec(program)
        flat = flat_names(self.in_spec, [str(name) for name in program.graph_signature.user_inputs])
        if flat is None:
            raise PartitionError(
                "the program takes nested inputs (lists, dicts, a BlockMask); stages take plain tensors only: build a "
                "block mask in the model's forward"
            )
        self.positional, self.keywords = tuple(flat[0]), tuple(flat[1])
        self.state = {**program.constants, **program.state_dict}
        parameters = (n for n in record.nodes.values() if n.state_kind is StateKind.PARAMETER)
        self.aliases = {node.fqn: node.aliases for node in parameters}

    def build(self, placement: Placement | None) -> StagedProgram:
        output = next(node for node in self.record.nodes.values() if node.kind is NodeKind.OUTPUT)
        results = [arg.name for arg in output.args["results"] if isinstance(arg, Ref)]  # type: ignore[union-attr]
        if len(results) != len(output.args["results"]):  # type: ignore[arg-type]
            raise PartitionError("the program returns values that are no tensors; stages return tensors only")
        self._check_in_place()
        builders: list[StageBuilder] = []
        order = {name: place for place, name in enumerate(self.record.nodes)}
        carried: list[str] = []  # what the stage behind receives, walking from the last stage to the first
        for index in range(self.count - 1, -1, -1):
            last = index == self.count - 1
            sent = results if last else carried
            if not sent:
                raise PartitionError(f"nothing that stage {index} computes reaches stage {index + 1}")
            passing = [name for name in sent if self.stage_of.get(name, index) < index]
            builder = StageBuilder(
                self.record,
                self.nodes,
                self.stage_of,
                index,
                self.owned[index],
                passing,
                sent,
                self.positional if index == 0 else (),
                self.state,
                order,
            )
            builders.insert(0, builder)
            carried = builder.received
            self._check_routing(index, carried)
        stages = []
        for index, builder in enumerate(builders):
            last = index == self.count - 1
            built = builder.build(index == 0, last)
            parameters = tuple(fqn for fqn in built.states if fqn in self.aliases)
            stages.append(
                Stage(
                    index=index,
                    module=built.module,
                    activations=built.activations,
                    kwargs=built.kwargs,
                    outputs=built.outputs,
                    parameters=parameters,
                    boundary_bytes=0 if last else self._bytes(builder.sent),
                    tied=self._tied_names(parameters),
                    activation_shapes=self._shapes(built.activations),
                    output_shapes=self._shapes(built.outputs),
                )
            )
        user_keywords = tuple(name for name in self.keywords if name not in {i.name for i in self.lifted.inputs})
        return StagedProgram(
            stages=tuple(stages),
            lifted=self.lifted,
            in_spec=self.in_spec,
            out_spec=self.out_spec,
            positional=self.positional,
            keywords=user_keywords,
            tied=self._tied_stages(stages),
            placement=placement,
            sizes=example_sizes(self.record),
        )

    def _check_routing(self, index: int, received: list[str]) -> None:
        """No stage begins between the gather of tokens by expert and the way back: its rows are data's to count."""
        crossing = next((name for name in received if name in self.routed), None)
        if crossing is not None:
            raise PartitionError(
                f"stage {index} would begin inside the routing of tokens to experts: it needs {crossing!r}; split "
                "before or behind the module that routes"
            )

    def _check_in_place(self) -> None:
        for name, stage in self.stage_of.items():
            node = self.record.nodes[name]
            if not is_mutating(node):
                continue
            target = next((arg.name for arg in node.args.values() if isinstance(arg, Ref)), None)
            if target in self.stage_of and self.stage_of[target] != stage:
                raise PartitionError(
                    f"node {name!r} ({node.op}) writes in place to {target!r}, which stage "
                    f"{self.stage_of[target]} computes; "
                    "split elsewhere, or use the out-of-place op"
                )

    def _bytes(self, names: list[str]) -> int:
        metas = [self.record.nodes[name].meta for name in names]
        return sum(tensor_bytes(meta, self.record.hints) for meta in metas if isinstance(meta, TensorMeta))

    def _shapes(self, names: tuple[str, ...]) -> tuple[BoundaryTensor, ...]:
        return tuple(describe(self.record.nodes[name], self.axes) for name in names)

    def _tied_names(self, parameters: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        return tuple((fqn, *self.aliases[fqn]) for fqn in parameters if self.aliases[fqn])

    def _tied_stages(self, stages: list[Stage]) -> dict[str, tuple[int, ...]]:
        holders: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for stage in stages:
            for fqn in stage.parameters:
                holders[id(self.state[fqn])].append((fqn, stage.index))
        return {
            entries[0][0]: tuple(dict.fromkeys(index for _, index in entries))
            for entries in holders.values()
            if len({index for _, index in entries}) > 1
        }
