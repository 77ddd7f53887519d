"""Operation counts of the scans, in multiply-adds as the official tables count them, and for PyTorch's counter.

A scan over L positions of D channels with N states counts 9 * L * D * N, its skip connection and gate L * D each.
"""

from math import prod
from typing import Any, Optional, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from . import bidirectional, conv, conv2d, scan, ss2d  # noqa: F401  they define the operators
from .backend import triton

Shape = Sequence[int]


def selective_scan_macs(u: Shape, dstate: int, has_skip: bool, has_gate: bool) -> int:
    """Multiply-adds of `selective_scan` on u [batch, dim, L]."""
    return prod(u) * (9 * dstate + has_skip + has_gate)


def routed_scan_macs(x_dbl: Shape, dt_weight: Shape, A: Shape) -> int:
    """Multiply-adds of `ss2d_scan` and `bidirectional_scan`, their projections of dt included.

    Args:
        x_dbl: [..., K, R + 2N], with a leading dimension per batch entry and position.
        dt_weight: [K, D, R].
        A: [K, D, N].
    """
    positions = prod(x_dbl[:-2])
    return positions * (prod(dt_weight) + prod(A[:2]) * (9 * A[2] + 1))


def ss2d_core_macs(x: Shape, projects: bool, dt_weight: Shape, A: Shape) -> int:
    """Multiply-adds of the fused SS2D without its norm, on x [B, H, W, D]; its projection if `projects`."""
    routes, dim, dt_rank = dt_weight
    width = dt_rank + 2 * A[2]
    projection = prod(x) * routes * width if projects else 0
    return projection + routed_scan_macs((*x[:-1], routes, width), dt_weight, A)


def causal_conv1d_macs(x: Shape, weight: Shape) -> int:
    """Multiply-adds of causal convolutions of x [B, L, D] with weight [K, D, w]."""
    return prod(x[:-1]) * prod(weight)


def bimamba_core_macs(xz: Shape, conv_weight: Shape, x_proj_weight: Shape, dt_weight: Shape, A: Shape) -> int:
    """Multiply-adds of `bimamba_core` on xz [B, L, 2D]."""
    projections = prod(xz[:-1]) * prod(x_proj_weight)
    scans = routed_scan_macs((*xz[:-1], *x_proj_weight[:2]), dt_weight, A)
    return causal_conv1d_macs(xz, conv_weight) + projections + scans


@register_flop_formula(torch.ops.vmamba.causal_conv1d)
def _causal_conv1d_flops(x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * causal_conv1d_macs(x, weight)


@register_flop_formula(torch.ops.vmamba.causal_conv1d_backward)
def _causal_conv1d_backward_flops(grad_u: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _causal_conv1d_flops(*args)


def depthwise_conv2d_macs(x: Shape, weight: Shape) -> int:
    """Multiply-adds of a depthwise convolution of x [B, H, W, D] with weight [D, k, k]."""
    return prod(x) * prod(weight[1:])


def _depthwise_conv2d_flops(x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * depthwise_conv2d_macs(x, weight)


def _depthwise_conv2d_backward_flops(grad_out: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _depthwise_conv2d_flops(*args)


@register_flop_formula(torch.ops.vmamba.selective_scan)
def _selective_scan_flops(
    u: Shape,
    delta: Shape,
    A: Shape,
    B: Shape,
    C: Shape,
    D: Optional[Shape],
    z: Optional[Shape],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * selective_scan_macs(u, A[1], D is not None, z is not None)


@register_flop_formula([torch.ops.vmamba.ss2d_scan, torch.ops.vmamba.bidirectional_scan])
def _routed_scan_flops(
    x: Shape, x_dbl: Shape, dt_weight: Shape, dt_bias: Shape, A: Shape, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * routed_scan_macs(x_dbl, dt_weight, A)


@register_flop_formula(torch.ops.vmamba.selective_scan_backward)
def _selective_scan_backward_flops(
    grad_y: Shape, grad_last_state: Shape, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 3 * _selective_scan_flops(*args)  # the states again, and the adjoint recurrence at twice the cost


@register_flop_formula([torch.ops.vmamba.ss2d_scan_backward, torch.ops.vmamba.bidirectional_scan_backward])
def _routed_scan_backward_flops(grad_y: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 3 * _routed_scan_flops(*args)


def _ss2d_fused_flops(
    x: Shape,
    x_dbl: Optional[Shape],
    x_proj_weight: Optional[Shape],
    dt_weight: Shape,
    dt_bias: Shape,
    A: Shape,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * ss2d_core_macs(x, x_proj_weight is not None, dt_weight, A)


def _ss2d_fused_backward_flops(
    grad_out: Shape,
    x: Shape,
    x_dbl: Shape,
    x_proj_weight: Optional[Shape],
    dt_weight: Shape,
    dt_bias: Shape,
    A: Shape,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    alone, core = (2 * ss2d_core_macs(x, projects, dt_weight, A) for projects in (False, x_proj_weight is not None))
    return 3 * alone + 2 * (core - alone)


def _bimamba_fused_flops(
    xz: Shape,
    conv_weight: Shape,
    conv_bias: Shape,
    x_proj_weight: Shape,
    dt_weight: Shape,
    dt_bias: Shape,
    A: Shape,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * bimamba_core_macs(xz, conv_weight, x_proj_weight, dt_weight, A)


def _bimamba_fused_backward_flops(
    grad_out: Shape,
    xz: Shape,
    conv_weight: Shape,
    conv_bias: Shape,
    x_proj_weight: Shape,
    dt_weight: Shape,
    dt_bias: Shape,
    A: Shape,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    scans = 2 * routed_scan_macs((*xz[:-1], *x_proj_weight[:2]), dt_weight, A)
    return scans + 2 * _bimamba_fused_flops(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A)


if triton is not None:
    register_flop_formula(torch.ops.vmamba.bimamba_fused)(_bimamba_fused_flops)
    register_flop_formula(torch.ops.vmamba.bimamba_fused_backward)(_bimamba_fused_backward_flops)
    register_flop_formula(torch.ops.vmamba.selective_scan_fused)(_selective_scan_flops)
    register_flop_formula(torch.ops.vmamba.selective_scan_fused_backward)(_selective_scan_backward_flops)
    register_flop_formula(torch.ops.vmamba.ss2d_fused)(_ss2d_fused_flops)
    register_flop_formula(torch.ops.vmamba.ss2d_fused_backward)(_ss2d_fused_backward_flops)
    register_flop_formula(torch.ops.vmamba.causal_conv1d_fused)(_causal_conv1d_flops)
    register_flop_formula(torch.ops.vmamba.causal_conv1d_fused_backward)(_causal_conv1d_backward_flops)
    register_flop_formula(torch.ops.vmamba.depthwise_conv2d_fused)(_depthwise_conv2d_flops)
    register_flop_formula(torch.ops.vmamba.depthwise_conv2d_fused_backward)(_depthwise_conv2d_backward_flops)
