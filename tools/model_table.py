"""Rewrites the table of models in README.md from a run: exports, lifts, splits and verifies every zoo model.

``python tools/model_table.py`` writes it, ``--check`` fails if the table is not what a run gives.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


def row(name: str) -> str:
    """One line of the table; a check that fails raises."""
    from zoo import CASES, export_case

    import buffer_lifting as bl

    shapes, inputs, reads, forms = [], 0, 0, set()
    for dynamic in (True, False):
        if dynamic and not CASES[name].dynamic:
            continue
        program = export_case(name, dynamic=dynamic)[1]
        lifted = bl.context_parallel(bl.lift(program), size=1)
        assert bl.verify(program, bl.partition(lifted, num_stages=2)).passed
        shapes.append("dynamic" if dynamic else "static")
        reads, inputs = len(lifted.report.reads), len(lifted.inputs)
        forms |= {str(item.form) for item in lifted.inputs}
    return f"| {name} | {library(name)} | {', '.join(shapes)} | {reads} | {inputs} ({', '.join(sorted(forms))}) | yes |"


def library(name: str) -> str:
    """Where a model comes from."""
    package = {"hf": "transformers", "tune": "torchtune"}.get(name.split("_")[0])
    return f"{package} {version(package)}" if package else "tests/zoo/reference.py"


def table() -> str:
    """The whole table."""
    from zoo import CASES

    head = "| model | from | shapes | reads | lifted inputs | verified |\n|---|---|---|---:|---|---|"
    return "\n".join([head, *(row(name) for name in CASES)])


def main() -> int:
    """Writes the table, or checks it."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        if new != text:
            print(
                "README.md: the table of models is out of date; run python tools/model_table.py",
                file=sys.stderr,
            )
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
