"""What the branches compute element by element: one kernel for each pass over maps.

Rows are the entries of all dimensions but the last, the channels.
"""

from functools import lru_cache
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._device import gelu_with_gradient, load_factors, load_rows
from .._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    is_nvidia,
    next_power_of_2,
    num_processors,
    share_rows,
    tl,
    triton,
)

_BLOCK_ELEMENTS = 4096  # of a map, that a program holds at a time
_MAX_BLOCK_D = 512
_PROGRAMS_PER_PROCESSOR = 8  # of kernels that sum over rows, each of which leaves a partial sum


@triton.jit
def _load_vector(pointer, channel, dim):
    """A vector of channels [1, BLOCK_D]."""
    return tl.load(pointer + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]


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
    """One program adds ROWS rows of BLOCK_D channels."""
    blocks = tl.cdiv(dim, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (channel < dim)[None, :]
    added = load_rows(y, row, dim, channel, mask)  # [ROWS, BLOCK_D]
    if scale is not None:
        added *= load_factors(scale, row, rows, rows_per_sample)
    total = load_rows(x, row, dim, channel, mask) + added
    tl.store(out + row[:, None] * dim + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample', 'rows_per_program'])
def prepare_kernel(
    grad,  # [rows, dim]: the gradient of the stream, or that of what is added to it; or None
    scale,  # [samples], or None
    normal,  # [rows, dim]: normalised before weight and bias
    weight,  # [dim]
    bias,  # [dim], or None
    grad_y,  # [rows, dim] or None: written, scale * grad
    normalised,  # [rows, dim]: written, weight * normal + bias
    sums,  # [programs, dim] or None: written, partial sums of grad_y over rows
    rows,
    rows_per_sample,
    rows_per_program,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program walks rows_per_program rows, for BLOCK_D channels."""
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gain = _load_vector(weight, channel, dim)
    shift = tl.zeros_like(gain)
    if bias is not None:
        shift = _load_vector(bias, channel, dim)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < dim)[None, :]
        place = row[:, None] * dim + channel[None, :]
        out = load_rows(normal, row, dim, channel, mask) * gain + shift  # [ROWS, BLOCK_D]
        tl.store(normalised + place, out.to(normalised.dtype.element_ty), mask=mask)
        if grad is not None:
            value = load_rows(grad, row, dim, channel, mask)  # [ROWS, BLOCK_D]
            if scale is not None:
                value *= load_factors(scale, row, rows, rows_per_sample)
            if grad_y is not None:
                tl.store(grad_y + place, value.to(grad_y.dtype.element_ty), mask=mask)
            total += value
    if sums is not None:
        tl.store(sums + tl.program_id(0) * dim + channel, tl.sum(total, axis=0), mask=channel < dim)


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
        activated, slope = gelu_with_gradient(load_rows(hidden, row, dim, channel, mask), NVIDIA)
        value = load_rows(grad, row, dim, channel, mask) * slope  # [ROWS, BLOCK_D]
        tl.store(out + place, activated.to(out.dtype.element_ty), mask=mask)
        tl.store(grad + place, value.to(grad.dtype.element_ty), mask=mask)
        total += value
    tl.store(sums + tl.program_id(0) * dim + channel, tl.sum(total, axis=0), mask=channel < dim)


def add(x: Tensor, y: Tensor, scale: Optional[Tensor]) -> Tensor:
    """x + scale * y in x's dtype [rows, d], with a scale of each sample [B] for equally many rows; all contiguous."""
    out = torch.empty_like(x)
    _add_launch(*x.shape, 1 if scale is None else scale.shape[0])(x, y, scale, out)
    return out


class Prepared(NamedTuple):
    """The gradient of what a branch adds, and the normalised map; and partial sums of the first over rows [parts, d] in
    fp32, if they are wanted."""

    grad_y: Tensor
    normalised: Tensor
    sums: Optional[Tensor]


def prepare(
    grad: Tensor,
    grad_y: Optional[Tensor],
    scale: Optional[Tensor],
    normal: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    sum_rows: bool = False,
) -> Prepared:
    """scale * grad unless it is given as `grad_y`, and weight * normal + bias, both in the dtype of normal; all maps
    are contiguous [rows, d]."""
    normalised = torch.empty_like(normal)
    if grad_y is None:
        grad_y = written = torch.empty_like(normal)
    else:
        grad, scale, written = grad_y if sum_rows else None, None, None
    launch = _prepare_launch(*normal.shape, 1 if scale is None else scale.shape[0], num_processors(normal))
    sums = None
    if sum_rows:
        sums = torch.empty((launch.grid[0], normal.shape[1]), dtype=torch.float32, device=normal.device)
    launch(grad, scale, normal, weight, bias, written, normalised, sums)
    return Prepared(grad_y, normalised, sums)


def gelu_backward_(grad: Tensor, hidden: Tensor) -> Tuple[Tensor, Tensor]:
    """Overwrites the gradient of GELU's output by that of its input `hidden` [rows, d].

    Returns:
        GELU's output, and partial sums over rows of the input's gradient [parts, d] in fp32.
    """
    out = torch.empty_like(hidden)
    launch = _gelu_backward_launch(*hidden.shape, is_nvidia(hidden), num_processors(hidden))
    sums = torch.empty((launch.grid[0], hidden.shape[1]), dtype=torch.float32, device=hidden.device)
    launch(grad, hidden, out, sums)
    return out, sums


@lru_cache(maxsize=MAX_PLANS)
def _add_launch(rows: int, dim: int, samples: int) -> Launch:
    block_rows, block_d = block = _block(dim)
    return Launch(add_kernel, cdiv(rows, block_rows) * cdiv(dim, block_d), (rows, rows // samples, dim), block)


@lru_cache(maxsize=MAX_PLANS)
def _prepare_launch(rows: int, dim: int, samples: int, processors: int) -> Launch:
    grid, rows_per_program = _walk(rows, dim, processors)
    return Launch(prepare_kernel, grid, (rows, rows // samples, rows_per_program, dim), _block(dim))


@lru_cache(maxsize=MAX_PLANS)
def _gelu_backward_launch(rows: int, dim: int, nvidia: bool, processors: int) -> Launch:
    grid, rows_per_program = _walk(rows, dim, processors)
    return Launch(gelu_backward_kernel, grid, (rows, rows_per_program, dim), (nvidia, *_block(dim)))


def _block(dim: int) -> Tuple[int, int]:
    """Rows and channels of a block."""
    block_d = min(next_power_of_2(dim), _MAX_BLOCK_D)
    return max(_BLOCK_ELEMENTS // block_d, 1), block_d


def _walk(rows: int, dim: int, processors: int) -> Tuple[Tuple[int, int], int]:
    """Programs that share the rows, and for each of them the blocks of channels; and rows of each."""
    block_rows, block_d = _block(dim)
    channel_blocks = cdiv(dim, block_d)
    most = max(_PROGRAMS_PER_PROCESSOR * processors // channel_blocks, 1)
    programs, rows_per_program = share_rows(rows, block_rows, most)
    return (programs, channel_blocks), rows_per_program
