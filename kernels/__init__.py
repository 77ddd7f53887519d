"""Selective-scan operators. Imports torch (and triton) only."""

from ._launch import use_triton
from ._operator import OPERATORS
from .bimamba import bidirectional_scan, bimamba_core
from .block_step import MambaWeights, can_step_mamba, mamba_step
from .conv1d import NUM_DIRECTIONS, bidirectional_conv1d, causal_conv1d
from .conv2d import depthwise_conv2d
from .fft_conv import diagonal_kernel, diagonal_state, long_conv
from .gated_norm import gated_rms_norm
from .moe import SwitchOutput, switch_mlp
from .naive import cross_merge, cross_scan
from .norm import add_norm, layer_norm, rms_norm
from .onednn import linear
from .portable import decompositions
from .selective_scan import selective_scan
from .ss2d import NUM_ROUTES, ss2d_core, ss2d_scan
from .ssd import non_causal_ssd, ssd_scan
from .step import causal_conv1d_update, selective_state_update

__all__ = [
    'NUM_DIRECTIONS',
    'NUM_ROUTES',
    'OPERATORS',
    'MambaWeights',
    'SwitchOutput',
    'add_norm',
    'bidirectional_conv1d',
    'bidirectional_scan',
    'bimamba_core',
    'can_step_mamba',
    'causal_conv1d',
    'causal_conv1d_update',
    'cross_merge',
    'cross_scan',
    'decompositions',
    'depthwise_conv2d',
    'diagonal_kernel',
    'diagonal_state',
    'gated_rms_norm',
    'layer_norm',
    'linear',
    'long_conv',
    'mamba_step',
    'non_causal_ssd',
    'rms_norm',
    'selective_scan',
    'selective_state_update',
    'ss2d_core',
    'ss2d_scan',
    'ssd_scan',
    'switch_mlp',
    'use_triton',
]
