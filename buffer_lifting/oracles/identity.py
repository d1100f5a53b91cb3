"""Identity: in natural order the lifted program is bitwise the original, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph

from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.compare import difference, gradient_error, gradients, loss_weights, same_bits
from buffer_lifting.oracles.running import Case
from buffer_lifting.passes.context_parallel import user_axes
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.program import Check, PositionRead
from buffer_lifting.scanner import scan_record
from buffer_lifting.torch_compat import module_of, tree_flatten

TOLERANCE = 1e-5
#: A learned table that is gathered per sample gets its gradient by scatter-add, whose order of summation is not the
#: original's: these gradients, and no others, are compared relative to the precision of their dtype.
#: Of outputs and gradients where another kernel runs; equivariance then compares in float64.
LOOSE = 1e-4
#: Of a gradient where every output is bitwise the original's: autograd may sum a value's gradients in another order.
UNITS = 16
TABLE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check_identity(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case], seed: int) -> Check:
    """Both programs as modules, on each case; the random generator is set alike before each run."""
    loose = _why_not_bitwise(program, lifted)
    tables = table_names(lifted)
    # a gather of data sums its gradient by scattering, in an order that depends on the index's memory layout
    gathers = any(read.op.split(".")[1] in ("gather", "index", "index_select") for read in _lifted_reads(lifted))
    coarsest = coarsest_dtype(program)
    compared, worst, node, detail, bitwise = 0, 0.0, "", "", True
    rounded: set[str] = set()  # gradients that are the original's but for the last places
    original, changed = module_of(program), module_of(lifted.program)
    for case in cases:
        feed = lifted.feed(case.batch, case.lengths, inputs=case.tensors())
        left, left_grads, left_state = _run(original, case.args, case.kwargs, seed)
        right, right_grads, right_state = _run(changed, case.args, {**case.kwargs, **feed}, seed)
        for name in (left_state.keys() | right_state.keys()) - _caches(original, case, left_state, lifted):
            compared += 1
            a, b = left_state.get(name), right_state.get(name)
            if (a is None or b is None or not same_bits(a, b)) and not node:
                node, detail = name, f"the buffer is not written as in the original {_at(case)}"
        names = [str(name) for name in program.graph_signature.user_outputs]
        exact = all(same_bits(a, b) for a, b in zip(left, right, strict=True))
        largest = max((float(g.abs().max()) for g in left_grads.values() if g is not None and g.numel()), default=0.0)
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            compared += 1
            if same_bits(a, b):
                continue
            gap = difference(a, b)
            worst, bitwise = max(worst, gap), False
            close = loose and a.dtype == b.dtype and gap <= LOOSE * max(float(a.detach().abs().max()), 1.0)
            if not close and not node:
                node, detail = names[index], f"the output differs by {gap:.2e} {_at(case)}"
        for name, gradient in left_grads.items():
            compared += 1
            other = right_grads.get(name)
            if gradient is None and other is None:
                continue
            if gradient is not None and other is not None and same_bits(gradient, other):
                continue
            floor = 10 * largest if loose else largest  # other kernels: noise of gradients that are truly zero
            error, _ = gradient_error({name: gradient}, {name: other}, floor)
            worst = max(worst, error)
            limit = max(coarsest if gathers or name in tables else 0.0, LOOSE if loose else 0.0)
            bitwise = bitwise and name in tables
            if exact and gradient is not None and limit < error <= last_places(gradient.dtype):
                rounded.add(name)
                continue
            if (gradient is None or error > limit) and not node:
                node, detail = name, f"its gradient differs by {error:.2e} (relative) {_at(case)}"
    if not compared:
        return Check("identity", False, 0, 0.0, "", "there was nothing to compare")
    trained = any(parameter.requires_grad for parameter in original.parameters())
    return Check(
        "identity",
        not node,
        compared,
        worst,
        node,
        detail or _sizes(cases, "" if bitwise else loose, trained, len(rounded)),
    )


def _why_not_bitwise(program: ExportedProgram, lifted: LiftedProgram) -> str:
    """Why the lifted program may round otherwise; empty if it may not."""
    if lifted.cp_size is not None and any(r.source_kind == "is_causal" for r in lifted.report.reads):
        return "a mask took the place of is_causal: another kernel"
    graph = normalize(program, read_only=True).graph
    if scan_record(build_record(program, graph), user_axes(lifted)).shifts:
        return "a shifted loss is taken over all positions: sums of more rows, and products of more"
    return rounds_otherwise(graph, _lifted_reads(lifted))


def rounds_otherwise(graph: Graph, reads: Iterable[PositionRead]) -> str:
    """Why ops that read lifted values in the place of those of ``graph`` may round otherwise; empty if they may not."""
    nodes = {node.name: node for node in graph.nodes}
    for read in reads:
        value = nodes[read.value].meta.get("val") if read.value in nodes else None
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "products of complex numbers round by the operands' memory layout"
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if read.op.split(".")[1] in ("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "linear"):
                return "a product with values per sample is another kernel"
            if read.operand == "attn_mask":
                return "attention with a floating bias per sample is another kernel"
            if read.form != "values" or read.source_kind == "parameter":
                return "floating values are recomputed in the stage, on another shape"
    return ""


def coarsest_dtype(program: ExportedProgram) -> float:
    """The precision of the coarsest floating dtype of the program, which a gradient of a table may pass."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    found = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return max((TABLE_TOLERANCE[dtype] for dtype in found if dtype in TABLE_TOLERANCE), default=TOLERANCE)


def last_places(dtype: torch.dtype) -> float:
    """The relative error of a gradient whose terms are summed in another order."""
    return min(UNITS * torch.finfo(dtype).eps, TABLE_TOLERANCE.get(dtype, TOLERANCE))


def table_names(lifted: LiftedProgram) -> set[str]:
    """The FQNs of parameters that are read by position."""
    reads = [read for read in lifted.report.reads if read.source_kind == "parameter"]
    return {name for read in reads for name in (read.source, *read.aliases)}


def _lifted_reads(lifted: LiftedProgram) -> list[PositionRead]:
    """The reads at ops that were lifted."""
    return [read for read in lifted.report.reads if read.op.startswith("aten.") and not read.refusal]


def _at(case: Case) -> str:
    return f"at batch {case.batch}, length {case.length}"


def _sizes(cases: list[Case], loose: str, trained: bool, rounded: int = 0) -> str:
    frozen = "" if trained else "; forward only: no parameter requires a gradient"
    how = f"to {LOOSE:.0e} ({loose})" if loose else "bitwise"
    if rounded:
        how = f"outputs {how}, {rounded} gradients to {UNITS} units in the last place"
    return f"{how}, at (batch, length) " + ", ".join(f"({case.batch}, {case.length})" for case in cases) + frozen


def _caches(original: torch.nn.Module, case: Case, written: dict[str, torch.Tensor], lifted: LiftedProgram) -> set[str]:
    """Buffers that the original overwrites in the same way each time, and that the lifted program has no use for."""
    if not written:
        return set()
    buffers: dict[str, torch.Tensor] = dict(original.named_buffers())
    before = {name: buffers[name].clone() for name in written}
    with torch.no_grad():
        for name, value in written.items():
            buffers[name].copy_(value)
        original(*case.args, **case.kwargs)
        again = {name for name, value in written.items() if same_bits(buffers[name], value)}
        for name, value in before.items():
            buffers[name].copy_(value)
    signature = lifted.program.graph_signature
    used = {node.name for node in lifted.program.graph.nodes if node.op == "placeholder" and node.users}
    return {fqn for name, fqn in signature.inputs_to_buffers.items() if fqn in again and name not in used}


def _run(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """Outputs, gradients, and the buffers that the run has changed, which are put back."""
    buffers: dict[str, torch.Tensor] = dict(module.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    torch.manual_seed(seed)
    outputs = [value for value in tree_flatten(module(*args, **kwargs))[0] if isinstance(value, torch.Tensor)]
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    found = gradients(outputs, loss_weights(outputs, seed), parameters)
    changed = {name: value.clone() for name, value in buffers.items() if not same_bits(value, before[name])}
    with torch.no_grad():
        for name in changed:
            buffers[name].copy_(before[name])
    return outputs, found, changed
