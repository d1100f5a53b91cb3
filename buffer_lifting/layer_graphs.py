"""The graphs of a stage: its own, and those of its layers once ``split_layers`` has made modules of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule
from torch.nn import Module

from buffer_lifting.errors import PartitionError
from buffer_lifting.torch_compat import LazyGraphModule

#: What modules that wrap others put into names: ``checkpoint_wrapper`` and ``torch.compile``.
WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})


class LayerModule(LazyGraphModule):
    """A layer of a stage: its part of the stage's graph, and its part of the stage's state."""


def graphs_of(module: Module) -> Iterator[tuple[str, GraphModule]]:
    """The graph of a stage and those of its layers, each with what stands before the names in it (``"layers.0."``)."""
    for name, part in module.named_modules():
        if name == "" or isinstance(part, LayerModule):
            assert isinstance(part, GraphModule)
            yield f"{plain_name(name)}." if name else "", part


def plain_name(name: str) -> str:
    """A name in the original model, of one below modules that were wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def require_whole(module: Module, index: int) -> None:
    """Refuses a stage whose layers are modules where the graph of the whole stage is read."""
    if any(isinstance(part, LayerModule) for part in module.modules()):
        raise PartitionError(
            f"stage {index} was split into layers, which is for running it; save it, export it and estimate its "
            "memory before split_layers"
        )
