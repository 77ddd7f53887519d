"""Parameters of the branches: weights laid out for the products before, and gradients summed up after."""

from functools import lru_cache
from math import prod
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._device import LOG2_E
from .._launch import MAX_PLANS, Launch, cdiv, tl, triton

_MAX_WEIGHTS = 4
_MAX_SUMS = 5
_WEIGHT_BLOCK = 2048
_SUM_BLOCK = 32, 64  # parts at a time, and columns
_ALIGNMENT = 32  # of sums within their buffer, in elements: what optimisers read at once


class WeightLayout(NamedTuple):
    """The shape in which a weight is laid out, with more rows than it has along an axis: its first `rank` rows, zeros up
    to row `begin`, its other rows, and zeros."""

    shape: Tuple[int, ...]
    axis: int
    rank: int
    begin: int


@triton.jit
def _lay_out(weight, target, size, BLOCK: tl.constexpr):
    """A block of `target`, a weight [.., rows, width] as `WeightLayout` says: [.., target_rows, width]."""
    count, rows, target_rows, width, rank, begin = size
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = index // width % target_rows
    source = tl.where(row < rank, row, row - (begin - rank))
    exists = ((row < rank) | (row >= begin)) & (source < rows) & (index < count)
    place = (index // width // target_rows * rows + source) * width + index % width
    value = tl.load(weight + place, mask=exists, other=0.0)  # [BLOCK]
    tl.store(target + index, value.to(target.dtype.element_ty), mask=index < count)


@triton.jit
def weights_kernel(
    weight0,  # weights, or None
    weight1,
    weight2,
    weight3,
    A_log,  # [parameters], or None
    target0,  # written, each weight as it is laid out
    target1,
    target2,
    target3,
    A,  # [parameters] or None: written, -exp(A_log)
    A_size,
    size0,  # of each: (count, rows, target_rows, width, rank, begin), see `_lay_out`
    size1,
    size2,
    size3,
    BLOCK: tl.constexpr,
):
    """One program lays out a block of one weight, which the second axis of the grid numbers."""
    which = tl.program_id(1)
    if weight0 is not None:
        if which == 0:
            _lay_out(weight0, target0, size0, BLOCK)
    if weight1 is not None:
        if which == 1:
            _lay_out(weight1, target1, size1, BLOCK)
    if weight2 is not None:
        if which == 2:
            _lay_out(weight2, target2, size2, BLOCK)
    if weight3 is not None:
        if which == 3:
            _lay_out(weight3, target3, size3, BLOCK)
    if A_log is not None:
        if which == 4:
            index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(A_log + index, mask=index < A_size, other=0.0).to(tl.float32)  # [BLOCK]
            tl.store(A + index, -tl.exp2(value * LOG2_E), mask=index < A_size)


@triton.jit
def _sum(parts, count, length, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the sum over the parts of [count, length]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & (column < length)[None, :]
        place = part.to(tl.int64)[:, None] * length + column[None, :]
        total += tl.load(parts + place, mask=mask, other=0.0)  # [PARTS, BLOCK]
    tl.store(out + column, tl.sum(total, axis=0), mask=column < length)


@triton.jit(do_not_specialize_on_alignment=['count0', 'count1', 'count2', 'count3', 'count4'])
def sum_kernel(
    parts0,  # [count0, length0]
    parts1,  # and so on, or None
    parts2,
    parts3,
    parts4,
    out,  # written: the sums over the parts, each at its offset
    count0,
    count1,
    count2,
    count3,
    count4,
    lengths,
    offsets,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums up BLOCK columns of one array, which the second axis of the grid numbers."""
    which = tl.program_id(1)
    if which == 0:
        _sum(parts0, count0, lengths[0], out + offsets[0], PARTS, BLOCK)
    if parts1 is not None:
        if which == 1:
            _sum(parts1, count1, lengths[1], out + offsets[1], PARTS, BLOCK)
    if parts2 is not None:
        if which == 2:
            _sum(parts2, count2, lengths[2], out + offsets[2], PARTS, BLOCK)
    if parts3 is not None:
        if which == 3:
            _sum(parts3, count3, lengths[3], out + offsets[3], PARTS, BLOCK)
    if parts4 is not None:
        if which == 4:
            _sum(parts4, count4, lengths[4], out + offsets[4], PARTS, BLOCK)


def lay_out_weights(
    weights: Tuple[Tensor, ...],
    dtype: torch.dtype,
    A_log: Optional[Tensor] = None,
    layouts: Optional[Tuple[Optional[WeightLayout], ...]] = None,
) -> Tuple[Tensor, ...]:
    """At most four weights in a dtype and laid out, and A = -exp(A_log) in fp32 if there is an A_log; all by one kernel.

    A weight that is so already is returned itself. All are contiguous.

    Args:
        layouts: Of each weight; None for the weight's own.
    """
    shapes = tuple([weight.shape for weight in weights])
    changes = tuple([weight.dtype != dtype for weight in weights])
    launch, shapes = _weights_launch(shapes, changes, layouts, 0 if A_log is None else A_log.numel())
    sources, written, laid_out = [None] * _MAX_WEIGHTS, [None] * _MAX_WEIGHTS, list(weights)
    for i, shape in enumerate(shapes):
        if shape is not None:
            sources[i] = weights[i]
            written[i] = laid_out[i] = torch.empty(shape, dtype=dtype, device=weights[i].device)
    A = None
    if A_log is not None:
        A = torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device)
        laid_out.append(A)
    if launch is not None:
        launch(*sources, A_log, *written, A)
    return tuple(laid_out)


def sum_parts(*arrays: Tuple[Tensor, Tuple[Tuple[int, ...], ...]]) -> List[Tensor]:
    """Sums of at most five arrays [parts, ...] in fp32 over the parts, by one kernel.

    Args:
        arrays: Each with the shapes of the tensors that its sum is made of, which lie one after the other.

    Returns:
        All these tensors, parts of one.
    """
    parts = [array for array, _ in arrays]
    launch, pieces, shapes = _sum_launch(
        tuple([array.shape[0] for array in parts]), tuple([shapes for _, shapes in arrays])
    )
    out = torch.empty(sum(pieces), dtype=torch.float32, device=parts[0].device)
    launch(*parts, *[None] * (_MAX_SUMS - len(parts)), out)
    sums = out.split(pieces)
    return [sums[index] if len(shape) == 1 else sums[index].view(shape) for index, shape in shapes]


@lru_cache(maxsize=MAX_PLANS)
def _weights_launch(
    shapes: Tuple[Tuple[int, ...], ...],
    changes: Tuple[bool, ...],
    layouts: Optional[Tuple[Optional[WeightLayout], ...]],
    A_size: int,
) -> Tuple[Optional[Launch], Tuple[Optional[Tuple[int, ...]], ...]]:
    """The launch, None if nothing changes; and the shapes of the weights that change."""
    written, sizes = [], []
    for shape, changed, layout in zip(shapes, changes, layouts or [None] * len(shapes)):
        if layout is None and not changed:
            written.append(None)
            sizes.append((0,) * 6)
            continue
        target, axis, rank, begin = layout or (shape, 0, shape[0], shape[0])
        written.append(target)
        sizes.append((prod(target), shape[axis], target[axis], prod(target[axis + 1 :]), rank, begin))
    sizes += [(0,) * 6] * (_MAX_WEIGHTS - len(sizes))
    largest = max(A_size, *(size[0] for size in sizes))
    if largest == 0:
        return None, tuple(written)
    grid = cdiv(largest, _WEIGHT_BLOCK), _MAX_WEIGHTS + 1
    return Launch(weights_kernel, grid, (A_size, *sizes), (_WEIGHT_BLOCK,)), tuple(written)


@lru_cache(maxsize=MAX_PLANS)
def _sum_launch(
    counts: Tuple[int, ...], shapes: Tuple[Tuple[Tuple[int, ...], ...], ...]
) -> Tuple[Launch, List[int], List[Tuple[int, Tuple[int, ...]]]]:
    """The launch, the sizes of the buffer's pieces, and the piece and the shape of each tensor."""
    pieces, tensors, lengths, offsets = [], [], [], []
    for own_shapes in shapes:
        sizes = [prod(shape) for shape in own_shapes]
        offsets.append(sum(pieces))
        lengths.append(sum(sizes))
        tensors += [(len(pieces) + i, shape) for i, shape in enumerate(own_shapes)]
        pieces += [*sizes, -lengths[-1] % _ALIGNMENT]
    block_parts, block = _SUM_BLOCK
    absent = [0] * (_MAX_SUMS - len(counts))
    grid = cdiv(max(lengths), block), len(counts)
    sizes = *counts, *absent, (*lengths, *absent), (*offsets, *absent)
    return Launch(sum_kernel, grid, sizes, (block_parts, block)), pieces, tensors
