"""What holds for every layer is said once."""

from __future__ import annotations

from buffer_lifting.layers import common, layers, pattern, spread


def test_numbers_that_stand_alone_are_layers() -> None:
    assert layers("model.layers.12.attn.0") == "model.layers.*.attn.*"
    assert layers("h1.w2.3x.inv_freq_4") == "h1.w2.3x.inv_freq_4"
    assert layers("0") == "*" and layers("") == ""


def test_messages_that_differ_in_the_layer_only() -> None:
    sources = ["layers.0.table", "layers.1.table"]
    messages = [f"cannot lift buffer {source!r}: flip (at flip_{place})" for place, source in enumerate(sources)]
    assert len({pattern(message) for message in messages}) == 1
    assert common(messages) == "cannot lift buffer 'layers.*.table': flip"
    assert common(messages[:1]) == messages[0], "one is shown as it is"
    assert pattern("a 2 (at x) b") == "a 2 (at x) b", "neither a name nor at the end"
    assert pattern("'a.0.b' with 'c.0', 'd.1'") == "'a.*.b' with 'c.*', 'd.*'", "every name"


def test_where_they_are() -> None:
    assert spread(["layers.0.attn", "layers.1.attn"]) == "layers: layers.*.attn"
    assert spread(["layers.0.attn", "layers.0.mlp"]) == "modules"
