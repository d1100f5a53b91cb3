"""Private torch that joint graphs need, with the public alternative that was missing beside each use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._functorch._aot_autograd import descriptors as _d  # what aot_export_joint_with_descriptors annotates with
from torch._functorch._aot_autograd.schemas import InputAliasInfo, PlainTensorMeta  # what it knows of each input
from torch.fx import GraphModule
from torch.fx.graph import CodeGen, Graph, _PyTreeCodeGen, _PyTreeInfo  # no public way to add an argument to a graph
from torch.utils._python_dispatch import _disable_current_modes  # the public modes have no way to be left for a while

from buffer_lifting.torch_compat import TreeSpec, tree_flatten, tree_unflatten, with_keywords


def outside_of_modes() -> Any:
    """Leaves the fake mode that capturing a joint graph keeps open until it is compiled."""
    return _disable_current_modes()


def described(descriptor: Any) -> tuple[str, str]:
    """Kind (``"parameter"``, ``"buffer"``, ``"tangent"``, ``"input"``, else ``""``) and FQN of an input."""
    if isinstance(descriptor, _d.ParamAOTInput):
        return "parameter", descriptor.target
    if isinstance(descriptor, _d.BufferAOTInput):
        return "buffer", descriptor.target
    if isinstance(descriptor, _d.TangentAOTInput):
        return "tangent", ""
    return ("input" if isinstance(descriptor, _d.PlainAOTInput) else ""), ""


def same_result(tangent: Any, output: Any) -> bool:
    """Whether an input's descriptor says that it is the gradient of the result with another descriptor."""
    return isinstance(tangent, _d.TangentAOTInput) and bool(tangent.output == output)


def gradient_of(descriptor: Any) -> str | None:
    """Whose gradient a result is: an FQN, or how torch writes the input; ``None`` for a result that is no gradient."""
    if not isinstance(descriptor, _d.GradAOTOutput):
        return None
    return described(descriptor.grad_of)[1] or descriptor.grad_of.expr()


def input_descriptors(existing: Sequence[Any], count: int) -> list[Any]:
    """Descriptors of further plain inputs, numbered behind those that there are."""
    first = 1 + max((d.idx for d in existing if isinstance(d, _d.PlainAOTInput)), default=-1)
    return [_d.PlainAOTInput(idx=first + index) for index in range(count)]


def gradient_descriptor(descriptor: Any) -> Any:
    """The descriptor of the gradient of an input."""
    return _d.GradAOTOutput(grad_of=descriptor)


def codegen_with(graph: Graph, names: Sequence[str], tangents: int, gradients: int) -> CodeGen | None:
    """How a graph is called that has further inputs ``names``, in front of its last ``tangents``.

    A flat graph stays flat. Of ``f(primals, tangents)`` they are further primals, and ``gradients`` further results
    stand with the gradients. Of a call of ``torch.export``, ``f(*args, **kwargs)``, they are keywords.

    Returns:
        ``None`` for a call of another kind.
    """
    own = graph._codegen
    if not isinstance(own, _PyTreeCodeGen):
        return CodeGen()
    info = own.pytree_info
    spec, out = info.in_spec, info.out_spec
    sides = spec.children()
    if not tangents and spec.type is tuple and [side.type for side in sides] == [tuple, dict]:
        return _PyTreeCodeGen(_PyTreeInfo([*info.orig_args, *names], with_keywords(spec, tuple(names)), out))
    if spec.type not in (tuple, list) or spec.num_children != 2 or sides[1].num_leaves != tangents:
        return None
    if sides[0].type is not list or not all(child.is_leaf() for child in sides[0].children()):
        return None
    if gradients:
        if out is None or out.num_children != 2 or out.children()[1].type not in (tuple, list):
            return None
        out = _longer(out, 1, gradients)
    return _PyTreeCodeGen(_PyTreeInfo(list(info.orig_args), _longer(spec, 0, len(names)), out))


def _longer(spec: TreeSpec, side: int, count: int) -> TreeSpec:
    """The spec of a pair of sequences, with further leaves in one of the two."""
    pair = list(tree_unflatten(list(range(spec.num_leaves)), spec))
    pair[side] = type(pair[side])([*pair[side], *range(count)])
    return tree_flatten(tuple(pair) if spec.type is tuple else pair)[1]


def captured_inputs(capture: Any) -> int:
    """How many inputs the forward of a ``JointWithDescriptors`` has; -1 where they are not, one by one, the call's.

    Private: as in :func:`extend_capture`.
    """
    state, traced = capture._aot_state, capture._aot_graph_capture
    if traced.maybe_subclass_meta is not None or not isinstance(traced.updated_flat_args, tuple):
        return -1
    plain = all(isinstance(meta, PlainTensorMeta) for meta in state.fw_metadata.subclass_inp_meta)
    same = len(state.flat_args) == len(traced.updated_flat_args[0]) == len(state.fw_metadata.input_info)
    return len(state.flat_args) if plain and same else -1


def extend_capture(capture: Any, module: GraphModule, place: int, values: Sequence[Any], names: Sequence[Any]) -> None:
    """Makes a lifted graph that of a ``JointWithDescriptors``, so that it is compiled with its further inputs.

    ``values`` and ``names``: fake tensors and descriptors of the further inputs, which stand at ``place`` among the
    primals. Private: all that torch keeps beside the graph (``jd.graph_module`` has a setter, but it does not change
    the number of inputs).
    """
    state, traced = capture._aot_state, capture._aot_graph_capture
    info = InputAliasInfo(
        is_leaf=True,
        mutates_data=False,
        mutates_metadata=False,
        mutations_hidden_from_autograd=True,
        mutations_under_no_grad_or_inference_mode=False,
        mutation_inductor_storage_resize=False,
        mutates_storage_metadata=False,
        requires_grad=False,
        keep_input_mutations=False,
    )
    at = slice(place, place)
    plain = [PlainTensorMeta(unwrapped_idx=place + index) for index in range(len(values))]
    for held, further in (
        (state.flat_args, values),
        (state.flat_args_descs, names),
        (state.fw_metadata.input_info, [info] * len(values)),
        (state.fw_metadata.subclass_inp_meta, plain),
        (traced.updated_flat_args[0], values),
        (traced.updated_flat_args_descs[0], names),
    ):
        if len(held) == place + len(values) and held[place:] == list(further):
            continue  # one list under two names
        held[at] = list(further)
    capture.graph_module = module
