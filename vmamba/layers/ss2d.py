"""VMamba's mixer: the 2-D selective scan (SS2D).

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import NUM_ROUTES, depthwise_conv2d, linear, ss2d_core, ss2d_scan
from .options import check_counts, scaled_channels
from .plain import apply_linear, has_global_hooks, is_plain
from .ssm_parameters import init_A_log_, init_dt_bias_, init_dt_weight_, negative_exp


@register_notrace_module
class SS2D(nn.Module):
    """2-D selective scan over a channels-last map.

    y = out_proj(LayerNorm(scan(silu(conv2d(in_proj(x)))))), where scan sums selective scans along the four routes over
    the map (see `vmamba.kernels.ss2d_scan`). With a gate, in_proj also returns z, and the normalised scan is multiplied
    by silu(z). State, A, D and the dt bias are fp32 under autocast.

    Kernels use the parameters of `conv2d`, `x_proj` and `out_norm` directly. If one of these modules has hooks, is
    parametrised or was replaced (by an adapter, a quantised layer, a dilated convolution), all three are called.

    Args:
        dim: Channels d of the map.
        ssm_ratio: Inner channels are D = int(ssm_ratio * dim).
        d_state: State dimension N.
        dt_rank: Rank R of the step-size projection, ceil(dim / 16) by default.
        d_conv: Odd kernel size of the depthwise convolution.
        conv_bias: Whether the depthwise convolution has a bias.
        gate: Whether silu(z) gates the output.
        norm_eps: Epsilon of the output LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        dt_rank: Optional[int] = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_counts(dim=dim, d_state=d_state, dt_rank=dt_rank, d_conv=d_conv)
        if d_conv % 2 == 0:
            raise ValueError(f'd_conv must be odd, got {d_conv}')
        inner = scaled_channels(dim, ssm_ratio=ssm_ratio)
        self.gate = gate
        self.d_conv = d_conv
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(inner, NUM_ROUTES * (dt_rank + 2 * d_state), bias=False, **dd)
        self.dt_proj_weight = nn.Parameter(torch.empty(NUM_ROUTES, inner, dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(NUM_ROUTES, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(NUM_ROUTES, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(NUM_ROUTES, inner, **dd))
        self.out_norm = LayerNorm(inner, eps=norm_eps, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; linear and convolution layers initialise themselves."""
        init_dt_weight_(self.dt_proj_weight)
        init_dt_bias_(self.dt_proj_bias)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        x = apply_linear(self.in_proj, x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        parameters = self.dt_proj_weight, self.dt_proj_bias, negative_exp(self.A_log), self.D
        if self.is_plain():
            norm = self.out_norm
            x = depthwise_conv2d(x, self.conv2d.weight.squeeze(1), self.conv2d.bias, silu=True)
            y = ss2d_core(x, self.x_proj.weight, *parameters, norm.weight, norm.bias, norm.eps)
        else:
            x = self.conv2d(x.permute(0, 3, 1, 2))  # [B, H, W, D] -> [B, D, H, W]
            x = F.silu(x).permute(0, 2, 3, 1)
            x_dbl = self.x_proj(x).unflatten(-1, (NUM_ROUTES, -1))  # [B, H, W, 4, R + 2N]
            y = self.out_norm(ss2d_scan(x, x_dbl, *parameters)).to(x.dtype)
        if self.gate:
            y = y * F.silu(z)
        return apply_linear(self.out_proj, y)

    def scan(self, x: Tensor) -> Tensor:
        """From in_proj's result to out_norm's input, where `is_plain`: [B, H, W, D] -> [B, H, W, D]"""
        x = depthwise_conv2d(x, self.conv2d.weight.squeeze(1), self.conv2d.bias, silu=True)
        x_dbl = linear(x, self.x_proj.weight).unflatten(-1, (NUM_ROUTES, -1))  # [B, H, W, 4, R + 2N]
        return ss2d_scan(x, x_dbl, self.dt_proj_weight, self.dt_proj_bias, negative_exp(self.A_log), self.D)

    def is_plain(self) -> bool:
        """Whether `conv2d`, `x_proj` and `out_norm` are the original modules, without hooks."""
        modules = self._modules
        return (
            not has_global_hooks()
            and is_plain(modules['conv2d'], nn.Conv2d)
            and is_plain(modules['x_proj'], nn.Linear)
            and is_plain(modules['out_norm'], LayerNorm)
            and modules['x_proj']._parameters['bias'] is None
            and self._is_depthwise()
        )

    def _is_depthwise(self) -> bool:
        """Whether `conv2d` is depthwise and keeps the size of the map."""
        conv, side = self._modules['conv2d'], self.d_conv
        return (
            conv.kernel_size == (side, side)
            and conv.groups == conv.in_channels == conv.out_channels
            and conv.stride == conv.dilation == (1, 1)
            and conv.padding == (side // 2, side // 2)
            and conv.padding_mode == 'zeros'
        )
