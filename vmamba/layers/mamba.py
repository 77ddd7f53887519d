"""The Mamba block.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import MambaWeights, can_step_mamba, mamba_step, selective_scan, selective_state_update
from .depthwise import CausalConv1d
from .norm import widen
from .options import check_choice, check_counts, check_step_range, scaled_channels
from .plain import apply_linear, has_global_hooks, is_plain, is_plain_tensor
from .ssm_parameters import init_A_log_, init_dt_bias_, negative_exp


class MambaCache(NamedTuple):
    """What a Mamba block remembers of a sequence; updated in place.

    Attributes:
        conv: The last inputs of the convolution, the newest last, [B, D, d_conv].
        ssm: The state [B, D, N] in fp32.
    """

    conv: Tensor
    ssm: Tensor


# A step of this size makes the state forget all before it: exp(dt * A) is 0 for |A| > 1e-10. A power of 2, so that what
# is divided by it stays exact.
_FORGETTING_STEP = 2.0**40


@register_notrace_module
class Mamba(nn.Module):
    """Mamba over a token sequence, with the constructor and the parameter names of mamba_ssm's `Mamba`.

    x, z = in_proj(h).chunk(2);  u = silu(conv1d(x));  dt, B, C = x_proj(u);
    out = out_proj(selective_scan(u, dt_proj(dt), A, B, C, D) * silu(z)). See `vmamba.kernels.selective_scan`.

    Args:
        d_model: Token channels d.
        d_state: State dimension N.
        d_conv: Width of the causal convolution.
        expand: Inner channels are D = int(expand * d_model).
        dt_rank: Rank R of the step-size projection; 'auto' for ceil(d_model / 16).
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init: Initial weights of the step-size projection: 'random' for uniform in the bound, 'constant' for it.
        dt_scale: Factor of that bound, R^-0.5.
        dt_init_floor: Initial step sizes are at least this.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the projections have biases.
        use_fast_path: Unused: there is one path.
        layer_idx: Stored for callers.
        fp32_scan: Whether step sizes, convolution and scan are in at least fp32 under autocast and in layers of half
            precision; the other projections stay in the lower dtype.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: Union[int, str] = 'auto',
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = 'random',
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: Optional[int] = None,
        device=None,
        dtype=None,
        *,
        fp32_scan: bool = False,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        rank: Any = math.ceil(d_model / 16) if dt_rank == 'auto' else dt_rank
        check_counts(d_model=d_model, d_state=d_state, d_conv=d_conv, dt_rank=rank)
        check_choice(('random', 'constant'), dt_init=dt_init)
        check_step_range(dt_min, dt_max)
        inner = scaled_channels(d_model, expand=expand)
        self.d_state, self.dt_rank, self.layer_idx, self.fp32_scan = d_state, rank, layer_idx, fp32_scan
        self.dt_init, self.dt_scale, self.dt_range = dt_init, dt_scale, (dt_min, dt_max, dt_init_floor)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **dd)
        self.conv1d = CausalConv1d(inner, d_conv, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the state-space parameters; the other layers initialise themselves."""
        bound = self.dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound if self.dt_init == 'random' else bound, bound)
        init_dt_bias_(self.dt_proj.bias, *self.dt_range)
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, cache: Optional[MambaCache] = None, seq_idx: Optional[Tensor] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x; updated to what precedes the next token. Carries no gradients.
            seq_idx: Integers [B, L], the number of the packed sequence of each token; not together with a cache.

        Raises:
            ValueError: If both seq_idx and a cache are given.
        """
        if seq_idx is not None and cache is not None:
            raise ValueError('give seq_idx or a cache, not both: a cache is of one sequence')
        x, z = apply_linear(self.in_proj, x).chunk(2, dim=-1)
        x = widen(x) if self.fp32_scan else x
        u = self.conv1d(x, seq_idx=seq_idx, state=None if cache is None else cache.conv)
        dt, B, C = self._project(u, z.dtype)
        if seq_idx is not None:
            return self.out_proj(self._packed_scan(u, dt, B, C, z, seq_idx))
        y = selective_scan(
            *(u.mT, dt.mT, negative_exp(self.A_log), B.mT, C.mT, self.D, z.mT),
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=cache is not None,
            initial_state=None if cache is None else cache.ssm.clone(),
            out_dtype=z.dtype,
        )
        if cache is not None:
            y, last = y
            cache.ssm.copy_(last.detach())
        return apply_linear(self.out_proj, y.mT)

    def _packed_scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, seq_idx: Tensor) -> Tensor:
        """The scan of packed sequences, [B, L, D]: where a sequence begins, a step forgets the state before it.

        There dt is replaced by a large one and u by u * dt / that, so that dt * B * u stays the same.
        """
        dt, wide = F.softplus(widen(dt) + self.dt_proj.bias), widen(u)
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).unsqueeze(-1)
        driven = torch.where(begins, wide * dt / _FORGETTING_STEP, wide)
        dt = torch.where(begins, _FORGETTING_STEP, dt)
        y = selective_scan(driven.mT, dt.mT, negative_exp(self.A_log), B.mT, C.mT).mT
        return ((y + self.D * wide) * F.silu(widen(z))).to(z.dtype)

    def allocate_cache(self, batch_size: int) -> MambaCache:
        """The cache of a sequence that has not begun, on the parameters' device."""
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        ssm = self.A_log.new_zeros(batch_size, *self.A_log.shape, dtype=wide)
        return MambaCache(self.conv1d.allocate_state(batch_size), ssm)

    @torch.no_grad()
    def step(self, x: Tensor, cache: MambaCache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].
        """
        weights = self._plain_weights() if can_step_mamba(x) else None
        if weights is not None and all(state.is_contiguous() for state in cache):
            return mamba_step(x, *cache, weights)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d.step(widen(x) if self.fp32_scan else x, cache.conv)
        dt, B, C = self._project(u, z.dtype)
        options = dict(dt_bias=self.dt_proj.bias, dt_softplus=True)
        y = selective_state_update(cache.ssm, u, dt, negative_exp(self.A_log), B, C, self.D, z, **options)
        return self.out_proj(y.to(z.dtype))

    def _plain_weights(self) -> Optional[MambaWeights]:
        """The weights for a step in fused kernels, None if modules must be called, as adapters and quantised ones."""
        layers = self.in_proj, self.x_proj, self.dt_proj, self.out_proj
        if has_global_hooks() or not all(is_plain(layer, nn.Linear) for layer in layers):
            return None
        weights = MambaWeights(
            in_proj=self.in_proj.weight,
            conv=self.conv1d.weight.squeeze(1),
            conv_bias=self.conv1d.bias,
            x_proj=self.x_proj.weight,
            dt_proj=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A_log=self.A_log,
            D=self.D,
            out_proj=self.out_proj.weight,
            in_proj_bias=self.in_proj.bias,
            out_proj_bias=self.out_proj.bias,
        )
        return weights if all(weight is None or is_plain_tensor(self.D, weight) for weight in weights) else None

    def _project(self, u: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
        """[..., D], projected in dtype -> step sizes before their bias [..., D], B and C [..., N]"""
        dt, B, C = self.x_proj(u.to(dtype)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if not self.fp32_scan or dt.is_meta:
            return F.linear(dt, self.dt_proj.weight), B, C  # the scan adds the bias in fp32
        with torch.autocast(dt.device.type, enabled=False):
            return F.linear(widen(dt), widen(self.dt_proj.weight)), B, C
