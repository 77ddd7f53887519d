"""The MLP of a residual block with its norm and its residual connection, as one function of its tensors."""

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._device import gelu
from .._launch import MAX_PLANS, Launch, cdiv, is_nvidia, on_device, tl, triton
from ..add_norm import norm_backward, norm_forward
from .elementwise import add, gelu_backward_, prepare
from .parameters import lay_out_weights, sum_parts
from .products import input_gradient, rows_of, weight_gradient

# Bytes of the hidden map that inference holds at a time: enough rows to fill a GPU.
_HIDDEN_BYTES = 2**27


class _Tile(NamedTuple):
    """Rows of a program, hidden channels at a time, warps, and stages of the loop over hidden channels."""

    rows: int
    block_h: int
    warps: int
    stages: int


# Of the kernel that holds the hidden map on the chip, by the largest number of channels that each is for. More channels
# leave too few registers: there the library's products and a pass over the hidden map are faster.
_TILES = {128: _Tile(128, 32, 4, 3), 192: _Tile(128, 64, 8, 3)}


class _Arguments(NamedTuple):
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale: Optional[Tensor]
    dtype: torch.dtype


class _Saved(NamedTuple):
    """The map normalised before weight and bias, reciprocal deviations, weights in the products' dtype, and the hidden
    map before GELU, unless it is recomputed."""

    normal: Tensor
    moments: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    hidden: Optional[Tensor]


def mlp_branch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """x + scale * fc2(gelu(fc1(LayerNorm(x)))), on Triton.

    The backward pass recomputes the normalised map and GELU; and for few channels the hidden map, which then never
    exists in the forward pass. Differentiable once, in reverse mode, in every tensor but scale.

    Args:
        x: [B, ..., d] in fp32.
        norm_weight, norm_bias: [d].
        norm_eps: Added to the variance.
        fc1_weight, fc1_bias: [h, d], [h].
        fc2_weight, fc2_bias: [d, h], [d].
        scale: Factor of each sample, [B], as stochastic depth draws it; None for 1.
        dtype: That of the products.

    Returns:
        [B, ..., d] in fp32.
    """
    arguments = _Arguments(
        x, norm_weight, norm_bias, norm_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, dtype
    )
    with on_device(x):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return _MlpBranch.apply(*arguments)
        return _forward(arguments, save=False)[0]


class _MlpBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        arguments = _Arguments(*arguments)
        out, saved = _forward(arguments, save=True)
        ctx.save_for_backward(arguments.norm_weight, arguments.norm_bias, arguments.fc1_weight, arguments.scale, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        norm_weight, norm_bias, fc1_weight, scale, *saved = ctx.saved_tensors
        saved = _Saved(*saved)
        hidden_dim, dim = fc1_weight.shape
        with on_device(grad):
            grad = grad.contiguous()
            grad_y, normalised, sums_y = prepare(grad, scale, saved.normal, norm_weight, norm_bias, sum_rows=True)
            hidden = saved.hidden
            if hidden is None:
                hidden = torch.addmm(saved.fc1_bias, normalised, saved.fc1_weight.t())
            grad_hidden = input_gradient(grad_y, saved.fc2_weight)
            sums_hidden = gelu_backward_(grad_hidden, hidden)
            grad_fc2_weight = weight_gradient(grad_y, hidden, fc1_weight.dtype)
            grad_fc1_weight = weight_gradient(grad_hidden, normalised, fc1_weight.dtype)
            grad_normalised = input_gradient(grad_hidden, saved.fc1_weight)
            grad_x = torch.empty_like(grad)
            sums_norm = norm_backward(
                grad_normalised, saved.normal, norm_weight, saved.moments, True, grad_x, grad, is_normal=True
            )
            grad_norm_weight, grad_norm_bias, grad_fc1_bias, grad_fc2_bias = sum_parts(
                (sums_norm, ((dim,), (dim,))), (sums_hidden, ((hidden_dim,),)), (sums_y, ((dim,),))
            )
        grads = grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias
        return grad_x, grad_norm_weight, grad_norm_bias, None, *grads, None, None


def _forward(arguments: _Arguments, save: bool) -> Tuple[Tensor, Optional[_Saved]]:
    x, norm_weight, norm_bias, norm_eps, *weights, scale, dtype = arguments
    x = x.contiguous()
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights = lay_out_weights(tuple(weights), dtype)
    tile = _tile_of(x, fc1_weight)
    if tile is not None:
        out, *saved = _run_kernel(x, norm_weight, norm_bias, norm_eps, weights, scale, save, tile)
        return out, _Saved(*saved, fc1_weight, fc1_bias, fc2_weight, None) if save else None
    normalised, normal, moments = norm_forward(x, norm_weight, norm_bias, norm_eps, dtype, save, save_normal=save)
    normalised = rows_of(normalised)
    if not save:
        return add(x, _mlp_in_slices(normalised, *weights), scale), None
    hidden = torch.addmm(fc1_bias, normalised, fc1_weight.t())
    out = add(x, torch.addmm(fc2_bias, F.gelu(hidden), fc2_weight.t()), scale)
    return out, _Saved(normal, moments, fc1_weight, fc1_bias, fc2_weight, hidden)


def _mlp_in_slices(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """fc2(gelu(fc1(x))) of [rows, d], so many rows at a time that the hidden map stays small."""
    out = torch.empty_like(x)
    step = max(_HIDDEN_BYTES // (fc1_weight.shape[0] * x.element_size()), 1)
    for rows, target in zip(x.split(step), out.split(step)):
        hidden = torch.ops.aten.gelu_(torch.addmm(fc1_bias, rows, fc1_weight.t()))
        torch.addmm(fc2_bias, hidden, fc2_weight.t(), out=target)
    return out


@triton.jit
def _load_part(pointer, row_offset, channel, mask):
    return tl.load(pointer + row_offset + channel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # maps of any size run on the same kernel
def mlp_kernel(
    x,  # [rows, D], fp32
    norm_weight,  # [D]
    norm_bias,  # [D]
    fc1_weight,  # [H, D]
    fc1_bias,  # [H]
    fc2_weight,  # [D, H]
    fc2_bias,  # [D]
    scale,  # [samples], or None
    out,  # [rows, D]: written, x + scale * fc2(gelu(fc1(LayerNorm(x))))
    normal,  # [rows, D] or None: written, normalised before weight and bias
    moments,  # [rows] or None: written, reciprocal deviations
    rows,
    rows_per_sample,
    eps: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """One program computes ROWS rows. Channels are taken in two parts, of FIRST and SECOND, powers of 2 that make D."""
    operand = fc1_weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    has_row = (row < rows)[:, None]
    offset = row[:, None] * D
    a = tl.arange(0, FIRST)
    b = FIRST + tl.arange(0, SECOND)
    x_a = _load_part(x, offset, a, has_row)  # [ROWS, FIRST]
    x_b = _load_part(x, offset, b, has_row)  # [ROWS, SECOND]
    mean = (tl.sum(x_a, axis=1) + tl.sum(x_b, axis=1)) / D
    n_a = x_a - mean[:, None]
    n_b = x_b - mean[:, None]
    rstd = 1.0 / tl.sqrt((tl.sum(n_a * n_a, axis=1) + tl.sum(n_b * n_b, axis=1)) / D + eps)
    n_a *= rstd[:, None]
    n_b *= rstd[:, None]
    if normal is not None:
        tl.store(normal + offset + a[None, :], n_a.to(operand), mask=has_row)
        tl.store(normal + offset + b[None, :], n_b.to(operand), mask=has_row)
        tl.store(moments + row, rstd, mask=row < rows)
    n_a = n_a * tl.load(norm_weight + a).to(tl.float32)[None, :] + tl.load(norm_bias + a).to(tl.float32)[None, :]
    n_b = n_b * tl.load(norm_weight + b).to(tl.float32)[None, :] + tl.load(norm_bias + b).to(tl.float32)[None, :]
    n_a = n_a.to(operand)
    n_b = n_b.to(operand)
    y_a = tl.zeros([ROWS, FIRST], tl.float32) + tl.load(fc2_bias + a).to(tl.float32)[None, :]
    y_b = tl.zeros([ROWS, SECOND], tl.float32) + tl.load(fc2_bias + b).to(tl.float32)[None, :]
    for begin in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = begin + tl.arange(0, BLOCK_H)
        hidden = tl.dot(n_a, tl.load(fc1_weight + h[None, :] * D + a[:, None]))  # [FIRST, BLOCK_H]
        hidden = tl.dot(n_b, tl.load(fc1_weight + h[None, :] * D + b[:, None]), hidden)  # [SECOND, BLOCK_H]
        hidden = gelu(hidden + tl.load(fc1_bias + h).to(tl.float32)[None, :], NVIDIA).to(operand)
        y_a = tl.dot(hidden, tl.load(fc2_weight + a[None, :] * H + h[:, None]), y_a)  # [BLOCK_H, FIRST]
        y_b = tl.dot(hidden, tl.load(fc2_weight + b[None, :] * H + h[:, None]), y_b)  # [BLOCK_H, SECOND]
    if scale is not None:
        factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0).to(tl.float32)  # [ROWS]
        y_a *= factor[:, None]
        y_b *= factor[:, None]
    tl.store(out + offset + a[None, :], x_a + y_a, mask=has_row)
    tl.store(out + offset + b[None, :], x_b + y_b, mask=has_row)


def _parts_of(dim: int) -> Optional[Tuple[int, int]]:
    """Two powers of 2 of at least 16 that make the channels, or None."""
    first = 1 << (dim.bit_length() - 1)
    if first == dim:
        first //= 2
    second = dim - first
    return (first, second) if second >= 16 and second & (second - 1) == 0 else None


def _tile_of(x: Tensor, fc1_weight: Tensor) -> Optional[_Tile]:
    """The tile of the kernel for x; None where it cannot run, or the library's products are faster."""
    hidden, dim = fc1_weight.shape
    tile = next((tile for most, tile in _TILES.items() if dim <= most), None)
    is_half = fc1_weight.dtype in (torch.float16, torch.bfloat16)
    return tile if tile and is_half and _parts_of(dim) and hidden % tile.block_h == 0 else None


def _run_kernel(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    weights: Tuple[Tensor, ...],
    scale: Optional[Tensor],
    save: bool,
    tile: _Tile,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The branch; and with `save` the map normalised before weight and bias, and reciprocal deviations [1, rows]."""
    hidden, dim = weights[0].shape
    shape = x.shape
    rows = x.numel() // dim
    out = torch.empty_like(x)
    normal = torch.empty_like(x, dtype=weights[0].dtype) if save else None
    moments = x.new_empty(1, rows) if save else None
    launch = _launch(rows, shape[0], dim, hidden, norm_eps, tile, is_nvidia(x))
    launch(x, norm_weight, norm_bias, *weights, scale, out, normal, moments)
    return out, normal, moments


@lru_cache(maxsize=MAX_PLANS)
def _launch(rows: int, samples: int, dim: int, hidden: int, eps: float, tile: _Tile, nvidia: bool) -> Launch:
    constants = eps, dim, hidden, *_parts_of(dim), tile.rows, tile.block_h, tile.stages, nvidia
    return Launch(mlp_kernel, cdiv(rows, tile.rows), (rows, rows // samples), constants, tile.warps)
