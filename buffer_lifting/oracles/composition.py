"""Composition: the stages, one after another, are the lifted program."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch.fx import GraphModule

from buffer_lifting.oracles.compare import difference, gradient_error, gradients, loss_weights, same_bits
from buffer_lifting.oracles.identity import coarsest_dtype, table_names
from buffer_lifting.oracles.lockstep import run_modules
from buffer_lifting.oracles.running import Case, resize_case
from buffer_lifting.program import Check
from buffer_lifting.stages import StagedProgram
from buffer_lifting.torch_compat import module_of, tree_flatten

TOLERANCE = 1e-5


def check_composition(staged: StagedProgram, cases: list[Case], seed: int) -> Check:
    """Outputs bitwise; the gradient of every parameter by ``max|diff| / max(max|g|, 1e-4 * largest)``."""
    compared, worst = 0, 0.0
    ranks = staged.lifted.cp_size or 1
    cases = [resize_case(case, staged.lifted, ranks, seed) for case in cases]
    module = module_of(staged.lifted.program)
    coarsest, tables = coarsest_dtype(staged.lifted.program), table_names(staged.lifted)
    for case in cases:
        left, right = _outputs(staged, module, case, seed) if ranks == 1 else _of_ranks(staged, module, case, seed)
        names = staged.stages[-1].outputs
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            name = names[index % len(names)]
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


def _outputs(
    staged: StagedProgram, module: torch.nn.Module, case: Case, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the program and its stages return."""
    feed = staged.lifted.feed(case.batch, case.lengths, inputs=case.tensors())
    kwargs = {**case.kwargs, **feed}
    torch.manual_seed(seed)
    left = tree_flatten(module(*case.args, **kwargs))[0]
    torch.manual_seed(seed)
    return _tensors(left), _tensors(tree_flatten(staged(*case.args, **kwargs))[0])


def _of_ranks(
    staged: StagedProgram, module: torch.nn.Module, case: Case, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the program and its stages return on every context-parallel rank, in natural order, rank by rank."""
    assert isinstance(module, GraphModule)
    values = []
    known = {name: value for name, value in case.tensors().items() if name in staged.lifted.input_axes}
    for rank in range(staged.lifted.cp_size or 1):
        shard = (rank, staged.lifted.cp_size)
        own = staged.lifted.shard_inputs(shard=shard, **known)
        feed = staged.lifted.feed(case.batch, case.lengths, inputs=case.tensors(), shard=shard)
        values.append({**case.named, **own, **feed})
    torch.manual_seed(seed)
    whole, _ = run_modules(module, values)
    torch.manual_seed(seed)
    current: list[dict[str, Any]] = values
    outputs: list[list[Any]] = []
    for stage in staged.stages:
        outputs, _ = run_modules(stage.module, current)
        current = [
            {**own, **dict(zip(stage.outputs, sent, strict=True))} for own, sent in zip(values, outputs, strict=True)
        ]
    return _tensors(list(chain(*whole))), _tensors(list(chain(*outputs)))


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


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
