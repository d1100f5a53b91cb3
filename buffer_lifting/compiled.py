"""Stages compiled ahead of time: packages of AOTInductor, for inference.

Compiled code takes the strides, dtypes and ranks of its inputs for granted: given others, it reads wrong numbers, or
memory that is not its own, and says nothing. The lifted inputs of an order that all samples share have a batch stride
of 0. So a package gets a list of its inputs, and what loads it checks each call and lays the inputs out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.errors import FeedError, LiftingError
from buffer_lifting.torch_compat import aoti_compile, aoti_load, example_size, finite_range

_KEY = "buffer_lifting"


@dataclass(frozen=True)
class CompiledInput:
    """What a compiled stage takes.

    Attributes:
        name: of the graph input.
        keyword: whether it is given by name.
        dtype: ``"float32"``, ...
        shape: numbers, and names of dynamic sizes.
        order: its dims from the outermost in memory to the innermost.
    """

    name: str
    keyword: bool
    dtype: str
    shape: tuple[int | str, ...]
    order: tuple[int, ...]

    def laid_out(self, value: Any, sizes: dict[str, int], limits: Mapping[str, tuple[int, int]]) -> torch.Tensor:
        """``value`` with the strides that the code expects; ``sizes`` collects the dynamic sizes.

        Raises:
            FeedError: another dtype, rank or size.
        """
        if not isinstance(value, torch.Tensor) or str(value.dtype) != f"torch.{self.dtype}":
            what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise FeedError(f"input {self.name!r} is {what}, the stage was compiled for torch.{self.dtype}")
        fits = value.dim() == len(self.shape)
        for size, wanted in zip(value.shape, self.shape, strict=False):
            known = wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size)
            low, high = limits.get(str(wanted), (size, size))
            fits &= size == known and low <= size <= high
        if not fits:
            named = {name: size for name, size in sizes.items() if name in self.shape}
            raise FeedError(
                f"input {self.name!r} has shape {tuple(value.shape)}, the stage was compiled for {list(self.shape)}"
                f"{f' and is called with {named} here' if named else ''}; limits: {dict(limits) or 'none'}"
            )
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(self.order).contiguous().permute(inverse)


def compile_package(program: ExportedProgram, path: str | os.PathLike[str], **options: Any) -> str:
    """Compiles a stage ahead of time with AOTInductor, for inference; :func:`load_compiled` runs the package.

    Needs a C++ compiler. Dynamic sizes stay dynamic, and the weights are in the package.

    Args:
        program: ``staged.exported(index)``, or the ``.pt2`` of a saved stage (``torch.export.load``).
        path: a name that ends in ``.pt2``.
        options: settings of ``torch._inductor.config``; dots are written as ``__``.

    Returns:
        ``path``.

    Raises:
        LiftingError: an input whose elements do not lie densely in the export, a nested input, weights without values.
    """
    empty = sorted(fqn for fqn, value in program.state_dict.items() if value.is_meta)
    if empty:
        raise LiftingError(f"the tensors {empty[:4]} have no values; load the weights before compiling")
    inputs, examples, keywords = _inputs(program)
    limits = {str(symbol): finite_range(limit) for symbol, limit in program.range_constraints.items()}
    document = {"inputs": [vars(item) for item in inputs], "limits": limits}
    settings: dict[str, Any] = {name.replace("__", "."): value for name, value in options.items()}
    settings["aot_inductor.metadata"] = {_KEY: json.dumps(document)}
    before = program.example_inputs
    program.example_inputs = (examples, keywords)
    try:
        with torch.no_grad():
            return aoti_compile(program, os.fspath(path), settings)
    finally:
        program.example_inputs = before


def load_compiled(path: str | os.PathLike[str]) -> CompiledStage:
    """Loads a package of :func:`compile_package`. It runs the code in it: load packages that you trust.

    Raises:
        LiftingError: a package that :func:`compile_package` did not make.
    """
    package = aoti_load(os.fspath(path))
    document = package.get_metadata().get(_KEY)
    if document is None:
        raise LiftingError(f"{os.fspath(path)} is no package of compile_package: it does not say what its inputs are")
    found = json.loads(document)
    inputs = tuple(
        CompiledInput(**{**entry, "shape": tuple(entry["shape"]), "order": tuple(entry["order"])})
        for entry in found["inputs"]
    )
    return CompiledStage(package, inputs, {name: (low, high) for name, (low, high) in found["limits"].items()})


@dataclass(frozen=True)
class CompiledStage:
    """A compiled stage. Called like the stage's module: activations by position, other inputs by keyword.

    Attributes:
        package: what AOTInductor loaded.
        inputs: what it takes.
        limits: smallest and largest value of each dynamic size.
    """

    package: Any
    inputs: tuple[CompiledInput, ...]
    limits: Mapping[str, tuple[int, int]]

    def __call__(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """The stage's outputs; keywords that it does not read are ignored. No gradients.

        Raises:
            FeedError: an input is missing, or has another dtype, rank or size than the stage was compiled for.
        """
        by_position = [item for item in self.inputs if not item.keyword]
        missing = [item.name for item in self.inputs if item.keyword and item.name not in kwargs]
        if len(args) < len(by_position) or missing:
            names = [item.name for item in by_position]
            raise FeedError(f"the stage takes {names} by position and got {len(args)}; keywords missing: {missing}")
        sizes: dict[str, int] = {}
        laid = [item.laid_out(value, sizes, self.limits) for item, value in zip(by_position, args, strict=False)]
        named = {i.name: i.laid_out(kwargs[i.name], sizes, self.limits) for i in self.inputs if i.keyword}
        return self.package(*laid, **named)


def _inputs(
    program: ExportedProgram,
) -> tuple[list[CompiledInput], tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """What a program takes, and zeros of that kind at the sizes of its export."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [str(name) for name in program.graph_signature.user_inputs]
    positional, named = program.call_spec.in_spec.children()
    if positional.num_leaves + named.num_leaves != positional.num_children + named.num_children:
        raise LiftingError("the program takes nested inputs; a stage takes tensors")
    inputs, examples, keywords = [], [], {}
    for index, name in enumerate(names):
        value = values[name]
        order = sorted(range(value.dim()), key=lambda dim: (-example_size(value.stride(dim)), dim))
        keyword = index >= positional.num_children
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
        inputs.append(CompiledInput(name, keyword, str(value.dtype).removeprefix("torch."), shape, tuple(order)))
        example = torch.zeros([example_size(size) for size in value.shape], dtype=value.dtype, device=value.device)
        laid = inputs[-1].laid_out(example, {}, {})
        if any(
            size > 1 and stride != example_size(wanted)
            for size, stride, wanted in zip(laid.shape, laid.stride(), value.stride(), strict=True)
        ):
            raise LiftingError(f"input {name!r} does not lie densely in the export; export with contiguous inputs")
        if keyword:
            keywords[named.context[index - positional.num_children]] = laid
        else:
            examples.append(laid)
    return inputs, tuple(examples), keywords
