"""The core of Vim's bidirectional Mamba: a scan along a sequence and one against it, summed.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
"""

from math import prod
from typing import Any, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import check, check_that
from .._launch import cdiv, runs_on_triton
from .._operator import Operator
from ..chunked import routed_scan, routed_scan_backward, scratch
from ..conv1d import MAX_TAPS, NUM_DIRECTIONS, bidirectional_conv1d
from ..selective_scan.launch import MAX_STATES, PACKED
from .launch import CoreOutputs, ProjectionLayout, core_backward, core_forward

__all__ = ['bidirectional_scan', 'bimamba_core']


def bimamba_core(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> Tensor:
    """A bidirectional Mamba block without its input and output projections.

    With x, z = xz.chunk(2, dim=-1), and for direction k, 0 from the first position and 1 from the last:

        u_k = silu(conv_k(x)),    y = sum_k scan(u_k, x_proj_weight[k] @ u_k),    out = y / 2 * silu(z)

    with the convolutions of `bidirectional_conv1d` and the scans of `bidirectional_scan`. State, A, D and dt_bias are
    kept in fp32 (fp64 if xz is fp64). Differentiable in reverse mode in every argument. On Triton this is one
    operator, for at most 4 taps and 64 states. It saves xz, the projections, the mean of y and states, and recomputes
    the rest.

    Args:
        xz: [B, L, 2 * D], in any floating dtype.
        conv_weight: [2, D, w].
        conv_bias: [2, D].
        x_proj_weight: [2, R + 2N, D].
        dt_weight: [2, D, R].
        dt_bias: [2, D].
        A: [2, D, N], negative.
        D: [2, D].

    Returns:
        out [B, L, D] in xz's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check('bimamba_core', xz=(xz, 'B L>0 2D'))
    check_that(xz.shape[2] % 2 == 0, f'bimamba_core: xz must be [B, L, 2D], got {tuple(xz.shape)}')
    sizes = dict(D=xz.shape[2] // 2)
    sizes.update(_check_scan('bimamba_core', sizes, xz=(xz, 'B L 2D'), dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D))
    convolution = dict(conv_weight=(conv_weight, '2 D w>0'), conv_bias=(conv_bias, '2 D'))
    check('bimamba_core', sizes, xz=(xz, 'B L 2D'), **convolution, x_proj_weight=(x_proj_weight, '2 R+2N D'))
    if _has_kernels(conv_weight, A) and xz.numel() and runs_on_triton(xz):
        return _core(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    x, z = xz.chunk(2, dim=-1)
    u = bidirectional_conv1d(x, conv_weight, conv_bias, silu=True)
    x_dbl = torch.einsum('blkd,kpd->blkp', u, x_proj_weight.to(u.dtype))
    y = bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A, D)
    return y / 2 * F.silu(z)


def _has_kernels(conv_weight: Tensor, A: Tensor) -> bool:
    return conv_weight.shape[-1] <= MAX_TAPS and 0 < A.shape[-1] <= MAX_STATES


def bidirectional_scan(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Sums a selective scan from the first position to the last (k = 0) and one from the last to the first (k = 1).

    With dt, B, C = split(x_dbl[:, :, k], [R, N, N]) of the position that direction k visits at step l:

        delta_l = softplus(dt_weight[k] @ dt_l + dt_bias[k])
        h_l = exp(delta_l * A[k]) * h_{l-1} + delta_l * B_l * u_l,    y_l = <C_l, h_l> + D[k] * u_l

    Computed in plain PyTorch. State, A, D and dt_bias are kept in fp32 (fp64 if u is fp64). Differentiable in reverse
    mode in every argument.

    Args:
        u: Input of each direction, both in the sequence's order [B, L, 2, D], in any floating dtype.
        x_dbl: Projections of u [B, L, 2, R + 2N], in the sequence's order.
        dt_weight: [2, D, R].
        dt_bias: [2, D].
        A: [2, D, N], negative.
        D: [2, D].

    Returns:
        y [B, L, D] in u's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    parameters = dict(dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    sizes = _check_scan('bidirectional_scan', {}, u=(u, 'B L>0 2 D'), **parameters)
    check('bidirectional_scan', sizes, u=(u, 'B L 2 D'), x_dbl=(x_dbl, 'B L 2 R+2N'))
    return _scan(u, x_dbl, dt_weight, dt_bias, A, D)


def _check_scan(function: str, sizes: dict, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, **main) -> dict:
    """Sizes by name."""
    parameters = dict(dt_weight=(dt_weight, '2 D R'), dt_bias=(dt_bias, '2 D'), A=(A, '2 D N'), D=(D, '2 D'))
    sizes = check(function, sizes, **main, **parameters)
    return {**sizes, 'R+2N': sizes['R'] + 2 * sizes['N']}


def _forward_scan(
    u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, save: bool
) -> Tuple[Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide = u.to(wide)
    y = scratch('y', u_wide, u.shape)
    routed_scan(_turn(u_wide), _turn(x_dbl.to(wide)), dt_weight, dt_bias, A, y)
    return (_turn(y).addcmul_(u_wide, D.to(wide)).sum(dim=2).to(u.dtype),)


def _backward_scan(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Tensor]:
    (grad_y,), (u, x_dbl, dt_weight, dt_bias, A, D) = grads, inputs
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide = u.to(wide)
    grad_y = grad_y.to(wide).unsqueeze(2).expand(-1, -1, NUM_DIRECTIONS, -1)
    grad_u = scratch('grad_u', u_wide, u.shape)
    grad_x_dbl, *grad_parameters = routed_scan_backward(
        _turn(grad_y), _turn(u_wide), _turn(x_dbl.to(wide)), dt_weight, dt_bias, A, grad_u
    )
    grad_u = _turn(grad_u).addcmul_(grad_y, D.to(wide))
    return grad_u, _turn(grad_x_dbl), *grad_parameters, (grad_y * u_wide).sum(dim=(0, 1))


def _like_scan(u: Tensor, *others: Any) -> Tuple[Tensor]:
    return (u.new_empty(u.shape[0], u.shape[1], u.shape[3]),)


def _scan_macs(u: Any, x_dbl: Sequence[int], dt_weight: Sequence[int], dt_bias: Any, A: Sequence[int], *_: Any) -> int:
    """As of `ss2d_scan`."""
    return prod(x_dbl[:-2]) * (prod(dt_weight) + prod(A[:2]) * (9 * A[2] + 1))


_scan = Operator(
    'bidirectional_scan',
    _forward_scan,
    _backward_scan,
    _like_scan,
    macs=_scan_macs,
    backward_macs=lambda *shapes: 3 * _scan_macs(*shapes),
)


def _turn(x: Tensor) -> Tensor:
    """Both directions between the sequence's order and their own (its own inverse), as a new [B, L, 2, E]."""
    turned = x.new_empty(x.shape)
    turned[:, :, 0] = x[:, :, 0]
    turned[:, :, 1] = x[:, :, 1].flip(1)
    return turned


def _forward_core(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments, _ = _arguments(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    outputs = core_forward(*(*arguments, save))
    return tuple(A.new_empty(0) if output is None else output for output in outputs)


def _arguments(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> Tuple[tuple, ProjectionLayout]:
    """The arguments of `core_forward`."""
    layout = ProjectionLayout.of(dt_weight.shape[-1], A.shape[-1])
    projections = layout.x_proj(x_proj_weight, xz.dtype), layout.dt_proj(dt_weight, xz.dtype)
    dt_bias, A, D = dt_bias.contiguous(), A.float().contiguous(), D.contiguous()
    conv = conv_weight.contiguous(), conv_bias.contiguous()
    return (xz.contiguous(), *conv, *projections, dt_bias, A, D), layout


def _backward_core(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Tensor]:
    arguments, layout = _arguments(*inputs)
    grads = core_backward(grads[0].contiguous(), *(*arguments, CoreOutputs(None, *saved)))
    _, conv_weight, conv_bias, *_, A, D = inputs
    grad_conv_weight, grad_conv_bias = grads.conv.sum(dim=0).split([conv_weight.numel(), conv_bias.numel()])
    grad_D, grad_dt_bias, grad_A = grads.scans.sum(dim=0).split([D.numel(), D.numel(), A.numel()])
    projections = layout.of_x_proj(grads.x_proj), grads.dt_proj[..., : layout.rank]
    grads_conv = grad_conv_weight.view(conv_weight.shape), grad_conv_bias.view(conv_bias.shape)
    return grads.xz, *grads_conv, *projections, grad_dt_bias.view(D.shape), grad_A.view(A.shape), grad_D.view(D.shape)


def _like_core(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seqlen, double = xz.shape
    out = xz.new_empty(batch, seqlen, double // 2)
    if not save:
        return (out, *(A.new_empty(0) for _ in range(3)))
    _, dim, dstate = A.shape
    projections = xz.new_empty(2, batch * seqlen, ProjectionLayout.of(dt_weight.shape[-1], dstate).size)
    states = A.new_empty(2 * batch, cdiv(seqlen, PACKED) + 1, dstate, dim, dtype=torch.float32)
    return out, projections, torch.empty_like(out), states


def _core_parts(
    xz: Sequence[int],
    conv_weight: Sequence[int],
    conv_bias: Any,
    x_proj_weight: Sequence[int],
    dt_weight: Sequence[int],
    dt_bias: Any,
    A: Sequence[int],
    *others: Any,
) -> Tuple[int, int]:
    """Multiply-adds of the convolutions and projections, and of the scans."""
    positions = prod(xz[:-1])
    scans = _scan_macs(None, (*xz[:-1], *x_proj_weight[:2]), dt_weight, dt_bias, A)
    return positions * (prod(conv_weight) + prod(x_proj_weight)), scans


def _core_macs(*shapes: Any) -> int:
    return sum(_core_parts(*shapes))


def _core_backward_macs(*shapes: Any) -> int:
    projections, scans = _core_parts(*shapes)
    return 2 * projections + 3 * scans


_core = Operator(
    'bimamba_core', _forward_core, _backward_core, _like_core, macs=_core_macs, backward_macs=_core_backward_macs
)
