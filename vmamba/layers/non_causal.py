"""VSSD's mixer: state space duality without order.

VSSD: Vision Mamba with Non-Causal State Space Duality, https://arxiv.org/abs/2407.18559
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import non_causal_ssd
from ..kernels._operator import can_replace_modules
from ..kernels.ssd.gated import fits, gated_non_causal_ssd
from .depthwise import DepthwiseConv2d
from .norm import LayerNorm
from .options import check_counts, check_divides, scaled_channels
from .plain import apply_linear, has_global_hooks, is_plain, is_plain_tensor
from .ssm_parameters import init_dt_bias_, init_uniform_A_log_, negative_exp


@register_notrace_module
class NonCausalSSD(nn.Module):
    """One global state per head that all pixels of a channels-last map write and read.

    z, xBC, dt = in_proj(h);  x, B, C = silu(conv2d(xBC));  m = softplus(dt + dt_bias) * exp(A_log)
    y = C (sum over pixels of B m x) + D x;  out = out_proj(LayerNorm(y) * z). See `vmamba.kernels.non_causal_ssd`.

    Args:
        dim: Channels d of the map.
        num_heads: Heads, which share the inner channels equally.
        expand: Inner channels are D = int(expand * dim).
        d_state: State dimension N.
        d_conv: Odd kernel size of the depthwise convolution.
        norm_eps: Epsilon of the LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expand: float = 2.0,
        d_state: int = 64,
        d_conv: int = 3,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(dim=dim, num_heads=num_heads, d_state=d_state, d_conv=d_conv)
        inner = scaled_channels(dim, expand=expand)
        check_divides(inner, 'inner channels', num_heads=num_heads)
        self.splits = inner, inner + 2 * d_state, num_heads  # z, xBC, dt
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False, **dd)
        self.conv2d = DepthwiseConv2d(inner + 2 * d_state, d_conv, silu=True, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.out_norm = LayerNorm(inner, eps=norm_eps, autocast=True, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; linear, convolution and norm layers initialise themselves."""
        init_dt_bias_(self.dt_bias)
        init_uniform_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        z, xBC, dt = apply_linear(self.in_proj, x).split(self.splits, dim=-1)
        xBC, dt = self.conv2d(xBC).flatten(1, 2), dt.flatten(1, 2)  # [B, H, W, D + 2N] -> [B, L, D + 2N]
        A = negative_exp(self.A_log)
        if self._runs_fused(xBC, z):
            norm = self.out_norm
            parameters = A, self.D, self.dt_bias, norm.weight, norm.bias
            y = gated_non_causal_ssd(xBC, dt, z.flatten(1, 2), *parameters, norm.eps)
            return apply_linear(self.out_proj, y.view(z.shape))
        x, B, C = xBC.split([self.splits[0], self.d_state, self.d_state], dim=-1)
        x, B, C = x.unflatten(-1, (self.splits[2], -1)), B.unsqueeze(2), C.unsqueeze(2)
        y = non_causal_ssd(x, dt, A, B, C, self.D, self.dt_bias, dt_softplus=True)
        y = y.flatten(2).view(z.shape)  # [B, L, heads, P] -> [B, H, W, D]
        return apply_linear(self.out_proj, self.out_norm(y) * z)

    def _runs_fused(self, xBC: Tensor, z: Tensor) -> bool:
        """Whether one function may compute all from x to the gate."""
        if not can_replace_modules(xBC) or has_global_hooks():
            return False
        norm = self.out_norm
        tensors = self.A_log, self.D, self.dt_bias, norm.weight, norm.bias
        return (
            is_plain(norm, LayerNorm)
            and all(is_plain_tensor(xBC, tensor) for tensor in tensors)
            and (xBC.dtype == z.dtype == norm.out_dtype(xBC.device.type))
            and fits(z, self.splits[2], self.d_state)
        )
