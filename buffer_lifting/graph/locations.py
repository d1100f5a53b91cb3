"""Places in the model's source, read from the stack traces that torch.export keeps. Nothing here imports torch."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from buffer_lifting.graph.record import Location

_FRAME = re.compile(r'File "([^"]+)", line (\d{1,9}), in (\S+)\n(?:\s*([^\n]*))?')
#: Where torch's own package is on other machines: installed, or built in a checkout of PyTorch.
_TORCH = re.compile(r"/(?:site-packages|dist-packages|pytorch)/torch/")


def innermost_location(trace: str) -> Location | None:
    """The innermost frame of a stack trace that is outside torch; ``None`` if there is none."""
    for file, line, function, code in reversed(_FRAME.findall(trace)):
        if not file.startswith("<") and not _in_torch(file.replace("\\", "/")):
            return Location(file, int(line), (code or "").strip(), function)
    return None


def _in_torch(file: str) -> bool:
    return _TORCH.search(file) is not None or file.startswith(_installed())


@lru_cache(maxsize=1)
def _installed() -> str:
    """The directory of the torch that is installed here, which is found without importing it."""
    spec = find_spec("torch")
    origin = spec.origin if spec is not None else None
    return Path(origin).parent.as_posix() + "/" if origin else "<torch>/"
