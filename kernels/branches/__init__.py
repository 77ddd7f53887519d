"""Branches of residual blocks, x + scale * f(norm(x)), as one function of all tensors of a block.

It does what the modules of a block do one by one, with few launches, few tensors and little Python: that is what limits
small maps and eager training. Where something has to see the modules or their operators, the modules run instead.
"""

import torch
from torch import Tensor

from .._operator import can_replace_modules
from ..conv1d import MAX_TAPS
from ..conv2d import MAX_WINDOW
from ..selective_scan.launch import MAX_STATES
from .bimamba import BiMambaBranch, BiMambaParameters
from .chain import Link, run_chain
from .mlp import MlpBranch, MlpParameters
from .ss2d import SS2DBranch, SS2DParameters

__all__ = [
    'MAX_STATES',
    'MAX_TAPS',
    'MAX_WINDOW',
    'BiMambaBranch',
    'BiMambaParameters',
    'Link',
    'MlpBranch',
    'MlpParameters',
    'SS2DBranch',
    'SS2DParameters',
    'can_run',
    'run_chain',
]


_DTYPES = torch.float32, torch.float16, torch.bfloat16


def can_run(x: Tensor) -> bool:
    """Whether `run_chain` runs on a map x: on Triton, in at most fp32, not traced, compiled or transformed."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES and can_replace_modules(x)
