"""The core of VMamba's 2-D selective scan (SS2D): four scans over a map, merged.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .routed import check_parameters, check_shape, routed_scan, routed_scan_backward
from .scratch import scratch

if triton is not None:
    from .fused.ss2d_operator import run_ss2d

NUM_ROUTES = 4


def ss2d_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Scans a map along the four routes of `cross_scan` and sums what each leaves at every pixel.

    On route k, with dt, B, C = split(x_dbl[..., k, :], [R, N, N]) of the pixel visited at step l:

        delta_l = softplus(dt_weight[k] @ dt_l + dt_bias[k])
        h_l = exp(delta_l * A[k]) * h_{l-1} + delta_l * B_l * x_l,    y_l = <C_l, h_l> + D[k] * x_l

    The projections x_dbl are made at the pixels' own places: a linear layer commutes with the order of pixels.
    State, A, D and dt_bias are kept in fp32 (fp64 if x is fp64). Differentiable in reverse mode in every argument.

    Args:
        x: Activated map [B, H, W, D], in any floating dtype.
        x_dbl: Projections of x for each route [B, H, W, 4, R + 2N].
        dt_weight: [4, D, R].
        dt_bias: [4, D].
        A: [4, D, N], negative.
        D: [4, D].

    Returns:
        The merged map [B, H, W, D] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check_tensors('ss2d_scan', x=x, x_dbl=x_dbl, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    _check_map(x)
    check_parameters(NUM_ROUTES, x.shape[-1], dt_weight, dt_bias, A, D)
    check_shape('x_dbl', x_dbl, (*x.shape[:3], NUM_ROUTES, dt_weight.shape[-1] + 2 * A.shape[-1]))
    tensors = x, x_dbl, dt_weight, dt_bias, A, D
    if runs_on_triton(x):
        return run_ss2d(x, x_dbl, None, *tensors[2:], None, None, 0.0)[0]
    return torch.ops.vmamba.ss2d_scan(*tensors)


def ss2d_core(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float = 1e-5,
) -> Tensor:
    """The core of SS2D, one operator where Triton runs: LayerNorm over the channels of `ss2d_scan`.

    The scan's projections x_dbl = x_proj_weight @ x are made in x's dtype.

    Args:
        x: Activated map [B, H, W, D], in any floating dtype.
        x_proj_weight: [4 * (R + 2N), D].
        dt_weight, dt_bias, A, D: The arguments of `ss2d_scan`.
        norm_weight: [D].
        norm_bias: [D].
        norm_eps: Added to the variance.

    Returns:
        The normalised map [B, H, W, D] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check_tensors(
        'ss2d_core',
        x=x,
        x_proj_weight=x_proj_weight,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        A=A,
        D=D,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    dim = x.shape[-1]
    _check_map(x)
    check_parameters(NUM_ROUTES, dim, dt_weight, dt_bias, A, D)
    check_shape('x_proj_weight', x_proj_weight, (NUM_ROUTES * (dt_weight.shape[-1] + 2 * A.shape[-1]), dim))
    check_shape('norm_weight', norm_weight, (dim,))
    check_shape('norm_bias', norm_bias, (dim,))
    if runs_on_triton(x):
        return run_ss2d(x, None, x_proj_weight, dt_weight, dt_bias, A, D, norm_weight, norm_bias, norm_eps)[0]
    x_dbl = F.linear(x, x_proj_weight.to(x.dtype)).unflatten(-1, (NUM_ROUTES, -1))
    y = ss2d_scan(x, x_dbl, dt_weight, dt_bias, A, D)
    return F.layer_norm(y, (dim,), norm_weight.to(y.dtype), norm_bias.to(y.dtype), norm_eps).to(x.dtype)


def _check_map(x: Tensor) -> None:
    if x.ndim != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(f'x must be a floating, non-empty [B, H, W, D] map, got {tuple(x.shape)} {x.dtype}')


@torch.library.custom_op('vmamba::ss2d_scan', mutates_args=())
def _ss2d_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    y = routed_scan(_cross_scan(x_wide, 'u'), _route(x_dbl.to(wide), 'x_dbl'), dt_weight, dt_bias, A)
    merged = _merge(y, *x.shape[1:3]).addcmul_(x_wide, D.to(wide).sum(dim=0))
    return merged.to(x.dtype)


@_ss2d_scan.register_fake
def _(x, x_dbl, dt_weight, dt_bias, A, D):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op('vmamba::ss2d_scan_backward', mutates_args=())
def _ss2d_scan_backward(
    grad_y: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    height, width = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, grad_y = x.to(wide), grad_y.to(wide)
    grad_u, grad_x_dbl, *grad_parameters = routed_scan_backward(
        _cross_scan(grad_y, 'grad_y'), _cross_scan(x_wide, 'u'), _route(x_dbl.to(wide), 'x_dbl'), dt_weight, dt_bias, A
    )
    grad_x = _merge(grad_u, height, width).addcmul_(grad_y, D.to(wide).sum(dim=0))
    grad_D = (grad_y * x_wide).sum(dim=(0, 1, 2)).repeat(NUM_ROUTES, 1)
    return (
        grad_x.to(x.dtype),
        _unroute(grad_x_dbl, height, width).to(x_dbl.dtype),
        *grad_parameters,
        grad_D.to(D.dtype),
    )


@_ss2d_scan_backward.register_fake
def _(grad_y, *tensors):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.vmamba.ss2d_scan_backward(grad_y, *ctx.saved_tensors)


_ss2d_scan.register_autograd(_backward, setup_context=_setup_context)


def _cross_scan(x: Tensor, slot: str) -> Tensor:
    """The same map on every route: [B, H, W, D] -> [B, L, 4, D], in scratch memory."""
    return _route(x.unsqueeze(3).expand(-1, -1, -1, NUM_ROUTES, -1), slot)


def _route(x: Tensor, slot: str) -> Tensor:
    """A map for each route, in its order: [B, H, W, 4, E] -> [B, L, 4, E], in scratch memory."""
    batch, height, width, _, dim = x.shape
    routed = scratch(slot, x, (batch, height * width, NUM_ROUTES, dim))
    by_row = routed.unflatten(1, (height, width))
    by_column = routed.unflatten(1, (width, height)).transpose(1, 2)
    by_row[:, :, :, 0] = x[:, :, :, 0]
    by_column[:, :, :, 1] = x[:, :, :, 1]
    by_row[:, :, :, 2] = x[:, :, :, 2].flip(1, 2)
    by_column[:, :, :, 3] = x[:, :, :, 3].flip(1, 2)
    return routed


def _unroute(routed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_route`."""
    by_row = routed.unflatten(1, (height, width))
    by_column = routed.unflatten(1, (width, height)).transpose(1, 2)
    return torch.stack(
        [by_row[..., 0, :], by_column[..., 1, :], by_row[..., 2, :].flip(1, 2), by_column[..., 3, :].flip(1, 2)], dim=3
    )


def _merge(routed: Tensor, height: int, width: int) -> Tensor:
    """Sums the routes where they passed: [B, L, 4, D] -> [B, H, W, D]."""
    paired = scratch('paired', routed, (*routed.shape[:2], 2, routed.shape[3]))
    torch.add(routed[:, :, :2], routed[:, :, 2:].flip(1), out=paired)
    by_row = paired[:, :, 0].unflatten(1, (height, width))
    by_column = paired[:, :, 1].unflatten(1, (width, height)).transpose(1, 2)
    return torch.add(by_row, by_column, out=routed.new_empty(by_row.shape))
