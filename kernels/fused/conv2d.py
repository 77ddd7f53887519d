"""Depthwise 2-D convolution of channels-last maps with a small odd kernel, zero padding, bias and SiLU.

Both kernels are bound by memory. A program walks down a strip, ROWS rows of PB pixels of DB channels: of each row of
the map it loads KERNEL tiles, a pixel apart, and keeps those of the last KERNEL rows. So a thread loads an element
KERNEL times instead of KERNEL^2, all but the first from a cache. Rows are loaded AHEAD rows before they are needed,
since a load cannot pass the stores before it. The walk is written out: where tiles are constants of the program, the
compiler converts each of them once and leaves them where they are when the window moves on.

The backward pass takes two kernels. The gradient of x at a pixel needs the gradient before the activation at all its
neighbours, and to make that again at each of them would take KERNEL^4 multiply-adds. So the first kernel writes it
once, and sums the gradients of weight and bias while it holds the tiles of x; the second is the forward kernel with the
taps in reverse order.
"""

import triton
import triton.language as tl

from .elementwise import short_sigmoid


@triton.jit
def _in_row(mask, row, height):
    """The mask if the map has that row, otherwise an empty one. (Triton's interpreter takes no number in `&`.)"""
    return tl.where((row >= 0) & (row < height), mask, False)


@triton.jit
def _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL: tl.constexpr):
    """The KERNEL tiles [PB, DB] that the taps of a row meet, in x's dtype; zero outside of the map."""
    tiles = ()
    columns += row * x_row
    for tap in tl.static_range(KERNEL):
        shift = tap - KERNEL // 2
        has_pixel = (pixel + shift >= 0) & (pixel + shift < width)
        mask = _in_row(has_pixel[:, None] & has_channel[None, :], row, height)
        tiles += (tl.load(columns + shift * x_pixel, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _parameters(
    taps_ptr,
    bias_ptr,
    channel,
    has_channel,
    dim,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLIP: tl.constexpr,
):
    """The taps row by row, with FLIP in reverse order, and the bias, [1, DB] each."""
    taps = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        place = KERNEL * KERNEL - 1 - tap if FLIP else tap
        taps += (tl.load(taps_ptr + place * dim + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :],)
    bias = tl.zeros_like(taps[0])
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    return taps, bias


@triton.jit
def _convolve(window, taps, bias, KERNEL: tl.constexpr):
    """The convolution before its activation, from the tiles that the taps meet."""
    pre = bias
    for tap in tl.static_range(KERNEL * KERNEL):
        pre += taps[tap] * window[tap].to(tl.float32)
    return pre


@triton.jit(do_not_specialize_on_alignment=['height', 'width'])  # maps of any size run on the same compiled kernel
def depthwise_conv2d(
    x_ptr,
    taps_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    dim,
    x_batch,
    x_row,
    x_pixel,
    x_channel,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    PB: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program makes a strip of one entry of the batch.

    x [B, height, width, dim] lies by its strides; out is contiguous, as are taps [KERNEL^2, dim] and bias [dim].
    """
    pid = tl.program_id(0)
    channel_blocks, pixel_blocks, strips = tl.cdiv(dim, DB), tl.cdiv(width, PB), tl.cdiv(height, ROWS)
    channel = pid % channel_blocks * DB + tl.arange(0, DB)
    pixel = pid // channel_blocks % pixel_blocks * PB + tl.arange(0, PB)
    top = pid // channel_blocks // pixel_blocks % strips * ROWS
    batch = (pid // channel_blocks // pixel_blocks // strips).to(tl.int64)
    if WIDE:
        channel, pixel, top = channel.to(tl.int64), pixel.to(tl.int64), top.to(tl.int64)
    has_channel = channel < dim
    taps, bias = _parameters(taps_ptr, bias_ptr, channel, has_channel, dim, KERNEL, HAS_BIAS, FLIP)
    columns = x_ptr + batch * x_batch + (pixel[:, None] * x_pixel + channel[None, :] * x_channel)
    out = out_ptr + batch * height * width * dim + (pixel[:, None] * dim + channel[None, :])
    has_pixel = (pixel < width)[:, None] & has_channel[None, :]

    window = ()
    for step in tl.static_range(KERNEL - 1 + AHEAD):
        row = top - KERNEL // 2 + step
        window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
    for step in tl.static_range(ROWS):
        if step + AHEAD < ROWS:
            row = top + KERNEL // 2 + step + AHEAD
            window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
        pre = _convolve(window, taps, bias, KERNEL)
        if SILU:
            pre *= short_sigmoid(pre, NVIDIA)
        row = top + step
        tl.store(out + row * (width * dim), pre.to(out_ptr.dtype.element_ty), mask=_in_row(has_pixel, row, height))
        window = window[KERNEL:]


@triton.jit
def _add_products(sums, grad, window, KERNEL: tl.constexpr):
    """The sums for every tap and for the bias, with what a tile of the gradient and those that the taps meet add."""
    added = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        added += (sums[tap] + grad * window[tap].to(tl.float32),)
    return added + (sums[KERNEL * KERNEL] + grad,)


@triton.jit(do_not_specialize_on_alignment=['batch_size', 'height', 'width', 'strips_of_program'])
def depthwise_conv2d_backward(
    grad_ptr,
    x_ptr,
    taps_ptr,
    bias_ptr,
    grad_pre_ptr,
    sums_ptr,
    batch_size,
    height,
    width,
    dim,
    strips_of_program,
    grad_batch,
    grad_row,
    grad_pixel,
    grad_channel,
    x_batch,
    x_row,
    x_pixel,
    x_channel,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    PB: tl.constexpr,
    DB: tl.constexpr,
    WIDE: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program walks strips_of_program strips of DB channels, which are counted down the columns of the maps.

    With SILU it writes the gradient before the activation, contiguous; without, that is grad itself. Into sums
    [parts, KERNEL^2 + 1, dim] go its parts of the gradients of weight and bias.
    """
    pid = tl.program_id(0)
    channel_blocks, pixel_blocks, strips = tl.cdiv(dim, DB), tl.cdiv(width, PB), tl.cdiv(height, ROWS)
    channel = pid % channel_blocks * DB + tl.arange(0, DB)
    part = pid // channel_blocks
    if WIDE:
        channel = channel.to(tl.int64)
    has_channel = channel < dim
    taps, bias = _parameters(taps_ptr, bias_ptr, channel, has_channel, dim, KERNEL, HAS_BIAS, False)
    sums = ()
    for _ in tl.static_range(KERNEL * KERNEL + 1):
        sums += (tl.zeros([PB, DB], tl.float32),)

    first = part * strips_of_program
    for strip in range(first, min(first + strips_of_program, batch_size * pixel_blocks * strips)):
        top = strip % strips * ROWS
        pixel = strip // strips % pixel_blocks * PB + tl.arange(0, PB)
        batch = (strip // strips // pixel_blocks).to(tl.int64)
        if WIDE:
            pixel, top = pixel.to(tl.int64), top.to(tl.int64)
        columns = x_ptr + batch * x_batch + (pixel[:, None] * x_pixel + channel[None, :] * x_channel)
        grads = grad_ptr + batch * grad_batch + (pixel[:, None] * grad_pixel + channel[None, :] * grad_channel)
        grad_pre = grad_pre_ptr + batch * height * width * dim + (pixel[:, None] * dim + channel[None, :])
        has_pixel = (pixel < width)[:, None] & has_channel[None, :]
        window, grad_window = (), ()
        for step in tl.static_range(KERNEL - 1 + AHEAD):
            row = top - KERNEL // 2 + step
            window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
        for step in tl.static_range(AHEAD):
            row = top + step
            grad_window += (tl.load(grads + row * grad_row, mask=_in_row(has_pixel, row, height), other=0.0),)
        for step in tl.static_range(ROWS):
            if step + AHEAD < ROWS:
                row = top + step + AHEAD
                grad_window += (tl.load(grads + row * grad_row, mask=_in_row(has_pixel, row, height), other=0.0),)
                row += KERNEL // 2
                window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
            grad = grad_window[0].to(tl.float32)
            if SILU:
                pre = _convolve(window, taps, bias, KERNEL)
                gate = short_sigmoid(pre, NVIDIA)
                grad *= gate * (1.0 + pre * (1.0 - gate))
                row, stored = top + step, grad.to(grad_pre_ptr.dtype.element_ty)
                tl.store(grad_pre + row * (width * dim), stored, mask=_in_row(has_pixel, row, height))
            sums = _add_products(sums, grad, window, KERNEL)
            window, grad_window = window[KERNEL:], grad_window[1:]

    totals = sums_ptr + part.to(tl.int64) * (KERNEL * KERNEL + 1) * dim + channel
    for tap in tl.static_range(KERNEL * KERNEL + 1):
        tl.store(totals + tap * dim, tl.sum(sums[tap], axis=0), mask=has_channel)
