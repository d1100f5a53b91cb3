"""The generated table of ops is what torch's registry says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from buffer_lifting import ops_table
from buffer_lifting.graph.record import Node, NodeKind, Ref
from buffer_lifting.ops import is_mutating, is_pointwise, is_random, is_view
from buffer_lifting.ops_schemas import PARTIAL

ROOT = Path(__file__).resolve().parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_ops_table", ROOT / "tools" / "generate_ops_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_up_to_date() -> None:
    """On each torch: of its ops, the table says what it says itself; the others are those of another version."""
    module = generator()
    groups, here = module.known(), module.collect()
    assert module.merge(groups, here) == groups, "run python tools/generate_ops_table.py"
    assert module.render(groups) == module.TARGET.read_text()
    partial = {f"aten.{name.partition('.')[0]}" for name in PARTIAL.split()}
    assert all(names - here[key] <= partial for key, names in groups.items())


def test_the_table_says_what_this_torch_says() -> None:
    """An op of this torch that lost a property is noticed."""
    module = generator()
    groups = module.known()
    wrong = {**groups, "POINTWISE": groups["POINTWISE"] | {"aten.cumsum"}}
    assert module.merge(wrong, module.collect()) == groups


def test_table_has_known_ops() -> None:
    assert {"aten.add", "aten.cos", "aten.masked_fill"} <= ops_table.POINTWISE
    assert {"aten.view", "aten.slice", "aten.select"} <= ops_table.VIEWS
    assert {"aten.add_", "aten.copy_", "aten.index_put_"} <= ops_table.MUTATING
    assert {"aten.rand", "aten.dropout"} <= ops_table.RANDOM
    for group in (ops_table.POINTWISE, ops_table.VIEWS):
        assert not {"aten.matmul", "aten.cumsum", "aten.softmax", "aten.roll", "aten.sum", "aten.flip"} & group


def op(name: str, **args: object) -> Node:
    return Node("n", NodeKind.OP, name, args={"self": Ref("x"), **args})  # type: ignore[arg-type]


def test_questions() -> None:
    assert is_pointwise(op("aten.to.dtype")) and not is_pointwise(op("aten.cumsum.default"))
    assert is_view(op("aten.clone.default")) and not is_view(op("aten.add.Tensor"))
    assert is_mutating(op("aten.add_.Tensor")) and not is_mutating(op("aten.detach_.default"))
    assert is_random(op("aten.dropout.default", p=0.1, train=True))
    assert not is_random(op("aten.dropout.default", p=0.0, train=True))
    assert not is_random(op("aten.dropout.default", p=0.1, train=False))
