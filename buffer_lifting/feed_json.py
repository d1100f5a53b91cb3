"""The records of a lifted program and its feed program as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.feed import FeedProgram
from buffer_lifting.feed_graph import FeedGraph
from buffer_lifting.graph_json import (
    decode_graph,
    decode_record,
    dtype_name,
    dtype_of,
    encode_graph,
    encode_record,
)
from buffer_lifting.lifted import LiftedProgram
from buffer_lifting.loss_reduction import LossReduction
from buffer_lifting.program import AxesInfo, FeedOutput, InputAxes, LiftedInput, ScanReport
from buffer_lifting.table_limits import TableLimit
from buffer_lifting.tables import has_values
from buffer_lifting.tensor_file import write_tensors

GRAPHS = ("natural", "substituted", "hoisted")


def encode_records(lifted: LiftedProgram) -> dict[str, Any]:
    """Everything but the program and the feed graphs."""
    feed = lifted.feed_program
    shapes = {name: {"shape": shape, "dtype": dtype_name(dtype)} for name, (shape, dtype) in feed.input_shapes.items()}
    return {
        "inputs": encode_record(lifted.inputs),
        "outputs": encode_record(feed.outputs),
        "axes": encode_record(feed.axes),
        "input_axes": encode_record(list(feed.input_axes.items())),  # a list: their order counts
        "input_shapes": shapes,
        "max_lengths": feed.max_lengths,
        "table_limits": encode_record(feed.table_limits),
        "report": encode_record(lifted.report),
        "cp_size": lifted.cp_size,
        "mesh_dim": lifted.mesh_dim,
        "losses": encode_record(lifted.losses),
        "ring_axes": list(lifted.ring_axes),
    }


def encode_feed(feed: FeedProgram, stream: IO[bytes], known: Mapping[str, Any]) -> dict[str, Any]:
    """The graphs and tables. Those that ``known`` holds in the same memory are noted, not written."""
    graphs: dict[str, Any] = {}
    for name in GRAPHS:
        graph: FeedGraph | None = getattr(feed, name)
        if graph is not None:
            graphs[name] = {
                "states": graph.states,
                "carriers": graph.carriers,
                "targets": graph.targets,
                "iotas": dict(graph.iotas),
                "contents": sorted(graph.module.meta["contents"]),
                "nodes": encode_graph(graph.module.graph),
            }
    shared = {fqn for fqn, table in feed.state.items() if _same_memory(table, known.get(fqn))}
    own = {fqn: table for fqn, table in feed.state.items() if fqn not in shared}
    return {"graphs": graphs, "tables": write_tensors(stream, own), "in_program": sorted(shared)}


def _same_memory(table: torch.Tensor, other: Any) -> bool:
    if not isinstance(other, torch.Tensor) or not has_values(table) or table.device != other.device:
        return False
    same = (table.data_ptr(), table.dtype, table.shape) == (other.data_ptr(), other.dtype, other.shape)
    return same and table.stride() == other.stride()


def decode_lifted(
    program: ExportedProgram,
    records: Mapping[str, Any],
    document: Mapping[str, Any],
    tables: dict[str, torch.Tensor],
) -> LiftedProgram:
    """The lifted program of its records, its feed document and its tables."""
    graphs: dict[str, FeedGraph] = {}
    for name, entry in document["graphs"].items():
        module = decode_graph(entry["nodes"], torch.nn.Module())
        module.meta["contents"] = set(entry["contents"])
        states, iotas = (decode_record(dict[str, str], entry[key]) for key in ("states", "iotas"))
        graphs[name] = FeedGraph(module, states, tuple(entry["carriers"]), tuple(entry["targets"]), iotas)
    shapes = {
        name: (decode_record(tuple[int | None, ...], entry["shape"]), dtype_of(entry["dtype"]))
        for name, entry in records["input_shapes"].items()
    }
    feed = FeedProgram(
        outputs=decode_record(tuple[FeedOutput, ...], records["outputs"]),
        axes=decode_record(AxesInfo, records["axes"]),
        input_axes=dict(decode_record(tuple[tuple[str, InputAxes], ...], records["input_axes"])),
        input_shapes=shapes,
        state=dict(sorted(tables.items())),
        **{name: graphs.get(name) for name in GRAPHS},
        max_lengths=decode_record(dict[str, int], records["max_lengths"]),
        table_limits=decode_record(tuple[TableLimit, ...], records.get("table_limits", [])),
    )
    inputs = decode_record(tuple[LiftedInput, ...], records["inputs"])
    report = decode_record(ScanReport, records["report"])
    cp_size = decode_record(int | None, records["cp_size"])
    mesh_dim = decode_record(str | None, records["mesh_dim"])
    losses = decode_record(tuple[LossReduction, ...], records.get("losses", []))
    ring_axes = decode_record(tuple[str, ...], records.get("ring_axes", []))
    return LiftedProgram(program, inputs, report, feed, cp_size, mesh_dim, losses, ring_axes)
