"""What is particular to images: checks of them, and convolutions of few channels."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn


@register_notrace_function
def check_images(images: Tensor, in_chans: int, min_size: int) -> None:
    """Raises TypeError unless images is a tensor, and ValueError unless it is a floating [B, in_chans, H, W] tensor
    with H, W >= min_size."""
    if not isinstance(images, Tensor):
        raise TypeError(f'expected a tensor of images [B, {in_chans}, H, W], got {type(images).__name__}')
    if images.ndim != 4:
        raise ValueError(f'expected a batch of images [B, {in_chans}, H, W], got shape {tuple(images.shape)}')
    if not images.is_floating_point():
        raise ValueError(f'expected floating images (scaled and normalised), got {images.dtype}')
    channels, height, width = images.shape[1:]
    if channels != in_chans:
        raise ValueError(
            f'the model takes {in_chans} image channels, got {channels}: create it with in_chans={channels}'
        )
    if height < min_size or width < min_size:
        raise ValueError(f'images must be at least {min_size}x{min_size}, got {height}x{width}')


@register_notrace_module
class ImageConv2d(nn.Conv2d):
    """A convolution of images, in channels-last memory, whatever theirs.

    On a GPU those of 16 bits get channels of zeros up to a multiple of 8, without which none run on tensor cores.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, d, H', W']"""
        autocast = torch.is_autocast_enabled('cuda') and x.dtype != torch.float64  # it leaves fp64 alone
        dtype = torch.get_autocast_dtype('cuda') if autocast else x.dtype
        if not x.is_cuda or dtype.itemsize != 2:
            return super().forward(x.contiguous(memory_format=torch.channels_last))
        zeros = (0, 0, 0, 0, 0, -self.in_channels % 8)
        x = F.pad(x.to(dtype, memory_format=torch.channels_last), zeros)
        return self._conv_forward(x, F.pad(self.weight, zeros), self.bias)
