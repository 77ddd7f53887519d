"""The four scan routes of VMamba over a map, and back.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import torch
from torch import Tensor

_ROUTES = (1, 2, 4)


def cross_scan(x: Tensor, num_routes: int = 4) -> Tensor:
    """Lines up the pixels of a map in the order of each route.

    The four routes are: 0 row by row, 1 column by column, 2 route 0 backwards, 3 route 1 backwards.

    Args:
        x: Map [B, C, H, W].
        num_routes: 4 for all routes, 2 for routes 0 and 2, 1 for route 0.

    Returns:
        [B, num_routes, C, H * W]

    Raises:
        ValueError: If x is not a 4-D tensor or num_routes is not 1, 2 or 4.
    """
    if x.ndim != 4:
        raise ValueError(f'x must be [B, C, H, W], got {tuple(x.shape)}')
    _check_routes(num_routes)
    rows = x.flatten(2)
    if num_routes == 1:
        return rows.unsqueeze(1)
    if num_routes == 2:
        return torch.stack([rows, rows.flip(-1)], dim=1)
    forward = torch.stack([rows, x.transpose(-2, -1).flatten(2)], dim=1)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Puts the routes back in place and sums them: the adjoint of `cross_scan`.

    Args:
        y: [B, K, C, H * W] with K = 1, 2 or 4 routes as `cross_scan` gives them.
        height: H.
        width: W.

    Returns:
        Map [B, C, H, W].

    Raises:
        ValueError: If y's shape does not fit the map or K is not 1, 2 or 4.
    """
    if y.ndim != 4 or y.shape[-1] != height * width:
        raise ValueError(f'y must be [B, K, C, {height * width}] for a {height}x{width} map, got {tuple(y.shape)}')
    num_routes = y.shape[1]
    _check_routes(num_routes)
    if num_routes > 1:
        half = num_routes // 2
        y = y[:, :half] + y[:, half:].flip(-1)
    rows = y[:, 0].unflatten(-1, (height, width))
    return rows if num_routes < 4 else rows + y[:, 1].unflatten(-1, (width, height)).transpose(-2, -1)


def _check_routes(num_routes: int) -> None:
    if num_routes not in _ROUTES:
        raise ValueError(f'the number of routes must be one of {_ROUTES}, got {num_routes}')
