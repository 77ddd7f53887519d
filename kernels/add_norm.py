"""Residual connection and the norm that follows it, in one pass."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .routed import check_shape

if triton is not None:
    from .fused.add_norm_operator import run_add_norm

MAX_FUSED_CHANNELS = 8192  # a row is held in registers

# Whether the graphs of torch.compile and torch.export hold the kernels. Left to inductor, an addition, a norm and a
# cast took two or three kernels, and VMamba-T's inference a tenth more time.
_FUSE_WHEN_COMPILED = True


def add_rms_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    eps: float = 1e-5,
    scale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """Adds to a residual stream in fp32, and normalises it by RMSNorm over the channels.

        summed = residual + scale * x,    normalised = weight * summed / sqrt(mean(summed^2) + eps)

    Where Triton runs one kernel does it, and one its backward pass, for up to 8192 channels; so too in the graphs of
    torch.compile and torch.export. While torch.jit traces, the operations are PyTorch's own. Differentiable in reverse
    mode in x, residual and weight; scale is a constant.

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
    check_tensors('add_rms_norm', x=x, residual=residual, weight=weight, scale=scale)
    _check(x, residual, weight, scale, out_dtype)
    return _add_norm(x, residual, weight, None, eps, scale, out_dtype or weight.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    scale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """Adds to a residual stream in fp32, and normalises it by LayerNorm over the channels.

        summed = residual + scale * x,    normalised = weight * (summed - mean) / sqrt(variance + eps) + bias

    The rest is as of `add_rms_norm`; bias is [d], and differentiable too.
    """
    check_tensors('add_layer_norm', x=x, residual=residual, weight=weight, bias=bias, scale=scale)
    _check(x, residual, weight, scale, out_dtype)
    check_shape('bias', bias, x.shape[-1:])
    return _add_norm(x, residual, weight, bias, eps, scale, out_dtype or weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, out_dtype: Optional[torch.dtype] = None
) -> Tensor:
    """LayerNorm over the channels, computed in fp32 (fp64 if x is fp64) of x in any floating dtype.

    As `add_layer_norm` without an addition, and without a copy of x in fp32.

    Returns:
        [B, ..., d] in out_dtype, the weight's by default.
    """
    check_tensors('layer_norm', x=x, weight=weight, bias=bias)
    _check(x, None, weight, None, out_dtype)
    check_shape('bias', bias, x.shape[-1:])
    return _norm(x, None, weight, bias, eps, None, out_dtype or weight.dtype)[0]


def _add_norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    scale: Optional[Tensor],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    normalised, summed = _norm(x, residual, weight, bias, eps, scale, out_dtype)
    return normalised, x.to(_wide(x)) if summed is None else summed


def _norm(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    scale: Optional[Tensor],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Optional[Tensor]]:
    """The normalised sum, and the sum; None where nothing is added to x."""
    if runs_on_triton(x) and x.shape[-1] <= MAX_FUSED_CHANNELS and not _is_captured():
        return run_add_norm(x, residual, scale, weight, bias, eps, out_dtype)
    return _plain(x, residual, weight, bias, eps, scale, out_dtype)


def _is_captured() -> bool:
    """Whether a graph is being made that must hold PyTorch's own operations."""
    return (torch.compiler.is_compiling() and not _FUSE_WHEN_COMPILED) or torch.jit.is_tracing()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plain(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor],
    eps: float,
    scale: Optional[Tensor],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    summed = x.to(wide)
    if scale is not None:
        summed = summed * scale.detach().to(wide).view(-1, *(1,) * (x.ndim - 1))
    if residual is not None:
        summed = residual + summed
    if bias is None:
        # Not F.rms_norm, whose shape PyTorch 2.11 mistakes in graphs of any batch size.
        normalised = summed * torch.rsqrt(summed.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide)
    else:
        normalised = F.layer_norm(summed, x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normalised.to(out_dtype), summed


def _check(
    x: Tensor,
    residual: Optional[Tensor],
    weight: Tensor,
    scale: Optional[Tensor],
    out_dtype: Optional[torch.dtype],
) -> None:
    if x.ndim < 2 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, ..., d] tensor with d > 0, got {tuple(x.shape)} {x.dtype}')
    wide = _wide(x)
    if residual is not None and (residual.shape != x.shape or residual.dtype != wide):
        shape = tuple(residual.shape)
        raise ValueError(f'residual must be {list(x.shape)} {wide} like x {x.dtype}, got {shape} {residual.dtype}')
    check_shape('weight', weight, x.shape[-1:])
    if scale is not None:
        check_shape('scale', scale, x.shape[:1])
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f'out_dtype must be floating, got {out_dtype}')
