"""VMamba's 2-D selective scan with its norm, as a branch of the residual stream."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv2d import conv2d_backward, conv2d_forward
from ..ss2d.launch import merge_backward, merge_forward, scan_backward, scan_forward
from .chain import Link, ParameterGradients
from .elementwise import prepare
from .parameters import Parts, Weight
from .products import input_gradient, linear, weight_gradient
from .stream import Stream, StreamGradient, grad_of_stream, normalise


class SS2DParameters(NamedTuple):
    """Norms [d] and [D], in_proj [D or 2D, d], conv [D, 1, k, k] and [D] with odd k up to 5, x_proj [4 * (R + 2N), D],
    those of `ss2d_scan`, and out_proj [d, D]."""

    norm_weight: Tensor
    norm_bias: Tensor
    in_proj_weight: Tensor
    conv_weight: Tensor
    conv_bias: Optional[Tensor]
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor
    out_proj_weight: Tensor


class _Saved(NamedTuple):
    """The map normalised before weight and bias, and reciprocal deviations; the output of in_proj; the scan's
    projections, its sum before the norm, states, and moments of the norm."""

    normal: Tensor
    moments: Tensor
    projected: Tensor
    x_dbl: Tensor
    merged: Tensor
    states: Tensor
    out_moments: Tensor


class SS2DBranch(NamedTuple):
    """out_proj(ss2d_core(silu(conv2d(in_proj(LayerNorm(x)))))) with A = -exp(A_log).

    Where in_proj has twice the channels, the second half z gates the output of the core by silu(z). The backward pass
    recomputes the normalised maps and the convolution.
    """

    norm_eps: float
    out_norm_eps: float

    Parameters = SS2DParameters
    Saved = _Saved

    def weights(self, parameters: SS2DParameters) -> List[Weight]:
        p = parameters
        linears = p.in_proj_weight, p.x_proj_weight, p.out_proj_weight
        return [*map(Weight, linears), Weight(p.A_log, log_A=True)]

    def forward(
        self, stream: Stream, link: Link, weights: Sequence[Tensor], save: bool
    ) -> Tuple[Stream, Optional[_Saved]]:
        p: SS2DParameters = link.parameters
        in_proj, x_proj, out_proj, A = weights
        x, normalised, normal, moments = normalise(
            stream, p.norm_weight, p.norm_bias, self.norm_eps, in_proj.dtype, save
        )
        projected = linear(normalised, in_proj).view(*stream.shape, -1)
        del normalised
        inner, z = _split(projected, out_proj.shape[1])
        u = conv2d_forward(inner, p.conv_weight, p.conv_bias, silu=True)
        if z is None and not save:
            del projected, inner
        x_dbl = linear(u.view(-1, u.shape[-1]), x_proj)
        y, states = scan_forward(u, x_dbl, p.dt_weight, p.dt_bias, A, save)
        out, merged, out_moments = merge_forward(
            y, u, p.D, p.out_norm_weight, p.out_norm_bias, self.out_norm_eps, save, overwrite=True
        )
        del u, y
        if z is not None:
            out.mul_(F.silu(z))
        out = linear(out.view(-1, out.shape[-1]), out_proj)
        saved = _Saved(normal, moments, projected, x_dbl, merged, states, out_moments) if save else None
        return Stream(x, stream.shape, out, link.scale), saved

    def backward(
        self, grad: StreamGradient, link: Link, weights: Sequence[Tensor], saved: _Saved, before: Optional[Link]
    ) -> Tuple[StreamGradient, ParameterGradients]:
        p: SS2DParameters = link.parameters
        in_proj, x_proj, out_proj, A = weights
        grad_y, normalised, _ = prepare(grad.x, grad.y, link.scale, saved.normal, p.norm_weight, p.norm_bias)
        grad_out = input_gradient(grad_y, out_proj)
        x, z = _split(saved.projected, out_proj.shape[1])
        if z is not None:
            gate, grad_gated = F.silu(z), grad_out.view(z.shape)
            grad_out = grad_gated * gate
        u = conv2d_forward(x, p.conv_weight, p.conv_bias, silu=True)
        rows = u.view(-1, u.shape[-1])
        merge = merge_backward(
            grad_out, saved.merged, u, p.out_norm_weight, saved.out_moments, p.out_norm_bias, recompute_out=True
        )
        out = merge.out if z is None else merge.out * gate
        grad_out_proj = weight_gradient(grad_y, out.view(rows.shape), p.out_proj_weight.dtype)
        scans = scan_backward(merge.merged, u, saved.x_dbl, p.dt_weight, p.dt_bias, A, p.D, saved.states, log_A=True)
        scans.x.view(rows.shape).addmm_(scans.x_dbl, x_proj)
        grad_x_proj = weight_gradient(scans.x_dbl, rows, p.x_proj_weight.dtype)
        grad_projected, sums_conv = conv2d_backward(scans.x, x, p.conv_weight, p.conv_bias, silu=True)
        if z is not None:
            grad_z = torch.ops.aten.silu_backward(grad_gated * merge.out, z)
            grad_projected = torch.cat([grad_projected, grad_z], dim=-1)
        grad_projected = grad_projected.view(-1, in_proj.shape[0])
        grad_in_proj = weight_gradient(grad_projected, normalised, p.in_proj_weight.dtype)
        grad_normalised = input_gradient(grad_projected, in_proj)
        grad, sums_norm = grad_of_stream(
            grad, grad_normalised, saved.normal, saved.moments, p.norm_weight, p.norm_bias, before
        )
        complete = dict(in_proj_weight=grad_in_proj, x_proj_weight=grad_x_proj, out_proj_weight=grad_out_proj)
        channels = p.out_norm_weight.shape
        parts = (
            sums_norm,
            Parts(sums_conv, ('conv_weight', 'conv_bias'), (p.conv_weight.shape, channels)),
            Parts(scans.parameters, ('dt_weight', 'dt_bias', 'A_log'), (p.dt_weight.shape, p.dt_bias.shape, A.shape)),
            Parts(merge.vectors, ('out_norm_weight', 'out_norm_bias', 'D'), (channels, channels, p.D.shape)),
        )
        return grad, ParameterGradients(complete, parts)


def _split(projected: Tensor, dim: int) -> Tuple[Tensor, Optional[Tensor]]:
    """What in_proj makes [B, H, W, D or 2D] as x and z."""
    if projected.shape[-1] == dim:
        return projected, None
    return projected[..., :dim], projected[..., dim:]
