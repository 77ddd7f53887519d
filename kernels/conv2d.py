"""VMamba's depthwise convolution of a channels-last map, with the activation that follows.

The Triton kernels take small odd windows and zero padding. Both are bound by memory. A program walks down a tile, ROWS
rows of BLOCK_W pixels of BLOCK_D channels: of each row of the map it loads KERNEL tiles, a pixel apart, and keeps those
of the last KERNEL rows. So a thread loads an element KERNEL times instead of KERNEL^2, all but the first from a cache.
Rows are loaded AHEAD rows before they are needed, since a load cannot pass the stores before it. The walk is written
out: where tiles are constants of the program, the compiler converts each of them once and leaves them where they are
when the window moves on.

The backward pass takes two kernels. The gradient of x at a pixel needs the gradient before the activation at all its
neighbours, and to recompute that at each of them would take KERNEL^4 multiply-adds. So the first kernel writes it once,
and sums the gradients of weight and bias while it holds the tiles of x; the second is the forward kernel with the taps
in reverse order.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._device import fast_sigmoid
from ._launch import MAX_PLANS, Launch, cdiv, is_nvidia, num_processors, runs_on_triton, tl, triton
from ._operator import Operator

MAX_WINDOW = 5  # of the Triton kernels
_BLOCK_D = 32
# Programs of the backward pass for each multiprocessor: a few at a time, and several rounds of them.
_PROGRAMS_PER_PROCESSOR = 16
# More registers than these would leave too few warps to wait for memory; they are enough for nine taps and their sums.
_BACKWARD_REGISTERS = 128


class _Tile(NamedTuple):
    """What a program holds: rows that it walks down, of which it loads some ahead, and pixels of each."""

    rows: int
    ahead: int
    block_w: int


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, silu: bool = False, residual: bool = False
) -> Tensor:
    """Depthwise 2-D convolution of a channels-last map, which keeps its size.

    With an odd window of k x k taps, c = (k - 1) / 2, and x zero outside of the map:

        out_{h,w} = bias + sum_{i,j} weight[:, i, j] * x_{h + i - c, w + j - c}

    Computed by Triton in fp32 for k up to 5; otherwise by PyTorch's convolution in x's dtype, which rounds the weight,
    and the result before SiLU. Differentiable in reverse mode in every tensor.

    Args:
        x: [B, H, W, D], in any floating dtype and with any strides; fastest if channels are contiguous in memory.
        weight: [D, k, k].
        bias: [D].
        silu: Return silu(out).
        residual: Return x + out; not together with silu. In fp32, as on Triton, the tap in the middle is 1 larger.

    Returns:
        out [B, H, W, D] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    sizes = check('depthwise_conv2d', x=(x, 'B H W D'), weight=(weight, 'D k k'), bias=(bias, 'D'))
    kernel = sizes['k']
    check_that(kernel % 2 == 1, f'depthwise_conv2d: weight must be [D, k, k] with odd k, got {tuple(weight.shape)}')
    check_that(not (silu and residual), 'depthwise_conv2d: silu and residual cannot be combined')
    if runs_on_triton(x) and kernel <= MAX_WINDOW:
        return _conv2d(x, weight, bias, silu, residual)
    weight, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # there is no autocast on meta
    in_tap = residual and x.dtype in (torch.float32, torch.float64) and not is_cast
    if in_tap:
        weight = weight + F.pad(weight.new_ones(1, 1, 1, 1), [kernel // 2] * 4)
    view = x.permute(0, 3, 1, 2)  # [B, H, W, D] -> [B, D, H, W]
    out = F.conv2d(view, weight, bias, padding='same', groups=x.shape[-1])
    out = out.permute(0, 2, 3, 1).to(x.dtype).contiguous()  # both copy under autocast and in odd layouts only
    out = F.silu(out, inplace=not torch.is_grad_enabled()) if silu else out
    return out.add_(x) if residual and not in_tap else out


def _forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, residual: bool, save: bool
) -> Tuple[Tensor]:
    return (conv2d_forward(x, weight.contiguous(), None if bias is None else bias.contiguous(), silu, residual),)


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out,), (x, weight, bias, silu, residual) = grads, inputs
    contiguous = weight.contiguous(), None if bias is None else bias.contiguous()
    grad_x, sums = conv2d_backward(grad_out, x, *contiguous, silu, residual)
    grad_weight, grad_bias = sums.sum(dim=0).split([weight.numel(), x.shape[-1]])
    return grad_x, grad_weight.view(weight.shape), None if bias is None else grad_bias


def _like(x: Tensor, *others: Any) -> Tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _macs(x: Sequence[int], weight: Sequence[int], *others: Any) -> int:
    batch, height, width, _ = x
    dim, rows, columns = weight
    return batch * height * width * dim * rows * columns


_conv2d = Operator('depthwise_conv2d', _forward, _backward, _like, macs=_macs)


@triton.jit
def _in_row(mask, row, height):
    """The mask if the map has that row, otherwise an empty one. (Triton's interpreter takes no number in `&`.)"""
    return tl.where((row >= 0) & (row < height), mask, False)


@triton.jit
def _load_row(columns, row_stride, pixel_stride, row, pixel, has_channel, height, width, KERNEL: tl.constexpr):
    """The KERNEL tiles that the taps of a row see, in x's dtype; zero outside of the map."""
    tiles = ()
    columns += row * row_stride
    for tap in tl.static_range(KERNEL):
        shift = tap - KERNEL // 2
        has_pixel = (pixel + shift >= 0) & (pixel + shift < width)
        mask = _in_row(has_pixel[:, None] & has_channel[None, :], row, height)
        tiles += (tl.load(columns + shift * pixel_stride, mask=mask, other=0.0),)  # [BLOCK_W, BLOCK_D]
    return tiles


@triton.jit
def _load_parameters(
    weight, bias, channel, has_channel, KERNEL: tl.constexpr, FLIP: tl.constexpr, RESIDUAL: tl.constexpr
):
    """The taps row by row, with FLIP in reverse order and with RESIDUAL with 1 added to the middle one, and the bias,
    [1, BLOCK_D] each."""
    taps = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        place = KERNEL * KERNEL - 1 - tap if FLIP else tap
        loaded = tl.load(weight + channel * (KERNEL * KERNEL) + place, mask=has_channel, other=0.0)  # [BLOCK_D]
        loaded = loaded.to(tl.float32)
        if RESIDUAL and 2 * tap == KERNEL * KERNEL - 1:
            loaded += 1.0
        taps += (loaded[None, :],)
    shift = tl.zeros_like(taps[0])
    if bias is not None:
        shift = tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    return taps, shift


@triton.jit
def _convolve(window, taps, bias, KERNEL: tl.constexpr):
    """The convolution before its activation, from the tiles that the taps see."""
    pre = bias
    for tap in tl.static_range(KERNEL * KERNEL):
        pre += taps[tap] * window[tap].to(tl.float32)
    return pre


@triton.jit(do_not_specialize_on_alignment=['height', 'width'])  # maps of any size run on the same compiled kernel
def conv2d_kernel(
    x,  # [B, H, W, D], by its strides
    weight,  # [D, KERNEL, KERNEL]
    bias,  # [D], or None
    out,  # [B, H, W, D]
    height,
    width,
    dim,
    x_strides,
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    FLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program computes a tile of one entry of the batch."""
    x_batch, x_row, x_pixel, x_channel = x_strides
    pid = tl.program_id(0)
    channel_blocks, pixel_blocks, row_blocks = tl.cdiv(dim, BLOCK_D), tl.cdiv(width, BLOCK_W), tl.cdiv(height, ROWS)
    channel = pid % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    pixel = pid // channel_blocks % pixel_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    top = pid // channel_blocks // pixel_blocks % row_blocks * ROWS
    batch = (pid // channel_blocks // pixel_blocks // row_blocks).to(tl.int64)
    if WIDE:
        channel, pixel, top = channel.to(tl.int64), pixel.to(tl.int64), top.to(tl.int64)
    has_channel = channel < dim
    taps, shift = _load_parameters(weight, bias, channel, has_channel, KERNEL, FLIP, RESIDUAL)
    columns = x + batch * x_batch + (pixel[:, None] * x_pixel + channel[None, :] * x_channel)
    out += batch * height * width * dim + (pixel[:, None] * dim + channel[None, :])
    has_pixel = (pixel < width)[:, None] & has_channel[None, :]

    window = ()
    for step in tl.static_range(KERNEL - 1 + AHEAD):
        row = top - KERNEL // 2 + step
        window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
    for step in tl.static_range(ROWS):
        if step + AHEAD < ROWS:
            row = top + KERNEL // 2 + step + AHEAD
            window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
        pre = _convolve(window, taps, shift, KERNEL)
        if SILU:
            pre *= fast_sigmoid(pre, NVIDIA)
        row = top + step
        tl.store(out + row * (width * dim), pre.to(out.dtype.element_ty), mask=_in_row(has_pixel, row, height))
        window = window[KERNEL:]


@triton.jit
def _add_products(sums, grad, window, KERNEL: tl.constexpr):
    """The sums for every tap and for the bias, with what a tile of the gradient adds with the tiles that taps see."""
    added = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        added += (sums[tap] + grad * window[tap].to(tl.float32),)
    return added + (sums[KERNEL * KERNEL] + grad,)


@triton.jit(do_not_specialize_on_alignment=['batch_size', 'height', 'width', 'chunk_tiles'])
def conv2d_backward_kernel(
    grad_out,  # [B, H, W, D], by its strides
    x,  # [B, H, W, D], by its strides
    weight,  # [D, KERNEL, KERNEL]
    bias,  # [D], or None
    grad_pre,  # [B, H, W, D]: written with SILU, the gradient before the activation; without, that is grad_out
    sums,  # [chunks, D * (KERNEL^2 + 1)]: written, parts of the gradients of weight and bias
    batch_size,
    height,
    width,
    dim,
    chunk_tiles,
    grad_strides,
    x_strides,
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program walks a chunk of tiles of BLOCK_D channels, which are counted down the columns of the maps."""
    grad_batch, grad_row, grad_pixel, grad_channel = grad_strides
    x_batch, x_row, x_pixel, x_channel = x_strides
    pid = tl.program_id(0)
    channel_blocks, pixel_blocks, row_blocks = tl.cdiv(dim, BLOCK_D), tl.cdiv(width, BLOCK_W), tl.cdiv(height, ROWS)
    channel = pid % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = pid // channel_blocks
    if WIDE:
        channel = channel.to(tl.int64)
    has_channel = channel < dim
    taps, shift = _load_parameters(weight, bias, channel, has_channel, KERNEL, False, False)
    totals = ()
    for _ in tl.static_range(KERNEL * KERNEL + 1):
        totals += (tl.zeros([BLOCK_W, BLOCK_D], tl.float32),)

    first = chunk * chunk_tiles
    for tile in range(first, min(first + chunk_tiles, batch_size * pixel_blocks * row_blocks)):
        top = tile % row_blocks * ROWS
        pixel = tile // row_blocks % pixel_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
        batch = (tile // row_blocks // pixel_blocks).to(tl.int64)
        if WIDE:
            pixel, top = pixel.to(tl.int64), top.to(tl.int64)
        columns = x + batch * x_batch + (pixel[:, None] * x_pixel + channel[None, :] * x_channel)
        grads = grad_out + batch * grad_batch + (pixel[:, None] * grad_pixel + channel[None, :] * grad_channel)
        target = grad_pre + batch * height * width * dim + (pixel[:, None] * dim + channel[None, :])
        has_pixel = (pixel < width)[:, None] & has_channel[None, :]
        window, grad_window = (), ()
        for step in tl.static_range(KERNEL - 1 + AHEAD):
            row = top - KERNEL // 2 + step
            window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
        for step in tl.static_range(AHEAD):
            row = top + step
            mask = _in_row(has_pixel, row, height)
            grad_window += (tl.load(grads + row * grad_row, mask=mask, other=0.0),)  # [BLOCK_W, BLOCK_D]
        for step in tl.static_range(ROWS):
            if step + AHEAD < ROWS:
                row = top + step + AHEAD
                mask = _in_row(has_pixel, row, height)
                grad_window += (tl.load(grads + row * grad_row, mask=mask, other=0.0),)  # [BLOCK_W, BLOCK_D]
                row += KERNEL // 2
                window += _load_row(columns, x_row, x_pixel, row, pixel, has_channel, height, width, KERNEL)
            grad = grad_window[0].to(tl.float32)
            if SILU:
                pre = _convolve(window, taps, shift, KERNEL)
                gate = fast_sigmoid(pre, NVIDIA)
                grad *= gate * (1.0 + pre * (1.0 - gate))
                row, stored = top + step, grad.to(grad_pre.dtype.element_ty)
                tl.store(target + row * (width * dim), stored, mask=_in_row(has_pixel, row, height))
            totals = _add_products(totals, grad, window, KERNEL)
            window, grad_window = window[KERNEL:], grad_window[1:]

    sums += chunk.to(tl.int64) * (KERNEL * KERNEL + 1) * dim
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(sums + channel * (KERNEL * KERNEL) + tap, tl.sum(totals[tap], axis=0), mask=has_channel)
    bias_sums = sums + dim * (KERNEL * KERNEL) + channel
    tl.store(bias_sums, tl.sum(totals[KERNEL * KERNEL], axis=0), mask=has_channel)


def conv2d_forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, residual: bool = False, flip: bool = False
) -> Tensor:
    """Depthwise convolution of a map on Triton, and SiLU of it on request; computed in fp32.

    Args:
        x: [B, H, W, D] with any strides; fast where channels are neighbours in memory.
        weight: [D, k, k], contiguous, with odd k up to 5.
        bias: [D], contiguous.
        silu: Apply SiLU.
        residual: Add x.
        flip: Take the taps in reverse order, which makes the convolution's adjoint.

    Returns:
        [B, H, W, D] in x's dtype, contiguous.
    """
    out = x.new_empty(x.shape)
    launch = _forward_launch(x.shape, x.stride(), weight.shape[-1], silu, residual, flip, is_nvidia(x))
    launch(x, weight, bias, out)
    return out


def conv2d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, residual: bool = False
) -> Tuple[Tensor, Tensor]:
    """Gradients of `conv2d_forward`, the same at every run.

    The convolution before SiLU is recomputed from x; its gradient is rounded to x's dtype on the way to that of x.

    Args:
        grad_out: Gradient of the output [B, H, W, D] with any strides.

    Returns:
        Gradient of x in its dtype, contiguous; and partial sums [parts, D * (k * k + 1)] in fp32 of those of weight
        [D, k, k] and, after it, bias [D].
    """
    kernel, dim = weight.shape[-1], x.shape[-1]
    strides = grad_out.stride(), x.stride()
    launch, parts = _backward_launch(x.shape, *strides, kernel, silu, is_nvidia(x), num_processors(x))
    sums = torch.empty(parts, dim * (kernel * kernel + 1), dtype=torch.float32, device=x.device)
    grad_pre = x.new_empty(x.shape) if silu else grad_out
    launch(grad_out, x, weight, bias, grad_pre, sums)
    return conv2d_forward(grad_pre, weight, None, False, residual, flip=True), sums


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(
    shape: Tuple[int, int, int, int],
    strides: Tuple[int, ...],
    kernel: int,
    silu: bool,
    residual: bool,
    flip: bool,
    nvidia: bool,
) -> Launch:
    batch, height, width, dim = shape
    tile = _tile_of(shape, kernel, ahead=2)
    return Launch(
        conv2d_kernel,
        cdiv(dim, _BLOCK_D) * cdiv(width, tile.block_w) * cdiv(height, tile.rows) * batch,
        (height, width, dim, strides),
        (kernel, silu, flip, residual, *tile, _BLOCK_D, _is_wide(tile, shape, strides), nvidia),
        warps=tile.block_w // 4,  # four channels for a thread
    )


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(
    shape: Tuple[int, int, int, int],
    grad_strides: Tuple[int, ...],
    x_strides: Tuple[int, ...],
    kernel: int,
    silu: bool,
    nvidia: bool,
    processors: int,
) -> Tuple[Launch, int]:
    """The launch, and how many partial sums it leaves."""
    batch, height, width, dim = shape
    tile = _tile_of(shape, kernel, ahead=1)
    blocks, tiles = cdiv(dim, _BLOCK_D), batch * cdiv(height, tile.rows) * cdiv(width, tile.block_w)
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, max(blocks, 1))
    chunk_tiles = cdiv(tiles, max(min(wanted, tiles), 1))
    chunks = cdiv(tiles, max(chunk_tiles, 1))
    launch = Launch(
        conv2d_backward_kernel,
        blocks * chunks,
        (batch, height, width, dim, chunk_tiles, grad_strides, x_strides),
        (kernel, silu, *tile, _BLOCK_D, _is_wide(tile, shape, x_strides, grad_strides), nvidia),
        warps=tile.block_w // 2,  # two channels for a thread, which keeps the sums of all taps for each
        registers=_BACKWARD_REGISTERS if nvidia and kernel <= 3 else None,
    )
    return launch, chunks


def _tile_of(shape: Tuple[int, int, int, int], kernel: int, ahead: int) -> _Tile:
    """The tiles of a map [B, H, W, D].

    Rows are written out in the kernel, so that there are few of them, fewer if a row has many taps; they are all alike,
    to leave little at the end. Eight pixels are taken where an eighth of sixteen or more would stay empty.
    """
    _, height, width, _ = shape
    rows = cdiv(height, cdiv(height, 8 if kernel <= 3 else 4)) if height else 1
    block_w = 8 if 8 * 16 * cdiv(width, 16) >= 9 * width else 16
    return _Tile(rows, min(ahead, rows), block_w)


def _is_wide(tile: _Tile, shape: Tuple[int, int, int, int], *strides: Tuple[int, ...]) -> bool:
    """Whether offsets within an entry of the batch, also of tiles that overhang, may need more than 32 bits."""
    height, width, dim = shape[1] + 2 * tile.rows, shape[2] + 2 * tile.block_w, shape[3] + _BLOCK_D
    contiguous = width * dim, dim, 1
    offsets = contiguous, *(stride[1:] for stride in strides)
    return any(height * row + width * pixel + dim * channel >= 2**31 for row, pixel, channel in offsets)
