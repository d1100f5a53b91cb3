"""The rule for ``flex_attention``: queries, keys and values ``[batch, heads, seq, features]``."""

from __future__ import annotations

from buffer_lifting.axis_rules.core import AxisResult, OpView, rule
from buffer_lifting.labels import feature, has_seq
from buffer_lifting.ops import FLEX_ATTENTION


@rule(FLEX_ATTENTION)
def _flex(view: OpView) -> AxisResult:
    """Output, log-sum-exp and largest score follow the queries. The bodies' operands are read by ``flex.py``."""
    query, key, value = (view.labels(path) for path in ("query", "key", "value"))
    shapes = view.shapes_out()
    if query is None or key is None or value is None or not shapes:
        return AxisResult(None, mixing="attention whose keys or queries are not known to follow the sequence")
    outputs = ((*query[:-1], feature(shapes[0][-1])), *(query[:-1] for _ in shapes[1:]))
    mixing = "attention: a sum over keys" if has_seq(query[-2]) or has_seq(key[-2]) else ""
    return AxisResult(outputs, {}, mixing, True)
