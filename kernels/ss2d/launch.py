"""Launches of SS2D's kernels: how they cut their work, by the sizes of the map and the GPU."""

from functools import lru_cache
from typing import Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    dot_precision,
    is_nvidia,
    next_power_of_2,
    num_processors,
    product_block,
    share_rows,
    shared_memory,
)
from .backward import join_kernel, scan_backward_kernel
from .forward import scan_kernel
from .merge_norm import merge_norm_backward_kernel, merge_norm_kernel

NUM_ROUTES = 4
_MIN_CHUNK = 128  # steps
_JOIN_BLOCK = 2048
# KiB of shared memory that programs of 32 channels need, and more for each row of the padded rank of dt, by how
# products are computed, on the architecture that needs most. 16 channels need half. `make test-targets` checks it.
_FORWARD_KIB = {'tf32x3': (4, 1.25), 'tf32': (4, 0.625), 'ieee': (4, 0.625)}
_BACKWARD_KIB = {'tf32x3': (34, 2.25), 'tf32': (16, 1.125), 'ieee': (16, 1.125)}
_MERGE_ELEMENTS = 2048  # pixels times channels that a program of the merge holds at a time
_MERGE_PROGRAMS_PER_PROCESSOR = 8  # of the merge's backward pass, each of which leaves a partial sum


class Tile(NamedTuple):
    """Steps that a thread walks, threads that split the steps of a tile, and channels.

    A tile must have 16 steps at least, and a multiple of 16 channels.
    """

    steps: int
    splits: int
    block_d: int


class Schedule(NamedTuple):
    """How a pass cuts its work.

    Args:
        tile: What a program holds at a time.
        chunks: Parts of the map that are walked in parallel; more than one cost a pass for their states.
        batches: Entries of the batch that a program of the backward pass walks, one after the other.
        registers: Most registers of a thread, to have enough threads at work; None leaves them to the compiler.
    """

    tile: Tile
    chunks: int
    batches: int = 1
    registers: Optional[int] = None

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.tile.steps * self.tile.splits

    @property
    def warps(self) -> int:
        """Warps of a program, with one column of a tile for each thread."""
        return self.tile.splits * self.tile.block_d // 16


class Plan(NamedTuple):
    """Schedules of both passes.

    The backward pass starts its tiles from saved states: they must be the tiles of the forward pass, or what a thread
    of it walks of one.
    """

    forward: Schedule
    backward: Schedule


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
    def block_r(self) -> int:
        """The rank, padded for products."""
        return product_block(self.dt_rank)

    @property
    def projections(self) -> int:
        """Projections of a pixel, R + 2N for each route."""
        return NUM_ROUTES * (self.dt_rank + 2 * self.dstate)

    @property
    def parameters(self) -> int:
        """Numbers in dt_weight, dt_bias and A."""
        return NUM_ROUTES * self.dim * (self.dt_rank + 1 + self.dstate)


class Device(NamedTuple):
    """What plans and kernels depend on beside the sizes.

    Args:
        precision: Of products.
        processors: Multiprocessors.
        shared_memory: Bytes that a program can have.
        exact: Whether small results keep all of fp32's precision.
        nvidia: Whether the kernels are compiled for an NVIDIA GPU.
    """

    precision: str
    processors: int
    shared_memory: int
    exact: bool
    nvidia: bool

    @classmethod
    def of(cls, x: Tensor) -> 'Device':
        return cls(dot_precision(x), num_processors(x), shared_memory(x), x.dtype != torch.bfloat16, is_nvidia(x))


def plan_of(sizes: Sizes, device: Device) -> Plan:
    """Few chunks while the batch and the channels alone give every processor enough programs."""
    processors = device.processors
    programs = sizes.batch * 2 * cdiv(sizes.dim, 32)
    # As many programs as run at once where each has two warps with 168 registers a thread.
    wanted = 6 * processors // max(programs, 1) if programs < processors else 1
    chunks = max(min(wanted, sizes.seqlen // _MIN_CHUNK), 1)
    # What fits on the processors at once is decided by registers: three programs of four warps with 168 each, two
    # with what the compiler would take. Many programs hide the latency of each other's steps; few share the steps of
    # a tile between threads.
    fits_at_once = 2 * processors < programs * chunks <= 3 * processors
    splits = 2 if programs * chunks <= 3 * processors else 1
    block_d = _block_d(sizes, device, _FORWARD_KIB)
    forward = Schedule(Tile(16, splits, block_d), chunks, registers=168)
    # What is left over of programs sums the gradients of parameters over the batch, which saves memory.
    batches = max(programs * chunks // (5 * processors), 1)
    tile = Tile(8, 2, _block_d(sizes, device, _BACKWARD_KIB))
    return Plan(forward, Schedule(tile, chunks, batches, registers=168 if fits_at_once else None))


def _block_d(sizes: Sizes, device: Device, needed: Mapping[str, Tuple[float, float]]) -> int:
    """Channels of a tile, fewer where the shared memory has no room for more."""
    fixed, per_row = needed[device.precision]
    return 32 if (fixed + per_row * sizes.block_r) * 1024 <= device.shared_memory else 16


plan = lru_cache(maxsize=MAX_PLANS)(plan_of)  # not for symbolic sizes, which cannot be hashed


def sizes_of(x: Tensor, dt_weight: Tensor, A: Tensor) -> Sizes:
    return Sizes(*(*x.shape, dt_weight.shape[-1], A.shape[-1]))


def states_shape(sizes: Sizes, plan: Plan) -> Tuple[int, ...]:
    """State before each tile of the backward pass on each route, [B, 4, states, N, D]."""
    return sizes.batch, NUM_ROUTES, _tiles(sizes, plan.backward.steps, _wraps(sizes, plan)), sizes.dstate, sizes.dim


def scan_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, save: bool
) -> Tuple[Tensor, Tensor]:
    """Sums of <C, h> / ln 2 over the routes by rows and over those by columns [2, B, H, W, D]; and with `save` the
    states of `states_shape` / ln 2. All tensors are contiguous."""
    sizes = sizes_of(x, dt_weight, A)
    device = Device.of(x)
    launches, shape, summary_shape = _forward_launches(sizes, plan(sizes, device), save, device)
    y = x.new_empty((2, *x.shape))
    states = torch.empty(shape, dtype=torch.float32, device=x.device)
    summaries = _summaries(summary_shape, A)
    for launch in launches:
        launch(x, x_dbl, dt_weight, dt_bias, A, y, states, *summaries)
    return y, states


class ScanGradients(NamedTuple):
    """Gradients of `scan_forward`: of x; of x_dbl, in x's dtype; and of dt_weight, dt_bias and A, one after the other,
    as partial sums [parts, 4 * D * (R + 1 + N)] in fp32."""

    x: Tensor
    x_dbl: Tensor
    parameters: Tensor


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    log_A: bool = False,
) -> ScanGradients:
    """Gradients of the merged map sum(D) * x + ln 2 * sum(y), given ln 2 times the map's.

    Args:
        states: Of `scan_forward`.
        log_A: Return the gradient of log(-A) in place of A's.
    """
    sizes = sizes_of(x, dt_weight, A)
    device = Device.of(x)
    launches, blocks, groups, summary_shape = _backward_launches(sizes, plan(sizes, device), log_A, device)
    by_routes = x.new_empty((2, *x.shape))
    by_blocks = x.new_empty((blocks, *x_dbl.shape))
    parameters = torch.empty(groups, sizes.parameters, dtype=torch.float32, device=x.device)
    summaries = _summaries(summary_shape, A)
    for launch in launches:
        launch(grad_y, x, x_dbl, dt_weight, dt_bias, A, D, states, *summaries, by_routes, by_blocks, parameters)
    grad_x_dbl = torch.empty_like(x_dbl, dtype=x.dtype)
    _join_launch(x.numel(), x_dbl.numel(), blocks)(by_routes, by_blocks, grad_x_dbl)
    return ScanGradients(by_routes[0], grad_x_dbl, parameters)


class MergeOutputs(NamedTuple):
    out: Tensor
    merged: Optional[Tensor]
    moments: Optional[Tensor]


def merge_forward(
    y: Tensor,
    x: Tensor,
    D: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    save: bool,
    overwrite: bool = False,
) -> MergeOutputs:
    """ln 2 * sum(y) + sum(D) * x, normalised if there is a weight; with `save` also what the backward pass needs of the
    norm: the map before it, and means and reciprocal deviations [2, pixels]. With `overwrite` the output lies in y."""
    out = y[0] if overwrite else torch.empty_like(x)
    save = save and weight is not None
    pixels, dim = x.numel() // x.shape[-1], x.shape[-1]
    merged = torch.empty_like(x) if save else None
    moments = x.new_empty((2, pixels), dtype=torch.float32) if save else None
    _merge_launch(pixels, dim, eps)(y, x, D, weight, bias, merged, moments, out)
    return MergeOutputs(out, merged, moments)


class MergeGradients(NamedTuple):
    """ln 2 times the gradient of the merged map; partial sums [parts, 2 + 4, D] in fp32 of the gradients of the norm's
    weight, its bias and each route's D, of which the first two mean nothing without a norm; and the output of the norm,
    if wanted."""

    merged: Tensor
    vectors: Tensor
    out: Optional[Tensor]


def merge_backward(
    grad_out: Tensor,
    merged: Optional[Tensor],
    x: Tensor,
    weight: Optional[Tensor],
    moments: Optional[Tensor],
    bias: Optional[Tensor] = None,
    recompute_out: bool = False,
) -> MergeGradients:
    """Gradients of `merge_forward`, the same at every run."""
    pixels, dim = x.numel() // x.shape[-1], x.shape[-1]
    launch = _merge_backward_launch(pixels, dim, num_processors(x))
    grad_merged = torch.empty_like(x)
    out = torch.empty_like(x) if recompute_out else None
    sums = x.new_empty((launch.grid[0], 2 + NUM_ROUTES, dim), dtype=torch.float32)
    launch(grad_out, merged, x, weight, bias, moments, grad_merged, out, sums)
    return MergeGradients(grad_merged, sums, out)


class _Ranks(NamedTuple):
    rank: int
    block_r: int
    dstate: int


class _Flags(NamedTuple):
    wrap: bool
    wide: bool
    exact: bool
    nvidia: bool
    precision: str


@lru_cache(maxsize=MAX_PLANS)
def _forward_launches(
    sizes: Sizes, plan: Plan, save: bool, device: Device
) -> Tuple[Tuple[Launch, ...], Tuple[int, ...], Optional[Tuple[int, ...]]]:
    """The launches, the shape of the states, and that of what passes between tiles and chunks."""
    schedule, wrap = plan.forward, _wraps(sizes, plan)
    chunks, tiles = _cut(sizes, schedule, wrap)
    shape = states_shape(sizes, plan) if save else (0, 0, 0)
    integers = sizes.height, sizes.width, sizes.dim, _magic_of(sizes, schedule, wrap), chunks, tiles, shape[2]
    programs = cdiv(sizes.dim, schedule.tile.block_d) * 2 * chunks * sizes.batch
    launches = []
    for summary in (True, False) if chunks > 1 else (False,):
        saved = schedule.steps // plan.backward.steps if save and not summary else 0
        constants = saved, summary, *_constants(sizes, schedule, wrap, device)
        registers = schedule.registers if device.nvidia else None
        launches.append(Launch(scan_kernel, programs, integers, constants, schedule.warps, registers))
    return tuple(launches), shape, _summary_shape(sizes, chunks)


@lru_cache(maxsize=MAX_PLANS)
def _backward_launches(
    sizes: Sizes, plan: Plan, log_A: bool, device: Device
) -> Tuple[Tuple[Launch, ...], int, int, Optional[Tuple[int, ...]]]:
    """The launches, blocks of channels, groups of batch entries and chunks, and the shape of what passes between tiles
    and chunks."""
    schedule, wrap = plan.backward, _wraps(sizes, plan)
    chunks, tiles = _cut(sizes, schedule, wrap)
    blocks, groups = cdiv(sizes.dim, schedule.tile.block_d), cdiv(sizes.batch, schedule.batches)
    integers = (
        *(sizes.batch, sizes.height, sizes.width, sizes.dim, _magic_of(sizes, schedule, wrap)),
        *(chunks, tiles, schedule.batches, states_shape(sizes, plan)[2]),
    )
    launches = []
    for summary in (True, False) if chunks > 1 else (False,):
        constants = summary, log_A, *_constants(sizes, schedule, wrap, device)
        registers = schedule.registers if device.nvidia else None
        programs = blocks * 2 * chunks * groups
        launches.append(Launch(scan_backward_kernel, programs, integers, constants, schedule.warps, registers))
    return tuple(launches), blocks, groups * chunks, _summary_shape(sizes, chunks)


@lru_cache(maxsize=MAX_PLANS)
def _join_launch(x_size: int, x_dbl_size: int, blocks: int) -> Launch:
    programs = cdiv(x_size, _JOIN_BLOCK) + cdiv(x_dbl_size, _JOIN_BLOCK)
    return Launch(join_kernel, programs, (x_size, x_dbl_size, blocks), (_JOIN_BLOCK,))


@lru_cache(maxsize=MAX_PLANS)
def _merge_launch(pixels: int, dim: int, eps: float) -> Launch:
    block_d = next_power_of_2(dim)
    rows = max(_MERGE_ELEMENTS // block_d, 1)
    return Launch(merge_norm_kernel, cdiv(pixels, rows), (pixels,), (eps, dim, block_d, rows))


@lru_cache(maxsize=MAX_PLANS)
def _merge_backward_launch(pixels: int, dim: int, processors: int) -> Launch:
    block_d = next_power_of_2(dim)
    rows = max(_MERGE_ELEMENTS // block_d, 1)
    programs, rows_per_program = share_rows(pixels, rows, _MERGE_PROGRAMS_PER_PROCESSOR * processors)
    return Launch(merge_norm_backward_kernel, programs, (pixels, rows_per_program), (dim, block_d, rows))


def _constants(sizes: Sizes, schedule: Schedule, wrap: bool, device: Device) -> tuple:
    """The last constants of both scans."""
    wide = sizes.seqlen * max(sizes.dim, sizes.projections) >= 2**31
    ranks = _Ranks(sizes.dt_rank, sizes.block_r, sizes.dstate)
    return ranks, schedule.tile, _Flags(wrap, wide, device.exact, device.nvidia, device.precision)


def _summary_shape(sizes: Sizes, chunks: int) -> Optional[Tuple[int, ...]]:
    """[B, 4, chunks, N, D], or None where all stays in registers."""
    if chunks == 1 and sizes.dstate == 1:
        return None
    return sizes.batch, NUM_ROUTES, chunks, sizes.dstate, sizes.dim


def _summaries(shape: Optional[Tuple[int, ...]], like: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Room for states between tiles, for states at the ends of chunks, and for the sums of dt over chunks."""
    if shape is None:
        return like, like, like
    ends = torch.empty(shape, dtype=torch.float32, device=like.device)
    return torch.empty_like(ends), ends, ends.new_empty((*shape[:3], shape[4]))


def _wraps(sizes: Sizes, plan: Plan) -> bool:
    """Whether tiles cross the ends of columns: where ending them there would leave too many steps unused."""
    steps = max(plan.forward.steps, plan.backward.steps)
    return sizes.height > 1 and cdiv(sizes.height, steps) * steps > 1.2 * sizes.height


def _cut(sizes: Sizes, schedule: Schedule, wraps: bool) -> Tuple[int, int]:
    """Chunks, none of them empty, and tiles of a chunk: an even number, since two routes meet half way."""
    tiles = _tiles(sizes, schedule.steps, wraps)
    chunk_tiles = 2 * cdiv(tiles, 2 * schedule.chunks)
    return cdiv(tiles, chunk_tiles), chunk_tiles


def _tiles(sizes: Sizes, steps: int, wraps: bool) -> int:
    """Tiles of a route, the larger number of rows and columns."""
    tiles = cdiv(sizes.seqlen, steps)
    if wraps or sizes.height == 1:
        return tiles
    return max(tiles, sizes.width * cdiv(sizes.height, steps))


def _magic_of(sizes: Sizes, schedule: Schedule, wraps: bool) -> int:
    """ceil(2**32 / divisor) as a signed integer of 32 bits; see `routes.line_of`."""
    divisor = sizes.height if wraps else cdiv(sizes.height, schedule.steps)
    magic = cdiv(2**32, divisor) if divisor > 1 else 0
    return magic - 2**32 if magic >= 2**31 else magic
