"""Mixture-of-experts routing: tokens gathered by expert, computed on row by row, and put back."""

from buffer_lifting.routing import carrying, experts, rows
from buffer_lifting.routing.engine import Routing

__all__ = ["Routing", "carrying", "experts", "rows"]
