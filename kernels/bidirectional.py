"""The core of Vim's bidirectional Mamba: a scan along a sequence and one against it, summed.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
https://arxiv.org/abs/2401.09417
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .conv import NUM_DIRECTIONS, bidirectional_conv1d
from .routed import check_parameters, check_shape, routed_scan, routed_scan_backward

if triton is not None:
    from .fused.bimamba_operator import run_bimamba
    from .fused.conv1d_plan import MAX_TAPS


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
    """What lies between the in- and the output projection of a bidirectional Mamba block.

    With x, z = xz.chunk(2, dim=-1), and for direction k, 0 from the first position and 1 from the last:

        u_k = silu(conv_k(x)),    y = sum_k scan(u_k, x_proj_weight[k] @ u_k),    out = y / 2 * silu(z)

    with the convolutions of `bidirectional_conv1d` and the scans of `bidirectional_scan`. State, A, D and dt_bias are
    kept in fp32 (fp64 if xz is fp64). Differentiable in reverse mode in every argument. On Triton one operator, for at
    most 4 taps: it keeps xz, the projections, the mean of y and states, and makes the rest again.

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
    check_tensors(
        'bimamba_core',
        xz=xz,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        x_proj_weight=x_proj_weight,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        A=A,
        D=D,
    )
    _check_core(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    if runs_on_triton(xz) and conv_weight.shape[-1] <= MAX_TAPS and xz.numel() and A.numel():
        return run_bimamba(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)[0]
    x, z = xz.chunk(2, dim=-1)
    u = bidirectional_conv1d(x, conv_weight, conv_bias, silu=True)
    x_dbl = torch.einsum('blkd,kpd->blkp', u, x_proj_weight.to(u.dtype))
    y = bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A, D)
    return y / 2 * F.silu(z)


def _check_core(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> None:
    if xz.ndim != 3 or xz.shape[1] == 0 or xz.shape[2] % 2 or not xz.is_floating_point():
        raise ValueError(f'xz must be a floating [B, L, 2D] tensor with L > 0, got {tuple(xz.shape)} {xz.dtype}')
    dim = xz.shape[2] // 2
    check_parameters(NUM_DIRECTIONS, dim, dt_weight, dt_bias, A, D)
    if conv_weight.ndim != 3 or tuple(conv_weight.shape[:2]) != (NUM_DIRECTIONS, dim) or conv_weight.shape[2] == 0:
        raise ValueError(f'conv_weight must be [2, {dim}, w] with w > 0, got {tuple(conv_weight.shape)}')
    check_shape('conv_bias', conv_bias, (NUM_DIRECTIONS, dim))
    projections = dt_weight.shape[-1] + 2 * A.shape[-1]
    check_shape('x_proj_weight', x_proj_weight, (NUM_DIRECTIONS, projections, dim))


def bidirectional_scan(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Sums a selective scan from the first position to the last (k = 0) and one from the last to the first (k = 1).

    With dt, B, C = split(x_dbl[:, :, k], [R, N, N]) of the position that direction k visits at step l:

        delta_l = softplus(dt_weight[k] @ dt_l + dt_bias[k])
        h_l = exp(delta_l * A[k]) * h_{l-1} + delta_l * B_l * u_l,    y_l = <C_l, h_l> + D[k] * u_l

    State, A, D and dt_bias are kept in fp32 (fp64 if u is fp64). Differentiable in reverse mode in every argument.

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
    check_tensors('bidirectional_scan', u=u, x_dbl=x_dbl, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    _check(u, x_dbl, dt_weight, dt_bias, A, D)
    return torch.ops.vmamba.bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A, D)


def _check(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> None:
    if u.ndim != 4 or u.shape[2] != NUM_DIRECTIONS or u.shape[1] == 0 or not u.is_floating_point():
        raise ValueError(f'u must be a floating [B, L, 2, D] tensor with L > 0, got {tuple(u.shape)} {u.dtype}')
    check_parameters(NUM_DIRECTIONS, u.shape[-1], dt_weight, dt_bias, A, D)
    check_shape('x_dbl', x_dbl, (*u.shape[:3], dt_weight.shape[-1] + 2 * A.shape[-1]))


@torch.library.custom_op('vmamba::bidirectional_scan', mutates_args=())
def _bidirectional_scan(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide = u.to(wide)
    y = _turn(routed_scan(_turn(u_wide), _turn(x_dbl.to(wide)), dt_weight, dt_bias, A))
    return y.addcmul_(u_wide, D.to(wide)).sum(dim=2).to(u.dtype)


@_bidirectional_scan.register_fake
def _(u, x_dbl, dt_weight, dt_bias, A, D):
    return u.new_empty(u.shape[0], u.shape[1], u.shape[3])


@torch.library.custom_op('vmamba::bidirectional_scan_backward', mutates_args=())
def _bidirectional_scan_backward(
    grad_y: Tensor, u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    u_wide = u.to(wide)
    grad_y = grad_y.to(wide).unsqueeze(2).expand(-1, -1, NUM_DIRECTIONS, -1)
    grad_u, grad_x_dbl, *grad_parameters = routed_scan_backward(
        _turn(grad_y), _turn(u_wide), _turn(x_dbl.to(wide)), dt_weight, dt_bias, A
    )
    return (
        _turn(grad_u).addcmul_(grad_y, D.to(wide)).to(u.dtype),
        _turn(grad_x_dbl).to(x_dbl.dtype),
        *grad_parameters,
        (grad_y * u_wide).sum(dim=(0, 1)).to(D.dtype),
    )


@_bidirectional_scan_backward.register_fake
def _(grad_y, *tensors):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.vmamba.bidirectional_scan_backward(grad_y, *ctx.saved_tensors)


_bidirectional_scan.register_autograd(_backward, setup_context=_setup_context)


def _turn(x: Tensor) -> Tensor:
    """Both directions between the sequence's order and their own (its own inverse), as a new [B, L, 2, E]."""
    turned = x.new_empty(x.shape)
    turned[:, :, 0] = x[:, :, 0]
    turned[:, :, 1] = x[:, :, 1].flip(1)
    return turned
