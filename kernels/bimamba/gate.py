"""The end of Vim's bidirectional Mamba: both directions' outputs are averaged and gated, in one pass each way."""

from functools import lru_cache
from typing import Optional, Tuple

import torch
from torch import Tensor

from .._device import sigmoid
from .._launch import MAX_PLANS, Launch, cdiv, tl, triton

_BLOCK = 16, 128  # rows and channels of a program


@triton.jit
def _places(rows, dim, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, 1] and channels [1, BLOCK_D] of a program, and which of them exist."""
    blocks = tl.cdiv(dim, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return row, channel, (row < rows) & (channel < dim)


@triton.jit
def gate_kernel(
    y,  # [2, rows, dim]
    z,  # [rows, dim], by its row stride
    mean,  # [rows, dim] or None: written, (y[0] + y[1]) / 2
    out,  # [rows, dim]: written, mean * silu(z)
    rows,
    dim,
    z_row,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, channel, mask = _places(rows, dim, ROWS, BLOCK_D)
    place = row * dim + channel
    average = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    average += tl.load(y + tl.cast(rows, tl.int64) * dim + place, mask=mask, other=0.0).to(tl.float32)
    average *= 0.5
    gate = tl.load(z + row * z_row + channel, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    tl.store(out + place, (average * gate * sigmoid(gate)).to(out.dtype.element_ty), mask=mask)
    if mean is not None:
        tl.store(mean + place, average.to(mean.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad_out,  # [rows, dim]
    mean,  # [rows, dim]
    z,  # [rows, dim], by its row stride
    grad_y,  # [rows, dim]: written, the gradient of y[0], which is that of y[1]
    grad_z,  # [rows, dim], by z's row stride: written
    out,  # [rows, dim] or None: written, mean * silu(z)
    rows,
    dim,
    z_row,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, channel, mask = _places(rows, dim, ROWS, BLOCK_D)
    place = row * dim + channel
    gated = row * z_row + channel
    grad = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    average = tl.load(mean + place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    gate = tl.load(z + gated, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    opened = sigmoid(gate)
    tl.store(grad_y + place, (grad * (0.5 * gate * opened)).to(grad_y.dtype.element_ty), mask=mask)
    grad_gate = grad * average * opened * (1.0 + gate * (1.0 - opened))
    tl.store(grad_z + gated, grad_gate.to(grad_z.dtype.element_ty), mask=mask)
    if out is not None:
        tl.store(out + place, (average * gate * opened).to(out.dtype.element_ty), mask=mask)


def gate_forward(y: Tensor, z: Tensor, save: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """(y[0] + y[1]) / 2 * silu(z) [B, L, D], and with `save` the mean of y.

    Args:
        y: [2, B, L, D], contiguous.
        z: [B, L, D], a slice of the channels of a contiguous tensor.
    """
    out = y.new_empty(z.shape)
    mean = torch.empty_like(out) if save else None
    _launch(*_sizes(z), False)(y, z, mean, out)
    return out, mean


def gate_backward(
    grad_out: Tensor, mean: Tensor, z: Tensor, grad_z: Tensor, recompute_out: bool = False
) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradient of either of y [B, L, D], and the output if it is wanted; writes z's gradient into grad_z, which
    lies like z."""
    grad_y = torch.empty_like(mean)
    out = torch.empty_like(mean) if recompute_out else None
    _launch(*_sizes(z), True)(grad_out, mean, z, grad_y, grad_z, out)
    return grad_y, out


@lru_cache(maxsize=MAX_PLANS)
def _launch(rows: int, dim: int, z_row: int, backward: bool) -> Launch:
    kernel = gate_backward_kernel if backward else gate_kernel
    block_rows, block_d = _BLOCK
    return Launch(kernel, cdiv(rows, block_rows) * cdiv(dim, block_d), (rows, dim, z_row), _BLOCK)


def _sizes(z: Tensor) -> Tuple[int, int, int]:
    """Rows, channels, and the stride of rows."""
    batch, seqlen, dim = z.shape
    # Of one row a contiguous tensor may have any stride.
    return batch * seqlen, dim, z.stride(1) if seqlen > 1 else z.stride(0)
