"""Findings as SARIF 2.1.0, which code scanning reads."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import buffer_lifting
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult, Failure, Reported
from buffer_lifting.inspection.rules import RULES, Rule

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT = "ROOT"
FINGERPRINT = "bufferLiftingKey/v1"
_INDEX = {code: index for index, code in enumerate(RULES)}


def render_sarif(result: CheckResult, places: Places) -> str:
    """One run: all rules, every finding (suppressed ones with their suppression), and failures as notifications."""
    run = {
        "tool": {
            "driver": {
                "name": "buffer-lifting",
                "version": buffer_lifting.__version__,
                "semanticVersion": buffer_lifting.__version__,
                "rules": [_rule(entry) for entry in RULES.values()],
            }
        },
        "columnKind": "unicodeCodePoints",
        # what the root is differs between machines: consumers know where their checkout is
        "originalUriBaseIds": {ROOT: {"description": {"text": "The root of the repository."}}},
        "invocations": [
            {
                "executionSuccessful": not result.failures,
                "toolExecutionNotifications": [
                    *(_failure(failure) for failure in result.failures),
                    *({"level": "warning", "message": {"text": text}} for text in result.warnings),
                ],
            }
        ],
        "results": [_result(item, places) for item in result.reported],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(entry: Rule) -> dict[str, Any]:
    examples = f"Bad:\n\n```python\n{entry.bad}\n```\n\nGood:\n\n```python\n{entry.good}\n```"
    return {
        "id": entry.code,
        "name": "".join(part.capitalize() for part in entry.name.split("-")),
        "shortDescription": {"text": _sentence(entry.message)},
        "fullDescription": {"text": " ".join(entry.help.split())},
        "help": {"text": f"{entry.help}\n\n{examples}", "markdown": f"{entry.help}\n\n{examples}"},
        "defaultConfiguration": {"level": entry.severity},
    }


def _result(item: Reported, places: Places) -> dict[str, Any]:
    found = item.diagnostic
    text = _sentence(found.message) + (f" Help: {found.hint}" if found.hint else "")
    result: dict[str, Any] = {
        "ruleId": found.code,
        "ruleIndex": _INDEX[found.code],
        "level": found.severity,
        "message": {"text": text},
        "locations": [_location(item, places)],
        "partialFingerprints": {FINGERPRINT: found.fingerprint},
        "properties": {
            "target": item.target,
            "source": found.source,
            "sources": list(found.sources),
            "op": found.op,
        },
        "suppressions": [],
    }
    if item.suppression is not None:
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": item.suppression.reason}]
    return result


def _location(item: Reported, places: Places) -> dict[str, Any]:
    """Always with a file, as code scanning wants, and the module or node; the target stands for a missing line."""
    found = item.diagnostic
    place = places.of(found) or places.of_target(item.target)
    # a file outside the repository is named without its directories, which are those of one machine
    named = place.inside or place.path.startswith(("site-packages/", "dist-packages/"))
    path = place.path if named else place.path.rstrip("/").rpartition("/")[2] or "unknown"
    artifact = {"uri": quote(path.encode("utf-8", "replace"))}
    if place.inside:
        artifact["uriBaseId"] = ROOT
    region: dict[str, Any] = {"startLine": max(place.line, 1)}
    if place.source:
        region["snippet"] = {"text": place.source}
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": artifact, "region": region}}
    logical = []
    if found.module:
        module = {"fullyQualifiedName": found.module, "name": found.module.rpartition(".")[2], "kind": "module"}
        logical.append(module)
    if found.node:
        name = f"{found.module}/{found.node}" if found.module else found.node
        logical.append({"fullyQualifiedName": name, "name": found.node, "kind": "object"})
    location["logicalLocations"] = logical or [{"name": item.target, "kind": "module"}]
    return location


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "level": "error",
        "message": {"text": failure.message},
        "descriptor": {"id": failure.code},
        "associatedRule": {"id": failure.code, "index": _INDEX[failure.code]},
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
