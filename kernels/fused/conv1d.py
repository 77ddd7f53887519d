"""Causal depthwise convolutions of a sequence with at most four taps, along it and against it, with bias and SiLU.

Taps are counted back from the present position: tap s of direction 0 meets x_{l-s}, tap s of direction 1 x_{l+s}; both
are weight[k, :, TAPS - 1 - s]. LOOK is the sign of that offset, -1 or 1. A program loads the tiles of neighbouring
positions one by one: all but the first find their memory in the cache. The loops over taps are written out, for
Triton keeps no list of tiles.
"""

import triton
import triton.language as tl

from .elementwise import sigmoid


@triton.jit
def _load(columns, stride, step, has_channel, seqlen):
    """The rows `step` of columns that begin at the pointers [1, DB], in fp32; zero outside of the sequence."""
    mask = ((step >= 0) & (step < seqlen))[:, None] & has_channel[None, :]
    return tl.load(columns + step[:, None] * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _parameters(
    weight_ptr,
    bias_ptr,
    direction,
    channel,
    has_channel,
    dim,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DB: tl.constexpr,
):
    """Four taps and the bias of a direction, [1, DB] each; those that there are not are zero.

    The taps of a channel are neighbours in memory: they are loaded together and then taken apart.
    """
    row = direction * dim + channel
    place = tl.arange(0, 4) - (4 - TAPS)
    mask = has_channel[:, None] & (place >= 0)[None, :]
    weight = tl.load(weight_ptr + row[:, None] * TAPS + place[None, :], mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(weight, [DB, 2, 2]))
    tap_3, tap_1 = tl.split(even)
    tap_2, tap_0 = tl.split(odd)
    bias = tl.zeros([DB], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row, mask=has_channel, other=0.0).to(tl.float32)
    return tap_0[None, :], tap_1[None, :], tap_2[None, :], tap_3[None, :], bias[None, :]


@triton.jit
def _combine(x_0, x_1, x_2, x_3, tap_0, tap_1, tap_2, tap_3, bias, TAPS: tl.constexpr):
    """The convolution before its activation, from the tiles that its taps meet."""
    u = bias + tap_0 * x_0
    if TAPS > 1:
        u += tap_1 * x_1
    if TAPS > 2:
        u += tap_2 * x_2
    if TAPS > 3:
        u += tap_3 * x_3
    return u


@triton.jit
def _neighbours(x, columns, stride, step, has_channel, seqlen, LOOK: tl.constexpr, TAPS: tl.constexpr):
    """The tiles one, two and three steps from x, as far as there are taps to meet them."""
    x_1, x_2, x_3 = x, x, x
    if TAPS > 1:
        x_1 = _load(columns, stride, step + LOOK, has_channel, seqlen)
    if TAPS > 2:
        x_2 = _load(columns, stride, step + 2 * LOOK, has_channel, seqlen)
    if TAPS > 3:
        x_3 = _load(columns, stride, step + 3 * LOOK, has_channel, seqlen)
    return x_1, x_2, x_3


@triton.jit
def conv1d(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    seqlen,
    dim,
    x_batch,
    x_step,
    x_channel,
    out_batch,
    out_step,
    out_direction,
    out_channel,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    T: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program makes T steps of DB channels in all directions, for one entry of the batch.

    x [B, L, dim] and out [B, L, DIRECTIONS, dim] lie by their strides; weight [DIRECTIONS, dim, TAPS] and bias
    [DIRECTIONS, dim] are contiguous.
    """
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, DB)
    step_blocks = tl.cdiv(seqlen, T)
    channel = pid % channel_blocks * DB + tl.arange(0, DB)
    step = pid // channel_blocks % step_blocks * T + tl.arange(0, T)
    batch = (pid // channel_blocks // step_blocks).to(tl.int64)
    if WIDE:
        channel = channel.to(tl.int64)
        step = step.to(tl.int64)
    has_channel = channel < dim
    mask = (step < seqlen)[:, None] & has_channel[None, :]
    columns = x_ptr + batch * x_batch + (channel * x_channel)[None, :]
    out = out_ptr + batch * out_batch + step[:, None] * out_step + (channel * out_channel)[None, :]
    x = _load(columns, x_step, step, has_channel, seqlen)
    for direction in tl.static_range(DIRECTIONS):
        tap_0, tap_1, tap_2, tap_3, bias = _parameters(
            weight_ptr, bias_ptr, direction, channel, has_channel, dim, TAPS, HAS_BIAS, DB
        )
        x_1, x_2, x_3 = _neighbours(x, columns, x_step, step, has_channel, seqlen, 2 * direction - 1, TAPS)
        u = _combine(x, x_1, x_2, x_3, tap_0, tap_1, tap_2, tap_3, bias, TAPS)
        if SILU:
            u *= sigmoid(u)
        tl.store(out + direction * out_direction, u.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(columns, stride, step, has_channel, seqlen, u, SILU: tl.constexpr):
    """Gradient of the convolution before its activation, u, at the positions `step`; zero outside of the sequence."""
    grad = _load(columns, stride, step, has_channel, seqlen)
    if SILU:
        gate = sigmoid(u)
        grad *= gate * (1.0 + u * (1.0 - gate))
    return grad


@triton.jit
def _add_direction(
    grad_x,
    sum_0,
    sum_1,
    sum_2,
    sum_3,
    sum_bias,
    x,
    x_1,
    x_2,
    x_3,
    ahead_1,
    ahead_2,
    ahead_3,
    tap_0,
    tap_1,
    tap_2,
    tap_3,
    bias,
    columns,
    stride,
    step,
    has_channel,
    seqlen,
    LOOK: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Adds a direction's part of the gradient of x at `step`, and that tile's to the sums for taps and bias.

    Tap s takes x_m to the output at m - LOOK * s, so that its part of the gradient of x is the gradient there times the
    tap, and its own gradient the sum over m of the gradient there times x_m. The tiles x_1, x_2, x_3 are those that the
    taps meet from `step`, and ahead_1, ahead_2, ahead_3 their counterparts on the other side.
    """
    u = _combine(x, x_1, x_2, x_3, tap_0, tap_1, tap_2, tap_3, bias, TAPS)
    grad = _gradient(columns, stride, step, has_channel, seqlen, u, SILU)
    grad_x += tap_0 * grad
    sum_0 += grad * x
    sum_bias += grad
    if TAPS > 1:
        u = _combine(ahead_1, x, x_1, x_2, tap_0, tap_1, tap_2, tap_3, bias, TAPS)
        grad = _gradient(columns, stride, step - LOOK, has_channel, seqlen, u, SILU)
        grad_x += tap_1 * grad
        sum_1 += grad * x
    if TAPS > 2:
        u = _combine(ahead_2, ahead_1, x, x_1, tap_0, tap_1, tap_2, tap_3, bias, TAPS)
        grad = _gradient(columns, stride, step - 2 * LOOK, has_channel, seqlen, u, SILU)
        grad_x += tap_2 * grad
        sum_2 += grad * x
    if TAPS > 3:
        u = _combine(ahead_3, ahead_2, ahead_1, x, tap_0, tap_1, tap_2, tap_3, bias, TAPS)
        grad = _gradient(columns, stride, step - 3 * LOOK, has_channel, seqlen, u, SILU)
        grad_x += tap_3 * grad
        sum_3 += grad * x
    return grad_x, sum_0, sum_1, sum_2, sum_3, sum_bias


@triton.jit
def _store_sums(sums, dim, has_channel, sum_0, sum_1, sum_2, sum_3, sum_bias, TAPS: tl.constexpr):
    """Sums over the steps at the pointers [DB]: the taps in the weight's order, then the bias."""
    last = sums + (TAPS - 1) * dim
    tl.store(last, tl.sum(sum_0, axis=0), mask=has_channel)
    if TAPS > 1:
        tl.store(last - dim, tl.sum(sum_1, axis=0), mask=has_channel)
    if TAPS > 2:
        tl.store(last - 2 * dim, tl.sum(sum_2, axis=0), mask=has_channel)
    if TAPS > 3:
        tl.store(last - 3 * dim, tl.sum(sum_3, axis=0), mask=has_channel)
    tl.store(last + dim, tl.sum(sum_bias, axis=0), mask=has_channel)


@triton.jit
def conv1d_backward(
    grad_u_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    grad_x_ptr,
    sums_ptr,
    seqlen,
    dim,
    regions,
    tiles,
    grad_batch,
    grad_step,
    grad_direction,
    grad_channel,
    x_batch,
    x_step,
    x_channel,
    grad_x_batch,
    grad_x_step,
    grad_x_channel,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    T: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program walks `tiles` tiles of T steps of DB channels, for one entry of the batch.

    It writes the gradient of x there, the sum over the directions, and into sums
    [B * regions, DIRECTIONS, TAPS + 1, dim] its parts of the gradients of weight and bias.
    """
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, DB)
    channel = pid % channel_blocks * DB + tl.arange(0, DB)
    row = (pid // channel_blocks).to(tl.int64)
    batch = row // regions
    first = pid // channel_blocks % regions * tiles * T
    if WIDE:
        channel = channel.to(tl.int64)
        first = first.to(tl.int64)
    has_channel = channel < dim
    columns = x_ptr + batch * x_batch + (channel * x_channel)[None, :]
    grad_0 = grad_u_ptr + batch * grad_batch + (channel * grad_channel)[None, :]
    grad_1 = grad_0 + grad_direction
    grad_x_columns = grad_x_ptr + batch * grad_x_batch + (channel * grad_x_channel)[None, :]
    sums = sums_ptr + row * (DIRECTIONS * (TAPS + 1)) * dim + channel

    a_0, a_1, a_2, a_3, a_bias = _parameters(weight_ptr, bias_ptr, 0, channel, has_channel, dim, TAPS, HAS_BIAS, DB)
    if DIRECTIONS > 1:
        b_0, b_1, b_2, b_3, b_bias = _parameters(weight_ptr, bias_ptr, 1, channel, has_channel, dim, TAPS, HAS_BIAS, DB)
    zero = tl.zeros([T, DB], tl.float32)
    sum_a_0, sum_a_1, sum_a_2, sum_a_3, sum_a_bias = zero, zero, zero, zero, zero
    sum_b_0, sum_b_1, sum_b_2, sum_b_3, sum_b_bias = zero, zero, zero, zero, zero
    for tile in range(0, tiles):
        step = first + tile * T + tl.arange(0, T)
        x = _load(columns, x_step, step, has_channel, seqlen)
        past_1, past_2, past_3 = x, x, x
        next_1, next_2, next_3 = x, x, x
        if SILU:
            past_1, past_2, past_3 = _neighbours(x, columns, x_step, step, has_channel, seqlen, -1, TAPS)
            next_1, next_2, next_3 = _neighbours(x, columns, x_step, step, has_channel, seqlen, 1, TAPS)
        grad_x, sum_a_0, sum_a_1, sum_a_2, sum_a_3, sum_a_bias = _add_direction(
            tl.zeros([T, DB], tl.float32),
            sum_a_0,
            sum_a_1,
            sum_a_2,
            sum_a_3,
            sum_a_bias,
            x,
            past_1,
            past_2,
            past_3,
            next_1,
            next_2,
            next_3,
            a_0,
            a_1,
            a_2,
            a_3,
            a_bias,
            grad_0,
            grad_step,
            step,
            has_channel,
            seqlen,
            -1,
            TAPS,
            SILU,
        )
        if DIRECTIONS > 1:
            grad_x, sum_b_0, sum_b_1, sum_b_2, sum_b_3, sum_b_bias = _add_direction(
                grad_x,
                sum_b_0,
                sum_b_1,
                sum_b_2,
                sum_b_3,
                sum_b_bias,
                x,
                next_1,
                next_2,
                next_3,
                past_1,
                past_2,
                past_3,
                b_0,
                b_1,
                b_2,
                b_3,
                b_bias,
                grad_1,
                grad_step,
                step,
                has_channel,
                seqlen,
                1,
                TAPS,
                SILU,
            )
        mask = (step < seqlen)[:, None] & has_channel[None, :]
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_columns + step[:, None] * grad_x_step, grad_x, mask=mask)
    _store_sums(sums, dim, has_channel, sum_a_0, sum_a_1, sum_a_2, sum_a_3, sum_a_bias, TAPS)
    if DIRECTIONS > 1:
        sums += (TAPS + 1) * dim
        _store_sums(sums, dim, has_channel, sum_b_0, sum_b_1, sum_b_2, sum_b_3, sum_b_bias, TAPS)
