"""The stages of a target: a picture with the bytes on every edge, and the same as a table."""

from __future__ import annotations

from collections.abc import Sequence

from buffer_lifting.inspection.html_report.markup import code, count, escape
from buffer_lifting.inspection.html_report.svg import MARGIN, middle_cut
from buffer_lifting.inspection.html_report.views import ProgramView, StageInput, StageView

_INPUT, _STAGE, _ROW, _GAP, _SPACE = 330, 260, 26, 150, 56
_KINDS = {"activation": "from the stage before", "lifted": "lifted input", "user": "user input"}


def stages_section(views: Sequence[ProgramView]) -> str:
    """The section of the page; empty when no target has stages or should have had them."""
    shown = [view for view in views if view.stages or view.unsplit]
    if not shown:
        return ""
    parts = ['<section id="stages" aria-labelledby="stages-title"><h2 id="stages-title">Stages</h2>']
    for view in shown:
        if len(views) > 1:
            parts.append(f"<h3>{code(view.target)}</h3>")
        if view.stages:
            number = views.index(view)
            parts.append('<p class="soft">Bytes are per microbatch at the sizes of the example inputs.</p>')
            parts.append(
                '<div class="picture" tabindex="0" role="region" aria-label="Picture of the stages">'
                f"{draw_stages(view.stages, f'stages-{number}')}</div>"
            )
            parts.append(_table(view.stages))
            for fqn, holders in view.tied.items():
                stages = ", ".join(map(str, holders))
                parts.append(f"<p>Tied: {code(fqn)} is in the stages {stages}; add up its gradients.</p>")
        else:
            parts.append(f'<p class="verdict failed">{escape(view.unsplit[:1].upper() + view.unsplit[1:])}</p>')
    return "\n".join([*parts, "</section>"])


def size_text(entry: StageInput) -> str:
    """``"1,408 bytes"``, ``"32 bytes a token"`` or nothing."""
    if entry.size is not None:
        return f"{count(entry.size, 'byte')}"
    return f"{count(entry.per_token, 'byte')} a token" if entry.per_token is not None else ""


def draw_stages(stages: Sequence[StageView], name: str) -> str:
    """Stages from top to bottom; their keyword inputs come from the right, activations from above."""
    parts: list[str] = []
    y = MARGIN
    x = MARGIN
    edge = x + _STAGE
    for stage in stages:
        keywords = [entry for entry in stage.inputs if entry.kind != "activation"]
        height = max(62, len(keywords) * _ROW + 10)
        modules = ", ".join(stage.modules)
        full = f"stage {stage.index}: {count(stage.elements, 'parameter')}: {modules}"
        parts.append(
            f'<g class="box consumer"><title>{escape(full)}</title>'
            f'<rect x="{x}" y="{y}" width="{_STAGE}" height="{height}" rx="6"/>'
            f'<text class="name" x="{x + 10}" y="{y + 20}">stage {stage.index}</text>'
            f'<text class="more" x="{x + 10}" y="{y + 38}">{count(stage.elements, "parameter")}</text>'
            f'<text class="more" x="{x + 10}" y="{y + 54}">{escape(middle_cut(modules, 36))}</text></g>'
        )
        for row, entry in enumerate(keywords):
            top = y + 5 + row * _ROW
            parts.append(_keyword(entry, edge + _GAP, top))
            text = f'<text class="more edge" x="{edge + 18}" y="{top + 8}">{size_text(entry)}</text>'
            line = f"M {edge + _GAP} {top + 12} L {edge + 6} {top + 12}"
            parts.append(f'<path class="arrow dashed" d="{line}" marker-end="url(#head)"/>{text}')
        y += height
        if stage.index == len(stages) - 1:
            text = f"outputs: {', '.join(stage.outputs)}"
        else:
            text = f"{count(stage.sends, 'byte')}: {', '.join(stage.outputs)}"
        middle = x + 40
        parts.append(
            f'<path class="arrow" d="M {middle} {y} L {middle} {y + _SPACE - 6}" marker-end="url(#head)"/>'
            f'<text class="name" x="{middle + 12}" y="{y + _SPACE / 2 + 4:g}"><title>{escape(text)}</title>'
            f"{escape(middle_cut(text, 34))}</text>"
        )
        y += _SPACE
    about = f"{count(len(stages), 'stage')}; " + "; ".join(
        f"stage {stage.index} sends {count(stage.sends, 'byte')}" for stage in stages[:-1]
    )
    width, height = edge + _GAP + _INPUT + MARGIN, y + MARGIN
    return (
        f'<svg role="img" aria-label="{escape(about)}" id="{escape(name)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def _keyword(entry: StageInput, left: int, top: int) -> str:
    kind = "input" if entry.kind == "lifted" else "source"
    return (
        f'<g class="box {kind}"><title>{escape(f"{entry.name} ({_KINDS[entry.kind]})")}</title>'
        f'<rect x="{left}" y="{top + 1}" width="{_INPUT}" height="{_ROW - 4}" rx="4"/>'
        f'<text x="{left + 8}" y="{top + 16}">{escape(middle_cut(entry.name, 46))}</text></g>'
    )


def _table(stages: Sequence[StageView]) -> str:
    rows = []
    for stage in stages:
        inputs = "<br>".join(
            f"{code(entry.name)} <span class='soft'>{_KINDS[entry.kind]}{', ' * bool(size_text(entry))}"
            f"{size_text(entry)}</span>".replace("'", '"')
            for entry in stage.inputs
        )
        modules = "<br>".join(code(module) for module in stage.modules)
        rows.append(
            f'<tr><th scope="row">{stage.index}</th><td class="number">{stage.elements:,}</td><td>{modules}</td>'
            f"<td>{inputs or 'nothing'}</td><td>{'<br>'.join(map(code, stage.outputs))}</td>"
            f'<td class="number">{stage.sends:,}</td></tr>'
        )
    names = ("Stage", "Parameters", "Modules", "Receives", "Hands on", "Sends, bytes")
    head = "".join(
        f"<th{' class=' + chr(34) + 'number' + chr(34) if name in ('Parameters', 'Sends, bytes') else ''}>{name}</th>"
        for name in names
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
