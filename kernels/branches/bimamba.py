"""Vim's bidirectional Mamba with its norm and its residual connection, as one function of its tensors."""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._launch import on_device
from ..add_norm import norm_backward, norm_forward
from ..bimamba.launch import CoreOutputs, Layout, core_backward, core_forward
from .elementwise import add, prepare
from .parameters import WeightLayout, lay_out_weights, sum_parts
from .products import input_gradient, linear, rows_of, weight_gradient


class _Arguments(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_eps: float
    in_proj_weight: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj_weight: Tensor
    scale: Optional[Tensor]
    dtype: torch.dtype


class _Saved(NamedTuple):
    """Weights as they are laid out and A; the tokens normalised before the weight, and reciprocal deviations; the output
    of in_proj; and what `core_forward` saves."""

    in_proj: Tensor
    out_proj: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    normal: Tensor
    moments: Tensor
    xz: Tensor
    x_dbl: Tensor
    mean: Tensor
    states: Tensor


def bimamba_branch(
    x: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    in_proj_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj_weight: Tensor,
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """x + scale * out_proj(bimamba_core(in_proj(RMSNorm(x)))) with A = -exp(A_log), on Triton.

    The backward pass recomputes the normalised tokens, the convolutions and dt. Differentiable once, in reverse mode, in
    every tensor but scale.

    Args:
        x: [B, L, d] in fp32.
        norm_weight: [d].
        norm_eps: Added to the mean square.
        in_proj_weight: [2D, d].
        conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, D: As of `bimamba_core`, with at most 4 taps.
        A_log: [2, D, N] with 1 to 64 states.
        out_proj_weight: [d, D].
        scale: Factor of each sample, [B], as stochastic depth draws it; None for 1.
        dtype: That of the products and of the tokens with D channels.

    Returns:
        [B, L, d] in fp32.
    """
    arguments = _Arguments(
        *(x, norm_weight, norm_eps, in_proj_weight, conv_weight, conv_bias, x_proj_weight, dt_weight),
        *(dt_bias, A_log, D, out_proj_weight, scale, dtype),
    )
    with on_device(x):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _BiMambaBranch.apply(*arguments)
        return _forward(arguments, save=False)[0]


class _BiMambaBranch(torch.autograd.Function):
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
        norm_weight, in_proj_weight, *core, out_proj_weight, scale = tensors[: -len(_Saved._fields)]
        conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D = core
        saved = _Saved(*tensors[-len(_Saved._fields) :])
        layout = Layout(dt_weight.shape[-1], A_log.shape[-1])
        with on_device(grad):
            grad = grad.contiguous()
            grad_y, normalised, _ = prepare(grad, scale, saved.normal, norm_weight, None)
            grad_out = input_gradient(grad_y, saved.out_proj).view(saved.mean.shape)
            weights = conv_weight, conv_bias, saved.x_proj, saved.dt_proj, dt_bias, saved.A, D
            outputs = CoreOutputs(None, saved.x_dbl, saved.mean, saved.states)
            core = core_backward(grad_out, saved.xz, *weights, outputs, log_A=True, recompute_out=True)
            grad_out_proj_weight = weight_gradient(grad_y, rows_of(core.out), out_proj_weight.dtype)
            grad_xz = rows_of(core.xz)
            grad_in_proj_weight = weight_gradient(grad_xz, normalised, in_proj_weight.dtype)
            grad_normalised = input_gradient(grad_xz, saved.in_proj)
            grad_x = torch.empty_like(grad)
            sums_norm = norm_backward(
                grad_normalised, saved.normal, norm_weight, saved.moments, False, grad_x, grad, is_normal=True
            )
            grad_norm_weight, grad_conv_weight, grad_conv_bias, grad_D, grad_dt_bias, grad_A = sum_parts(
                (sums_norm, (norm_weight.shape,)),
                (core.conv, (conv_weight.shape, conv_bias.shape)),
                (core.scans, (D.shape, dt_bias.shape, A_log.shape)),
            )
            grad_x_proj_weight = layout.of_x_proj(core.x_proj)
            grad_dt_weight = core.dt_proj[..., : layout.rank]
        return (
            *(grad_x, grad_norm_weight, None, grad_in_proj_weight, grad_conv_weight, grad_conv_bias),
            *(grad_x_proj_weight, grad_dt_weight, grad_dt_bias, grad_A, grad_D, grad_out_proj_weight, None, None),
        )


def _forward(arguments: _Arguments, save: bool) -> Tuple[Tensor, Optional[_Saved]]:
    a = arguments
    x = a.x.contiguous()
    layout = Layout(a.dt_weight.shape[-1], a.A_log.shape[-1])
    in_proj, out_proj, x_proj, dt_proj, A = lay_out_weights(
        (a.in_proj_weight, a.out_proj_weight, a.x_proj_weight, a.dt_weight),
        a.dtype,
        a.A_log,
        (None, None, *_layouts(layout, a.x_proj_weight, a.dt_weight)),
    )
    normalised, normal, moments = norm_forward(x, a.norm_weight, None, a.norm_eps, a.dtype, save, save_normal=save)
    xz = linear(normalised, in_proj)
    del normalised
    core = core_forward(xz, a.conv_weight, a.conv_bias, x_proj, dt_proj, a.dt_bias, A, a.D, save)
    out = add(x, linear(core.out, out_proj), a.scale)
    if not save:
        return out, None
    weights = in_proj, out_proj, x_proj, dt_proj, A
    return out, _Saved(*weights, normal, moments, xz, core.x_dbl, core.mean, core.states)


def _layouts(layout: Layout, x_proj_weight: Tensor, dt_weight: Tensor) -> Tuple[WeightLayout, WeightLayout]:
    """x_proj [2, R + 2N, D] -> [2, size, D] and dt_proj [2, D, R] -> [2, D, padded rank]."""
    directions, _, dim = x_proj_weight.shape
    x_proj = WeightLayout((directions, layout.size, dim), 1, layout.rank, layout.padded_rank)
    return x_proj, WeightLayout((directions, dim, layout.padded_rank), 2, layout.rank, layout.padded_rank)
