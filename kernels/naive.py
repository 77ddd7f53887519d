"""The operators as their definitions, one step at a time: the oracle of every test.

Nothing here is fast or saves memory. Everything is differentiable and computes in fp32, or in fp64 if its input is.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_that


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    initial_state: Optional[Tensor] = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `vmamba.kernels.selective_scan`. B and C are [batch, G, N, L].

    Returns:
        y [batch, D, L] in u's dtype and the last state [batch, D, N].
    """
    dtype = u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    u, delta, A, B, C = (tensor.to(wide) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (tensor.repeat_interleave(dim // tensor.shape[1], dim=1) for tensor in (B, C))

    h = u.new_zeros(batch, dim, dstate) if initial_state is None else initial_state.to(wide)
    y = [torch.empty(0)] * seqlen
    for step in reversed(range(seqlen)) if reverse else range(seqlen):
        delta_l, u_l = delta[:, :, step, None], u[:, :, step, None]
        h = torch.exp(delta_l * A) * h + delta_l * B[..., step] * u_l
        y[step] = (C[..., step] * h).sum(dim=-1)
    y = torch.stack(y, dim=-1) if seqlen else torch.zeros_like(u)

    if D is not None:
        y = y + D.to(wide)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype), h


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    initial_states: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float('inf')),
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `vmamba.kernels.ssd_scan`.

    Returns:
        y [batch, L, H, P] in x's dtype and the last state [batch, H, P, N].
    """
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    batch, seqlen, heads, dim = x.shape
    x, dt, A, B, C = (tensor.to(wide) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B, C))

    state = x.new_zeros(batch, heads, dim, B.shape[-1]) if initial_states is None else initial_states.to(wide)
    y = [torch.empty(0)] * seqlen
    number = None if seq_idx is None else torch.zeros_like(seq_idx[:, 0])
    for step in reversed(range(seqlen)) if reverse else range(seqlen):
        if seq_idx is not None:
            same = seq_idx[:, step] == number
            state, number = torch.where(same[:, None, None, None], state, 0), seq_idx[:, step]
        decay, added = torch.exp(dt[:, step] * A), (dt[:, step, :, None] * x[:, step])[..., None] * B[:, step, :, None]
        state = decay[..., None, None] * state + added
        y[step] = (state @ C[:, step, :, :, None]).squeeze(-1)
    out = torch.stack(y, dim=1)

    if D is not None:
        out = out + (D if D.ndim == 2 else D[:, None]).to(wide) * x
    if z is not None:
        out = out * F.silu(z.to(wide))
    return out.to(dtype), state


def route_positions(height: int, width: int) -> Tensor:
    """Row-major index of the pixel that each of the four routes visits at each step, [4, H * W].

    Route 0 goes row by row, route 1 column by column; routes 2 and 3 are 0 and 1 backwards.
    """
    rows = torch.arange(height * width)
    columns = torch.tensor([h * width + w for w in range(width) for h in range(height)], dtype=torch.long)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def cross_scan(x: Tensor) -> Tensor:
    """The pixels of x [B, C, H, W] in the order of the four routes, [B, 4, C, H * W]; see `route_positions`."""
    check_that(x.ndim == 4, f'cross_scan: x must be [B, C, H, W], got {tuple(x.shape)}')
    positions = route_positions(*x.shape[-2:]).to(x.device)
    return torch.stack([x.flatten(2)[..., order] for order in positions], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Sums y [B, 4, C, H * W] of the four routes at the pixels they visit, [B, C, H, W]: the adjoint of
    `cross_scan`."""
    fits = y.ndim == 4 and y.shape[1] == 4 and y.shape[3] == height * width
    expected = f'[B, 4, C, {height * width}] of a {height}x{width} map'
    check_that(fits, f'cross_merge: y must be {expected}, got {tuple(y.shape)}')
    positions = route_positions(height, width).to(y.device)
    merged = sum(y[:, k][..., torch.argsort(order)] for k, order in enumerate(positions))
    return merged.unflatten(-1, (height, width))


def ss2d_scan(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> Tensor:
    """See `vmamba.kernels.ss2d_scan`: a selective scan along each of the four routes, summed at the pixels."""
    height, width, dim = x.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    routes, _, dt_rank = dt_weight.shape
    dstate = A.shape[-1]
    xs = cross_scan(x.to(wide).permute(0, 3, 1, 2))  # [B, H, W, D] -> [B, 4, D, L]
    ys = []
    for k in range(routes):
        projected = cross_scan(x_dbl[..., k, :].to(wide).permute(0, 3, 1, 2))[:, k]  # [B, R + 2N, L]
        dt, B, C = projected.split([dt_rank, dstate, dstate], dim=1)
        delta = dt_weight[k].to(wide) @ dt
        y, _ = selective_scan(
            xs[:, k], delta, A[k], B[:, None], C[:, None], D[k], delta_bias=dt_bias[k], delta_softplus=True
        )
        ys.append(y)
    merged = cross_merge(torch.stack(ys, dim=1), height, width)
    return merged.permute(0, 2, 3, 1).to(x.dtype)  # [B, D, H, W] -> [B, H, W, D]


def bidirectional_scan(
    u: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> Tensor:
    """See `vmamba.kernels.bidirectional_scan`: a selective scan in each direction, summed."""
    wide = torch.promote_types(u.dtype, torch.float32)
    dt_rank, dstate = dt_weight.shape[-1], A.shape[-1]
    y = torch.zeros((), dtype=wide, device=u.device)
    for k, reverse in enumerate((False, True)):
        dt, B, C = x_dbl[:, :, k].to(wide).transpose(1, 2).split([dt_rank, dstate, dstate], dim=1)
        delta = dt_weight[k].to(wide) @ dt
        y_k, _ = selective_scan(
            u[:, :, k].to(wide).transpose(1, 2),
            delta,
            A[k],
            B[:, None],
            C[:, None],
            D[k],
            delta_bias=dt_bias[k],
            delta_softplus=True,
            reverse=reverse,
        )
        y = y + y_k
    return y.transpose(1, 2).to(u.dtype)
