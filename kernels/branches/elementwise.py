"""What the branches compute element by element: one kernel for each pass over a map.

Rows are the entries of all dimensions but the last, the channels.
"""

from math import prod
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._device import LOG2_E, gelu_with_gradient
from .._launch import Launcher, cdiv, is_nvidia, next_power_of_2, num_processors, tl, triton

_BLOCK_ELEMENTS = 4096  # of a map, that a program holds at a time
_MAX_BLOCK_D = 512
_PROGRAMS_PER_PROCESSOR = 8  # of kernels that sum over rows, each of which leaves a partial sum
_WEIGHT_BLOCK = 2048


class WeightLayout(NamedTuple):
    """The shape in which a weight is laid out, with more rows than it has along an axis: its first `rank` rows, zeros up
    to row `begin`, its other rows, and zeros."""

    shape: Tuple[int, ...]
    axis: int
    rank: int
    begin: int


@triton.jit
def _load_rows(pointer, row, channel, dim, mask):
    return tl.load(pointer + row[:, None] * dim + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place_of_program(rows, dim, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS] and channels [BLOCK_D] of a program, and which exist [ROWS, BLOCK_D]."""
    blocks = tl.cdiv(dim, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return row, channel, (row < rows)[:, None] & (channel < dim)[None, :]


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # maps of any size run on the same kernel
def add_kernel(
    x,  # [rows, dim]
    y,  # [rows, dim]
    scale,  # [samples], or None
    out,  # [rows, dim]: written, x + scale * y
    rows,
    rows_per_sample,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, channel, mask = _place_of_program(rows, dim, ROWS, BLOCK_D)
    added = _load_rows(y, row, channel, dim, mask)  # [ROWS, BLOCK_D]
    if scale is not None:
        factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)  # [ROWS]
        added *= factor[:, None]
    total = _load_rows(x, row, channel, dim, mask) + added
    tl.store(out + row[:, None] * dim + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample', 'rows_per_program'])
def scale_kernel(
    grad,  # [rows, dim]
    scale,  # [samples], or None
    out,  # [rows, dim]: written, scale * grad
    sums,  # [programs, dim] or None: written, partial sums of out over rows
    rows,
    rows_per_sample,
    rows_per_program,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program walks rows_per_program rows, for BLOCK_D channels."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < dim)[None, :]
        value = _load_rows(grad, row, channel, dim, mask)  # [ROWS, BLOCK_D]
        if scale is not None:
            factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)  # [ROWS]
            value *= factor[:, None]
        tl.store(out + row[:, None] * dim + channel[None, :], value.to(out.dtype.element_ty), mask=mask)
        total += value
    if sums is not None:
        tl.store(sums + tl.program_id(0) * dim + channel, tl.sum(total, axis=0), mask=channel < dim)


@triton.jit(do_not_specialize_on_alignment=['rows'])
def affine_kernel(
    normal,  # [rows, dim]
    weight,  # [dim]
    bias,  # [dim], or None
    out,  # [rows, dim]: written, weight * normal + bias
    rows,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, channel, mask = _place_of_program(rows, dim, ROWS, BLOCK_D)
    value = _load_rows(normal, row, channel, dim, mask)  # [ROWS, BLOCK_D]
    value *= tl.load(weight + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * dim + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_program'])
def gelu_backward_kernel(
    grad,  # [rows, dim]: the gradient of GELU's output; overwritten by that of its input
    hidden,  # [rows, dim]: GELU's input
    out,  # [rows, dim]: written, GELU's output
    sums,  # [programs, dim]: written, partial sums over rows of the input's gradient
    rows,
    rows_per_program,
    dim,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program walks rows_per_program rows, for BLOCK_D channels."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < dim)[None, :]
        place = row[:, None] * dim + channel[None, :]
        activated, slope = gelu_with_gradient(_load_rows(hidden, row, channel, dim, mask), NVIDIA)
        value = _load_rows(grad, row, channel, dim, mask) * slope  # [ROWS, BLOCK_D]
        tl.store(out + place, activated.to(out.dtype.element_ty), mask=mask)
        tl.store(grad + place, value.to(grad.dtype.element_ty), mask=mask)
        total += value
    tl.store(sums + tl.program_id(0) * dim + channel, tl.sum(total, axis=0), mask=channel < dim)


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


_add = Launcher(add_kernel)
_scale = Launcher(scale_kernel)
_affine = Launcher(affine_kernel)
_gelu_backward = Launcher(gelu_backward_kernel)
_weights = Launcher(weights_kernel)


def add(x: Tensor, y: Tensor, scale: Optional[Tensor]) -> Tensor:
    """x + scale * y in x's dtype, for contiguous x and y [B, ..., d] and a scale of each sample [B]."""
    out = torch.empty_like(x)
    rows, dim, block_rows, block_d = _block(x)
    grid = cdiv(rows, block_rows) * cdiv(dim, block_d)
    _add(grid, (x, y, scale, out), (rows, x.shape[1:-1].numel(), dim), (block_rows, block_d))
    return out


def scale_to(
    grad: Tensor, scale: Optional[Tensor], dtype: torch.dtype, sum_rows: bool = False
) -> Tuple[Tensor, Optional[Tensor]]:
    """scale * grad [B, ..., d] in a dtype, and its sum over all but the channels [d] in fp32, if wanted."""
    if scale is None and grad.dtype == dtype and not sum_rows:
        return grad, None
    out = torch.empty_like(grad, dtype=dtype)
    rows, dim, block_rows, block_d = _block(grad)
    programs, rows_per_program = _walk(grad, rows, block_rows, cdiv(dim, block_d))
    sums = torch.empty(programs, dim, dtype=torch.float32, device=grad.device) if sum_rows else None
    sizes = rows, grad.shape[1:-1].numel(), rows_per_program, dim
    _scale((programs, cdiv(dim, block_d)), (grad, scale, out, sums), sizes, (block_rows, block_d))
    return out, None if sums is None else sums.sum(dim=0)


def affine(normal: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """weight * normal + bias [..., d] in the dtype of normal."""
    out = torch.empty_like(normal)
    rows, dim, block_rows, block_d = _block(normal)
    grid = cdiv(rows, block_rows) * cdiv(dim, block_d)
    _affine(grid, (normal, weight, bias, out), (rows, dim), (block_rows, block_d))
    return out


def gelu_backward_(grad: Tensor, hidden: Tensor) -> Tuple[Tensor, Tensor]:
    """Overwrites the gradient of GELU's output by that of its input `hidden` [rows, d].

    Returns:
        GELU's output, and the sum over rows of the input's gradient [d] in fp32.
    """
    out = torch.empty_like(hidden)
    rows, dim, block_rows, block_d = _block(hidden)
    programs, rows_per_program = _walk(hidden, rows, block_rows, cdiv(dim, block_d))
    sums = torch.empty(programs, dim, dtype=torch.float32, device=hidden.device)
    constants = is_nvidia(hidden), block_rows, block_d
    _gelu_backward((programs, cdiv(dim, block_d)), (grad, hidden, out, sums), (rows, rows_per_program, dim), constants)
    return out, sums.sum(dim=0)


def lay_out_weights(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    A_log: Optional[Tensor] = None,
    layouts: Optional[Sequence[Optional[WeightLayout]]] = None,
) -> Tuple[Tensor, ...]:
    """At most four weights in a dtype, contiguous and laid out, and A = -exp(A_log) in fp32 if there is an A_log; all by
    one kernel. A weight that is so already is returned itself.

    Args:
        layouts: Of each weight; None for the weight's own.
    """
    targets, sources, sizes = [], [], []
    for weight, layout in zip(weights, layouts or [None] * len(weights)):
        if layout is None and weight.dtype == dtype and weight.is_contiguous():
            targets.append(weight)
            sources.append(None)
            sizes.append((0,) * 6)
            continue
        shape, axis, rank, begin = layout or (weight.shape, 0, weight.shape[0], weight.shape[0])
        target = torch.empty(shape, dtype=dtype, device=weight.device)
        targets.append(target)
        sources.append(weight.contiguous())
        sizes.append((target.numel(), weight.shape[axis], shape[axis], prod(shape[axis + 1 :]), rank, begin))
    missing = 4 - len(targets)
    A, A_size = None, 0
    if A_log is not None:
        A, A_size = torch.empty(A_log.shape, dtype=torch.float32, device=A_log.device), A_log.numel()
        A_log = A_log.contiguous()
    largest = max(A_size, *(size[0] for size in sizes))
    absent = [None] * missing
    written = [None if source is None else target for source, target in zip(sources, targets)]
    if largest:
        _weights(
            (cdiv(largest, _WEIGHT_BLOCK), 5),
            (*sources, *absent, A_log, *written, *absent, A),
            (A_size, *sizes, *[(0,) * 6] * missing),
            (_WEIGHT_BLOCK,),
        )
    return tuple(targets) if A is None else (*targets, A)


def _block(x: Tensor) -> Tuple[int, int, int, int]:
    """Rows and channels of x, and those of a block."""
    dim = x.shape[-1]
    block_d = min(next_power_of_2(dim), _MAX_BLOCK_D)
    return x.numel() // dim, dim, max(_BLOCK_ELEMENTS // block_d, 1), block_d


def _walk(x: Tensor, rows: int, block_rows: int, channel_blocks: int) -> Tuple[int, int]:
    """Programs that share the rows, for each block of channels, and rows of each."""
    most = max(_PROGRAMS_PER_PROCESSOR * num_processors(x) // channel_blocks, 1)
    programs = max(min(cdiv(rows, block_rows), most), 1)
    rows_per_program = cdiv(cdiv(rows, programs), block_rows) * block_rows
    return max(cdiv(rows, max(rows_per_program, 1)), 1), rows_per_program
