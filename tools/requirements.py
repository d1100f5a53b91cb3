"""Prints what extras of setup.cfg ask for, one requirement a line: ``python tools/requirements.py test,dev``.

For an environment whose torch is outside the range of setup.cfg, where pip would not install the project with its
dependencies (``make test TORCH=nightly``). What the project itself requires is left out: that is torch alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.cfg"


def requirements(extras: str) -> list[str]:
    """The requirements of extras given as ``"test,dev"``, each once; an extra of the project in an extra is followed.

    Raises:
        KeyError: there is no such extra.
    """
    parser = ConfigParser(interpolation=None)
    parser.read_string(SETUP.read_text())
    own = re.compile(rf"{parser['metadata']['name']}\[(.*)\]")

    def lines(names: str) -> Iterator[str]:
        for name in names.split(","):
            for line in parser["options.extras_require"][name.strip()].split("\n"):
                inner = own.fullmatch(line)
                yield from lines(inner[1]) if inner else [line] * bool(line)

    return list(dict.fromkeys(lines(extras)))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
