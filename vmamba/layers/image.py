"""Image inputs: checks, and convolutions of few channels."""

from typing import Optional

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn


@register_notrace_function
def check_images(images: Tensor, in_chans: int, min_size: int) -> None:
    """Checks that images is a floating-point tensor [B, in_chans, H, W] with H, W >= min_size.

    Raises:
        TypeError: If images is not a tensor.
        ValueError: If its shape or dtype is wrong.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f'expected a tensor of images [B, {in_chans}, H, W], got {type(images).__name__}')
    if images.ndim != 4:
        raise ValueError(f'expected a batch of images [B, {in_chans}, H, W], got shape {tuple(images.shape)}')
    if not images.is_floating_point():
        raise ValueError(f'expected floating-point images (scaled and normalised), got {images.dtype}')
    channels, height, width = images.shape[1:]
    if channels != in_chans:
        raise ValueError(
            f'the model takes {in_chans} image channels, got {channels}: create it with in_chans={channels}'
        )
    if height < min_size or width < min_size:
        raise ValueError(f'images must be at least {min_size}x{min_size}, got {height}x{width}')


@register_notrace_module
class ImageConv2d(nn.Conv2d):
    """Convolution of images that always runs in channels-last memory.

    On a GPU, 16-bit inputs are zero-padded to a multiple of 8 channels, as tensor cores need.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """[B, in_chans, H, W] -> [B, d, H', W']"""
        device = input.device.type
        # Autocast skips fp64 and does not support the meta device.
        autocast = device != 'meta' and torch.is_autocast_enabled(device) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        if not input.is_cuda or dtype.itemsize != 2:
            return super()._conv_forward(input.contiguous(memory_format=torch.channels_last), weight, bias)
        zeros = (0, 0, 0, 0, 0, -self.in_channels % 8)
        padded = F.pad(input.to(dtype, memory_format=torch.channels_last), zeros)
        return super()._conv_forward(padded, F.pad(weight, zeros), bias)
