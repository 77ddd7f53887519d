"""Vim's mixer: the bidirectional Mamba block.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
"""

import math
from typing import Optional

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import NUM_DIRECTIONS, bimamba_core, branches
from .options import check_counts, scaled_channels
from .plain import apply_linear
from .ssm_parameters import init_A_log_, init_dt_bias_, init_dt_weight_, negative_exp


@register_notrace_module
class BiMamba(nn.Module):
    """Bidirectional Mamba over a token sequence.

    x, z = in_proj(h).chunk(2);  u_k = silu(conv1d_k(x));  y = sum over directions k of selective_scan_k(u_k), with
    projections x_proj_k(u_k);  out = out_proj(y / 2 * silu(z)). See `vmamba.kernels.bimamba_core`.
    Direction 0 convolves and scans from the first token, direction 1 from the last. Each has its own parameters.

    Args:
        dim: Token channels d.
        expand: Inner channels are D = int(expand * dim).
        d_state: State dimension N.
        dt_rank: Rank R of the step-size projection, ceil(dim / 16) by default.
        d_conv: Width of the causal convolutions.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: Optional[int] = None,
        d_conv: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_counts(dim=dim, d_state=d_state, dt_rank=dt_rank, d_conv=d_conv)
        inner = scaled_channels(dim, expand=expand)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, d_conv, **dd))
        self.conv1d_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, dt_rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters except in_proj and out_proj, which initialise themselves."""
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            bound = self.conv1d_weight.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_weight_(self.dt_proj_weight)
        init_dt_bias_(self.dt_proj_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        conv = self.conv1d_weight, self.conv1d_bias
        dt_proj = self.dt_proj_weight, self.dt_proj_bias
        xz = apply_linear(self.in_proj, x)
        y = bimamba_core(xz, *conv, self.x_proj_weight, *dt_proj, negative_exp(self.A_log), self.D)
        return apply_linear(self.out_proj, y)

    def has_kernels(self) -> bool:
        """Whether the Triton kernels support this convolution width and state dimension."""
        taps, states = self._parameters['conv1d_weight'].shape[-1], self._parameters['A_log'].shape[-1]
        return taps <= branches.MAX_TAPS and states <= branches.MAX_STATES
