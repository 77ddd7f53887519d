"""One step of a whole Mamba block for few sequences, in four kernels that read each weight once.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

from functools import lru_cache
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ._check import check, check_that
from ._device import LN2, LOG2_E, sigmoid, softplus_log2, wait_for_kernel_ahead
from ._launch import (
    MAX_PLANS,
    Launch,
    can_launch_early,
    cdiv,
    is_nvidia,
    next_power_of_2,
    on_device,
    tl,
    triton,
)
from ._operator import can_replace_modules

MAX_BATCH = 8  # a product with more rows runs faster as a matrix product

# Rows of a weight, and weights, that a program holds at a time.
_MAX_ROWS, _WEIGHTS = 16, 8192
_PROGRAMS = 256  # as many at least, where a weight has the rows
_CHANNELS = 16  # of a program of the recurrence


class MambaWeights(NamedTuple):
    """Weights of a Mamba block, by mamba_ssm's names: d token channels, D inner channels, N states, dt rank R.

    Attributes:
        in_proj: [2D, d].
        conv: [D, w].
        conv_bias: [D], or None.
        x_proj: [R + 2N, D].
        dt_proj: [D, R].
        dt_bias: [D].
        A_log: [D, N].
        D: [D].
        out_proj: [d, D].
        in_proj_bias: [2D], or None.
        out_proj_bias: [d], or None.
    """

    in_proj: Tensor
    conv: Tensor
    conv_bias: Optional[Tensor]
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    in_proj_bias: Optional[Tensor] = None
    out_proj_bias: Optional[Tensor] = None


def can_step_mamba(x: Tensor) -> bool:
    """Whether `mamba_step` runs for tokens x [batch, d]: on Triton, for at most `MAX_BATCH`, and nothing is traced."""
    return x.shape[0] <= MAX_BATCH and can_replace_modules(x)


def mamba_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights) -> Tensor:
    """One step of a Mamba block:

        x, z = in_proj x;  conv_state <- shift, x;  u = silu(<conv, conv_state> + conv_bias);  dt, B, C = x_proj u
        dt = softplus(dt_proj dt + dt_bias);  h = exp(-dt * exp(A_log)) * ssm_state + dt * B * u;  ssm_state <- h
        y = (<C, h> + D * u) * silu(z);  out = out_proj y

    Sums are taken in fp32; u, z, the results of x_proj, y and out are rounded to x's dtype. For inference: it has no
    gradients.

    Args:
        x: Tokens [batch, d], for which `can_step_mamba` holds.
        conv_state: [batch, D, w], contiguous; overwritten.
        ssm_state: [batch, D, N], contiguous; overwritten.
        weights: Contiguous.

    Returns:
        [batch, d] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or a tensor is not contiguous.
        RuntimeError: If gradients are wanted.
    """
    inner, states = weights.A_log.shape
    sizes = dict(inner=inner, inner2=2 * inner, rank=weights.dt_proj.shape[-1], N=states)
    specs = ('inner2 d', 'inner w>0', 'inner', 'parts inner', 'inner rank', 'inner', 'inner N', 'inner', 'd inner')
    named = {key: (t, spec) for key, t, spec in zip(weights._fields, weights, (*specs, 'inner2', 'd'))}
    sizes = {**sizes, 'parts': sizes['rank'] + 2 * states}
    states_of = dict(conv_state=(conv_state, 'batch inner w'), ssm_state=(ssm_state, 'batch inner N'))
    check('mamba_step', sizes, x=(x, 'batch d'), **named, **states_of)
    tensors = x, conv_state, ssm_state, *(weight for weight in weights if weight is not None)
    check_that(can_step_mamba(x), f'mamba_step needs Triton and 1 to {MAX_BATCH} tokens, got {tuple(x.shape)}')
    check_that(all(t.is_contiguous() for t in tensors[1:]), 'mamba_step: states and weights must be contiguous')
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError('mamba_step has no gradients; call it within torch.no_grad()')
    with on_device(x):
        return _run(x.contiguous(), conv_state, ssm_state, weights)


def _run(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights) -> Tensor:
    batch, dim = x.shape
    (inner, states), rank, taps = weights.A_log.shape, weights.dt_proj.shape[1], weights.conv.shape[1]
    xz, x_dbl, y, out = (x.new_empty(batch, size) for size in (2 * inner, rank + 2 * states, inner, dim))
    early = can_launch_early(x)
    # The first is not launched early: what is ahead of it may write weights.
    launch = _product(batch, 2 * inner, dim, dim, inner, taps, early, False)
    launch(x, weights.in_proj, weights.in_proj_bias, conv_state, weights.conv, weights.conv_bias, xz)
    launch = _product(batch, rank + 2 * states, inner, 2 * inner, 0, 1, early, early)  # reads the first half of xz
    launch(xz, weights.x_proj, None, None, None, None, x_dbl)
    launch = _recurrence(batch, inner, states, rank, is_nvidia(x), early)
    launch(ssm_state, xz, x_dbl, weights.dt_proj, weights.dt_bias, weights.A_log, weights.D, y)
    launch = _product(batch, dim, inner, inner, 0, 1, early, early)
    launch(y, weights.out_proj, weights.out_proj_bias, None, None, None, out)
    for state in (conv_state, ssm_state):
        torch.autograd.graph.increment_version(state)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _product(
    batch: int, rows: int, dim: int, x_batch: int, convolved: int, taps: int, early: bool, launched_early: bool
) -> Launch:
    block_n = min(next_power_of_2(max(rows // _PROGRAMS, 1) + 1) // 2, _MAX_ROWS)
    block_k = min(next_power_of_2(dim), _WEIGHTS // block_n)
    constants = dim, convolved, taps, early, block_n, block_k
    return Launch(product_kernel, (cdiv(rows, block_n), batch), (rows, x_batch), constants, early=launched_early)


@lru_cache(maxsize=MAX_PLANS)
def _recurrence(batch: int, inner: int, states: int, rank: int, nvidia: bool, early: bool) -> Launch:
    block_d = min(_CHANNELS, next_power_of_2(inner))
    constants = states, rank, nvidia, early, block_d, next_power_of_2(states), next_power_of_2(rank)
    return Launch(recurrence_kernel, (cdiv(inner, block_d), batch), (inner,), constants, early=early)


@triton.jit
def product_kernel(
    x,  # [batch, dim], by the stride of its rows
    weight,  # [rows, dim]
    bias,  # [rows], or None
    state,  # [batch, CONVOLVED, TAPS] or None: updated
    taps,  # [CONVOLVED, TAPS], or None
    conv_bias,  # [CONVOLVED], or None
    out,  # [batch, rows]: written
    rows,
    x_batch,
    dim: tl.constexpr,
    CONVOLVED: tl.constexpr,
    TAPS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N rows of weight @ x for one entry of the batch; the first CONVOLVED pass a convolution and SiLU."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    has_row = row < rows
    rows_of_weight = weight + row.to(tl.int64)[:, None] * dim
    x += batch * x_batch
    k = tl.arange(0, BLOCK_K)
    w = tl.load(
        rows_of_weight + k[None, :], mask=has_row[:, None] & (k < dim)[None, :], other=0.0
    )  # [BLOCK_N, BLOCK_K]
    wait_for_kernel_ahead(EARLY)
    total = w.to(tl.float32) * tl.load(x + k, mask=k < dim, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(rows_of_weight + k[None, :], mask=has_row[:, None] & (k < dim)[None, :], other=0.0)
        total += w.to(tl.float32) * tl.load(x + k, mask=k < dim, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(total, axis=1)
    if bias is not None:
        y += tl.load(bias + row, mask=has_row, other=0.0).to(tl.float32)
    if CONVOLVED > 0:
        inside = row < CONVOLVED
        columns = state + (batch * CONVOLVED + row) * TAPS
        newest = y.to(out.dtype.element_ty).to(state.dtype.element_ty)
        u = tl.zeros([BLOCK_N], tl.float32)
        if conv_bias is not None:
            u += tl.load(conv_bias + row, mask=inside, other=0.0).to(tl.float32)
        for tap in tl.static_range(TAPS):
            column = newest
            if tap < TAPS - 1:
                column = tl.load(columns + tap + 1, mask=inside, other=0.0)  # [BLOCK_N]
            tl.store(columns + tap, column, mask=inside)
            u += column.to(tl.float32) * tl.load(taps + row * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(inside, u * sigmoid(u), y)
    tl.store(out + batch * rows + row, y.to(out.dtype.element_ty), mask=has_row)


@triton.jit
def recurrence_kernel(
    state,  # [batch, dim, N]: updated
    xz,  # [batch, 2 * dim]: u, and the gate
    x_dbl,  # [batch, R + 2 * N]: dt before its projection, B and C
    dt_weight,  # [dim, R]
    dt_bias,  # [dim]
    A_log,  # [dim, N]
    D,  # [dim]
    out,  # [batch, dim]: written
    dim,
    N: tl.constexpr,
    R: tl.constexpr,
    NVIDIA: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program updates BLOCK_D channels of one entry of the batch."""
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    has_channel = channel < dim
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    mask = has_channel[:, None] & (n < N)[None, :]
    x_dbl += batch * (R + 2 * N)
    has_weight = has_channel[:, None] & (r < R)[None, :]
    w = tl.load(dt_weight + channel[:, None] * R + r[None, :], mask=has_weight, other=0.0)  # [BLOCK_D, BLOCK_R]
    bias = tl.load(dt_bias + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    skip = tl.load(D + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    rate = -tl.exp2(tl.load(A_log + channel[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2_E)
    states = state + (batch * dim + channel)[:, None] * N + n[None, :]
    h = tl.load(states, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_N]
    wait_for_kernel_ahead(EARLY)
    low = tl.load(x_dbl + r, mask=r < R, other=0.0).to(tl.float32)  # [BLOCK_R]
    dt = softplus_log2((tl.sum(w.to(tl.float32) * low[None, :], axis=1) + bias) * LOG2_E, True, NVIDIA)
    b = tl.load(x_dbl + R + n, mask=n < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    c = tl.load(x_dbl + R + N + n, mask=n < N, other=0.0).to(tl.float32)  # [BLOCK_N]
    u = tl.load(xz + batch * 2 * dim + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    z = tl.load(xz + (batch * 2 + 1) * dim + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    h = tl.exp2(dt[:, None] * rate) * h + (dt * LN2 * u)[:, None] * b[None, :]
    tl.store(states, h.to(state.dtype.element_ty), mask=mask)
    y = tl.sum(h * c[None, :], axis=1) + skip * u
    tl.store(out + batch * dim + channel, (y * z * sigmoid(z)).to(out.dtype.element_ty), mask=has_channel)
