"""The layers of ``routing_models`` with one line wrong: each token's result depends on the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from routing_models import COPIES, DIM, EXPERTS, Copies, Experts, Grouped, GroupedSplit, Loop, LoopReadWrite
from torch import Tensor
from torch.nn import Parameter


class NotUnsorted(Grouped):
    """The rows stay in the order of the experts."""

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows


class UnsortedByOrder(Grouped):
    """The order itself in the place of its inverse."""

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows[order]


class InverseOfAnotherSort(Grouped):
    """The inverse of the order of the weights."""

    def tokens(self, x: Tensor) -> Tensor:
        self.other = torch.argsort(torch.argsort(self.route(x)[0].reshape(-1)))
        return super().tokens(x)

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        return rows[self.other]


class AddedToOtherTokens(Grouped):
    """Rows are added to the places that the order names, of the first tokens."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return torch.zeros(count, DIM).index_add(0, order % count, rows)


class AddedToTheirNumber(Grouped):
    """Rows are added by their number."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return torch.zeros(count, DIM).index_add(0, torch.arange(order.size(0)) // COPIES, rows)


class FetchedUndivided(Grouped):
    """Tokens are fetched by slots modulo their number."""

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order % x.shape[0]]


class FetchedByAnother(Grouped):
    """Tokens are fetched by twice the number of copies."""

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // (2 * COPIES)]


class RunningSumOfRows(Grouped):
    """A running sum over the rows."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows.cumsum(0)


class SoftmaxOverRows(Grouped):
    """A softmax over the rows."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows.softmax(0)


class NormOverRows(Grouped):
    """Rows minus their mean."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class SumOfAllRows(Grouped):
    """Rows divided by the sum of all elements."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows / rows.abs().sum()


class ShiftedRows(Grouped):
    """Rows and the rows before them."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows + rows.roll(1, 0)


class AttentionAmongRows(Grouped):
    """Rows attend to each other."""

    def rows(self, rows: Tensor) -> Tensor:
        return (rows @ rows.t()).softmax(-1) @ rows


class SdpaAmongRows(Grouped):
    """The same, by the fused op."""

    def rows(self, rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rows[None], rows[None], rows[None])[0]


class NumberOfRow(Grouped):
    """The number of its row is added."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows + torch.arange(rows.shape[0])[:, None] * 0.01


class PlaceOfRow(Grouped):
    """The slot of its row is added."""

    def tokens(self, x: Tensor) -> Tensor:
        _, self.order_now = torch.sort(self.route(x)[1].reshape(-1))
        return super().tokens(x)

    def rows(self, rows: Tensor) -> Tensor:
        return rows + self.order_now[:, None] * 0.01


class OwnPlaceOfRow(Grouped):
    """The slot of its row, from the order of the same sort, is added."""

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // COPIES] + order[:, None] * 0.01


class PlaceAsExpert(Grouped):
    """A bias chosen by the slot, not by the expert."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = Parameter(torch.randn(200, DIM))

    def fetch(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // COPIES] + self.bias[order]


class InverseAsData(Grouped):
    """The row that a slot went to is added."""

    def back(self, rows: Tensor, order: Tensor) -> Tensor:
        inverse = torch.argsort(order)
        return rows[inverse] + inverse[:, None] * 0.01


class Capacity(Grouped):
    """Only the first rows of the whole are kept."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows * (torch.arange(rows.shape[0]) < rows.shape[0] // 2)[:, None]


class CapacityBySlice(Grouped):
    """The first rows are kept, the others are zero."""

    def rows(self, rows: Tensor) -> Tensor:
        half = rows.shape[0] // 2
        return torch.cat([rows[:half], torch.zeros_like(rows[half:])])


class CapacityByRank(Experts):
    """A token is dropped if more than four tokens before it chose the same expert."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        hot = F.one_hot(ids[:, 0], EXPERTS)
        keep = ((hot.cumsum(0) * hot).sum(-1) <= 4).float()
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            out = out + self.one(x, expert) * (weights * (ids == expert)).sum(-1, keepdim=True)
        return out * keep[:, None]


class AuxiliaryLoss(Grouped):
    """The mean of the router's probabilities over the tokens joins the result."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.gate(x).softmax(-1).mean(0).pow(2).sum()


class CountsInTheData(Grouped):
    """The number of tokens per expert joins the result."""

    def tokens(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        share = torch.histc(ids.reshape(-1).float(), bins=EXPERTS, min=0, max=EXPERTS - 1) / ids.numel()
        return super().tokens(x) + share.sum()


class BalancedBias(Experts):
    """Experts that many tokens chose are chosen less."""

    def tokens(self, x: Tensor) -> Tensor:
        _, ids = self.route(x)
        counts = F.one_hot(ids.reshape(-1), EXPERTS).sum(0)
        weights = (self.gate(x) - counts.float()).softmax(-1)
        return sum((self.one(x, e) * weights[:, e : e + 1] for e in range(EXPERTS)), torch.zeros_like(x))


class ExpertsChoose(Experts):
    """Each expert takes its best tokens."""

    def tokens(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        best, tokens = torch.topk(scores.t(), 4, dim=-1)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            rows = self.one(x[tokens[expert]], expert) * best[expert][:, None]
            out = out.index_add(0, tokens[expert], rows)
        return out


class OtherCounts(Grouped):
    """The groups are cut by the counts of the first copies."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        _, order = self.order(ids.reshape(-1))
        rows = self.grouped(self.fetch(x, order), self.offsets(ids[:, 0]) * COPIES)
        return self.combine(rows * weights.reshape(-1)[order, None], order, x.shape[0])


class OtherKey(Grouped):
    """The groups are cut by the counts of ids that another router chose."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        _, order = self.order(ids.reshape(-1))
        other = self.route(x.flip(-1))[1].reshape(-1)
        rows = self.grouped(self.fetch(x, order), self.offsets(other))
        return self.combine(rows * weights.reshape(-1)[order, None], order, x.shape[0])


class Descending(Grouped):
    """Sorted the other way round: the first group is the last expert's only if all have as many rows."""

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.sort(ids, descending=True)
        return values, order


class SortedByWeight(Grouped):
    """Sorted by something else than what is counted."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        order = torch.argsort(weights.reshape(-1))
        rows = self.grouped(self.fetch(x, order), self.offsets(ids.reshape(-1)))
        return self.combine(rows * weights.reshape(-1)[order, None], order, x.shape[0])


class FewerBins(Grouped):
    """Counted in bins wider than one expert."""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=EXPERTS, min=0, max=2 * EXPERTS)


class NotSummedUp(Grouped):
    """The counts themselves as offsets."""

    def offsets(self, ids: Tensor) -> Tensor:
        return self.counts(ids).to(torch.int32)


class OffsetsShifted(Grouped):
    """Offsets moved by one row."""

    def offsets(self, ids: Tensor) -> Tensor:
        return (super().offsets(ids) + 1).clamp(max=ids.numel()).to(torch.int32)


class FixedGroups(Grouped):
    """Groups of one size, whatever the experts."""

    def offsets(self, ids: Tensor) -> Tensor:
        return torch.tensor([16, 32, 48, 66], dtype=torch.int32)


class WrappedIds(Grouped):
    """Sorted by ids, counted by ids of which two are the same expert."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        _, order = self.order(ids.reshape(-1))
        rows = self.grouped(self.fetch(x, order), self.offsets(ids.reshape(-1).clamp(max=2)))
        return self.combine(rows * weights.reshape(-1)[order, None], order, x.shape[0])


class SplitElsewhere(GroupedSplit):
    """The parts are joined in another order."""

    def grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        parts = rows.split(offsets.tolist(), dim=0)
        return torch.cat([self.one(part, expert) for expert, part in enumerate(parts)][::-1])


class SplitMean(GroupedSplit):
    """Each part minus its mean."""

    def one(self, rows: Tensor, expert: int) -> Tensor:
        return super().one(rows - rows.sum(0), expert)


class SplitByNumber(GroupedSplit):
    """Each part divided by its number of rows."""

    def one(self, rows: Tensor, expert: int) -> Tensor:
        return super().one(rows, expert) / (rows.shape[0] + 1)


class LoopMean(Loop):
    """The rows of an expert minus their mean."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows - rows.sum(0)


class LoopByNumber(Loop):
    """The rows of an expert divided by their number."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows / (rows.shape[0] + 1)


class LoopByNumberInAFill(Loop):
    """The same, the number in a tensor."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows / torch.full((1,), rows.shape[0] + 1)


class LoopRunningSum(Loop):
    """A running sum over the rows of an expert."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows.cumsum(0)


class LoopNumbered(Loop):
    """The number of its row is added."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows + torch.arange(rows.shape[0])[:, None]


class LoopSwapped(Loop):
    """The weights of another expert's tokens: rows and copies swapped."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for expert, mask in enumerate(self.masks(ids)):
            token, copy = torch.where(mask)
            out = self.put(out, copy, self.one(x[token], expert) * weights[token, copy, None])
        return out


class LoopTokenNumber(Loop):
    """The number of the token is added."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for expert, mask in enumerate(self.masks(ids)):
            token, copy = torch.where(mask)
            out = self.put(out, token, self.one(x[token], expert) * weights[token, copy, None] + token[:, None])
        return out


class LoopLastWins(LoopReadWrite):
    """Rows are written, though a token may occur twice: the copies of a token are not known to differ."""

    def masks(self, ids: Tensor) -> Tensor:
        return super().masks(ids // 2)


class LoopSampleAndToken(Experts):
    """Rows fetched by their place in the sequence alone, from every sample."""

    def forward(self, x: Tensor) -> Tensor:
        mask = self.gate(x).argmax(-1) == 1
        _, place = torch.where(mask)
        return x.index_add(1, place, self.one(x[:, place], 0))


class CopiesOfOthers(Copies):
    """The copies lie next to other tokens' copies."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        rows, flat = x.repeat(COPIES, 1), ids.reshape(-1)
        hidden = F.silu(torch.bmm(rows.unsqueeze(1), self.up[flat]))
        out = torch.bmm(hidden, self.down[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(-1, COPIES, DIM).sum(1)


class SortedTokens(Experts):
    """Each sample's tokens in the order of a score, which nothing undoes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.sort(dim=1)[0], 0)


class SortedScores(Experts):
    """The sorted scores of all tokens, at the tokens' places."""

    def tokens(self, x: Tensor) -> Tensor:
        return x * self.gate(x)[:, 0].sort()[0][:, None]


class RankOfToken(Experts):
    """Each token's rank by a score."""

    def tokens(self, x: Tensor) -> Tensor:
        rank = torch.argsort(torch.argsort(self.gate(x)[:, 0]))
        return x * rank[:, None]


class WrittenUnderAnotherName(Grouped):
    """The order is changed through a view after it was made."""

    def order(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.sort(ids)
        order.view(-1, 1)[:1].fill_(0)
        return values, order


class IdsChangedAfterTheSort(Grouped):
    """The ids are changed in place between the sort and the count."""

    def tokens(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        _, order = self.order(flat)
        ids.clamp_(max=2)
        rows = self.grouped(self.fetch(x, order), self.offsets(flat))
        return self.combine(rows * weights.reshape(-1)[order, None], order, x.shape[0])


class WrittenTwice(Grouped):
    """Both copies of a token are written to its row: the last one stays."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        out = torch.zeros(count, DIM)
        out[order // COPIES] = rows
        return out


class LargerAccumulator(Grouped):
    """The accumulator has a row more, and loses its first."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return torch.zeros(count + 1, DIM).index_add(0, order // COPIES, rows)[1:]


class PositionsInTheAccumulator(Grouped):
    """The rows are added to the numbers of the tokens."""

    def combine(self, rows: Tensor, order: Tensor, count: int) -> Tensor:
        return torch.arange(count)[:, None].float().expand(count, DIM).clone().index_add(0, order // COPIES, rows)


WRONG = [
    value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, Experts) and value.__module__ == __name__
]
