"""RMSNorm with a gate, of Mamba-2, in one pass each way.

Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
https://arxiv.org/abs/2405.21060
"""

from functools import lru_cache
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._device import load_rows, sigmoid
from ._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    next_power_of_2,
    num_processors,
    runs_on_triton,
    share_rows,
    tl,
    triton,
)
from ._operator import Operator

_MAX_CHANNELS = 4096  # of a group, which the Triton kernels hold in registers
_BLOCK_ELEMENTS = 2048  # rows times channels that a program holds at a time, more only if one row has more
_PROGRAMS_PER_PROCESSOR = 8  # of the backward pass, each of which leaves a partial sum


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    other: Optional[Tensor] = None,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm over groups of channels with a gate z.

    With m = y, or (y + other) / 2, and the mean over the channels of a group:

        s = m * silu(z),    out = weight * s / sqrt(mean(s^2) + eps)

    or with `norm_before_gate`: out = weight * m / sqrt(mean(m^2) + eps) * silu(z).

    Computed in fp32 (fp64 if y is fp64); on Triton by one kernel, and one for its backward pass, for up to 4096
    channels of a group. Differentiable in reverse mode in every tensor.

    Args:
        y: [B, ..., d], in any floating dtype.
        z: [B, ..., d]; its rows may lie apart, as those of a part of a projection do.
        weight: [d].
        other: [B, ..., d] in y's dtype, or None.
        groups: Number of groups, a divisor of d.
        eps: Added to the mean square.
        norm_before_gate: Whether the gate follows the norm.

    Returns:
        [B, ..., d] in y's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    function = 'gated_rms_norm'
    is_matrix = y.ndim >= 2 and y.shape[-1] > 0
    check_that(is_matrix, f'{function}: y must be [B, ..., d] with d > 0, got {tuple(y.shape)}')
    check(function, y=(y, '... d'), z=(z, '... d'), weight=(weight, 'd'), other=(other, '... d'))
    for name, tensor in (('z', z), ('other', other)):
        if tensor is not None:
            found = tuple(tensor.shape)
            check_that(tensor.shape == y.shape, f'{function}: {name} must be {tuple(y.shape)} like y, got {found}')
    same = other is None or other.dtype == y.dtype
    check_that(same, f'{function}: other must be {y.dtype} like y, got {getattr(other, "dtype", None)}')
    dim = y.shape[-1]
    divides = groups > 0 and dim % groups == 0
    check_that(divides, f'{function}: groups must divide the {{}} channels, got {{}}', dim, groups)
    if runs_on_triton(y) and dim // groups <= _MAX_CHANNELS:
        return _operator(y, z, weight, other, groups, eps, norm_before_gate)
    dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
    y, gate = y.to(wide), F.silu(z.to(wide))
    if other is not None:
        y = (y + other) / 2
    y = y if norm_before_gate else y * gate
    grouped = y.unflatten(-1, (groups, -1))
    normal = (grouped * torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    return (normal * gate if norm_before_gate else normal).to(dtype)


def _forward(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    other: Optional[Tensor],
    groups: int,
    eps: float,
    norm_before_gate: bool,
    save: bool,
) -> Tuple[Tensor, Tensor]:
    y, z, other = y.contiguous(), _with_rows(z), None if other is None else other.contiguous()
    out = torch.empty_like(y)
    rows, dim = y.numel() // y.shape[-1], y.shape[-1]
    rstd = y.new_empty((groups, rows) if save else (0,), dtype=torch.float32)
    launch = _forward_launch(rows, dim, z.stride(-2), groups, eps, norm_before_gate)
    launch(y, other, z, weight.contiguous(), out, rstd if save else None)
    return out, rstd


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out,), (y, z, weight, other, groups, _, norm_before_gate), (rstd,) = grads, inputs, saved
    y, z, other = y.contiguous(), _with_rows(z), None if other is None else other.contiguous()
    grad_y, grad_z = torch.empty_like(y), torch.empty_like(z, memory_format=torch.contiguous_format)
    rows, dim = y.numel() // y.shape[-1], y.shape[-1]
    launch = _backward_launch(rows, dim, z.stride(-2), groups, norm_before_gate, num_processors(y))
    sums = y.new_empty((launch.grid[0], dim), dtype=torch.float32)
    launch(grad_out.contiguous(), y, other, z, weight.contiguous(), rstd, grad_y, grad_z, sums)
    return grad_y, grad_z, sums.sum(dim=0), None if other is None else grad_y


def _like(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    other: Optional[Tensor],
    groups: int,
    eps: float,
    norm_before_gate: bool,
    save: bool,
) -> Tuple[Tensor, Tensor]:
    moments = (groups, y.shape[:-1].numel()) if save else (0,)
    return y.new_empty(y.shape), y.new_empty(moments, dtype=torch.float32)


_operator = Operator('gated_rms_norm', _forward, _backward, _like)


@triton.jit
def _gated_input(y, other, z, row, z_stride, channel, mask, dim, GATED: tl.constexpr):
    """m, silu(z) and its derivative, and what is normalised: all [ROWS, BLOCK_D]."""
    mean = load_rows(y, row, dim, channel, mask)
    if other is not None:
        mean = 0.5 * (mean + load_rows(other, row, dim, channel, mask))
    gate = load_rows(z, row, z_stride, channel, mask)
    share = sigmoid(gate)
    silu = gate * share
    slope = share * (1.0 + gate * (1.0 - share))
    return mean, silu, slope, mean * silu if GATED else mean


@triton.jit(do_not_specialize_on_alignment=['rows'])  # sequences of any length run on the same kernel
def gated_norm_kernel(
    y,  # [rows, dim]
    other,  # [rows, dim], or None
    z,  # [rows, dim], by its stride
    weight,  # [dim]
    out,  # [rows, dim]: written
    rstd,  # [groups, rows] or None: written, reciprocal roots of the mean squares
    rows,
    dim,
    z_stride,
    eps: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """One program normalises ROWS rows of the GROUP channels of one group."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, BLOCK_D)
    channel = tl.program_id(1) * GROUP + within
    has_channel = within < GROUP
    mask = (row < rows)[:, None] & has_channel[None, :]
    _, silu, _, total = _gated_input(y, other, z, row, z_stride, channel, mask, dim, not BEFORE)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / GROUP + eps)
    if rstd is not None:
        tl.store(rstd + tl.program_id(1).to(tl.int64) * rows + row, scale, mask=row < rows)
    total *= scale[:, None]
    total *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
    if BEFORE:
        total *= silu
    tl.store(out + row[:, None] * dim + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_program'])
def gated_norm_backward_kernel(
    grad_out,  # [rows, dim]
    y,  # [rows, dim]
    other,  # [rows, dim], or None
    z,  # [rows, dim], by its stride
    weight,  # [dim]
    rstd,  # [groups, rows]
    grad_y,  # [rows, dim]: written; the gradient of `other` is the same
    grad_z,  # [rows, dim]: written
    sums,  # [programs, dim]: written, parts of the gradient of weight
    rows,
    rows_per_program,
    dim,
    z_stride,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """One program walks rows_per_program rows of one group, ROWS at a time.

    With n = s * rstd and g = weight * grad_out (times silu(z) if the gate follows): the gradient of s is
    rstd * (g - n * mean(g * n)).
    """
    within = tl.arange(0, BLOCK_D)
    channel = tl.program_id(1) * GROUP + within
    has_channel = within < GROUP
    factor = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
    grad_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = (row < rows) & (start + tl.arange(0, ROWS) < rows_per_program)
        mask = has_row[:, None] & has_channel[None, :]
        mean, silu, slope, total = _gated_input(y, other, z, row, z_stride, channel, mask, dim, not BEFORE)
        scale = tl.load(rstd + tl.program_id(1).to(tl.int64) * rows + row, mask=has_row, other=0.0)[:, None]  # [ROWS]
        normal = total * scale
        grad = load_rows(grad_out, row, dim, channel, mask)
        if BEFORE:
            grad_gate = grad * normal * factor
            grad *= silu
        grad_weight += grad * normal
        grad *= factor
        grad = scale * (grad - normal * (tl.sum(grad * normal, axis=1) / GROUP)[:, None])
        if not BEFORE:
            grad_gate = grad * mean
            grad *= silu
        if other is not None:
            grad *= 0.5
        place = row[:, None] * dim + channel[None, :]
        tl.store(grad_y + place, grad.to(grad_y.dtype.element_ty), mask=mask)
        tl.store(grad_z + place, (grad_gate * slope).to(grad_z.dtype.element_ty), mask=mask)
    target = sums + tl.program_id(0).to(tl.int64) * dim + channel
    tl.store(target, tl.sum(grad_weight, axis=0), mask=has_channel)


def _with_rows(x: Tensor) -> Tensor:
    """x [B, ..., d] as rows of neighbouring channels at equal distances, without a copy where it is so."""
    if x.stride(-1) == 1 and all(
        x.stride(i) == x.stride(i + 1) * x.shape[i + 1] or x.shape[i] == 1 for i in range(x.ndim - 2)
    ):
        return x
    return x.contiguous()


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(rows: int, dim: int, z_stride: int, groups: int, eps: float, before: bool) -> Launch:
    group, block_d, block_rows = block = _block(dim, groups)
    grid = cdiv(rows, block_rows), groups
    return Launch(gated_norm_kernel, grid, (rows, dim, z_stride), (eps, *block, before), _warps(block_d))


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(rows: int, dim: int, z_stride: int, groups: int, before: bool, processors: int) -> Launch:
    _, block_d, block_rows = block = _block(dim, groups)
    programs, rows_per_program = share_rows(rows, block_rows, max(_PROGRAMS_PER_PROCESSOR * processors // groups, 1))
    sizes = rows, rows_per_program, dim, z_stride
    return Launch(gated_norm_backward_kernel, (programs, groups), sizes, (*block, before), _warps(block_d))


def _block(dim: int, groups: int) -> Tuple[int, int, int]:
    """Channels of a group, and the channels and rows of a tile."""
    block_d = next_power_of_2(dim // groups)
    return dim // groups, block_d, max(_BLOCK_ELEMENTS // block_d, 1)


def _warps(block_d: int) -> int:
    return max(4, block_d // 512)
