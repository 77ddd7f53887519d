"""The residual stream between branches, and the norm with which a branch reads it."""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..norm import norm_backward, norm_forward
from .elementwise import add
from .parameters import Parts


class Stream(NamedTuple):
    """The residual stream x + scale * y. Its sum may still be pending, for the next kernel that reads the stream.

    Args:
        x: [rows, d].
        shape: Dimensions that the rows are made of: samples B, and places.
        y: [rows, d] in the products' dtype; None where nothing is pending.
        scale: Factor of each sample, [B]; None for 1.
    """

    x: Tensor
    shape: Tuple[int, ...]
    y: Optional[Tensor] = None
    scale: Optional[Tensor] = None

    def total(self) -> Tensor:
        return self.x if self.y is None else add(self.x, self.y, self.scale)


class StreamGradient(NamedTuple):
    """Gradient of the stream at a place.

    Args:
        x: [rows, d] in the stream's dtype.
        y: The same times the factor of the branch before that place, in the products' dtype; None where there is no
            such branch, or it is not computed yet.
    """

    x: Tensor
    y: Optional[Tensor] = None


class Normalised(NamedTuple):
    """The stream's sum; it normalised; and for the backward pass it normalised before weight and bias, and reciprocal
    deviations [1, rows]. All but the deviations are [rows, d]."""

    total: Tensor
    out: Tensor
    normal: Optional[Tensor]
    moments: Optional[Tensor]


def normalise(
    stream: Stream, weight: Tensor, bias: Optional[Tensor], eps: float, dtype: torch.dtype, save: bool
) -> Normalised:
    """LayerNorm of the stream in a dtype, or RMSNorm without a bias; what is pending is added on the way."""
    x, _, y, scale = stream
    if y is None:
        return Normalised(x, *norm_forward(x, weight, bias, eps, dtype, save, save_normal=save))
    total = torch.empty_like(x)
    return Normalised(total, *norm_forward(y, weight, bias, eps, dtype, save, x, scale, total, save_normal=save))


def grad_of_stream(
    after: StreamGradient,
    grad_normalised: Tensor,
    normal: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    before: Any,
) -> Tuple[StreamGradient, Parts]:
    """Gradient of the stream before a branch: that after it, and what comes through the branch's norm.

    Args:
        before: Link of the branch before, or None.

    Returns:
        The gradient, and the partial sums of those of norm_weight and norm_bias.
    """
    grad = torch.empty_like(after.x)
    centred = bias is not None
    if before is not None:
        y = torch.empty_like(normal)
        sums = norm_backward(
            grad_normalised, normal, weight, moments, centred, y, after.x, grad, before.scale, is_normal=True
        )
        stream = StreamGradient(grad, y)
    else:
        sums = norm_backward(grad_normalised, normal, weight, moments, centred, grad, after.x, is_normal=True)
        stream = StreamGradient(grad)
    names = ('norm_weight', 'norm_bias') if centred else ('norm_weight',)
    return stream, Parts(sums, names, (weight.shape,) * len(names))
