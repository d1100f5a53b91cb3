"""The rule for the casts of an autocast region, against torch: what is cast, and the dtype that this gives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from buffer_lifting.graph.autocast_rule import Operand, cast_dtype

aten = torch.ops.aten
HALF, WIDE = torch.bfloat16, torch.float32
CALLS = {
    "linear": (aten.linear.default, ((2, 4), (3, 4), (3,))),
    "matmul": (aten.matmul.default, ((2, 4), (4, 3))),
    "bmm": (aten.bmm.default, ((2, 3, 4), (2, 4, 3))),
    "baddbmm": (aten.baddbmm.default, ((2, 3, 3), (2, 3, 4), (2, 4, 3))),
    "conv1d": (aten.conv1d.default, ((2, 4, 5), (3, 4, 1), (3,))),
    "sdpa": (aten.scaled_dot_product_attention.default, ((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), (5, 5))),
    "add": (aten.add.Tensor, ((2, 4), (4,))),
    "mul by a scalar tensor": (aten.mul.Tensor, ((2, 4), ())),
    "write": (aten.add_.Tensor, ((2, 4), (4,))),
    "sum": (aten.sum.default, ((2, 4),)),
    "layer_norm": (lambda x, w: aten.layer_norm.default(x, [4], w), ((2, 4), (4,))),
    "softmax": (lambda x: aten.softmax.int(x, -1), ((2, 4),)),
    "exp": (aten.exp.default, ((2, 4),)),
    "stack": (lambda *xs: aten.stack.default(list(xs)), ((2, 4), (2, 4))),
    "embedding": (lambda w: aten.embedding.default(w, torch.zeros(2, dtype=torch.long)), ((2, 4),)),
    "mse_loss": (aten.mse_loss.default, ((2, 4), (2, 4))),
}
NAMES = {"mul by a scalar tensor": "mul.Tensor", "write": "add_.Tensor", "add": "add.Tensor", "softmax": "softmax.int"}
NAMES |= {"sdpa": "scaled_dot_product_attention.default"}
MIXES = ("all wide", "all half", "first half", "first wide")
#: torch's layer_norm refuses a weight of a narrower dtype.
CASES = [(name, mix) for name in CALLS for mix in MIXES if (name, mix) != ("layer_norm", "first wide")]


def _operands(shapes: tuple[tuple[int, ...], ...], mix: str) -> list[torch.Tensor]:
    first, rest = {"all wide": (WIDE, WIDE), "all half": (HALF, HALF), "first half": (HALF, WIDE)}.get(
        mix, (WIDE, HALF)
    )
    return [torch.randn(shape, dtype=rest if index else first) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize(("name", "mix"), CASES)
def test_the_casts_give_the_dtype_that_autocast_gives(name: str, mix: str) -> None:
    """With the operands cast by the rule, the op without autocast has the result's dtype under autocast."""
    call, shapes = CALLS[name]
    operands = _operands(shapes, mix)
    with torch.autocast("cpu", HALF):
        expected = call(*[operand.clone() for operand in operands]).dtype
    described = [Operand(str(value.dtype).removeprefix("torch."), value.dim()) for value in operands]
    op = f"aten.{NAMES.get(name, f'{name}.default')}"
    found = cast_dtype(op, [str(expected).removeprefix("torch.")], described, False)
    cast = [value.to(getattr(torch, found)) for value in operands] if found else operands
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(*[mode.from_tensor(value) for value in cast]).dtype == expected
    if mix == "all half" and expected is HALF:
        assert found is None


def test_what_is_not_cast() -> None:
    wide, half = Operand("float32", 2), Operand("bfloat16", 2)
    assert cast_dtype("aten.linear.default", ["bfloat16"], [wide, half], False) == "bfloat16"
    assert cast_dtype("aten.linear.default", ["bfloat16"], [wide, half], True) is None  # the call names its dtype
    assert cast_dtype("aten.to.dtype", ["bfloat16"], [wide], False) is None
    assert cast_dtype("aten.argmax.default", ["int64"], [wide], False) is None
    assert cast_dtype("hop.flex_attention", ["bfloat16"], [wide], False) is None
    assert cast_dtype("aten.add.Tensor", ["float32"], [Operand("int64", 2), Operand("float32", 0)], False) is None
    assert cast_dtype("aten.polar.default", ["complex64"], [wide, wide], False) is None
