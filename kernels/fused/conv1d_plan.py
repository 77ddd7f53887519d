"""How the kernels of causal convolutions cut their work, and how their outputs lie in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arithmetic import parts

MAX_TAPS = 4
# Programs of the backward pass for each streaming multiprocessor: a few at a time, and several rounds of them.
_PROGRAMS = 16


class Tile(NamedTuple):
    steps: int
    channels: int
    warps: int = 4


class Tiles(NamedTuple):
    """Tiles of sequences whose channels are neighbours in memory, and of those whose steps are.

    Either way a row of a tile fills whole sectors of memory. A thread of the backward pass has few elements, for it
    keeps a sum for every tap and direction of each.
    """

    channels_last: Tile
    steps_last: Tile


FORWARD = Tiles(Tile(32, 64), Tile(128, 16))
BACKWARD = Tiles(Tile(16, 32), Tile(128, 4))


def tile_of(tiles: Tiles, x: Tensor) -> Tile:
    return tiles.steps_last if x.stride(1) == 1 != x.stride(2) else tiles.channels_last


def split(x: Tensor, tile: Tile, processors: int) -> tuple[int, int]:
    """Parts of a sequence that programs of the backward pass walk, and the tiles of each part."""
    batch, seqlen, dim = x.shape
    tiles = parts(seqlen, tile.steps)
    others = batch * parts(dim, tile.channels)
    if not tiles or not others:
        return 0, 0
    tiles_of_part = parts(tiles, min(parts(_PROGRAMS * processors, others), tiles))
    return parts(tiles, tiles_of_part), tiles_of_part


def is_wide(tile: Tile, seqlen: int, dim: int, *strides: tuple[int, int]) -> bool:
    """Whether offsets within an entry of the batch, of tiles that overhang too, may leave 32 bits.

    Args:
        strides: Of steps and channels of each tensor.
    """
    steps, channels = seqlen + tile.steps + MAX_TAPS, dim + tile.channels
    return any(steps * step + channels * channel >= 2**31 for step, channel in strides)


def empty_outputs(x: Tensor, directions: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, L, K, D] for x [B, L, D]: of one direction in x's order of dimensions, otherwise contiguous."""
    if directions == 1:
        return torch.empty_like(x.unsqueeze(2), dtype=dtype)
    return x.new_empty((*x.shape[:2], directions, x.shape[2]), dtype=dtype)
