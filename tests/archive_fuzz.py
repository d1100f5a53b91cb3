"""Rewrites the archives that torch.export.save makes: by member, by JSON value, by byte. Deterministic."""

from __future__ import annotations

import copy
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODEL = "models/model.json"
JSON_FILES = (MODEL, "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
Members = dict[str, bytes]


def members(path: Path) -> Members:
    """The members of an archive, by name without its root."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def pack(path: Path, content: Members, root: str = "m", method: int = zipfile.ZIP_STORED) -> Path:
    """Writes an archive that torch reads as well."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data, method)
    return path


def edited(content: Members, edit: Callable[[dict[str, Any]], object], name: str = MODEL) -> Members:
    """The members with one JSON file changed in place by ``edit``."""
    program = json.loads(content[name])
    edit(program)
    return {**content, name: json.dumps(program).encode()}


def expressions(value: Any) -> Iterator[dict[str, Any]]:
    """Every serialized size expression in a program."""
    if isinstance(value, dict):
        if "expr_str" in value:
            yield value
        for item in value.values():
            yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


# -- fuzzing ------------------------------------------------------------------------------------------------------

_STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        -(2**63),
        2**63,
        2**70,
        10**400,
        0.5,
        1e308,
        "",
        "x",
        "0",
        "\x1b[31m",
        "\u202e",
    ),
    *(
        "../x",
        "a" * 600,
        "Infinity",
        "__class__",
        "torch.ops.aten.add.Tensor",
        "torch.ops.aten.view.default",
        "os.system",
    ),
    *([], {}, [[]], [None], {"as_int": 3}, {"as_name": "x"}, {"as_none": True}, {"as_tensor": {"name": "x"}}),
    *({"as_expr": {"expr_str": "Symbol('s0', integer=True)", "hint": None}}, {"as_ints": [1, 2]}, {"as_int": -5}),
)


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        _places(item, found)


def mutate(program: Any, generator: random.Random) -> Any:
    """A copy of a JSON value with one to three changes: replaced, removed, doubled, swapped or moved values."""
    program = copy.deepcopy(program)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        found: list[tuple[Any, Any]] = []
        _places(program, found)
        if not found:
            break
        container, key = generator.choice(found)
        other, other_key = generator.choice(found)
        what = generator.randrange(8)
        if what >= 6:  # another value of the same kind: what an argument refers to, the op, a size, an expression
            wanted = generator.choice(("name", "target", "as_int", "expr_str", "as_name", "dtype"))
            alike = [place for place in found if place[1] == wanted]
            if len(alike) > 1:
                (container, key), (other, other_key) = generator.sample(alike, 2)
                container[key] = copy.deepcopy(other[other_key])
            continue
        if what == 0:
            container[key] = copy.deepcopy(generator.choice(_STRANGE))
        elif what == 1:
            del container[key]
        elif what == 2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif what == 3:
            container[key] = copy.deepcopy(other[other_key])
        elif what == 4 and isinstance(container[key], int):
            container[key] = container[key] + generator.choice((-2, -1, 1, 7))
        elif isinstance(container, dict):
            container[str(generator.choice((*container, "as_int", "as_tensor", "name")))] = container.pop(key)
        else:
            container.reverse()
    return program


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """The bytes with one to four changed, removed, added or zeroed pieces."""
    result = bytearray(data)
    for _ in range(generator.randrange(1, 5)):
        at = generator.randrange(len(result))
        what = generator.randrange(5)
        if what == 0:
            result[at] ^= 1 << generator.randrange(8)
        elif what == 1:
            result[at] = generator.randrange(256)
        elif what == 2:
            del result[at : at + generator.choice((1, 4, 100))]
        elif what == 3:
            result[at:at] = generator.randbytes(generator.choice((1, 4, 64)))
        else:
            result[at : at + 8] = bytes(8)
        if not result:
            break
    return bytes(result) or b"\0"
