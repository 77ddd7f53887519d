"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .fused import fused_branch, runs_fused
from .image import ImageConv2d, check_images
from .norm import LayerNorm, LayerNorm2d, RmsNorm
from .ss2d import SS2D

__all__ = [
    'BiMamba',
    'ImageConv2d',
    'LayerNorm',
    'LayerNorm2d',
    'RmsNorm',
    'SS2D',
    'check_images',
    'fused_branch',
    'runs_fused',
]
