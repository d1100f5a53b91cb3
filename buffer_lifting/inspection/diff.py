"""What differs between two outlines: ``buffer-lifting diff``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from buffer_lifting.inspection.outline import NOT_RECORDED, SECTIONS, Entry, Outline, Section
from buffer_lifting.inspection.outline_text import facts_text, folded_lines, heading
from buffer_lifting.inspection.places import printable

VERSION = 1
_STAGED: tuple[Section, ...] = ("stages", "boundaries")


@dataclass(frozen=True, slots=True)
class Change:
    """An entry that one side has not (``None``), or whose facts differ."""

    old: Entry | None
    new: Entry | None

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        """What became of the entry."""
        return "added" if self.old is None else "removed" if self.new is None else "changed"

    @property
    def entry(self) -> Entry:
        """The newer of the two."""
        entry = self.new or self.old
        assert entry is not None
        return entry


@dataclass(frozen=True, slots=True)
class OutlineDiff:
    """All changes, in the order of the sections; ``notes`` say what was not compared."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()


def compare(old: Outline, new: Outline) -> OutlineDiff:
    """The changes from ``old`` to ``new``. Stages are compared if both have them."""
    notes = []
    skipped: tuple[Section, ...] = ()
    if old.staged != new.staged:
        skipped = _STAGED
        notes.append(f"stages are not compared: {'NEW' if old.staged else 'OLD'} has none")
    elif any(("tensor", NOT_RECORDED) in entry.facts for side in (old, new) for entry in side.of("boundaries")):
        skipped = ("boundaries",)
        notes.append("stage boundaries are not compared: a partition was saved before they were recorded; split again")
    changes = []
    for section in SECTIONS:
        if section in skipped:
            continue
        before = {entry.key: entry for entry in old.of(section)}
        after = {entry.key: entry for entry in new.of(section)}
        for key in dict.fromkeys([*before, *after]):
            left, right = before.get(key), after.get(key)
            if left is None or right is None or left.facts != right.facts:
                changes.append(Change(left, right))
    return OutlineDiff(tuple(changes), tuple(notes))


def render_diff(diff: OutlineDiff) -> str:
    """The changes by section, with ``+``, ``-`` and ``~`` for what is new, gone and changed."""
    lines: list[str] = []
    for section in SECTIONS:
        changes = [change for change in diff.changes if change.entry.section == section]
        if not changes:
            continue
        lines.append(heading(section))
        for mark, kind in (("-", "removed"), ("+", "added"), ("~", "changed")):
            items = [(change.entry, _text(change)) for change in changes if change.kind == kind]
            lines += [printable(f"  {mark} {line}") for line in folded_lines(items)]
    return "\n".join(lines)


def _text(change: Change) -> str:
    if change.old is None or change.new is None:
        note = f" ({change.entry.note})" if change.entry.note else ""
        return facts_text(change.entry.facts) + note
    before = dict(change.old.facts)
    return ", ".join(
        f"{name} {before.get(name, 'none')} -> {value}" for name, value in change.new.facts if before.get(name) != value
    )


def diff_json(diff: OutlineDiff, old: str, new: str) -> str:
    """One object; docs/CI.md describes it."""
    document = {
        "version": VERSION,
        "old": old,
        "new": new,
        "same": not diff.changes,
        "changes": [
            {
                "section": change.entry.section,
                "kind": change.kind,
                "key": dict(change.entry.key),
                "old": _side(change.old),
                "new": _side(change.new),
            }
            for change in diff.changes
        ],
        "notes": list(diff.notes),
    }
    return json.dumps(document, indent=2)


def _side(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {**{name.replace(" ", "_"): value for name, value in entry.facts}, "note": entry.note}


def counts(changes: Sequence[Change]) -> str:
    """``1 added, 2 changed``."""
    kinds = [change.kind for change in changes]
    texts = [f"{kinds.count(kind)} {kind}" for kind in ("added", "removed", "changed") if kind in kinds]
    return ", ".join(texts) or "no change"
