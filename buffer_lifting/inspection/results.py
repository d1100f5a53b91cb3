"""What a run of ``check`` has found, for all output formats."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from buffer_lifting.inspection.diagnostics import Diagnostic

CLEAN, FINDINGS, COULD_NOT_CHECK = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Suppression:
    """Why a finding does not count: an entry of the configuration or of the baseline, with its reason."""

    by: Literal["configuration", "baseline"]
    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A finding of a target; one with a ``suppression`` does not count."""

    target: str
    diagnostic: Diagnostic
    suppression: Suppression | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A target that could not be checked (BL901), and why, in one line."""

    target: str
    message: str
    code: str = "BL901"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A whole run: the targets in order, the findings in order, the failures, and warnings about the run itself."""

    targets: tuple[str, ...]
    reported: tuple[Reported, ...]
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[Reported, ...]:
        """The findings that count."""
        return tuple(item for item in self.reported if item.suppression is None)

    @property
    def statistics(self) -> dict[str, int]:
        """How many findings that count each code has."""
        return dict(sorted(Counter(item.diagnostic.code for item in self.findings).items()))

    @property
    def exit_code(self) -> int:
        """0 clean, 1 findings, 2 a target could not be checked."""
        if self.failures:
            return COULD_NOT_CHECK
        return FINDINGS if self.findings else CLEAN
