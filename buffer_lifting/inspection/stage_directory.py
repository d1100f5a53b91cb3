"""Which directories are saved partitions."""

from __future__ import annotations

import os
from pathlib import Path

MANIFEST = "manifest.json"


def is_stage_directory(path: Path) -> bool:
    """Whether a directory has a manifest."""
    return (path / MANIFEST).is_file()


def is_meant_as_stage_directory(path: Path) -> bool:
    """Whether a directory has something by the name of the manifest, or a stage: a damaged one is not passed over."""
    return os.path.lexists(path / MANIFEST) or any(path.glob("stage_*.pt2"))
