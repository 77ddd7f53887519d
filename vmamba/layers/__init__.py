"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .bimamba2 import BiMamba2
from .depthwise import CausalConv1d, DepthwiseConv2d
from .image import ImageConv2d, check_images
from .mamba2 import Mamba2, Mamba2Cache
from .mambavision import MambaVisionMixer
from .non_causal import NonCausalSSD
from .norm import GatedRmsNorm, LayerNorm, LayerNorm2d, RmsNorm
from .residual import residual_branches
from .ss2d import SS2D
from .ssd2d import SSD2D

__all__ = [
    'BiMamba',
    'BiMamba2',
    'CausalConv1d',
    'DepthwiseConv2d',
    'GatedRmsNorm',
    'ImageConv2d',
    'LayerNorm',
    'LayerNorm2d',
    'Mamba2',
    'Mamba2Cache',
    'MambaVisionMixer',
    'NonCausalSSD',
    'RmsNorm',
    'SS2D',
    'SSD2D',
    'check_images',
    'residual_branches',
]
