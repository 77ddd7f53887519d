"""SS2D on the Triton kernels as an operator of torch."""

from typing import Optional

import torch
from torch import Tensor

from ..backend import processors_of
from .ss2d import merge, merge_backward, plan, scan_backward, scan_forward, sizes_of, states_shape


@torch.library.custom_op('vmamba::ss2d_fused', mutates_args=())
def ss2d_fused(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Optional[Tensor],
    norm_bias: Optional[Tensor],
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scanned, merged and perhaps normalised map; and, if they are kept for the backward pass, what it was before
    the norm, the states before each tile, and the norm's means and reciprocal deviations."""
    x, x_dbl, dt_weight, dt_bias, A, skip = _kernel_arguments(x, x_dbl, dt_weight, dt_bias, A, D)
    launches = plan(sizes_of(x, dt_weight, A), processors_of(x))
    y, states = scan_forward(x, x_dbl, dt_weight, dt_bias, A, keep, launches)
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
    out, merged, mean, rstd = merge(y, x, skip, norm_weight, norm_bias, norm_eps, keep)
    return out, merged, states if keep else states.new_empty(0), mean, rstd


def _kernel_arguments(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments in the dtypes and layouts of the kernels, and the sum of the routes' D."""
    x_dbl = x_dbl.to(x.dtype).contiguous()
    skip = D.float().sum(dim=0)
    return x.contiguous(), x_dbl, dt_weight.contiguous(), dt_bias.contiguous(), A.float().contiguous(), skip


@ss2d_fused.register_fake
def _(x, x_dbl, dt_weight, dt_bias, A, D, norm_weight, norm_bias, norm_eps, keep):
    sizes = sizes_of(x, dt_weight, A)
    pixels = sizes.batch * sizes.height * sizes.width
    wide = dict(dtype=torch.float32)
    saves_norm = keep and norm_weight is not None
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape if saves_norm else 0),
        x.new_empty(states_shape(sizes, plan(sizes, processors_of(x))) if keep else 0, **wide),
        x.new_empty(pixels if saves_norm else 0, **wide),
        x.new_empty(pixels if saves_norm else 0, **wide),
    )


@torch.library.custom_op('vmamba::ss2d_fused_backward', mutates_args=())
def ss2d_fused_backward(
    grad_out: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Optional[Tensor],
    merged: Tensor,
    states: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of the tensor arguments of `ss2d_fused`; those of an absent norm are empty."""
    inputs = x, x_dbl, dt_weight, dt_bias, A, D
    x, x_dbl, dt_weight, dt_bias, A, skip = _kernel_arguments(*inputs)
    launches = plan(sizes_of(x, dt_weight, A), processors_of(x))
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    grad_merged, grad_norm_weight, grad_norm_bias, grad_skip = merge_backward(
        grad_out.contiguous(), merged, x, norm_weight, mean, rstd
    )
    grads = scan_backward(grad_merged, x, x_dbl, dt_weight, dt_bias, A, skip, states, launches)
    del grad_merged
    if norm_weight is None:
        norm_weight, grad_norm_weight, grad_norm_bias = skip, skip.new_empty(0), skip.new_empty(0)
    return (
        grads.x_rows.add_(grads.x_columns).to(inputs[0].dtype),
        *(_sum(partial, tensor.dtype) for partial, tensor in zip(grads[2:], inputs[1:])),
        grad_skip.to(D.dtype).repeat(D.shape[0], 1),
        _as(grad_norm_weight, norm_weight.dtype),
        _as(grad_norm_bias, norm_weight.dtype),
    )


def _sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over dimension 0 as a new tensor."""
    return partial.sum(dim=0).to(dtype)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of a dtype; what an operator returns may share memory with nothing."""
    return tensor.to(dtype, copy=True)


@ss2d_fused_backward.register_fake
def _(grad_out, x, x_dbl, dt_weight, dt_bias, A, D, norm_weight, *saved):
    norm = x.new_empty(0, dtype=torch.float32) if norm_weight is None else norm_weight
    tensors = (x, x_dbl, dt_weight, dt_bias, A, D, norm, norm)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _setup_context(ctx, inputs, output):
    *tensors, norm_weight, norm_bias, norm_eps, ctx.keep = inputs
    ctx.has_norm_bias = norm_bias is not None
    ctx.save_for_backward(*tensors, norm_weight, *output[1:])


def _backward(ctx, grad_out, *grads_of_what_is_kept):
    if not ctx.keep:
        raise RuntimeError('ss2d_fused was called with keep=False and has no gradients; call it with keep=True')
    *grads, grad_norm_weight, grad_norm_bias = torch.ops.vmamba.ss2d_fused_backward(grad_out, *ctx.saved_tensors)
    if ctx.saved_tensors[6] is None:
        grad_norm_weight = None
    return *grads, grad_norm_weight, grad_norm_bias if ctx.has_norm_bias else None, None, None


ss2d_fused.register_autograd(_backward, setup_context=_setup_context)
