"""How the kernels of SS2D cut their work, by the sizes of the map and the GPU."""

from functools import lru_cache
from typing import NamedTuple, Optional

from torch import Tensor

from .arithmetic import parts

NUM_ROUTES = 4


class Sizes(NamedTuple):
    batch: int
    height: int
    width: int
    dim: int
    dt_rank: int
    dstate: int

    @property
    def seqlen(self) -> int:
        return self.height * self.width

    @property
    def projections(self) -> int:
        """Projections of a pixel, R + 2N for each route."""
        return NUM_ROUTES * (self.dt_rank + 2 * self.dstate)

    @property
    def parameters(self) -> int:
        """Numbers in dt_weight, dt_bias and A."""
        return NUM_ROUTES * self.dim * (self.dt_rank + 1 + self.dstate)


def sizes_of(x: Tensor, dt_weight: Tensor, A: Tensor) -> Sizes:
    return Sizes(*x.shape, dt_weight.shape[-1], A.shape[-1])


class Launch(NamedTuple):
    """Sizes of a launch.

    Args:
        rows: Steps of a tile that a thread walks.
        splits: Threads that share the steps of a tile; rows * splits must be 16 at least.
        channels: Channels of a tile, a multiple of 16.
        regions: Parts of the map that are walked at the same time; more than one costs a pass for their states.
        batches: Entries of the batch that a program of the backward pass walks, one after the other.
        registers: Most registers of a thread, to have enough threads at work; None leaves them to the compiler.
    """

    rows: int
    splits: int
    channels: int
    regions: int
    batches: int = 1
    registers: Optional[int] = None

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.rows * self.splits

    @property
    def warps(self) -> int:
        """Warps of a program, with one column of a tile for each thread."""
        return self.splits * self.channels // 16


class Plan(NamedTuple):
    """Launches of both passes.

    The backward pass starts its tiles from saved states: they must be the tiles of the forward pass, or what a thread
    of it walks of one.
    """

    forward: Launch
    backward: Launch


def plan_of(sizes: Sizes, processors: int) -> Plan:
    """Few regions while the batch and the channels alone give every processor enough programs."""
    programs = sizes.batch * 2 * parts(sizes.dim, 32)
    regions = _regions(sizes, programs, processors)
    # What fits on the processors at once is decided by registers: three programs of four warps with 168 each, two
    # with what the compiler would take. Many programs hide the latency of each other's steps; few share the steps of
    # a tile between threads.
    fits_at_once = 2 * processors < programs * regions <= 3 * processors
    forward = Launch(16, 2 if programs * regions <= 3 * processors else 1, 32, regions, registers=168)
    # What is left over of programs sums the gradients of parameters over the batch, which saves memory.
    batches = max(programs * regions // (5 * processors), 1)
    registers = 168 if fits_at_once else None
    return Plan(forward, Launch(8, 2, 32, regions, batches=batches, registers=registers))


# Not for symbolic sizes, which cannot be hashed.
plan = lru_cache(maxsize=4096)(plan_of)


def _regions(sizes: Sizes, programs: int, processors: int) -> int:
    # As many programs as run at once where each has two warps with 168 registers a thread.
    wanted = 6 * processors // max(programs, 1) if programs < processors else 1
    return max(min(wanted, sizes.seqlen // 128), 1)


def wraps(sizes: Sizes, plan: Plan) -> bool:
    """Whether tiles cross the ends of columns: where ending them there would leave too many steps unused."""
    steps = max(plan.forward.steps, plan.backward.steps)
    return sizes.height > 1 and parts(sizes.height, steps) * steps > 1.2 * sizes.height


def split(sizes: Sizes, launch: Launch, wraps: bool) -> tuple[int, int]:
    """Regions, none of them empty, and tiles of a region: an even number, since two routes meet half way."""
    tiles = _tiles(sizes, launch.steps, wraps)
    region_tiles = 2 * parts(tiles, 2 * launch.regions)
    return parts(tiles, region_tiles), region_tiles


def _tiles(sizes: Sizes, steps: int, wraps: bool) -> int:
    """Tiles of a route, the larger number of rows and columns."""
    tiles = parts(sizes.seqlen, steps)
    if wraps or sizes.height == 1:
        return tiles
    return max(tiles, sizes.width * parts(sizes.height, steps))


def states_shape(sizes: Sizes, plan: Plan) -> tuple[int, ...]:
    """State before each tile of the backward pass on each route, [B, 4, states, N, D]."""
    return sizes.batch, NUM_ROUTES, _tiles(sizes, plan.backward.steps, wraps(sizes, plan)), sizes.dstate, sizes.dim


def magic_of(sizes: Sizes, launch: Launch, wraps: bool) -> int:
    """ceil(2**32 / divisor) as a signed integer of 32 bits; see `line_of`."""
    divisor = sizes.height if wraps else parts(sizes.height, launch.steps)
    magic = parts(2**32, divisor) if divisor > 1 else 0
    return magic - 2**32 if magic >= 2**31 else magic
