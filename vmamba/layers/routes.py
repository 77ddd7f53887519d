"""Causal mixers over several orders of the same tokens."""

from typing import Callable

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import NUM_DIRECTIONS, NUM_ROUTES


@register_notrace_module
class Bidirectional(nn.Module):
    """The mean of a causal mixer along the sequence and another one against it.

    Args:
        make_mixer: Makes a mixer [B, L, d] -> [B, L, d], for each direction.
    """

    def __init__(self, make_mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(make_mixer() for _ in range(NUM_DIRECTIONS))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        along, against = self.mixers
        return (along(x) + against(x.flip(1)).flip(1)) / NUM_DIRECTIONS


@register_notrace_module
class FourRoutes(nn.Module):
    """The mean of causal mixers along the four routes of VMamba over a map; see `vmamba.kernels.cross_scan`.

    Args:
        make_mixer: Makes a mixer [B, L, d] -> [B, L, d], for each route.
    """

    def __init__(self, make_mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(make_mixer() for _ in range(NUM_ROUTES))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        height, width = x.shape[1:3]
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)  # [B, L, d]
        routes = rows, columns, rows.flip(1), columns.flip(1)
        y_rows, y_columns, y_rows_back, y_columns_back = (mixer(route) for mixer, route in zip(self.mixers, routes))
        by_row = (y_rows + y_rows_back.flip(1)).unflatten(1, (height, width))
        by_column = (y_columns + y_columns_back.flip(1)).unflatten(1, (width, height))
        return (by_row + by_column.transpose(1, 2)) / NUM_ROUTES
