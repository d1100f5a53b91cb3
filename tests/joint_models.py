"""Small models that read by position in the ways that a backward pass has to follow, and how they are captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

VOCABULARY, WIDTH = 61, 8


class Base(nn.Module):
    """Token embedding and head; ``body`` is what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Sliced(Base):
    """Rows of a parameter ``[1, rows, width]``, from ``start`` on; all of them without a slice."""

    def __init__(self, rows: int = 16, start: int = 0, whole: bool = False) -> None:
        super().__init__()
        self.positions, self.start, self.whole = nn.Parameter(torch.randn(1, rows, WIDTH)), start, whole

    def body(self, x: Tensor) -> Tensor:
        return x + (self.positions if self.whole else self.positions[:, self.start : self.start + x.shape[1]])


class Indexed(Base):
    """Rows of a parameter, by an index with an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        return x + self.positions[torch.arange(x.shape[1]) + 2]


class Scaled(Base):
    """Rows of an embedding, scaled by rows of a buffer, read twice."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, WIDTH)
        self.register_buffer("scale", torch.rand(16, 1))

    def body(self, x: Tensor) -> Tensor:
        rows = self.positions(torch.arange(x.shape[1])) * self.scale[: x.shape[1]]
        return torch.sigmoid(x + rows) * rows


class Projected(Base):
    """Rows of an embedding behind a projection: no sum over samples can be put off through it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.projection = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        return x + self.projection(self.positions(torch.arange(x.shape[1])))


class Attention(Base):
    """Attention with a bias: ALiBi, or learned by distance."""

    slopes: Tensor

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.distances = nn.Embedding(4, 2) if learned else None
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))

    def body(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = self.qkv(x).view(batch, length, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        index = torch.arange(length)
        distance = index[:, None] - index
        if self.distances is not None:
            bias = self.distances(distance.clamp(0, 3)).permute(2, 0, 1)
            scores = (q @ k.transpose(-1, -2) + bias).masked_fill(distance < 0, -torch.inf)
            out = scores.softmax(-1) @ v
        else:
            bias = -self.slopes[:, None, None] * distance.clamp(min=0)
            bias = bias + torch.full((length, length), -torch.inf).triu(1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(batch, -1, -1, -1))
        return x + out.transpose(1, 2).flatten(2)


class Convolved(Base):
    """A convolution along the sequence, which no order survives."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.mix = nn.Embedding(16, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1]))
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


def capture(model: nn.Module, *args: Any, dynamo: bool = False, dynamic: bool = False) -> Any:
    """``aot_export_joint_with_descriptors``, behind Dynamo where the sizes are to be symbols."""
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
    from torch._guards import tracing

    with contextlib.ExitStack() as stack:
        module = model
        if dynamo or dynamic:
            for arg in args:
                for dim in range(arg.dim() if dynamic else 0):
                    torch._dynamo.mark_dynamic(arg, dim)
            module = dynamo_graph_capture_for_export(model)(*args)
            stack.enter_context(tracing(module.meta["tracing_context"]))
        return aot_export_joint_with_descriptors(stack, module, args, {})


def call(gm: GraphModule, model: nn.Module, *args: Tensor) -> list[Any]:
    """The flat inputs of a joint graph: state of the model, ``args``, and random tangents."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    draw, given = torch.Generator().manual_seed(1), iter(args)
    sizes: dict[str, int] = {}
    values: list[Any] = []
    for node in (node for node in gm.graph.nodes if node.op == "placeholder"):
        descriptor, example = node.meta["desc"], node.meta["val"]
        if descriptor.is_param() or descriptor.is_buffer():
            values.append(state[descriptor.target].detach())
        elif descriptor.is_tangent():
            shape = [int(sizes.get(str(size), size)) for size in example.shape]
            values.append(torch.randn(shape, generator=draw))
        elif isinstance(example, torch.Tensor):
            values.append(next(given))
            sizes.update({str(size): have for size, have in zip(example.shape, values[-1].shape, strict=True)})
        else:
            values.append(str(example))  # a size, known from the tensors behind it
    return [sizes[value] if isinstance(value, str) else value for value in values]


def frozen(gm: GraphModule) -> Callable[[], bool]:
    """Whether a graph module is, when asked, what it is now."""

    def state() -> tuple[Any, ...]:
        nodes = [(n, n.name, n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in gm.graph.nodes]
        return gm.code, nodes, dict(gm.meta), list(gm.state_dict())

    before = state()
    return lambda: all(a == b for a, b in zip(state(), before, strict=True))
