"""Convolution of images, which have few channels, to a channels-last map in one pass, for inference.

A library's convolution needs the images cast, padded to 8 channels and channels last. Here the taps of a window are the
rows of a matrix product, gathered from the images as they are.
"""

from functools import lru_cache
from math import prod
from typing import Optional, Tuple

import torch
from torch import Tensor

from ._launch import MAX_PLANS, Launch, cdiv, dot_precision, next_power_of_2, on_device, tl, triton

MAX_TAPS, MAX_CHANNELS = 128, 256  # taps of all image channels, and channels of the map
_TILE_ELEMENTS = 4096  # pixels times channels (or taps, if there are more) that a program computes


@triton.jit(do_not_specialize_on_alignment=['pixels', 'height', 'width', 'out_height', 'out_width'])
def image_conv_kernel(
    images,  # [B, C, H, W], by its strides
    weight,  # [DIM, C, ROWS, COLUMNS]
    bias,  # [DIM], or None
    out,  # [B, H', W', DIM]: written
    pixels,
    height,
    width,
    out_height,
    out_width,
    strides,
    DIM: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes BLOCK_P pixels, which are counted through all maps."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    tap, channel = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    has_channel = channel < DIM
    line = pixel // out_width
    column = (pixel - line * out_width).to(tl.int32) * STRIDE_W - PADDING_W
    batch = line // out_height
    row = (line - batch * out_height).to(tl.int32) * STRIDE_H - PADDING_H
    # Pixels are the last axis, along which a warp then loads: their taps lie close together.
    h = row[None, :] + (tap // COLUMNS % ROWS)[:, None]  # [BLOCK_T, BLOCK_P]
    w = column[None, :] + (tap % COLUMNS)[:, None]  # [BLOCK_T, BLOCK_P]
    exists = (tap < TAPS)[:, None] & (pixel < pixels)[None, :]
    inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    places = images + (batch[None, :] * strides[0] + (tap // (ROWS * COLUMNS)).to(tl.int64)[:, None] * strides[1])
    places += h.to(tl.int64) * strides[2] + w.to(tl.int64) * strides[3]
    seen = tl.load(places, mask=inside, other=0.0).to(out.dtype.element_ty)  # [BLOCK_T, BLOCK_P]
    mask = (tap < TAPS)[:, None] & has_channel[None, :]
    taps = tl.load(weight + channel[None, :] * TAPS + tap[:, None], mask=mask, other=0.0)  # [BLOCK_T, BLOCK_D]
    value = tl.dot(tl.trans(seen), taps.to(out.dtype.element_ty), input_precision=PRECISION)  # [BLOCK_P, BLOCK_D]
    if bias is not None:
        value += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
    mask = (pixel < pixels)[:, None] & has_channel[None, :]
    tl.store(out + pixel[:, None] * DIM + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


def image_conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: Tuple[int, int],
    padding: Tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Convolution of images with zero padding, on Triton and without gradients.

    Images and weight are rounded to dtype, products summed in fp32.

    Args:
        images: [B, C, H, W], in any floating dtype and with any strides.
        weight: [d, C, k, k'], contiguous, with at most `MAX_TAPS` taps C * k * k' and `MAX_CHANNELS` channels d.
        bias: [d].
        stride, padding: Along the height and the width.
        dtype: fp32, fp16 or bf16.

    Returns:
        [B, d, H', W'] in dtype, in channels-last memory.
    """
    batch, _, height, width = images.shape
    sizes = [
        (size + 2 * pad - window) // step + 1
        for size, window, step, pad in zip((height, width), weight.shape[2:], stride, padding)
    ]
    out = images.new_empty((batch, *sizes, weight.shape[0]), dtype=dtype)
    with on_device(images):
        precision = dot_precision(out)
        _launch(images.shape, images.stride(), weight.shape, out.shape, stride, padding, precision)(
            images, weight, bias, out
        )
    return out.permute(0, 3, 1, 2)


@lru_cache(maxsize=MAX_PLANS)
def _launch(
    shape: Tuple[int, ...],
    strides: Tuple[int, ...],
    weight: Tuple[int, ...],
    out: Tuple[int, ...],
    stride: Tuple[int, int],
    padding: Tuple[int, int],
    precision: str,
) -> Launch:
    batch, height, width, dim = out
    taps = prod(weight[1:])
    block_t, block_d = (max(next_power_of_2(size), 16) for size in (taps, dim))
    block_p = max(_TILE_ELEMENTS // max(block_t, block_d), 16)
    pixels = batch * height * width
    constants = dim, taps, *weight[2:], *stride, *padding, block_p, block_t, block_d, precision
    return Launch(image_conv_kernel, cdiv(pixels, block_p), (pixels, *shape[2:], height, width, strides), constants)
