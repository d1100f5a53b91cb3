"""The ops that are local along the sequence: how labels map back to operands, and what to emit.

``core.py`` has the registry, what rules share, and the rules for elementwise ops, fills and reductions; ``views.py``,
``tables.py`` and ``compute.py`` one function an op. An op without a rule is unknown, never assumed to be local.
"""

from buffer_lifting.local_rules import compute, tables, views
from buffer_lifting.local_rules.core import local, local_rule, rule_docs

__all__ = [
    "compute",
    "local",
    "local_rule",
    "rule_docs",
    "tables",
    "views",
]
