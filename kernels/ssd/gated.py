"""VSSD's mixer between its convolution and its output projection, in two passes over the map, for inference.

The first sums the global state of each head. The second reads it, normalises the result over the channels while it
holds them, and gates it. So x is read twice and no map but the result is written.
"""

from functools import lru_cache
from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from .._device import LN2, LOG2_E, softplus_log2
from .._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    dot_precision,
    is_nvidia,
    next_power_of_2,
    num_processors,
    on_device,
    shared_memory,
    tl,
    triton,
)

MAX_HEAD, MAX_CHANNELS, MAX_STATES = 128, 512, 128
_PROGRAMS_PER_PROCESSOR = 4  # of the first pass, for which sequences are cut
_MIN_STEPS = 256  # of a part of a sequence
_BLOCK_L = 64  # positions that a program of the first pass holds at a time
_TILE_ELEMENTS = 16384  # positions times channels that a program of the second pass holds


class Sizes(NamedTuple):
    """Constants of the kernels: heads, channels of a head, states; and blocks of channels (of a head in the first pass,
    of all in the second), states and positions."""

    heads: int
    dim: int
    dstate: int
    block_d: int
    block_n: int
    block_l: int


@triton.jit(do_not_specialize_on_alignment=['batch_size', 'length', 'steps'])  # maps of any size run on the same kernel
def global_state_kernel(
    x,  # [B, L, H, P], by its strides
    dt,  # [B, L, H], by its strides
    B,  # [B, L, N], by its strides
    A,  # [H]
    dt_bias,  # [H]
    states,  # [parts, B, N, H * P]: written
    batch_size,
    length,
    steps,
    x_strides,
    dt_strides,
    B_strides,
    sizes,
    PRECISION: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program sums the state of a head over a part of a sequence, of so many steps."""
    head, batch = tl.program_id(0) % sizes.heads, (tl.program_id(0) // sizes.heads).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    channel, state = tl.arange(0, sizes.block_d), tl.arange(0, sizes.block_n)
    has_channel, has_state = channel < sizes.dim, state < sizes.dstate
    x += batch * x_strides[0] + head * x_strides[2]
    dt += batch * dt_strides[0] + head * dt_strides[2]
    B += batch * B_strides[0]
    scale = -tl.load(A + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    total = tl.zeros([sizes.block_n, sizes.block_d], tl.float32)
    first = part * steps
    for start in range(0, steps, sizes.block_l):
        within = start + tl.arange(0, sizes.block_l)
        position = first + within
        exists = (within < steps) & (position < length)
        raw = tl.load(dt + position * dt_strides[1], mask=exists, other=0.0).to(tl.float32) + bias  # [block_l]
        weight = scale * softplus_log2(raw * LOG2_E, True, NVIDIA) * LN2
        mask = exists[:, None] & has_channel[None, :]
        value = tl.load(x + position[:, None] * x_strides[1] + channel[None, :], mask=mask, other=0.0)
        value = (value.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)  # [block_l, block_d]
        mask = exists[:, None] & has_state[None, :]
        written = tl.load(B + position[:, None] * B_strides[1] + state[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(written), value, total, input_precision=PRECISION)  # [block_n, block_d]
    width = sizes.heads * sizes.dim
    states += (part * batch_size + batch) * (sizes.dstate * width) + head * sizes.dim
    mask = has_state[:, None] & has_channel[None, :]
    tl.store(states + state[:, None] * width + channel[None, :], total.to(states.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['length', 'blocks'])
def gated_output_kernel(
    states,  # [B, N, H * P]
    C,  # [B, L, N], by its strides
    x,  # [B, L, H, P], by its strides; heads follow each other
    z,  # [B, L, H * P], by its strides
    D,  # [H]
    weight,  # [H * P]
    bias,  # [H * P]
    out,  # [B, L, H * P]: written
    length,
    blocks,
    C_strides,
    x_strides,
    z_strides,
    sizes,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes block_l positions of an entry of the batch."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.cast(tl.program_id(0) % blocks * sizes.block_l + tl.arange(0, sizes.block_l), tl.int64)
    exists = position < length
    width = sizes.heads * sizes.dim
    channel, state = tl.arange(0, sizes.block_d), tl.arange(0, sizes.block_n)
    has_channel, has_state = channel < width, state < sizes.dstate
    mask = exists[:, None] & has_channel[None, :]
    places = C + batch * C_strides[0] + position[:, None] * C_strides[1] + state[None, :]
    read = tl.load(places, mask=exists[:, None] & has_state[None, :], other=0.0)  # [block_l, block_n]
    places = states + batch * (sizes.dstate * width) + state[:, None] * width + channel[None, :]
    held = tl.load(places, mask=has_state[:, None] & has_channel[None, :], other=0.0)  # [block_n, block_d]
    value = tl.dot(read, held.to(read.dtype), input_precision=PRECISION)  # [block_l, block_d]
    skip = tl.load(D + channel // sizes.dim, mask=has_channel, other=0.0).to(tl.float32)  # [block_d]
    places = x + batch * x_strides[0] + position[:, None] * x_strides[1] + channel[None, :]
    value += skip[None, :] * tl.load(places, mask=mask, other=0.0).to(tl.float32)  # [block_l, block_d]
    mean = tl.sum(value, axis=1) / width
    value = tl.where(has_channel[None, :], value - mean[:, None], 0.0)
    value *= (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + EPS))[:, None]
    value *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    value += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    places = z + batch * z_strides[0] + position[:, None] * z_strides[1] + channel[None, :]
    value *= tl.load(places, mask=mask, other=0.0).to(tl.float32)  # [block_l, block_d]
    out += batch * length * width + position[:, None] * width + channel[None, :]
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


def fits(x: Tensor, dstate: int) -> bool:
    """Whether the kernels take x [B, L, H, P] with so many states."""
    heads, dim = x.shape[2:]
    block_d, block_n, block_l = _output_block(heads * dim, dstate)
    needed = block_n * max(block_d, block_l) * x.element_size() + 4 * block_l * block_d
    sizes = dim <= MAX_HEAD and heads * dim <= MAX_CHANNELS and dstate <= MAX_STATES
    return sizes and needed <= shared_memory(x)


def gated_non_causal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(y) * z with y of `non_causal_ssd`, on Triton and without gradients, where it `fits`.

    With m = softplus(dt + dt_bias) * -A, for every head:

        S = sum_l m_l x_l B_l^T,    y_l = S C_l + D * x_l,    out = (weight * normal(y) + bias) * z

    Sums, the norm and the gate are in fp32; m * x and S are rounded to x's dtype for the products.

    Args:
        x: [batch, L, H, P] with neighbouring channels and heads.
        dt: [batch, L, H].
        A, D, dt_bias: [H], contiguous, like weight and bias in any floating dtype.
        B, C: [batch, L, N] in x's dtype, with neighbouring states.
        z: [batch, L, H * P] with neighbouring channels.
        weight, bias: [H * P], contiguous, of the LayerNorm.
        eps: Added to the variance.

    Returns:
        [batch, L, H * P] in x's dtype, contiguous.
    """
    batch, length, heads, dim = x.shape
    dstate = B.shape[-1]
    precision, nvidia = dot_precision(x), is_nvidia(x)
    sizes = heads, dim, dstate
    with on_device(x):
        strides = x.stride()[:3], dt.stride(), B.stride()[:2]
        launch, parts = _state_launch(batch, length, sizes, strides, precision, nvidia, num_processors(x))
        dtype = torch.float32 if parts > 1 else x.dtype
        states = x.new_empty((parts, batch, dstate, heads * dim), dtype=dtype)
        launch(x, dt, B, A, dt_bias, states)
        states = states.sum(dim=0).to(x.dtype) if parts > 1 else states[0]
        out = x.new_empty((batch, length, heads * dim))
        strides = C.stride()[:2], x.stride()[:2], z.stride()[:2]
        _output_launch(batch, length, sizes, strides, eps, precision)(states, C, x, z, D, weight, bias, out)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _state_launch(
    batch: int,
    length: int,
    sizes: Tuple[int, int, int],
    strides: Tuple[Tuple[int, ...], ...],
    precision: str,
    nvidia: bool,
    processors: int,
) -> Tuple[Launch, int]:
    """The launch, and into how many parts it cuts a sequence."""
    heads, dim, dstate = sizes
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, batch * heads)
    steps = cdiv(cdiv(length, max(min(wanted, length // _MIN_STEPS), 1)), _BLOCK_L) * _BLOCK_L
    parts = cdiv(length, steps)
    blocks = max(next_power_of_2(dim), 16), max(next_power_of_2(dstate), 16), _BLOCK_L
    constants = Sizes(*sizes, *blocks), precision, nvidia
    numbers = batch, length, steps, *strides
    return Launch(global_state_kernel, (batch * heads, parts), numbers, constants, warps=4, stages=3), parts


@lru_cache(maxsize=MAX_PLANS)
def _output_launch(
    batch: int,
    length: int,
    sizes: Tuple[int, int, int],
    strides: Tuple[Tuple[int, ...], ...],
    eps: float,
    precision: str,
) -> Launch:
    heads, dim, dstate = sizes
    block_d, block_n, block_l = _output_block(heads * dim, dstate)
    blocks = cdiv(length, block_l)
    constants = Sizes(*sizes, block_d, block_n, block_l), eps, precision
    return Launch(gated_output_kernel, batch * blocks, (length, blocks, *strides), constants, warps=8)


def _output_block(channels: int, dstate: int) -> Tuple[int, int, int]:
    """Channels, states and positions of a program of the second pass."""
    block_d = max(next_power_of_2(channels), 16)
    return block_d, max(next_power_of_2(dstate), 16), max(min(_TILE_ELEMENTS // block_d, _BLOCK_L), 16)
