"""The feed program: order, positions, inputs and shard in, the tensors for the lifted placeholders out.

What lies above the cuts is evaluated outside the graph on the whole sequence in natural order, once, and gathered
by the index streams of the axis it runs along: ``order[i]`` is the global slot that local slot ``i`` holds,
``positions[p]`` the position id of global slot ``p``. One-axis values follow ``positions[order]``, everything else
follows ``order``.

Two things are kept from step to step: the tables in natural order, by length, and the rows of the last order that all
samples shared. They are handed out as they are, and so is the memory of the program's own tables: ``kept.py`` notices
when somebody has written to it. What a step makes has the size of this shard; ``[batch, seq, *row]`` is made for values
of role ``col`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from buffer_lifting.errors import AxesError, FeedError
from buffer_lifting.feed_graph import FeedGraph
from buffer_lifting.kept import Kept, Originals
from buffer_lifting.program import AxesInfo, FeedOutput, InputAxes
from buffer_lifting.streams import Streams
from buffer_lifting.table_limits import TableLimit
from buffer_lifting.tables import lack_values

Lengths = int | Mapping[str, int]
#: For how many lengths tables are kept.
KEPT = 32


@dataclass
class FeedProgram:
    """Everything that :meth:`feed` needs. ``state`` maps FQNs to tables; a table on the meta device has no values."""

    outputs: tuple[FeedOutput, ...]
    axes: AxesInfo
    input_axes: dict[str, InputAxes]
    input_shapes: dict[str, tuple[tuple[int | None, ...], torch.dtype]]
    state: dict[str, torch.Tensor]
    natural: FeedGraph | None = None
    substituted: FeedGraph | None = None
    hoisted: FeedGraph | None = None
    max_lengths: dict[str, int] = field(default_factory=dict)
    table_limits: tuple[TableLimit, ...] = ()
    _tables: dict[Any, Kept] = field(default_factory=dict, init=False)
    _rows: dict[Any, tuple[Any, Kept]] = field(default_factory=dict, init=False)
    _originals: Originals = field(default_factory=Originals, init=False)

    def longest(self, axis: str, default: int) -> int:
        """The longest sequence that can be fed without position ids; ``default`` if nothing says."""
        rows = [limit.rows - limit.offset for limit in self.table_limits if limit.axis == axis]
        return min([self.max_lengths.get(axis, default), *rows])

    def feed(
        self,
        batch_size: int,
        lengths: dict[str, int],
        inputs: Mapping[str, torch.Tensor] | None,
        streams: Mapping[str, Streams],
        device: torch.device | None,
        names: frozenset[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of all lifted inputs (or those in ``names``): ``[batch, seq, *row]``, flat ``[seq, *row]``.

        ``lengths`` and ``streams`` are by axis name. A batch of several static microbatches is made in one call.
        """
        if self._originals.changed(self.state):
            self.clear_tables()
        wanted = [out for out in self.outputs if names is None or out.input.name in names]
        programs = {out.program for out in wanted}
        tables = self._natural_tables(lengths, device) if "natural" in programs else {}
        ready: dict[str, torch.Tensor] = {}
        if "substituted" in programs:
            substituted = [out for out in wanted if out.program == "substituted"]
            if all(along.positions is None for along in streams.values()):
                tables = tables | self._substituted_tables(lengths, device)
            else:
                ready |= self._substituted_rows(substituted, batch_size, lengths, streams, device)
        if "hoisted" in programs:
            if self.mixes_positions and any(along.positions is not None for along in streams.values()):
                raise FeedError(
                    "positions= cannot be given: a value is computed from user inputs and from the index that also "
                    "makes position ids, and which of the two it means is not known; give the model its position_ids"
                )
            hoisted = [out for out in wanted if out.program == "hoisted"]
            ready |= self._hoisted_rows(hoisted, batch_size, lengths, inputs, streams, device)
        result = {}
        for output in wanted:
            lifted = output.input
            value = ready.get(lifted.name)
            if value is None:
                value = self._selected(output, tables, lengths[lifted.axis], streams[lifted.axis], device)
            value = value.expand(batch_size, *value.shape[1:])
            result[lifted.name] = value if lifted.batched else value[0]
        return result

    def _kept(self, key: Any) -> dict[str, torch.Tensor] | None:
        """The tables of a length, which become the last ones to be forgotten; none if somebody has written to them."""
        kept = self._tables.pop(key, None)
        if kept is None or kept.written:
            return None
        self._tables[key] = kept
        return kept.values

    def _keep(self, key: Any, tables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        while len(self._tables) >= KEPT:
            del self._tables[next(iter(self._tables))]
        self._tables[key] = Kept(tables)
        return tables

    def _selected(
        self,
        output: FeedOutput,
        tables: Mapping[str, torch.Tensor],
        length: int,
        along: Streams,
        device: torch.device | None,
    ) -> torch.Tensor:
        """Rows of a table, or the index itself: ``[1 or batch, seq, *row]``.

        Of an order that all samples share, the last result is kept.
        """
        lifted = output.input
        stream = "slots" if along.positions is None else lifted.stream
        kept = along.order is not None and along.order.shape[0] == 1 and stream == "slots"
        key = (lifted.name, device)
        state = (along.order, along.rank, along.size)  # the order itself: equal orders are one tensor
        if kept and key in self._rows:
            before, rows = self._rows[key]
            if before[0] is state[0] and before[1:] == state[1:] and not rows.written:
                return rows.values[lifted.name]
        if output.program == "iota":
            value = along.index(length, stream, lifted.role, device)
        else:
            value = along.take(tables[lifted.name], length, stream, lifted.role)
        if kept:
            self._rows[key] = (state, Kept({lifted.name: value}))
        return value

    def clear_tables(self) -> None:
        """Forgets the tables that were computed."""
        self._tables.clear()
        self._rows.clear()
        self._originals = Originals()

    def _check_state(self, graph: FeedGraph) -> None:
        missing = sorted(lack_values({fqn: self.state[fqn] for fqn in graph.states.values()}))
        if missing:
            raise FeedError(
                f"the tables {', '.join(map(repr, missing))} have no values: the program was exported on the meta "
                "device or with fake tensors; give them with bind_tables(module_or_mapping)"
            )

    def _probe(self) -> int:
        """The batch that position values are evaluated at: two samples show whether they differ between samples."""
        return 2 if self.axes.has_batch else 1

    @property
    def mixes_positions(self) -> bool:
        """Whether a value hoisted from user inputs is computed from the index that makes position ids as well."""
        return self.hoisted is not None and bool(self.hoisted.iotas)

    def _natural_tables(self, lengths: dict[str, int], device: torch.device | None) -> dict[str, torch.Tensor]:
        """Position values on the whole sequence, ``[seq, *row]``; computed once a length and device."""
        assert self.natural is not None
        key = ("natural", tuple(sorted(lengths.items())), device)
        kept = self._kept(key)
        if kept is not None:
            return kept
        self._check_state(self.natural)
        raw = self.natural.run(self._values(self.natural, self._probe(), lengths))
        made = {
            out.input.name: _place(canonical(raw[out.node], out)[0], device)
            for out in self.outputs
            if out.program == "natural"
        }
        return self._keep(key, made)

    def _substituted_tables(self, lengths: dict[str, int], device: torch.device | None) -> dict[str, torch.Tensor]:
        """Values computed from the position ids, these being natural: ``[seq, *row]``, once a length and device."""
        key = ("substituted", tuple(sorted(lengths.items())), device)
        kept = self._kept(key)
        if kept is not None:
            return kept
        natural = {axis: torch.arange(length) for axis, length in lengths.items()}
        outs = [out for out in self.outputs if out.program == "substituted"]
        values = self._substituted_sample(outs, lengths, natural, device)
        return self._keep(key, {name: value[0] for name, value in values.items()})

    def _substituted_sample(
        self,
        outs: Sequence[FeedOutput],
        lengths: dict[str, int],
        ids: Mapping[str, torch.Tensor],
        device: torch.device | None,
    ) -> dict[str, torch.Tensor]:
        """The values of one sample, whole and in natural order, by lifted name: ``[1, seq, *row]``."""
        graph = self.substituted
        assert graph is not None
        self._check_state(graph)
        values = self._values(graph, self._probe(), lengths)
        for name, axis in graph.iotas.items():
            values[name] = ids[axis] if axis else torch.arange(lengths[outs[0].input.axis])
        raw = graph.run(values)
        return {out.input.name: _place(canonical(raw[out.node], out), device) for out in outs}

    def _substituted_rows(
        self,
        outs: Sequence[FeedOutput],
        batch_size: int,
        lengths: dict[str, int],
        streams: Mapping[str, Streams],
        device: torch.device | None,
    ) -> dict[str, torch.Tensor]:
        """Values computed from position ids that were given, this shard's rows, by lifted name.

        One sample at a time: the values of a sample are whole, those of the batch are not.
        """
        assert self.substituted is not None
        axes = set(self.substituted.iotas.values())
        if "" in axes:
            raise FeedError("one index of the program is read along several axes: positions= cannot stand for it")
        rows = {axis: streams[axis].position_rows(lengths[axis]) for axis in axes}
        count = max((len(own) for own in rows.values()), default=1)
        result: dict[str, torch.Tensor] = {}
        for sample in range(count):
            ids = {axis: own[sample if len(own) > 1 else 0] for axis, own in rows.items()}
            values = self._substituted_sample(outs, lengths, ids, device)
            for out in outs:
                lifted = out.input
                along = streams[lifted.axis]
                own = along if count == 1 else along.samples(sample, 1)
                taken = own.take_batched(values[lifted.name], lengths[lifted.axis], lifted.role)
                if count == 1:
                    result[lifted.name] = taken
                    continue
                if sample == 0:
                    result[lifted.name] = taken.new_empty(batch_size, *taken.shape[1:])
                result[lifted.name][sample] = taken[0]
        return result

    def _hoisted_rows(
        self,
        outs: Sequence[FeedOutput],
        batch_size: int,
        lengths: dict[str, int],
        inputs: Mapping[str, torch.Tensor] | None,
        streams: Mapping[str, Streams],
        device: torch.device | None,
    ) -> dict[str, torch.Tensor]:
        """Values computed from the whole, unsharded user inputs, this shard's rows, by lifted name.

        A program with a static batch computes them for so many samples at a time.
        """
        graph = self.hoisted
        assert graph is not None
        needed = sorted({name for out in self.outputs if out.program == "hoisted" for name in self._reads(out)})
        missing = [name for name in needed if name not in (inputs or {})]
        if missing:
            raise FeedError(
                f"lifted inputs are computed from user inputs; give feed(inputs={{...}}) the whole, unsharded "
                f"{', '.join(repr(name) for name in missing)}"
            )
        assert inputs is not None
        self._check_state(graph)
        for name in needed:
            self._check_input(name, inputs[name], batch_size, lengths)
        micro = batch_size if self.axes.batch is None else self.axes.batch
        parts: dict[str, list[torch.Tensor]] = {out.input.name: [] for out in outs}
        for start in range(0, batch_size, micro):
            values = self._values(graph, micro, lengths)
            for name in needed:
                axes = self.input_axes.get(name)
                dim = None if axes is None else axes.batch_dim
                values[name] = inputs[name] if dim is None else inputs[name].narrow(dim, start, micro)
            for name, axis in graph.iotas.items():
                values[name] = torch.arange(lengths[axis] if axis else next(iter(lengths.values())))
            raw = graph.run(values)
            for out in outs:
                own = streams[out.input.axis].samples(start, micro)
                value = _place(canonical(raw[out.node], out, batched=True), device)
                part = own.take_batched(value, lengths[out.input.axis], out.input.role)
                parts[out.input.name].append(part if micro == batch_size else part.expand(micro, *part.shape[1:]))
        return {name: own[0] if len(own) == 1 else torch.cat(own) for name, own in parts.items()}

    def _reads(self, output: FeedOutput) -> set[str]:
        """The user inputs whose contents a hoisted output needs."""
        assert self.hoisted is not None
        return {name for name in self.hoisted.carriers if name in self.hoisted.module.meta["contents"]}

    def _check_input(self, name: str, value: torch.Tensor, batch: int, lengths: dict[str, int]) -> None:
        axes = self.input_axes.get(name)
        expected = {} if axes is None else {dim: lengths[axis] for dim, axis, _ in axes.seq_dims}
        if axes is not None and axes.batch_dim is not None:
            expected[axes.batch_dim] = batch
        for dim, size in expected.items():
            if dim >= value.ndim or value.shape[dim] != size:
                raise FeedError(
                    f"input {name!r} has shape {tuple(value.shape)}, but dim {dim} of the whole, unsharded input "
                    f"has size {size}"
                )

    def _values(self, graph: FeedGraph, batch: int, lengths: dict[str, int]) -> dict[str, Any]:
        """States, and zero-stride stand-ins that carry the sizes of the user inputs."""
        values: dict[str, Any] = {name: self._originals.take(fqn, self.state) for name, fqn in graph.states.items()}
        for name in graph.carriers:
            shape, dtype = self.input_shapes[name]
            axes = self.input_axes.get(name)
            sizes = [size if size is not None else 1 for size in shape]
            if axes is not None:
                if axes.batch_dim is not None and shape[axes.batch_dim] is None:
                    sizes[axes.batch_dim] = batch
                for dim, axis, _ in axes.seq_dims:
                    sizes[dim] = lengths[axis]
            values[name] = torch.zeros((), dtype=dtype).expand(sizes)
        return values


def _same_rows(value: torch.Tensor) -> bool:
    """Whether all samples are equal, up to the rounding of vector kernels (4 units in the last place)."""
    same = value == value[:1]
    if value.is_floating_point() or value.is_complex():
        same |= (value - value[:1]).abs() <= 4 * torch.finfo(value.dtype).eps * value[:1].abs()
    return bool(same.all())


def canonical(value: torch.Tensor, output: FeedOutput, batched: bool = False) -> torch.Tensor:
    """A cut value as ``[batch, seq, *row]``; values that no sample changes keep one sample."""
    dims = list(range(value.ndim))
    lead = [output.batch_dim] if output.batch_dim is not None else []
    rest = [d for d in dims if d not in (*lead, output.seq_dim, *output.drop_dims)]
    moved = value.permute(*lead, output.seq_dim, *rest, *output.drop_dims)
    if lead and not batched and not _same_rows(moved):
        error = FeedError(
            f"node {output.node!r}, which {output.input.name!r} is cut at, has other values for each sample although "
            "it depends on no input: microbatches would change it"
        )
        error.node = output.node
        raise error
    for _ in output.drop_dims:
        moved = moved.squeeze(-1)
    if not lead:
        moved = moved.unsqueeze(0)
    return moved if batched else moved[:1]


def _place(value: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return value if device is None else value.to(device)


def check_lengths(axes: AxesInfo, batch_size: int, seq_len: Lengths, maxima: Mapping[str, int]) -> dict[str, int]:
    """Lengths by axis.

    Raises:
        AxesError: a static program was exported with another size, or an axis is not given.
        FeedError: a size that is no positive integer, or longer than the program's tables.
    """
    if isinstance(seq_len, Mapping):
        lengths = dict(seq_len)
        missing, unknown = sorted(set(axes.lengths) - set(lengths)), sorted(set(lengths) - set(axes.lengths))
        if missing:
            raise AxesError(f"seq_len= gives no length for the axes {missing}")
        if unknown:
            raise AxesError(f"seq_len= names the axes {unknown}; the program's are {sorted(axes.lengths)}")
    elif len(axes.lengths) > 1:
        raise AxesError(f"the program has several sequence axes, {sorted(axes.lengths)}: give seq_len= a mapping")
    else:
        lengths = dict.fromkeys(axes.lengths, seq_len)
    for name, value in [("batch_size", batch_size), *lengths.items()]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FeedError(f"{name} must be a positive integer, not {value!r}")
    if axes.batch is not None and axes.batch != batch_size:
        raise AxesError(
            f"the program was exported with a static batch of {axes.batch} (it is the microbatch), and cannot be fed "
            f"a batch of {batch_size}; export with a dynamic batch dim (torch.export.Dim) to change it"
        )
    for axis, length in lengths.items():
        fixed = axes.lengths.get(axis)
        if fixed is not None and fixed != length:
            raise AxesError(
                f"the program was exported with a static sequence of {fixed} on axis {axis!r}, and cannot be fed "
                f"{length}; export with a dynamic sequence dim (torch.export.Dim) to change it"
            )
        if length > maxima.get(axis, length):
            raise FeedError(
                f"a sequence of {length} is longer than the program allows on axis {axis!r}: {maxima[axis]}"
            )
    return lengths
