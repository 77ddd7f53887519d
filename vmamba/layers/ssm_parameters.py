"""Initialisation of the state-space parameters, as in Mamba and Mamba-2.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

import math

import torch
from torch import Tensor

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


@torch.no_grad()
def init_A_log_(A_log: Tensor) -> Tensor:
    """Fills A_log [..., N] with log(1), ..., log(N) (S4D-real), so that A = -exp(A_log) = -1, ..., -N."""
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_uniform_A_log_(A_log: Tensor, low: float = 1.0, high: float = 16.0) -> Tensor:
    """Fills A_log with the logarithm of U(low, high), as in Mamba-2."""
    return A_log.copy_(torch.empty(A_log.shape, device=A_log.device).uniform_(low, high).log_())


@torch.no_grad()
def init_dt_weight_(weight: Tensor) -> Tensor:
    """Fills the step-size projection [..., D, R] from U(-R^-0.5, R^-0.5)."""
    bound = weight.shape[-1] ** -0.5
    return weight.uniform_(-bound, bound)


@torch.no_grad()
def init_dt_bias_(
    bias: Tensor, dt_min: float = _DT_MIN, dt_max: float = _DT_MAX, dt_floor: float = _DT_FLOOR
) -> Tensor:
    """Fills bias so that softplus(bias) is log-uniform in [dt_min, dt_max] and at least dt_floor."""
    dt = torch.rand(bias.shape, device=bias.device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
    dt = dt.exp().clamp(min=dt_floor)
    return bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) in at least fp32."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
