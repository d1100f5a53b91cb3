"""Checks the invariants of a lift on the user's own program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from buffer_lifting.adapter import as_program
from buffer_lifting.dataflow import Dep, analyse
from buffer_lifting.errors import VerificationError
from buffer_lifting.graph.from_fx import build_record
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.oracles.composition import check_composition
from buffer_lifting.oracles.equivariance import check_equivariance
from buffer_lifting.oracles.identity import check_identity
from buffer_lifting.oracles.running import Case, example_cases
from buffer_lifting.oracles.shards import check_shards
from buffer_lifting.oracles.values import check_values
from buffer_lifting.passes.normalize import normalize
from buffer_lifting.program import Check, VerifyReport
from buffer_lifting.stages import StagedProgram

CHECKS = ("values", "identity", "equivariance", "shards", "composition")


def verify(
    program: ExportedProgram | GraphModule,
    target: LiftedProgram | StagedProgram,
    inputs: Iterable[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    seed: int = 0,
    checks: Sequence[str] = CHECKS,
) -> VerifyReport:
    """Checks that a lifted (or staged) program is the original, wherever its tokens stand.

    - ``values``: what each op on data reads by position equals, bitwise, what it read in the original, gathered by
      the order; natural, random per sample and axis, packed documents, and a shard that does not start at 0. It
      names the op.
    - ``identity``: in natural order, outputs and the gradient of every parameter are bitwise the original's
      (gradients of learned tables that are read by position: to the precision of their dtype; everything to
      1e-4 where other kernels run: a mask in the place of ``is_causal``, products with values per sample; the detail
      of the check says so).
    - ``equivariance``: in float64, for another permutation per sample and axis, outputs and gradients are the
      original's, permuted, to 1e-9; dropout is switched off for it. Each lifted input is perturbed as a control: it
      has to move something, else the report names it as not proven.
    - ``shards`` (a program for several context-parallel ranks; in place of ``identity`` and ``equivariance``, which
      are of one rank): all ranks, run in lockstep in this process on their shards of a random order per sample, have
      the original's outputs, one behind the other, and the original's gradients, summed; in float64 to 1e-9.
    - ``composition`` (staged programs): the stages in sequence equal the lifted program.

    Args:
        program: the original.
        target: what was made of it.
        inputs: ``(args, kwargs)`` calls with whole inputs in natural order; default: the program's example inputs,
            and, where it is dynamic, a second batch and length made from them.
        seed: of the permutations, and set before each run: dropout draws the same numbers in both programs.
        checks: which of the checks to run.

    Returns:
        The report; all its checks passed.

    Raises:
        VerificationError: a check failed; the message names the first node that differs, and the error's
            ``report`` has all checks that ran.
        LiftingError: there are no inputs with data to verify on.
        TypeError: not a program, or not a lifted one.
        ValueError: an unknown check.
    """
    program = as_program(program)
    if not isinstance(target, LiftedProgram | StagedProgram):
        raise TypeError(f"verify takes a LiftedProgram or StagedProgram, not {type(target).__name__}")
    unknown = set(checks) - set(CHECKS)
    if unknown:
        raise ValueError(f"checks are of {', '.join(CHECKS)}, not {', '.join(sorted(unknown))}")
    lifted = target.lifted if isinstance(target, StagedProgram) else target
    cases = example_cases(program, lifted, inputs, seed)
    done: list[Check] = []
    runs: dict[str, Callable[[], Check]] = {"values": lambda: check_values(program, lifted, cases, seed)}
    if (lifted.cp_size or 1) > 1:
        runs["shards"] = lambda: check_shards(program, lifted, cases, seed)
    else:
        runs["identity"] = lambda: check_identity(program, lifted, cases, seed)
        runs["equivariance"] = lambda: check_equivariance(program, lifted, cases, seed)
    if isinstance(target, StagedProgram):
        runs["composition"] = lambda: check_composition(target, cases, seed)
    for name, run in runs.items():
        if name in checks:
            done.append(_guarded(name, run))
    report = VerifyReport(tuple(done), _notes(program, lifted, cases))
    if not report.passed:
        failed = next(check for check in done if not check.passed)
        where = f" at node {failed.node!r}" if failed.node else ""
        error = VerificationError(f"{failed.name} does not hold{where}: {failed.detail}\n{report}")
        error.report = report
        raise error
    return report


def _guarded(name: str, run: Callable[[], Check]) -> Check:
    """A check whose run breaks down (shapes that do not fit any more) has failed."""
    try:
        return run()
    except (RuntimeError, IndexError, AssertionError) as broken:
        return Check(name, False, 0, float("inf"), _failing_node(broken), f"the program does not run: {_first(broken)}")


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _failing_node(error: BaseException) -> str:
    """The node an fx interpreter was at, which it appends to the message (``While executing %name : ...``)."""
    text = str(error)
    marker = "While executing %"
    return text.split(marker, 1)[1].split(" ", 1)[0] if marker in text else ""


def _notes(program: ExportedProgram, lifted: LiftedProgram, cases: list[Case]) -> tuple[str, ...]:
    notes = []
    record = build_record(program, normalize(program, read_only=True).graph)
    if any(Dep.RANDOM in dep for dep in analyse(record, {}).values()):
        notes.append("the program draws random numbers (dropout): the generator was set alike before each run")
    if len(cases) == 1:
        notes.append("verified at one size only: the program is static, or one call was given")
    left = [read for read in lifted.report.reads if read.refusal]
    if left:
        notes.append(f"{len(left)} read(s) were left as they are (strict=False): they follow no order")
    return tuple(notes)
