"""The lifted program: what :func:`buffer_lifting.lift` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from buffer_lifting.errors import FeedError
from buffer_lifting.feed import FeedProgram, Lengths, check_lengths
from buffer_lifting.graph.from_fx import Recorded
from buffer_lifting.loss_reduction import LossReduction
from buffer_lifting.program import AxesInfo, InputAxes, LiftedInput, ScanReport
from buffer_lifting.sharding import shard_inputs
from buffer_lifting.streams import axis_streams, parse_shard
from buffer_lifting.table_limits import check_tables
from buffer_lifting.tables import TableSource, find_values, has_values, lack_values


@dataclass
class LiftedProgram:
    """A program whose position values are inputs, with everything needed to feed them.

    Attributes:
        program: a valid ExportedProgram; the lifted inputs are keywords after the user's own.
        inputs: the lifted inputs, in the order of their placeholders.
        report: what the scan of the original program found.
        cp_size: the context-parallel size the program was transformed for; ``None`` before
            :func:`buffer_lifting.context_parallel`.
        mesh_dim: name of the context-parallel mesh dim.
        losses: how each loss that the program computes itself adds up over ranks and microbatches; known after
            :func:`buffer_lifting.context_parallel`. ``TokenLoss.of`` takes it from here.
        ring_axes: the sequence axes along which causal attention is torch's ring: they take a contiguous or a
            head-tail order, the same for all samples.
    """

    program: ExportedProgram
    inputs: tuple[LiftedInput, ...]
    report: ScanReport
    feed_program: FeedProgram
    cp_size: int | None = None
    mesh_dim: str | None = None
    losses: tuple[LossReduction, ...] = ()
    ring_axes: tuple[str, ...] = ()
    _validated: dict[str, Any] = field(default_factory=dict, repr=False)
    #: The values inside the routing of tokens to experts, as the scan found them; not known for a loaded program.
    _routed: frozenset[str] | None = field(default=None, repr=False)
    #: What is known of the nodes of ``program`` that the scan has seen; not known for a loaded program.
    _recorded: Recorded | None = field(default=None, repr=False, compare=False)

    @property
    def axes(self) -> AxesInfo:
        """The batch size and sequence lengths; ``None`` for those that are dynamic."""
        return self.feed_program.axes

    def feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None = None,
        order: Any = None,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        shard: Any = (0, 1),
        device: torch.device | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors for the lifted placeholders, for one rank and step.

        A program with several sequence axes (``lifted.axes.lengths`` has their names) takes ``seq_len``, ``order``
        and ``positions`` as mappings from axis name, as in ``seq_len={"seq": 11, "decoder": 7}``.

        Args:
            batch_size: samples in the batch.
            seq_len: tokens of the whole (global) sequence; a mapping from axis name to tokens if there are several.
            inputs: whole, unsharded user inputs by name, needed when values are hoisted from them.
            order: ``(S,)``, ``(1, S)`` or ``(B, S)`` integers, local slot -> global slot, all ranks' shards in a
                row; or a torch context-parallel load balancer; or ``None`` for the natural order; or a mapping from
                axis name to one of these, in which an axis that is left out is in natural order. Every rank gives
                the same one: :func:`buffer_lifting.check_orders` tells in the first step whether they do.
            positions: ``(S,)`` or ``(B, S)`` position ids of the whole sequence in natural order, below ``S``
                (packed documents restart at 0); or a mapping from axis name to such a tensor.
            shard: ``(rank, size)`` of this context-parallel rank, or a 1-D DeviceMesh; every axis is cut alike.
            device: where the tensors go; default: where the program's tables are.

        Returns:
            By placeholder name, ``[batch, local seq, *row]`` for role ``row``, ``[batch, seq, *row]`` for role
            ``col`` (flat tokens: no batch dim). A natural order, or one shared by all samples, costs no batch
            copies: the batch dim has stride 0, and its rows are kept until another order comes. In natural order they
            are views of the program's tables, the model's own buffers among them, and what is taken from ``inputs``
            may be a view of those. Do not write to any of them; ``clone()`` first. Kept rows that were written to are
            made again.

        Raises:
            AxesError: a size that a static program does not have, or a ``seq_len`` without one of the axes.
            FeedError: an order, positions, inputs or shard that does not fit, or an order that the program's ring
                attention does not follow; one order for several axes; a sequence or position ids beyond the rows of a
                table that the program looks up by position; a table that was written to by way of an earlier feed.
        """
        pair = self._shard(shard)
        return self._feed(batch_size, seq_len, inputs, order, positions, pair, device)

    def _shard(self, shard: Any) -> tuple[int, int]:
        pair = parse_shard(shard, self.mesh_dim)
        self._check_shard(pair[1])
        return pair

    def _check_shard(self, size: int) -> None:
        if self.cp_size is not None and size != self.cp_size:
            raise FeedError(
                f"shard has size {size}, but the program was made for a context-parallel size of {self.cp_size}; "
                f"call buffer_lifting.context_parallel(lifted, size={size})"
            )
        if self.cp_size is None and size > 1:
            if any(lifted.role == "col" for lifted in self.inputs):
                raise FeedError(
                    f"shard has size {size}, but the program's masks want the keys of the whole sequence, which only "
                    f"buffer_lifting.context_parallel(lifted, size={size}) gives its attention"
                )
            if any(length is not None for length in self.axes.lengths.values()):
                raise FeedError(
                    f"a static program cannot be fed a shard of size {size}; export with a dynamic sequence"
                )

    def _feed(
        self,
        batch_size: int,
        seq_len: Lengths,
        inputs: Mapping[str, torch.Tensor] | None,
        order: Any,
        positions: torch.Tensor | Mapping[str, torch.Tensor] | None,
        shard: tuple[int, int],
        device: torch.device | str | None,
        names: frozenset[str] | None = None,
        micro: int | None = None,
    ) -> dict[str, torch.Tensor]:
        unknown = sorted(set(inputs or ()) - set(self.feed_program.input_shapes))
        if unknown:
            raise FeedError(f"inputs= names {unknown}, which are no inputs of the program ({sorted(self.input_axes)})")
        lengths = check_lengths(self.axes, micro or batch_size, seq_len, self.feed_program.max_lengths)
        streams = axis_streams(batch_size, lengths, order, positions, shard, self.ring_axes)
        check_tables(self.feed_program.table_limits, streams)
        place = None if device is None else torch.device(device)
        return self.feed_program.feed(batch_size, lengths, inputs, streams, place, names)

    def shard_inputs(
        self, *, order: Any = None, shard: Any = (0, 1), **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """User inputs in the order of the shards, each cut along its own sequence dims.

        Args:
            order: as in :meth:`feed`: a mapping from axis name if the program has several sequence axes.
            shard: as in :meth:`feed`.
            inputs: whole user inputs by name. A sequence dim of role ``row`` is reordered and cut to this shard,
                one of role ``col`` is reordered and kept whole. ``target`` is what ``schedule.step`` takes besides,
                ``[B, S, ...]``: it goes with the tokens.

        Raises:
            FeedError: an input that the program does not have, or an order or shard that does not fit.
        """
        return shard_inputs(self.input_axes, inputs, order, parse_shard(shard, self.mesh_dim), self.ring_axes)

    @property
    def input_axes(self) -> dict[str, InputAxes]:
        """The axes of each user input, by name."""
        return self.feed_program.input_axes

    def bind_tables(self, source: TableSource) -> None:
        """Gives values to the tables of a program that was exported on the meta device or with fake tensors.

        Such a program is fed from the CPU. Tables that have values keep them unless ``source`` has others.

        Args:
            source: a module that has the tables by FQN (the model, after its own initialiser has computed them), or
                a mapping from FQN to tensor, or from the FQN of a module to that module:
                ``{"model.rotary_emb": LlamaRotaryEmbedding(config)}``.

        Raises:
            FeedError: tables that ``source`` has no values for, or one of another shape or dtype; nothing is bound
                then.
        """
        self._bind(find_values(source, self._tables(), lack_values(self.feed_program.state)))

    def _tables(self) -> dict[str, torch.Tensor]:
        """What :meth:`bind_tables` gives values to: what the feed reads, and what is in no checkpoint."""
        constants = {} if self.program is None else self.program.constants  # a loaded stage has no program
        tensors = {fqn: value for fqn, value in constants.items() if isinstance(value, torch.Tensor)}
        return {**tensors, **self.feed_program.state}

    def _bind(self, values: Mapping[str, torch.Tensor]) -> None:
        state, constants = self.feed_program.state, {} if self.program is None else self.program.constants
        for fqn, value in values.items():
            if fqn in state:
                state[fqn] = value.to(state[fqn].device if has_values(state[fqn]) else "cpu")
            if fqn in constants:
                constants[fqn] = value.to(constants[fqn].device if has_values(constants[fqn]) else value.device)
        self.feed_program.clear_tables()

    def save(self, path: Any, *, weights: bool = True) -> None:
        """Writes the program together with what it is fed from; :func:`buffer_lifting.load` reads it.

        The file appears whole or not at all.

        Args:
            path: it must not exist, or be such a file, which is replaced.
            weights: without them parameters and persistent buffers are on the meta device when it is loaded, as if the
                model had been exported there; tables that are in no checkpoint are saved all the same.

        Raises:
            LiftingError: ``path`` is something else, or the program has something that a package cannot hold.
        """
        from buffer_lifting.package import save_lifted

        save_lifted(self, path, weights)
