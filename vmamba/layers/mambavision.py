"""MambaVision's mixer: a selective scan beside a convolution.

MambaVision: A Hybrid Mamba-Transformer Vision Backbone, https://arxiv.org/abs/2407.08083
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import causal_conv1d, selective_scan
from .options import check_counts
from .plain import apply_linear
from .ssm_parameters import init_A_log_, negative_exp


@register_notrace_module
class MambaVisionMixer(nn.Module):
    """A scan of one half of the channels, concatenated with a convolution of the other half.

    x, z = in_proj(h).chunk(2);  u = silu(conv1d_x(x));  dt, B, C = x_proj(u)
    y = selective_scan(u, softplus(dt_proj(dt) + 2 * bias), A, B, C, D);  out = out_proj([y, silu(conv1d_z(z))])

    The convolutions are depthwise, symmetric and without bias. The bias of the step size counts twice, because the
    published weights were trained so.

    Args:
        dim: Token channels C, even; the scan has D = C / 2.
        d_state: State dimension N.
        dt_rank: Rank R of the step-size projection, ceil(dim / 16) by default.
        d_conv: Odd width of the convolutions.
    """

    def __init__(
        self, dim: int, d_state: int = 8, dt_rank: Optional[int] = None, d_conv: int = 3, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_counts(dim=dim, d_state=d_state, dt_rank=dt_rank, d_conv=d_conv)
        if dim % 2:
            raise ValueError(f'dim must be even, got {dim}')
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv must be odd, got {d_conv}')
        inner = dim // 2
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv1d_x_weight = nn.Parameter(torch.empty(inner, d_conv, **dd))
        self.conv1d_z_weight = nn.Parameter(torch.empty(inner, d_conv, **dd))
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj_weight = nn.Parameter(torch.empty(inner, dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(inner, **dd))
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters except those of the linear layers, which initialise themselves."""
        for weight in (self.conv1d_x_weight, self.conv1d_z_weight):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        trunc_normal_(self.dt_proj_weight, std=0.02)
        nn.init.zeros_(self.dt_proj_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        x, z = self._convolve(apply_linear(self.in_proj, x)).chunk(2, dim=1)  # [B, D, L] each
        dt_rank, dstate = self.dt_proj_weight.shape[1], self.A_log.shape[1]
        dt, B, C = apply_linear(self.x_proj, x.mT).split([dt_rank, dstate, dstate], dim=-1)
        delta = F.linear(dt, self.dt_proj_weight)
        options = dict(delta_bias=2 * self.dt_proj_bias, delta_softplus=True)
        y = selective_scan(x, delta.mT, negative_exp(self.A_log), B.mT, C.mT, self.D, **options)
        return apply_linear(self.out_proj, torch.cat([y.mT, z.mT], dim=-1))

    def _convolve(self, xz: Tensor) -> Tensor:
        """Both convolutions with SiLU: [B, L, 2 * D] -> [B, 2 * D, L]"""
        weight = torch.cat([self.conv1d_x_weight, self.conv1d_z_weight])
        ahead = weight.shape[-1] // 2
        # A causal convolution of the sequence and the zeros after it sees as many tokens ahead.
        padded = F.pad(xz, (0, 0, 0, ahead)).mT
        return causal_conv1d(padded, weight, activation='silu')[..., ahead:]
