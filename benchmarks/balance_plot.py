"""The plot of the balance benchmark: an SVG, written by hand, that follows a light or a dark page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.balance_cost import MASKS, ORDERS, Cell

WIDTH, HEIGHT = 760, 330
LEFT, TOP, BOTTOM, GAP = 46, 64, 34, 34
COLORS = ("#8a8f98", "#3b82c4", "#c9821f", "#2f9e6e", "#9a5fc0")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.grid{stroke:#d0d7de}.axis{stroke:#57606a}"
    "@media(prefers-color-scheme:dark){text{fill:#d8dee6}.grid{stroke:#343b44}.axis{stroke:#9aa4af}}"
)


def svg(cells: Sequence[Cell]) -> str:
    """A panel for each mask; a group of bars for each context-parallel size, a bar for each order."""
    sizes = sorted({cell.size for cell in cells})
    panel = (WIDTH - LEFT - GAP - 8) / 2
    floor = HEIGHT - BOTTOM
    top = max(2.0, max(cell.pairs for cell in cells))

    def height(value: float) -> float:
        return floor - (floor - TOP) * (value - 1) / (top - 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Attended pairs of the slowest rank over the mean, by order and context-parallel size</title>",
        f"<style>{STYLE}</style>",
    ]
    x = float(LEFT)
    for name, color in zip(ORDERS, COLORS, strict=True):
        parts.append(f'<rect x="{x:.0f}" y="10" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="20">{name}</text>')
        x += 34 + 7.0 * len(name)
    for place, mask in enumerate(MASKS):
        left = LEFT + place * (panel + GAP)
        parts.append(f'<text x="{left:.0f}" y="{TOP - 14}">{mask}</text>')
        for step in range(int((top - 1) * 4 + 1e-9) + 1):
            value = 1 + step / 4
            y = height(value)
            kind = "grid" if step else "axis"
            parts.append(f'<line class="{kind}" x1="{left:.0f}" x2="{left + panel:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if not place:
                parts.append(f'<text x="{left - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        group = panel / len(sizes)
        bar = (group - 22) / len(ORDERS)
        for index, size in enumerate(sizes):
            start = left + index * group + 11
            for number, (name, color) in enumerate(zip(ORDERS, COLORS, strict=True)):
                cell = next(c for c in cells if (c.mask, c.size, c.order) == (mask, size, name))
                y = height(cell.pairs)
                parts.append(
                    f'<rect x="{start + number * bar:.1f}" y="{min(y, floor - 1):.1f}" width="{bar - 2:.1f}" '
                    f'height="{max(floor - y, 1):.1f}" fill="{color}"><title>{name}: {cell.pairs:.2f}</title></rect>'
                )
            parts.append(
                f'<text x="{start + group / 2 - 11:.1f}" y="{floor + 20}" text-anchor="middle">cp {size}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])
