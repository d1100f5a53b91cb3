"""Sequences that are longer than a learned table: refused when they are fed, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import buffer_lifting as bl

ROWS = 16


class Learned(nn.Module):
    """Tokens with learned positions, the first of them ``offset``."""

    def __init__(self, offset: int, by_index: bool) -> None:
        super().__init__()
        self.offset, self.by_index = offset, by_index
        self.embed, self.positions = nn.Embedding(9, 4), nn.Embedding(ROWS, 4)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1]).unsqueeze(0) + self.offset
        return self.embed(ids) + (self.positions.weight[place] if self.by_index else self.positions(place))


def lifted(offset: int = 0, by_index: bool = False) -> Any:
    ids = torch.randint(9, (2, 8))
    return bl.lift(export(Learned(offset, by_index), (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}}))


@pytest.mark.parametrize(("offset", "by_index"), [(0, False), (2, False), (2, True)])
def test_a_sequence_longer_than_a_table(offset: int, by_index: bool) -> None:
    cp = bl.context_parallel(lifted(offset, by_index), size=2)
    cp.feed(2, ROWS - offset, shard=(1, 2))
    for rank in range(2):
        with pytest.raises(bl.FeedError, match=rf"'positions.weight'.*it has {ROWS} rows, for {ROWS - offset} pos"):
            cp.feed(2, ROWS - offset + 2, shard=(rank, 2))


def test_packed_positions_within_a_table_that_the_sequence_outgrows() -> None:
    program = lifted()
    positions = torch.arange(ROWS).repeat(2)
    assert int(program.feed(2, 2 * ROWS, positions=positions)["lifted_positions"].max()) == ROWS - 1
    positions[3] = ROWS
    with pytest.raises(bl.FeedError, match=rf"positions go up to {ROWS}, but the table 'positions.weight' has {ROWS}"):
        program.feed(2, 2 * ROWS, positions=positions)


def test_a_saved_program_knows_its_tables(tmp_path: Any) -> None:
    program = lifted()
    program.save(tmp_path / "program.pt2")
    with pytest.raises(bl.FeedError, match=r"'positions\.weight'"):
        bl.load(tmp_path / "program.pt2").feed(2, ROWS + 1)
