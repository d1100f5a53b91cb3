"""Private torch is used in ``buffer_lifting/torch_compat.py`` only, whatever the torch that the tests run on."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import buffer_lifting

ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / "buffer_lifting" / "torch_compat.py"
SOURCES = sorted(
    path
    for folder in ("buffer_lifting", "tools", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path != COMPAT
)
#: Not torch's: those of namedtuples, of ``os`` and of a configuration of transformers.
NOT_TORCH = frozenset({"_replace", "_fields", "_asdict", "_make", "_exit", "_attn_implementation"})
#: Attributes without an underscore that are internal nevertheless: torch documents none of them.
INTERNAL = frozenset({"shape_env", "fake_mode"})
#: Benchmarks measure what torch has no public name for, and the example takes a load balancer of torch, as users do.
ALLOWED = {
    "benchmarks/balance_cost.py": {"_load_balancer"},
    "benchmarks/feed_cost.py": {"_context_parallel_shard", "_internal"},
    "examples/torchtitan_stages.py": {"_checkpoint"},
    "examples/train_pp_cp.py": {"_PerDocumentHeadTailLoadBalancer"},
}
ATTRIBUTE_CALLS = frozenset({"getattr", "setattr", "hasattr", "delattr"})


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a file gives to functions, classes, fields, variables and attributes of ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _text(node.value) in ("self", "cls")
        ):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def _text(node: ast.expr) -> str:
    """``"torch.ops.aten"`` for a chain of names, else empty."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _text(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _imports(node: ast.stmt) -> list[str]:
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def offences(source: str, own: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each use of private torch, ``own`` being the private names of the project.

    An op (``torch.ops.aten._grouped_mm``) is no private API of Python: its name is part of graphs.
    """
    tree = ast.parse(source)
    roots = {"torch"}
    for node in ast.walk(tree):
        for name in _imports(node) if isinstance(node, ast.stmt) else ():
            if name.split(".")[0] == "torch":
                roots.update(alias.asname or alias.name.split(".")[0] for alias in node.names)  # type: ignore[attr-defined]
                if any(is_private(part) for part in name.split(".")):
                    yield node.lineno, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = _text(node)
            if chain.startswith("torch.ops.") or node.attr in NOT_TORCH:
                continue
            rooted = chain.split(".")[0] in roots
            if (is_private(node.attr) and (rooted or node.attr not in own)) or node.attr in INTERNAL:
                yield node.lineno, chain or f"(...).{node.attr}"
        elif isinstance(node, ast.Call) and _text(node.func) in ATTRIBUTE_CALLS and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
            private = isinstance(name, str) and is_private(name) and name not in own | NOT_TORCH
            if private or name in INTERNAL:
                yield node.lineno, f"{_text(node.func)}({name!r})"


def test_private_torch_is_used_in_one_file() -> None:
    texts = {path: path.read_text() for path in SOURCES}
    own = frozenset().union(*(own_names(ast.parse(text)) for text in texts.values()))
    found, used = [], set()
    for path, text in texts.items():
        name = path.relative_to(ROOT).as_posix()
        for line, what in offences(text, own):
            allowed = ALLOWED.get(name, set()) & set(what.split("."))
            used |= {(name, part) for part in allowed}
            if not allowed:
                found.append(f"{name}:{line}: {what}")
    assert not found, "use it in torch_compat.py, beside the public alternative that is missing:\n" + "\n".join(found)
    assert used == {(name, part) for name, parts in ALLOWED.items() for part in parts}, "no longer there"
    assert len(list(offences(COMPAT.read_text(), own))) > 20, "the check finds what is there"


def test_no_class_replaces_what_is_private_to_its_torch_base() -> None:
    """A method of ours with the name of a private one of torch's class changes torch's behaviour."""
    found = []
    for info in pkgutil.walk_packages(buffer_lifting.__path__, "buffer_lifting."):
        if info.name.endswith("__main__") or info.name == "buffer_lifting.torch_compat":
            continue
        for name, kind in vars(importlib.import_module(info.name)).items():
            if isinstance(kind, type) and kind.__module__ == info.name:
                bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "torch"]
                taken = {attribute for base in bases for attribute in dir(base) if is_private(attribute)}
                found += [f"{info.name}.{name}.{attribute}" for attribute in vars(kind) if attribute in taken]
    assert not found


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import torch._C", "torch._C"),
        ("from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        (
            "def f():\n    from torch._subclasses.fake_tensor import FakeTensor",
            "torch._subclasses.fake_tensor.FakeTensor",
        ),
        ("import torch\ntorch._C._get_max_operator_version()", "torch._C._get_max_operator_version"),
        ("import torch.fx as fx\nfx._lazy_graph_module", "fx._lazy_graph_module"),
        ("import torch\nx = torch.fx._own", "torch.fx._own"),
        ("node.target._schema", "node.target._schema"),
        ("f(x)._schema", "(...)._schema"),
        ("program._guards_code = []", "program._guards_code"),
        ("class M(nn.Module):\n    def f(self): return self._parameters", "self._parameters"),
        ("getattr(node.target, '_schema', None)", "getattr('_schema')"),
        ("size.node.shape_env.replacements", "size.node.shape_env"),
        ("self._own", None),
        ("size._replace(role=1)", None),
        ("torch.ops.aten._grouped_mm.default", None),
        ("'torch._C'", None),
    ],
)
def test_what_is_found(source: str, expected: str | None) -> None:
    found = [what for _, what in offences(source, frozenset({"_own"}))]
    assert (expected in found) if expected else not found


def test_the_names_of_a_file() -> None:
    source = "_A = 1\nclass _B:\n    _c: int = 0\n    def _d(self): self._e = other._f; other._g = 0; self.h = 1"
    assert own_names(ast.parse(source)) == {"_A", "_B", "_c", "_d", "_e"}
