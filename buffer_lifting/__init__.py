"""buffer_lifting: position values of an exported program as inputs, and the program as pipeline stages.

The tour: ``program.py`` (the records) -> ``scanner.py`` (finds the reads) -> ``passes/`` (lifts them) ->
``partitioner.py`` (splits the graph) -> ``runtime.py`` (torch's PipelineStage). ``feed.py`` makes the tensors for the
lifted inputs, ``verification.py`` checks it all on your own program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from buffer_lifting.agreement import check_orders
    from buffer_lifting.compiled import CompiledStage, compile_package, load_compiled
    from buffer_lifting.cost_model import CostWeights
    from buffer_lifting.errors import (
        AxesError,
        FeedError,
        LiftingError,
        PartitionError,
        UnsupportedReadError,
        VerificationError,
    )
    from buffer_lifting.inspection.diagnostics import Diagnostic, check
    from buffer_lifting.joint import lift_graph
    from buffer_lifting.layer_modules import split_layers
    from buffer_lifting.lifted import LiftedProgram
    from buffer_lifting.lifted_graph import LiftedGraph
    from buffer_lifting.lifting import lift, scan
    from buffer_lifting.loss_reduction import LossReduction
    from buffer_lifting.memory import MemoryEstimate, RankMemory, StageMemory
    from buffer_lifting.package import load, load_stage
    from buffer_lifting.partitioner import partition
    from buffer_lifting.passes.causal_flags import causal_flags
    from buffer_lifting.passes.context_parallel import context_parallel
    from buffer_lifting.passes.real_pairs import real_pairs
    from buffer_lifting.placement import stage_ranks
    from buffer_lifting.program import (
        InputAxes,
        LiftedInput,
        PositionRead,
        ScanReport,
        SequenceMixing,
        VerifyReport,
    )
    from buffer_lifting.stage_gradients import StageGradients
    from buffer_lifting.stages import Stage, StagedProgram
    from buffer_lifting.step_runner import StepRunner
    from buffer_lifting.token_loss import TokenLoss
    from buffer_lifting.verification import verify

__version__ = "0.1.0"

#: Public name -> the module that has it; imported on first use, so that the command line starts without torch.
_PUBLIC = {
    "scan": "lifting",
    "lift": "lifting",
    "lift_graph": "joint",
    "context_parallel": "passes.context_parallel",
    "causal_flags": "passes.causal_flags",
    "real_pairs": "passes.real_pairs",
    "partition": "partitioner",
    "stage_ranks": "placement",
    "split_layers": "layer_modules",
    "StageGradients": "stage_gradients",
    "CostWeights": "cost_model",
    "MemoryEstimate": "memory",
    "StageMemory": "memory",
    "RankMemory": "memory",
    "verify": "verification",
    "check": "inspection.diagnostics",
    "check_orders": "agreement",
    "compile_package": "compiled",
    "load_compiled": "compiled",
    "CompiledStage": "compiled",
    "load": "package",
    "load_stage": "package",
    "Diagnostic": "inspection.diagnostics",
    "LiftedProgram": "lifted",
    "LiftedGraph": "lifted_graph",
    "StagedProgram": "stages",
    "Stage": "stages",
    "StepRunner": "step_runner",
    "ScanReport": "program",
    "PositionRead": "program",
    "SequenceMixing": "program",
    "TokenLoss": "token_loss",
    "LossReduction": "loss_reduction",
    "InputAxes": "program",
    "LiftedInput": "program",
    "VerifyReport": "program",
    "LiftingError": "errors",
    "UnsupportedReadError": "errors",
    "AxesError": "errors",
    "PartitionError": "errors",
    "VerificationError": "errors",
    "FeedError": "errors",
}
__all__ = [
    "AxesError",
    "CompiledStage",
    "CostWeights",
    "Diagnostic",
    "FeedError",
    "InputAxes",
    "LiftedGraph",
    "LiftedInput",
    "LiftedProgram",
    "LiftingError",
    "LossReduction",
    "MemoryEstimate",
    "PartitionError",
    "PositionRead",
    "RankMemory",
    "ScanReport",
    "SequenceMixing",
    "Stage",
    "StageGradients",
    "StageMemory",
    "StagedProgram",
    "StepRunner",
    "TokenLoss",
    "UnsupportedReadError",
    "VerificationError",
    "VerifyReport",
    "causal_flags",
    "check",
    "check_orders",
    "compile_package",
    "context_parallel",
    "lift",
    "lift_graph",
    "load",
    "load_compiled",
    "load_stage",
    "partition",
    "real_pairs",
    "scan",
    "split_layers",
    "stage_ranks",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
