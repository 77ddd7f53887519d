"""VMamba's 2-D selective scan with its norm and its residual connection, as one function of its tensors."""

from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._launch import on_device
from ..add_norm import norm_backward, norm_forward
from ..conv2d import conv2d_backward, conv2d_forward
from ..ss2d.launch import NUM_ROUTES, merge_backward, merge_forward, scan_backward, scan_forward
from .elementwise import add, prepare
from .parameters import lay_out_weights, sum_parts
from .products import input_gradient, linear, rows_of, weight_gradient


class _Arguments(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    in_proj_weight: Tensor
    conv_weight: Tensor
    conv_bias: Optional[Tensor]
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor
    out_norm_eps: float
    out_proj_weight: Tensor
    scale: Optional[Tensor]
    dtype: torch.dtype


class _Saved(NamedTuple):
    """Weights in the products' dtype and A; the map normalised before weight and bias, and reciprocal deviations; the
    output of in_proj; the scan's projections, its sum before the norm, states, and moments of the norm."""

    in_proj_weight: Tensor
    x_proj_weight: Tensor
    out_proj_weight: Tensor
    A: Tensor
    normal: Tensor
    moments: Tensor
    projected: Tensor
    x_dbl: Tensor
    merged: Tensor
    states: Tensor
    out_moments: Tensor


def ss2d_branch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    in_proj_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_norm_eps: float,
    out_proj_weight: Tensor,
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """x + scale * SS2D(LayerNorm(x)), on Triton, with

        SS2D(n) = out_proj(ss2d_core(silu(conv2d(in_proj(n))))),    A = -exp(A_log)

    Where in_proj has twice the channels, the second half z gates the output of the core by silu(z). The backward pass
    recomputes the normalised maps and the convolution. Differentiable once, in reverse mode, in every tensor but scale.

    Args:
        x: [B, H, W, d] in fp32.
        norm_weight, norm_bias: [d].
        norm_eps: Added to the variance.
        in_proj_weight: [D or 2D, d].
        conv_weight: [D, 1, k, k] with odd k up to 5.
        conv_bias: [D].
        x_proj_weight: [4 * (R + 2N), D].
        dt_weight, dt_bias, A_log, D: As of `ss2d_scan`.
        out_norm_weight, out_norm_bias: [D].
        out_norm_eps: Added to the variance.
        out_proj_weight: [d, D].
        scale: Factor of each sample, [B], as stochastic depth draws it; None for 1.
        dtype: That of the products and of the maps with D channels.

    Returns:
        [B, H, W, d] in fp32.
    """
    arguments = _Arguments(
        *(x, norm_weight, norm_bias, norm_eps, in_proj_weight, conv_weight, conv_bias, x_proj_weight),
        *(dt_weight, dt_bias, A_log, D, out_norm_weight, out_norm_bias, out_norm_eps, out_proj_weight, scale, dtype),
    )
    with on_device(x):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _SS2DBranch.apply(*arguments)
        return _forward(arguments, save=False)[0]


class _SS2DBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        arguments = _Arguments(*arguments)
        out, saved = _forward(arguments, save=True)
        tensors = (argument for argument in arguments[1:-1] if not isinstance(argument, float))  # all but x
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        tensors = ctx.saved_tensors
        norm_weight, norm_bias, in_proj_weight, *core, out_proj_weight, scale = tensors[: -len(_Saved._fields)]
        conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D, out_norm_weight, out_norm_bias = core
        saved = _Saved(*tensors[-len(_Saved._fields) :])
        with on_device(grad):
            grad = grad.contiguous()
            grad_y, normalised, _ = prepare(grad, scale, saved.normal, norm_weight, norm_bias)
            grad_out = input_gradient(grad_y, saved.out_proj_weight).view(saved.merged.shape)
            x, z = _split(saved.projected, saved.merged.shape[-1])
            if z is not None:
                gate, grad_gated = F.silu(z), grad_out
                grad_out = grad_out * gate
            u = conv2d_forward(x, conv_weight, conv_bias, silu=True)
            merge = merge_backward(
                grad_out, saved.merged, u, out_norm_weight, saved.out_moments, out_norm_bias, recompute_out=True
            )
            out = merge.out if z is None else merge.out * gate
            grad_out_proj_weight = weight_gradient(grad_y, rows_of(out), out_proj_weight.dtype)
            scans = scan_backward(
                merge.merged, u, saved.x_dbl, dt_weight, dt_bias, saved.A, D, saved.states, log_A=True
            )
            grad_u, by_columns = scans.x.unbind()
            grad_u.add_(by_columns)
            grad_x_dbl = scans.x_dbl.sum(dim=0, dtype=u.dtype).view(-1, x_proj_weight.shape[0])
            rows_of(grad_u).addmm_(grad_x_dbl, saved.x_proj_weight)
            grad_x_proj_weight = weight_gradient(grad_x_dbl, rows_of(u), x_proj_weight.dtype)
            grad_projected, sums_conv = conv2d_backward(grad_u, x, conv_weight, conv_bias, silu=True)
            if z is not None:
                grad_z = torch.ops.aten.silu_backward(grad_gated * merge.out, z)
                grad_projected = torch.cat([grad_projected, grad_z], dim=-1)
            grad_projected = rows_of(grad_projected)
            grad_in_proj_weight = weight_gradient(grad_projected, normalised, in_proj_weight.dtype)
            grad_normalised = input_gradient(grad_projected, saved.in_proj_weight)
            grad_x = torch.empty_like(grad)
            sums_norm = norm_backward(
                grad_normalised, saved.normal, norm_weight, saved.moments, True, grad_x, grad, is_normal=True
            )
            of_norm, of_channels = norm_weight.shape, out_norm_weight.shape
            sums = sum_parts(
                (sums_norm, (of_norm, of_norm)),
                (sums_conv, (conv_weight.shape, of_channels)),
                (scans.parameters, (dt_weight.shape, dt_bias.shape, A_log.shape)),
                (merge.vectors, (of_channels, of_channels, of_channels)),
            )
        grad_norm_weight, grad_norm_bias, grad_conv_weight, grad_conv_bias, *grads_dt_and_A = sums[:7]
        grad_out_norm_weight, grad_out_norm_bias, grad_D = sums[7:]
        return (
            *(grad_x, grad_norm_weight, grad_norm_bias, None, grad_in_proj_weight, grad_conv_weight),
            *(None if conv_bias is None else grad_conv_bias, grad_x_proj_weight, *grads_dt_and_A),
            *(grad_D.expand(NUM_ROUTES, -1), grad_out_norm_weight, grad_out_norm_bias, None),
            *(grad_out_proj_weight, None, None),
        )


def _forward(arguments: _Arguments, save: bool) -> Tuple[Tensor, Optional[_Saved]]:
    a = arguments
    x = a.x.contiguous()
    in_proj_weight, x_proj_weight, out_proj_weight, A = lay_out_weights(
        (a.in_proj_weight, a.x_proj_weight, a.out_proj_weight), a.dtype, a.A_log
    )
    normalised, normal, moments = norm_forward(
        x, a.norm_weight, a.norm_bias, a.norm_eps, a.dtype, save, save_normal=save
    )
    projected = linear(normalised, in_proj_weight)
    del normalised
    inner, z = _split(projected, out_proj_weight.shape[1])
    u = conv2d_forward(inner, a.conv_weight, a.conv_bias, silu=True)
    if z is None and not save:
        del projected, inner
    x_dbl = linear(u, x_proj_weight)
    y, states = scan_forward(u, x_dbl, a.dt_weight, a.dt_bias, A, save)
    out, merged, out_moments = merge_forward(
        y, u, a.D, a.out_norm_weight, a.out_norm_bias, a.out_norm_eps, save
    )
    del u, y
    if z is not None:
        out.mul_(F.silu(z))
    out = add(x, linear(out, out_proj_weight), a.scale)
    if not save:
        return out, None
    weights = in_proj_weight, x_proj_weight, out_proj_weight, A
    return out, _Saved(*weights, normal, moments, projected, x_dbl, merged, states, out_moments)


def _split(projected: Tensor, dim: int) -> Tuple[Tensor, Optional[Tensor]]:
    """What in_proj makes [B, H, W, D or 2D] as x and z."""
    if projected.shape[-1] == dim:
        return projected, None
    return projected[..., :dim], projected[..., dim:]
