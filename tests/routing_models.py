"""Mixture-of-experts layers of the styles that models are written in, and the same with one line wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

VOCAB, DIM, HIDDEN, EXPERTS, COPIES, TABLE = 31, 8, 16, 4, 2, 40


class Experts(nn.Module):
    """A router and the weights of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) * 0.3)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and expert ids, ``[tokens, copies]``."""
        weights, ids = torch.topk(self.gate(x).softmax(-1), COPIES, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def one(self, rows: Tensor, expert: int) -> Tensor:
        """Rows through one expert."""
        return F.silu(rows @ self.up[expert]) @ self.down[expert]

    def grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by expert through their experts."""
        hidden = F.silu(torch._grouped_mm(rows.bfloat16(), self.up.bfloat16(), offs=offsets))
        return torch._grouped_mm(hidden, self.down.bfloat16(), offs=offsets).type_as(rows)

    def tokens(self, x: Tensor) -> Tensor:
        """What a style does with ``[tokens, dim]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, seq, dim]``."""
        return self.tokens(x.reshape(-1, DIM)).view(x.shape)


class Grouped(Experts):
    """Sort, grouped products, inverse permutation, sum over a token's copies."""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The ids in order, and the order."""
        values, order = torch.sort(ids)
        return values, order

    def offsets(self, ids: Tensor) -> Tensor:
        return torch.cumsum(self.counts(ids), 0, dtype=torch.int32)

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // COPIES]

    def rows(self, rows: Tensor) -> Tensor:
        """A change of the routed rows."""
        return rows

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0))
        return rows[inverse]

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return self.back(rows, order).view(count, COPIES, DIM).sum(1)

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        values, order = self.order(ids.reshape(-1))
        rows = self.rows(self.grouped(self.fetch(x, order), self.offsets(values)))
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        return self.combine(rows, order, x.shape[0])


class GroupedArgsort(Grouped):
    """The inverse by a second argsort, counts from unsorted ids."""

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids, torch.argsort(ids, stable=True)

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows[torch.argsort(order)]


class GroupedViewOfInverse(Grouped):
    """Each token picks its copies' rows at once."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return rows[torch.argsort(order).view(count, COPIES)].sum(1)


class GroupedIndexAdd(Grouped):
    """The rows are added to an accumulator of the tokens."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return torch.zeros(count, DIM).index_add(0, order // COPIES, rows)


class GroupedScatterAdd(Grouped):
    """The same with wide indices, fetched by gather."""

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x.gather(0, (order // COPIES).reshape(-1, 1).expand(-1, DIM))

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        index = (order // COPIES).reshape(-1, 1).expand(-1, DIM)
        return torch.zeros(count, DIM).scatter_add_(0, index, rows)


class GroupedIndexPut(Grouped):
    """The rows are written to their slots."""

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        slots = torch.zeros_like(rows)
        slots[order] = rows
        return slots


class GroupedIndexSelect(Grouped):
    """Fetched and put back by index_select; the inverse by scatter."""

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(0, order.div(COPIES, rounding_mode="floor"))

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        inverse = torch.zeros_like(order).scatter_(0, order, torch.arange(order.size(0)))
        return rows.index_select(0, inverse)


class GroupedMapCounts(Grouped):
    """Counts as the sum of a map of tokens to experts."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        chosen = torch.zeros(x.shape[0], EXPERTS, dtype=torch.bool).scatter_(-1, ids, True)
        offsets = torch.cumsum(chosen.sum(0), 0, dtype=torch.int32)
        _, order = self.order(ids.reshape(-1))
        rows = self.rows(self.grouped(self.fetch(x, order), offsets))
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        return self.combine(rows, order, x.shape[0])


class GroupedOneHotCounts(Grouped):
    """Counts as the sum of one-hots."""

    def counts(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, EXPERTS).sum(0)


class GroupedSplit(Grouped):
    """The sorted rows cut by their counts, a product each, and joined."""

    def grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        parts = rows.split(offsets.tolist(), dim=0)
        return torch.cat([self.one(part, expert) for expert, part in enumerate(parts)])

    def offsets(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, EXPERTS).sum(0)


class GroupedModules(GroupedSplit):
    """The same, each expert a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def one(self, rows: Tensor, expert: int) -> Tensor:
        return self.each[expert](rows)


class GroupedBias(Grouped):
    """A bias of each row's expert."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS, DIM))

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        values, order = self.order(ids.reshape(-1))
        rows = self.grouped(self.fetch(x, order), self.offsets(values)) + self.bias[values]
        return self.combine(F.layer_norm(rows, (DIM,)) * weights.reshape(-1)[order, None], order, x.shape[0])


class Loop(Experts):
    """Each expert takes the tokens that chose it and adds to their rows."""

    def masks(self, ids: Tensor) -> Tensor:
        """``[experts, tokens, copies]``."""
        return (ids.unsqueeze(-1) == torch.arange(EXPERTS)).permute(2, 0, 1)

    def put(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add(0, token, rows)

    def rows(self, rows: Tensor) -> Tensor:
        return rows

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for expert, mask in enumerate(self.masks(ids)):
            token, copy = torch.where(mask)
            rows = self.rows(self.one(x[token], expert)) * weights[token, copy, None]
            out = self.put(out, token, rows)
        return out


class LoopModules(Loop):
    """Each expert a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def one(self, rows: Tensor, expert: int) -> Tensor:
        return self.each[expert](rows)


class LoopInPlace(Loop):
    """The accumulator is written in place."""

    def put(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add_(0, token, rows)


class LoopReadWrite(Loop):
    """Each expert reads the rows, adds and writes them."""

    def put(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        out[token] += rows
        return out


class LoopOneHot(Loop):
    """The masks from one-hots."""

    def masks(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, EXPERTS).permute(2, 0, 1)


class LoopNonzero(Loop):
    """Columns of nonzero; the shared expert's output is what is added to."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.tanh(x)
        for expert, mask in enumerate(self.masks(ids)):
            places = mask.nonzero()
            token, copy = places[:, 0], places[:, 1]
            out = self.put(out, token, self.one(x[token], expert) * weights[token, copy, None])
        return out


class LoopBoolean(Experts):
    """Rows selected and written by a mask of the tokens."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            chosen = ids == expert
            mask, weight = chosen.any(-1), (weights * chosen).sum(-1)
            out[mask] = out[mask] + self.one(x[mask], expert) * weight[mask].unsqueeze(-1)
        return out


class Dense(Experts):
    """Every expert on every token, weighted by a mask."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            out = out + self.one(x, expert) * (weights * (ids == expert)).sum(-1, keepdim=True)
        return out


class DenseScatter(Experts):
    """All tokens to all experts at once, the weights scattered along the experts."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        gates = torch.zeros(x.shape[0], EXPERTS).scatter_(1, ids, weights)
        rows = x.repeat(EXPERTS, 1) * gates.t().reshape(-1, 1)
        hidden = F.silu(torch.bmm(rows.view(EXPERTS, -1, DIM), self.up))
        return torch.bmm(hidden, self.down).sum(0)


class Copies(Experts):
    """Each token once for each of its experts, with that expert's weights."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        rows, flat = x.repeat_interleave(COPIES, dim=0), ids.reshape(-1)
        hidden = F.silu(torch.bmm(rows.unsqueeze(1), self.up[flat]))
        out = torch.bmm(hidden, self.down[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(-1, COPIES, DIM).sum(1)


class Shared(Grouped):
    """Grouped, beside an expert that takes every token, with group-limited choice of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(DIM, DIM)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).sigmoid()
        groups = scores.view(-1, 2, EXPERTS // 2).amax(-1)
        best = torch.topk(groups, 1, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(groups).scatter_(1, best, 1)
        wide = mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
        ids = torch.topk(scores.masked_fill(~wide.bool(), float("-inf")), COPIES, dim=-1, sorted=False)[1]
        return scores.gather(1, ids), ids

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.shared(x)


class Model(nn.Module):
    """Embedding, a position table, and layers of causal attention and experts."""

    def __init__(self, style: type[Experts], layers: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, DIM), nn.Parameter(torch.randn(TABLE, DIM))
        self.layers = nn.ModuleList(Layer(style) for _ in range(layers))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, style: type[Experts]) -> None:
        super().__init__()
        self.qkv, self.experts = nn.Linear(DIM, 3 * DIM), style()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        length = torch.arange(x.shape[1])
        x = x + F.scaled_dot_product_attention(q, k, v, length[None] <= length[:, None]).squeeze(1)
        return x + self.experts(F.layer_norm(x, (DIM,)))


def export(style: type[Experts], dynamic: bool, layers: int = 2) -> ExportedProgram:
    """A model of a style, exported."""
    torch.manual_seed(0)
    model = Model(style, layers).eval()
    shapes = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    ids = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
    return torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=False)


RIGHT = [
    Grouped,
    GroupedArgsort,
    GroupedViewOfInverse,
    GroupedIndexAdd,
    GroupedScatterAdd,
    GroupedIndexPut,
    GroupedIndexSelect,
    GroupedMapCounts,
    GroupedOneHotCounts,
    GroupedSplit,
    GroupedModules,
    GroupedBias,
    Loop,
    LoopModules,
    LoopInPlace,
    LoopReadWrite,
    LoopOneHot,
    LoopNonzero,
    LoopBoolean,
    Shared,
]
LOCAL = [Dense, DenseScatter, Copies]  # nothing is routed: each op is local in a token
