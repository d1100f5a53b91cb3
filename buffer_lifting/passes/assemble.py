"""Makes a valid ExportedProgram of an edited graph: signature, call spec, example inputs, state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph

from buffer_lifting.tables import on_meta
from buffer_lifting.torch_compat import rebuild_program, root_spec, tree_map, with_keywords


def assemble(
    program: ExportedProgram,
    graph: Graph,
    submodules: Mapping[str, Any],
    added: tuple[str, ...],
    examples: Mapping[str, torch.Tensor] | None,
    resized: Collection[str] = (),
) -> ExportedProgram:
    """The program with ``graph`` in place of its own, and ``added`` placeholders as new keyword inputs.

    ``resized`` names user inputs that have other sizes than before. Fake tensors of a program that was exported with
    them become tensors on the meta device.
    """
    signature = program.graph_signature
    specs = [
        *signature.input_specs,
        *(InputSpec(InputKind.USER_INPUT, TensorArgument(name=name), None) for name in added),
    ]
    made: dict[int, torch.Tensor] = {}
    example_inputs = tree_map(lambda value: on_meta(value, made), program.example_inputs)
    if example_inputs is not None:
        args, kwargs = example_inputs
        example_inputs = (args, {**kwargs, **(examples or {})}) if examples is not None or not added else None
    in_spec, out_spec = root_spec(program)
    root = program.module_call_graph[0].signature
    names = list(root.forward_arg_names or []) if root is not None else []
    if added:
        in_spec = with_keywords(in_spec, added)
    return rebuild_program(
        program,
        graph,
        ExportGraphSignature(specs, list(signature.output_specs)),
        in_spec=in_spec,
        out_spec=out_spec,
        arg_names=[*names, *added],
        state_dict={fqn: on_meta(value, made) for fqn, value in program.state_dict.items()},
        constants={fqn: on_meta(value, made) for fqn, value in program.constants.items()},
        example_inputs=example_inputs,
        submodules=submodules,
        resized=resized,
    )
