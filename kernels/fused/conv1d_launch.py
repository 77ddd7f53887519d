"""Launches the kernels of causal convolutions."""

from typing import Optional

import torch
from torch import Tensor

from ..backend import processors_of
from . import conv1d_plan
from .arithmetic import parts
from .conv1d import conv1d, conv1d_backward
from .conv1d_plan import empty_outputs, is_wide, split, tile_of
from .launcher import Launcher

_conv1d = Launcher(conv1d)
_conv1d_backward = Launcher(conv1d_backward)


def conv_forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, out: Optional[Tensor] = None) -> Tensor:
    """Causal convolutions of x in K = 1 or 2 directions, and SiLU of them on request; computed in fp32.

    Args:
        x: [B, L, D] with any strides; fast where channels or steps are neighbours in memory.
        weight: [K, D, w] with w of 1 to 4 taps, the last of which meets the present position; direction 0 looks back,
            direction 1 ahead.
        bias: [K, D].
        silu: Whether SiLU follows.
        out: Where to write, [B, L, K, D] with any strides.

    Returns:
        u [B, L, K, D]: `out`, or as `empty_outputs` lays it out in x's dtype.
    """
    batch, seqlen, dim = x.shape
    directions, _, taps = weight.shape
    out = empty_outputs(x, directions, x.dtype) if out is None else out
    tile = tile_of(conv1d_plan.FORWARD, x)
    wide = is_wide(tile, seqlen, dim, x.stride()[1:], (out.stride(1), out.stride(3)))
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _conv1d(
        parts(dim, tile.channels) * parts(seqlen, tile.steps) * batch,
        (x, weight, x if bias is None else bias, out),
        (seqlen, dim, *x.stride(), *out.stride()),
        (directions, taps, bias is not None, silu, tile.steps, tile.channels, wide),
        tile.warps,
    )
    return out


def conv_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, grad_x: Tensor
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of `conv_forward`, the same at every run: writes that of x into grad_x, and returns the others.

    The convolution before SiLU is made again from x.

    Args:
        grad_u: Gradient of u [B, L, K, D] with any strides.
        grad_x: Where to write, [B, L, D] with any strides.

    Returns:
        Gradients of weight [K, D, w] and, if there is one, of bias [K, D], both in fp32.
    """
    batch, seqlen, dim = x.shape
    directions, _, taps = weight.shape
    tile = tile_of(conv1d_plan.BACKWARD, x)
    regions, tiles = split(x, tile, processors_of(x))
    wide = is_wide(tile, seqlen, dim, x.stride()[1:], grad_x.stride()[1:], (grad_u.stride(1), grad_u.stride(3)))
    sums = torch.empty(batch * regions, directions, taps + 1, dim, dtype=torch.float32, device=x.device)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _conv1d_backward(
        parts(dim, tile.channels) * regions * batch,
        (grad_u, x, weight, x if bias is None else bias, grad_x, sums),
        (seqlen, dim, regions, tiles, *grad_u.stride(), *x.stride(), *grad_x.stride()),
        (directions, taps, bias is not None, silu, tile.steps, tile.channels, wide),
        tile.warps,
    )
    total = sums.sum(dim=0)
    return total[:, :taps].transpose(1, 2), None if bias is None else total[:, taps]
