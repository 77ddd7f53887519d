"""What follows a convolution in inference, in one pass over a map: bias, BatchNorm, activation and residual."""

from functools import lru_cache
from typing import Optional

from torch import Tensor

from ._device import fast_sigmoid
from ._launch import MAX_PLANS, Launch, cdiv, is_nvidia, next_power_of_2, on_device, tl, triton

ACTIVATIONS = None, 'relu', 'gelu_tanh'
_BLOCK_ELEMENTS = 4096  # rows times channels that a program holds, more only if one row has more


@triton.jit(do_not_specialize_on_alignment=['rows'])  # maps of any size run on the same compiled kernel
def batch_norm_kernel(
    x,  # [rows, dim]
    shift,  # [dim], or None
    mean,  # [dim], or None for no norm
    variance,  # [dim], or None
    weight,  # [dim], or None for 1
    bias,  # [dim], or None
    residual,  # [rows, dim], or None
    out,  # [rows, dim]: written, may be x
    rows,
    dim: tl.constexpr,
    eps: tl.constexpr,
    RELU: tl.constexpr,
    GELU: tl.constexpr,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    mask = (row < rows)[:, None] & has_channel[None, :]
    place = row[:, None] * dim + channel[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if shift is not None:
        value += tl.load(shift + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
    if mean is not None:
        factor = 1.0 / tl.sqrt(tl.load(variance + channel, mask=has_channel, other=1.0).to(tl.float32) + eps)
        if weight is not None:
            factor *= tl.load(weight + channel, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
        value -= tl.load(mean + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
        value *= factor[None, :]
        if bias is not None:
            value += tl.load(bias + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]  # [BLOCK_D]
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    if GELU:
        value *= fast_sigmoid(value * (1.5957691216057308 + 0.07135481282553505 * value * value), NVIDIA)
    if residual is not None:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def batch_norm_(
    x: Tensor,
    shift: Optional[Tensor],
    mean: Optional[Tensor] = None,
    variance: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 0.0,
    act: Optional[str] = None,
    residual: Optional[Tensor] = None,
    out: Optional[Tensor] = None,
) -> Tensor:
    """act(weight * (x + shift - mean) / sqrt(variance + eps) + bias) + residual, in fp32 and without gradients.

    It runs on Triton only.

    Args:
        x: [..., d]; overwritten unless there is `out`. All tensors are contiguous.
        shift: [d], added before the norm: the bias of a convolution. It and what follows have any floating dtype.
        mean, variance: [d] each; None for no norm.
        weight, bias: [d] each, of the norm.
        eps: Added to the variance.
        act: One of `ACTIVATIONS`.
        residual: Like x, added at the end.
        out: Like x, where to write the result.

    Returns:
        The result, in x or out.
    """
    out = x if out is None else out
    dim = x.shape[-1]
    with on_device(x):
        launch = _launch(x.shape[:-1].numel(), dim, eps, act, is_nvidia(x))
        launch(x, shift, mean, variance, weight, bias, residual, out)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _launch(rows: int, dim: int, eps: float, act: Optional[str], nvidia: bool) -> Launch:
    block_d = next_power_of_2(dim)
    block_rows = max(_BLOCK_ELEMENTS // block_d, 1)
    constants = dim, eps, act == 'relu', act == 'gelu_tanh', nvidia, block_rows, block_d
    return Launch(batch_norm_kernel, cdiv(rows, block_rows), (rows,), constants, warps=max(4, block_d // 1024))
