"""Proves that an attention mask is plain causal: by what is known of every element, for every size.

A mask is followed from its sources (``arange``, fills, tables whose content is at hand) through the ops between; what
no rule follows is unknown, and nothing is concluded from an example size. Document ids (the cumsum over places where
positions do not go up by one) are followed only when asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from buffer_lifting.causal_domain import Steps, Unknown, blocks
from buffer_lifting.causal_rules import Prover, Tables
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, Ref
from buffer_lifting.ops import ATTENTION


@dataclass(frozen=True, slots=True)
class MaskProof:
    """Whether the mask of an attention node is plain causal; if not, ``why`` it could not be proven."""

    node: str
    causal: bool
    why: str
    location: str = ""

    def __str__(self) -> str:
        where = f" [{self.location}]" if self.location else ""
        if self.causal:
            return f"node {self.node!r}: plain causal for every length{where}"
        return f"node {self.node!r}: not proven to be plain causal: {self.why}{where}"


def prove_masks(record: GraphRecord, tables: Tables, documents: bool = True) -> list[MaskProof]:
    """One result for each ``scaled_dot_product_attention`` of a record that has a mask. Linear in the nodes."""
    prover = Prover(record, tables, documents)
    found = []
    for node in record.nodes.values():
        if node.kind is NodeKind.OP and node.base_op == ATTENTION and isinstance(node.args.get("attn_mask"), Ref):
            why = _attention(record, prover, node)
            found.append(MaskProof(node.name, not why, why, str(node.location or "")))
    return found


def _attention(record: GraphRecord, prover: Prover, node: Node) -> str:
    mask = node.args["attn_mask"]
    query, key = (record.nodes[name].tensor for path, name in node.named_refs() if path in ("query", "key"))
    assert isinstance(mask, Ref)
    meta = record.nodes[mask.name].tensor
    if node.args.get("is_causal") is not False:
        return "is_causal is set as well"
    if query is None or key is None or meta is None:
        return "its operands have no shapes"
    if len(query.shape) < 2 or query.shape[-2] != key.shape[-2]:
        return f"it has {query.shape[-2]} queries and {key.shape[-2]} keys"
    if meta.dtype not in ("bool", query.dtype):
        return f"it is {meta.dtype}, its queries are {query.dtype}"
    value = prover.value(mask.name)
    if isinstance(value, Unknown):
        return value.why
    if not isinstance(value, Steps) or value.pair != (-2, -1) or 0 not in value.breaks:
        return "it is not the lower triangle with its diagonal"
    place = value.breaks.index(0) + 1
    blocked, allowed = value.values[:place], value.values[place:]
    if meta.dtype == "bool":
        exact = blocked == (False,) and allowed == (True,)
    else:
        exact = allowed == (0,) and all(blocks(number, meta.dtype) for number in blocked)
        if not exact and allowed == (0,):
            return f"{blocked[-1]} in {meta.dtype} is not -inf"
    return "" if exact else "it is not the lower triangle with its diagonal"
