"""Vim's mixer: the bidirectional Mamba block.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import selective_scan
from .ssm_init import init_A_log_, init_dt_bias_, init_dt_weight_


class DirectionalSSM(nn.Module):
    """Causal depthwise convolution, SiLU and selective scan along a sequence in one direction.

    u = silu(conv1d(x));  dt, B, C = split(x_proj(u));  y = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D).
    In reverse every part sees the sequence from its end, and the output is in the sequence's order.

    Args:
        dim: Inner channels D.
        d_state: State dimension N.
        dt_rank: Rank R of the step-size projection.
        d_conv: Width of the convolution.
        reverse: Walk from the end of the sequence.
    """

    def __init__(
        self, dim: int, d_state: int, dt_rank: int, d_conv: int, reverse: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.reverse = reverse
        self.widths = [dt_rank, d_state, d_state]
        self.conv1d = nn.Conv1d(dim, dim, d_conv, groups=dim, **dd)
        self.x_proj = nn.Linear(dim, sum(self.widths), bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, dim, **dd)
        self.A_log = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; x_proj and conv1d initialise themselves."""
        init_dt_weight_(self.dt_proj.weight)
        init_dt_bias_(self.dt_proj.bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]"""
        u = F.silu(self._causal_conv(x.transpose(1, 2)))  # [B, D, L]
        dt, B, C = self.x_proj(u.transpose(1, 2)).split(self.widths, dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)
        y = selective_scan(
            u,
            delta.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            reverse=self.reverse,
        )
        return y.transpose(1, 2)

    def _causal_conv(self, x: Tensor) -> Tensor:
        conv = self.conv1d
        past = conv.kernel_size[0] - 1
        if self.reverse:
            return F.conv1d(F.pad(x, (0, past)), conv.weight.flip(-1), conv.bias, groups=conv.groups)
        return F.conv1d(F.pad(x, (past, 0)), conv.weight, conv.bias, groups=conv.groups)


@register_notrace_module
class BiMamba(nn.Module):
    """Bidirectional Mamba over a token sequence.

    x, z = in_proj(h);  out = out_proj((forward_ssm(x) + backward_ssm(x)) / 2 * silu(z)).

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
        inner = int(expand * dim)
        dt_rank = dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.forward_ssm = DirectionalSSM(inner, d_state, dt_rank, d_conv, **dd)
        self.backward_ssm = DirectionalSSM(inner, d_state, dt_rank, d_conv, reverse=True, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = (self.forward_ssm(x) + self.backward_ssm(x)) / 2
        return self.out_proj(y * F.silu(z))
