"""How the selective scan's kernels cut their work. Importable without the package triton."""

import functools
from typing import NamedTuple

from torch import Tensor

from ...backend import processors_of
from ..arithmetic import parts, power_of_2

STEPS = 16  # of a tile
_STATES = 4  # that a thread takes at once, at most


class ScanConfig(NamedTuple):
    """How a pass cuts its work.

    A tile of one program is 16 positions of `columns` channels, which each of `warps` warps walks for other states,
    in the backward pass one half after the other.
    `chunks` and `pieces` are those of `Cut`; the blocks of a group's channels are dealt to `splits` programs (backward
    only). Zero chooses by the sizes.
    """

    columns: int = 32
    warps: int = 4
    chunks: int = 0
    pieces: int = 0
    splits: int = 0
    warps_per_processor: int = 12  # as many as a multiprocessor shall have at least
    min_tiles: int = 4  # a chunk, or a piece of it, has no fewer

    @property
    def num_warps(self) -> int:
        return self.warps * max(self.columns // 32, 1)

    @property
    def programs_per_processor(self) -> int:
        return parts(self.warps_per_processor, self.num_warps)

    @property
    def registers(self) -> int:
        """Of a thread, as many as that many programs can have of the 65536 of a multiprocessor, dealt out in eights.

        They hold what is loaded before it is needed: fewer for more warps were slower.
        """
        return min(65536 // (32 * self.num_warps * self.programs_per_processor) // 8 * 8, 255)


def fit(config: ScanConfig, dstate: int) -> ScanConfig:
    """The config with no more warps than states, and, up to 16, enough to have them all at once in registers."""
    warps = max(config.warps, min(16, power_of_2(parts(dstate, _STATES))))
    return config._replace(warps=min(warps, power_of_2(dstate)))


def states_of(config: ScanConfig, dstate: int) -> tuple[int, int]:
    """States of a thread at once, and how often that many for all."""
    states = min(_STATES, parts(dstate, config.warps))
    return states, parts(dstate, states * config.warps)


def slots_of(config: ScanConfig, tensor: Tensor) -> int:
    """Programs that run at the same time."""
    return processors_of(tensor) * config.programs_per_processor


@functools.cache
def splits_of(rows: int, blocks: int, slots: int) -> int:
    """Among how many programs the `blocks` of each of `rows` are dealt: the fewest with which all finish first."""

    def time(splits: int) -> int:
        return parts(rows * splits, slots) * parts(blocks, splits)

    return min(range(1, blocks + 1), key=time)


class Cut(NamedTuple):
    """How L is cut: `chunks` of `chunk_tiles` tiles are walked in parallel, of which the last may have fewer; the pass
    that finds what each adds walks `pieces` of a chunk in parallel."""

    chunks: int
    chunk_tiles: int
    pieces: int

    @property
    def piece_tiles(self) -> int:
        return self.chunk_tiles // self.pieces


def cut_of(config: ScanConfig, tiles: int, programs: int, columns: int, tensor: Tensor) -> Cut:
    """As few chunks, of as few pieces, as fill the processors.

    Args:
        programs: Programs of a chunk.
        columns: Programs of the first pass of a chunk.
    """
    slots = slots_of(config, tensor)
    chunks = config.chunks or min(slots // programs, tiles // config.min_tiles)
    chunks = max(1, min(chunks, tiles))
    chunk_tiles = parts(tiles, chunks)
    pieces = 1
    if chunks > 1:
        pieces = config.pieces or min(slots // (columns * (chunks - 1)), chunk_tiles // config.min_tiles)
        pieces = max(1, min(pieces, chunk_tiles))
        chunk_tiles = parts(chunk_tiles, pieces) * pieces
    return Cut(parts(tiles, chunk_tiles), chunk_tiles, pieces)
