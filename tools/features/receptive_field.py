"""The effective receptive field E, which tools/visualize.py defines.

"Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", https://arxiv.org/abs/1701.04128
"""

from typing import Callable, Dict, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .maps import Wanted, extract, patch_layout, steps

SHARES = (0.2, 0.5, 0.9)


class Field(NamedTuple):
    """An effective receptive field.

    Attributes:
        values: E [H, W].
        sides: Side of the square around the centre that holds each share of E.
    """

    values: np.ndarray
    sides: Dict[float, int]


def receptive_fields(
    model: nn.Module, images: Sequence[Tensor], wanted: Wanted, report: Callable[[], None]
) -> Dict[str, Field]:
    """The effective receptive field of each map, of normalised images [1, C, H, W], square and of one size."""
    model.requires_grad_(False)
    sums: Dict[str, Tensor] = {}
    for image in images:
        image = image.clone().requires_grad_()
        for name, features in extract(model, image, wanted).items():
            centre = features[0, :, features.shape[2] // 2, features.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
            sums[name] = sums.get(name, 0) + gradient[0].abs().sum(dim=0).double()
        report()
    fields = {}
    for name, reduction in zip(wanted.names, wanted.reductions):
        values = (sums[name] / len(images)).cpu().numpy()
        fields[name] = Field(values, sides_holding(values, centre_of(model, values.shape[0], reduction)))
    return fields


def centre_of(model: nn.Module, size: int, reduction: int) -> float:
    """Position, along a side, of the centre of the image pixels under the map's central pixel."""
    patch, _ = patch_layout(model)
    return steps(size, patch, reduction) // 2 * reduction + max(patch, reduction) / 2


def sides_holding(values: np.ndarray, centre: float, shares: Sequence[float] = SHARES) -> Dict[float, int]:
    """Side of the smallest square around the centre (of both sides) that holds each share of the sum."""
    total = max(values.sum(), 1e-30)
    held = []
    for radius in range(1, max(values.shape) + 1):
        square = slice(max(round(centre - radius), 0), round(centre + radius))
        held.append(values[square, square].sum() / total)
    return {share: 2 * (1 + int(np.searchsorted(held, share - 1e-9))) for share in shares}
