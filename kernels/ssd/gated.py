"""VSSD's mixer between its convolution and its output projection, in two passes over the map each way.

The first sums the global state of each head. The second reads it, normalises the result over the channels while it
holds them, and gates it. So x is read twice and no map but the result is written. The backward pass recomputes what the
second pass held; between its two passes lies the product that is the gradient of the states.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._device import LN2, LOG2_E, fast_sigmoid, load_rows, softplus_log2
from .._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    dot_precision,
    is_nvidia,
    next_power_of_2,
    num_processors,
    product_block,
    share_rows,
    shared_memory,
    tl,
    triton,
)
from .._operator import Operator

MAX_HEAD, MAX_CHANNELS, MAX_STATES = 128, 512, 128
_PROGRAMS_PER_PROCESSOR = 4  # of the first pass, for which sequences are cut
_MIN_STEPS = 256  # of a part of a sequence
_BLOCK_L = 64  # positions that a program of the first pass holds at a time
_TILE_ELEMENTS = 16384  # positions times channels that a program of the second pass holds
_BACKWARD_ELEMENTS = 2048  # the same of the backward pass, at a time
_BACKWARD_PROGRAMS = 4  # for each multiprocessor, each of which leaves partial sums


class Sizes(NamedTuple):
    """Constants of the kernels: heads, channels of a head, states; and blocks of channels (of a head in
    `global_state_kernel` and `input_backward_kernel`, else of all), states and positions."""

    heads: int
    dim: int
    dstate: int
    block_d: int
    block_n: int
    block_l: int


@triton.jit(do_not_specialize_on_alignment=['batch_size', 'length', 'steps'])  # maps of any size run on the same kernel
def global_state_kernel(
    x,  # [B, L, H * P], by its strides
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
    x += batch * x_strides[0] + head * sizes.dim
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


@triton.jit
def _normalised(
    held,
    C,
    x,
    skip,
    position,
    channel,
    state,
    mask,
    has_entry,
    C_step,
    x_step,
    width,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x, y of the held states normalised before weight and bias, and reciprocal deviations, at some positions."""
    read = tl.load(C + position[:, None] * C_step + state[None, :], mask=has_entry, other=0.0)  # [block_l, block_n]
    given = load_rows(x, position, x_step, channel, mask)  # [block_l, block_d]
    value = tl.dot(read, held.to(read.dtype), input_precision=PRECISION) + skip * given  # [block_l, block_d]
    value = tl.where(mask, value - (tl.sum(value, axis=1) / width)[:, None], 0.0)
    scale = (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + EPS))[:, None]
    return given, value * scale, scale


@triton.jit(do_not_specialize_on_alignment=['length', 'blocks'])
def gated_output_kernel(
    states,  # [B, N, H * P]
    C,  # [B, L, N], by its strides
    x,  # [B, L, H * P], by its strides
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
    mask, has_entry = exists[:, None] & has_channel[None, :], exists[:, None] & has_state[None, :]
    places = states + batch * (sizes.dstate * width) + state[:, None] * width + channel[None, :]
    held = tl.load(places, mask=has_state[:, None] & has_channel[None, :], other=0.0)  # [block_n, block_d]
    skip = tl.load(D + channel // sizes.dim, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    C += batch * C_strides[0]
    x += batch * x_strides[0]
    _, value, _ = _normalised(
        held, C, x, skip, position, channel, state, mask, has_entry, C_strides[1], x_strides[1], width, EPS, PRECISION
    )
    value *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    value += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    places = z + batch * z_strides[0] + position[:, None] * z_strides[1] + channel[None, :]
    value *= tl.load(places, mask=mask, other=0.0).to(tl.float32)  # [block_l, block_d]
    out += batch * length * width + position[:, None] * width + channel[None, :]
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['length', 'steps'])
def output_backward_kernel(
    states,  # [B, N, H * P]
    C,  # [B, L, N], by its strides
    x,  # [B, L, H * P], by its strides
    z,  # [B, L, H * P], by its strides
    D,  # [H]
    weight,  # [H * P]
    bias,  # [H * P]
    grad_out,  # [B, L, H * P]
    grad_y,  # [B, L, H * P]: written, the gradient of what is normalised
    grad_C,  # [B, L, N], by its strides: written
    grad_z,  # [B, L, H * P]: written
    sums,  # [programs, 3, H * P]: written, parts of the gradients of weight, bias and, for each channel, D
    length,
    steps,
    parts,
    C_strides,
    x_strides,
    z_strides,
    grad_C_strides,
    sizes,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks so many steps of an entry of the batch, block_l at a time.

    With n the normalised y, g = grad_out * z * weight and r the reciprocal deviation:

        grad_y = r * (g - mean(g) - n * mean(g * n)),    grad_z = grad_out * (weight * n + bias),    grad_C = S^T grad_y
    """
    program = tl.program_id(0).to(tl.int64)
    batch, first = program // parts, (tl.program_id(0) % parts) * steps
    width = sizes.heads * sizes.dim
    channel, state = tl.arange(0, sizes.block_d), tl.arange(0, sizes.block_n)
    has_channel, has_state = channel < width, state < sizes.dstate
    places = states + batch * (sizes.dstate * width) + state[:, None] * width + channel[None, :]
    held = tl.load(places, mask=has_state[:, None] & has_channel[None, :], other=0.0)  # [block_n, block_d]
    skip = tl.load(D + channel // sizes.dim, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    gain = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    shift = tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [block_d]
    C += batch * C_strides[0]
    x += batch * x_strides[0]
    z += batch * z_strides[0]
    grad_C += batch * grad_C_strides[0]
    grad_out += batch * length * width
    grad_y += batch * length * width
    grad_z += batch * length * width
    grad_weight = tl.zeros([sizes.block_d], tl.float32)
    grad_bias = tl.zeros([sizes.block_d], tl.float32)
    grad_D = tl.zeros([sizes.block_d], tl.float32)
    for start in range(0, steps, sizes.block_l):
        position = tl.cast(first + start + tl.arange(0, sizes.block_l), tl.int64)
        exists = position < length
        mask = exists[:, None] & has_channel[None, :]
        has_entry = exists[:, None] & has_state[None, :]
        given, value, scale = _normalised(
            held,
            C,
            x,
            skip,
            position,
            channel,
            state,
            mask,
            has_entry,
            C_strides[1],
            x_strides[1],
            width,
            EPS,
            PRECISION,
        )
        grad = load_rows(grad_out, position, width, channel, mask)  # [block_l, block_d]
        place = position[:, None] * width + channel[None, :]
        gate = load_rows(z, position, z_strides[1], channel, mask)  # [block_l, block_d]
        tl.store(grad_z + place, (grad * (value * gain + shift)).to(grad_z.dtype.element_ty), mask=mask)
        grad *= gate
        grad_weight += tl.sum(grad * value, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        grad *= gain
        along = (tl.sum(grad * value, axis=1) / width)[:, None]
        grad = scale * (grad - (tl.sum(grad, axis=1) / width)[:, None] - value * along)
        grad = tl.where(mask, grad, 0.0)
        grad_D += tl.sum(grad * given, axis=0)
        rounded = grad.to(grad_y.dtype.element_ty)
        tl.store(grad_y + place, rounded, mask=mask)
        grad_read = tl.dot(rounded, tl.trans(held.to(rounded.dtype)), input_precision=PRECISION)  # [block_l, block_n]
        place = position[:, None] * grad_C_strides[1] + state[None, :]
        tl.store(grad_C + place, grad_read.to(grad_C.dtype.element_ty), mask=has_entry)
    sums += program * 3 * width + channel
    tl.store(sums, grad_weight, mask=has_channel)
    tl.store(sums + width, grad_bias, mask=has_channel)
    tl.store(sums + 2 * width, grad_D, mask=has_channel)


@triton.jit(do_not_specialize_on_alignment=['length', 'steps'])
def input_backward_kernel(
    grad_states,  # [B, N, H * P]
    B,  # [B, L, N], by its strides
    x,  # [B, L, H * P], by its strides
    dt,  # [B, L, H], by its strides
    A,  # [H]
    D,  # [H]
    dt_bias,  # [H]
    grad_y,  # [B, L, H * P]
    grad_B,  # [B, L, N], by its strides: written
    grad_x,  # [B, L, H * P], by its strides: written
    grad_dt,  # [B, L, H]: written
    sums,  # [programs, 2, H]: written, parts of the gradients of A and dt_bias
    length,
    steps,
    parts,
    B_strides,
    x_strides,
    dt_strides,
    grad_strides,
    sizes,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program walks so many steps of an entry of the batch, block_l at a time.

    With G the gradient of the states S, m = -A * softplus(dt) and w = G B_l:

        grad_x = m * w + D * grad_y,    grad_m = sum_p w_p * x_p,    grad_B = sum over channels of m * x * G
    """
    program = tl.program_id(0).to(tl.int64)
    batch, first = program // parts, (tl.program_id(0) % parts) * steps
    width = sizes.heads * sizes.dim
    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H * sizes.block_d)
    of_head, within = column // sizes.block_d, column % sizes.block_d
    channel, state = of_head * sizes.dim + within, tl.arange(0, sizes.block_n)
    has_head, has_state = head < sizes.heads, state < sizes.dstate
    has_channel = (of_head < sizes.heads) & (within < sizes.dim)
    places = grad_states + batch * (sizes.dstate * width) + state[:, None] * width + channel[None, :]
    held = tl.load(places, mask=has_state[:, None] & has_channel[None, :], other=0.0)  # [block_n, BLOCK_H * block_d]
    skip = tl.load(D + of_head, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_H * block_d]
    scale = -tl.load(A + head, mask=has_head, other=0.0).to(tl.float32)[None, :]  # [BLOCK_H]
    bias = tl.load(dt_bias + head, mask=has_head, other=0.0).to(tl.float32)[None, :]  # [BLOCK_H]
    B += batch * B_strides[0]
    x += batch * x_strides[0]
    dt += batch * dt_strides[0]
    grad_B += batch * grad_strides[0]
    grad_x += batch * grad_strides[0]
    grad_y += batch * length * width
    grad_dt += batch * length * sizes.heads
    grad_scale = tl.zeros([BLOCK_H], tl.float32)
    grad_bias = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, steps, sizes.block_l):
        position = tl.cast(first + start + tl.arange(0, sizes.block_l), tl.int64)
        exists = position < length
        mask = exists[:, None] & has_channel[None, :]
        has_entry = exists[:, None] & has_state[None, :]
        has_step = exists[:, None] & has_head[None, :]
        raw = tl.load(dt + position[:, None] * dt_strides[1] + head[None, :] * dt_strides[2], mask=has_step, other=0.0)
        raw = raw.to(tl.float32) + bias  # [block_l, BLOCK_H]
        size = softplus_log2(raw * LOG2_E, True, NVIDIA) * LN2
        weight = (scale * size)[:, :, None]
        written = tl.load(B + position[:, None] * B_strides[1] + state[None, :], mask=has_entry, other=0.0)
        given = load_rows(x, position, x_strides[1], channel, mask)  # [block_l, BLOCK_H * block_d]
        grad = tl.dot(written, held.to(written.dtype), input_precision=PRECISION)  # [block_l, BLOCK_H * block_d]
        weighted = tl.reshape(weight * tl.reshape(given, sizes.block_l, BLOCK_H, sizes.block_d), grad.shape)
        grad_size = tl.sum(
            tl.reshape(grad * given, sizes.block_l, BLOCK_H, sizes.block_d), axis=2
        )  # [block_l, BLOCK_H]
        grad = tl.reshape(weight * tl.reshape(grad, sizes.block_l, BLOCK_H, sizes.block_d), grad.shape)
        grad += skip * load_rows(grad_y, position, width, channel, mask)  # [block_l, BLOCK_H * block_d]
        place = position[:, None] * grad_strides[1]
        tl.store(grad_x + place + channel[None, :], grad.to(grad_x.dtype.element_ty), mask=mask)
        grad = tl.dot(weighted.to(written.dtype), tl.trans(held.to(written.dtype)), input_precision=PRECISION)
        tl.store(grad_B + place + state[None, :], grad.to(grad_B.dtype.element_ty), mask=has_entry)
        grad_scale += tl.sum(grad_size * size, axis=0)
        grad_raw = grad_size * scale * fast_sigmoid(raw, NVIDIA)  # [block_l, BLOCK_H]
        grad_bias += tl.sum(grad_raw, axis=0)
        place = position[:, None] * sizes.heads + head[None, :]
        tl.store(grad_dt + place, grad_raw.to(grad_dt.dtype.element_ty), mask=has_step)
    sums += program * 2 * sizes.heads + head
    tl.store(sums, -grad_scale, mask=has_head)
    tl.store(sums + sizes.heads, grad_bias, mask=has_head)


def fits(z: Tensor, heads: int, dstate: int) -> bool:
    """Whether the kernels take so many heads and states of as many channels as z [B, L, H * P] has."""
    channels = z.shape[-1]
    dim = channels // heads
    columns = max(product_block(channels), next_power_of_2(heads) * product_block(dim))
    # The states as both factors of products, which split them in fp32; and tiles of the map.
    copies = 3 if z.element_size() == 2 else 6
    needed = copies * product_block(dstate) * columns * z.element_size() + 2**15
    return dim <= MAX_HEAD and channels <= MAX_CHANNELS and dstate <= MAX_STATES and needed <= shared_memory(z)


def gated_non_causal_ssd(
    xBC: Tensor,
    dt: Tensor,
    z: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(y) * z with y of `non_causal_ssd`, on Triton where it `fits`; differentiable once, in reverse mode.

    With m = softplus(dt + dt_bias) * -A, for every head:

        S = sum_l m_l x_l B_l^T,    y_l = S C_l + D * x_l,    out = (weight * normal(y) + bias) * z

    Sums, the norm and the gate are in fp32; m * x and S are rounded to x's dtype for the products.

    Args:
        xBC: x, B and C side by side, [B, L, H * P + 2 * N].
        dt: [B, L, H].
        z: [B, L, H * P] in xBC's dtype.
        A, D, dt_bias: [H], like weight and bias in any floating dtype.
        weight, bias: [H * P], of the LayerNorm.
        eps: Added to the variance.

    Returns:
        [B, L, H * P] in xBC's dtype, contiguous.
    """
    return _operator(xBC, dt, z, A, D, dt_bias, weight, bias, eps)


class _Parts(NamedTuple):
    """Sizes, and views of x [B, L, H * P], B and C [B, L, N] in a tensor that holds them side by side."""

    heads: int
    dim: int
    dstate: int
    x: Tensor
    B: Tensor
    C: Tensor


def _split(xBC: Tensor, channels: int, heads: int) -> _Parts:
    dstate = (xBC.shape[-1] - channels) // 2
    return _Parts(heads, channels // heads, dstate, *xBC.split([channels, dstate, dstate], dim=-1))


def _with_rows(x: Tensor) -> Tensor:
    """x with neighbouring channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    xBC: Tensor,
    dt: Tensor,
    z: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    save: bool,
) -> Tuple[Tensor, Tensor]:
    xBC, z = _with_rows(xBC), _with_rows(z)
    *sizes, x, B, C = _split(xBC, z.shape[-1], dt.shape[-1])
    batch, length, channels = x.shape
    precision, nvidia = dot_precision(x), is_nvidia(x)
    strides = x.stride(), dt.stride(), B.stride()
    launch, parts = _state_launch(batch, length, *sizes, strides, precision, nvidia, num_processors(x))
    dtype = torch.float32 if parts > 1 else x.dtype
    states = x.new_empty((parts, batch, sizes[2], channels), dtype=dtype)
    launch(x, dt, B, A.contiguous(), dt_bias.contiguous(), states)
    states = states.sum(dim=0).to(x.dtype) if parts > 1 else states[0]
    out = x.new_empty(x.shape)
    strides = C.stride(), x.stride(), z.stride()
    launch = _output_launch(batch, length, *sizes, strides, eps, precision)
    launch(states, C, x, z, D.contiguous(), weight.contiguous(), bias.contiguous(), out)
    return out, states


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out,), (xBC, dt, z, A, D, dt_bias, weight, bias, eps), (states,) = grads, inputs, saved
    xBC, z, grad_out = _with_rows(xBC), _with_rows(z), grad_out.contiguous()
    *sizes, x, B, C = _split(xBC, z.shape[-1], dt.shape[-1])
    heads, dim, dstate = sizes
    batch, length, channels = x.shape
    precision, nvidia = dot_precision(x), is_nvidia(x)
    grad_xBC, grad_z, grad_y = xBC.new_empty(xBC.shape), z.new_empty(z.shape), z.new_empty(z.shape)
    *_, grad_x, grad_B, grad_C = _split(grad_xBC, channels, heads)
    D = D.contiguous()
    strides = C.stride(), x.stride(), z.stride(), grad_C.stride()
    launch = _output_backward_launch(batch, length, *sizes, strides, eps, precision, num_processors(x))
    sums = x.new_empty((launch.grid[0], 3, channels), dtype=torch.float32)
    launch(states, C, x, z, D, weight.contiguous(), bias.contiguous(), grad_out, grad_y, grad_C, grad_z, sums)
    grad_weight, grad_bias, grad_D = sums.sum(dim=0)
    grad_states = torch.bmm(C.transpose(1, 2), grad_y)  # [B, N, L] x [B, L, H * P]
    grad_dt = dt.new_empty(dt.shape)
    strides = B.stride(), x.stride(), dt.stride(), grad_x.stride()
    launch = _input_backward_launch(batch, length, *sizes, strides, precision, nvidia, num_processors(x))
    sums = x.new_empty((launch.grid[0], 2, heads), dtype=torch.float32)
    parameters = A.contiguous(), D, dt_bias.contiguous()
    launch(grad_states, B, x, dt, *parameters, grad_y, grad_B, grad_x, grad_dt, sums)
    grad_A, grad_dt_bias = sums.sum(dim=0)
    grad_D = grad_D.view(heads, dim).sum(dim=1)
    return grad_xBC, grad_dt, grad_z, grad_A, grad_D, grad_dt_bias, grad_weight, grad_bias


def _like(xBC: Tensor, dt: Tensor, z: Tensor, *others: Any) -> Tuple[Tensor, Tensor]:
    dstate = (xBC.shape[-1] - z.shape[-1]) // 2
    return z.new_empty(z.shape), z.new_empty((z.shape[0], dstate, z.shape[-1]))


def _macs(xBC: Sequence[int], dt: Sequence[int], z: Sequence[int], *others: Any) -> int:
    batch, length, channels = z
    return batch * length * channels * (xBC[-1] - channels)  # two products with N = half of the rest


_operator = Operator('gated_non_causal_ssd', _forward, _backward, _like, macs=_macs)

Strides = Tuple[Tuple[int, ...], ...]


@lru_cache(maxsize=MAX_PLANS)
def _state_launch(
    batch: int,
    length: int,
    heads: int,
    dim: int,
    dstate: int,
    strides: Strides,
    precision: str,
    nvidia: bool,
    processors: int,
) -> Tuple[Launch, int]:
    """The launch, and into how many parts it cuts a sequence."""
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, batch * heads)
    parts, steps = share_rows(length, _BLOCK_L, min(wanted, length // _MIN_STEPS))
    constants = Sizes(heads, dim, dstate, product_block(dim), product_block(dstate), _BLOCK_L), precision, nvidia
    numbers = batch, length, steps, *strides
    return Launch(global_state_kernel, (batch * heads, parts), numbers, constants, warps=4, stages=3), parts


@lru_cache(maxsize=MAX_PLANS)
def _output_launch(
    batch: int, length: int, heads: int, dim: int, dstate: int, strides: Strides, eps: float, precision: str
) -> Launch:
    block_d, block_n, block_l = _output_block(heads * dim, dstate)
    blocks = cdiv(length, block_l)
    constants = Sizes(heads, dim, dstate, block_d, block_n, block_l), eps, precision
    return Launch(gated_output_kernel, batch * blocks, (length, blocks, *strides), constants, warps=8)


@lru_cache(maxsize=MAX_PLANS)
def _output_backward_launch(
    batch: int,
    length: int,
    heads: int,
    dim: int,
    dstate: int,
    strides: Strides,
    eps: float,
    precision: str,
    processors: int,
) -> Launch:
    block_d, block_n = product_block(heads * dim), product_block(dstate)
    block_l = max(_BACKWARD_ELEMENTS // block_d, 16)
    parts, steps = share_rows(length, block_l, cdiv(_BACKWARD_PROGRAMS * processors, batch))
    constants = Sizes(heads, dim, dstate, block_d, block_n, block_l), eps, precision
    warps = 4 if block_l * block_d <= _BACKWARD_ELEMENTS else 8
    return Launch(output_backward_kernel, batch * parts, (length, steps, parts, *strides), constants, warps, stages=1)


@lru_cache(maxsize=MAX_PLANS)
def _input_backward_launch(
    batch: int,
    length: int,
    heads: int,
    dim: int,
    dstate: int,
    strides: Strides,
    precision: str,
    nvidia: bool,
    processors: int,
) -> Launch:
    block_h, block_d, block_n = next_power_of_2(heads), product_block(dim), product_block(dstate)
    block_l = max(_BACKWARD_ELEMENTS // (block_h * block_d), 16)
    parts, steps = share_rows(length, block_l, cdiv(_BACKWARD_PROGRAMS * processors, batch))
    constants = Sizes(heads, dim, dstate, block_d, block_n, block_l), block_h, precision, nvidia
    warps = 4 if block_l * block_h * block_d <= _BACKWARD_ELEMENTS else 8
    return Launch(input_backward_kernel, batch * parts, (length, steps, parts, *strides), constants, warps, stages=1)


def _output_block(channels: int, dstate: int) -> Tuple[int, int, int]:
    """Channels, states and positions of a program of the second pass."""
    block_d = product_block(channels)
    return block_d, product_block(dstate), max(min(_TILE_ELEMENTS // block_d, _BLOCK_L), 16)
