"""The simple feature pyramid of ViTDet, https://arxiv.org/abs/2203.16527: maps of one stride brought to others."""

from mmengine.registry import MODELS
from torch import nn

from ..layers import LayerNorm2d

# For the norm_cfg of necks and heads, as in ViTDet; the second name is that of configs which earlier runs saved.
MODELS.register_module(['LayerNorm2d', 'FusedLayerNorm2d'], module=LayerNorm2d)


def make_resample(dim: int, stride: int, out_stride: int) -> nn.Module:
    """Module that brings a map [B, d, h, w] of one stride to another.

    Each halving of the stride is a 2x2 transposed convolution, with LayerNorm and GELU between two of them; larger
    strides are max pooling, which keeps incomplete windows.

    Raises:
        ValueError: If one stride is not the other times a power of 2.
    """
    large, small = max(stride, out_stride), min(stride, out_stride)
    ratio = large // small
    if small < 1 or large % small or ratio & (ratio - 1):
        raise ValueError(f'an output stride of {out_stride} is not the stride {stride} times or over a power of 2')
    if out_stride >= stride:
        return nn.MaxPool2d(ratio, ceil_mode=True) if ratio > 1 else nn.Identity()
    layers = []
    for i in range(ratio.bit_length() - 1):
        if i:
            layers += [LayerNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
