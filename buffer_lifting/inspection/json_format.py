"""Findings as one JSON object; docs/CHECK.md describes it."""

from __future__ import annotations

import json
from typing import Any

from buffer_lifting.inspection.places import Place, Places
from buffer_lifting.inspection.results import CheckResult, Reported

VERSION = 1


def render_json(result: CheckResult, places: Places) -> str:
    """The whole result, suppressed findings included."""
    return json.dumps(document(result, places), indent=2)


def document(result: CheckResult, places: Places) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "version": VERSION,
        "clean": result.exit_code == 0,
        "targets": list(result.targets),
        "findings": [_finding(item, places) for item in result.reported],
        "failures": [
            {"code": failure.code, "target": failure.target, "message": failure.message} for failure in result.failures
        ],
        "warnings": list(result.warnings),
        "statistics": result.statistics,
    }


def _finding(item: Reported, places: Places) -> dict[str, Any]:
    found = item.diagnostic
    suppressed = item.suppression
    return {
        "code": found.code,
        "severity": found.severity,
        "message": found.message,
        "hint": found.hint,
        "target": item.target,
        "location": _location(places.of(found), found.location.function if found.location else ""),
        "module": found.module,
        "module_class": found.module_class,
        "source": found.source,
        "sources": list(found.sources) or [found.source] * bool(found.source),
        "node": found.node,
        "op": found.op,
        "ordinal": found.ordinal,
        "fingerprint": found.fingerprint,
        "suppressed": None if suppressed is None else {"by": suppressed.by, "reason": suppressed.reason},
    }


def _location(place: Place | None, function: str) -> dict[str, Any] | None:
    if place is None:
        return None
    return {
        "path": place.path,
        "line": place.line,
        "inside": place.inside,
        "code": place.source,
        "function": function,
    }
