"""The Mamba-2 block.

Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
https://arxiv.org/abs/2405.21060
"""

from math import inf
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import selective_state_update, ssd_scan
from ..kernels.ssd import check_dt_limit
from .depthwise import CausalConv1d
from .norm import GatedRmsNorm, widen
from .options import check_counts, check_divides, check_step_range, scaled_channels
from .plain import apply_linear
from .ssm_parameters import init_dt_bias_, init_uniform_A_log_, negative_exp


class Mamba2Cache(NamedTuple):
    """What a Mamba-2 block remembers of a sequence; updated in place.

    Attributes:
        conv: The last inputs of the convolution, the newest last, [B, d_ssm + 2 * G * N, d_conv].
        ssm: The state [B, H, P, N] in fp32.
    """

    conv: Tensor
    ssm: Tensor


@register_notrace_module
class Mamba2(nn.Module):
    """Mamba-2 over a token sequence, with the constructor and the parameter names of mamba_ssm's `Mamba2`.

    z, xBC, dt = in_proj(h);  x, B, C = silu(conv1d(xBC));  y = ssd_scan(x, dt, A, B, C, D);
    out = out_proj(rms(y * silu(z))). See `vmamba.kernels.ssd_scan`.

    Args:
        d_model: Token channels d.
        d_state: State dimension N.
        d_conv: Width of the causal convolution over x, B and C.
        conv_init: Bound of the uniform initialisation of the convolution; PyTorch's own by default.
        expand: Inner channels are D = int(expand * d_model).
        headdim: Channels P of a head.
        d_ssm: Channels of the scan, all D by default. The other channels are a gated MLP beside it.
        ngroups: Groups G of heads that share B and C.
        A_init_range: Initial -A is uniform in this range.
        D_has_hdim: Whether the skip connection D has a factor per channel, not per head.
        rmsnorm: Normalise and gate the output; otherwise it is gated only.
        norm_before_gate: Gate after the norm instead of before it.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Initial step sizes are at least this.
        dt_limit: Step sizes are clamped to this range.
        bias: Whether the projections have biases.
        conv_bias: Whether the convolution has a bias.
        chunk_size: Without effect: the result does not depend on it.
        use_mem_eff_path: Without effect: there is one path.
        layer_idx: Stored for callers.
        fp32_scan: Whether step sizes, convolution and scan are in at least fp32 under autocast and in layers of half
            precision; the projections stay in the lower dtype.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: Optional[float] = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: Optional[int] = None,
        ngroups: int = 1,
        A_init_range: Tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Tuple[float, float] = (0.0, inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: Optional[int] = None,
        device=None,
        dtype=None,
        *,
        fp32_scan: bool = False,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(d_model=d_model, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups)
        check_counts(chunk_size=chunk_size)
        check_step_range(dt_min, dt_max)
        check_dt_limit(dt_limit)
        inner = scaled_channels(d_model, expand=expand)
        d_ssm = inner if d_ssm is None else d_ssm
        check_counts(d_ssm=d_ssm)
        if d_ssm > inner:
            raise ValueError(f'd_ssm must be at most the {inner} inner channels, got {d_ssm}')
        check_divides(d_ssm, 'channels of the scan', headdim=headdim)
        heads = d_ssm // headdim
        check_divides(heads, 'heads', ngroups=ngroups)
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f'A_init_range must be positive and ascending, got {A_init_range}')
        self.d_state, self.headdim, self.ngroups, self.d_ssm = d_state, headdim, ngroups, d_ssm
        self.conv_init, self.A_init_range = conv_init, A_init_range
        self.dt_init, self.dt_limit = (dt_min, dt_max, dt_init_floor), tuple(dt_limit)
        self.chunk_size, self.layer_idx, self.fp32_scan = chunk_size, layer_idx, fp32_scan
        channels = d_ssm + 2 * ngroups * d_state
        self.splits = inner - d_ssm, inner - d_ssm, d_ssm, channels, heads  # z0, x0, z, xBC, dt
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=bias, **dd)
        self.conv1d = CausalConv1d(channels, d_conv, bias=conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.A_log = nn.Parameter(torch.empty(heads, **dd))
        self.D = nn.Parameter(torch.empty(d_ssm if D_has_hdim else heads, **dd))
        self.norm = GatedRmsNorm(d_ssm, ngroups, norm_before_gate=norm_before_gate, **dd) if rmsnorm else None
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; linear, convolution and norm layers initialise themselves."""
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        init_dt_bias_(self.dt_bias, *self.dt_init)
        init_uniform_A_log_(self.A_log, *self.A_init_range)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, seq_idx: Optional[Tensor] = None, cache: Optional[Mamba2Cache] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            seq_idx: Integers [B, L], the number of the packed sequence of each token; not together with a cache.
            cache: What precedes x; updated to what precedes the next token. Carries no gradients.

        Raises:
            ValueError: If both seq_idx and a cache are given.
        """
        if seq_idx is not None and cache is not None:
            raise ValueError('give seq_idx or a cache, not both: a cache is of one sequence')
        z0, x0, z, xBC, dt = apply_linear(self.in_proj, x).split(self.splits, dim=-1)
        xBC, dt = (widen(xBC), widen(dt)) if self.fp32_scan else (xBC, dt)
        x, B, C = self._split_heads(self.conv1d(xBC, seq_idx=seq_idx, state=None if cache is None else cache.conv))
        y = ssd_scan(
            *(x, dt, negative_exp(self.A_log), B, C, self.chunk_size, self._skip()),
            z=z.unflatten(-1, (-1, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            seq_idx=seq_idx,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=None if cache is None else cache.ssm.clone(),
            return_final_states=cache is not None,
        )
        if cache is not None:
            y, last = y
            cache.ssm.copy_(last.detach())
        return self._project(y.flatten(-2), z0, x0, z)

    def allocate_cache(self, batch_size: int) -> Mamba2Cache:
        """The cache of a sequence that has not begun, on the parameters' device."""
        state = batch_size, self.dt_bias.shape[0], self.headdim, self.d_state
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return Mamba2Cache(self.conv1d.allocate_state(batch_size), self.A_log.new_zeros(state, dtype=wide))

    @torch.no_grad()
    def step(self, x: Tensor, cache: Mamba2Cache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].
        """
        z0, x0, z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        xBC, dt = (widen(xBC), widen(dt)) if self.fp32_scan else (xBC, dt)
        x, B, C = self._split_heads(self.conv1d.step(xBC, cache.conv))
        dt_bias: Optional[Tensor] = None
        if self.dt_limit == (0.0, inf):
            dt_bias = self.dt_bias.unsqueeze(-1).expand(x.shape[1:])  # the kernel adds it and applies softplus
        else:
            dt = F.softplus(widen(dt) + self.dt_bias).clamp(*self.dt_limit)
        D = self._skip()
        y = selective_state_update(
            cache.ssm,
            x,
            dt.unsqueeze(-1).expand(x.shape),
            negative_exp(self.A_log)[:, None, None].expand(cache.ssm.shape[1:]),
            B,
            C,
            D if D.ndim == 2 else D.unsqueeze(-1).expand(x.shape[1:]),
            z.unflatten(-1, (-1, self.headdim)) if self.norm is None else None,
            dt_bias=dt_bias,
            dt_softplus=dt_bias is not None,
        )
        return self._project(y.flatten(-2), z0, x0, z)

    def _split_heads(self, xBC: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """[..., d_ssm + 2 * G * N] -> x [..., H, P], B and C [..., G, N]"""
        states = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, states, states], dim=-1)
        B, C = (tensor.unflatten(-1, (self.ngroups, self.d_state)) for tensor in (B, C))
        return x.unflatten(-1, (-1, self.headdim)), B, C

    def _skip(self) -> Tensor:
        """D as [H] or [H, P]."""
        per_head = self.D.shape == self.dt_bias.shape and self.D.shape[0] != self.d_ssm
        return self.D if per_head else self.D.unflatten(0, (-1, self.headdim))

    def _project(self, y: Tensor, z0: Tensor, x0: Tensor, z: Tensor) -> Tensor:
        """out_proj of the scan's output [..., d_ssm], normalised, beside the gated MLP."""
        if self.norm is not None:
            y = self.norm(y, z)
        if x0.shape[-1]:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return apply_linear(self.out_proj, y.to(z.dtype))
