"""A spec as an ``nn.Module``, its inputs, and its export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from .chains import apply_chain
from .extras import extra_inputs, join_features, loss_of, within
from .masks import attach_mask, attend, make_mask
from .reads import Inputs, Value, attach, make_table, read_rows, row_width
from .spec import CLASSES, HEAD_CONSUMERS, HEADS, TABLE_LENGTH, VOCAB, Mask, Row, Spec

NO_MASK = Mask()
_FEATURE_AXES: dict[str, dict[int, str]] = {"sample_features": {0: "batch"}, "global_features": {}}
_FEATURE_SHAPES: dict[str, Any] = {name: {dim: Dim.AUTO for dim in own} for name, own in _FEATURE_AXES.items()}


def consume(row: Row, value: Value, x: Tensor, join: nn.Linear | None) -> Tensor:
    """Data ``[B, S, W]`` that has read a value."""
    if value.seq == 0 and value.tensor.ndim == 3:  # [S, 1, W]: the data goes sequence first as well
        rows, turned = value.tensor, x.transpose(0, 1)
        return _combined(row.consumer, turned, rows, join).transpose(0, 1)
    return _combined(row.consumer, x, value.rows(), join)


def _combined(consumer: str, x: Tensor, rows: Tensor, join: nn.Linear | None) -> Tensor:
    if consumer == "add":
        return x + rows
    if consumer == "mul":
        return rows * x
    if consumer == "gate":
        return x * torch.sigmoid(rows)
    if consumer == "where":
        return torch.where(rows > 0, x, 0.5 * x)
    if consumer == "addcmul":
        return torch.addcmul(x, x, rows, value=0.5)
    if consumer == "lerp":
        return torch.lerp(x, rows.expand_as(x), 0.25)
    assert consumer == "concat" and join is not None
    return join(torch.cat([x, rows.expand_as(x)], dim=-1))


def rotate_heads(row: Row, value: Value, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, S, D]`` that have read a value of one head's width."""
    rows, turned = value.tensor, False
    if value.seq == 1 and rows.ndim == 4:  # [1, S, 1, D]: read before the heads are moved in front
        q, k, turned = q.transpose(1, 2), k.transpose(1, 2), True
    elif rows.ndim == 4:  # [1, 1, S, D]
        pass
    else:
        rows = value.rows()
        rows = rows[:, None] if rows.ndim == 3 else rows
    if row.consumer == "q_mul":
        q = q * rows
    elif row.consumer == "rope":
        q, k = (t * rows.cos() + torch.cat([-t[..., 1::2], t[..., 0::2]], -1) * rows.sin() for t in (q, k))
    else:
        q, k = (_complex_product(t, rows) for t in (q, k))
    return (q.transpose(1, 2), k.transpose(1, 2)) if turned else (q, k)


def _complex_product(x: Tensor, rows: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rows).flatten(-2)


class Layer(nn.Module):
    """Attention if the spec has any, the reads of this layer, and a linear map."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__()
        self.spec, self.number = spec, number
        self.mlp = nn.Linear(spec.width, spec.width)
        if spec.attends:
            self.qkv = nn.Linear(spec.width, 3 * spec.width)
        if any(row.consumer == "concat" and number in row.layers for row in spec.rows):
            self.join = nn.Linear(2 * spec.width, spec.width)
        for place, row in enumerate(spec.rows):
            if row.site == "own" and row.table != "computed":
                attach(self, f"table{place}", row.table, make_table(row, spec, place))
        if spec.mask and spec.mask.site == "layer":
            attach_mask(self, spec.mask, spec)
        self.register_buffer("position_ids", torch.arange(TABLE_LENGTH)[None], persistent=False)

    def forward(self, x: Tensor, inputs: Inputs, root: Net, values: dict[int, Value], mask: Tensor | None) -> Tensor:
        """``[B, S, W]`` to ``[B, S, W]``; ``values`` and ``mask`` are what the root has read already."""
        spec = self.spec
        heads: list[tuple[Row, Value]] = []
        for place, row in enumerate(spec.rows):
            if self.number not in row.layers:
                continue
            value = values[place] if place in values else root.read(place, self if row.site == "own" else root, x)
            if row.consumer in HEAD_CONSUMERS:
                heads.append((row, value))
            else:
                x = within(row.region, consume, row, value, x, getattr(self, "join", None))
                x = x.to(self.mlp.weight.dtype) if row.region == "autocast" else x
        if spec.attends:
            x = x + self.attention(x, inputs, heads, mask)
        return x + torch.tanh(self.mlp(x))

    def attention(self, x: Tensor, inputs: Inputs, heads: list[tuple[Row, Value]], made: Tensor | None) -> Tensor:
        """Self-attention with the values that its heads read."""
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        for row, value in heads:
            q, k = within(row.region, rotate_heads, row, value, q, k)
        if "arange_heads" in self.spec.distractors:
            q = q * (torch.arange(HEADS).float() + 1).view(1, HEADS, 1, 1)
        mask = self.spec.mask or NO_MASK
        if mask.site == "layer":
            made = make_mask(mask, self, inputs)
        return attend(mask, made, q, k, v).transpose(1, 2).reshape(batch, length, width)


class Net(nn.Module):
    """A tiny embedding, two layers and a linear head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.head = nn.Embedding(VOCAB, spec.width), nn.Linear(spec.width, CLASSES)
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(2))
        for place, row in enumerate(spec.rows):
            if row.site != "own" and row.table != "computed":
                attach(self, f"table{place}", row.table, make_table(row, spec, place))
        if spec.mask and spec.mask.site == "root":
            attach_mask(self, spec.mask, spec)
        self.register_buffer("position_ids", torch.arange(TABLE_LENGTH)[None], persistent=False)
        if "feature_table" in spec.distractors:
            self.register_buffer("features", torch.randn(spec.width))
        if {"token_types", "token_types_buffer"} & set(spec.distractors):
            self.types = nn.Embedding(2, spec.width)
            self.register_buffer("type_ids", torch.zeros(1, TABLE_LENGTH, dtype=torch.long))

    def read(self, place: int, holder: Any, x: Tensor) -> Value:
        """One read with its chain."""
        return within(self.spec.rows[place].region, self.read_inside, place, holder, x)

    def read_inside(self, place: int, holder: Any, x: Tensor) -> Value:
        """One read, in its region."""
        row = self.spec.rows[place]
        table = getattr(holder, f"table{place}") if row.table != "computed" else None
        value = read_rows(row, table, holder, self.given, row_width(row, self.spec))
        return apply_chain(value, row.chain, x)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        square_mask: Tensor | None = None,
        labels: Tensor | None = None,
        sample_features: Tensor | None = None,
        global_features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[B, S]`` tokens to ``[B, S, 3]``, and the loss if there is one."""
        given = {
            "ids": ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "document_ids": document_ids,
            "square_mask": square_mask,
            "sample_features": sample_features,
            "global_features": global_features,
        }
        self.given = {name: value for name, value in given.items() if value is not None}
        x = join_features(self.distract(self.embed(ids), ids), self.given)
        mask = self.spec.mask
        made = make_mask(mask, self, self.given) if mask and mask.site == "root" else None
        values = {p: self.read(p, self, x) for p, row in enumerate(self.spec.rows) if row.site == "root"}
        for layer in self.layers:
            x = layer(x, self.given, self, values, made)
        logits: Tensor = self.head(x * self.length_factor(ids))
        return logits if labels is None else (logits, loss_of(self.spec.loss, logits, labels))

    def length_factor(self, ids: Tensor) -> Any:
        """What the length itself contributes."""
        length = ids.shape[1]
        if self.spec.length == "divide":
            return 1.0 / length
        if self.spec.length == "sqrt":
            return length**-0.5
        if self.spec.length == "log":
            return torch.full((1,), length).float().log()
        return 1

    def distract(self, x: Tensor, ids: Tensor) -> Tensor:
        """Values of the sequence's size, or made by the same ops, that do not depend on where a token stands."""
        batch, length, width = x.shape
        for name in self.spec.distractors:
            if name == "zeros_like":
                x = torch.zeros_like(x) + x
            elif name == "zeros":
                x = x + torch.zeros(length, width)
            elif name == "token_types":
                x = x + self.types(torch.zeros_like(ids))
            elif name == "token_types_buffer":
                x = x + self.types(self.type_ids[:, :length].expand(batch, length))
            elif name == "arange_features":
                x = x * (torch.arange(width).float() * 0.1 + 1)
            elif name == "feature_table":
                x = x * self.features
            elif name == "batch_zeros":
                x = x + torch.zeros(batch, 1, 1)
            elif name == "full":
                x = x * torch.full((batch, length, 1), 1.5)
        return x


def make_inputs(spec: Spec, batch: int, seq: int, seed: int = 0) -> Inputs:
    """Whole inputs in natural order. Padding is on the right; positions and documents differ per sample."""
    generator = torch.Generator().manual_seed(seed)
    made = {"ids": torch.randint(1, VOCAB, (batch, seq), generator=generator)}
    lengths = torch.randint(seq - 2, seq + 1, (batch, 1), generator=generator)
    if any(row.index == "padded" for row in spec.rows):
        made["ids"] = made["ids"] * (torch.arange(seq) < lengths)
    starts = torch.randint(2, seq - 1, (batch, 1), generator=generator)
    place = torch.arange(seq).expand(batch, seq)
    later = place >= starts
    both = later[:, :, None] == later[:, None, :]
    extra = {
        "position_ids": torch.where(later, place - starts, place),
        "attention_mask": place < lengths,
        "document_ids": later.long(),
        "square_mask": both & (place[:, :, None] >= place[:, None, :]),
        **extra_inputs(batch, seq, spec.width, generator),
    }
    return made | {name: extra[name] for name in spec.inputs}


def build(spec: Spec) -> Net:
    """The module, with seeded weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(spec).eval()


def export_spec(spec: Spec) -> tuple[Net, ExportedProgram]:
    """The module and its program."""
    module = build(spec)
    inputs = make_inputs(spec, spec.batch, spec.seq)
    args, kwargs = (inputs.pop("ids"),), inputs
    shapes = None
    if spec.dynamic:
        shapes: dict[str, Any] = {n: {0: Dim.AUTO, 1: Dim.AUTO} for n in ("ids", *kwargs)}
        shapes |= {name: own for name, own in _FEATURE_SHAPES.items() if name in shapes}
        if "square_mask" in shapes:
            shapes["square_mask"][2] = Dim.AUTO
    return module, export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def axes_of(spec: Spec) -> dict[str, dict[int, str]] | None:
    """The axes of the inputs where sizes alone cannot tell them."""
    if spec.dynamic or spec.batch != spec.seq:
        return None
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", *spec.inputs)}
    axes |= {name: own for name, own in _FEATURE_AXES.items() if name in axes}
    if "square_mask" in axes:
        axes["square_mask"] = {0: "batch", 1: "seq:row", 2: "seq:col"}
    return axes
