"""Branches of residual blocks, x + scale * f(norm(x)), each as one function of its tensors with its own backward pass.

They do what the modules of a block do one by one, with few launches, few tensors and little Python: that is what limits
small maps and eager training. Where something has to see the modules or their operators, the modules run instead.

All parameters are contiguous; maps may have any strides.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._launch import runs_on_triton
from .._operator import is_watched
from ..conv1d import MAX_TAPS
from ..conv2d import MAX_WINDOW
from ..selective_scan.launch import MAX_STATES
from .bimamba import bimamba_branch
from .mlp import mlp_branch
from .ss2d import ss2d_branch

__all__ = ['MAX_STATES', 'MAX_TAPS', 'MAX_WINDOW', 'bimamba_branch', 'can_run', 'mlp_branch', 'ss2d_branch']


def can_run(x: Tensor) -> bool:
    """Whether branches run on a map x: on Triton, in fp32, and nothing is traced, compiled or transformed."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype == torch.float32
        and x.numel() > 0
        and runs_on_triton(x)
        and not is_watched()
        and forward_ad._current_level < 0
    )
