"""The records in the JSON of a saved lifted program or partition, against an explicit schema, without torch.

Every function raises :class:`SchemaError` for what is not as ``package.py`` writes it.
"""

from __future__ import annotations

from typing import Any, cast

from buffer_lifting.boundaries import BoundaryTensor
from buffer_lifting.graph.archive_schema import (
    SchemaError,
    as_bool,
    as_count,
    as_dict,
    as_dim,
    as_dims,
    as_int,
    as_list,
    as_text,
    field,
)
from buffer_lifting.graph.record import Location
from buffer_lifting.inspection.rules import RULES
from buffer_lifting.program import (
    AxesInfo,
    Finding,
    Form,
    InputAxes,
    LiftedInput,
    PositionRead,
    ScanReport,
    SequenceMixing,
    Stream,
)

_FORMS = ("values", "positions", "natural")
_STREAMS = ("positions", "slots", "inputs")


def report_of(records: dict[str, Any]) -> ScanReport:
    """The scan of the original program."""
    value = as_dict(field(records, "report", "the records"), "report")
    return ScanReport(
        tuple(_read(as_dict(item, "a read")) for item in as_list(field(value, "reads", "report"), "reads")),
        tuple(_mixing(as_dict(item, "an op")) for item in as_list(field(value, "mixing", "report"), "mixing")),
        tuple(_input_axes(as_dict(item, "an input")) for item in as_list(field(value, "inputs", "report"), "inputs")),
        tuple(_finding(as_dict(item, "a finding")) for item in as_list(field(value, "findings", "report"), "findings")),
    )


def inputs_of(records: dict[str, Any]) -> tuple[LiftedInput, ...]:
    """The lifted inputs."""
    items = as_list(field(records, "inputs", "the records"), "inputs")
    return tuple(_input(as_dict(item, "an input")) for item in items)


def input_axes_of(records: dict[str, Any]) -> dict[str, InputAxes]:
    """The axes of the user's inputs, by the names of their placeholders."""
    axes = {}
    for pair in as_list(field(records, "input_axes", "the records"), "input_axes"):
        if len(as_list(pair, "an input's axes")) != 2:
            raise SchemaError("an input's axes are no pair")
        axes[as_text(pair[0], "a name")] = _input_axes(as_dict(pair[1], "an input's axes"))
    return axes


def axes_of(records: dict[str, Any]) -> AxesInfo:
    """The sizes of the axes."""
    value = as_dict(field(records, "axes", "the records"), "axes")
    sizes = as_dict(field(value, "lengths", "axes"), "lengths")
    batch = field(value, "batch", "axes")
    return AxesInfo(
        None if batch is None else as_int(batch, "batch"),
        {name: None if size is None else as_int(size, "a length") for name, size in sizes.items()},
        as_bool(field(value, "has_batch", "axes"), "has_batch"),
    )


def outputs_of(stage: dict[str, Any]) -> tuple[BoundaryTensor, ...] | None:
    """What a stage hands on; ``None`` in a partition that was saved before this was recorded."""
    if "output_shapes" not in stage:
        return None
    return tuple(
        BoundaryTensor(
            _text(item, "name"),
            _text(item, "dtype"),
            tuple(as_text(size, "a size") for size in as_list(field(item, "shape", "a tensor"), "shape")),
            _text(item, "module"),
            _text(item, "op"),
        )
        for item in (as_dict(entry, "a tensor") for entry in as_list(stage["output_shapes"], "output_shapes"))
    )


def names_of(stage: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of names in a stage: ``activations``, ``kwargs``, ``outputs`` or ``parameters``."""
    return tuple(as_text(item, "a name") for item in as_list(field(stage, key, "a stage"), key))


def _input_axes(value: dict[str, Any]) -> InputAxes:
    batch = field(value, "batch_dim", "an input's axes")
    return InputAxes(
        _text(value, "name"),
        None if batch is None else as_dim(batch, "batch_dim"),
        _seq_dims(value),
        as_dim(field(value, "rank", "an input's axes"), "rank"),
    )


def _read(value: dict[str, Any]) -> PositionRead:
    refusal, form = value.get("refusal"), value.get("form")
    batch = value.get("batch_dim")
    return PositionRead(
        source_kind=_text(value, "source_kind"),
        source=_text(value, "source"),
        aliases=tuple(as_text(item, "a name") for item in as_list(value.get("aliases", []), "aliases")),
        value=_text(value, "value"),
        node=_text(value, "node"),
        op=_text(value, "op"),
        operand=_text(value, "operand"),
        seq_dims=_seq_dims(value),
        batch_dim=None if batch is None else as_dim(batch, "batch_dim"),
        stream=cast(Stream, _one_of(field(value, "stream", "a read"), _STREAMS, "stream")),
        form=None if form is None else cast(Form, _one_of(form, _FORMS, "form")),
        refusal=None if refusal is None else as_text(refusal, "refusal"),
        location=_location(value),
        modules=_modules(value),
        code=_code(value),
        hint=_text(value, "hint"),
        sources=tuple(as_text(item, "a name") for item in as_list(value.get("sources", []), "sources")),
        expression=as_text(value.get("expression", ""), "expression"),
        module_class=as_text(value.get("module_class", ""), "a class"),
    )


def _mixing(value: dict[str, Any]) -> SequenceMixing:
    return SequenceMixing(
        _text(value, "node"),
        _text(value, "op"),
        _text(value, "reason"),
        _location(value),
        _modules(value),
        as_bool(field(value, "handled", "an op"), "handled"),
        _code(value),
        _text(value, "hint"),
        as_text(value.get("module_class", ""), "a class"),
    )


def _finding(value: dict[str, Any]) -> Finding:
    source = as_text(value.get("source", ""), "source")
    return Finding(_code(value), _text(value, "message"), _text(value, "hint"), _location(value), source)


def _input(value: dict[str, Any]) -> LiftedInput:
    rows = as_dims(field(value, "row_shape", "an input"), "row_shape")
    return LiftedInput(
        _text(value, "name"),
        cast(Form, _one_of(field(value, "form", "an input"), _FORMS, "form")),
        cast(Stream, _one_of(field(value, "stream", "an input"), _STREAMS, "stream")),
        _one_of(field(value, "role", "an input"), ("row", "col"), "role"),
        _text(value, "source"),
        _text(value, "dtype"),
        tuple(as_count(size, "a size") for size in rows),
        _text(value, "axis"),
        as_bool(field(value, "batched", "an input"), "batched"),
    )


def _seq_dims(value: dict[str, Any]) -> tuple[tuple[int, str, str], ...]:
    dims = []
    for item in as_dims(field(value, "seq_dims", "the records"), "seq_dims"):
        if len(as_list(item, "a dim")) != 3:
            raise SchemaError("a sequence dim is not a dim, an axis and a role")
        role = _one_of(item[2], ("row", "col"), "a role")
        dims.append((as_dim(item[0], "a dim"), as_text(item[1], "an axis"), role))
    return tuple(dims)


def _one_of(value: Any, known: tuple[str, ...], what: str) -> str:
    text = as_text(value, what)
    if text not in known:
        raise SchemaError(f"{what} is none of {', '.join(known)}")
    return text


def _text(value: dict[str, Any], key: str) -> str:
    return as_text(field(value, key, "the records"), key)


def _code(value: dict[str, Any]) -> str:
    code = _text(value, "code")
    if code not in RULES:
        raise SchemaError("the report has a code that is not known here")
    return code


def _modules(value: dict[str, Any]) -> tuple[str, ...]:
    return tuple(as_text(item, "a module") for item in as_list(field(value, "modules", "report"), "modules"))


def _location(value: dict[str, Any]) -> Location | None:
    item = field(value, "location", "report")
    if item is None:
        return None
    where = as_dict(item, "location")
    line = as_int(field(where, "line", "location"), "line")
    return Location(_text(where, "file"), line, _text(where, "code"), _text(where, "function"))
