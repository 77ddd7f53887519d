"""The core of VMamba's 2-D selective scan (SS2D): four scans over a map, merged.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import scan_backward, scan_forward

NUM_ROUTES = 4


def ss2d_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Scans a map along the four routes of `cross_scan` and sums what each leaves at every pixel.

    On route k, with dt, B, C = split(x_dbl[..., k, :], [R, N, N]) of the pixel visited at step l:

        delta_l = softplus(dt_weight[k] @ dt_l + dt_bias[k])
        h_l = exp(delta_l * A[k]) * h_{l-1} + delta_l * B_l * x_l,    y_l = <C_l, h_l> + D[k] * x_l

    The projections x_dbl are made at the pixels' own places: a linear layer commutes with the order of pixels.
    State, A, D and dt_bias are kept in fp32 (fp64 if x is fp64). Differentiable in every argument.

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
        ValueError: If shapes or dtypes do not fit together.
    """
    _check(x, x_dbl, dt_weight, dt_bias, A, D)
    return torch.ops.vmamba.ss2d_scan(x, x_dbl, dt_weight, dt_bias, A, D)


def _check(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, H, W, D] tensor, got {tuple(x.shape)} {x.dtype}')
    if dt_weight.ndim != 3 or A.ndim != 3:
        raise ValueError(
            f'dt_weight must be [4, D, R] and A [4, D, N], got {tuple(dt_weight.shape)} and {tuple(A.shape)}'
        )
    dim, dt_rank, dstate = x.shape[-1], dt_weight.shape[-1], A.shape[-1]
    expected = {
        'x_dbl': (x_dbl, (*x.shape[:3], NUM_ROUTES, dt_rank + 2 * dstate)),
        'dt_weight': (dt_weight, (NUM_ROUTES, dim, dt_rank)),
        'dt_bias': (dt_bias, (NUM_ROUTES, dim)),
        'A': (A, (NUM_ROUTES, dim, dstate)),
        'D': (D, (NUM_ROUTES, dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must be {list(shape)}, got {tuple(tensor.shape)}')


@torch.library.custom_op('vmamba::ss2d_scan', mutates_args=())
def _ss2d_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    u, dt, B, C = _routes(x, x_dbl, dt_weight.shape[-1])
    delta = F.softplus(_project_dt(dt, dt_weight, dt_bias))
    y, _ = scan_forward(u, delta, *_core_arguments(A, B, C))
    y.addcmul_(u, D.to(y.dtype))
    return _merge(y, *x.shape[1:3]).to(x.dtype)


@_ss2d_scan.register_fake
def _(x, x_dbl, dt_weight, dt_bias, A, D):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op('vmamba::ss2d_scan_backward', mutates_args=())
def _ss2d_scan_backward(
    grad_y: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    height, width = x.shape[1:3]
    u, dt, B, C = _routes(x, x_dbl, dt_weight.shape[-1])
    raw_delta = _project_dt(dt, dt_weight, dt_bias)
    grad_y = _cross_scan(grad_y.to(u.dtype))
    A_core, B, C, state = _core_arguments(A, B, C)
    grads = scan_backward(grad_y, torch.zeros_like(state), u, F.softplus(raw_delta), A_core, B, C, state)
    grad_u = grads.u.addcmul_(grad_y, D.to(u.dtype))
    grad_delta = grads.delta.mul_(torch.sigmoid(raw_delta)).flatten(0, 1).transpose(0, 1)  # [4, B * L, D]
    grad_dt_weight = grad_delta.transpose(1, 2) @ dt.flatten(0, 1).transpose(0, 1)
    grad_dt = (grad_delta @ dt_weight.to(u.dtype)).transpose(0, 1).unflatten(0, dt.shape[:2])
    grad_x_dbl = torch.cat([grad_dt, grads.B, grads.C], dim=-1)
    return (
        _merge(grad_u, height, width).to(x.dtype),
        _unroute(grad_x_dbl, height, width).to(x_dbl.dtype),
        grad_dt_weight.to(dt_weight.dtype),
        grad_delta.sum(dim=1).to(dt_bias.dtype),
        grads.A.transpose(-2, -1).contiguous().to(A.dtype),
        (grad_y * u).sum(dim=(0, 1)).to(D.dtype),
    )


@_ss2d_scan_backward.register_fake
def _(grad_y, *tensors):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.vmamba.ss2d_scan_backward(grad_y, *ctx.saved_tensors)


_ss2d_scan.register_autograd(_backward, setup_context=_setup_context)


def _routes(x: Tensor, x_dbl: Tensor, dt_rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u [B, L, 4, D] and dt [B, L, 4, R], B, C [B, L, 4, N] in the order of each route, in the computing dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    projected = _route(x_dbl.to(wide))
    dstate = (x_dbl.shape[-1] - dt_rank) // 2
    return _cross_scan(x.to(wide)), *projected.split([dt_rank, dstate, dstate], dim=-1)


def _project_dt(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """delta before its softplus, [B, L, 4, D]."""
    delta = torch.baddbmm(
        bias.to(dt.dtype).unsqueeze(1),  # [4, 1, D]
        dt.flatten(0, 1).transpose(0, 1),  # [B, L, 4, R] -> [4, B * L, R]
        weight.to(dt.dtype).transpose(1, 2),  # [4, R, D]
    )
    return delta.transpose(0, 1).unflatten(0, dt.shape[:2])


def _core_arguments(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C and a zero initial state as `scan_forward` takes them."""
    A = A.to(B.dtype).transpose(-2, -1).contiguous()  # [4, D, N] -> [4, N, D]
    return A, B, C, A.new_zeros(B.shape[0], *A.shape)


def _cross_scan(x: Tensor) -> Tensor:
    """The same map on every route: [B, H, W, D] -> [B, L, 4, D]."""
    return _route(x.unsqueeze(3).expand(-1, -1, -1, NUM_ROUTES, -1))


def _route(x: Tensor) -> Tensor:
    """A map for each route, in its order: [B, H, W, 4, E] -> [B, L, 4, E]."""
    batch, height, width, _, dim = x.shape
    routed = x.new_empty(batch, height * width, NUM_ROUTES, dim)
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
    paired = routed[:, :, :2] + routed[:, :, 2:].flip(1)
    by_row = paired[:, :, 0].unflatten(1, (height, width))
    by_column = paired[:, :, 1].unflatten(1, (width, height)).transpose(1, 2)
    return torch.add(by_row, by_column, out=routed.new_empty(by_row.shape))
