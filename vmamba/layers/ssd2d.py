"""VMamba's mixer on the scan of Mamba-2.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166; Mamba-2, https://arxiv.org/abs/2405.21060
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import NUM_ROUTES, ssd_scan
from .depthwise import DepthwiseConv2d
from .norm import LayerNorm
from .options import check_counts, check_divides, scaled_channels
from .plain import apply_linear
from .ssm_parameters import negative_exp


@register_notrace_module
class SSD2D(nn.Module):
    """2-D scan of a channels-last map by state space duality.

    x = gelu(conv2d(in_proj(h)));  dt_k, B_k, C_k = x_proj_k(x);  y = sum over routes k of
    ssd_scan_k(x, dt_k + dt_bias_k, A_k, B_k, C_k, D_k);  out = out_proj(LayerNorm(y))

    The four routes over the map are those of `vmamba.kernels.ss2d_scan`; each has its own parameters.

    Args:
        dim: Channels d of the map.
        ssm_ratio: Inner channels are D = int(ssm_ratio * dim).
        d_state: State dimension N.
        num_heads: Heads R of a route, ceil(dim / 16) by default; they share the inner channels equally.
        d_conv: Odd kernel size of the depthwise convolution.
        norm_eps: Epsilon of the LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 1.0,
        d_state: int = 64,
        num_heads: Optional[int] = None,
        d_conv: int = 3,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        heads = math.ceil(dim / 16) if num_heads is None else num_heads
        check_counts(dim=dim, d_state=d_state, num_heads=heads, d_conv=d_conv)
        inner = scaled_channels(dim, ssm_ratio=ssm_ratio)
        check_divides(inner, 'inner channels', num_heads=heads)
        self.splits = heads, d_state, d_state  # dt, B, C
        self.in_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.conv2d = DepthwiseConv2d(inner, d_conv, bias=False, **dd)
        self.x_proj = nn.Linear(inner, NUM_ROUTES * sum(self.splits), bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(NUM_ROUTES, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(NUM_ROUTES, heads, **dd))
        self.D = nn.Parameter(torch.empty(NUM_ROUTES, heads, inner // heads, **dd))
        self.out_norm = LayerNorm(inner, eps=norm_eps, autocast=True, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; linear, convolution and norm layers initialise themselves."""
        nn.init.uniform_(self.dt_bias, 0, 0.1)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        x = F.gelu(self.conv2d(apply_linear(self.in_proj, x)))
        height, width = x.shape[1:3]
        x_dbl = _along_routes(apply_linear(self.x_proj, x).unflatten(-1, (NUM_ROUTES, -1)))  # [B, L, 4, R + 2N]
        dt, B, C = x_dbl.split(self.splits, dim=-1)
        x = _along_routes(x.unsqueeze(3).expand(-1, -1, -1, NUM_ROUTES, -1))  # [B, L, 4, D]
        y = ssd_scan(
            x.unflatten(-1, (self.splits[0], -1)).flatten(2, 3),  # [B, L, 4 * R, P]
            dt.flatten(2),
            negative_exp(self.A_log).flatten(),
            B,
            C,
            chunk_size=64,
            D=self.D.flatten(0, 1),
            dt_bias=self.dt_bias.flatten(),
            dt_softplus=True,
        )
        y = _merge_routes(y.unflatten(2, (NUM_ROUTES, -1)).flatten(3), height, width)
        return apply_linear(self.out_proj, self.out_norm(y))


def _along_routes(x: Tensor) -> Tensor:
    """Puts the pixels of each route's map in its order: [B, H, W, 4, C] -> [B, L, 4, C]"""
    by_row, by_column = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    routes = by_row[:, :, 0], by_column[:, :, 1], by_row[:, :, 2].flip(1), by_column[:, :, 3].flip(1)
    return torch.stack(routes, dim=2)


def _merge_routes(y: Tensor, height: int, width: int) -> Tensor:
    """Sums the routes at the pixels that they visit: [B, L, 4, C] -> [B, H, W, C]"""
    by_row, by_column = (y[:, :, k] + y[:, :, k + 2].flip(1) for k in (0, 1))
    return by_row.unflatten(1, (height, width)) + by_column.unflatten(1, (width, height)).transpose(1, 2)
