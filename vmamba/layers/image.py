"""Checks of the images that a model is given."""

from timm.models import register_notrace_function
from torch import Tensor


@register_notrace_function
def check_images(images: Tensor, in_chans: int, min_size: int) -> None:
    """Raises ValueError unless images is a floating [B, in_chans, H, W] tensor with H, W >= min_size.

    What is no tensor is a TypeError.
    """
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
