"""The graph record that analysis works on. Nothing in this package imports torch, except ``from_fx``."""
