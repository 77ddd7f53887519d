"""The simple feature pyramid of ViTDet, https://arxiv.org/abs/2203.16527: maps of one stride resampled to others."""

from mmengine.registry import MODELS
from torch import nn

from ..layers import LayerNorm2d

# For the norm_cfg of necks and heads, as in ViTDet. The second name is in configs saved by earlier versions.
MODELS.register_module(['LayerNorm2d', 'FusedLayerNorm2d'], module=LayerNorm2d)


def make_resample(dim: int, stride: int, out_stride: int) -> nn.Module:
    """Module that resamples a map [B, d, h, w] from one stride to another.

    Each halving of the stride is a 2x2 transposed convolution, with LayerNorm and GELU in between. Larger strides use
    max pooling with incomplete windows kept.

    Args:
        dim: Channels d.
        stride: Stride of the input.
        out_stride: Stride of the output.

    Raises:
        ValueError: If the ratio of the strides is not a power of 2.
    """
    large, small = max(stride, out_stride), min(stride, out_stride)
    ratio = large // small
    if small < 1 or large % small or ratio & (ratio - 1):
        raise ValueError(f'output stride {out_stride} must be the stride {stride} times or divided by a power of 2')
    if out_stride >= stride:
        return nn.MaxPool2d(ratio, ceil_mode=True) if ratio > 1 else nn.Identity()
    layers = []
    for i in range(ratio.bit_length() - 1):
        if i:
            layers += [LayerNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
