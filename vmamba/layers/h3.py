"""H3: two state-space models between three projections.

Hungry Hungry Hippos: Towards Language Modeling with State Space Models, https://arxiv.org/abs/2212.14052
"""

import math
from typing import Dict, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import long_conv
from ..kernels._check import check
from .norm import widen
from .options import check_choice, check_counts, check_divides
from .s4d import Diagonal, check_ssm, discretise, init_complex_normal_, init_imaginary, init_log_dt_


class _ShiftKernel(nn.Module):
    """A state-space model whose state shifts by one entry per step: B [d, N] and C [1, d, N]."""

    def __init__(self, dim: int, states: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.B = nn.Parameter(torch.empty(dim, states, **dd))
        self.C = nn.Parameter(torch.empty(1, dim, states, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.C.shape[-1] ** -0.5
        nn.init.uniform_(self.C, -bound, bound)
        self.B.zero_()[:, 0] = 1

    def forward(self, length: int) -> Tensor:
        """K_l = sum_n C_{n + l} B_n: [d, min(length, N)]"""
        states = self.B.shape[-1]
        return torch.einsum('dln,dn->dl', _shifted(widen(self.C[0]))[:, : min(length, states)], widen(self.B))

    def response(self, state: Tensor, length: int) -> Tensor:
        """Output of a state before the first position [B, d, N] and no input: [B, d, length]"""
        shifted = F.pad(_shifted(widen(self.C[0]))[:, 1:], (0, 0, 0, 1))  # after l + 1 shifts
        return _pad_to(torch.einsum('dln,bdn->bdl', shifted, state)[..., :length], length)

    def last_state(self, state: Tensor, u: Tensor) -> Tensor:
        """The state after an input [B, d, L]."""
        states, seqlen = self.B.shape[-1], u.shape[-1]
        recent = _pad_to(u.flip(-1)[..., :states], states)
        kept = F.pad(state, (min(seqlen, states), 0))[..., :states]
        return kept + long_conv(recent, widen(self.B))

    def step(self, state: Tensor, u: Tensor) -> Tuple[Tensor, Tensor]:
        """The next state and the output [B, d] from the input [B, d]."""
        state = F.pad(state, (1, 0))[..., :-1] + widen(self.B) * u.unsqueeze(-1)
        return state, (widen(self.C[0]) * state).sum(dim=-1)


class _DiagonalKernel(nn.Module):
    """A diagonal state-space model per head: A = -exp(inv_A_real) + i A_imag."""

    def __init__(
        self,
        heads: int,
        states: int,
        init: str,
        disc: str,
        dt_range: Tuple[float, float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.init, self.disc, self.dt_range = init, disc, dt_range
        self.log_dt = nn.Parameter(torch.empty(heads, **dd))
        self.C = nn.Parameter(torch.empty(1, heads, states, 2, **dd))
        self.B = nn.Parameter(torch.empty(heads, states, 2, **dd))
        self.inv_A_real = nn.Parameter(torch.empty(heads, states, **dd))
        self.A_imag = nn.Parameter(torch.empty(heads, states, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_log_dt_(self.log_dt, *self.dt_range)
        init_complex_normal_(self.C)
        self.B.copy_(torch.tensor([1.0, 0.0]).expand_as(self.B))
        nn.init.constant_(self.inv_A_real, math.log(0.5))
        self.A_imag.copy_(init_imaginary(self.A_imag.shape[-1], self.init).expand_as(self.A_imag))

    def forward(self) -> Diagonal:
        A = torch.complex(-torch.exp(widen(self.inv_A_real)), widen(self.A_imag))
        B, C = torch.view_as_complex(widen(self.B)), torch.view_as_complex(widen(self.C))
        return discretise(A, B, C, torch.exp(widen(self.log_dt)), self.disc)


class _Kernel(nn.Module):
    """The official names have the parameters of both models under `kernel`."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel


class H3Cache(NamedTuple):
    """What an H3 layer remembers of a sequence; updated in place.

    Attributes:
        shift: State of the shift model [B, d, N].
        diagonal: State of the diagonal model, complex [B, e, e, d / e, M].
    """

    shift: Tensor
    diagonal: Tensor


@register_notrace_module
class H3(nn.Module):
    """H3 over a token sequence, with the parameter names of its authors' layer.

    out = output_linear(q * SSM_diagonal(SSM_shift(k) * v)), where q, k, v are projections of the tokens. With heads of
    e channels, k and v have an outer product per head, and q is multiplied to it as a row vector. Computed as two
    convolutions by FFT, in at least fp32.

    Args:
        d_model: Token channels d.
        d_state: State dimension N; the diagonal model has N / 2 conjugate pairs.
        head_dim: Channels e of a head.
        l_max: Cut both kernels at this length.
        dropout: Dropout of the output.
        init: Imaginary parts of A: 'lin' or 'inv'.
        disc: Discretisation, 'bilinear' or 'zoh'.
        bidirectional: Average with the same against the sequence, which has models of its own (suffix `_b`) and shares
            the projections.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        use_fast_fftconv: Unused: there is one path.
        layer_idx: Stored for callers.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        l_max: Optional[int] = None,
        dropout: float = 0.0,
        init: str = 'lin',
        disc: str = 'bilinear',
        bidirectional: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        use_fast_fftconv: bool = False,
        layer_idx: Optional[int] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_counts(d_model=d_model, head_dim=head_dim)
        check_choice(('lin', 'inv'), init=init)
        check_ssm(d_state, dropout, disc, l_max, dt_min, dt_max)
        check_divides(d_model, 'channels', head_dim=head_dim)
        self.d_model, self.head_dim, self.l_max, self.layer_idx = d_model, head_dim, l_max, layer_idx
        heads = d_model // head_dim
        self.q_proj = nn.Linear(d_model, d_model, **dd)
        self.k_proj = nn.Linear(d_model, d_model, **dd)
        self.v_proj = nn.Linear(d_model, d_model, **dd)
        self.suffixes = ('', '_b') if bidirectional else ('',)
        for suffix in self.suffixes:
            diagonal = _DiagonalKernel(heads, d_state // 2, init, disc, (dt_min, dt_max), **dd)
            self.add_module(f'ssm_k_kernel{suffix}', _Kernel(_ShiftKernel(d_model, d_state, **dd)))
            self.register_parameter(f'ssm_k_D{suffix}', nn.Parameter(torch.empty(d_model, **dd)))
            self.add_module(f'kernel{suffix}', _Kernel(diagonal))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.empty(heads, **dd)))
        self.output_linear = nn.Linear(d_model, d_model, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the skip connections; kernels and linear layers initialise themselves."""
        for suffix in self.suffixes:
            _, skip, _, D = self._models(suffix)
            nn.init.normal_(skip)
            nn.init.normal_(D)

    def forward(self, x: Tensor, cache: Optional[H3Cache] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x; updated to what precedes the next token. Carries no gradients.
        """
        check('H3', self._sizes(cache), x=(x, 'B L>0 d'))
        q, k, v = (widen(proj(x)).mT for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, d, L]
        y = self._run(q, k, v, '', cache)
        if len(self.suffixes) > 1:
            q, k, v = (tensor.flip(-1) for tensor in (q, k, v))
            y = (y + self._run(q, k, v, '_b', None).flip(-1)) / 2
        return self._project(y.mT.to(x.dtype))

    def _run(self, q: Tensor, k: Tensor, v: Tensor, suffix: str, cache: Optional[H3Cache]) -> Tensor:
        """One direction: three of [B, d, L] -> [B, d, L]"""
        seqlen = q.shape[-1]
        length = seqlen if self.l_max is None else min(seqlen, self.l_max)
        shift, skip, diagonal, D = self._models(suffix)
        u = long_conv(k, shift(length)) + widen(skip).unsqueeze(-1) * k
        if cache is not None:
            u = u + shift.response(cache.shift.clone(), seqlen)
            cache.shift.copy_(shift.last_state(cache.shift, k).detach())
        w = self._outer(u, v)  # [B, e, e, heads, L]
        y = long_conv(w, diagonal.kernel(length)[0]) + widen(D).unsqueeze(-1) * w
        if cache is not None:
            y = y + diagonal.response(cache.diagonal.clone(), seqlen).squeeze(-3)
            cache.diagonal.copy_(diagonal.last_state(cache.diagonal, w).detach())
        return self._contract(q, y)

    def _models(self, suffix: str = '') -> Tuple[_ShiftKernel, Tensor, Diagonal, Tensor]:
        """The shift model and its skip connection, the discrete diagonal model and its skip connection."""
        shift, diagonal = (getattr(self, f'{name}{suffix}').kernel for name in ('ssm_k_kernel', 'kernel'))
        return shift, getattr(self, f'ssm_k_D{suffix}'), diagonal(), getattr(self, f'D{suffix}')

    def allocate_cache(self, batch_size: int) -> H3Cache:
        """The cache of a sequence that has not begun, on the parameters' device.

        Raises:
            ValueError: If the layer is bidirectional, or its kernels are cut.
        """
        bidirectional = len(self.suffixes) > 1
        if bidirectional or self.l_max is not None:
            raise ValueError(
                'an H3 layer has steps only if it is causal and its kernels are not cut, '
                f'got bidirectional={bidirectional}, l_max={self.l_max}'
            )
        shift, _, diagonal, _ = self._models()
        wide, log_decay = torch.promote_types(shift.B.dtype, torch.float32), diagonal.log_decay
        state = batch_size, self.head_dim, self.head_dim, *log_decay.shape
        return H3Cache(shift.B.new_zeros(batch_size, *shift.B.shape, dtype=wide), log_decay.new_zeros(state))

    @torch.no_grad()
    def step(self, x: Tensor, cache: H3Cache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].
        """
        check('H3', self._sizes(cache), x=(x, 'B d'))
        q, k, v = (widen(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        shift, skip, diagonal, D = self._models()
        state, u = shift.step(cache.shift, k)
        cache.shift.copy_(state)
        w = self._outer((u + widen(skip) * k).unsqueeze(-1), v.unsqueeze(-1)).squeeze(-1)
        state, y = diagonal.step(cache.diagonal, w)
        cache.diagonal.copy_(state)
        y = y.squeeze(-2) + widen(D) * w
        return self._project(self._contract(q.unsqueeze(-1), y.unsqueeze(-1)).squeeze(-1).to(x.dtype))

    def _sizes(self, cache: Optional[H3Cache]) -> Dict[str, int]:
        """What x must have, by name."""
        return {'d': self.d_model, **({} if cache is None else {'B': cache.shift.shape[0]})}

    def no_weight_decay(self) -> Set[str]:
        """Names of the step sizes, and of A and B of the diagonal model."""
        names = 'log_dt', 'inv_A_real', 'A_imag', 'B'
        return {f'kernel{suffix}.kernel.{name}' for suffix in self.suffixes for name in names}

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """w[i, j, h] = k[h * e + i] * v[h * e + j]: two of [B, d, L] -> [B, e, e, heads, L]"""
        k, v = (tensor.unflatten(1, (-1, self.head_dim)).transpose(1, 2) for tensor in (k, v))  # [B, e, heads, L]
        return k.unsqueeze(2) * v.unsqueeze(1)

    def _contract(self, q: Tensor, y: Tensor) -> Tensor:
        """out[h * e + j] = sum_i q[h * e + i] * y[i, j, h]: [B, d, L] and [B, e, e, heads, L] -> [B, d, L]"""
        q = q.unflatten(1, (-1, self.head_dim)).transpose(1, 2)  # [B, e, heads, L]
        return (q.unsqueeze(2) * y).sum(dim=1).transpose(1, 2).flatten(1, 2)

    def _project(self, y: Tensor) -> Tensor:
        return self.dropout(self.output_linear(y))


def _shifted(taps: Tensor) -> Tensor:
    """taps_{n + l}, zero beyond the last: [d, N] -> [d, N (l), N (n)]"""
    states = taps.shape[-1]
    return F.pad(taps, (0, states - 1)).unfold(-1, states, 1)


def _pad_to(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (0, length - x.shape[-1]))
