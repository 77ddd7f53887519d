"""The end of Vim's bidirectional Mamba: both directions' outputs are averaged and gated, in one pass each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import parts
from .elementwise import sigmoid
from .launcher import Launcher

_ROWS, _CHANNELS = 16, 128  # of a program


@triton.jit
def _places(rows, dim, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows [ROWS, 1] and channels [1, CHANNELS] of a program, and which of them exist."""
    blocks = tl.cdiv(dim, CHANNELS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return row, channel, (row < rows) & (channel < dim)


@triton.jit
def gate(
    y_ptr,
    z_ptr,
    mean_ptr,
    out_ptr,
    rows,
    dim,
    z_row,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = mean * silu(z) on [rows, dim], mean = (y[0] + y[1]) / 2 with y [2, rows, dim]; with KEEP also the mean."""
    row, channel, mask = _places(rows, dim, ROWS, CHANNELS)
    place = row * dim + channel
    mean = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    mean += tl.load(y_ptr + tl.cast(rows, tl.int64) * dim + place, mask=mask, other=0.0).to(tl.float32)
    mean *= 0.5
    z = tl.load(z_ptr + row * z_row + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (mean * z * sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(
    grad_out_ptr,
    mean_ptr,
    z_ptr,
    grad_y_ptr,
    grad_z_ptr,
    rows,
    dim,
    z_row,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of y[0], which is that of y[1], and z's, whose rows lie like those of z."""
    row, channel, mask = _places(rows, dim, ROWS, CHANNELS)
    place = row * dim + channel
    gated = row * z_row + channel
    grad = tl.load(grad_out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + place, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + gated, mask=mask, other=0.0).to(tl.float32)
    opened = sigmoid(z)
    tl.store(grad_y_ptr + place, (grad * (0.5 * z * opened)).to(grad_y_ptr.dtype.element_ty), mask=mask)
    grad_z = grad * mean * opened * (1.0 + z * (1.0 - opened))
    tl.store(grad_z_ptr + gated, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask)


_gate = Launcher(gate)
_gate_backward = Launcher(gate_backward)


def _sizes(z: Tensor) -> tuple[int, tuple[int, int, int]]:
    rows, dim = z.shape[0] * z.shape[1], z.shape[2]
    row = z.stride(1) if z.shape[1] > 1 else z.stride(0)  # of one row a contiguous tensor may have any stride
    return parts(rows, _ROWS) * parts(dim, _CHANNELS), (rows, dim, row)


def gate_forward(y: Tensor, z: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """(y[0] + y[1]) / 2 * silu(z) [B, L, D], and if it is kept the mean of y.

    Args:
        y: [2, B, L, D], contiguous.
        z: [B, L, D], a slice of the channels of a contiguous tensor.
    """
    out = torch.empty_like(y[0])
    mean = torch.empty_like(out) if keep else out
    programs, sizes = _sizes(z)
    _gate(programs, (y, z, mean, out), sizes, (keep, _ROWS, _CHANNELS), warps=4)
    return out, mean


def gate_gradients(grad_out: Tensor, mean: Tensor, z: Tensor, grad_z: Tensor) -> Tensor:
    """The gradient of either of y [B, L, D]; writes z's into grad_z, which lies like z."""
    grad_y = torch.empty_like(mean)
    programs, sizes = _sizes(z)
    _gate_backward(programs, (grad_out, mean, z, grad_y, grad_z), sizes, (_ROWS, _CHANNELS), warps=4)
    return grad_y
