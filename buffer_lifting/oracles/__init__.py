"""The oracles of :func:`buffer_lifting.verify`, one module each."""
