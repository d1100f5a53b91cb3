"""Small programs with what the zoo's models do not have, for the tests of the archive reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

Build = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]]
SEQ = {"x": {1: Dim.AUTO}}


class Modes(nn.Module):
    """Operands that can carry a gradient in a body without one, bodies in bodies, several results."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(32.0).view(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        with torch.no_grad():
            z = y + self.scale
            with torch.autocast("cpu", enabled=False):
                cos, sin = (z + self.table[: x.shape[1]]).cos(), z.sin()
            w = cos * 2
        with torch.no_grad():
            w = w + y
        return y + cos + sin + w


class Casts(nn.Module):
    """Autocast switched on: casts of states and values, off inside, a body without a gradient, results from it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", torch.arange(32.0).view(8, 4))
        self.register_buffer("turn", torch.polar(torch.ones(8, 2), torch.arange(16.0).view(8, 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.linear(x) + self.table[: x.shape[1]]
            scores = (self.linear(h) @ self.table[: x.shape[1]].t()).softmax(-1)
            with torch.autocast("cpu", enabled=False):
                plain = self.linear(x).float() * self.table[: x.shape[1]]
            with torch.no_grad():
                frozen = nn.functional.linear(plain, self.linear.weight)
            turned = torch.view_as_complex(x.float().view(*x.shape[:-1], 2, 2)) * self.turn[: x.shape[1]]
            mixed = torch.cat([h, frozen], dim=-1), torch.einsum("bsd,bsd->bs", x, h), self.norm(frozen)
            wide = h.to(torch.float64) + h.mul_(2) + h.cumsum(1, dtype=torch.float64)
            seen = nn.functional.scaled_dot_product_attention(x, h, plain, attn_mask=self.table[:5, :1].expand(5, 5))
            return scores @ h, torch.view_as_real(turned), *mixed, wide, seen, nn.functional.mse_loss(x, h)


class Returned(nn.Module):
    """Results of an inlined body: a value, the same again, an input, a state, and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(32.0).view(8, 4))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            y = x + self.table[: x.shape[1]]
            z = y.cos()
        return y, z, y, x, self.table, x.shape[1]


class Results(nn.Module):
    """Calls with several results, used and unused, lists of tensors, and results that are None."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, _, third = torch.split(x, [1, 2, 1], dim=-1)
        values, _ = x.max(dim=-1)
        _, indices = torch.topk(x, 2, dim=-1)
        left, right = x.chunk(2, dim=-1)
        normed = torch.ops.aten.native_layer_norm(x, [4], None, None, 1e-5)[0]
        return first + third, values, indices, left * right, normed, torch.stack(list(x.unbind(-1)))


class Conditions(nn.Module):
    """A higher-order op that stays."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v.cos(), lambda v: v.sin() + 1, (x,))


class Unbacked(nn.Module):
    """Sizes that depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.abs().sum().long().clamp(2, 5).item()
        torch._check(count >= 2)
        torch._check(count <= 5)
        return torch.zeros(count).sum() + x.nonzero().shape[0] + x


class Shapes(nn.Module):
    """Sizes that are no polynomials, and numbers made from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64.0)[:, None], persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1]
        half = x[:, ::2] + self.table[: (length + 1) // 2].view(-1)[None, :, None]
        odd = x[:, : length // 2 - 1]
        scaled = x * (length / 7.0) * length**0.5
        tail = x[:, -min(3, length) :]
        padded = nn.functional.pad(x, (0, 0, 2 * length, 1))
        return half, odd, scaled, tail, padded.reshape(-1, x.shape[0]), x.new_zeros(max(length, 8) - 3)


class States(nn.Module):
    """Buffers: aliases, equal values, strided views of one storage, one that is written, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(32.0).view(8, 4)
        for name, value in {
            "a": base,
            "b": base.clone(),
            "same": base,
            "top": base[:4],
            "bottom": base[4:],
            "bottom_copy": base[4:].clone(),
            "turned": torch.arange(32.0).view(4, 8).t(),
            "straight": torch.arange(32.0).view(4, 8).t().contiguous(),
            "wide": torch.ones(1, 4).expand(8, 4),
            "ones": torch.ones(8, 4),
            "empty": torch.zeros(0, 4),
            "hollow": torch.zeros(0, 4),
            "count": torch.zeros((), dtype=torch.long),
            "bits": torch.ones(4, dtype=torch.bool),
            "brief": torch.ones(4, dtype=torch.bfloat16),
        }.items():
            self.register_buffer(name, value, persistent=name not in ("b", "ones"))
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        tables = self.a + self.b + self.same + self.turned + self.straight + self.wide + self.ones
        halves = self.top + self.bottom + self.bottom_copy
        x = self.tied(self.linear(x)) + self.constant + self.brief * self.bits + self.empty.sum() + self.hollow.sum()
        return x + tables[: x.shape[1]] + halves.sum()


class Writes(nn.Module):
    """Writes in place: to a new mask through views, to an operand, to a cache that is read later, through an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(16, 4), persistent=False)
        self.register_buffer("kept", torch.zeros(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.zeros(length, length, dtype=torch.int32)
        mask[:, 1:] = 1
        mask[0].fill_(2.0)
        mask.fill_diagonal_(0.5)
        mask.t().unsqueeze(0).narrow(1, 0, 2).add_(1)
        mask.permute(1, 0).masked_fill_(mask > 2, 0)
        self.cache[:length] = torch.arange(length)[:, None] * 0.5
        self.kept[:length].copy_(x[0])
        y = x + self.cache[:length]
        z = y.reshape(-1, 4) * 2
        y.mul_(2).add_(x.double())
        rows = torch.zeros(3, 4)
        rows.index_put_((torch.tensor([0, 2]),), torch.ones(2, 4))
        rows.transpose(0, 1).select(0, 1).zero_()
        return y + z.sum() + mask.float() @ x + rows.sum() + self.kept[:length]


class Inputs(nn.Module):
    """Inputs that are no tensors, nested inputs, and names that fx would not allow."""

    def forward(
        self, input: Tensor, parts: dict[str, Any], flag: bool, scale: float, label: str, missing: None, steps: int
    ) -> dict[str, Any]:
        dim = -1 if label == "last" else 0
        y = input * scale * steps if flag else input
        return {"y": y.sum(dim), "z": parts["a"] + parts["more"][0], "steps": steps, "missing": missing}


@torch.library.custom_op("archive_test::blend", mutates_args=())
def blend(x: Tensor, y: Tensor, weight: float = 0.5) -> Tensor:
    """An op of a namespace that the reader does not know."""
    return x * weight + y


@blend.register_fake
def _(x: Tensor, y: Tensor, weight: float = 0.5) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    """An op of somebody else's library."""

    def forward(self, x: Tensor) -> Tensor:
        return blend(x, x + 1, 0.25) + x


class Kinds(nn.Module):
    """Arguments of many kinds: dtypes, devices, layouts, memory formats, optional tensors, infinities."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = torch.arange(x.shape[0])
        filled = x.masked_fill(x > 1, float("-inf")).to(torch.float64, memory_format=torch.contiguous_format)
        full = torch.full((2, 3), float("nan"), dtype=torch.bfloat16, device="cpu")
        picked = x[rows, :, None]
        wave = torch.polar(x.abs(), x) * 2j
        norm = torch.linalg.vector_norm(x, ord=float("inf"), dim=[0, 1], keepdim=True)
        einsum = torch.einsum("bsd,bsd->bs", x, x)
        return filled, full, picked, wave, norm, einsum, torch.empty_like(x, layout=torch.strided).fill_(1.0)


def _x(module: nn.Module, shapes: Any = SEQ) -> Build:
    return lambda: (module, (torch.arange(40.0).view(2, 5, 4),), {}, shapes)


def _inputs() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    parts = {"a": torch.ones(2), "more": [torch.ones(2)]}
    return Inputs(), (torch.ones(2, 4), parts, True, 2.0, "last", None, 3), {}, None


MODELS: dict[str, Build] = {
    "modes": _x(Modes()),
    "casts": _x(Casts()),
    "returned": _x(Returned()),
    "results": _x(Results()),
    "conditions": _x(Conditions()),
    "unbacked": _x(Unbacked(), None),
    "shapes": _x(Shapes(), {"x": {0: Dim.AUTO, 1: Dim.AUTO}}),
    "states": _x(States()),
    "writes": _x(Writes()),
    "inputs": _inputs,
    "custom": _x(Custom()),
    "kinds": _x(Kinds()),
}


def export_model(name: str) -> ExportedProgram:
    """Exports one of ``MODELS``."""
    module, args, kwargs, shapes = MODELS[name]()
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def regions_without_outputs(program: torch.export.ExportedProgram) -> list[str]:
    """The regions (``with torch.no_grad():`` and the like) of a graph that give nothing, and may write in place.

    ``torch.export.load`` gives such a node no ``val``, and refuses the program that ``torch.export.save`` wrote.
    """
    return [
        node.name
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.meta.get("val") == ()
    ]
