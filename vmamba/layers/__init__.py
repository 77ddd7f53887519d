"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .image import check_images
from .norm import AddRmsNorm, ResidualStream, drop_path_scale
from .patches import NORM_EPS, ConvDownsample, ConvStem, MergeDownsample, PatchStem
from .ss2d import SS2D
from .token_embed import TokenEmbed, insert_class_token, resize_pos_embed, split_class_token

__all__ = [
    'AddRmsNorm',
    'BiMamba',
    'ConvDownsample',
    'ConvStem',
    'MergeDownsample',
    'NORM_EPS',
    'PatchStem',
    'ResidualStream',
    'SS2D',
    'TokenEmbed',
    'check_images',
    'drop_path_scale',
    'insert_class_token',
    'resize_pos_embed',
    'split_class_token',
]
