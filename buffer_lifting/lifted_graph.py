"""What :func:`buffer_lifting.lift_graph` leaves with a graph: how its lifted inputs are made, and that it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from buffer_lifting.axes import axes_of
from buffer_lifting.errors import FeedError, LiftingError
from buffer_lifting.feed import FeedProgram, Lengths
from buffer_lifting.joint_program import JointProgram
from buffer_lifting.labels import Labels, has_seq
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.plan import LiftPlan
from buffer_lifting.program import AxesInfo, InputAxes, LiftedInput, ScanReport, VerifyReport
from buffer_lifting.sharding import shard_inputs
from buffer_lifting.streams import parse_shard
from buffer_lifting.tables import TableSource
from buffer_lifting.torch_compat import captured_inputs, extend_capture, tree_flatten

#: Where a lifted graph module has its :class:`LiftedGraph` (``gm.meta``).
META = "buffer_lifting"


@dataclass
class LiftedGraph:
    """The lifted inputs of a graph, and how they are made.

    Attributes:
        inputs: the lifted inputs, in the order of their placeholders.
        report: what the scan of the original graph found, backward included.
        place: index of the first lifted placeholder among all of them.
        original: the graph module that was lifted, for :meth:`verify`.
        follows_slots: whether attention that is causal by flag follows the slots.
    """

    inputs: tuple[LiftedInput, ...]
    report: ScanReport
    place: int
    original: GraphModule = field(repr=False)
    follows_slots: bool = False
    _lifted: LiftedProgram = field(repr=False, kw_only=True)
    _labels: dict[str, Labels] = field(repr=False, kw_only=True)
    _tangents: tuple[str, ...] = field(default=(), repr=False)
    _gradients: dict[str, str] = field(default_factory=dict, repr=False)  # result -> whose gradient it is
    _tables: frozenset[str] = field(default=frozenset(), repr=False)  # parameters that are read by position

    @classmethod
    def of(
        cls,
        original: GraphModule,
        module: GraphModule,
        joint: JointProgram,
        plan: LiftPlan,
        feed: FeedProgram,
        follows_slots: bool,
    ) -> LiftedGraph:
        """Of the two graphs, the plan and the feed program."""
        names = [node.name for node in gm_inputs(module)]
        inputs = tuple(output.input for output in feed.outputs)
        own = {item.name for item in inputs}
        place = next((index for index, name in enumerate(names) if name in own), len(names))
        scattered = {item.node for item in plan.gradients}  # into the rows of a table
        labels = {name: known[0] for name, known in plan.data_labels.items() if known and name not in scattered}
        lifted = LiftedProgram(None, inputs, plan.report, feed)  # type: ignore[arg-type]
        return cls(
            inputs,
            plan.report,
            place,
            original,
            follows_slots,
            _lifted=lifted,
            _labels=labels,
            _tangents=joint.tangents,
            _gradients=dict(joint.joint.gradients),
            _tables=frozenset(fqn for read in plan.report.reads for fqn in (read.source, *read.aliases)),
        )

    @property
    def axes(self) -> AxesInfo:
        """The batch size and sequence lengths; ``None`` for those that are dynamic."""
        return self._lifted.axes

    @property
    def input_axes(self) -> dict[str, InputAxes]:
        """The axes of each user input and of each tangent whose dims are not folded, by placeholder name."""
        axes = dict(self._lifted.input_axes)
        for name in self._tangents:
            labels = self._labels.get(name, ())
            if any(has_seq(dim) for dim in labels) and all(len(dim) <= 1 for dim in labels):
                axes[name] = axes_of(name, labels)
        return axes

    def feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None = None,
        order: Any = None,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        shard: Any = (0, 1),
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors for the lifted placeholders, by name: :meth:`LiftedProgram.feed`, with its errors."""
        return self._lifted.feed(batch_size, seq_len, inputs, order, positions, shard, device)

    def shard_inputs(
        self, *, order: Any = None, shard: Any = (0, 1), **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """User inputs and tangents in the order of the shards, as :meth:`LiftedProgram.shard_inputs` does."""
        return shard_inputs(self.input_axes, inputs, order, parse_shard(shard))

    def bind_tables(self, source: TableSource) -> None:
        """Gives values to tables that have none: :meth:`LiftedProgram.bind_tables`."""
        self._lifted.bind_tables(source)

    def arguments(self, inputs: Sequence[Any], feed: Mapping[str, torch.Tensor]) -> list[Any]:
        """The flat inputs of the lifted graph: those of the original, with the lifted ones in their place.

        Tangents are brought into the memory layout that the graph was captured with, as torch's runtime does.

        Args:
            inputs: what the original is called with, flat or nested.
            feed: the result of :meth:`feed`.

        Raises:
            FeedError: a number of inputs that is not the original's, or a lifted input that ``feed`` does not have.
        """
        flat = list(tree_flatten(inputs)[0])
        count = len(gm_inputs(self.original))
        if len(flat) != count:
            raise FeedError(f"the graph has {count} inputs besides the lifted ones, {len(flat)} were given")
        missing = [item.name for item in self.inputs if item.name not in feed]
        if missing:
            raise FeedError(f"feed lacks {', '.join(map(repr, missing))}")
        for index, node in enumerate(gm_inputs(self.original)):
            if node.name in self._tangents:
                flat[index] = in_layout_of(flat[index], node.meta["val"])
        return [*flat[: self.place], *(feed[item.name] for item in self.inputs), *flat[self.place :]]

    def install(self, capture: Any, gm: GraphModule) -> None:
        """Makes the lifted graph that of the capture which the original came from, for compiling.

        ``aot_compile_joint_with_descriptors(capture)`` then returns a function whose last inputs, behind the user's,
        are the lifted ones. The original graph is not edited.

        Args:
            capture: the ``JointWithDescriptors`` of ``aot_export_joint_with_descriptors``; it is edited.
            gm: the lifted graph module, or what later passes made of it.

        Raises:
            LiftingError: the capture's graph is not the original, or inference alone was captured.
        """
        if capture.graph_module is not self.original or not self._tangents:
            raise LiftingError("install takes the capture of the joint graph that was lifted")
        own, primals = {item.name for item in self.inputs}, len(gm_inputs(self.original)) - len(self._tangents)
        if captured_inputs(capture) != primals or self.place != primals:
            raise LiftingError("install does not know captures with tensor subclasses, effects or lifted random states")
        lifted = [node for node in gm_inputs(gm) if node.name in own]
        values, names = [node.meta["val"] for node in lifted], [node.meta["desc"] for node in lifted]
        extend_capture(capture, gm, self.place, values, names)

    def verify(self, gm: GraphModule, inputs: Sequence[Any], seed: int = 0) -> VerifyReport:
        """Compares the lifted graph with the original: see :func:`buffer_lifting.joint_verify.verify_graph`."""
        from buffer_lifting.joint_verify import verify_graph

        return verify_graph(self, gm, inputs, seed)


def gm_inputs(gm: GraphModule) -> list[Node]:
    """The placeholders of a graph module."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def in_layout_of(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A tensor whose dims lie in memory in the order of ``example``'s, which may be fake."""
    strides = [int(stride) for stride in example.stride()]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(len(order))]
    return value.permute(order).contiguous().permute(back) if strides else value
