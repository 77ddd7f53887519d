"""Launches of SS2D's kernels: how they cut their work, by the sizes of the map and the GPU."""

from functools import lru_cache
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._launch import Launcher, cdiv, dot_precision, is_nvidia, next_power_of_2, num_processors
from .backward import scan_backward_kernel
from .forward import scan_kernel
from .merge_norm import merge_norm_backward_kernel, merge_norm_kernel

NUM_ROUTES = 4
_MIN_CHUNK = 128  # steps
_MERGE_ELEMENTS = 2048  # pixels times channels that a program of the merge holds at a time
_MERGE_PROGRAMS_PER_PROCESSOR = 8  # of the merge's backward pass, each of which leaves a partial sum

_scan = Launcher(scan_kernel)
_scan_backward = Launcher(scan_backward_kernel)
_merge_norm = Launcher(merge_norm_kernel)
_merge_norm_backward = Launcher(merge_norm_backward_kernel)


class Tile(NamedTuple):
    """Steps that a thread walks, threads that split the steps of a tile, and channels.

    A tile must have 16 steps at least, and a multiple of 16 channels.
    """

    steps: int
    splits: int
    block_d: int


class Launch(NamedTuple):
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
    """Launches of both passes.

    The backward pass starts its tiles from saved states: they must be the tiles of the forward pass, or what a thread
    of it walks of one.
    """

    forward: Launch
    backward: Launch


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


def plan_of(sizes: Sizes, processors: int) -> Plan:
    """Few chunks while the batch and the channels alone give every processor enough programs."""
    programs = sizes.batch * 2 * cdiv(sizes.dim, 32)
    # As many programs as run at once where each has two warps with 168 registers a thread.
    wanted = 6 * processors // max(programs, 1) if programs < processors else 1
    chunks = max(min(wanted, sizes.seqlen // _MIN_CHUNK), 1)
    # What fits on the processors at once is decided by registers: three programs of four warps with 168 each, two
    # with what the compiler would take. Many programs hide the latency of each other's steps; few share the steps of
    # a tile between threads.
    fits_at_once = 2 * processors < programs * chunks <= 3 * processors
    splits = 2 if programs * chunks <= 3 * processors else 1
    forward = Launch(Tile(16, splits, 32), chunks, registers=168)
    # What is left over of programs sums the gradients of parameters over the batch, which saves memory.
    batches = max(programs * chunks // (5 * processors), 1)
    return Plan(forward, Launch(Tile(8, 2, 32), chunks, batches, registers=168 if fits_at_once else None))


plan = lru_cache(maxsize=4096)(plan_of)  # not for symbolic sizes, which cannot be hashed


def sizes_of(x: Tensor, dt_weight: Tensor, A: Tensor) -> Sizes:
    return Sizes(*x.shape, dt_weight.shape[-1], A.shape[-1])


def states_shape(sizes: Sizes, plan: Plan) -> Tuple[int, ...]:
    """State before each tile of the backward pass on each route, [B, 4, states, N, D]."""
    return sizes.batch, NUM_ROUTES, _tiles(sizes, plan.backward.steps, _wraps(sizes, plan)), sizes.dstate, sizes.dim


def scan_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, save: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """Sums of <C, h> / ln 2 over the routes by rows and over those by columns, each [B, H, W, D]; and with `save` the
    states of `states_shape` / ln 2. All tensors are contiguous."""
    sizes = sizes_of(x, dt_weight, A)
    launches = plan(sizes, num_processors(x))
    launch, wrap = launches.forward, _wraps(sizes, launches)
    chunks, tiles = _cut(sizes, launch, wrap)
    y_rows, y_columns = torch.empty_like(x), torch.empty_like(x)
    shape = states_shape(sizes, launches) if save else (0, 0, 0)
    states = torch.empty(shape, dtype=torch.float32, device=x.device)
    tensors = x, x_dbl, dt_weight, dt_bias, A, y_rows, y_columns, states, *_summaries(sizes, chunks, A)
    integers = sizes.height, sizes.width, sizes.dim, _magic_of(sizes, launch, wrap), chunks, tiles, shape[2]
    programs = cdiv(sizes.dim, launch.tile.block_d) * 2 * chunks * sizes.batch
    for summary in (True, False) if chunks > 1 else (False,):
        saved = launch.steps // launches.backward.steps if save and not summary else 0
        constants = saved, summary, *_constants_for(x, sizes, launch, wrap)
        _scan(programs, tensors, integers, constants, launch.warps, _registers(x, launch))
    return y_rows, y_columns, states


class ScanGradients(NamedTuple):
    """Gradients of `scan_forward`: of x by the routes by rows and by columns [B, H, W, D]; partial sums along dimension 0
    of those of x_dbl [.., B, H, W, 4, R + 2N], in x's dtype; and those of dt_weight, dt_bias and A in fp32."""

    x_rows: Tensor
    x_columns: Tensor
    x_dbl: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor


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
    """Gradients of the merged map sum(D) * x + ln 2 * (y_rows + y_columns), given ln 2 times the map's.

    Args:
        states: Of `scan_forward`.
        log_A: Return the gradient of log(-A) in place of A's.
    """
    sizes = sizes_of(x, dt_weight, A)
    launches = plan(sizes, num_processors(x))
    launch, wrap = launches.backward, _wraps(sizes, launches)
    chunks, tiles = _cut(sizes, launch, wrap)
    blocks, batch_groups = cdiv(sizes.dim, launch.tile.block_d), cdiv(sizes.batch, launch.batches)
    x_rows, x_columns = torch.empty_like(x), torch.empty_like(x)
    partial_x_dbl = torch.empty((blocks, *x_dbl.shape), dtype=x.dtype, device=x.device)
    partial = torch.empty(batch_groups * chunks, sizes.parameters, dtype=torch.float32, device=x.device)
    summaries = _summaries(sizes, chunks, A)
    inputs = grad_y, x, x_dbl, dt_weight, dt_bias, A, D, states
    integers = (
        *(sizes.batch, sizes.height, sizes.width, sizes.dim, _magic_of(sizes, launch, wrap)),
        *(chunks, tiles, launch.batches, states.shape[2]),
    )
    for summary in (True, False) if chunks > 1 else (False,):
        _scan_backward(
            blocks * 2 * chunks * batch_groups,
            (*inputs, *summaries, x_rows, x_columns, partial_x_dbl, partial),
            integers,
            (summary, log_A, *_constants_for(x, sizes, launch, wrap)),
            launch.warps,
            _registers(x, launch),
        )
    parameters = dt_weight, dt_bias, A
    totals = partial.sum(dim=0).split([parameter.numel() for parameter in parameters])
    grads = (total.view(parameter.shape) for total, parameter in zip(totals, parameters))
    return ScanGradients(x_rows, x_columns, partial_x_dbl, *grads)


class MergeOutputs(NamedTuple):
    out: Tensor
    merged: Optional[Tensor]
    moments: Optional[Tensor]


def merge_forward(
    y_rows: Tensor,
    y_columns: Tensor,
    x: Tensor,
    D: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    save: bool,
) -> MergeOutputs:
    """ln 2 * (y_rows + y_columns) + sum(D) * x, normalised if there is a weight; with `save` also what the backward pass
    needs of the norm: the map before it, and means and reciprocal deviations [2, pixels]."""
    pixels, block_d, rows = _merge_blocks(x)
    out = torch.empty_like(x)
    save = save and weight is not None
    merged = torch.empty_like(x) if save else None
    moments = torch.empty(2, pixels, dtype=torch.float32, device=x.device) if save else None
    tensors = y_rows, y_columns, x, D, weight, bias, merged, moments, out
    _merge_norm(cdiv(pixels, rows), tensors, (pixels,), (eps, x.shape[-1], block_d, rows))
    return MergeOutputs(out, merged, moments)


class MergeGradients(NamedTuple):
    """ln 2 times the gradient of the merged map; those of the norm's weight, its bias and each route's D, [3, D] in fp32,
    of which the first two mean nothing without a norm; and the output of the norm, if wanted."""

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
    pixels, block_d, rows = _merge_blocks(x)
    programs = max(min(cdiv(pixels, rows), _MERGE_PROGRAMS_PER_PROCESSOR * num_processors(x)), 1)
    rows_per_program = cdiv(cdiv(pixels, programs), rows) * rows
    grad_merged = torch.empty_like(x)
    out = torch.empty_like(x) if recompute_out else None
    partial = torch.empty(programs, 3, x.shape[-1], dtype=torch.float32, device=x.device)
    tensors = grad_out, merged, x, weight, bias, moments, grad_merged, out, partial
    _merge_norm_backward(programs, tensors, (pixels, rows_per_program), (x.shape[-1], block_d, rows))
    return MergeGradients(grad_merged, partial.sum(dim=0), out)


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


def _constants_for(x: Tensor, sizes: Sizes, launch: Launch, wrap: bool) -> tuple:
    """The last constants of both scans."""
    wide = sizes.seqlen * max(sizes.dim, sizes.projections) >= 2**31
    ranks = _Ranks(sizes.dt_rank, max(next_power_of_2(sizes.dt_rank), 16), sizes.dstate)
    return ranks, launch.tile, _Flags(wrap, wide, x.dtype != torch.bfloat16, is_nvidia(x), dot_precision(x))


def _summaries(sizes: Sizes, chunks: int, like: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Room for states between tiles [B, 4, chunks, N, D], for states at the ends of chunks, and for the sums of dt over
    chunks [B, 4, chunks, D]."""
    if chunks == 1 and sizes.dstate == 1:  # all stays in registers
        return like, like, like
    shape = sizes.batch, NUM_ROUTES, chunks, sizes.dstate, sizes.dim
    ends = torch.empty(shape, dtype=torch.float32, device=like.device)
    return torch.empty_like(ends), ends, ends.new_empty(sizes.batch, NUM_ROUTES, chunks, sizes.dim)


def _registers(x: Tensor, launch: Launch) -> Optional[int]:
    return launch.registers if is_nvidia(x) else None


def _wraps(sizes: Sizes, plan: Plan) -> bool:
    """Whether tiles cross the ends of columns: where ending them there would leave too many steps unused."""
    steps = max(plan.forward.steps, plan.backward.steps)
    return sizes.height > 1 and cdiv(sizes.height, steps) * steps > 1.2 * sizes.height


def _cut(sizes: Sizes, launch: Launch, wraps: bool) -> Tuple[int, int]:
    """Chunks, none of them empty, and tiles of a chunk: an even number, since two routes meet half way."""
    tiles = _tiles(sizes, launch.steps, wraps)
    chunk_tiles = 2 * cdiv(tiles, 2 * launch.chunks)
    return cdiv(tiles, chunk_tiles), chunk_tiles


def _tiles(sizes: Sizes, steps: int, wraps: bool) -> int:
    """Tiles of a route, the larger number of rows and columns."""
    tiles = cdiv(sizes.seqlen, steps)
    if wraps or sizes.height == 1:
        return tiles
    return max(tiles, sizes.width * cdiv(sizes.height, steps))


def _magic_of(sizes: Sizes, launch: Launch, wraps: bool) -> int:
    """ceil(2**32 / divisor) as a signed integer of 32 bits; see `routes.line_of`."""
    divisor = sizes.height if wraps else cdiv(sizes.height, launch.steps)
    magic = cdiv(2**32, divisor) if divisor > 1 else 0
    return magic - 2**32 if magic >= 2**31 else magic


def _merge_blocks(x: Tensor) -> Tuple[int, int, int]:
    """Pixels, and the channels and pixels of a block of the merge."""
    dim = x.shape[-1]
    block_d = next_power_of_2(dim)
    return x.numel() // dim, block_d, max(_MERGE_ELEMENTS // block_d, 1)
