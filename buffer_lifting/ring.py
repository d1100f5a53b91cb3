"""torch's ring attention as an op that a graph can hold, with a gradient and no process group until it runs.

``buffer_lifting::ring_attention(query, key, value, slots, scale, ranks, group)`` attends with the rows of this rank
over the keys of all ranks of the group. Which pairs a causal ring leaves out is written into torch's loop for two
orders of the rows, contiguous and head-tail; which of them it is, the slots of this rank tell at each call, and any
other order is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from buffer_lifting.errors import FeedError, PartitionError
from buffer_lifting.ring_order import is_head_tail
from buffer_lifting.torch_compat import (
    process_group,
    ring_attention_backward,
    ring_attention_forward,
)

_HEADS, _ROWS = 1, 2  # dims of [batch, heads, rows, head dim]
_aten = torch.ops.aten


@dataclass(frozen=True)
class _Kernel:
    """A flash kernel for torch's ring: key and value have the heads of the query, results are ``[B, H, S, D]``."""

    forward: Callable[..., tuple[Any, ...]]  # (query, key, value, is_causal, scale) -> (out, logsumexp, *rest)
    backward: Callable[..., tuple[Any, ...]]  # the same and grad_out, out, logsumexp, rng -> three gradients
    dtypes: tuple[torch.dtype, ...]


def _cpu(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
    rng: tuple[Tensor, Tensor],
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
    )


def _cuda(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Any:
    out, logsumexp, _, _, _, _, *rng = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return out, logsumexp, *rng[:2]


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
    rng: tuple[Tensor, Tensor],
) -> Any:
    none, rows, keys = None, query.shape[_ROWS], key.shape[_ROWS]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, none, none, rows, keys, 0.0, is_causal, *rng, scale=scale
    )


#: By device type. That of CUDA has never run here: it is untested.
_KERNELS = {
    "cpu": _Kernel(_cpu, _cpu_backward, (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    "cuda": _Kernel(_cuda, _cuda_backward, (torch.bfloat16, torch.float16)),
}


def check_ring_device(device: torch.device) -> None:
    """Refuses a device for which there is no kernel.

    Raises:
        PartitionError: such a device.
    """
    if device.type not in (*_KERNELS, "meta"):
        raise PartitionError(
            f"strategy='ring' has no kernel for the device {str(device)!r} (it has {' and '.join(_KERNELS)}); use "
            "context_parallel with strategy='allgather' or 'alltoall'"
        )


def _kernel_for(query: Tensor, *others: Tensor) -> _Kernel:
    check_ring_device(query.device)
    kernel = _KERNELS[query.device.type]
    if query.dtype not in kernel.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes)
        raise PartitionError(
            f"strategy='ring': the flash kernel on {query.device.type} takes {names}, not "
            f"{str(query.dtype).removeprefix('torch.')}; use context_parallel with strategy='allgather' or 'alltoall'"
        )
    if any(other.dtype != query.dtype for other in others):  # scaled_dot_product_attention has a rule for autocast
        raise PartitionError(
            f"strategy='ring': query, key and value are of {query.dtype}, {', '.join(str(o.dtype) for o in others)}; "
            "under autocast, cast them alike in the model"
        )
    return kernel


# -- the op ------------------------------------------------------------------------------------------------------


#: The slots of the last call and what was found of them: the attentions of a stage read one tensor.
_last: tuple[Any, tuple[int, int, int], bool] | None = None


def _balanced(slots: Tensor | None, rank: int, ranks: int) -> bool | None:
    global _last
    if slots is None:
        return None
    if slots.is_inference():  # it has no version
        return is_head_tail(slots, rank, ranks)
    key = (slots._version, rank, ranks)
    if _last is None or _last[0]() is not slots or _last[1] != key:
        _last = (weakref.ref(slots), key, is_head_tail(slots, rank, ranks))
    return _last[2]


def _group_of(name: str, ranks: int) -> tuple[Any, int]:
    group = process_group(name)
    if group.size() != ranks:
        raise PartitionError(f"ring attention was made for {ranks} ranks, and its group has {group.size()}")
    return group, group.rank()


@torch.library.custom_op(
    "buffer_lifting::ring_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? slots, float? scale, int ranks, str group)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor | None, scale: float | None, ranks: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of this rank's rows over the keys of all ranks.

    Args:
        query: ``[batch, heads, rows, head dim]``.
        key, value: ``[batch, key heads, rows, head dim]``; the heads divide by the key heads.
        slots: ``[1 or batch, rows]`` int64, where this rank's rows stand in the sequence, if attention is causal;
            ``None``: each row sees all keys.
        scale: of the scores; ``None``: one over the root of the head dim.
        ranks: how many ranks the group has.
        group: name of the process group.

    Returns:
        The result, laid out as ``[batch, rows, heads, head dim]``; and what the backward needs: logsumexp
        ``[batch, heads, rows]`` and the kernel's two tensors of its random state.

    Raises:
        FeedError: slots of another order, or of another number of rows.
        PartitionError: a device or dtype without a kernel; a group of another size.
    """
    kernel = _kernel_for(query, key, value)
    process, rank = _group_of(group, ranks)
    if slots is not None and slots.shape[1] != query.shape[_ROWS]:
        raise FeedError(f"ring attention has {query.shape[_ROWS]} rows, and slots of {slots.shape[1]}")

    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Any:
        return kernel.forward(query, _repeated(key, query), _repeated(value, query), is_causal, scale)

    found = ring_attention_forward(attend, process, _balanced(slots, rank, ranks), query, key, value)
    out, logsumexp, *rng = found
    empty = query.new_empty(0, dtype=torch.int64)
    seed, offset = (empty if part is None else part for part in (*rng, None, None)[:2])
    return _rows_first(out), logsumexp.contiguous(), seed, offset if offset is not seed else offset.clone()


@ring_attention.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor | None, scale: float | None, ranks: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(_HEADS, _ROWS)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    numbers = query.new_empty(0, dtype=torch.int64)
    return out, query.new_empty(batch, heads, rows, dtype=wide), numbers, numbers.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, slots, ctx.scale, ctx.ranks, ctx.group = inputs
    ctx.balanced = _balanced(slots, _group_of(ctx.group, ctx.ranks)[1], ctx.ranks)
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, logsumexp, *rng = ctx.saved_tensors
    if others[0] is not None:
        raise RuntimeError("the logsumexp of ring attention has no gradient")
    kernel, (process, _) = _kernel_for(query), _group_of(ctx.group, ctx.ranks)

    def gradients(key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        whole = _repeated(key, query), _repeated(value, query)
        of_query, of_key, of_value = kernel.backward(
            key=whole[0], value=whole[1], scale=ctx.scale, rng=tuple(rng), **arguments
        )
        return of_query, _summed(of_key, key), _summed(of_value, value)

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out  # the other ranks send to this one all the same
    saved = (query, key, value, out, logsumexp)
    return (*ring_attention_backward(gradients, process, ctx.balanced, grad_out, *saved), None, None, None, None)


ring_attention.register_autograd(_backward, setup_context=_save)

#: The op as a graph has it.
RING = torch.ops.buffer_lifting.ring_attention.default


@register_flop_formula(torch.ops.buffer_lifting.ring_attention)
def _flops(query: Any, key: Any, value: Any, slots: Any, scale: Any, ranks: int, *_: Any, **__: Any) -> int:
    """Those of attention over the keys of all ranks; as in torch, a causal mask saves nothing."""
    shapes = ((*own[:_HEADS], query[_HEADS], own[_ROWS] * ranks, own[-1]) for own in (key, value))
    return int(sdpa_flop_count(query, *shapes))


def _repeated(value: Tensor, query: Tensor) -> Tensor:
    """Grouped heads, repeated for the query's: behind the ring, so that they are not sent."""
    times = query.shape[_HEADS] // value.shape[_HEADS]
    return value if times == 1 else value.repeat_interleave(times, dim=_HEADS)


def _summed(gradient: Tensor, of: Tensor) -> Tensor:
    """The gradient of what :func:`_repeated` repeated."""
    times = gradient.shape[_HEADS] // of.shape[_HEADS]
    return gradient if times == 1 else gradient.unflatten(_HEADS, (-1, times)).sum(_HEADS + 1)


def _rows_first(out: Tensor) -> Tensor:
    return out.transpose(_HEADS, _ROWS).contiguous().transpose(_HEADS, _ROWS)
