"""Findings as workflow commands, which GitHub Actions shows beside the lines of a pull request.

GitHub shows at most 10 errors, 10 warnings and 10 notices of a step, so the last line states the total when there
are more findings of a kind.
"""

from __future__ import annotations

from collections import Counter

from buffer_lifting.inspection.places import Places, printable
from buffer_lifting.inspection.results import CheckResult
from buffer_lifting.inspection.rules import SEVERITIES, Severity
from buffer_lifting.terminal import inert_inside

SHOWN = 10
_COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "note": "notice"}


def render_github(result: CheckResult, places: Places) -> str:
    """An annotation for each finding that counts and for each failure, errors first, and a total where it is needed."""
    lines = [_command("error", {"title": item.code}, item.message) for item in result.failures]
    order: list[Severity] = list(SEVERITIES)
    for item in sorted(result.findings, key=lambda item: order.index(item.diagnostic.severity)):
        found, place = item.diagnostic, places.of(item.diagnostic)
        properties = {"title": found.code}
        if place is not None and place.inside:
            properties = {"file": place.path, "line": str(place.line), **properties}
        where = f" [{place.path}:{place.line}]" if place is not None and not place.inside else ""
        module = f" (in {found.module})" if found.module else ""
        of = f" ({item.target})" if len(result.targets) > 1 else ""
        help_ = f"\nhelp: {found.hint}" if found.hint else ""
        lines.append(_command(_COMMANDS[found.severity], properties, f"{found.message}{module}{where}{of}{help_}"))
    counts = Counter(item.diagnostic.severity for item in result.findings)
    counts["error"] += len(result.failures)
    if any(count > SHOWN for count in counts.values()):
        kinds = ", ".join(f"{counts[kind]} {kind}s" for kind in order if counts[kind])
        # a plain line: an eleventh annotation would not be shown
        lines.append(f"buffer-lifting: {sum(counts.values())} in all ({kinds}); GitHub shows {SHOWN} of each kind")
    return "\n".join(lines)


def _command(kind: str, properties: dict[str, str], message: str) -> str:
    pairs = ",".join(f"{key}={_escape_property(value)}" for key, value in properties.items())
    lines = [_escape(inert_inside(printable(line))) for line in message.split("\n")]
    return f"::{kind} {pairs}::{'%0A'.join(lines)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape(inert_inside(printable(text))).replace(":", "%3A").replace(",", "%2C")
