"""Saves and loads a lifted program (one file) and a partition (a directory, with files of its own for each stage).

``docs/PACKAGES.md`` has the formats. ``files``: manifests, checksums, and files that appear whole or not at all;
``lifted_file`` and ``staged_directory``: the two formats; ``loaded_stage``: what a rank gets.
"""

from __future__ import annotations

from buffer_lifting.package.lifted_file import load, save_lifted
from buffer_lifting.package.loaded_stage import LoadedStage
from buffer_lifting.package.staged_directory import load_stage, save_staged

__all__ = ["LoadedStage", "load", "load_stage", "save_lifted", "save_staged"]
