"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .image import check_images
from .norm import AddLayerNorm, AddRmsNorm, FusedLayerNorm2d, ResidualStream
from .patches import NORM_EPS, ConvDownsample, ConvStem, MergeDownsample, PatchStem
from .ss2d import SS2D
from .token_embed import TokenEmbed, insert_class_token, resize_pos_embed, split_class_token

__all__ = [
    'AddLayerNorm',
    'AddRmsNorm',
    'BiMamba',
    'ConvDownsample',
    'ConvStem',
    'FusedLayerNorm2d',
    'MergeDownsample',
    'NORM_EPS',
    'PatchStem',
    'ResidualStream',
    'SS2D',
    'TokenEmbed',
    'check_images',
    'insert_class_token',
    'resize_pos_embed',
    'split_class_token',
]
