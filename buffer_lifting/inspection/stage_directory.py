"""Which directories are saved partitions."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"


def is_stage_directory(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).is_file()
