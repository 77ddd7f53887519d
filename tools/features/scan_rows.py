"""What one pixel of a selective scan takes from every other: a row of the matrix that the scan is.

`scan_rows` computes the row of one pixel i of the matrix M that tools/visualize.py defines, for each route and channel,
exactly: by differences of the running sum of delta, in fp64. VMamba's SS2D sums four routes, of the same x; Vim's block
sums two directions, of the same tokens after a convolution in each direction's sense.
"""

from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.kernels import NUM_ROUTES, bidirectional_conv1d, cross_scan, depthwise_conv2d
from vmamba.layers import SS2D, BiMamba


class Routes(NamedTuple):
    """The scans of a layer on one image, in fp64; positions are those of pixels (row-major) or tokens.

    Attributes:
        order: Position that each route visits at each step [K, L].
        x: Input of each route at each position [K, L, D].
        delta: Steps at each position [K, L, D], positive.
        B: [K, L, N].
        C: [K, L, N].
        A: [K, D, N], negative.
        D: [K, D].
    """

    order: Tensor
    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor


def routes_of(mixer: Union[SS2D, BiMamba], hidden: Tensor) -> Routes:
    """The scans that a mixer makes of its input, [1, H, W, d] for SS2D and [1, L, d] for BiMamba."""
    if isinstance(mixer, SS2D):
        x, x_dbl = _ss2d_inputs(mixer, hidden)
        pixels = torch.arange(x.shape[1], device=x.device, dtype=torch.float64).view(1, 1, *hidden.shape[1:3])
        order = cross_scan(pixels)[0, :, 0].long()
    else:
        x, x_dbl = _bimamba_inputs(mixer, hidden)
        tokens = torch.arange(x.shape[1], device=x.device)
        order = torch.stack([tokens, tokens.flip(0)])
    dt_rank, dstate = mixer.dt_proj_weight.shape[-1], mixer.A_log.shape[-1]
    dt, B, C = x_dbl.split([dt_rank, dstate, dstate], dim=-1)
    dt_weight, dt_bias = mixer.dt_proj_weight.double(), mixer.dt_proj_bias.double()
    delta = F.softplus(torch.einsum('klr,kdr->kld', dt, dt_weight) + dt_bias[:, None])
    return Routes(order, x, delta, B, C, -mixer.A_log.double().exp(), mixer.D.double())


def _ss2d_inputs(mixer: SS2D, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """x [4, L, D], the same for all routes, and its projections [4, L, R + 2N]"""
    x = mixer.in_proj(hidden)
    if mixer.gate:
        x = x.chunk(2, dim=-1)[0]
    x = depthwise_conv2d(x, mixer.conv2d.weight.squeeze(1), mixer.conv2d.bias, silu=True).double()
    x_dbl = F.linear(x, mixer.x_proj.weight.double()).unflatten(-1, (NUM_ROUTES, -1))[0]  # [H, W, 4, R + 2N]
    return x[0].flatten(0, 1).expand(NUM_ROUTES, -1, -1), x_dbl.flatten(0, 1).transpose(0, 1)


def _bimamba_inputs(mixer: BiMamba, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """x [2, L, D] and its projections [2, L, R + 2N]"""
    x = mixer.in_proj(hidden).chunk(2, dim=-1)[0]
    x = bidirectional_conv1d(x, mixer.conv1d_weight, mixer.conv1d_bias, silu=True)[0].double().transpose(0, 1)
    return x, torch.einsum('kld,kpd->klp', x, mixer.x_proj_weight.double())


def scan_rows(routes: Routes, position: int) -> Tensor:
    """The row of the pixel or token at a position, for each route and channel, at the positions' places [K, D, L].

    y at the position is the sum over routes k and positions j of rows[k, :, j] * x[k, j], and D[k] * x[k, position].
    """
    rows = []
    for order, delta, B, C, A in zip(routes.order, routes.delta, routes.B, routes.C, routes.A):
        step = int((order == position).nonzero())
        past = order[: step + 1]  # what the route has visited when it is at the pixel
        sums = delta[past].cumsum(dim=0)  # [step + 1, D]
        reach = sums[-1] - sums  # delta_{j+1} + ... + delta_i
        row = delta.new_zeros(len(order), delta.shape[1])
        for n in range(A.shape[1]):
            row[past] += C[position, n] * torch.exp(A[:, n] * reach) * delta[past] * B[past, n, None]
        rows.append(row.T)
    return torch.stack(rows)


def mixers_of(model: nn.Module) -> dict[str, Union[SS2D, BiMamba]]:
    """The mixers of a model by the names of their blocks, such as stages.2.blocks.1 or blocks.11."""
    return {
        name.removesuffix('.mixer'): module
        for name, module in model.named_modules()
        if isinstance(module, (SS2D, BiMamba))
    }


@torch.inference_mode()
def inputs_of(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the mixers of these blocks take when the model sees the images."""
    found: dict[str, Tensor] = {}
    mixers = mixers_of(model)
    handles = [
        mixers[name].register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def token_of_patch(patch: int, patches: int) -> int:
    """Vim's token of a patch: those from the middle on come after the class token."""
    return patch + (patch >= patches // 2)
