"""The core of Vim's bidirectional Mamba on the Triton kernels, as an operator of torch."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import device_of
from .arithmetic import parts
from .columns import launch as columns
from .columns.config import fit
from .columns.launch_backward import Targets, backward
from .columns.launch_forward import forward
from .conv1d_launch import conv_backward, conv_forward
from .direct import differentiable
from .gate import gate_forward, gate_gradients
from .sequences import Scan

_ALIGNMENT = 8  # of rows, in elements, for fast matrix products


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gated mean of both directions, and for the backward pass, if it is kept: the projections [2, B, L, E] with E
    rounded up, the mean before the gate, and the states before each tile.

    Of the maps of both directions only one is there at a time beside their steps: the scan's output overwrites its
    input, which the backward pass makes again.
    """
    with device_of(xz):
        x, z = xz.contiguous().chunk(2, dim=-1)
        u = _convolve(x, conv_weight, conv_bias)
        layout = _Layout.of(dt_weight, A)
        x_dbl = _product(u.flatten(1, 2), layout.x_proj(x_proj_weight, u.dtype).mT).unflatten(1, u.shape[1:3])
        scan = _scan(u, x_dbl, layout.dt_proj(dt_weight, u.dtype), dt_bias, A, D)
        _, states = forward(scan, scan.u, keep, fit(columns.CONFIG, A.shape[-1]))
        del scan  # and the steps with it
        out, mean = gate_forward(u, z, keep)
    return (out, x_dbl, mean, states) if keep else (out, *(A.new_empty(0) for _ in range(3)))


bimamba_fused = torch.library.custom_op('vmamba::bimamba_fused', _forward, mutates_args=())


@bimamba_fused.register_fake
def _(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D, keep):
    batch, seqlen, double = xz.shape
    out = xz.new_empty(batch, seqlen, double // 2)
    if not keep:
        return (out, *(A.new_empty(0) for _ in range(3)))
    _, dim, dstate = A.shape
    projections = xz.new_empty(2, batch, seqlen, _Layout.of(dt_weight, A).size)
    slots = parts(seqlen, columns.STEPS) + 1
    states = A.new_empty(2 * batch, slots, dstate, dim, dtype=torch.float32)
    return out, projections, torch.empty_like(out), states


class _Layout(NamedTuple):
    """How the projections of a position lie: those of dt, B and C, with zeros before B and at the end up to aligned
    places, without which matrix products are several times slower."""

    rank: int
    dstate: int

    @classmethod
    def of(cls, dt_weight: Tensor, A: Tensor) -> '_Layout':
        return cls(dt_weight.shape[-1], A.shape[-1])

    @property
    def B(self) -> int:
        """Where B begins."""
        return parts(self.rank, _ALIGNMENT) * _ALIGNMENT

    @property
    def size(self) -> int:
        return parts(self.B + 2 * self.dstate, _ALIGNMENT) * _ALIGNMENT

    def split(self, x_dbl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt with the zeros after it, B and C of [..., size]."""
        return x_dbl[..., : self.B], *(x_dbl[..., self.B + i * self.dstate :][..., : self.dstate] for i in range(2))

    def x_proj(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, R + 2N, D] -> [2, size, D]"""
        if weight.shape[1] == self.size:
            return weight.to(dtype)
        laid_out = weight.new_zeros(2, self.size, weight.shape[2], dtype=dtype)
        laid_out[:, : self.rank] = weight[:, : self.rank]
        laid_out[:, self.B : self.B + 2 * self.dstate] = weight[:, self.rank :]
        return laid_out

    def of_x_proj(self, grad: Tensor) -> Tensor:
        """[2, size, D] -> [2, R + 2N, D]"""
        return torch.cat([grad[:, : self.rank], grad[:, self.B : self.B + 2 * self.dstate]], dim=1)

    def dt_proj(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, D, R] -> [2, D, width of dt]"""
        return F.pad(weight.to(dtype), (0, self.B - self.rank))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The scans' input [2, B, L, D]."""
    u = x.new_empty(2, *x.shape)
    conv_forward(x, weight, bias, True, out=u.permute(1, 2, 0, 3))
    return u


def _scan(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Scan:
    """Both directions' scans, with dt_weight laid out as the projections."""
    low_rank, B, C = _Layout(dt_weight.shape[-1], A.shape[-1]).split(x_dbl)
    delta = _product(low_rank.flatten(1, 2), dt_weight.mT).view(u.shape)
    return Scan(
        *(_sequence(tensor) for tensor in (u, delta)),
        A.float().contiguous(),
        *(_sequence(tensor) for tensor in (B, C)),
        D.contiguous(),
        None,
        dt_bias.contiguous(),
        initial=None,
        groups=1,
        softplus=True,
        reverse=False,
    )


def _sequence(x: Tensor) -> Tensor:
    """[2, B, L, E] -> [B, 2, E, L]"""
    return x.permute(1, 0, 3, 2)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The product of a batch of matrices in x's dtype, within autocast too."""
    return torch.bmm(x, y).to(x.dtype)


def _backward(
    grad_out: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    x_dbl: Tensor,
    mean: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs, each in its dtype."""
    with device_of(xz):
        xz = xz.contiguous()
        x, z = xz.chunk(2, dim=-1)
        grad_xz = torch.empty_like(xz)
        grad_x, grad_z = grad_xz.chunk(2, dim=-1)
        grad_y = gate_gradients(grad_out.contiguous(), mean, z, grad_z)
        u = _convolve(x, conv_weight, conv_bias)
        layout = _Layout.of(dt_weight, A)
        dt_proj = layout.dt_proj(dt_weight, u.dtype)
        scan = _scan(u, x_dbl, dt_proj, dt_bias, A, D)
        grad_u, grad_delta, grad_x_dbl = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(x_dbl)
        grad_low_rank, *grads_BC = layout.split(grad_x_dbl)
        targets = Targets(_sequence(grad_u), _sequence(grad_delta), None, *(_sequence(grad) for grad in grads_BC))
        grad_y = _sequence(grad_y.expand(2, -1, -1, -1))
        grads = backward(scan, grad_y, None, states, fit(columns.CONFIG, layout.dstate), targets)
        grad_delta, low_rank = grad_delta.flatten(1, 2), layout.split(x_dbl)[0].flatten(1, 2)
        torch.bmm(grad_delta, dt_proj, out=grad_low_rank.flatten(1, 2))
        grad_dt_weight = _product(grad_delta.mT, low_rank)[..., : layout.rank]
        projected = grad_x_dbl.flatten(1, 2)
        grad_u.flatten(1, 2).baddbmm_(projected, layout.x_proj(x_proj_weight, u.dtype))
        grad_x_proj_weight = layout.of_x_proj(_product(projected.mT, u.flatten(1, 2)))
        grad_conv = conv_backward(grad_u.permute(1, 2, 0, 3), x, conv_weight, conv_bias, True, grad_x)
    parameters = conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D
    grad_parameters = *grad_conv, grad_x_proj_weight, grad_dt_weight, grads.delta_bias, grads.A, grads.D
    return grad_xz, *(grad.to(like.dtype).contiguous() for grad, like in zip(grad_parameters, parameters))


bimamba_fused_backward = torch.library.custom_op('vmamba::bimamba_fused_backward', _backward, mutates_args=())


@bimamba_fused_backward.register_fake
def _(grad_out, *tensors):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors[:8])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.keep = inputs
    ctx.set_materialize_grads(False)  # zeros for what is kept
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(backward, ctx, grad_out: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    if not ctx.keep:
        raise RuntimeError('bimamba_fused was called with keep=False and has no gradients; call it with keep=True')
    if grad_out is None:
        return (None,) * 9
    return *backward(grad_out, *ctx.saved_tensors), None


run_bimamba = differentiable(
    bimamba_fused, _forward, bimamba_fused_backward, _backward, _setup_context, _gradients, results=1
)
