"""How batch and sequence labels pass through each kind of op, forward, for values that carry data.

``core.py`` has the record types and the pointwise rule, the others one function for each kind of op. An op without a
rule is unknown, never assumed to be local.
"""

from buffer_lifting.axis_rules import collectives, compute, convolution, flex, moves, views
from buffer_lifting.axis_rules.core import OVER_KEYS, Alignment, AxisResult, OpView, align, apply_rule, ruled_ops
from buffer_lifting.axis_rules.views import permutation

__all__ = [
    "OVER_KEYS",
    "Alignment",
    "AxisResult",
    "OpView",
    "align",
    "apply_rule",
    "collectives",
    "compute",
    "convolution",
    "flex",
    "moves",
    "permutation",
    "ruled_ops",
    "views",
]
