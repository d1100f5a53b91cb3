"""The demo's text: bytes of Python's standard library, so nothing is downloaded or tokenized."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VOCAB = 256
BATCH = 8
SEQ = 64
#: The label of a token that does not count.
IGNORED = -100
ORDERS = ("head-tail", "per sample")
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
    """``(tokens, labels)`` of a step, ``[BATCH, SEQ]``: each label is the byte behind its token.

    Spaces, and so all indentation, are not to be learned: the number of labels that count differs from sample to
    sample, and between the parts of a sequence.
    """
    source = text()
    starts = torch.randint(0, len(source) - SEQ, (BATCH,), generator=_generator(step, seed, 1))
    windows = torch.stack([source[start : start + SEQ + 1] for start in starts.tolist()])
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return tokens, labels.masked_fill(labels == ord(" "), IGNORED)


def order(name: str, shape: tuple[int, int], ranks: int, step: int, seed: int) -> Tensor:
    """An order of the sequence for ``ranks`` context-parallel ranks, slot -> place in the text.

    ``"head-tail"`` is torch's load balancer of causal attention, ``[1, seq]``; ``"per sample"`` a random permutation
    for each sample, ``[batch, seq]``.
    """
    batch_size, length = shape
    if name == "head-tail":
        from buffer_lifting.torch_compat import head_tail_indices

        return head_tail_indices(length, ranks)
    generator = _generator(step, seed, 2)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(batch_size)])


def _generator(step: int, seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 8 + stream)
