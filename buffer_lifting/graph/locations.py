"""Places in the model's source, read from the stack traces that torch.export keeps. Nothing here imports torch."""

from __future__ import annotations

import re

from buffer_lifting.graph.record import Location

_FRAME = re.compile(r'File "([^"]+)", line (\d{1,9}), in (\S+)\n(?:\s*([^\n]*))?')


def innermost_location(trace: str) -> Location | None:
    """The innermost frame of a stack trace that is outside torch; ``None`` if there is none."""
    for file, line, function, code in reversed(_FRAME.findall(trace)):
        if not file.startswith("<") and "/torch/" not in file.replace("\\", "/"):
            return Location(file, int(line), (code or "").strip(), function)
    return None
