"""An outline as readable lines: repeated layers are one line, and the order is that of the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from buffer_lifting.inspection.outline import SECTIONS, Entry, Outline, Section

VERSION = 1
HEADER = f"# buffer_lifting outline {VERSION}"
_NUMBER = re.compile(r"(?<=\.)\d+(?=[.:' ]|$)")  # of a layer in an FQN
_TITLES: dict[Section, Callable[[Entry], str]] = {
    "axes": lambda e: f"axis {e.named('axis')}" if e.named("axis") else f"input {e.named('input')}",
    "reads": lambda e: f"{e.named('source')!r} read by {e.named('op')}",
    "mixing": lambda e: e.named("op"),
    "findings": lambda e: e.named("code") + (f" of {e.named('source')!r}" if e.named("source") else ""),
    "lifted_inputs": lambda e: (
        f"{e.named('source')!r} by {e.named('stream')}, axis {e.named('axis')}, {e.named('role')}"
    ),
    "stages": lambda e: f"stage {e.named('stage')}",
    "boundaries": lambda e: f"stage {e.named('boundary')} by {e.named('op') or 'an input'}",
}


def outline_text(outline: Outline) -> str:
    """The outline as a file: a header, and the sections that have entries."""
    lines = [HEADER]
    for section in SECTIONS:
        entries = outline.of(section)
        if entries or section in ("reads", "lifted_inputs") or (outline.staged and section == "boundaries"):
            lines += ["", heading(section)]
            lines += [f"  {line}" for line in folded_lines([(e, facts_text(e.facts)) for e in entries]) or ["none"]]
    return "\n".join(lines) + "\n"


def heading(section: Section) -> str:
    """What a section is called."""
    return section.replace("_", " ")


def facts_text(facts: Iterable[tuple[str, str]]) -> str:
    """``code BL001, form values``."""
    return ", ".join(f"{name} {value}" for name, value in facts)


def folded_lines(items: Sequence[tuple[Entry, str]]) -> list[str]:
    """A line for each entry with its text behind it; those that differ by numbered modules only share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry, text in items:
        groups.setdefault((_TITLES[entry.section](entry), text), []).append(entry.named("module"))
    lines = []
    for (title, text), modules in groups.items():
        times: dict[int, list[str]] = {}
        for module, count in Counter(modules).items():
            times.setdefault(count, []).append(module)
        for count, same in times.items():
            for module in folded(same):
                place = f" in {module}" if module else ""
                repeated = f" (x{count})" if count > 1 else ""
                lines.append(f"{title}{place}{repeated}{': ' if text else ''}{text}")
    return sorted(_same_layer(lines), key=_natural)


def _same_layer(lines: Sequence[str]) -> list[str]:
    """Lines that differ by one number, that of the layer in source and module alike, as one line."""
    groups: dict[str, list[str]] = {}
    kept = []
    for line in lines:
        numbers = set(_NUMBER.findall(line))
        if len(numbers) == 1:
            groups.setdefault(_NUMBER.sub("{}", line), []).append(numbers.pop())
        else:
            kept.append(line)
    for pattern, layers in groups.items():
        text = layers[0] if len(layers) == 1 else f"{{{_ranges(sorted(map(int, layers)))}}}"
        kept.append(pattern.replace("{}", text))
    return kept


def folded(modules: Iterable[str]) -> list[str]:
    """``["layers.0.attn", "layers.1.attn"]`` as ``["layers.{0-1}.attn"]``."""
    paths = [tuple(module.split(".")) for module in dict.fromkeys(modules)]
    for place in range(max(map(len, paths), default=0) - 1, -1, -1):
        groups: dict[tuple[str, ...], list[str]] = {}
        kept = []
        for path in paths:
            if place < len(path) and path[place].isdecimal():
                groups.setdefault((*path[:place], "", *path[place + 1 :]), []).append(path[place])
            else:
                kept.append(path)
        paths = kept
        for pattern, numbers in groups.items():
            text = numbers[0] if len(numbers) == 1 else f"{{{_ranges(sorted(map(int, numbers)))}}}"
            paths.append((*pattern[:place], text, *pattern[place + 1 :]))
    return sorted((".".join(path) for path in paths), key=_natural)


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts ``layers.10`` behind ``layers.9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
