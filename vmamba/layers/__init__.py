"""Mixers and the layers that timm.layers lacks."""

from .attention import Attention, AttentionCache
from .bimamba import BiMamba
from .bimamba2 import BiMamba2
from .block_state import BlockState, BlockStateCache
from .conv_norm import ConvNorm, conv_norms
from .depthwise import CausalConv1d, DepthwiseConv2d
from .h3 import H3, H3Cache
from .image import ImageConv2d, check_images
from .mamba import Mamba, MambaCache
from .mamba2 import Mamba2, Mamba2Cache
from .mambavision import MambaVisionMixer
from .moe import SwitchMoE, auxiliary_loss, expert_load
from .non_causal import NonCausalSSD
from .norm import GatedRmsNorm, LayerNorm, LayerNorm2d, RmsNorm
from .residual import residual_branches
from .routes import Bidirectional, FourRoutes
from .s4d import S4D, S4DCache
from .ss2d import SS2D
from .ssd2d import SSD2D

__all__ = [
    'Attention',
    'AttentionCache',
    'BiMamba',
    'BiMamba2',
    'Bidirectional',
    'BlockState',
    'BlockStateCache',
    'CausalConv1d',
    'ConvNorm',
    'DepthwiseConv2d',
    'FourRoutes',
    'GatedRmsNorm',
    'H3',
    'H3Cache',
    'ImageConv2d',
    'LayerNorm',
    'LayerNorm2d',
    'Mamba',
    'Mamba2',
    'Mamba2Cache',
    'MambaCache',
    'MambaVisionMixer',
    'NonCausalSSD',
    'RmsNorm',
    'S4D',
    'S4DCache',
    'SS2D',
    'SSD2D',
    'SwitchMoE',
    'auxiliary_loss',
    'check_images',
    'conv_norms',
    'expert_load',
    'residual_branches',
]
