"""What values by position are computed by, as texts that outlive edits elsewhere in the program.

A text has ops, FQNs, sizes by the names of the axes (``slice('table', dim=0, start=1, end=seq + 1)``), and no node's
name or size symbol. A long one is cut short and ends with a digest of the whole, in which numbered layers count as
one: the equal masks of all layers have one text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from buffer_lifting.graph.record import Arg, GraphRecord, Node, NodeKind, Opaque, Ref, ScalarMeta, StateKind
from buffer_lifting.graph.sizes import Size
from buffer_lifting.ops import content_operands

#: Characters of a text that is not cut short.
LIMIT = 96
_MORE = "…"
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
#: Ops that hand on what they get; where the value lives and how it is laid out are not told.
_SAME = frozenset(
    f"aten.{name}"
    for name in ["alias", "detach", "detach_", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "positive"]
)
_UNTOLD = frozenset(
    {
        "device",
        "layout",
        "pin_memory",
        "memory_format",
        "requires_grad",
        "implicit",
        "non_blocking",
        "copy",
        "generator",
    }
)
_DEFAULTS: frozenset[tuple[str, Arg]] = frozenset(
    {("alpha", 1), ("value", 1), ("step", 1), ("start", 0), ("end", (1 << 63) - 1), ("padding_idx", -1)}
)


@dataclass(frozen=True, slots=True)
class Expression:
    """A text, whether it is the whole of it, what stands for it in a longer one, and a digest of the whole."""

    text: str
    whole: bool
    short: str
    digest: str

    def __str__(self) -> str:
        return self.text if self.whole else f"{self.text} #{self.digest[:8]}"


class Expressions:
    """The expressions of one record; ``names`` are those of the size symbols that run along an axis.

    Each node is looked at once. ``inputs`` gives other names to inputs (the indices of a body of flex_attention).
    """

    def __init__(self, record: GraphRecord, names: dict[str, str], inputs: dict[str, str] | None = None) -> None:
        self.record, self.names, self.inputs = record, names, inputs or {}
        self._known: dict[str, Expression] = {}

    def of(self, name: str) -> Expression:
        """The expression of a node."""
        stack = [name]
        while stack:
            current = stack[-1]
            missing = [ref for ref in self._operands(self.record.nodes[current]) if ref not in self._known]
            if current not in self._known and missing:
                stack.extend(missing)
                continue
            stack.pop()
            if current not in self._known:
                self._known[current] = self._make(self.record.nodes[current])
        return self._known[name]

    @staticmethod
    def _operands(node: Node) -> list[str]:
        """The operands that are told: a number with a size is told by it."""
        if isinstance(node.meta, ScalarMeta) and node.meta.size is not None:
            return []
        return [*content_operands(node), *(ref for ref in node.refs() if _is_told(node, ref))]

    def _make(self, node: Node) -> Expression:
        if node.kind is NodeKind.STATE:
            if node.state_kind is StateKind.CONSTANT:
                shape = node.tensor.shape if node.tensor else ()
                return _leaf(f"constant{[*map(self._size, shape)]}".replace("'", ""))
            return _leaf(f"'{node.fqn}'", _LAYER.sub("*", node.fqn))
        if node.kind is NodeKind.INPUT:
            return _leaf(self.inputs.get(node.name, node.fqn or node.name))
        if isinstance(node.meta, ScalarMeta) and node.meta.size is not None:
            return _leaf(self._size(node.meta.size))
        if node.base_op in _SAME or (node.base_op == "aten.slice" and _told(node).keys() <= {"self", "dim"}):
            return self._known[node.refs()[0]]
        op = node.base_op.removeprefix("aten.").strip("_")
        contents = {*content_operands(node)}
        texts, shorts, digests, whole = [], [], [], True
        for key, arg in _told(node).items():
            parts = self._argument(arg, contents)
            if parts is None:
                continue
            text, short, digest, complete = parts
            told = "" if self._is_tensor(arg) or key in ("tensors", "indices") else f"{key}="
            texts.append(told + text)
            shorts.append(told + short)
            digests.append(f"{key}={digest}")
            whole = whole and complete
        full, cut = f"{op}({', '.join(texts)})", f"{op}({', '.join(shorts)})"
        digest = _digest(f"{op}({','.join(digests)})")
        short = f"{op}({_MORE})" if len(full) > LIMIT // 4 else full
        if len(full) <= LIMIT:
            return Expression(full, whole, short, digest)
        return Expression(cut if len(cut) <= LIMIT else f"{op}({_MORE})", False, short, digest)

    def _argument(self, arg: Arg, contents: set[str]) -> tuple[str, str, str, bool] | None:
        """Text, short text, digest, whether the text is whole; ``None`` for a value of which only the form counts."""
        if isinstance(arg, Ref):
            node = self.record.nodes[arg.name]
            if arg.name not in contents and not isinstance(node.meta, ScalarMeta):
                return None
            known = self._known[arg.name]
            return known.text, known.short, known.digest, known.whole
        if isinstance(arg, tuple):
            parts = [part for part in (self._argument(item, contents) for item in arg) if part is not None]
            texts, shorts, digests = ([part[i] for part in parts] for i in range(3))
            brackets = f"[{', '.join(map(str, texts))}]", f"[{', '.join(map(str, shorts))}]"
            return *brackets, f"[{','.join(map(str, digests))}]", all(part[3] for part in parts)
        text = arg.text.removeprefix("torch.") if isinstance(arg, Opaque) else str(arg)
        return text, text, text, True

    def numbers(self, node: Node) -> str:
        """The arguments of a node that are numbers and texts, as far as they are no defaults: ``alpha=2``."""
        told = {key: arg for key, arg in _told(node).items() if isinstance(arg, int | float | str)}
        return ", ".join(f"{key}={arg}" for key, arg in told.items())

    def _is_tensor(self, arg: Arg) -> bool:
        return isinstance(arg, Ref) and not isinstance(self.record.nodes[arg.name].meta, ScalarMeta)

    def _size(self, size: Size) -> str:
        terms = str(size).split(" + ")
        terms.sort(key=lambda term: term.lstrip("-").isdecimal())  # the number last
        return _SYMBOL.sub(lambda found: self.names.get(found[0], "n"), " + ".join(terms))


def _told(node: Node) -> dict[str, Arg]:
    """The arguments that say what is computed."""
    return {
        key: arg
        for key, arg in node.args.items()
        if not (key in _UNTOLD or arg is None or arg is False or (key, arg) in _DEFAULTS)
    }


def _is_told(node: Node, ref: str) -> bool:
    """Whether a reference is a number among the arguments, and not a tensor that lends its form."""
    return any(name == ref and key.split(".")[0] not in ("self", "other") for key, name in node.named_refs())


def _leaf(text: str, digest: str = "") -> Expression:
    return Expression(text, True, text, digest or text)


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
