"""S4D: the diagonal state-space layer.

On the Parameterization and Initialization of Diagonal State Space Models, https://arxiv.org/abs/2206.11893

It does not depend on its input but linearly: the layer is a long convolution of each channel.
"""

import math
from typing import Dict, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import diagonal_kernel, diagonal_state, long_conv
from ..kernels._check import check
from .norm import widen
from .options import check_choice, check_counts, check_divides, check_rates, check_step_range

INITS = 'lin', 'inv', 'legs', 'real'
DISCRETISATIONS = 'zoh', 'bilinear'


class Diagonal(NamedTuple):
    """A discrete diagonal state-space model: x_l = exp(log_decay) * x_{l-1} + gain * u_l, y_l = 2 * Re(C x_l).

    Attributes:
        log_decay: Complex [H, M].
        gain: Complex [H, M].
        C: Complex [k, H, M], of k outputs.
    """

    log_decay: Tensor
    gain: Tensor
    C: Tensor

    def kernel(self, length: int) -> Tensor:
        """y after an input of 1 at l = 0: [k, H, length]"""
        return diagonal_kernel(self.log_decay, self.C * self.gain, length)

    def response(self, state: Tensor, length: int) -> Tensor:
        """y of a state before the first position and no input: complex [B, ..., H, M] -> [B, ..., k, H, length]"""
        coefficient = self.C * torch.exp(self.log_decay) * state.unsqueeze(-3)
        return diagonal_kernel(self.log_decay, coefficient, length)

    def last_state(self, state: Tensor, u: Tensor) -> Tensor:
        """The state after an input [..., H, L]."""
        decay = torch.exp(self.log_decay * u.shape[-1])
        return decay * state + self.gain * diagonal_state(self.log_decay, u)

    def step(self, state: Tensor, u: Tensor) -> Tuple[Tensor, Tensor]:
        """The next state, and y [..., k, H], from the input [..., H]."""
        state = torch.exp(self.log_decay) * state + self.gain * u.unsqueeze(-1)
        return state, 2 * (self.C * state.unsqueeze(-3)).sum(dim=-1).real


def discretise(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, method: str) -> Diagonal:
    """x' = A x + B u with steps dt, by zero-order hold or the bilinear rule.

    Args:
        A: Complex [H, M], with negative real parts.
        B: Complex [H, M].
        C: Complex [k, H, M].
        dt: [H].
        method: 'zoh' or 'bilinear'.
    """
    dtype, wide = A.dtype, torch.complex128  # small steps cancel in the gradients
    A, B, dt = A.to(wide), B.to(wide), dt.unsqueeze(-1).to(torch.float64)
    step = dt * A
    if method == 'zoh':
        log_decay, gain = step, B * torch.expm1(step) / A
    else:
        log_decay, gain = torch.log1p(step / 2) - torch.log1p(-step / 2), B * dt / (1 - step / 2)
    return Diagonal(log_decay.to(dtype), gain.to(dtype), C)


def check_ssm(d_state: int, dropout: float, disc: str, l_max: Optional[int], dt_min: float, dt_max: float) -> None:
    """Checks the options that all layers with a diagonal model have; see `S4D`."""
    check_counts(d_state=d_state)
    check_rates(dropout=dropout)
    check_choice(DISCRETISATIONS, disc=disc)
    if l_max is not None:
        check_counts(l_max=l_max)
    if d_state % 2:
        raise ValueError(f'd_state must be even, since states are conjugate pairs, got {d_state}')
    check_step_range(dt_min, dt_max)


def init_imaginary(states: int, init: str) -> Tensor:
    """Magnitudes of the imaginary parts of A for M of 2M states: S4D-Lin, S4D-Inv, S4D-LegS, or 0 for S4D-Real."""
    n = torch.arange(states)
    if init == 'lin':
        return math.pi * n
    if init == 'inv':
        return 2 * states / math.pi * (2 * states / (2 * n + 1) - 1)
    return _legs(states)[0] if init == 'legs' else torch.zeros(states)


def _legs(states: int) -> Tuple[Tensor, Tensor]:
    """The normal part of HiPPO-LegS in its eigenbasis, of eigenvalues -1/2 - i w: w > 0, descending, and B."""
    n = torch.arange(2 * states, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    A = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    P = root / math.sqrt(2)
    skew = A + P[:, None] * P + 0.5 * torch.eye(2 * states, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(1j * skew)  # of 1j * (-i w) = w, ascending
    B = vectors.mH @ root.to(vectors.dtype)
    return eigenvalues[states:].flip(0), B[states:].flip(0)


def init_log_dt_(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    nn.init.uniform_(log_dt, math.log(dt_min), math.log(dt_max))


def init_complex_normal_(pairs: Tensor) -> None:
    """Pairs (real, imaginary) [..., 2] of complex numbers of variance 1."""
    nn.init.normal_(pairs, std=math.sqrt(0.5))


class _MinimalKernel(nn.Module):
    """Parameters of the layout 'minimal': A = -exp(log_A_real) + i A_imag, B = 1, one output."""

    def __init__(self, dim: int, states: int, dt_range: Tuple[float, float], device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dt_range = dt_range
        self.log_dt = nn.Parameter(torch.empty(dim, **dd))
        self.C = nn.Parameter(torch.empty(dim, states, 2, **dd))
        self.log_A_real = nn.Parameter(torch.empty(dim, states, **dd))
        self.A_imag = nn.Parameter(torch.empty(dim, states, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_log_dt_(self.log_dt, *self.dt_range)
        init_complex_normal_(self.C)
        nn.init.constant_(self.log_A_real, math.log(0.5))
        self.A_imag.copy_(init_imaginary(self.A_imag.shape[-1], 'lin').expand_as(self.A_imag))

    def forward(self) -> Diagonal:
        A = torch.complex(-torch.exp(widen(self.log_A_real)), widen(self.A_imag))
        C = torch.view_as_complex(widen(self.C)).unsqueeze(0)
        return discretise(A, torch.ones_like(A), C, torch.exp(widen(self.log_dt)), 'zoh')


class BlockKernel(nn.Module):
    """Parameters of the layout 'block': A = -exp(A_real) - i A_imag and B, each of S, in turn, for the H channels."""

    def __init__(
        self,
        dim: int,
        states: int,
        outputs: int,
        n_ssm: int,
        init: str,
        disc: str,
        dt_range: Tuple[float, float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dt_range, self.init, self.disc = dt_range, init, disc
        self.inv_dt = nn.Parameter(torch.empty(dim, 1, **dd))
        self.C = nn.Parameter(torch.empty(outputs, dim, states, 2, **dd))
        self.B = nn.Parameter(torch.empty(1, n_ssm, states, 2, **dd))
        self.A_real = nn.Parameter(torch.empty(n_ssm, states, **dd))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, states, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        states = self.A_imag.shape[-1]
        init_log_dt_(self.inv_dt, *self.dt_range)
        init_complex_normal_(self.C)
        self.A_imag.copy_(init_imaginary(states, self.init).expand_as(self.A_imag))
        real = torch.arange(1, states + 1) if self.init == 'real' else torch.full((states,), 0.5)
        self.A_real.copy_(torch.log(real).expand_as(self.A_real))
        self.B.copy_(torch.tensor([1.0, 0.0]).expand_as(self.B))
        if self.init == 'legs':
            B = torch.view_as_real(_legs(states)[1]).clamp(-2, 2)
            self.B.copy_(B.expand_as(self.B))

    def forward(self) -> Diagonal:
        copies = self.inv_dt.shape[0] // self.A_real.shape[0]
        A = torch.complex(-torch.exp(widen(self.A_real)), -widen(self.A_imag)).repeat(copies, 1)
        B = torch.view_as_complex(widen(self.B))[0].repeat(copies, 1)
        C = torch.view_as_complex(widen(self.C))
        return discretise(A, B, C, torch.exp(widen(self.inv_dt).squeeze(-1)), self.disc)


class BlockConv(nn.Module):
    """The convolution of the layout 'block', with the skip connection D [c, H]."""

    def __init__(self, kernel: BlockKernel, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(channels, kernel.inv_dt.shape[0], device=device, dtype=dtype))
        self.kernel = kernel
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.D)


class S4DCache(NamedTuple):
    """What an S4D layer remembers of a sequence; updated in place.

    Attributes:
        state: Complex [B, H, M].
    """

    state: Tensor


@register_notrace_module
class S4D(nn.Module):
    """S4D over a token sequence, with the parameter names of its authors' layers.

    Per channel, x' = A x + B u with diagonal complex A, discretised by the step size exp(log_dt);
    y = 2 * Re(C x) + D u;  out = GLU(output_linear(gelu(y))). Computed as a convolution by FFT, in at least fp32.

    Args:
        d_model: Token channels H.
        d_state: States N of a channel, in N / 2 conjugate pairs.
        dropout: Dropout before output_linear.
        layout: 'minimal' for the parameters of the authors' minimal layer: causal S4D-Lin by zero-order hold. 'block'
            for those of their full block, which has all of the options below.
        init: Imaginary parts of A: 'lin', 'inv', 'legs', or 'real' for none.
        disc: Discretisation, 'zoh' or 'bilinear'.
        channels: Outputs c of each channel; output_linear mixes them all.
        n_ssm: Number of different A and B, a divisor of d_model; d_model by default.
        bidirectional: Add a second kernel over the later positions.
        l_max: Cut the kernels at this length.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float = 0.0,
        layout: str = 'minimal',
        init: str = 'lin',
        disc: str = 'zoh',
        channels: int = 1,
        n_ssm: Optional[int] = None,
        bidirectional: bool = False,
        l_max: Optional[int] = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        n_ssm = d_model if n_ssm is None else n_ssm
        check_counts(d_model=d_model, channels=channels, n_ssm=n_ssm)
        check_choice(('minimal', 'block'), layout=layout)
        check_choice(INITS, init=init)
        check_ssm(d_state, dropout, disc, l_max, dt_min, dt_max)
        check_divides(d_model, 'channels', n_ssm=n_ssm)
        self.d_model, self.layout, self.bidirectional, self.l_max = d_model, layout, bidirectional, l_max
        dt_range = dt_min, dt_max
        if layout == 'minimal':
            if (init, disc, channels, n_ssm, bidirectional, l_max) != ('lin', 'zoh', 1, d_model, False, None):
                raise ValueError(
                    "layout='minimal' has the defaults of init, disc, channels, n_ssm, bidirectional and l_max only: "
                    "give layout='block' with other ones"
                )
            self.D = nn.Parameter(torch.empty(d_model, **dd))
            self.kernel = _MinimalKernel(d_model, d_state // 2, dt_range, **dd)
            self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1, **dd), nn.GLU(dim=-2))
        else:
            outputs = channels * (2 if bidirectional else 1)
            kernel = BlockKernel(d_model, d_state // 2, outputs, n_ssm, init, disc, dt_range, **dd)
            self.layer = BlockConv(kernel, channels, **dd)
            self.output_linear = nn.Sequential(nn.Linear(channels * d_model, 2 * d_model, **dd), nn.GLU(dim=-1))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises D of the minimal layout; kernels and linear layers initialise themselves."""
        if self.layout == 'minimal':
            nn.init.normal_(self.D)

    def forward(self, x: Tensor, cache: Optional[S4DCache] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: Tokens [B, L, d].
            cache: What precedes x; updated to what precedes the next token. Carries no gradients.
        """
        check('S4D', self._sizes(cache), x=(x, 'B L>0 d'))
        u = widen(x).mT  # [B, L, H] -> [B, H, L]
        length = u.shape[-1] if self.l_max is None else min(u.shape[-1], self.l_max)
        ssm, D = self._parts()
        kernel, ahead = ssm.kernel(length), None
        if self.bidirectional:
            kernel, ahead = kernel.chunk(2)
        y = long_conv(u.unsqueeze(1), kernel, ahead) + D.unsqueeze(-1) * u.unsqueeze(1)  # [B, c, H, L]
        if cache is not None:
            y = y + ssm.response(cache.state.clone(), length)
            cache.state.copy_(ssm.last_state(cache.state, u).detach())
        return self._project(y.flatten(1, 2).mT.to(x.dtype))

    def allocate_cache(self, batch_size: int) -> S4DCache:
        """The cache of a sequence that has not begun, on the parameters' device.

        Raises:
            ValueError: If the layer is bidirectional, or its kernels are cut.
        """
        if self.bidirectional or self.l_max is not None:
            raise ValueError(
                'an S4D layer has steps only if it is causal and its kernel is not cut, '
                f'got bidirectional={self.bidirectional}, l_max={self.l_max}'
            )
        ssm, _ = self._parts()
        return S4DCache(ssm.log_decay.new_zeros(batch_size, *ssm.log_decay.shape))

    @torch.no_grad()
    def step(self, x: Tensor, cache: S4DCache) -> Tensor:
        """The output for one more token, equal to that of the whole sequence; without gradients.

        Args:
            x: Token [B, d].
            cache: What precedes the token; updated.

        Returns:
            [B, d].
        """
        check('S4D', self._sizes(cache), x=(x, 'B d'))
        u = widen(x)
        ssm, D = self._parts()
        state, y = ssm.step(cache.state, u)
        cache.state.copy_(state)
        y = y + D * u.unsqueeze(1)  # [B, c, H]
        return self._project(y.flatten(1).unsqueeze(1).to(x.dtype)).squeeze(1)

    def no_weight_decay(self) -> Set[str]:
        """Names of the step sizes, A and B, which the authors train without weight decay."""
        ssm = ('.log_dt', '.log_A_real', '.A_imag', '.inv_dt', '.A_real', '.B')
        return {name for name, _ in self.named_parameters() if name.endswith(ssm)}

    def _sizes(self, cache: Optional[S4DCache]) -> Dict[str, int]:
        """What x must have, by name."""
        return {'d': self.d_model, **({} if cache is None else {'B': cache.state.shape[0]})}

    def _parts(self) -> Tuple[Diagonal, Tensor]:
        """The discrete model, and D [c, H]."""
        if self.layout == 'minimal':
            return self.kernel(), widen(self.D).unsqueeze(0)
        return self.layer.kernel(), widen(self.layer.D)

    def _project(self, y: Tensor) -> Tensor:
        """[B, L, c * H] -> [B, L, H]"""
        y = self.dropout(F.gelu(y))
        return self.output_linear(y.mT).mT if self.layout == 'minimal' else self.output_linear(y)
