"""The whole page: the template with its parts, its data, and a policy that forbids everything from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import buffer_lifting
from buffer_lifting.inspection.html_report.data import page_data
from buffer_lifting.inspection.html_report.findings import failures_part, findings_section
from buffer_lifting.inspection.html_report.graph_section import graph_section, group_id
from buffer_lifting.inspection.html_report.later import FINDINGS_ROOM, READS_ROOM, Parts, Room, data_element
from buffer_lifting.inspection.html_report.markup import ascii_only, code, count, embedded_json, escape
from buffer_lifting.inspection.html_report.stage_section import stages_section
from buffer_lifting.inspection.html_report.views import ProgramView
from buffer_lifting.inspection.places import Places
from buffer_lifting.inspection.results import CheckResult
from buffer_lifting.inspection.rules import RULES, SEVERITIES


def render_html(result: CheckResult, places: Places, views: Sequence[ProgramView] = ()) -> str:
    """The page as one ASCII text.

    Args:
        result: of the check; every target of ``views`` is one of its targets.
        places: of the findings.
        views: what the targets hold, in their order.
    """
    style, script = _asset("page.css"), _asset("page.js")
    sources = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    numbers = {target: number for number, target in enumerate(result.targets)}
    ordered = sorted(views, key=lambda view: numbers[view.target])
    links = {
        (view.target, group.code, member.node): group_id(numbers[view.target], group)
        for view in ordered
        for group in view.groups
        for member in group.members
    }
    stages, parts = stages_section(ordered), Parts()
    codes = sorted(
        {item.diagnostic.code for item in result.reported}
        | {group.code for view in ordered for group in view.groups if group.code}
    )
    body = [
        _summary(result, ordered),
        findings_section(result, places, result.targets, links, Room(FINDINGS_ROOM, parts)),
        graph_section(ordered, places, result.targets, Room(READS_ROOM, parts)),
        stages,
        _rules(codes),
    ]
    sections = ["summary", "findings", "graph", *(["stages"] if stages else []), *(["rules"] if codes else [])]
    navigation = " ".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in sections)
    page = Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'",
        version=escape(buffer_lifting.__version__),
        title=escape(_title(result)),
        style=style,
        script=script,
        navigation=navigation,
        filters=_filters(result, codes),
        body="\n".join(filter(None, [_large(parts), *body])),
        data=data_element(embedded_json(page_data(result, places, ordered))),
        parts=parts.element(),
    )
    return ascii_only(page)


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _title(result: CheckResult) -> str:
    targets = result.targets or tuple(failure.target for failure in result.failures)
    if len(targets) == 1:
        return f"buffer-lifting: {targets[0]}"
    return f"buffer-lifting: {count(len(targets), 'target')}"


def _large(parts: Parts) -> str:
    """What a reader without JavaScript has to know of a large page; empty for one that has everything as markup."""
    if not parts.markup:
        return ""
    text = f"{parts.items:,} findings and reads" if parts.items else "Long lists"
    text = f"This page is large: {text} of it are compressed, and need JavaScript to be shown."
    return (
        f'<noscript><p class="verdict failed">{text} <code>buffer-lifting check</code> prints the findings.</p>'
        '</noscript><p id="large" class="verdict failed" role="alert" hidden>A part of this page cannot be shown: '
        "this browser is too old to inflate it.</p>"
    )


def _filters(result: CheckResult, codes: Sequence[str]) -> str:
    boxes = "".join(
        f'<label title="{escape(RULES[name].message)}"><input type="checkbox" value="{name}" checked> {name}</label>'
        for name in codes
    )
    parts = [
        '<label class="needs-script" hidden for="search">Search</label>'
        '<input id="search" class="needs-script" hidden type="search" autocomplete="off" spellcheck="false" '
        'placeholder="module, source, file, op, node (press /)">',
        f'<fieldset class="codes needs-script" hidden><legend>Codes</legend>{boxes}</fieldset>' if boxes else "",
    ]
    if len(result.targets) > 1:
        options = "".join(
            f'<option value="{number}">{escape(target)}</option>' for number, target in enumerate(result.targets)
        )
        parts.append(
            '<label class="needs-script" hidden>Target <select id="target"><option value="">all</option>'
            f"{options}</select></label>"
        )
    if any(item.suppression for item in result.reported):
        parts.append(
            '<label class="needs-script" hidden><input id="suppressed" type="checkbox" checked> suppressed</label>'
        )
    parts.append('<button id="reset" class="needs-script" hidden type="button">Reset</button>')
    parts.append('<span id="shown" class="shown" role="status"></span>')
    return "\n".join(filter(None, parts))


def _summary(result: CheckResult, views: Sequence[ProgramView]) -> str:
    parts = [
        '<section id="summary" aria-labelledby="summary-title"><h2 id="summary-title">Summary</h2>',
        _verdict(result),
    ]
    parts.append(failures_part(result))
    if views:
        parts.append(_targets(result, views))
    if result.statistics:
        rows = "".join(
            f'<tr><td><a href="#rule-{name}">{name}</a></td><td>{RULES[name].severity}</td>'
            f'<td>{escape(RULES[name].message)}</td><td class="number">{number:,}</td></tr>'
            for name, number in result.statistics.items()
        )
        head = '<tr><th>Code</th><th>Severity</th><th>Rule</th><th class="number">Findings</th></tr>'
        parts.append(f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>')
    return "\n".join([*filter(None, parts), "</section>"])


def _verdict(result: CheckResult) -> str:
    kinds = {name: 0 for name in SEVERITIES}
    for item in result.findings:
        kinds[item.diagnostic.severity] += 1
    failed = {failure.target for failure in result.failures}
    checked = sum(target not in failed for target in result.targets)
    counts = ", ".join(count(number, kind) for kind, number in kinds.items() if number)
    text = f"{count(len(result.findings), 'finding')} in {count(checked, 'target')}{f' ({counts})' if counts else ''}"
    known = len(result.reported) - len(result.findings)
    text += f", {known:,} suppressed" if known else ""
    text += f"; {count(len(result.failures), 'target')} could not be checked" if result.failures else ""
    state = "failed" if result.failures else "findings" if result.findings else "clean"
    return f'<p class="verdict {state}">{text if state != "clean" or known else "Clean: " + text}</p>'


def _targets(result: CheckResult, views: Sequence[ProgramView]) -> str:
    rows = []
    for view in views:
        found = sum(item.target == view.target for item in result.findings)
        reads: dict[str, int] = {}
        for group in view.groups:
            reads[group.status] = reads.get(group.status, 0) + len(group.members)
        cells = [found, view.nodes, *_reads(reads), len(view.lifted), len(view.stages)]
        numbers = "".join(f'<td class="number">{cell:,}</td>' for cell in cells)
        inputs = "<br>".join(escape(_axes(axes)) for axes in view.inputs)
        names = f"<td>{code(view.target)}</td><td>{escape(view.kind)}</td>"
        rows.append(f'<tr>{names}{numbers}<td class="axes">{inputs}</td></tr>')
    columns = ("Findings", "Nodes", "Reads", "Refused", "Ops that mix, handled", "Lifted inputs", "Stages")
    head = "".join(f'<th class="number">{name}</th>' for name in columns)
    table = f"<thead><tr><th>Target</th><th>Is a</th>{head}<th>Inputs</th></tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


def _reads(counts: dict[str, int]) -> tuple[int, int, int]:
    reads = sum(counts.get(kind, 0) for kind in ("lifted", "natural", "causal"))
    return reads, counts.get("refused", 0), counts.get("handled", 0)


def _axes(axes: Any) -> str:
    dims = [f"batch dim {axes.batch_dim}"] if axes.batch_dim is not None else []
    dims += [f"{axis} dim {dim} ({role})" for dim, axis, role in axes.seq_dims]
    return f"{axes.name}: {', '.join(dims) or 'neither batch nor sequence'}"


def _rules(codes: Sequence[str]) -> str:
    if not codes:
        return ""
    parts = ['<section id="rules" aria-labelledby="rules-title"><h2 id="rules-title">Rules</h2>']
    for name in codes:
        entry = RULES[name]
        paragraphs = "".join(f"<p>{escape(' '.join(text.split()))}</p>" for text in entry.help.split("\n\n"))
        parts.append(
            f'<div id="rule-{name}"><h3>{name} {escape(entry.name)} '
            f'<span class="badge {entry.severity}">{entry.severity}</span></h3>'
            f"<p>{escape(entry.message)}</p>{paragraphs}"
            f"<h4>Bad</h4><pre><code>{escape(entry.bad)}</code></pre>"
            f"<h4>Good</h4><pre><code>{escape(entry.good)}</code></pre></div>"
        )
    return "\n".join([*parts, "</section>"])
