"""The rules: every code that the library reports, with its severity, texts and examples.

Codes are stable and never reused: BL0xx a read that can be lifted and is not, BL1xx a read that cannot be lifted,
BL2xx an op that mixes the sequence, BL3xx the shape of a lifted graph, BL9xx a target that could not be checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import indent
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Rule:
    """One code.

    Attributes:
        code: ``"BL001"``.
        name: a readable name in kebab case, unique.
        severity: ``"error"`` (cannot be lifted, or broken), ``"warning"`` (a read that lifting would handle) or
            ``"note"`` (handled: never a finding of ``check``).
        message: one line.
        help: what goes wrong, and what to do.
        bad, good: Python that has the finding, and Python that has not.
    """

    code: str
    name: str
    severity: Severity
    message: str
    help: str
    bad: str
    good: str


class UnknownRuleError(ValueError):
    """No registered code, or no code with this prefix."""


def rule(code: str) -> Rule:
    """The rule of a code.

    Raises:
        UnknownRuleError: no rule has it.
    """
    found = RULES.get(code.upper())
    if found is None:
        raise UnknownRuleError(f"there is no rule {code!r}; the rules are {', '.join(RULES)}")
    return found


def check_prefixes(prefixes: Iterable[str], what: str) -> tuple[str, ...]:
    """The prefixes in capitals.

    Raises:
        UnknownRuleError: one that no code begins with.
    """
    result = []
    for prefix in prefixes:
        text = prefix.strip().upper()
        if not text or not any(code.startswith(text) for code in RULES):
            raise UnknownRuleError(f"{what}: no rule begins with {prefix!r}; the rules are {', '.join(RULES)}")
        result.append(text)
    return tuple(result)


def is_enabled(code: str, select: tuple[str, ...], ignore: tuple[str, ...]) -> bool:
    """Whether a code is reported: the longer of the prefixes that match decides, and ``ignore`` on a tie.

    An empty ``select`` selects every code.
    """
    chosen = max((len(p) for p in select if code.startswith(p)), default=-1 if select else 0)
    left_out = max((len(p) for p in ignore if code.startswith(p)), default=-1)
    return chosen > left_out


def rule_page(entry: Rule) -> str:
    """A rule as a page of text."""
    parts = [f"{entry.code} {entry.name} ({entry.severity})", entry.message, "", entry.help]
    for title, code in (("Bad", entry.bad), ("Good", entry.good)):
        parts += ["", f"{title}:", "", indent(code, "    ")]
    return "\n".join(parts)


_LIFT = """lifted = bl.lift(program)
feed = lifted.feed(batch_size=4, seq_len=16, order=order)
lifted.program.module()(tokens, **feed)"""

_ALL = (
    Rule(
        "BL001",
        "buffer-read-by-position",
        "warning",
        "a buffer or constant is read by sequence position and is not lifted",
        "The rows 0..S-1 of the table (or of what an index times the buffer gives: arange x inv_freq) are read\n"
        "whatever tokens this rank holds. When a load balancer reorders or shards the sequence (context parallelism),\n"
        "every token gets another token's row, and nothing says so. Lift the program: the rows become an input with\n"
        "a batch dim, which follows the tokens.",
        "def forward(self, x):\n    return rotate(x, self.freqs_cis[: x.shape[1]])",
        _LIFT,
    ),
    Rule(
        "BL002",
        "parameter-read-by-position",
        "warning",
        "a learned table is read by sequence position and is not lifted",
        "A position embedding is indexed by the slot of a token instead of its position. Lifting makes the index\n"
        "an input; the table stays a parameter and keeps its gradient.",
        "def forward(self, tokens):\n    return self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))",
        _LIFT,
    ),
    Rule(
        "BL003",
        "index-made-in-graph",
        "warning",
        "an index or length along the sequence is made in the graph and is not lifted",
        "arange, cumsum over ones, or the length of the sequence itself gives each rank 0..S_local-1 (or its own\n"
        "length) under a sharded sequence. Lifting replaces the index by an input with the tokens' positions. An\n"
        "index that meets a buffer or parameter on its way is reported by that (BL001, BL002).",
        "def forward(self, x):\n"
        "    position = torch.arange(x.shape[1])[:, None]\n    return x * (position / 10000).cos()",
        _LIFT,
    ),
    Rule(
        "BL004",
        "causal-flag",
        "warning",
        "is_causal=True goes by the order of the slots",
        "The flag masks by place in memory. Under a reordered sequence a token then attends to later ones.\n"
        "context_parallel replaces the flag by a mask over the lifted slots.",
        "def forward(self, q, k, v):\n    return F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "lifted = bl.context_parallel(bl.lift(program), size=1)",
    ),
    Rule(
        "BL005",
        "input-read-by-slot",
        "warning",
        "a value made from user inputs is read along the sequence and is not lifted",
        "The value (a mask from padding, an index from position ids) was computed from whole inputs by ops that\n"
        "look along the sequence, so it cannot be computed from a shard. Lifting computes it in the feed, from the\n"
        "whole inputs, and gathers its rows by the order.",
        "def forward(self, tokens, mask):\n    return self.wte(tokens) + self.wpe(mask.cumsum(1) - 1)",
        "lifted = bl.lift(program)\nfeed = lifted.feed(batch_size=4, seq_len=16, inputs={'mask': mask}, order=order)",
    ),
    Rule(
        "BL006",
        "natural-order-value",
        "warning",
        "a value is read by position that can only be lifted in natural order",
        "Its chain cannot be rebuilt from lifted inputs. Lifting keeps the whole value in the stage and gathers it\n"
        "along its axes: correct, and memory for [S, S], or for all S rows that are made of rows of a parameter (a\n"
        "cumsum). A value computed from a difference of positions by local ops is lifted without that.",
        "def forward(self, x):\n"
        "    bias = self.bias[: x.shape[1], : x.shape[1]].cumsum(0)\n    return (x @ x.mT + bias).softmax(-1) @ x",
        "def forward(self, x, positions):\n"
        "    bias = -(positions[:, :, None] - positions[:, None]).abs()\n    return (x @ x.mT + bias).softmax(-1) @ x",
    ),
    Rule(
        "BL007",
        "flex-block-mask",
        "warning",
        "the mask or score function of flex_attention looks at slots and is not lifted",
        "q_idx and kv_idx are places in memory. Lifting looks them up in the lifted slots; the block mask becomes\n"
        "one block that is never skipped, so masked blocks cost time.",
        "def causal(b, h, q_idx, kv_idx):\n    return q_idx >= kv_idx",
        "lifted = bl.lift(program)",
    ),
    Rule(
        "BL101",
        "mutated-state",
        "error",
        "a buffer that is read by position is written by the graph",
        "A KV cache or a counter: its rows depend on earlier calls, so no feed can make them.",
        "model = AutoModelForCausalLM.from_config(config)  # use_cache=True\n"
        "program = torch.export.export(model, args)",
        "config.use_cache = False\nmodel = AutoModelForCausalLM.from_config(config)",
    ),
    Rule(
        "BL102",
        "written-in-place",
        "error",
        "the storage of a value that is read by position is written in place",
        "What a view shows then depends on the order of the writes, which is not analysed.",
        "def forward(self, x):\n"
        "    mask = torch.zeros(x.shape[1], x.shape[1])\n    mask.diagonal().fill_(1.0)\n"
        "    return (x @ x.mT + mask).softmax(-1) @ x",
        "def forward(self, x):\n    return (x @ x.mT + torch.eye(x.shape[1])).softmax(-1) @ x",
    ),
    Rule(
        "BL103",
        "ambiguous-axes",
        "error",
        "which dims run along the batch and the sequence is not known",
        "Two dims of the example inputs have one size, or an input has the length of another. Name them by axes=\n"
        "(--axes on the command line), or export with distinct sizes or dynamic dims.",
        "tokens, weight = torch.zeros(8, 8, dtype=torch.long), torch.ones(8)  # of each sample, or of each position?\n"
        "program = torch.export.export(model, (tokens, weight))",
        'bl.scan(program, axes={"tokens": {0: "batch", 1: "seq"}, "weight": {0: "batch"}})',
    ),
    Rule(
        "BL104",
        "length-in-data",
        "error",
        "a number computed from the sequence length or from data cannot be lifted",
        "The number (a result, a scale, an offset) would be this shard's, and it is used in a way that cannot be\n"
        "given the whole length.",
        "def forward(self, x):\n    return x, x.shape[1]",
        "def forward(self, x):\n    return x",
    ),
    Rule(
        "BL105",
        "read-not-liftable",
        "error",
        "a read by sequence position goes through an op that cannot be lifted",
        "An op between the source of positions and the data has no rule, or looks along the sequence.\n"
        "`buffer-lifting scan --explain` shows where the analysis stops. Compute the value in another way, or lift\n"
        "with strict=False and feed it yourself.",
        "def forward(self, x):\n    return x + self.wpe.weight[: x.shape[1]].flip(0)",
        "def forward(self, x):\n    return x + self.wpe.weight.flip(0)[: x.shape[1]]",
    ),
    Rule(
        "BL106",
        "no-sequence-axis",
        "error",
        "no input has a sequence axis",
        "Nothing says which token stands where: give the axes of the inputs by axes=.",
        "report = bl.scan(export(model, (features,)))  # [64, 512]: is a row a token, or a sample?",
        'report = bl.scan(export(model, (features,)), axes={"x": {0: "seq"}})',
    ),
    Rule(
        "BL107",
        "axis-born-inside",
        "error",
        "the sequence axis is born inside the graph",
        "Image patches, or a projection of a flat input: no input can be sharded along it. Export the part of the\n"
        "model behind the embedding, whose input is [batch, seq, features].",
        "def forward(self, image):\n    return self.encoder(self.patches(image).flatten(2).transpose(1, 2))",
        "def forward(self, patches):\n    return self.encoder(patches)",
    ),
    Rule(
        "BL108",
        "positions-from-data",
        "error",
        "positions are computed from differentiable data",
        "A number that depends on activations is part of what is read by position, so that no feed can make the rows:\n"
        "give positions as an input, or compute them from user inputs alone.",
        "def forward(self, x):\n"
        "    start = self.pointer(x)[0, 0].argmax().item()\n"
        "    torch._check(start >= 0)\n    torch._check(start + x.shape[1] < 64)\n"
        "    return x + self.table[start : start + x.shape[1]]",
        "def forward(self, x, positions):\n    return x + self.table[positions]",
    ),
    Rule(
        "BL200",
        "mixing-handled",
        "note",
        "an op mixes the sequence and is handled",
        "Attention, or tokens routed to experts and back: the op stays right under a reordered sequence. `scan`\n"
        "counts these ops; `check` does not report them.",
        "y = F.scaled_dot_product_attention(q, k, v)",
        "y = F.scaled_dot_product_attention(q, k, v)",
    ),
    Rule(
        "BL201",
        "sequence-mixing",
        "error",
        "an op mixes the sequence or the batch of data, which sharding or microbatches would break",
        "A convolution, scan, pooling or a pick of the first token along the sequence sees neighbours in memory,\n"
        "which are other tokens once the sequence is reordered.",
        "def forward(self, x):\n    return x.cumsum(1)",
        "def forward(self, x):\n    return F.scaled_dot_product_attention(x, x, x)",
    ),
    Rule(
        "BL202",
        "unknown-on-sequence",
        "error",
        "what an op does along the sequence is not known",
        "The op has no axis rule, or data meets data in a way that is not understood. Nothing is assumed of it.\n"
        "CONTRIBUTING.md says how to add a rule.",
        "y = torch.ops.mylib.fused_block(x, weight)",
        "y = F.silu(x @ gate) * (x @ up)",
    ),
    Rule(
        "BL203",
        "not-on-several-ranks",
        "error",
        "an op is right on one context-parallel rank and not on several",
        "Attention dropout, flex_attention, or scores that need the queries of all ranks: `context_parallel` with a\n"
        "size above 1 raises it, and size 1 takes the program.",
        "y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)",
        "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
    ),
    Rule(
        "BL301",
        "no-batch-broadcast",
        "error",
        "a lifted placeholder is not followed by exactly one batch-broadcast node",
        "Every lifted input is expanded to the data's batch size once, and read only below that node. Without it a\n"
        "tensor of another batch size passes silently by broadcasting.",
        "freqs = graph.placeholder('lifted_freqs_cis')\ngraph.call_function(torch.ops.aten.mul.Tensor, (x, freqs))",
        "freqs = graph.placeholder('lifted_freqs_cis')\n"
        "spread = graph.call_function(torch.ops.aten.expand.default, (freqs, [batch, -1, -1]))\n"
        "graph.call_function(torch.ops.aten.mul.Tensor, (x, spread))",
    ),
    Rule(
        "BL302",
        "batch-not-first",
        "error",
        "the batch dim of a lifted placeholder is not dim 0",
        "A schedule cuts keywords along dim 0, and the feed makes [batch, seq, *row].",
        "lifted_freqs_cis: [S, B, 8]",
        "lifted_freqs_cis: [B, S, 8]",
    ),
    Rule(
        "BL303",
        "position-crosses-stages",
        "error",
        "a value made from positions alone crosses a stage boundary",
        "It is sent with every microbatch, and its gradient is sent back, although each stage could be fed it or\n"
        "compute it. Only activations should cross.",
        "hidden, cos = stage_0(tokens, freqs)\nlogits = stage_1(hidden, cos)",
        "hidden = stage_0(tokens, freqs)\nlogits = stage_1(hidden, freqs)",
    ),
    Rule(
        "BL304",
        "specialised-length",
        "warning",
        "the sequence length is a constant, although other dims are dynamic",
        "The export fixed the length to that of its example (rows of a fixed number that meet every token do that),\n"
        "so no other length and no shard can be fed. Take as many rows as there are tokens, or export with a static\n"
        "batch too if one size is meant.",
        "def forward(self, tokens):\n    return self.wte(tokens) + self.table[:16]  # exported with 16 tokens",
        "def forward(self, tokens):\n    return self.wte(tokens) + self.table[: tokens.shape[1]]",
    ),
    Rule(
        "BL901",
        "could-not-check",
        "error",
        "the target could not be checked",
        "The file cannot be read, is damaged or of another version, or the callable failed. The exit code is 2, also\n"
        "when other targets were fine.",
        "buffer_lifting.check  # of a truncated model.pt2",
        "torch.export.save(program, 'model.pt2')",
    ),
)
#: Code -> rule, in order.
RULES: dict[str, Rule] = {entry.code: entry for entry in _ALL}
