"""Vim's bidirectional Mamba with its norm, as a branch of the residual stream."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from ..bimamba.launch import CoreOutputs, core_backward, core_forward, projection_layout
from .chain import Link, ParameterGradients
from .elementwise import prepare
from .parameters import Layout, Parts, Weight
from .products import input_gradient, linear, weight_gradient
from .stream import Stream, StreamGradient, grad_of_stream, normalise


class BiMambaParameters(NamedTuple):
    """Norm [d], in_proj [2D, d], those of `bimamba_core` with at most 4 taps and 64 states, and out_proj [d, D]."""

    norm_weight: Tensor
    in_proj_weight: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj_weight: Tensor


class _Saved(NamedTuple):
    """The tokens normalised before the weight, and reciprocal deviations; the output of in_proj; and what
    `core_forward` saves."""

    normal: Tensor
    moments: Tensor
    xz: Tensor
    x_dbl: Tensor
    mean: Tensor
    states: Tensor


class BiMambaBranch(NamedTuple):
    """out_proj(bimamba_core(in_proj(RMSNorm(x)))) with A = -exp(A_log).

    The backward pass recomputes the normalised tokens, the convolutions and dt.
    """

    norm_eps: float

    Parameters = BiMambaParameters
    Saved = _Saved

    def weights(self, parameters: BiMambaParameters) -> List[Weight]:
        p = parameters
        directions, dim, rank = p.dt_weight.shape
        layout = projection_layout(rank, p.A_log.shape[-1])
        x_proj = Layout((directions, layout.size, dim), 1, rank, layout.padded_rank)
        dt_proj = Layout((directions, dim, layout.padded_rank), 2, rank, layout.padded_rank)
        return [
            *(Weight(p.in_proj_weight), Weight(p.out_proj_weight)),
            *(Weight(p.x_proj_weight, x_proj), Weight(p.dt_weight, dt_proj), Weight(p.A_log, log_A=True)),
        ]

    def forward(
        self, stream: Stream, link: Link, weights: Sequence[Tensor], save: bool
    ) -> Tuple[Stream, Optional[_Saved]]:
        p: BiMambaParameters = link.parameters
        in_proj, out_proj, x_proj, dt_proj, A = weights
        x, normalised, normal, moments = normalise(stream, p.norm_weight, None, self.norm_eps, in_proj.dtype, save)
        xz = linear(normalised, in_proj).view(*stream.shape, -1)
        del normalised
        core = core_forward(xz, p.conv_weight, p.conv_bias, x_proj, dt_proj, p.dt_bias, A, p.D, save)
        out = linear(core.out.view(x.shape[0], -1), out_proj)
        saved = _Saved(normal, moments, xz, core.x_dbl, core.mean, core.states) if save else None
        return Stream(x, stream.shape, out, link.scale), saved

    def backward(
        self, grad: StreamGradient, link: Link, weights: Sequence[Tensor], saved: _Saved, before: Optional[Link]
    ) -> Tuple[StreamGradient, ParameterGradients]:
        p: BiMambaParameters = link.parameters
        in_proj, out_proj, x_proj, dt_proj, A = weights
        grad_y, normalised, _ = prepare(grad.x, grad.y, link.scale, saved.normal, p.norm_weight, None)
        outputs = CoreOutputs(None, saved.x_dbl, saved.mean, saved.states)
        core = core_backward(
            *(input_gradient(grad_y, out_proj), saved.xz, p.conv_weight, p.conv_bias, x_proj, dt_proj, p.dt_bias, A),
            *(p.D, outputs, True, True),
        )
        grad_out_proj = weight_gradient(grad_y, core.out.view(grad_y.shape[0], -1), p.out_proj_weight.dtype)
        grad_xz = core.xz.view(-1, in_proj.shape[0])
        grad_in_proj = weight_gradient(grad_xz, normalised, p.in_proj_weight.dtype)
        grad_normalised = input_gradient(grad_xz, in_proj)
        grad, sums_norm = grad_of_stream(
            grad, grad_normalised, saved.normal, saved.moments, p.norm_weight, None, before
        )
        layout = projection_layout(p.dt_weight.shape[-1], A.shape[-1])
        complete = dict(
            in_proj_weight=grad_in_proj,
            x_proj_weight=layout.of_x_proj(core.x_proj),
            dt_weight=core.dt_proj[..., : layout.rank],
            out_proj_weight=grad_out_proj,
        )
        parts = (
            sums_norm,
            Parts(core.conv, ('conv_weight', 'conv_bias'), (p.conv_weight.shape, p.conv_bias.shape)),
            Parts(core.scans, ('D', 'dt_bias', 'A_log'), (p.D.shape, p.dt_bias.shape, A.shape)),
        )
        return grad, ParameterGradients(complete, parts)
