"""The core of VMamba's 2-D selective scan (SS2D): four scans over a map, merged.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

from math import prod
from typing import Any, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import check
from .._launch import runs_on_triton
from .._operator import Operator
from ..chunked import routed_scan, routed_scan_backward, scratch
from ..norm import layer_norm
from ..onednn import linear
from .launch import (
    NUM_ROUTES,
    Device,
    merge_backward,
    merge_forward,
    plan_of,
    scan_backward,
    scan_forward,
    sizes_of,
    states_shape,
)

__all__ = ['NUM_ROUTES', 'ss2d_core', 'ss2d_scan']

_SMALL_MAPS = 2**21  # elements in both orders


def ss2d_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Scans a map along the four routes of `cross_scan` and sums the four outputs at every pixel.

    On route k, with dt, B, C = split(x_dbl[..., k, :], [R, N, N]) of the pixel visited at step l:

        delta_l = softplus(dt_weight[k] @ dt_l + dt_bias[k])
        h_l = exp(delta_l * A[k]) * h_{l-1} + delta_l * B_l * x_l,    y_l = <C_l, h_l> + D[k] * x_l

    The projections x_dbl are in the order of the map: a linear layer commutes with a permutation of pixels.
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
    sizes = _check_scan('ss2d_scan', x, dt_weight, dt_bias, A, D)
    check('ss2d_scan', sizes, x=(x, 'B H W D'), x_dbl=(x_dbl, 'B H W 4 R+2N'))
    return _scan(x, x_dbl, dt_weight, dt_bias, A, D, runs_on_triton(x))


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
    """The core of SS2D, one operator on Triton: LayerNorm over the channels of `ss2d_scan`.

    The scan's projections x_dbl = x_proj_weight @ x are computed in x's dtype.

    Args:
        x: Activated map [B, H, W, D], in any floating dtype.
        x_proj_weight: [4 * (R + 2N), D].
        dt_weight: [4, D, R], as in `ss2d_scan`.
        dt_bias: [4, D].
        A: [4, D, N], negative.
        D: [4, D].
        norm_weight: [D].
        norm_bias: [D].
        norm_eps: Added to the variance.

    Returns:
        The normalised map [B, H, W, D] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    sizes = _check_scan('ss2d_core', x, dt_weight, dt_bias, A, D)
    weights = dict(x_proj_weight=(x_proj_weight, '4(R+2N) D'), norm_weight=(norm_weight, 'D'))
    check('ss2d_core', sizes, x=(x, 'B H W D'), **weights, norm_bias=(norm_bias, 'D'))
    if runs_on_triton(x):
        return _core(x, x_proj_weight, dt_weight, dt_bias, A, D, norm_weight, norm_bias, norm_eps)
    x_dbl = linear(x, x_proj_weight.to(x.dtype)).unflatten(-1, (NUM_ROUTES, -1))
    y = ss2d_scan(x, x_dbl, dt_weight, dt_bias, A, D)
    return layer_norm(y, norm_weight, norm_bias, norm_eps, x.dtype)


def _check_scan(function: str, x: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> dict:
    """Sizes by name."""
    parameters = dict(dt_weight=(dt_weight, '4 D R'), dt_bias=(dt_bias, '4 D'), A=(A, '4 D N'), D=(D, '4 D'))
    sizes = check(function, None, x=(x, 'B H>0 W>0 D>0'), **parameters)
    width = sizes['R'] + 2 * sizes['N']
    return {**sizes, 'R+2N': width, '4(R+2N)': NUM_ROUTES * width}


def _forward_scan(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, triton: bool, save: bool
) -> Tuple[Tensor, Tensor]:
    if not triton:
        return _plain_scan(x, x_dbl, dt_weight, dt_bias, A, D), x.new_empty(0, dtype=torch.float32)
    x, dt_weight, dt_bias, A, D = (tensor.contiguous() for tensor in (x, dt_weight, dt_bias, A, D))
    y, states = scan_forward(x, _whole_words(x_dbl, x), dt_weight, dt_bias, A, save)
    return merge_forward(y, x, D, None, None, 0.0, False).out, states


def _backward_scan(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Tensor]:
    (grad_y,), (*tensors, triton), (states,) = grads, inputs, saved
    if not triton:
        return _plain_scan_backward(grad_y, *tensors)
    x, x_dbl, *parameters = tensors
    x, *parameters = (tensor.contiguous() for tensor in (x, *parameters))
    merge = merge_backward(grad_y.contiguous(), None, x, None, None)
    grads = scan_backward(merge.merged, x, _whole_words(x_dbl, x), *(*parameters, states))
    grad_parameters = _split_parameters(grads.parameters.sum(dim=0), *parameters[:3])
    grad_D = merge.vectors.sum(dim=0)[2:]
    return grads.x, grads.x_dbl, *grad_parameters, grad_D


def _split_parameters(total: Tensor, *parameters: Tensor) -> Tuple[Tensor, ...]:
    """Gradients of dt_weight, dt_bias and A, one after the other in `total`."""
    grads = total.split([parameter.numel() for parameter in parameters])
    return tuple(grad.view(parameter.shape) for grad, parameter in zip(grads, parameters))


def _like_scan(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, triton: bool, save: bool
) -> Tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _like_states(x, dt_weight, A, triton, save)


def _like_states(x: Tensor, dt_weight: Tensor, A: Tensor, triton: bool, save: bool) -> Tensor:
    sizes = sizes_of(x, dt_weight, A)
    shape: Tuple[int, ...] = (0, 0, 0) if triton else (0,)
    if triton and save:
        shape = states_shape(sizes, plan_of(sizes, Device.of(x)))
    return x.new_empty(shape, dtype=torch.float32)


def _scan_macs(x: Any, x_dbl: Sequence[int], dt_weight: Sequence[int], dt_bias: Any, A: Sequence[int], *_: Any) -> int:
    """A scan over L positions of D channels with N states counts 9 * L * D * N, its skip connection L * D, as in the
    official tables; and the projections of dt."""
    return prod(x_dbl[:-2]) * (prod(dt_weight) + prod(A[:2]) * (9 * A[2] + 1))


def _scan_backward_macs(*shapes: Any) -> int:
    """The states again, and the adjoint recurrence at twice the cost."""
    return 3 * _scan_macs(*shapes)


_scan = Operator(
    'ss2d_scan', _forward_scan, _backward_scan, _like_scan, macs=_scan_macs, backward_macs=_scan_backward_macs
)


def _forward_core(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normalised map; and the projections, the map before the norm, the states before each tile, and the norm's
    moments."""
    x, dt_weight, dt_bias, A, D = (tensor.contiguous() for tensor in (x, dt_weight, dt_bias, A, D))
    x_dbl = F.linear(x, x_proj_weight.to(x.dtype)).to(x.dtype).unflatten(-1, (NUM_ROUTES, -1))
    y, states = scan_forward(x, x_dbl, dt_weight, dt_bias, A, save)
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    out, merged, moments = merge_forward(y, x, D, norm_weight, norm_bias, norm_eps, save)
    if not save:
        return out, x.new_empty(0), x.new_empty(0), states, x.new_empty(0, dtype=torch.float32)
    return out, x_dbl, merged, states, moments


def _backward_core(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Tensor]:
    (grad_out,), (x, x_proj_weight, *parameters, norm_weight, _, _), (x_dbl, merged, states, moments) = (
        grads,
        inputs,
        saved,
    )
    x, norm_weight, *parameters = (tensor.contiguous() for tensor in (x, norm_weight, *parameters))
    merge = merge_backward(grad_out.contiguous(), merged, x, norm_weight, moments)
    grads = scan_backward(merge.merged, x, x_dbl, *(*parameters, states))
    grad_x = grads.x
    pixels = grads.x_dbl.view(-1, x_proj_weight.shape[0])  # [B * H * W, 4 * (R + 2N)]
    grad_x.view(-1, x.shape[-1]).addmm_(pixels, x_proj_weight.to(x.dtype))
    grad_x_proj_weight = torch.mm(pixels.t(), x.view(-1, x.shape[-1]))
    grad_parameters = _split_parameters(grads.parameters.sum(dim=0), *parameters[:3])
    vectors = merge.vectors.sum(dim=0)
    return grad_x, grad_x_proj_weight, *grad_parameters, vectors[2:], vectors[0], vectors[1]


def _like_core(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    width = x_proj_weight.shape[0] // NUM_ROUTES
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:3], NUM_ROUTES, width) if save else (0,)),
        x.new_empty(x.shape if save else (0,)),
        _like_states(x, dt_weight, A, True, save),
        x.new_empty((2, pixels) if save else (0,), dtype=torch.float32),
    )


def _core_shapes(x: Sequence[int], x_proj_weight: Sequence[int]) -> Tuple[int, Sequence[int]]:
    """Multiply-adds of the projection, and the shape of what it makes."""
    return prod(x[:3]) * prod(x_proj_weight), (*x[:3], NUM_ROUTES, x_proj_weight[0] // NUM_ROUTES)


def _core_macs(x: Sequence[int], x_proj_weight: Sequence[int], *parameters: Any) -> int:
    """Without the norm."""
    projection, x_dbl = _core_shapes(x, x_proj_weight)
    return projection + _scan_macs(x, x_dbl, *parameters)


def _core_backward_macs(x: Sequence[int], x_proj_weight: Sequence[int], *parameters: Any) -> int:
    projection, x_dbl = _core_shapes(x, x_proj_weight)
    return 2 * projection + _scan_backward_macs(x, x_dbl, *parameters)


_core = Operator(
    'ss2d_core', _forward_core, _backward_core, _like_core, macs=_core_macs, backward_macs=_core_backward_macs
)


def _whole_words(x_dbl: Tensor, x: Tensor) -> Tensor:
    """x_dbl in x's dtype, contiguous, where words of 32 bits begin, as the kernels read it: a view may begin
    anywhere."""
    x_dbl = x_dbl.to(x.dtype).contiguous()
    return x_dbl if x_dbl.data_ptr() % 4 == 0 else x_dbl.clone()


# Routes 0 and 2 walk the pixels by rows, there and back, routes 1 and 3 by columns: opposite routes share a map in one
# order. Small maps are laid out in both orders side by side, for fewer and larger operations, large maps in one order
# after the other, for less memory.


def _plain_scan(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, x_dbl = x.to(wide), x_dbl.to(wide)
    out = x_wide * D.to(wide).sum(dim=0)
    for orders in _orders(x):
        u = _lay_out([x_wide] * len(orders), orders, 'u')
        by_rows = orders == range(1)
        y = out.flatten(1, 2).unsqueeze(2) if by_rows else scratch('y', u, u.shape)
        for reverse in (False, True):
            routes = _routes(orders, reverse)
            projections = _lay_out(x_dbl[..., routes, :].unbind(3), orders, 'x_dbl')
            parameters = dt_weight[routes], dt_bias[routes], A[routes]
            routed_scan(u, projections, *parameters, y, reverse, add=reverse or by_rows)
        if not by_rows:
            for part in _on_map(y, orders, *x.shape[1:3]):
                out.add_(part)
    return out.to(x.dtype)


def _plain_scan_backward(
    grad_y: Tensor, x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Sequence[Tensor]:
    size = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, x_dbl, grad_y = x.to(wide), x_dbl.to(wide), grad_y.to(wide)
    grad_x = grad_y * D.to(wide).sum(dim=0)
    grad_x_dbl = torch.empty_like(x_dbl, memory_format=torch.contiguous_format)
    grad_parameters = [torch.empty_like(parameter, dtype=wide) for parameter in (dt_weight, dt_bias, A)]
    for orders in _orders(x):
        u, grad = (_lay_out([t] * len(orders), orders, slot) for t, slot in ((x_wide, 'u'), (grad_y, 'grad_y')))
        grad_u = scratch('grad_u', u, u.shape)
        for reverse in (False, True):
            routes = _routes(orders, reverse)
            projections = _lay_out(x_dbl[..., routes, :].unbind(3), orders, 'x_dbl')
            parameters = dt_weight[routes], dt_bias[routes], A[routes]
            own, *grads = routed_scan_backward(grad, u, projections, *parameters, grad_u, reverse, add=reverse)
            for i, part in zip(range(NUM_ROUTES)[routes], _on_map(own, orders, *size)):
                grad_x_dbl[..., i, :] = part
            for target, part in zip(grad_parameters, grads):
                target[routes] = part
        for part in _on_map(grad_u, orders, *size):
            grad_x.add_(part)
    grad_D = (grad_y * x_wide).sum(dim=(0, 1, 2)).expand(NUM_ROUTES, -1)
    return grad_x, grad_x_dbl, *grad_parameters, grad_D


def _orders(x: Tensor) -> Sequence[range]:
    """The orders of pixels, 0 by rows and 1 by columns, in ranges that are laid out together."""
    return [range(2)] if 2 * x.numel() <= _SMALL_MAPS else [range(1), range(1, 2)]


def _routes(orders: range, reverse: bool) -> slice:
    """The routes that walk in these orders."""
    return slice(orders.start + 2 * reverse, orders.stop + 2 * reverse)


def _lay_out(maps: Sequence[Tensor], orders: range, slot: str) -> Tensor:
    """A map [B, H, W, E] for each order -> [B, L, K, E], in scratch memory or a view."""
    if orders == range(1):
        return maps[0].flatten(1, 2).unsqueeze(2)
    batch, height, width, channels = maps[0].shape
    laid_out = scratch(slot, maps[0], (batch, height * width, len(maps), channels))
    for target, part in zip(_on_map(laid_out, orders, height, width), maps):
        target.copy_(part)
    return laid_out


def _on_map(laid_out: Tensor, orders: range, height: int, width: int) -> Sequence[Tensor]:
    """The inverse of `_lay_out`, as views."""
    return [
        part.unflatten(1, (width, height)).transpose(1, 2) if order else part.unflatten(1, (height, width))
        for order, part in zip(orders, laid_out.unbind(2))
    ]
