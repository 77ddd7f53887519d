"""Vim's mixer: the bidirectional Mamba block.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
"""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import bidirectional_scan
from .ssm_init import init_A_log_, init_dt_bias_, init_dt_weight_


class DirectionalSSM(nn.Module):
    """Causal depthwise convolution, SiLU and the projections of a selective scan along a sequence in one direction.

    u = silu(conv1d(x));  x_dbl = x_proj(u). In reverse the convolution sees the sequence from its end.
    The scan itself runs for both directions at once, in `BiMamba`, with this module's dt_proj, A_log and D.

    Args:
        dim: Inner channels D.
        d_state: State dimension N.
        dt_rank: Rank R of the step-size projection.
        d_conv: Width of the convolution.
        reverse: See the sequence from its end.
    """

    def __init__(
        self, dim: int, d_state: int, dt_rank: int, d_conv: int, reverse: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.reverse = reverse
        self.conv1d = nn.Conv1d(dim, dim, d_conv, groups=dim, **dd)
        self.x_proj = nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **dd)
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

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """[B, L, D] -> u [B, L, D] and x_dbl [B, L, R + 2N]"""
        u = F.silu(self._causal_conv(x))
        return u, self.x_proj(u)

    def _causal_conv(self, x: Tensor) -> Tensor:
        """The convolution as a sum of shifted products: channels-last throughout."""
        seqlen, past = x.shape[1], self.conv1d.kernel_size[0] - 1
        x = F.pad(x, (0, 0, 0, past) if self.reverse else (0, 0, past, 0))
        y = self.conv1d.bias.to(x.dtype)
        for shift, weight in enumerate(self.conv1d.weight.to(x.dtype).squeeze(1).unbind(-1)):
            start = past - shift if self.reverse else shift
            y = torch.addcmul(y, x[:, start : start + seqlen], weight)
        return y


@register_notrace_module
class BiMamba(nn.Module):
    """Bidirectional Mamba over a token sequence.

    x, z = in_proj(h);  out = out_proj((y_forward + y_backward) / 2 * silu(z)), with y of the two directions'
    selective scans (see `vmamba.kernels.bidirectional_scan`).

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
        y = self._scan(x) / 2
        return self.out_proj(y * F.silu(z))

    def _scan(self, x: Tensor) -> Tensor:
        directions = (self.forward_ssm, self.backward_ssm)
        u, x_dbl = (torch.stack(tensors, dim=2) for tensors in zip(*(ssm(x) for ssm in directions)))
        dt_weight, dt_bias, A_log, D = (
            torch.stack(tensors)
            for tensors in zip(*((ssm.dt_proj.weight, ssm.dt_proj.bias, ssm.A_log, ssm.D) for ssm in directions))
        )
        return bidirectional_scan(u, x_dbl, dt_weight, dt_bias, -torch.exp(A_log.float()), D)
