"""What becomes of a ``flex_attention``: plain data, from the scan to the pass that emits it and the oracles."""

from __future__ import annotations

from dataclasses import dataclass, field

from buffer_lifting.axis_rules import Alignment
from buffer_lifting.labels import Factor
from buffer_lifting.plan import CutKey, Plan


@dataclass(frozen=True)
class AddedOperand:
    """A further operand of a body, to be emitted: the plan, and where its lane lands (in front if it has no batch)."""

    plan: Plan
    value: str  # the node of the original that it stands for, or the flex node
    alignment: Alignment


@dataclass(frozen=True)
class BodyIndex:
    """A read ``buffer[...]`` in a body that is at the shard's own indices.

    ``operand`` is an added operand's number, or ``None`` for the body's own buffer; ``indices`` are names of the
    body's nodes, and whether the value is the index as the body gets it; ``lead`` says that the operand has a batch
    dim in front that the original lacks.
    """

    operand: int | None
    indices: tuple[tuple[str, bool], ...]
    lead: bool


@dataclass
class BodyPlan:
    """What becomes of one body."""

    name: str  # "score_mod" or "mask_mod"
    body: str  # the node that names it
    indices: dict[str, str]  # "b", "h", "q", "kv" -> placeholder
    buffers: tuple[str, ...]  # placeholders of the body's own operands
    kept: tuple[str, ...] = ()  # those of them that are still read; the added operands follow them
    added: list[AddedOperand] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)  # "q" or "kv" -> the added operand with its slots
    reads: dict[str, BodyIndex] = field(default_factory=dict)


@dataclass(frozen=True)
class FlexPlan:
    """What becomes of one ``flex_attention``; ``axes`` are those of the queries and the keys, where they follow one."""

    node: str
    bodies: tuple[BodyPlan, ...]
    axes: tuple[Factor | None, Factor | None]
    keys: tuple[CutKey, ...]
