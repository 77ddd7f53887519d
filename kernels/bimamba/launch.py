"""Vim's bidirectional Mamba on Triton: its kernels and products, in order, both ways."""

from functools import lru_cache
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import MAX_PLANS, cdiv
from ..conv1d import conv1d_backward, conv1d_forward
from ..selective_scan.launch import Scan, Targets, scan_backward, scan_forward
from .gate import gate_backward, gate_forward

_ALIGNMENT = 8  # of rows, in elements, for fast matrix products


class ProjectionLayout(NamedTuple):
    """How the projections of a position lie: those of dt, B and C, with zeros before B and at the end up to aligned
    places, without which matrix products are several times slower."""

    rank: int
    dstate: int
    padded_rank: int  # where B begins
    size: int

    @classmethod
    def of(cls, rank: int, dstate: int) -> 'ProjectionLayout':
        padded_rank = cdiv(rank, _ALIGNMENT) * _ALIGNMENT
        return cls(rank, dstate, padded_rank, cdiv(padded_rank + 2 * dstate, _ALIGNMENT) * _ALIGNMENT)

    def low_rank(self, x_dbl: Tensor) -> Tensor:
        """The projections of dt, with the zeros after them, of [2, B * L, size]."""
        return x_dbl.narrow(2, 0, self.padded_rank)

    def coefficients(self, x_dbl: Tensor, shape: Tuple[int, ...]) -> Sequence[Tensor]:
        """B, C and the zeros at the end of [2, B * L, size], each [B, 2, .., L], for maps of a shape [2, B, L, D]."""
        padding = self.size - self.padded_rank - 2 * self.dstate
        x_dbl = _as_sequences(x_dbl.view(*shape[:3], self.size))
        return x_dbl.split([self.padded_rank, self.dstate, self.dstate, padding], dim=2)[1:]

    def x_proj(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, R + 2N, D] -> [2, size, D]"""
        if weight.shape[1] == self.size:
            return weight.to(dtype)
        laid_out = weight.new_zeros(2, self.size, weight.shape[2], dtype=dtype)
        laid_out[:, : self.rank] = weight[:, : self.rank]
        laid_out[:, self.padded_rank : self.padded_rank + 2 * self.dstate] = weight[:, self.rank :]
        return laid_out

    def of_x_proj(self, grad: Tensor) -> Tensor:
        """[2, size, D] -> [2, R + 2N, D]"""
        begin = self.padded_rank
        return torch.cat([grad[:, : self.rank], grad[:, begin : begin + 2 * self.dstate]], dim=1)

    def dt_proj(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, D, R] -> [2, D, padded_rank]"""
        return F.pad(weight.to(dtype), (0, self.padded_rank - self.rank))


projection_layout = lru_cache(maxsize=MAX_PLANS)(ProjectionLayout.of)  # not for symbolic sizes, which have no hash


class CoreOutputs(NamedTuple):
    """The output [B, L, D]; and for the backward pass the projections [2, B * L, size], the mean of both directions
    before the gate, and the states before each tile."""

    out: Tensor
    x_dbl: Optional[Tensor] = None
    mean: Optional[Tensor] = None
    states: Optional[Tensor] = None


class CoreGradients(NamedTuple):
    """Gradients of xz; of the weights as they are laid out, in their dtype; as partial sums in fp32 those of the
    convolutions and of the scans (see `conv1d_backward` and `ScanGradients`); and the output, if it is wanted."""

    xz: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    conv: Tensor
    scans: Tensor
    out: Optional[Tensor]


def core_forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    save: bool,
) -> CoreOutputs:
    """`bimamba_core` of a contiguous xz, with x_proj and dt_proj as `ProjectionLayout` lays them out, in xz's dtype.

    Of the maps of both directions only one exists at a time beside their dt: the scan's output overwrites its input,
    which the backward pass recomputes.
    """
    x, z = xz.chunk(2, dim=-1)
    u = _convolve(x, conv_weight, conv_bias)
    x_dbl = _product(_rows(u), x_proj.mT)
    scan = _scan_of(u, x_dbl, dt_proj, dt_bias, A, D)
    _, states = scan_forward(scan, scan.u, save)
    del scan  # and dt with it
    out, mean = gate_forward(u, z, save)
    return CoreOutputs(out, x_dbl, mean, states) if save else CoreOutputs(out)


def core_backward(
    grad_out: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    saved: CoreOutputs,
    log_A: bool = False,
    recompute_out: bool = False,
) -> CoreGradients:
    """Gradients of `core_forward`; with `log_A` that of log(-A) in place of A's."""
    x, z = xz.chunk(2, dim=-1)
    grad_xz = torch.empty_like(xz)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    grad_y, out = gate_backward(grad_out, saved.mean, z, grad_z, recompute_out)
    u = _convolve(x, conv_weight, conv_bias)
    x_dbl = saved.x_dbl
    scan = _scan_of(u, x_dbl, dt_proj, dt_bias, A, D)
    layout = projection_layout(dt_proj.shape[-1], A.shape[-1])
    grad_u, grad_delta, grad_x_dbl = torch.empty_like(u), torch.empty_like(u), torch.empty_like(x_dbl)
    grad_B, grad_C, padding = layout.coefficients(grad_x_dbl, u.shape)
    if padding.numel():
        padding.zero_()
    targets = Targets(_as_sequences(grad_u), _as_sequences(grad_delta), None, grad_B, grad_C)
    grad_y = grad_y.mT.unsqueeze(1).expand(-1, 2, -1, -1)  # [B, L, D] -> [B, 2, D, L]
    grads = scan_backward(scan, grad_y, None, saved.states, targets, log_A)
    grad_delta, grad_low_rank = _rows(grad_delta), layout.low_rank(grad_x_dbl)
    torch.bmm(grad_delta, dt_proj, out=grad_low_rank)
    grad_dt_proj = _product(grad_delta.mT, layout.low_rank(x_dbl))
    _rows(grad_u).baddbmm_(grad_x_dbl, x_proj)
    grad_x_proj = _product(grad_x_dbl.mT, _rows(u))
    grad_conv = conv1d_backward(grad_u.permute(1, 2, 0, 3), x, conv_weight, conv_bias, True, grad_x)
    return CoreGradients(grad_xz, grad_x_proj, grad_dt_proj, grad_conv, grads.parameters, out)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The scans' input [2, B, L, D]."""
    u = x.new_empty((2, *x.shape))
    conv1d_forward(x, weight, bias, True, out=u.permute(1, 2, 0, 3))
    return u


def _scan_of(u: Tensor, x_dbl: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Scan:
    """The scans of both directions."""
    layout = projection_layout(dt_proj.shape[-1], A.shape[-1])
    delta = _product(layout.low_rank(x_dbl), dt_proj.mT).view(u.shape)
    B, C, _ = layout.coefficients(x_dbl, u.shape)
    u, delta = _as_sequences(u), _as_sequences(delta)
    return Scan(u, delta, A, B, C, D, None, dt_bias, None, softplus=True, reverse=False)


def _as_sequences(x: Tensor) -> Tensor:
    """[2, B, L, E] -> [B, 2, E, L]"""
    return x.permute(1, 0, 3, 2)


def _rows(x: Tensor) -> Tensor:
    """[2, B, L, D] -> [2, B * L, D]"""
    return x.view(2, -1, x.shape[-1])


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The product of a batch of matrices in x's dtype, also within autocast."""
    out = torch.bmm(x, y)
    return out if out.dtype == x.dtype else out.to(x.dtype)
