"""The demo's text: bytes of Python's standard library, so nothing is downloaded or tokenized."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VOCAB = 256
MICROBATCHES = 4
BATCH = 8
SEQ = 64
#: Modules that every CPython has, in no special order.
MODULES = (
    "argparse",
    "ast",
    "collections/__init__",
    "dataclasses",
    "inspect",
    "pathlib",
    "random",
    "textwrap",
)


class NoText(Exception):
    """This Python has no sources of its standard library."""


@cache
def text() -> Tensor:
    """The bytes, one after another.

    Raises:
        NoText: fewer than a few batches of them.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for name in MODULES if (path := library / f"{name}.py").is_file()]
    found = b"".join(path.read_bytes() for path in files or sorted(library.glob("*.py")))
    if len(found) < 16 * BATCH * SEQ:
        raise NoText(f"no source files of the standard library in {library}")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(tokens, labels)`` of a step, ``[BATCH, SEQ]``: each label is the byte behind its token."""
    source = text()
    starts = torch.randint(0, len(source) - SEQ, (BATCH,), generator=_generator(step, seed, 1))
    windows = torch.stack([source[start : start + SEQ + 1] for start in starts.tolist()])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def order(step: int, seed: int) -> Tensor:
    """A permutation of the sequence for each sample, ``[BATCH, SEQ]``: slot -> place in the text."""
    generator = _generator(step, seed, 2)
    return torch.stack([torch.randperm(SEQ, generator=generator) for _ in range(BATCH)])


def _generator(step: int, seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + stream)
