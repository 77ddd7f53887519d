"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .depthwise import DepthwiseConv2d
from .image import ImageConv2d, check_images
from .mambavision import MambaVisionMixer
from .non_causal import NonCausalSSD
from .norm import LayerNorm, LayerNorm2d, RmsNorm
from .residual import residual_branches
from .ss2d import SS2D

__all__ = [
    'BiMamba',
    'DepthwiseConv2d',
    'ImageConv2d',
    'LayerNorm',
    'LayerNorm2d',
    'MambaVisionMixer',
    'NonCausalSSD',
    'RmsNorm',
    'SS2D',
    'check_images',
    'residual_branches',
]
