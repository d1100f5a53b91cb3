"""What a feed keeps and hands out, without copies, from step to step: has somebody written to it?

torch counts the writes to a tensor, together with all its views: the counter is read when a tensor is about to be
handed out again. Writes that torch does not count (by way of numpy, or under ``torch.inference_mode``) are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from buffer_lifting.errors import FeedError
from buffer_lifting.torch_compat import writes


class Kept:
    """Tensors by name. ``written``: whether one of them has been written to since they were put here."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self._seen = [writes(value) for value in values.values()]

    @property
    def written(self) -> bool:
        """See the class."""
        return [writes(value) for value in self.values.values()] != self._seen


class Originals:
    """The program's own tables, whose memory a feed in natural order hands out.

    The feed reads them as aliases with counters of their own, so that a write to what was handed out is told from one
    by the owner of the table, a checkpoint that is loaded for one.
    """

    def __init__(self) -> None:
        self._taken: dict[str, tuple[torch.Tensor, int, torch.Tensor, int]] = {}

    def __reduce__(self) -> tuple[type[Originals], tuple[()]]:
        """A copy begins to count anew."""
        return Originals, ()

    def take(self, fqn: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The table as an alias."""
        if fqn not in self._taken:
            alias = state[fqn].data
            self._taken[fqn] = (state[fqn], writes(state[fqn]), alias, writes(alias))
        return self._taken[fqn][2]

    def changed(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether the owner has written to a table, or put another one in its place.

        Raises:
            FeedError: somebody has written to a table by way of a tensor that a feed returned.
        """
        for fqn, (original, seen, alias, handed_out) in self._taken.items():
            if writes(alias) != handed_out:
                raise FeedError(
                    f"{fqn!r}, a table of the program, was written to by way of a tensor that feed() returned and that "
                    "shares its memory: clone() what you write to; bind_tables() gives the table its values back"
                )
            same = original is state[fqn] and original.data_ptr() == alias.data_ptr()
            if not same or writes(original) != seen:
                return True
        return False
