"""Identity: in natural order the lifted program is bitwise the original, outputs and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.compare import difference, gradient_error, gradients, loss_weights, same_bits
from buffer_lifting.oracles.running import Case
from buffer_lifting.program import Check
from buffer_lifting.torch_compat import tree_flatten

TOLERANCE = 1e-5
#: A learned table that is gathered per sample gets its gradient by scatter-add, whose order of summation is not the
#: original's: these gradients, and no others, are compared relative to the precision of their dtype.
TABLE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check_identity(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case], seed: int) -> Check:
    """Both programs as modules, on each case; the random generator is set alike before each run."""
    exact = not (lifted.cp_size is not None and any(r.source_kind == "is_causal" for r in lifted.report.reads))
    reads = [read for read in lifted.report.reads if read.source_kind == "parameter"]
    tables = {name for read in reads for name in (read.source, *read.aliases)}
    compared, worst, node, detail = 0, 0.0, "", ""
    original, changed = program.module(), lifted.program.module()
    for case in cases:
        feed = lifted.feed(case.batch, case.lengths, inputs=case.tensors())
        left, left_grads = _run(original, case.args, case.kwargs, seed)
        right, right_grads = _run(changed, case.args, {**case.kwargs, **feed}, seed)
        names = [str(name) for name in program.graph_signature.user_outputs]
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            compared += 1
            gap = difference(a, b)
            worst = max(worst, gap)
            close = a.dtype == b.dtype and gap <= TOLERANCE * max(float(a.detach().abs().max()), 1.0)
            if not (same_bits(a, b) if exact else close) and not node:
                node, detail = names[index], f"the output differs by {gap:.2e} {_at(case)}"
        if not exact:
            error, where = gradient_error(left_grads, right_grads)
            compared, worst = compared + len(left_grads), max(worst, error)
            if error > TOLERANCE and not node:
                node, detail = where, f"its gradient differs by {error:.2e} (relative) {_at(case)}"
            continue
        for name, gradient in left_grads.items():
            compared += 1
            other = right_grads.get(name)
            if gradient is None and other is None:
                continue
            if gradient is None or other is None or not same_bits(gradient, other):
                error, _ = gradient_error({name: gradient}, {name: other})
                worst = max(worst, error)
                if name in tables and gradient is not None and error <= TABLE_TOLERANCE.get(gradient.dtype, TOLERANCE):
                    continue
                if not node:
                    node, detail = name, f"its gradient differs by {error:.2e} (relative) {_at(case)}"
    if not compared:
        return Check("identity", False, 0, 0.0, "", "there was nothing to compare")
    trained = any(parameter.requires_grad for parameter in original.parameters())
    return Check("identity", not node, compared, worst, node, detail or _sizes(cases, exact, trained))


def _at(case: Case) -> str:
    return f"at batch {case.batch}, length {case.length}"


def _sizes(cases: list[Case], exact: bool, trained: bool) -> str:
    frozen = "" if trained else "; forward only: no parameter requires a gradient"
    how = "bitwise" if exact else f"to {TOLERANCE:.0e} (a mask took the place of is_causal: another kernel)"
    return f"{how}, at (batch, length) " + ", ".join(f"({case.batch}, {case.length})" for case in cases) + frozen


def _run(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    torch.manual_seed(seed)
    outputs = [value for value in tree_flatten(module(*args, **kwargs))[0] if isinstance(value, torch.Tensor)]
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    return outputs, gradients(outputs, loss_weights(outputs, seed), parameters)
