"""The errors that buffer_lifting raises. Every one of them leaves the input program as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from buffer_lifting.program import VerifyReport


class LiftingError(Exception):
    """Base class of every error that buffer_lifting raises on purpose."""


class AxesError(LiftingError):
    """The batch or sequence axis is missing, ambiguous, or fixed to a size that the request does not have."""


class UnsupportedReadError(LiftingError):
    """A read by sequence position cannot be lifted, or an operation would break under a reordered sequence."""


class PartitionError(LiftingError):
    """The graph cannot be split as asked."""


class FeedError(LiftingError):
    """An order, shard, positions tensor or user input does not fit the program (``node``: of that value)."""

    node: str = ""


class ArchiveError(LiftingError):
    """A ``.pt2`` file is not an archive that can be read without running anything from it; one line says why."""


class VerificationError(LiftingError):
    """An invariant does not hold; the message names the first node that differs, ``report`` has every check."""

    report: VerifyReport | None = None
