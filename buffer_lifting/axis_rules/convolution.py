"""The rule for convolutions: one element wide along a dim, they are projections there, and local."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import Alignment, AxisResult, OpView, as_it_is, rule
from buffer_lifting.labels import feature, features, is_labelled

_ONE_TO_ONE = {"stride": 1, "padding": 0}  # "valid" and "same" paddings are 0 where the kernel has one element


@rule("conv1d", "conv2d", "conv3d")
def _convolution(view: OpView) -> AxisResult | None:
    """``input [B, C, *dims]``, ``weight [O, C / groups, *kernel]``; ``None`` (unknown) if the sequence is convolved."""
    labels, kernel, shape = view.labels("input"), view.shape("weight"), view.shape("out")
    if labels is None or kernel is None or shape is None or not len(labels) == len(kernel) == len(shape):
        return None
    if is_labelled(labels[1]):
        return AxisResult(None, mixing="a learned projection runs along the sequence")
    out = [labels[0], feature(shape[1])]
    for dim in range(2, len(shape)):
        if not is_labelled(labels[dim]):
            out.append(feature(shape[dim]))
            continue
        if kernel[dim] != 1 or any(_number(view, key, dim - 2) != value for key, value in _ONE_TO_ONE.items()):
            return None
        out.append(labels[dim])
    operands = {path: Alignment(features(own), None) for path, own in view.tensors() if path != "input"}
    return AxisResult((tuple(out),), {"input": as_it_is(labels), **operands})


def _number(view: OpView, key: str, spatial: int) -> object:
    """The entry of an argument for a spatial dim; one entry stands for all."""
    given = view.node.args.get(key)
    if key == "padding" and isinstance(given, str):
        return 0
    if isinstance(given, tuple):
        return given[spatial] if len(given) > spatial else given[-1] if given else None
    return given
