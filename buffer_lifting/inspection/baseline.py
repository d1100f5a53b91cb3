"""The baseline: findings that are known, by target and key. New ones fail; entries that no finding has are stale.

A file is ``{"version": 1, "targets": {target: [{rule, source, module, op, ordinal}, ...]}}``, sorted, so that a change
of it reads well in a diff. Neither lines nor node names are in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from buffer_lifting.inspection.config import CheckError
from buffer_lifting.inspection.diagnostics import Key
from buffer_lifting.inspection.results import CheckResult, Suppression

VERSION = 1
_FIELDS = ("rule", "source", "module", "op", "ordinal")
Known = dict[str, set[Key]]
Enabled = Callable[[str], bool]


def target_name(target: str, root: Path) -> str:
    """What a target is called in the baseline: the same on every machine.

    A path in the repository is relative to its root; of one outside, only the last part counts.
    """
    path = Path(target)
    if not path.exists():
        return target  # a callable
    absolute = path.resolve()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.name


def read_baseline(path: Path) -> Known:
    """The keys by target.

    Raises:
        CheckError: it cannot be read, or is no baseline of this version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckError(f"{path}: {error.strerror} (--update-baseline makes a baseline)") from error
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{path}: not a baseline ({' '.join(str(error).split())})") from error
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise CheckError(f"{path}: not a baseline of version {VERSION}")
    targets = document.get("targets")
    if not isinstance(targets, dict) or not all(isinstance(items, list) for items in targets.values()):
        raise CheckError(f"{path}: not a baseline: its targets are not lists by name")
    return {name: {_key(item, path) for item in items} for name, items in targets.items()}


def _key(item: Any, path: Path) -> Key:
    if not isinstance(item, dict) or set(item) != set(_FIELDS):
        raise CheckError(f"{path}: not a baseline: an entry has other keys than {', '.join(_FIELDS)}")
    *texts, ordinal = (item[name] for name in _FIELDS)
    if type(ordinal) is not int or not all(isinstance(text, str) for text in texts):
        raise CheckError(f"{path}: not a baseline: an entry has a value of another type")
    return item["rule"], item["source"], item["module"], item["op"], ordinal


def apply_baseline(result: CheckResult, known: Known, root: Path, enabled: Enabled) -> CheckResult:
    """Marks the findings that are known, and warns of the stale entries of the targets that were checked.

    Entries of codes that are not ``enabled``, and of targets that were not checked, are neither used nor stale.
    """
    names = _names(result, root)
    stale: Known = {name: {key for key in known.get(name, ()) if enabled(key[0])} for name in names.values()}
    reported = []
    for item in result.reported:
        key, name = item.diagnostic.key, names[item.target]
        if key in known.get(name, ()):
            stale[name].discard(key)
            if item.suppression is None:
                item = replace(item, suppression=Suppression("baseline", "known, in the baseline"))
        reported.append(item)
    warnings = [f"baseline: stale entry of {name}: {_text(key)}" for name in stale for key in sorted(stale[name])]
    return replace(result, reported=tuple(reported), warnings=(*result.warnings, *warnings))


def updated(result: CheckResult, known: Known, root: Path, enabled: Enabled) -> Known:
    """The baseline with the findings of the targets that were checked in place of what it had of them.

    Kept are the entries of other targets, of those that could not be checked, and of codes that are not ``enabled``.
    A finding that the configuration suppresses needs no entry.
    """
    names = _names(result, root)
    new: Known = {name: set(keys) for name, keys in known.items()}
    for name in names.values():
        new[name] = {key for key in known.get(name, ()) if not enabled(key[0])}
    for item in result.reported:
        if item.suppression is None:
            new[names[item.target]].add(item.diagnostic.key)
    return {name: keys for name, keys in new.items() if keys}


def write_baseline(path: Path, known: Mapping[str, set[Key]]) -> None:
    """Writes a baseline; the file appears whole or not at all.

    Raises:
        CheckError: it cannot be written.
    """
    targets = {
        name: [dict(zip(_FIELDS, key, strict=True)) for key in sorted(keys)] for name, keys in sorted(known.items())
    }
    text = json.dumps({"version": VERSION, "targets": targets}, indent=2) + "\n"
    work = None
    try:
        handle, work = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(work, 0o644)
        os.replace(work, path)
    except OSError as error:
        if work is not None:
            with contextlib.suppress(OSError):
                os.unlink(work)
        raise CheckError(f"{path}: cannot be written ({error.strerror})") from error


def _names(result: CheckResult, root: Path) -> dict[str, str]:
    """The name of each target that was checked."""
    failed = {failure.target for failure in result.failures}
    names = {target: target_name(target, root) for target in result.targets if target not in failed}
    first: dict[str, str] = {}
    for target, name in names.items():
        other = first.setdefault(name, target)
        if other != target:
            raise CheckError(f"{other} and {target} are both {name} in a baseline: check them with one baseline each")
    return names


def _text(key: Key) -> str:
    rule, source, module, op, ordinal = key
    parts = [
        rule,
        source and f"source {source}",
        module and f"in {module}",
        op,
        f"no. {ordinal + 1}" if ordinal else "",
    ]
    return ", ".join(part for part in parts if part)
