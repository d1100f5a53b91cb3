"""Composition: the stages, one after another, are the lifted program."""

from __future__ import annotations

import torch

from buffer_lifting.oracles.compare import difference, gradient_error, gradients, loss_weights, same_bits
from buffer_lifting.oracles.identity import coarsest_dtype, table_names
from buffer_lifting.oracles.running import Case
from buffer_lifting.program import Check
from buffer_lifting.stages import StagedProgram
from buffer_lifting.torch_compat import tree_flatten

TOLERANCE = 1e-5


def check_composition(staged: StagedProgram, cases: list[Case], seed: int) -> Check:
    """Outputs bitwise; the gradient of every parameter by ``max|diff| / max(max|g|, 1e-4 * largest)``."""
    compared, worst = 0, 0.0
    module = staged.lifted.program.module()
    coarsest, tables = coarsest_dtype(staged.lifted.program), table_names(staged.lifted)
    for case in cases:
        feed = staged.lifted.feed(case.batch, case.lengths, inputs=case.tensors())
        kwargs = {**case.kwargs, **feed}
        torch.manual_seed(seed)
        left = [v for v in tree_flatten(module(*case.args, **kwargs))[0] if isinstance(v, torch.Tensor)]
        torch.manual_seed(seed)
        right = [v for v in tree_flatten(staged(*case.args, **kwargs))[0] if isinstance(v, torch.Tensor)]
        names = staged.stages[-1].outputs
        for name, a, b in zip(names, left, right, strict=True):
            compared += 1
            if not same_bits(a, b):
                gap = difference(a, b)
                return Check("composition", False, compared, gap, name, f"the output differs by {gap:.2e}")
        whole: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        expected = gradients(left, loss_weights(left, seed), whole)
        actual, missing = _staged_gradients(staged, right, seed, whole)
        if missing:
            detail = f"stage parameters {', '.join(missing[:3])} are none of the program's"
            return Check("composition", False, compared, float("inf"), missing[0], detail)
        error, where = gradient_error(expected, actual)
        compared += len(expected)
        worst = max(worst, error)
        if error > max(TOLERANCE, coarsest if where in tables else 0.0):
            return Check("composition", False, compared, error, where, f"its gradient differs by {error:.2e}")
    return Check("composition", True, compared, worst, "", f"{len(staged.stages)} stages")


def _staged_gradients(
    staged: StagedProgram, outputs: list[torch.Tensor], seed: int, whole: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    """Gradients of the stages' parameters by the program's FQNs, copies of a tied one summed."""
    leaves: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    missing = []
    for stage in staged.stages:
        for fqn, parameter in stage.module.named_parameters():
            if fqn not in whole:
                missing.append(fqn)
            key = f"{stage.index}:{fqn}"
            if not any(parameter is leaf for leaf in leaves.values()):
                leaves[key] = parameter
            names.setdefault(fqn, []).append(key)
    found = gradients(outputs, loss_weights(outputs, seed), leaves)
    by_storage: dict[int, torch.Tensor] = {}
    for fqn, keys in names.items():
        total = [g for key in keys if (g := found.get(key)) is not None]
        if total:
            same = id(whole.get(fqn))
            value = torch.stack(total).sum(0) if len(total) > 1 else total[0]
            by_storage[same] = by_storage[same] + value if same in by_storage else value
    return {fqn: by_storage.get(id(parameter)) for fqn, parameter in whole.items()}, missing
