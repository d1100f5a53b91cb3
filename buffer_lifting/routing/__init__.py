"""Mixture-of-experts routing: tokens gathered by expert, computed on row by row, and put back."""

from buffer_lifting.routing import carrying, experts, rows
from buffer_lifting.routing.engine import Routing
from buffer_lifting.routing.storage import makes_rows

__all__ = ["Routing", "carrying", "experts", "makes_rows", "rows"]
