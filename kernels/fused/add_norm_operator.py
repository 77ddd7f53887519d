"""Residual connection and norm on the Triton kernels as an operator of torch."""

from math import prod
from typing import Optional

import torch
from torch import Tensor

from ..backend import device_of
from . import add_norm
from .direct import differentiable


def _forward(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised sum in out_dtype, the sum in fp32, and what is kept of the norm for the backward pass.

    The sum is empty where nothing is added to x.
    """
    out, summed, moments = _outputs(x, residual, scale, bias, out_dtype, keep)
    with device_of(x):
        x, weight = x.contiguous(), weight.contiguous()
        residual, scale, bias = (_contiguous(tensor) for tensor in (residual, scale, bias))
        written = None if _adds_nothing(residual, scale) else summed
        add_norm.forward(x, residual, scale, weight, bias, out, written, moments if keep else None, eps)
    return out, summed, moments


add_norm_fused = torch.library.custom_op('vmamba::add_norm_fused', _forward, mutates_args=())


def _adds_nothing(residual: Optional[Tensor], scale: Optional[Tensor]) -> bool:
    return residual is None and scale is None


def _contiguous(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous()


def _outputs(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    bias: Optional[Tensor],
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of `_forward` yet to be filled."""
    rows = prod(x.shape[:-1]) if keep else 0
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(0 if _adds_nothing(residual, scale) else x.shape, dtype=torch.float32),
        x.new_empty(1 if bias is None else 2, rows, dtype=torch.float32),
    )


@add_norm_fused.register_fake
def _(x, residual, scale, weight, bias, eps, out_dtype, keep):
    return _outputs(x, residual, scale, bias, out_dtype, keep)


def _backward(
    grad_out: Optional[Tensor],
    grad_summed: Optional[Tensor],
    summed: Tensor,
    scale: Optional[Tensor],
    weight: Tensor,
    moments: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual; of x, empty where the two are one; and of weight and bias, as rows in fp32."""
    grad_residual, grad_x = _gradients_of_rows(summed, scale, x_dtype, has_residual)
    with device_of(summed):
        grad_out = torch.zeros_like(summed) if grad_out is None else grad_out.contiguous()
        summed, weight = summed.contiguous(), weight.contiguous()
        grad_vectors = add_norm.backward(
            grad_out,
            _contiguous(grad_summed),
            summed,
            _contiguous(scale),
            weight,
            moments,
            grad_residual if has_residual else None,
            None if _are_one(x_dtype, scale, has_residual) else grad_x,
        )
    return grad_residual, grad_x, grad_vectors


add_norm_fused_backward = torch.library.custom_op('vmamba::add_norm_fused_backward', _backward, mutates_args=())


def _are_one(x_dtype: torch.dtype, scale: Optional[Tensor], has_residual: bool) -> bool:
    """Whether the gradient of x is that of residual."""
    return has_residual and scale is None and x_dtype == torch.float32


def _gradients_of_rows(
    summed: Tensor, scale: Optional[Tensor], x_dtype: torch.dtype, has_residual: bool
) -> tuple[Tensor, Tensor]:
    """The first two outputs of `_backward` yet to be filled; what is not needed is empty."""
    return (
        summed.new_empty(summed.shape if has_residual else 0),
        summed.new_empty(0 if _are_one(x_dtype, scale, has_residual) else summed.shape, dtype=x_dtype),
    )


@add_norm_fused_backward.register_fake
def _(grad_out, grad_summed, summed, scale, weight, moments, x_dtype, has_residual):
    vectors = moments.new_empty(moments.shape[0], summed.shape[-1])
    return (*_gradients_of_rows(summed, scale, x_dtype, has_residual), vectors)


def _setup_context(ctx, inputs, output):
    x, residual, scale, weight, bias, _, _, ctx.keep = inputs
    _, summed, moments = output
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.sum_is_x = _adds_nothing(residual, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # zeros for what is not used
    ctx.save_for_backward(x if ctx.sum_is_x else summed, scale, weight, moments)


def _gradients(
    backward, ctx, grad_out: Optional[Tensor], grad_summed: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    if not ctx.keep:
        raise RuntimeError('add_norm_fused was called with keep=False and has no gradients; call it with keep=True')
    grad_summed = None if ctx.sum_is_x else grad_summed
    if grad_out is None and grad_summed is None:
        return (None,) * 8
    summed, scale, weight, moments = ctx.saved_tensors
    arguments = summed, scale, weight, moments, ctx.x_dtype, ctx.has_residual
    grad_residual, grad_x, grad_vectors = backward(grad_out, grad_summed, *arguments)
    return (
        grad_residual if _are_one(ctx.x_dtype, scale, ctx.has_residual) else grad_x,
        grad_residual if ctx.has_residual else None,
        None,
        grad_vectors[0].to(weight.dtype),
        None if ctx.bias_dtype is None else grad_vectors[1].to(ctx.bias_dtype),
        None,
        None,
        None,
    )


_run = differentiable(
    add_norm_fused, _forward, add_norm_fused_backward, _backward, _setup_context, _gradients, results=2
)


def run_add_norm(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Optional[Tensor]]:
    """The normalised sum in out_dtype, and the sum in fp32, None if nothing is added; see `add_layer_norm`."""
    out, summed = _run(x, residual, scale, weight, bias, eps, out_dtype)
    return out, None if _adds_nothing(residual, scale) else summed
