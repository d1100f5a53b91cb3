"""Golden checks with the pytest plugin: copy this into your tests, and put your own export in place of ``export``."""

from __future__ import annotations

from typing import Any

import torch

import buffer_lifting as bl


class Model(torch.nn.Module):
    """Stands for your model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 16)
        self.register_buffer("table", torch.randn(128, 16))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of ``tokens`` ``[batch, seq]``."""
        x = self.embedding(tokens) + self.table[: tokens.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return x


def export() -> torch.export.ExportedProgram:
    """Stands for your export."""
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    tokens = torch.zeros(2, 16, dtype=torch.long)
    return torch.export.export(Model(), (tokens,), dynamic_shapes=(dynamic,))


def test_positions(lifted_graph: Any) -> None:
    """What is read by position is lifted, and nothing else crosses the stages than hidden states."""
    program = export()
    lifted = bl.context_parallel(bl.lift(program), size=1)
    staged = bl.partition(lifted, num_stages=2)
    lifted_graph.assert_clean(staged)
    lifted_graph.assert_lifted_inputs(program, {"lifted_table": "float32[batch, seq, 16]"})
    lifted_graph.assert_boundaries(staged, [["float32[batch, seq, 16]"]])
    lifted_graph.assert_snapshot(staged)
