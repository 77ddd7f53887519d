"""Selective-scan operators. Imports torch (and triton) only."""

from . import flops
from .bidirectional import bidirectional_scan
from .conv import bidirectional_conv1d
from .cross import cross_merge, cross_scan
from .scan import selective_scan
from .ss2d import ss2d_scan

__all__ = [
    'bidirectional_conv1d',
    'bidirectional_scan',
    'cross_merge',
    'cross_scan',
    'flops',
    'selective_scan',
    'ss2d_scan',
]
