"""Parameters of the branches: weights laid out for the products before, and gradients summed up after."""

from functools import lru_cache
from math import prod
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._device import LOG2_E
from .._launch import MAX_PLANS, Launch, cdiv, tl, triton

_MAX_ARRAYS = 8  # of a launch
_WEIGHT_BLOCK = 2048
_SUM_BLOCK = 64, 32  # parts at a time, and columns
_ALIGNMENT = 64  # of tensors within a buffer, in elements: what products and optimisers read at once


class Layout(NamedTuple):
    """The shape in which a weight is laid out, with more rows than it has along an axis: its first `rank` rows, zeros
    up to row `begin`, its other rows, and zeros."""

    shape: Tuple[int, ...]
    axis: int
    rank: int
    begin: int


class Weight(NamedTuple):
    """A weight that is wanted in the products' dtype, or with `log_A` as A = -exp(weight) in fp32."""

    weight: Tensor
    layout: Optional[Layout] = None
    log_A: bool = False


class Parts(NamedTuple):
    """Partial sums of gradients [parts, ...] in fp32: of the parameters of these names and shapes, one after the
    other."""

    array: Tensor
    names: Tuple[str, ...]
    shapes: Tuple[Tuple[int, ...], ...]


@triton.jit
def _lay_out(weight, target, size, BLOCK: tl.constexpr):
    """A block of `target`, a weight [.., rows, width] as `Layout` says: [.., target_rows, width]."""
    if weight is not None:
        count, rows, target_rows, width, rank, begin, log_A = size
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = index // width % target_rows
        source = tl.where(row < rank, row, row - (begin - rank))
        exists = ((row < rank) | (row >= begin)) & (source < rows) & (index < count)
        place = (index // width // target_rows * rows + source) * width + index % width
        value = tl.load(weight + place, mask=exists, other=0.0).to(tl.float32)  # [BLOCK]
        value = tl.where(log_A != 0, -tl.exp2(value * LOG2_E), value)
        tl.store(target + index, value.to(target.dtype.element_ty), mask=index < count)


@triton.jit
def weights_kernel(
    weight0,  # weights, or None
    weight1,
    weight2,
    weight3,
    weight4,
    weight5,
    weight6,
    weight7,
    target0,  # written, each weight as it is laid out
    target1,
    target2,
    target3,
    target4,
    target5,
    target6,
    target7,
    size0,  # of each: (count, rows, target_rows, width, rank, begin, log_A), see `_lay_out`
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    size7,
    BLOCK: tl.constexpr,
):
    """One program lays out a block of one weight, which the second axis of the grid numbers."""
    which = tl.program_id(1)
    if which == 0:
        _lay_out(weight0, target0, size0, BLOCK)
    elif which == 1:
        _lay_out(weight1, target1, size1, BLOCK)
    elif which == 2:
        _lay_out(weight2, target2, size2, BLOCK)
    elif which == 3:
        _lay_out(weight3, target3, size3, BLOCK)
    elif which == 4:
        _lay_out(weight4, target4, size4, BLOCK)
    elif which == 5:
        _lay_out(weight5, target5, size5, BLOCK)
    elif which == 6:
        _lay_out(weight6, target6, size6, BLOCK)
    else:
        _lay_out(weight7, target7, size7, BLOCK)


@triton.jit
def _sum(parts, count, length, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the sum over the parts of [count, length]."""
    if parts is not None:
        if tl.program_id(0) * BLOCK < length:
            column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([PARTS, BLOCK], tl.float32)
            for start in range(0, count, PARTS):
                part = start + tl.arange(0, PARTS)
                mask = (part < count)[:, None] & (column < length)[None, :]
                place = part.to(tl.int64)[:, None] * length + column[None, :]
                total += tl.load(parts + place, mask=mask, other=0.0)  # [PARTS, BLOCK]
            tl.store(out + column, tl.sum(total, axis=0), mask=column < length)


@triton.jit(
    do_not_specialize_on_alignment=['count0', 'count1', 'count2', 'count3', 'count4', 'count5', 'count6', 'count7']
)
def sum_kernel(
    parts0,  # [count0, length0], or None
    parts1,
    parts2,
    parts3,
    parts4,
    parts5,
    parts6,
    parts7,
    out,  # written: the sums over the parts, each at its offset
    count0,
    count1,
    count2,
    count3,
    count4,
    count5,
    count6,
    count7,
    lengths,
    offsets,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums up BLOCK columns of one array, which the second axis of the grid numbers."""
    which = tl.program_id(1)
    if which == 0:
        _sum(parts0, count0, lengths[0], out + offsets[0], PARTS, BLOCK)
    elif which == 1:
        _sum(parts1, count1, lengths[1], out + offsets[1], PARTS, BLOCK)
    elif which == 2:
        _sum(parts2, count2, lengths[2], out + offsets[2], PARTS, BLOCK)
    elif which == 3:
        _sum(parts3, count3, lengths[3], out + offsets[3], PARTS, BLOCK)
    elif which == 4:
        _sum(parts4, count4, lengths[4], out + offsets[4], PARTS, BLOCK)
    elif which == 5:
        _sum(parts5, count5, lengths[5], out + offsets[5], PARTS, BLOCK)
    elif which == 6:
        _sum(parts6, count6, lengths[6], out + offsets[6], PARTS, BLOCK)
    else:
        _sum(parts7, count7, lengths[7], out + offsets[7], PARTS, BLOCK)


def lay_out_weights(weights: Sequence[Weight], dtype: torch.dtype) -> List[Tensor]:
    """Weights as they are wanted, eight by one kernel; one that is so already is returned itself.

    Those in the dtype of one kernel are parts of one tensor.
    """
    if len(weights) > _MAX_ARRAYS:
        return lay_out_weights(weights[:_MAX_ARRAYS], dtype) + lay_out_weights(weights[_MAX_ARRAYS:], dtype)
    key = tuple([(weight.shape, layout, log_A, weight.dtype == dtype) for weight, layout, log_A in weights])
    launch, pieces, shapes = _weights_launch(key)
    if launch is None:
        return [weight.weight for weight in weights]
    device = weights[0].weight.device
    buffer = iter(torch.empty(sum(pieces), dtype=dtype, device=device).split(pieces))
    sources, targets, laid_out = [], [], []
    for (weight, _, log_A), shape in zip(weights, shapes):
        if shape is None:
            source, target = None, None
        elif log_A:
            source, target = weight, torch.empty(shape, dtype=torch.float32, device=device)
        else:
            source, target = weight, next(buffer)
            target = target.view(shape) if len(shape) > 1 else target
            next(buffer)  # up to the alignment
        sources.append(source)
        targets.append(target)
        laid_out.append(weight if target is None else target)
    absent = (None,) * (_MAX_ARRAYS - len(sources))
    launch(*sources, *absent, *targets, *absent)
    return laid_out


def sum_parts(arrays: Sequence[Parts]) -> List[Tensor]:
    """The sums of arrays, each cut into its parameters' gradients; of eight by one kernel, in one buffer."""
    if len(arrays) > _MAX_ARRAYS:
        return sum_parts(arrays[:_MAX_ARRAYS]) + sum_parts(arrays[_MAX_ARRAYS:])
    launch, pieces, places = _sum_launch(tuple([(parts.array.shape[0], parts.shapes) for parts in arrays]))
    out = torch.empty(sum(pieces), dtype=torch.float32, device=arrays[0].array.device)
    launch(*[parts.array for parts in arrays], *[None] * (_MAX_ARRAYS - len(arrays)), out)
    sums = out.split(pieces)
    return [sums[index] if len(shape) == 1 else sums[index].view(shape) for index, shape in places]


@lru_cache(maxsize=MAX_PLANS)
def _weights_launch(
    wanted: Tuple[Tuple[Tuple[int, ...], Optional[Layout], bool, bool], ...],
) -> Tuple[Optional[Launch], List[int], List[Optional[Tuple[int, ...]]]]:
    """The launch, None if nothing changes; the sizes of the buffer's pieces; and the shapes of the weights that change.

    Args:
        wanted: Of each weight its shape, layout and `log_A`, and whether it has the dtype.
    """
    pieces: List[int] = []
    shapes: List[Optional[Tuple[int, ...]]] = []
    sizes: List[Tuple[int, ...]] = []
    for shape, layout, log_A, has_dtype in wanted:
        if layout is None and has_dtype and not log_A:
            shapes.append(None)
            sizes.append((0,) * 7)
            continue
        target, axis, rank, begin = layout or (shape, 0, shape[0], shape[0])
        count = prod(target)
        shapes.append(target)
        sizes.append((count, shape[axis], target[axis], prod(target[axis + 1 :]), rank, begin, int(log_A)))
        if not log_A:
            pieces += [count, -count % _ALIGNMENT]
    largest = max(size[0] for size in sizes)
    if largest == 0:
        return None, pieces, shapes
    grid = cdiv(largest, _WEIGHT_BLOCK), len(sizes)
    sizes += [(0,) * 7] * (_MAX_ARRAYS - len(sizes))
    return Launch(weights_kernel, grid, tuple(sizes), (_WEIGHT_BLOCK,)), pieces, shapes


@lru_cache(maxsize=MAX_PLANS)
def _sum_launch(
    arrays: Tuple[Tuple[int, Tuple[Tuple[int, ...], ...]], ...],
) -> Tuple[Launch, List[int], List[Tuple[int, Tuple[int, ...]]]]:
    """The launch, the sizes of the buffer's pieces, and the piece and the shape of each tensor.

    Args:
        arrays: Of each array the number of parts, and the shapes.
    """
    counts: List[int] = []
    lengths: List[int] = []
    offsets: List[int] = []
    pieces: List[int] = []
    places: List[Tuple[int, Tuple[int, ...]]] = []
    for count, shapes in arrays:
        sizes = [prod(shape) for shape in shapes]
        counts.append(count)
        lengths.append(sum(sizes))
        offsets.append(sum(pieces))
        places += [(len(pieces) + i, shape) for i, shape in enumerate(shapes)]
        pieces += [*sizes, -lengths[-1] % _ALIGNMENT]
    absent = [0] * (_MAX_ARRAYS - len(arrays))
    block_parts, block = _SUM_BLOCK
    grid = cdiv(max(lengths), block), len(arrays)
    scalars = *counts, *absent, (*lengths, *absent), (*offsets, *absent)
    return Launch(sum_kernel, grid, scalars, (block_parts, block)), pieces, places
