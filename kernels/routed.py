"""Selective scans along several routes at once, each with its own parameters, in plain PyTorch.

Shapes: u [B, L, K, D] and x_dbl [B, L, K, R + 2N] in the order of each route, dt_weight [K, D, R], dt_bias [K, D],
A [K, D, N]; on route k, with dt, B, C = split(x_dbl, [R, N, N]) and delta = softplus(dt_weight @ dt + dt_bias):

    h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l,    y_l = <C_l, h_l>
"""

import torch
from torch import Tensor

from .chunked import scan_backward, scan_forward
from .scratch import scratch


def check_parameters(routes: int, dim: int, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> None:
    """Raises ValueError unless the parameters of K = routes scans over D = dim channels fit together."""
    if dt_weight.ndim != 3 or A.ndim != 3:
        shapes = f'{tuple(dt_weight.shape)} and {tuple(A.shape)}'
        raise ValueError(f'dt_weight must be [{routes}, D, R] and A [{routes}, D, N], got {shapes}')
    check_shape('dt_weight', dt_weight, (routes, dim, dt_weight.shape[-1]))
    check_shape('dt_bias', dt_bias, (routes, dim))
    check_shape('A', A, (routes, dim, A.shape[-1]))
    check_shape('D', D, (routes, dim))


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has the shape."""
    if tensor.shape != shape:
        raise ValueError(f'{name} must be {list(shape)}, got {tuple(tensor.shape)}')


def routed_scan(u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor) -> Tensor:
    """y [B, L, K, D] in scratch memory; u and x_dbl are in the computing dtype."""
    dt, B, C = _split(x_dbl, dt_weight, A)
    y, _ = scan_forward(u, _project_dt(dt, dt_weight, dt_bias), *_core_arguments(A, B, C), delta_softplus=True)
    return y


def routed_scan_backward(
    grad_y: Tensor, u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, x_dbl, dt_weight, dt_bias and A; those of the parameters in the parameters' dtypes."""
    dt, B, C = _split(x_dbl, dt_weight, A)
    delta = _project_dt(dt, dt_weight, dt_bias)
    A_core, B, C, state = _core_arguments(A, B, C)
    grads = scan_backward(grad_y, torch.zeros_like(state), u, delta, A_core, B, C, state, delta_softplus=True)

    grad_delta = grads.delta.flatten(0, 1).transpose(0, 1)  # [B, L, K, D] -> [K, B * L, D]
    grad_dt = (grad_delta @ dt_weight.to(u.dtype)).transpose(0, 1).unflatten(0, dt.shape[:2])
    grad_dt_weight = grad_delta.transpose(1, 2) @ dt.flatten(0, 1).transpose(0, 1)
    return (
        grads.u,
        torch.cat([grad_dt, grads.B, grads.C], dim=-1),
        grad_dt_weight.to(dt_weight.dtype),
        grad_delta.sum(dim=1).to(dt_bias.dtype),
        grads.A.transpose(-2, -1).contiguous().to(A.dtype),
    )


def _split(x_dbl: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dstate = A.shape[-1]
    dt, B, C = x_dbl.split([dt_weight.shape[-1], dstate, dstate], dim=-1)
    return dt, B.contiguous(), C.contiguous()


def _project_dt(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """delta before its softplus, [B, L, K, D], in scratch memory."""
    delta = scratch('delta', dt, (*dt.shape[:-1], weight.shape[1]))
    torch.baddbmm(
        bias.to(dt.dtype).unsqueeze(1),  # [K, 1, D]
        dt.flatten(0, 1).transpose(0, 1),  # [B, L, K, R] -> [K, B * L, R]
        weight.to(dt.dtype).transpose(1, 2),  # [K, R, D]
        out=delta.flatten(0, 1).transpose(0, 1),
    )
    return delta


def _core_arguments(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C and a zero initial state as `scan_forward` takes them."""
    A = A.to(B.dtype).transpose(-2, -1).contiguous()  # [K, D, N] -> [K, N, D]
    return A, B, C, A.new_zeros(B.shape[0], *A.shape)
