"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .image import ImageConv2d, check_images
from .mambavision import MambaVisionMixer
from .norm import LayerNorm, LayerNorm2d, RmsNorm
from .residual import residual_branches
from .ss2d import SS2D

__all__ = [
    'BiMamba',
    'ImageConv2d',
    'LayerNorm',
    'LayerNorm2d',
    'MambaVisionMixer',
    'RmsNorm',
    'SS2D',
    'check_images',
    'residual_branches',
]
