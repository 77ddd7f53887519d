"""SS2D on the Triton kernels as an operator of torch."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import device_of, processors_of
from .direct import differentiable
from .ss2d import merge, merge_backward, scan_backward, scan_forward
from .ss2d_plan import NUM_ROUTES, plan, plan_of, sizes_of, states_shape


def _forward(
    x: Tensor,
    x_dbl: Optional[Tensor],
    x_proj_weight: Optional[Tensor],
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Optional[Tensor],
    norm_bias: Optional[Tensor],
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scanned, merged and perhaps normalised map, from projections x_dbl or from the weight that makes them.

    If it is kept for the backward pass also: the projections that were made, the map before the norm, the states before
    each tile, and the norm's moments.
    """
    with device_of(x):
        x, dt_weight, dt_bias, A, D = (tensor.contiguous() for tensor in (x, dt_weight, dt_bias, A, D))
        projected = _project(x, x_dbl, x_proj_weight)
        sizes = sizes_of(x, dt_weight, A)
        launches = plan(sizes, processors_of(x))
        y, states = scan_forward(x, projected, dt_weight, dt_bias, A, keep, sizes, launches)
        norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
        out, merged, moments = merge(y, x, D, norm_weight, norm_bias, norm_eps, keep)
    nothing = x.new_empty(0)
    return out, projected if keep and x_dbl is None else nothing, merged, states, moments


ss2d_fused = torch.library.custom_op('vmamba::ss2d_fused', _forward, mutates_args=())


def _whole_words(x_dbl: Tensor) -> Tensor:
    """x_dbl where words of 32 bits begin, as `load_pair` reads them: a view may begin anywhere."""
    return x_dbl if x_dbl.data_ptr() % 4 == 0 else x_dbl.clone()


def _project(x: Tensor, x_dbl: Optional[Tensor], x_proj_weight: Optional[Tensor]) -> Tensor:
    if x_dbl is not None:
        return _whole_words(x_dbl.to(x.dtype).contiguous())
    return F.linear(x, x_proj_weight.to(x.dtype)).to(x.dtype).unflatten(-1, (NUM_ROUTES, -1))


@ss2d_fused.register_fake
def _(x, x_dbl, x_proj_weight, dt_weight, dt_bias, A, D, norm_weight, norm_bias, norm_eps, keep):
    sizes = sizes_of(x, dt_weight, A)
    wide = dict(dtype=torch.float32)
    norm = keep and norm_weight is not None
    projected = (*x.shape[:3], NUM_ROUTES, sizes.dt_rank + 2 * sizes.dstate)
    pixels = sizes.batch * sizes.seqlen if norm else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(projected if keep and x_dbl is None else 0),
        x.new_empty(x.shape if norm else 0),
        x.new_empty(states_shape(sizes, plan_of(sizes, processors_of(x))) if keep else (0, 0, 0), **wide),
        x.new_empty(2, pixels, **wide),
    )


def _backward(
    grad_out: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    x_proj_weight: Optional[Tensor],
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Optional[Tensor],
    merged: Tensor,
    states: Tensor,
    moments: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x; of x_dbl, or of x_proj_weight if there is one; of dt_weight, dt_bias and A, one after the other
    in fp32; and of the norm's weight, its bias and each route of D, [3, D] in fp32."""
    dtype = x_dbl.dtype
    with device_of(x):
        x, dt_weight, dt_bias, A, D = (tensor.contiguous() for tensor in (x, dt_weight, dt_bias, A, D))
        x_dbl = _whole_words(x_dbl.to(x.dtype).contiguous())
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        sizes = sizes_of(x, dt_weight, A)
        launches = plan(sizes, processors_of(x))
        grad_merged, grad_vectors = merge_backward(grad_out.contiguous(), merged, x, norm_weight, moments)
        grads = scan_backward(grad_merged, x, x_dbl, dt_weight, dt_bias, A, D, states, sizes, launches)
        del grad_merged
        grad_x = grads.x_rows.add_(grads.x_columns)
        grad_x_dbl = grads.x_dbl.sum(dim=0, dtype=x.dtype)
        if x_proj_weight is not None:
            pixels, weight = grad_x_dbl.flatten(0, 2).flatten(1), x_proj_weight.to(x.dtype)
            grad_x.view(-1, sizes.dim).addmm_(pixels, weight)
            grad_projection = torch.mm(pixels.t(), x.view(-1, sizes.dim)).to(x_proj_weight.dtype)
        else:
            grad_projection = grad_x_dbl.to(dtype)
        return grad_x, grad_projection, grads.parameters.sum(dim=0), grad_vectors


ss2d_fused_backward = torch.library.custom_op('vmamba::ss2d_fused_backward', _backward, mutates_args=())


@ss2d_fused_backward.register_fake
def _(grad_out, x, x_dbl, x_proj_weight, dt_weight, dt_bias, A, D, *saved):
    projection = x_dbl if x_proj_weight is None else x_proj_weight
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(projection, memory_format=torch.contiguous_format),
        x.new_empty(sizes_of(x, dt_weight, A).parameters, dtype=torch.float32),
        x.new_empty(3, x.shape[-1], dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, x_dbl, x_proj_weight, *parameters, norm_weight, norm_bias, norm_eps, ctx.keep = inputs
    ctx.norm_bias_dtype = None if norm_bias is None else norm_bias.dtype
    ctx.set_materialize_grads(False)  # zeros for what is kept
    projected, *kept = output[1:]
    x_dbl = projected if x_dbl is None else x_dbl
    ctx.save_for_backward(x, x_dbl, x_proj_weight, *parameters, norm_weight, *kept)


def _gradients(backward, ctx, grad_out: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    if not ctx.keep:
        raise RuntimeError('ss2d_fused was called with keep=False and has no gradients; call it with keep=True')
    if grad_out is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    x_proj_weight, dt_weight, dt_bias, A, D, norm_weight = tensors[2:8]
    grad_x, grad_projection, grad_parameters, grad_vectors = backward(grad_out, *tensors)
    wide = grad_parameters.split([dt_weight.numel(), dt_bias.numel(), A.numel()])
    grads = [grad.view(like.shape).to(like.dtype) for grad, like in zip(wide, (dt_weight, dt_bias, A))]
    grad_norm_weight, grad_norm_bias, grad_skip = grad_vectors.unbind()
    return (
        grad_x,
        *((grad_projection, None) if x_proj_weight is None else (None, grad_projection)),
        *grads,
        grad_skip.to(D.dtype).expand(D.shape),
        None if norm_weight is None else grad_norm_weight.to(norm_weight.dtype),
        None if ctx.norm_bias_dtype is None else grad_norm_bias.to(ctx.norm_bias_dtype),
        None,
        None,
    )


run_ss2d = differentiable(ss2d_fused, _forward, ss2d_fused_backward, _backward, _setup_context, _gradients, results=1)
