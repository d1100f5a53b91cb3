"""The public :func:`causal_flags`: masks that are provably plain causal become ``is_causal=True``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from buffer_lifting.adapter import as_program
from buffer_lifting.causal_domain import Unknown, Value, affine, as_dtype, steps, uniform
from buffer_lifting.causal_proof import MaskProof, prove_masks
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.graph.record import GraphRecord
from buffer_lifting.labels import DimLabel, Labels
from buffer_lifting.passes.assemble import assemble
from buffer_lifting.passes.base import GraphPass, PassResult, check_topology
from buffer_lifting.passes.lift_buffers import drop_dead
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.program import Axes
from buffer_lifting.scanner import scan_record
from buffer_lifting.tables import has_values
from buffer_lifting.torch_compat import schema_args, set_arguments

_MOST_STEPS = 4
_AXIS = "its queries and keys are not known to run along one sequence axis"


def causal_flags(
    program: ExportedProgram | GraphModule,
    documents: bool = True,
    axes: Axes | None = None,
    report: Callable[[MaskProof], object] | None = None,
) -> ExportedProgram:
    """Turns masks that are proven to be plain causal into ``is_causal=True``, which fused kernels take.

    Run it before :func:`buffer_lifting.lift`, and give :func:`buffer_lifting.verify` the program that it returns: it is
    no part of the lift, whose outputs are bitwise the original's, because another kernel rounds differently.

    A mask is converted if ``scaled_dot_product_attention`` has as many keys as queries, along one sequence axis, and
    each element is proven to be allowed (``True``, or 0 added) where ``column <= row`` and blocked elsewhere
    (``False``, ``-inf``, or the lowest number of a dtype with float32's range or more), for every batch size and
    length. What a mask is made of is followed through the graph: ``arange``, comparisons, logic, ``tril`` and ``triu``,
    fills, ``where`` and ``masked_fill``, sums and products of constants, slices, views and casts. A buffer or constant
    counts with the values that the program holds now. A mask that depends on a user input (padding) stays, and so
    does a window, even one that is wider than a static sequence.

    Args:
        program: as in :func:`buffer_lifting.scan`. It is not modified; parameters and buffers are shared.
        documents: whether packed documents may be fed later (``feed(positions=...)``). Masks of Hugging Face models
            compare document ids that they find in the position ids; with positions made in the graph there is one
            document, and the mask is plain causal for the program as it was exported, but not for documents that are
            fed. ``True`` leaves these masks; ``False`` converts them: do not feed documents then.
        axes: as in :func:`buffer_lifting.scan`.
        report: called with a :class:`MaskProof` for each attention that has a mask (``report=print``): its node,
            whether it was converted, and if not, why.

    Returns:
        The program with flags in place of masks; ``program`` itself if there is nothing to convert.

    Raises:
        AxesError: ``axes`` does not fit the program's inputs.
        TypeError: not a program.
    """
    program = as_program(program)
    normalized = normalize(program)
    record = build_record(program, normalized.graph)  # not the scan's, which takes sizes of one axis for equal
    proofs = prove_masks(record, _Tables(program), documents)
    proofs = _on_one_axis(proofs, program, normalized.graph, axes)
    for proof in proofs:
        if report is not None:
            report(proof)
    converted = frozenset(proof.node for proof in proofs if proof.causal)
    if not CausalFlags(converted)(normalized.graph).modified:
        return program
    return assemble(program, normalized.graph, normalized.submodules, (), None)


class CausalFlags(GraphPass[Graph]):
    """Takes the masks of the named attention nodes away and sets their flag."""

    name = "causal_flags"

    def __init__(self, nodes: frozenset[str]) -> None:
        self.nodes = nodes

    def requires(self, state: Graph) -> None:
        """The nodes are in the graph, and have masks."""
        masks = {node.name: schema_args(node)["attn_mask"] for node in state.nodes if node.name in self.nodes}
        assert masks.keys() == self.nodes and None not in masks.values()

    def call(self, state: Graph) -> PassResult[Graph]:
        """Sets arguments; what nothing reads any more is dropped."""
        for node in state.nodes:
            if node.name in self.nodes:
                set_arguments(node, {"attn_mask": None, "is_causal": True})
        if self.nodes:
            drop_dead(state)
        return PassResult(state, bool(self.nodes))

    def ensures(self, result: PassResult[Graph]) -> None:
        """The nodes are causal by flag alone."""
        check_topology(result.state)
        for node in result.state.nodes:
            if node.name in self.nodes:
                arguments = schema_args(node)
                assert arguments["attn_mask"] is None and arguments["is_causal"] is True


def _on_one_axis(proofs: list[MaskProof], program: ExportedProgram, graph: Graph, axes: Axes | None) -> list[MaskProof]:
    """The proofs, without those of attention between two axes (their lengths can be equal in a static export)."""
    if not any(proof.causal for proof in proofs):
        return proofs
    record = build_record(program, graph)
    labels = scan_record(record, axes).data_labels
    return [
        MaskProof(proof.node, False, _AXIS, proof.location)
        if proof.causal and not _same(record, labels, proof)
        else proof
        for proof in proofs
    ]


def _same(record: GraphRecord, labels: dict[str, tuple[Labels, ...] | None], proof: MaskProof) -> bool:
    refs = dict(record.nodes[proof.node].named_refs())
    axes = []
    for path in ("query", "key"):
        known = labels.get(refs[path])
        dim: DimLabel = known[0][-2] if known else ()
        if len(dim) != 1 or not dim[0].is_seq:
            return False
        axes.append(dim[0].axis)
    return axes[0] == axes[1]


class _Tables:
    """What is known of the elements of a program's buffers and constants, by FQN."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.known: dict[str, Value] = {}

    def __call__(self, fqn: str) -> Value:
        if fqn not in self.known:
            value = self.program.state_dict.get(fqn, self.program.constants.get(fqn))
            plain = type(value) in (torch.Tensor, torch.nn.Buffer) and value.layout == torch.strided
            if not plain or not has_values(value) or not value.numel():
                self.known[fqn] = Unknown(f"the values of {fqn!r} are not at hand")
            else:
                self.known[fqn] = _of_tensor(value.detach(), fqn)
        return self.known[fqn]


def _of_tensor(value: torch.Tensor, fqn: str) -> Value:
    """One number, positions (``start + step * index`` along the last dim), or a function of row less column."""
    unknown = Unknown(f"the values of {fqn!r} are no triangle")
    dtype = str(value.dtype).removeprefix("torch.")
    first = value.flatten()[:1]
    if bool((value == first).all()):
        number = as_dtype(first.item(), dtype)
        return unknown if number is None else uniform(number)
    while value.dim() > 1 and bool((value == value[:1]).all()):  # the same along the outer dims
        value = value[0]
    if value.dim() == 1:
        changes = value[1:] - value[:-1] if dtype in ("int64", "int32") else value[:0]
        if not changes.numel() or not bool((changes == changes[0]).all()):
            return unknown
        return affine(int(value[0]), {-1: int(changes[0])})
    if value.dim() != 2 or not bool((value[1:, 1:] == value[:-1, :-1]).all()):
        return unknown
    along = torch.cat([value[0].flip(0), value[1:, 0]])  # by distance, from 1 - columns to rows - 1
    starts = (along[1:] != along[:-1]).nonzero().flatten() + 1
    if len(starts) >= _MOST_STEPS:
        return unknown
    numbers = [as_dtype(along[int(place)].item(), dtype) for place in (0, *starts)]
    breaks = [int(place) - (value.shape[1] - 1) for place in starts]
    if any(number is None for number in numbers):
        return unknown
    return steps([number for number in numbers if number is not None], breaks, (-2, -1))
