"""The MLP of a block with its norm, as a branch of the residual stream."""

from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._device import gelu, load_factors
from .._launch import MAX_PLANS, Launch, cdiv, is_nvidia, shared_memory, tl, triton
from .chain import Link, ParameterGradients
from .elementwise import gelu_backward_, prepare
from .parameters import Parts, Weight
from .products import input_gradient, weight_gradient
from .stream import Stream, StreamGradient, grad_of_stream, normalise

# Bytes of the hidden map that inference holds at a time: enough rows to fill a GPU, and few enough for its cache.
_HIDDEN_BYTES = 2**25


class _Tile(NamedTuple):
    """Rows of a program, hidden channels at a time, warps, stages of the loop over hidden channels, and KiB of shared
    memory that it needs at most."""

    rows: int
    block_h: int
    warps: int
    stages: int
    shared: int


# Of the kernel that holds the hidden map on the chip, by the largest number of channels that each is for. More channels
# leave too few registers: there the library's products and a pass over the hidden map are faster.
_TILES = {128: _Tile(128, 32, 4, 3, shared=96), 192: _Tile(128, 64, 8, 3, shared=200)}


class MlpParameters(NamedTuple):
    """Norm [d], fc1 [h, d] and [h], fc2 [d, h] and [d]."""

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class _Saved(NamedTuple):
    """The map normalised before weight and bias, reciprocal deviations, and the hidden map before GELU, unless it is
    recomputed."""

    normal: Tensor
    moments: Tensor
    hidden: Optional[Tensor]


class MlpBranch(NamedTuple):
    """fc2(gelu(fc1(LayerNorm(x)))).

    The backward pass recomputes the normalised map and GELU; and for few channels the hidden map, which then never
    exists in the forward pass.
    """

    norm_eps: float

    Parameters = MlpParameters
    Saved = _Saved

    def weights(self, parameters: MlpParameters) -> List[Weight]:
        return [Weight(weight) for weight in parameters[2:]]

    def forward(
        self, stream: Stream, link: Link, weights: Sequence[Tensor], save: bool
    ) -> Tuple[Stream, Optional[_Saved]]:
        p: MlpParameters = link.parameters
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        tile = _tile_of(fc1_weight)
        if tile is not None:
            out, normal, moments = _run_kernel(stream, link, self.norm_eps, weights, save, tile)
            return Stream(out, stream.shape), _Saved(normal, moments, None) if save else None
        x, normalised, normal, moments = normalise(
            stream, p.norm_weight, p.norm_bias, self.norm_eps, fc1_weight.dtype, save
        )
        if not save:
            return Stream(x, stream.shape, _mlp_in_slices(normalised, *weights), link.scale), None
        hidden = torch.addmm(fc1_bias, normalised, fc1_weight.t())
        out = torch.addmm(fc2_bias, F.gelu(hidden), fc2_weight.t())
        return Stream(x, stream.shape, out, link.scale), _Saved(normal, moments, hidden)

    def backward(
        self, grad: StreamGradient, link: Link, weights: Sequence[Tensor], saved: _Saved, before: Optional[Link]
    ) -> Tuple[StreamGradient, ParameterGradients]:
        p: MlpParameters = link.parameters
        fc1_weight, fc1_bias, fc2_weight, _ = weights
        grad_y, normalised, sums_y = prepare(
            grad.x, grad.y, link.scale, saved.normal, p.norm_weight, p.norm_bias, sum_rows=True
        )
        hidden = saved.hidden
        if hidden is None:
            hidden = torch.addmm(fc1_bias, normalised, fc1_weight.t())
        grad_hidden = input_gradient(grad_y, fc2_weight)
        activated, sums_hidden = gelu_backward_(grad_hidden, hidden)
        grad_fc2 = weight_gradient(grad_y, activated, p.fc2_weight.dtype)
        grad_fc1 = weight_gradient(grad_hidden, normalised, p.fc1_weight.dtype)
        grad_normalised = input_gradient(grad_hidden, fc1_weight)
        grad, sums_norm = grad_of_stream(
            grad, grad_normalised, saved.normal, saved.moments, p.norm_weight, p.norm_bias, before
        )
        parts = (
            sums_norm,
            Parts(sums_hidden, ('fc1_bias',), (p.fc1_bias.shape,)),
            Parts(sums_y, ('fc2_bias',), (p.fc2_bias.shape,)),
        )
        return grad, ParameterGradients(dict(fc1_weight=grad_fc1, fc2_weight=grad_fc2), parts)


def _mlp_in_slices(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """fc2(gelu(fc1(x))) of [rows, d], so many rows at a time that the hidden map stays small."""
    out = torch.empty_like(x)
    step = max(_HIDDEN_BYTES // (fc1_weight.shape[0] * x.element_size()), 1)
    for rows, target in zip(x.split(step), out.split(step)):
        hidden = torch.ops.aten.gelu_(torch.addmm(fc1_bias, rows, fc1_weight.t()))
        torch.addmm(fc2_bias, hidden, fc2_weight.t(), out=target)
        del hidden  # before the next one is made
    return out


@triton.jit
def _load_part(pointer, row_offset, channel, mask):
    return tl.load(pointer + row_offset + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=['rows', 'rows_per_sample'])  # maps of any size run on the same kernel
def mlp_kernel(
    x,  # [rows, D]
    y,  # [rows, D] or None: added to x, with y_scale as factor
    y_scale,  # [samples], or None
    norm_weight,  # [D]
    norm_bias,  # [D]
    fc1_weight,  # [H, D]
    fc1_bias,  # [H]
    fc2_weight,  # [D, H]
    fc2_bias,  # [D]
    scale,  # [samples], or None
    out,  # [rows, D]: written, total + scale * fc2(gelu(fc1(LayerNorm(total)))) with total = x + y_scale * y
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
    if y is not None:
        y_a = _load_part(y, offset, a, has_row)  # [ROWS, FIRST]
        y_b = _load_part(y, offset, b, has_row)  # [ROWS, SECOND]
        if y_scale is not None:
            factor = load_factors(y_scale, row, rows, rows_per_sample)
            y_a *= factor
            y_b *= factor
        x_a += y_a
        x_b += y_b
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
    out_a = tl.zeros([ROWS, FIRST], tl.float32) + tl.load(fc2_bias + a).to(tl.float32)[None, :]
    out_b = tl.zeros([ROWS, SECOND], tl.float32) + tl.load(fc2_bias + b).to(tl.float32)[None, :]
    for begin in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        h = begin + tl.arange(0, BLOCK_H)
        hidden = tl.dot(n_a, tl.load(fc1_weight + h[None, :] * D + a[:, None]))  # [FIRST, BLOCK_H]
        hidden = tl.dot(n_b, tl.load(fc1_weight + h[None, :] * D + b[:, None]), hidden)  # [SECOND, BLOCK_H]
        hidden = gelu(hidden + tl.load(fc1_bias + h).to(tl.float32)[None, :], NVIDIA).to(operand)
        out_a = tl.dot(hidden, tl.load(fc2_weight + a[None, :] * H + h[:, None]), out_a)  # [BLOCK_H, FIRST]
        out_b = tl.dot(hidden, tl.load(fc2_weight + b[None, :] * H + h[:, None]), out_b)  # [BLOCK_H, SECOND]
    if scale is not None:
        factor = load_factors(scale, row, rows, rows_per_sample)
        out_a *= factor
        out_b *= factor
    tl.store(out + offset + a[None, :], x_a + out_a, mask=has_row)
    tl.store(out + offset + b[None, :], x_b + out_b, mask=has_row)


def _parts_of(dim: int) -> Optional[Tuple[int, int]]:
    """Two powers of 2 of at least 16 that make the channels, or None."""
    first = 1 << (dim.bit_length() - 1)
    if first == dim:
        first //= 2
    second = dim - first
    return (first, second) if second >= 16 and second & (second - 1) == 0 else None


def _tile_of(fc1_weight: Tensor) -> Optional[_Tile]:
    """The tile of the kernel; None where it cannot run, or the library's products are faster."""
    hidden, dim = fc1_weight.shape
    tile = next((tile for most, tile in _TILES.items() if dim <= most), None)
    if tile is None or fc1_weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    fits = _parts_of(dim) and hidden % tile.block_h == 0 and tile.shared * 1024 <= shared_memory(fc1_weight)
    return tile if fits else None


def _run_kernel(
    stream: Stream, link: Link, eps: float, weights: Sequence[Tensor], save: bool, tile: _Tile
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """The stream after the branch; and with `save` the map normalised before weight and bias, and reciprocal deviations
    [1, rows]."""
    x, shape, y, y_scale = stream
    rows, dim = x.shape
    hidden = weights[0].shape[0]
    out = torch.empty_like(x)
    normal = torch.empty_like(x, dtype=weights[0].dtype) if save else None
    moments = x.new_empty((1, rows), dtype=torch.float32) if save else None
    launch = _launch(rows, shape[0], dim, hidden, eps, tile, is_nvidia(x))
    launch(x, y, y_scale, *link.parameters[:2], *weights, link.scale, out, normal, moments)
    return out, normal, moments


@lru_cache(maxsize=MAX_PLANS)
def _launch(rows: int, samples: int, dim: int, hidden: int, eps: float, tile: _Tile, nvidia: bool) -> Launch:
    constants = eps, dim, hidden, *_parts_of(dim), tile.rows, tile.block_h, tile.stages, nvidia
    return Launch(mlp_kernel, cdiv(rows, tile.rows), (rows, rows // samples), constants, tile.warps)
