"""Private torch that joint graphs need, with the public alternative that was missing beside each use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._functorch._aot_autograd import descriptors as _d  # what aot_export_joint_with_descriptors annotates with
from torch.utils._python_dispatch import _disable_current_modes  # the public modes have no way to be left for a while
from torch.fx.graph import CodeGen, Graph, _PyTreeCodeGen, _PyTreeInfo  # no public way to add an argument to a graph

from buffer_lifting.torch_compat import TreeSpec, pytree, tree_flatten, tree_unflatten, with_keywords


def outside_of_modes() -> Any:
    """Leaves the fake mode that capturing a joint graph keeps open until it is compiled."""
    return _disable_current_modes()


def described(descriptor: Any) -> tuple[str, str]:
    """Kind (``"parameter"``, ``"buffer"``, ``"tangent"``, ``"input"`` or ``""``) and FQN of an input by its descriptor."""
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


__all__ = ["CodeGen", "codegen_with", "described", "gradient_descriptor", "gradient_of", "input_descriptors", "pytree", "same_result"]
