"""SSD without order, of VSSD: every position sees all others.

VSSD: Vision Mamba with Non-Causal State Space Duality, https://arxiv.org/abs/2407.18559
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import check, check_that


def non_causal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    dt_softplus: bool = False,
) -> Tensor:
    """State space duality without order, in two matrix products.

    With dt' = softplus(dt + dt_bias) (each part optional) and the weight m = -dt' * A, for every head:

        S = sum_l m_l x_l B_l^T,    y_l = S C_l + D * x_l

    Weights are computed in fp32 (fp64 if x is fp64) and rounded to x's dtype, in which all products are. Differentiable
    in every tensor argument.

    Args:
        x: Input [batch, L, H, P], in any floating dtype.
        dt: Step size [batch, L, H].
        A: [H], negative for positive weights.
        B: Input projection [batch, L, G, N], for G groups of heads.
        C: Output projection [batch, L, G, N].
        D: Skip connection, [H] or [H, P].
        dt_bias: [H].
        dt_softplus: Apply softplus to the step size.

    Returns:
        y [batch, L, H, P] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    function = 'non_causal_ssd'
    sizes = check(
        function,
        x=(x, 'batch L>0 H>0 P'),
        dt=(dt, 'batch L H'),
        A=(A, 'H'),
        B=(B, 'batch L G>0 N'),
        C=(C, 'batch L G N'),
        D=(D, 'H | H P'),
        dt_bias=(dt_bias, 'H'),
    )
    heads, groups = sizes['H'], sizes['G']
    check_that(heads % groups == 0, f'{function}: groups of B must divide the {{}} heads, got {{}}', heads, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    weighted = x * (-dt * A.to(wide)).to(x.dtype).unsqueeze(-1)
    # [batch, L, H, P] -> [batch, G, H / G * P, L]
    weighted = weighted.unflatten(2, (groups, -1)).flatten(3).permute(0, 2, 3, 1)
    B, C = (tensor.to(x.dtype).transpose(1, 2) for tensor in (B, C))  # [batch, G, L, N]
    y = C @ (weighted @ B).mT  # [batch, G, L, H / G * P]
    y = y.transpose(1, 2).reshape(x.shape)
    return y if D is None else torch.addcmul(y, (D if D.ndim == 2 else D.unsqueeze(-1)).to(x.dtype), x)
