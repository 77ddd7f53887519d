"""Mixers and the layers that timm.layers lacks."""

from .bimamba import BiMamba
from .image import check_images
from .norm import AddLayerNorm, AddRmsNorm, FusedLayerNorm2d, ResidualStream
from .patches import NORM_EPS, ConvDownsample, ConvStem, MergeDownsample, PatchStem
from .residual import TensorOrStream, add_branch, adds, drop_path_scale, run_block, start_stream, total
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
    'TensorOrStream',
    'TokenEmbed',
    'add_branch',
    'adds',
    'check_images',
    'drop_path_scale',
    'insert_class_token',
    'resize_pos_embed',
    'run_block',
    'split_class_token',
    'start_stream',
    'total',
]
