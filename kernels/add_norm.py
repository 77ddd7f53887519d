"""Norms over channels, and a residual connection with the norm that follows it, in one pass each way."""

from functools import lru_cache
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    next_power_of_2,
    num_processors,
    runs_on_triton,
    share_rows,
    tl,
    triton,
)
from ._operator import Operator

_MAX_CHANNELS = 8192  # of the Triton kernels, which hold a row in registers
_BLOCK_ELEMENTS = 2048  # rows times channels that a program holds at a time, more only if one row has more
_PROGRAMS_PER_PROCESSOR = 8  # of the backward pass, each of which leaves a partial sum


def add_rms_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    eps: float = 1e-5,
    scale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> Tuple[Tensor, Tensor]:
    """Adds to a residual stream in fp32, and normalises it by RMSNorm over the channels.

        summed = residual + scale * x,    normalised = weight * summed / sqrt(mean(summed^2) + eps)

    On Triton one kernel, and one for its backward pass, for up to 8192 channels. In the graphs of torch.compile,
    torch.export and torch.jit the operations are PyTorch's own. Differentiable in reverse mode in x, residual and
    weight; scale is a constant.

    Args:
        x: What is added, [B, ..., d], in any floating dtype.
        residual: The stream so far, like x but in fp32 (fp64 if x is fp64); None to start it with x.
        weight: [d].
        eps: Added to the mean square.
        scale: Factor of each sample, [B], as stochastic depth draws it; None for 1.
        out_dtype: Dtype of the normalised stream, the weight's by default.

    Returns:
        normalised [B, ..., d], and summed [B, ..., d] in fp32 (fp64 if x is fp64), which is x itself if nothing is
        added to it and it has that dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check('add_rms_norm', x, residual, weight, None, scale, out_dtype)
    return _add_norm(x, residual, weight, None, eps, scale, out_dtype or weight.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    scale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> Tuple[Tensor, Tensor]:
    """Adds to a residual stream in fp32, and normalises it by LayerNorm over the channels.

        summed = residual + scale * x,    normalised = weight * (summed - mean) / sqrt(variance + eps) + bias

    Like `add_rms_norm` in all else; bias is [d], and differentiable too.
    """
    _check('add_layer_norm', x, residual, weight, bias, scale, out_dtype)
    return _add_norm(x, residual, weight, bias, eps, scale, out_dtype or weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    """RMSNorm over the channels, computed in fp32 (fp64 if x is fp64) of x in any floating dtype.

    Returns:
        [B, ..., d] in out_dtype, the weight's by default.
    """
    _check('rms_norm', x, None, weight, None, None, out_dtype)
    return _norm(x, weight, None, eps, out_dtype or weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: Optional[torch.dtype] = None
) -> Tensor:
    """LayerNorm over the channels, computed in fp32 (fp64 if x is fp64) of x in any floating dtype.

    Returns:
        [B, ..., d] in out_dtype, the weight's by default.
    """
    _check('layer_norm', x, None, weight, bias, None, out_dtype)
    return _norm(x, weight, bias, eps, out_dtype or weight.dtype)


def _check(
    function: str,
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    scale: Optional[Tensor],
    out_dtype: Optional[torch.dtype],
) -> None:
    is_matrix = x.ndim >= 2 and x.shape[-1] > 0 and x.is_floating_point()
    found = f'{tuple(x.shape)} {x.dtype}'
    check_that(is_matrix, f'{function}: x must be a floating tensor [B, ..., d] with d > 0, got {found}')
    middle = ' '.join(f'size_{i}' for i in range(1, x.ndim - 1))
    shape = f'B {middle} d'
    others = dict(weight=(weight, 'd'), bias=(bias, 'd'), scale=(scale, 'B'))
    check(function, x=(x, shape), residual=(residual, shape), **others)
    if residual is not None:
        wide = _wide(x)
        check_that(residual.dtype == wide, f'residual must be {wide} as x is {x.dtype}, got {residual.dtype}')
    check_that(out_dtype is None or out_dtype.is_floating_point, f'out_dtype must be floating, got {out_dtype}')


def _add_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    scale: Optional[Tensor],
    out_dtype: torch.dtype,
) -> Tuple[Tensor, Tensor]:
    wide = _wide(x)
    if residual is None and scale is None:
        return _norm(x, weight, bias, eps, out_dtype), x.to(wide)
    if _has_kernel(x):
        return _add_norm_operator(x, residual, scale, weight, bias, eps, out_dtype)
    summed = x.to(wide)
    if scale is not None:
        summed = summed * scale.detach().to(wide).view(-1, *(1,) * (x.ndim - 1))
    if residual is not None:
        summed = residual + summed
    return _plain_norm(summed, weight, bias, eps, out_dtype), summed


def _norm(x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype) -> Tensor:
    if _has_kernel(x):
        return _norm_operator(x, weight, bias, eps, out_dtype)
    return _plain_norm(x, weight, bias, eps, out_dtype)


def _plain_norm(x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype) -> Tensor:
    wide = _wide(x)
    x, weight = x.to(wide), weight.to(wide)
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias.to(wide), eps).to(out_dtype)
    # Not F.rms_norm, whose shape PyTorch 2.11 mistakes in graphs of any batch size.
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight).to(out_dtype)


def _has_kernel(x: Tensor) -> bool:
    """Whether x is normalised on Triton. A compiler fuses a norm with what is around it."""
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return runs_on_triton(x) and x.shape[-1] <= _MAX_CHANNELS and not captured


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype, save: bool
) -> Tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.contiguous()
    out, _, moments = norm_forward(x.contiguous(), weight.contiguous(), bias, eps, out_dtype, save)
    return out, x.new_empty(0, dtype=torch.float32) if moments is None else moments


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out,), (x, weight, bias, _, _), (moments,) = grads, inputs, saved
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = norm_backward(grad_out.contiguous(), x.contiguous(), weight.contiguous(), moments, bias is not None, grad_x)
    return grad_x, *_parameter_gradients(sums)


def _like(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float, out_dtype: torch.dtype, save: bool
) -> Tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(_moments_shape(x, bias, save), dtype=torch.float32)


def _add_forward(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.float32)
    residual, scale, bias = (None if t is None else t.contiguous() for t in (residual, scale, bias))
    out, _, moments = norm_forward(
        x.contiguous(), weight.contiguous(), bias, eps, out_dtype, save, residual, scale, summed
    )
    return out, summed, x.new_empty(0, dtype=torch.float32) if moments is None else moments


def _add_backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_out, grad_summed), (x, residual, scale, weight, bias, _, _), (moments, summed) = grads, inputs, saved
    grad_out = torch.zeros_like(summed) if grad_out is None else grad_out.contiguous()
    grad_summed, scale = (None if t is None else t.contiguous() for t in (grad_summed, scale))
    grad_residual = torch.empty_like(summed) if residual is not None else None
    # With a residual and without a scale, an fp32 gradient of x is that of the residual.
    is_shared = residual is not None and scale is None and x.dtype == torch.float32
    grad_x = None if is_shared else summed.new_empty(summed.shape, dtype=x.dtype)
    sums = norm_backward(
        grad_out, summed, weight.contiguous(), moments, bias is not None, grad_x, grad_summed, grad_residual, scale
    )
    return grad_residual if is_shared else grad_x, grad_residual, None, *_parameter_gradients(sums)


def _parameter_gradients(sums: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients of weight and bias from their partial sums."""
    total = sums.sum(dim=0)
    return total[0], total[1] if total.shape[0] == 2 else None


def _add_like(
    x: Tensor,
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    out, moments = _like(x, weight, bias, eps, out_dtype, save)
    return out, x.new_empty(x.shape, dtype=torch.float32), moments


def _moments_shape(x: Tensor, bias: Optional[Tensor], save: bool) -> Tuple[int, ...]:
    return (1 if bias is None else 2, x.shape[:-1].numel()) if save else (0,)


_norm_operator = Operator('norm', _forward, _backward, _like)
_add_norm_operator = Operator(
    'add_norm',
    _add_forward,
    _add_backward,
    _add_like,
    results=2,
    constants=('scale',),
    saved_results=(1,),
    unsaved=('x', 'residual'),
)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # images of any size run on the same kernel
def norm_kernel(
    x,  # [rows, dim]
    residual,  # [rows, dim], or None
    scale,  # [samples], or None
    weight,  # [dim]
    bias,  # [dim]; None for RMSNorm
    out,  # [rows, dim]: written
    summed,  # [rows, dim] or None: written, residual + scale * x
    normal,  # [rows, dim] or None: written, the normalised sum before weight and bias
    moments,  # [1 or 2, rows] or None: written, reciprocal deviations; of LayerNorm followed by means unless `normal` is
    rows,
    rows_per_sample,
    eps: tl.constexpr,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program normalises ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    has_row = row < rows
    has_channel = channel < dim
    mask = has_row[:, None] & has_channel[None, :]
    offset = row[:, None] * dim + channel[None, :]
    total = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if scale is not None:
        factor = tl.load(scale + row // rows_per_sample, mask=has_row, other=0.0).to(tl.float32)  # [ROWS]
        total *= factor[:, None]
    if residual is not None:
        total += tl.load(residual + offset, mask=mask, other=0.0)  # [ROWS, BLOCK_D]
    if summed is not None:
        tl.store(summed + offset, total, mask=mask)
    if bias is not None:
        mean = tl.sum(total, axis=1) / dim
        if moments is not None:
            if normal is None:
                tl.store(moments + rows + row, mean, mask=has_row)
        total = tl.where(has_channel[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / dim + eps)
    if moments is not None:
        tl.store(moments + row, rstd, mask=has_row)
    total *= rstd[:, None]
    if normal is not None:
        tl.store(normal + offset, total.to(normal.dtype.element_ty), mask=mask)
    total *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample', 'rows_per_program'])
def norm_backward_kernel(
    grad_out,  # [rows, dim]
    grad_summed,  # [rows, dim], or None
    summed,  # [rows, dim]: what was normalised, or that normalised before weight and bias
    scale,  # [samples], or None
    weight,  # [dim]
    moments,  # as in `norm_kernel`
    grad_residual,  # [rows, dim] or None: written
    grad_x,  # [rows, dim] or None: written
    sums,  # [programs, 1 or 2, dim]: written, parts of the gradients of weight and bias
    rows,
    rows_per_sample,
    rows_per_program,
    dim: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    NORMAL: tl.constexpr,
):
    """One program walks rows_per_program rows, ROWS at a time.

    With n = (summed - mean) * rstd, which `summed` itself is with NORMAL, and g = weight * grad_out:

        grad_residual = grad_summed + rstd * (g - n * mean(g * n) - mean(g)),    grad_x = scale * grad_residual

    where RMSNorm, which is not CENTRED, has neither mean nor mean(g).
    """
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    grad_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factor = tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        has_row = row < rows
        mask = has_row[:, None] & has_channel[None, :]
        offset = row[:, None] * dim + channel[None, :]
        grad = tl.load(grad_out + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        normal = tl.load(summed + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        rstd = tl.load(moments + row, mask=has_row, other=0.0)  # [ROWS]
        if not NORMAL:
            if CENTRED:
                mean = tl.load(moments + rows + row, mask=has_row, other=0.0)  # [ROWS]
                normal -= mean[:, None]  # beyond the channels too, where grad is 0
            normal *= rstd[:, None]
        if CENTRED:
            grad_bias += grad
        grad_weight += grad * normal
        grad *= factor[None, :]
        along = tl.sum(grad * normal, axis=1) / dim
        if CENTRED:
            grad -= tl.sum(grad, axis=1)[:, None] / dim
        grad = (grad - normal * along[:, None]) * rstd[:, None]
        if grad_summed is not None:
            grad += tl.load(grad_summed + offset, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        if grad_residual is not None:
            tl.store(grad_residual + offset, grad, mask=mask)
        if grad_x is not None:
            if scale is not None:
                scales = tl.load(scale + row // rows_per_sample, mask=has_row, other=0.0).to(tl.float32)  # [ROWS]
                grad *= scales[:, None]
            tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), mask=mask)
    if CENTRED:
        sums += program * 2 * dim + channel
        tl.store(sums + dim, tl.sum(grad_bias, axis=0), mask=has_channel)
    else:
        sums += program * dim + channel
    tl.store(sums, tl.sum(grad_weight, axis=0), mask=has_channel)


class NormOutputs(NamedTuple):
    out: Tensor
    normal: Optional[Tensor]
    moments: Optional[Tensor]


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
    residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    summed: Optional[Tensor] = None,
    save_normal: bool = False,
) -> NormOutputs:
    """LayerNorm of residual + scale * x on Triton, or RMSNorm without a bias. All tensors are contiguous.

    Args:
        save: Also return the moments [1 or 2, rows], reciprocal deviations and for LayerNorm means.
        summed: Where to write the sum.
        save_normal: Also return the normalised sum before weight and bias, in out_dtype; then no means are needed.
    """
    out = torch.empty_like(x, dtype=out_dtype)
    normal = torch.empty_like(out) if save_normal else None
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    means = save and bias is not None and not save_normal
    moments = x.new_empty((2 if means else 1, rows), dtype=torch.float32) if save else None
    launch = _forward_launch(rows, rows // max(x.shape[0], 1), dim, eps)
    launch(x, residual, scale, weight, bias, out, summed, normal, moments)
    return NormOutputs(out, normal, moments)


def norm_backward(
    grad_out: Tensor,
    summed: Tensor,
    weight: Tensor,
    moments: Tensor,
    has_bias: bool,
    grad_x: Optional[Tensor],
    grad_summed: Optional[Tensor] = None,
    grad_residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    is_normal: bool = False,
) -> Tensor:
    """Gradients of `norm_forward`, the same at every run: fills grad_x and grad_residual, and returns the others.

    Args:
        summed: What was normalised; with `is_normal` the normalised sum before weight and bias.
        has_bias: Whether the norm is LayerNorm.

    Returns:
        Partial sums [parts, 1 or 2, dim] in fp32 of the gradients of the weight and, for LayerNorm, of the bias.
    """
    rows, dim = summed.numel() // summed.shape[-1], summed.shape[-1]
    rows_per_sample = rows // max(summed.shape[0], 1)
    launch = _backward_launch(rows, rows_per_sample, dim, has_bias, is_normal, num_processors(summed))
    sums = summed.new_empty((launch.grid[0], 2 if has_bias else 1, dim), dtype=torch.float32)
    launch(grad_out, grad_summed, summed, scale, weight, moments, grad_residual, grad_x, sums)
    return sums


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(rows: int, rows_per_sample: int, dim: int, eps: float) -> Launch:
    block_d, block_rows, warps = _block(dim)
    constants = eps, dim, block_d, block_rows
    return Launch(norm_kernel, cdiv(rows, block_rows), (rows, rows_per_sample), constants, warps)


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(
    rows: int, rows_per_sample: int, dim: int, has_bias: bool, is_normal: bool, processors: int
) -> Launch:
    block_d, block_rows, warps = _block(dim)
    programs, rows_per_program = share_rows(rows, block_rows, _PROGRAMS_PER_PROCESSOR * processors)
    sizes = rows, rows_per_sample, rows_per_program
    return Launch(norm_backward_kernel, programs, sizes, (dim, block_d, block_rows, has_bias, is_normal), warps)


def _block(dim: int) -> Tuple[int, int, int]:
    """A program's channels and rows at a time, powers of 2, and warps."""
    block_d = next_power_of_2(dim)
    return block_d, max(_BLOCK_ELEMENTS // block_d, 1), max(4, block_d // 512)
