"""The mixer of Vim on the scan of Mamba-2.

Vision Mamba, https://arxiv.org/abs/2401.09417; Mamba-2, https://arxiv.org/abs/2405.21060
"""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import NUM_DIRECTIONS, bidirectional_conv1d, ssd_scan
from .norm import GatedRmsNorm
from .options import check_counts, check_divides, scaled_channels
from .plain import apply_linear
from .ssm_parameters import init_dt_bias_, init_uniform_A_log_, negative_exp


@register_notrace_module
class BiMamba2(nn.Module):
    """Bidirectional Mamba-2 over a token sequence.

    z, xBC, dt = in_proj(h);  x_k, B_k, C_k = silu(conv1d_k(xBC));  y = mean over directions k of
    ssd_scan_k(x_k, dt + dt_bias_k, A_k, B_k, C_k, D_k);  out = out_proj(rms(y * silu(z)))

    Direction 0 convolves and scans from the first token, direction 1 from the last. Projections and norm are shared.

    Args:
        dim: Token channels d.
        expand: Inner channels are D = int(expand * dim).
        d_state: State dimension N.
        headdim: Channels P of a head.
        d_conv: Width of the causal convolutions.
        norm_eps: Epsilon of the norm.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 64,
        headdim: int = 64,
        d_conv: int = 4,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(dim=dim, d_state=d_state, headdim=headdim, d_conv=d_conv)
        inner = scaled_channels(dim, expand=expand)
        check_divides(inner, 'inner channels', headdim=headdim)
        heads, channels = inner // headdim, inner + 2 * d_state
        self.d_state, self.headdim = d_state, headdim
        self.splits = inner, channels, heads  # z, xBC, dt
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False, **dd)
        self.conv1d_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, channels, d_conv, **dd))
        self.conv1d_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, channels, **dd))
        self.dt_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, heads, **dd))
        self.A_log = nn.Parameter(torch.empty(NUM_DIRECTIONS, heads, **dd))
        self.D = nn.Parameter(torch.empty(NUM_DIRECTIONS, heads, **dd))
        self.norm = GatedRmsNorm(inner, eps=norm_eps, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters except those of the linear layers and the norm, which initialise themselves."""
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            bound = self.conv1d_weight.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        init_dt_bias_(self.dt_bias)
        init_uniform_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        z, xBC, dt = apply_linear(self.in_proj, x).split(self.splits, dim=-1)
        xBC = bidirectional_conv1d(xBC, self.conv1d_weight, self.conv1d_bias, silu=True)  # [B, L, 2, D + 2N]
        along, against = (self._scan(xBC[:, :, k], dt, k) for k in range(NUM_DIRECTIONS))
        return apply_linear(self.out_proj, self.norm(along, z, against))

    def _scan(self, xBC: Tensor, dt: Tensor, direction: int) -> Tensor:
        """One direction: [B, L, D + 2N] and [B, L, H] -> [B, L, D]"""
        x, B, C = xBC.split([self.splits[0], self.d_state, self.d_state], dim=-1)
        A, D, dt_bias = negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]
        x, B, C = x.unflatten(-1, (-1, self.headdim)), B.unsqueeze(2), C.unsqueeze(2)
        options = dict(D=D, dt_bias=dt_bias, dt_softplus=True, reverse=direction == 1)
        return ssd_scan(x, dt, A, B, C, chunk_size=64, **options).flatten(2)
